//! Inference in torch, for GPUs. The projections of a step are shared by all rows; single tokens
//! attend together over their gathered blocks, prompts one after another. Steps that only decode are
//! recorded and replayed ([`decode`]).

mod additions;
mod decode;
mod weight;

use super::{BLOCK_TOKENS, Outputs, Piece, Want, missing_if_none};
use crate::autograd::rms_norm;
use crate::layers::{LayerWeights, Projection, Rope, attention, embed, shared};
use crate::lora::Adapter;
use crate::parameters::{EMBEDDING, FINAL_NORM, head_name};
use crate::{Config, ModelError, Pretrained};
use additions::{Additions, NONE};
use decode::Decoder;
use tch::{Device, Kind, Tensor};
use weight::Weight;
pub use weight::{Bits, Place};

#[derive(Debug)]
pub struct TorchEngine {
    net: Net,
    /// `None` where there are no CUDA graphs.
    decoder: Option<Decoder>,
}

/// Weights and cache on their device.
#[derive(Debug)]
struct Net {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Weight,
    rope: Rope,
    caches: Vec<LayerCache>,
}

/// A layer's weights; projections of one input are one matrix.
#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    /// Of queries, keys and values: `[(heads + 2 · kv_heads) · head_dim, H]`.
    attention: Weight,
    /// What they add, in the same order.
    biases: Option<Tensor>,
    output: Weight,
    post_norm: Tensor,
    /// Gate and up: `[2 · I, H]`.
    feed_forward: Weight,
    down: Weight,
    adapted: Adapted,
}

/// What adapters add to a layer's projections.
#[derive(Debug)]
struct Adapted {
    attention: Option<Additions>,
    output: Option<Additions>,
    feed_forward: Option<Additions>,
    down: Option<Additions>,
}

/// `[(blocks + 1) · BLOCK_TOKENS, kv_heads, head_dim]` each; the last block is nobody's, for rows
/// that only fill up a batch.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

/// What the layers of a step have in common.
struct Batch {
    /// Sines and cosines of each row's position, `[rows, 1, head_dim]`.
    rope: Rope,
    /// Place of each row in the cache.
    slots: Tensor,
    /// The adapter of each row, `[rows, 1]`; `None` where none has one.
    adapters: Option<Tensor>,
    singles: Option<Singles>,
    prompts: Vec<Prompt>,
}

/// Rows that are the only one of their piece.
struct Singles {
    rows: Tensor,
    /// `[pieces, longest]`.
    slots: Tensor,
    /// `[pieces, 1, 1, longest]`: what is seen of it.
    seen: Tensor,
}

/// Rows of one piece.
struct Prompt {
    first: i64,
    length: i64,
    /// All positions up to the last.
    slots: Tensor,
    /// `[length, past + length]`.
    seen: Tensor,
}

impl TorchEngine {
    pub fn new(
        model: &Pretrained,
        adapters: &[Adapter],
        place: Place,
        max_length: usize,
        blocks: usize,
    ) -> Result<Self, ModelError> {
        let decoder = if place.device.is_cuda() { Some(Decoder::new(max_length, blocks)?) } else { None };
        Ok(Self { net: Net::new(model, adapters, place, max_length, blocks)?, decoder })
    }

    /// Bytes of keys and values of one token.
    pub fn token_bytes(config: &Config, kind: Kind) -> usize {
        2 * config.layers * config.kv_heads * config.head_dim * kind.elt_size_in_bytes()
    }

