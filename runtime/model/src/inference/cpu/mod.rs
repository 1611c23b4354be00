//! Inference on the CPU with kernels of our own: quantised weights are used as they are, a step reads
//! each weight once, and nothing is allocated per token.
//!
//! A token's numbers are the same bits whatever the batch, the pieces of its prompt, the number of
//! threads and the blocks that hold its keys: see [`multiply`] and [`attention`].

mod activations;
#[allow(clippy::needless_range_loop, reason = "loops over registers are plainer by index")]
mod additions;
#[allow(clippy::needless_range_loop, reason = "as above")]
mod attention;
#[allow(clippy::needless_range_loop, reason = "as above")]
mod isa;
mod matrix;
#[allow(clippy::needless_range_loop, reason = "as above")]
mod multiply;
mod rows;
mod share;
mod team;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "as above")]
mod x86;

use super::{BLOCK_TOKENS, Outputs, Piece, Precision, Want};
use crate::layers::{Projection as Name, Rope};
use crate::lora::Adapter;
use crate::parameters::{EMBEDDING, FINAL_NORM, LM_HEAD, layer_bias_names, layer_weight_names};
use crate::{Config, ModelError, Pretrained};
use activations::Activations;
use additions::{Additions, Output, Pair, Segment};
use attention::{LayerCache, Shape, Task};
use isa::{InstructionSet, dispatch};
use matrix::{Format, Matrix};
use multiply::{Projection, Write};
use share::Shared;
use tch::{Device, Kind, Tensor};
use team::Team;

/// Positions of a prompt that one thread attends for at a time.
const POSITIONS: usize = 16;

#[derive(Debug)]
pub struct CpuEngine {
    set: InstructionSet,
    team: Team,
    eps: f32,
    shape: Shape,
    hidden: usize,
    vocabulary: usize,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Projection,
    /// Absent where it is the head.
    embedding: Option<Matrix>,
    /// Cosines, then sines, of each position.
    rotations: Vec<f32>,
    caches: Vec<LayerCache>,
    buffers: Buffers,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    query_key_value: Projection,
    /// Of queries, keys and values one after the other, where the family has them.
    biases: Option<Vec<f32>>,
    output: Projection,
    post_norm: Vec<f32>,
    gate_up: Projection,
    down: Projection,
    adapted: Adapted,
}

/// What adapters add to a layer's projections.
#[derive(Debug)]
struct Adapted {
    query_key_value: Additions,
    output: Additions,
    gate_up: Additions,
    down: Additions,
}

/// What a step computes with, kept for the next one.
#[derive(Debug, Default)]
struct Buffers {
    places: Vec<Place>,
    /// Rows that have an adapter.
    segments: Vec<Segment>,
    /// Numbers between the two matrices of adapters.
    between: Vec<f32>,
    x: Vec<f32>,
    activations: Activations,
    query_key_value: Vec<f32>,
    gate_up: Vec<f32>,
}

/// Where a row of the batch belongs.
#[derive(Clone, Copy, Debug)]
struct Place {
    token: u32,
    position: usize,
    block: usize,
    slot: usize,
}

impl CpuEngine {
    pub fn new(
        model: &Pretrained,
        adapters: &[Adapter],
        precision: Precision,
        max_length: usize,
        blocks: usize,
        threads: usize,
    ) -> Result<Self, ModelError> {
        let config = &model.config;
        let shape = Shape::new(config);
        let loader = Loader { model, adapters, precision };
        let embedding = loader.matrix(EMBEDDING, true)?;
        let (head, embedding) = match config.tie_word_embeddings {
            true => (embedding, None),
            false => (loader.matrix(LM_HEAD, true)?, Some(embedding)),
        };
        let engine = Self {
            set: InstructionSet::detect(),
            team: Team::new(threads).map_err(ModelError::NoThreads)?,
            eps: config.eps as f32,
            shape,
            hidden: config.hidden,
            vocabulary: config.vocab,
            layers: (0..config.layers).map(|index| loader.layer(index)).collect::<Result<_, _>>()?,
            norm: loader.vector(FINAL_NORM)?,
            head: Projection::new(vec![head]),
            embedding,
            rotations: rotations(config, max_length)?,
            caches: (0..config.layers).map(|_| LayerCache::new(shape, blocks)).collect(),
            buffers: Buffers::default(),
        };
        let bytes: usize = engine.layers.iter().map(Layer::bytes).sum::<usize>() + engine.head.bytes();
        tracing::info!(set = engine.set.name(), threads, bytes, "weights are laid out for the CPU");
        Ok(engine)
    }

    /// Bytes of keys and values of one token.
    pub fn token_bytes(config: &Config) -> usize {
        let shape = Shape::new(config);
        config.layers * shape.token_bytes()
    }

    /// The pieces are checked.
    pub fn step(&mut self, pieces: &[Piece<'_>], outputs: &mut Outputs) {
        self.place(pieces);
        self.embed();
        for index in 0..self.layers.len() {
            self.attend(index, pieces);
            self.feed_forward(index);
        }
        self.produce(pieces, outputs);
    }

    fn place(&mut self, pieces: &[Piece<'_>]) {
        let places = pieces.iter().flat_map(|piece| {
            piece.tokens.iter().enumerate().map(|(index, token)| {
                let position = piece.past + index;
                let block = piece.blocks[position / BLOCK_TOKENS] as usize;
                Place { token: *token, position, block, slot: position % BLOCK_TOKENS }
            })
        });
        self.buffers.places.clear();
        self.buffers.places.extend(places);
        self.buffers.segments.clear();
        let mut first = 0;
        for piece in pieces {
            let rows = piece.tokens.len();
            match (piece.adapter, self.buffers.segments.last_mut()) {
                (None, _) => {}
                (Some(adapter), Some(last)) if last.adapter == adapter && last.first + last.rows == first => {
                    last.rows += rows;
                }
                (Some(adapter), _) => self.buffers.segments.push(Segment { adapter, first, rows }),
            }
            first += rows;
        }
    }

    fn embed(&mut self) {
        let (hidden, places) = (self.hidden, &self.buffers.places);
        self.buffers.x.resize(places.len() * hidden, 0.0);
        let x = Shared::new(&mut self.buffers.x);
        let (embedding, head) = (&self.embedding, &self.head);
        self.team.each(places.len(), |row| {
            // SAFETY: each row once.
            let to = unsafe { x.slice(row * hidden, hidden) };
            match embedding {
                Some(matrix) => matrix.row(places[row].token as usize, to),
                None => head.row(places[row].token as usize, to),
            }
        });
    }

    fn attend(&mut self, index: usize, pieces: &[Piece<'_>]) {
        let layer = &self.layers[index];
        let stride = layer.query_key_value.outputs();
        let rows = self.buffers.places.len();
        normalize_rows(
            self.set,
            &mut self.team,
            &self.buffers.x,
            Norm { weight: &layer.input_norm, eps: self.eps },
            &mut self.buffers.activations,
            layer.query_key_value.is_quantized(),
        );
        self.buffers.query_key_value.resize(rows * stride, 0.0);
        let (x, out) = (&self.buffers.activations, &mut self.buffers.query_key_value);
        layer.query_key_value.apply(self.set, &mut self.team, x, out, Write::Replace);
        let batch = (x, &self.buffers.segments[..]);
        let out = Output { numbers: out, outputs: stride };
        layer.adapted.query_key_value.apply(self.set, &mut self.team, batch, out, &mut self.buffers.between);
        self.rotate_and_keep(index, stride);
        self.mix(index, pieces, stride);
        let layer = &self.layers[index];
        let (x, out) = (&self.buffers.activations, &mut self.buffers.x);
        layer.output.apply(self.set, &mut self.team, x, out, Write::Add);
        let batch = (x, &self.buffers.segments[..]);
        let out = Output { numbers: out, outputs: self.hidden };
        layer.adapted.output.apply(self.set, &mut self.team, batch, out, &mut self.buffers.between);
    }

    /// Adds biases, rotates queries and keys and writes keys and values into the cache.
    fn rotate_and_keep(&mut self, index: usize, stride: usize) {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let cache = self.caches[index].share();
        let buffer = Shared::new(&mut self.buffers.query_key_value);
        let (places, rotations) = (&self.buffers.places, &self.rotations);
        let biases = self.layers[index].biases.as_deref().unwrap_or_default();
        self.team.each(places.len(), |row| {
            let place = &places[row];
            // SAFETY: each row once.
            let row = unsafe { buffer.slice(row * stride, stride) };
            row.iter_mut().zip(biases).for_each(|(value, bias)| *value += bias);
            let (rotated, value) = row.split_at_mut((heads + kv_heads) * head_dim);
            let cos_sin = &rotations[place.position * head_dim..][..head_dim];
            rotated.chunks_exact_mut(head_dim).for_each(|head| rows::rotate(head, cos_sin));
            // SAFETY: rows are different positions of their sequences, hence different slots.
            unsafe { cache.write(place.block, place.slot, &rotated[heads * head_dim..], value) };
        });
    }

    /// Attention of all pieces, into the activations.
    fn mix(&mut self, index: usize, pieces: &[Piece<'_>], stride: usize) {
        let rows = self.buffers.places.len();
        let quantized = self.layers[index].output.is_quantized();
        self.buffers.activations.shape(rows, self.shape.heads * self.shape.head_dim, quantized);
        let cache = self.caches[index].share();
        let out = Shared::new(&mut self.buffers.activations.values);
        let queries = self.buffers.query_key_value.as_slice();
        let mut tasks = Vec::with_capacity(pieces.len() * self.shape.kv_heads);
        let mut row = 0;
        for piece in pieces {
            for first in (0..piece.tokens.len()).step_by(POSITIONS) {
                tasks.extend((0..self.shape.kv_heads).map(|head| Task {
                    cache,
                    blocks: piece.blocks,
                    head,
                    row: row + first,
                    position: piece.past + first,
                    count: POSITIONS.min(piece.tokens.len() - first),
                    queries,
                    stride,
                    out,
                }));
            }
            row += piece.tokens.len();
        }
        let set = self.set;
        // SAFETY: tasks are different rows or heads; the cache is written.
        self.team.each(tasks.len(), |index| unsafe { attention::attend(set, &tasks[index]) });
        round_rows(set, &mut self.team, &mut self.buffers.activations);
    }

    fn feed_forward(&mut self, index: usize) {
        let layer = &self.layers[index];
        let rows = self.buffers.places.len();
        normalize_rows(
            self.set,
            &mut self.team,
            &self.buffers.x,
            Norm { weight: &layer.post_norm, eps: self.eps },
            &mut self.buffers.activations,
            layer.gate_up.is_quantized(),
        );
        let width = layer.gate_up.outputs();
        self.buffers.gate_up.resize(rows * width, 0.0);
        let (x, out) = (&self.buffers.activations, &mut self.buffers.gate_up);
        layer.gate_up.apply(self.set, &mut self.team, x, out, Write::Replace);
        let batch = (x, &self.buffers.segments[..]);
        let out = Output { numbers: out, outputs: width };
        layer.adapted.gate_up.apply(self.set, &mut self.team, batch, out, &mut self.buffers.between);
        self.buffers.activations.shape(rows, width / 2, layer.down.is_quantized());
        gate_rows(self.set, &mut self.team, &self.buffers.gate_up, &mut self.buffers.activations);
        let (x, out) = (&self.buffers.activations, &mut self.buffers.x);
        layer.down.apply(self.set, &mut self.team, x, out, Write::Add);
        let batch = (x, &self.buffers.segments[..]);
        let out = Output { numbers: out, outputs: self.hidden };
        layer.adapted.down.apply(self.set, &mut self.team, batch, out, &mut self.buffers.between);
    }

    /// What each piece wants of the last layer.
    fn produce(&mut self, pieces: &[Piece<'_>], outputs: &mut Outputs) {
        outputs.begin(self.vocabulary, pieces);
        self.sum_hidden(pieces, outputs);
        let rows = wanted_rows(pieces);
        if rows.is_empty() {
            return;
        }
        let hidden = self.hidden;
        let mut chosen = Vec::with_capacity(rows.len() * hidden);
        rows.iter().for_each(|row| chosen.extend_from_slice(&self.buffers.x[row * hidden..][..hidden]));
        let norm = Norm { weight: &self.norm, eps: self.eps };
        let quantized = self.head.is_quantized();
        normalize_rows(self.set, &mut self.team, &chosen, norm, &mut self.buffers.activations, quantized);
        self.head.apply(self.set, &mut self.team, &self.buffers.activations, &mut outputs.logits, Write::Replace);
    }

    /// Sums of the normalised last hidden states, for embeddings.
    fn sum_hidden(&mut self, pieces: &[Piece<'_>], outputs: &mut Outputs) {
        if pieces.iter().all(|piece| piece.want != Want::Hidden) {
            return;
        }
        let hidden = self.hidden;
        let norm = Norm { weight: &self.norm, eps: self.eps };
        normalize_rows(self.set, &mut self.team, &self.buffers.x, norm, &mut self.buffers.activations, false);
        let mut rows = self.buffers.activations.values.chunks_exact(hidden);
        for (piece, sum) in pieces.iter().zip(&mut outputs.hidden) {
            let of_piece = rows.by_ref().take(piece.tokens.len());
            if piece.want == Want::Hidden {
                sum.resize(hidden, 0.0);
                of_piece.for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value));
            } else {
                of_piece.for_each(drop);
            }
        }
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        [&self.query_key_value, &self.output, &self.gate_up, &self.down].map(Projection::bytes).iter().sum()
    }
}

/// Rows of the batch whose logits are wanted.
fn wanted_rows(pieces: &[Piece<'_>]) -> Vec<usize> {
    let mut rows = Vec::new();
    let mut first = 0;
    for piece in pieces {
        let end = first + piece.tokens.len();
        match piece.want {
            Want::Last => rows.push(end - 1),
            Want::Every => rows.extend(first..end),
            Want::Nothing | Want::Hidden => {}
        }
        first = end;
    }
    rows
}

#[derive(Clone, Copy)]
struct Norm<'a> {
    weight: &'a [f32],
    eps: f32,
}

fn normalize_rows(
    set: InstructionSet,
    team: &mut Team,
    x: &[f32],
    norm: Norm<'_>,
    out: &mut Activations,
    quantized: bool,
) {
    let columns = norm.weight.len();
    let rows = x.len() / columns;
    out.shape(rows, columns, quantized);
    let out = &out.share();
    team.each(rows, |row| {
        let from = &x[row * columns..][..columns];
        let norm = &norm;
        // SAFETY: each row once; the set was detected.
        unsafe {
            dispatch!(
                set,
                normalize_row(from: &[f32], norm: &Norm<'_>, out: &activations::SharedActivations, row: usize)
            )
        }
    });
}

#[inline(always)]
unsafe fn normalize_row<I: isa::Isa>(from: &[f32], norm: &Norm<'_>, out: &activations::SharedActivations, row: usize) {
    // SAFETY: the caller's promises.
    unsafe {
        rows::normalize::<I>(from, norm.weight, norm.eps, out.row(row));
        out.round_row::<I>(row);
    }
}

fn gate_rows(set: InstructionSet, team: &mut Team, gate_up: &[f32], out: &mut Activations) {
    let width = 2 * out.columns;
    let rows = out.rows;
    let out = &out.share();
    team.each(rows, |row| {
        let from = &gate_up[row * width..][..width];
        // SAFETY: each row once; the set was detected.
        unsafe { dispatch!(set, gate_row(from: &[f32], out: &activations::SharedActivations, row: usize)) }
    });
}

#[inline(always)]
unsafe fn gate_row<I: isa::Isa>(from: &[f32], out: &activations::SharedActivations, row: usize) {
    // SAFETY: the caller's promises.
    unsafe {
        rows::gate::<I>(from, out.row(row));
        out.round_row::<I>(row);
    }
}

fn round_rows(set: InstructionSet, team: &mut Team, out: &mut Activations) {
    let rows = out.rows;
    let out = &out.share();
    team.each(rows, |row| {
        // SAFETY: each row once; the set was detected.
        unsafe { dispatch!(set, round_row(out: &activations::SharedActivations, row: usize)) }
    });
}

#[inline(always)]
unsafe fn round_row<I: isa::Isa>(out: &activations::SharedActivations, row: usize) {
    // SAFETY: the caller's promises.
    unsafe { out.round_row::<I>(row) }
}

/// Rotary tables as training has them, to the bit.
fn rotations(config: &Config, max_length: usize) -> Result<Vec<f32>, ModelError> {
    let half = (config.head_dim / 2) as i64;
    let rope = Rope::new(config, max_length, Device::Cpu, Kind::Float);
    let kind = (Kind::Float, Device::Cpu);
    // (1, 0) turned by an angle is its cosine and its sine.
    let east = Tensor::cat(&[Tensor::ones([half], kind), Tensor::zeros([half], kind)], 0);
    let east = east.expand([max_length as i64, 2 * half], false);
    Ok(Vec::try_from(rope.rotate(&east).reshape([-1]))?)
}

/// Weights by name, in the format asked for.
struct Loader<'a> {
    model: &'a Pretrained,
    adapters: &'a [Adapter],
    precision: Precision,
}

impl Loader<'_> {
    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let names = layer_weight_names(index);
        let matrix = |name: usize| self.matrix(&names[name], false);
        Ok(Layer {
            input_norm: self.vector(&names[0])?,
            query_key_value: Projection::new(vec![matrix(1)?, matrix(2)?, matrix(3)?]),
            biases: self.biases(index)?,
            output: Projection::new(vec![matrix(4)?]),
            post_norm: self.vector(&names[5])?,
            gate_up: Projection::new(vec![matrix(6)?, matrix(7)?]),
            down: Projection::new(vec![matrix(8)?]),
            adapted: Adapted {
                query_key_value: self.additions(index, &[Name::Query, Name::Key, Name::Value])?,
                output: self.additions(index, &[Name::Output])?,
                gate_up: self.additions(index, &[Name::Gate, Name::Up])?,
                down: self.additions(index, &[Name::Down])?,
            },
        })
    }

    /// Of a projection whose outputs are those of `parts` side by side.
    fn additions(&self, layer: usize, parts: &[Name]) -> Result<Additions, ModelError> {
        let of_adapter = |adapter: &Adapter| {
            let mut pairs = Vec::new();
            let mut column = 0;
            for part in parts {
                if let Some((a, b)) = adapter.pairs.get(&part.weight_name(layer)) {
                    let rank = a.size()[0] as usize;
                    pairs.push(Pair::new(&values(a)?, &values(b)?, rank, adapter.scale as f32, column));
                }
                column += part.size(&self.model.config).0 as usize;
            }
            Ok(pairs)
        };
        Ok(Additions { pairs: self.adapters.iter().map(of_adapter).collect::<Result<_, ModelError>>()? })
    }

    fn biases(&self, index: usize) -> Result<Option<Vec<f32>>, ModelError> {
        if !self.model.config.family.has_biases() {
            return Ok(None);
        }
        let parts = layer_bias_names(index).iter().map(|name| self.vector(name)).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(parts.concat()))
    }

    /// Embedding and head lose most by rounding: they get 8 bits where the rest has 4.
    fn matrix(&self, name: &str, is_vocabulary: bool) -> Result<Matrix, ModelError> {
        let tensor = self.tensor(name)?;
        let inputs = tensor.size().last().copied().unwrap_or(1) as usize;
        let packed = self.model.packed.get(name).filter(|_| self.precision == Precision::File);
        if let Some(matrix) = packed.and_then(Matrix::from_packed) {
            return Ok(matrix);
        }
        let format = match self.precision {
            // A file's format that the kernels do not have, of at most 6 bits.
            Precision::File if packed.is_some() => Format::Int8,
            Precision::File | Precision::Fp32 => Format::F32,
            Precision::Bf16 => Format::Bf16,
            Precision::Int4 if !is_vocabulary => Format::Int4,
            Precision::Int8 | Precision::Int4 => Format::Int8,
        };
        Ok(Matrix::new(&values(tensor)?, inputs, format))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        values(self.tensor(name)?)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, ModelError> {
        super::missing_if_none(name, self.model.tensors.get(name))
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    Ok(Vec::try_from(tensor.f_to_kind(Kind::Float)?.f_reshape([-1])?)?)
}