    pub fn step(&mut self, pieces: &[Piece<'_>], outputs: &mut Outputs) -> Result<(), ModelError> {
        outputs.begin(self.net.config.vocab, pieces);
        let decodes = pieces.iter().all(|piece| piece.tokens.len() == 1 && piece.want == Want::Last);
        tch::no_grad(|| match &mut self.decoder {
            Some(decoder) if decodes => decoder.step(&self.net, pieces, outputs),
            _ => self.net.step(pieces, outputs),
        })
    }
}

impl Layer {
    fn new(weights: &LayerWeights, adapted: Adapted, place: Place) -> Result<Self, ModelError> {
        let Place { device, kind, .. } = place;
        let moved = |tensor: &Tensor| Ok::<_, ModelError>(tensor.f_to_device(device)?.f_to_kind(kind)?.detach());
        let one = |parts: &[&Tensor]| Weight::new(&Tensor::f_cat(parts, 0)?, place);
        let biases = weights.biases.as_ref().map(|it| moved(&Tensor::f_cat(&[&it.query, &it.key, &it.value], 0)?));
        Ok(Self {
            input_norm: moved(&weights.input_norm)?,
            attention: one(&[&weights.query, &weights.key, &weights.value])?,
            biases: biases.transpose()?,
            output: one(&[&weights.output])?,
            post_norm: moved(&weights.post_norm)?,
            feed_forward: one(&[&weights.gate, &weights.up])?,
            down: one(&[&weights.down])?,
            adapted,
        })
    }
}

impl Adapted {
    fn new(config: &Config, adapters: &[Adapter], layer: usize, options: (Device, Kind)) -> Result<Self, ModelError> {
        let of = |parts: &[Projection]| {
            let parts: Vec<_> = parts.iter().map(|part| (*part, part.size(config).0)).collect();
            Additions::new(adapters, layer, &parts, options)
        };
        Ok(Self {
            attention: of(&[Projection::Query, Projection::Key, Projection::Value])?,
            output: of(&[Projection::Output])?,
            feed_forward: of(&[Projection::Gate, Projection::Up])?,
            down: of(&[Projection::Down])?,
        })
    }
}

impl Batch {
    /// `made` of `x`, and what the rows' adapters add to it.
    fn adapt(&self, made: Tensor, x: &Tensor, additions: Option<&Additions>) -> Tensor {
        match (additions, &self.adapters) {
            (Some(additions), Some(of_rows)) => made + additions.of(x, of_rows),
            _ => made,
        }
    }
}

impl Net {
    fn new(
        model: &Pretrained,
        adapters: &[Adapter],
        place: Place,
        max_length: usize,
        blocks: usize,
    ) -> Result<Self, ModelError> {
        let (config, Place { device, kind, .. }) = (&model.config, place);
        let find = |name: &str| missing_if_none(name, model.tensors.get(name));
        let take = |name| Ok::<_, ModelError>(find(name)?.f_to_device(device)?.f_to_kind(kind)?.detach());
        let layer = |index| {
            let found = LayerWeights::from_map(&model.tensors, index);
            let adapted = Adapted::new(config, adapters, index, (device, kind))?;
            Layer::new(&missing_if_none(&format!("model.layers.{index}"), found)?, adapted, place)
        };
        let shape = [((blocks + 1) * BLOCK_TOKENS) as i64, config.kv_heads as i64, config.head_dim as i64];
        let zeros = || Tensor::f_zeros(shape, (kind, device));
        let cache = |_| Ok(LayerCache { keys: zeros()?, values: zeros()? });
        Ok(Self {
            embedding: take(EMBEDDING)?,
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            norm: take(FINAL_NORM)?,
            head: Weight::new(find(head_name(config))?, place)?,
            rope: Rope::new(config, max_length, device, kind),
            caches: (0..config.layers).map(cache).collect::<Result<_, ModelError>>()?,
            config: config.clone(),
        })
    }

    fn step(&self, pieces: &[Piece<'_>], outputs: &mut Outputs) -> Result<(), ModelError> {
        let batch = self.batch(pieces);
        let ids: Vec<i64> = pieces.iter().flat_map(|piece| piece.tokens).map(|id| i64::from(*id)).collect();
        let x = self.forward(&self.to_device(&ids), &batch);
        self.produce(pieces, &x, outputs)
    }

    /// Of rows that came out of the last layer: `[rows, V]`, fp32.
    fn logits(&self, x: &Tensor) -> Tensor {
        self.head.of(&rms_norm(x, &self.norm, self.config.eps)).to_kind(Kind::Float)
    }

    /// What comes out of the last layer, `[rows, H]`.
    fn forward(&self, ids: &Tensor, batch: &Batch) -> Tensor {
        let x = embed(&self.embedding, ids);
        self.layers.iter().zip(&self.caches).fold(x, |x, (weights, cache)| self.layer(weights, cache, x, batch))
    }

    fn to_device(&self, numbers: &[i64]) -> Tensor {
        Tensor::from_slice(numbers).to_device(self.embedding.device())
    }

    fn batch(&self, pieces: &[Piece<'_>]) -> Batch {
        let mut positions = Vec::new();
        let mut slots = Vec::new();
        let mut prompts = Vec::new();
        for piece in pieces {
            let (first, end) = (positions.len() as i64, piece.past + piece.tokens.len());
            positions.extend((piece.past..end).map(|position| position as i64));
            slots.extend((piece.past..end).map(|position| slot(piece, position)));
            if piece.tokens.len() > 1 {
                prompts.push(self.prompt(piece, first));
            }
        }
        Batch {
            rope: self.rope.at(&self.to_device(&positions)),
            slots: self.to_device(&slots),
            adapters: self.adapters(pieces),
            singles: self.singles(pieces),
            prompts,
        }
    }

    fn adapters(&self, pieces: &[Piece<'_>]) -> Option<Tensor> {
        pieces.iter().any(|piece| piece.adapter.is_some()).then(|| {
            let of_rows = pieces.iter().flat_map(|piece| std::iter::repeat_n(number(piece), piece.tokens.len()));
            self.to_device(&of_rows.collect::<Vec<_>>()).unsqueeze(1)
        })
    }

    fn prompt(&self, piece: &Piece<'_>, first: i64) -> Prompt {
        let (past, length) = (piece.past as i64, piece.tokens.len() as i64);
        let slots: Vec<i64> = (0..piece.past + piece.tokens.len()).map(|position| slot(piece, position)).collect();
        let all = Tensor::ones([length, past + length], (Kind::Bool, self.embedding.device()));
        let seen = match self.config.sliding_window {
            Some(window) => all.tril(past).triu(past + 1 - window as i64),
            None => all.tril(past),
        };
        Prompt { first, length, slots: self.to_device(&slots), seen }
    }

    fn singles(&self, pieces: &[Piece<'_>]) -> Option<Singles> {
        let longest = pieces.iter().filter(|piece| piece.tokens.len() == 1).map(|piece| piece.past + 1).max()?;
        let (mut rows, mut slots, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let mut row = 0;
        for piece in pieces {
            if piece.tokens.len() == 1 {
                rows.push(row);
                lengths.push(piece.past as i64 + 1);
                let place = |position: usize| if position <= piece.past { slot(piece, position) } else { 0 };
                slots.extend((0..longest).map(place));
            }
            row += piece.tokens.len() as i64;
        }
        let count = rows.len() as i64;
        let positions = Tensor::arange(longest as i64, (Kind::Int64, self.embedding.device()));
        let (positions, lengths) = (positions.unsqueeze(0), self.to_device(&lengths).unsqueeze(1));
        let mut seen = positions.less_tensor(&lengths);
        if let Some(window) = self.config.sliding_window {
            seen = seen.logical_and(&positions.greater_equal_tensor(&(lengths - window as i64)));
        }
        Some(Singles {
            rows: self.to_device(&rows),
            slots: self.to_device(&slots).view([count, longest as i64]),
            seen: seen.view([count, 1, 1, longest as i64]),
        })
    }

    fn layer(&self, weights: &Layer, cache: &LayerCache, x: Tensor, batch: &Batch) -> Tensor {
        let (config, head_dim) = (&self.config, self.config.head_dim as i64);
        let (heads, kv_heads) = (config.heads as i64, config.kv_heads as i64);
        let normed = rms_norm(&x, &weights.input_norm, config.eps);
        let projected = weights.attention.of(&normed);
        let projected = weights.biases.iter().fold(projected, |projected, biases| projected + biases);
        let projected = batch.adapt(projected, &normed, weights.adapted.attention.as_ref());
        let projected = projected.view([-1, heads + 2 * kv_heads, head_dim]);
        let rotated = batch.rope.rotate(&projected.narrow(1, 0, heads + kv_heads));
        cache.write(
            &batch.slots,
            &rotated.narrow(1, heads, kv_heads),
            &projected.narrow(1, heads + kv_heads, kv_heads),
        );
        let mixed = self.mix(cache, &rotated.narrow(1, 0, heads), batch);
        let x = x + batch.adapt(weights.output.of(&mixed), &mixed, weights.adapted.output.as_ref());
        let normed = rms_norm(&x, &weights.post_norm, config.eps);
        let wide = weights.feed_forward.of(&normed);
        let wide = batch.adapt(wide, &normed, weights.adapted.feed_forward.as_ref());
        let width = wide.size()[1] / 2;
        let gated = wide.narrow(1, 0, width).silu() * wide.narrow(1, width, width);
        x + batch.adapt(weights.down.of(&gated), &gated, weights.adapted.down.as_ref())
    }

    /// Attention of `queries [rows, heads, head_dim]`.
    fn mix(&self, cache: &LayerCache, queries: &Tensor, batch: &Batch) -> Tensor {
        let width = (self.config.heads * self.config.head_dim) as i64;
        if let (Some(singles), []) = (&batch.singles, &batch.prompts[..]) {
            return self.mix_singles(cache, queries, singles).view([-1, width]);
        }
        let mut mixed = Tensor::empty([queries.size()[0], width], (queries.kind(), queries.device()));
        if let Some(singles) = &batch.singles {
            let found = self.mix_singles(cache, &queries.index_select(0, &singles.rows), singles);
            mixed = mixed.index_copy_(0, &singles.rows, &found.view([-1, width]));
        }
        for prompt in &batch.prompts {
            let query = queries.narrow(0, prompt.first, prompt.length).transpose(0, 1).unsqueeze(0);
            let (keys, values) = cache.read(&prompt.slots);
            let heads = |x: &Tensor| shared(&self.config, &x.transpose(0, 1).unsqueeze(0));
            let found = attention(&query, &heads(&keys), &heads(&values), Some(&prompt.seen), false);
            let found = found.squeeze_dim(0).transpose(0, 1).reshape([-1, width]);
            mixed.narrow(0, prompt.first, prompt.length).copy_(&found);
        }
        mixed
    }

    /// One new position each. The queries of a key-value head take the place of positions, so that
    /// its keys are not repeated.
    fn mix_singles(&self, cache: &LayerCache, queries: &Tensor, singles: &Singles) -> Tensor {
        let (count, longest) = singles.slots.size2().unwrap_or((0, 0));
        let (kv_heads, head_dim) = (self.config.kv_heads as i64, self.config.head_dim as i64);
        let group = (self.config.heads / self.config.kv_heads) as i64;
        let (keys, values) = cache.read(&singles.slots.view([-1]));
        let heads = |x: &Tensor| x.view([count, longest, kv_heads, head_dim]).transpose(1, 2);
        let queries = queries.reshape([count, kv_heads, group, head_dim]);
        let seen = singles.seen.expand([count, kv_heads, group, longest], false);
        attention(&queries, &heads(&keys), &heads(&values), Some(&seen), false).contiguous()
    }

    fn produce(&self, pieces: &[Piece<'_>], x: &Tensor, outputs: &mut Outputs) -> Result<(), ModelError> {
        let mut rows = Vec::new();
        let mut first = 0;
        for (index, piece) in pieces.iter().enumerate() {
            let length = piece.tokens.len() as i64;
            match piece.want {
                Want::Nothing => {}
                Want::Last => rows.push(first + length - 1),
                Want::Every => rows.extend(first..first + length),
                Want::Hidden => {
                    let normed = rms_norm(&x.narrow(0, first, length), &self.norm, self.config.eps);
                    outputs.hidden[index] = Vec::try_from(normed.sum_dim_intlist(0i64, false, Kind::Float))?;
                }
            }
            first += length;
        }
        if !rows.is_empty() {
            let chosen = x.index_select(0, &self.to_device(&rows));
            let logits = self.logits(&chosen);
            let count = outputs.logits.len();
            logits.to_device(Device::Cpu).contiguous().f_copy_data(&mut outputs.logits, count)?;
        }
        Ok(())
    }
}

/// The number of a piece's adapter.
fn number(piece: &Piece<'_>) -> i64 {
    piece.adapter.map_or(NONE, |adapter| adapter as i64)
}

/// Where a position's keys and values are in the cache.
fn slot(piece: &Piece<'_>, position: usize) -> i64 {
    i64::from(piece.blocks[position / BLOCK_TOKENS]) * BLOCK_TOKENS as i64 + (position % BLOCK_TOKENS) as i64
}

impl LayerCache {
    fn write(&self, slots: &Tensor, keys: &Tensor, values: &Tensor) {
        let _ = self.keys.shallow_clone().index_copy_(0, slots, keys);
        let _ = self.values.shallow_clone().index_copy_(0, slots, values);
    }

    fn read(&self, slots: &Tensor) -> (Tensor, Tensor) {
        (self.keys.index_select(0, slots), self.values.index_select(0, slots))
    }
}
