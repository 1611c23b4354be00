//! The forward pass of LLaMA and its relatives as free functions over named tensors, so that training can run layer by
//! layer (Touvron et al. 2023; rotary embeddings: Su et al. 2021; grouped queries: Ainslie et al.
//! 2023). `B` sequences, `T` positions, `H` hidden units, `V` tokens.

use crate::Config;
use crate::autograd::{self, rms_norm, swiglu};
use crate::parameters::{layer_bias_names, layer_weight_names};
use std::collections::BTreeMap;
use tch::{Device, Kind, TchError, Tensor};

/// Label of positions that carry no loss.
pub const IGNORED: i64 = -100;

/// Rows of logits that exist at a time: bounds memory at `ROWS × V`.
pub(crate) const LOSS_ROWS: i64 = 512;

/// The linear maps of a layer, in canonical order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Projection {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

/// Changes what a projection made of its input: takes the projection, input and output.
pub(crate) type Adapt<'a> = &'a dyn Fn(Projection, &Tensor, Tensor) -> Tensor;

const UNADAPTED: Adapt<'static> = &|_, _, output| output;

impl Projection {
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// The last part of Hugging Face's module name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Output => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Hugging Face's name of its weight in layer `index`.
    pub fn weight_name(self, index: usize) -> String {
        let part = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("model.layers.{index}.{part}.{}.weight", self.name())
    }

    /// Outputs and inputs.
    pub fn size(self, config: &Config) -> (i64, i64) {
        let [hidden, intermediate] = [config.hidden as i64, config.intermediate as i64];
        let [queries, keys] = [config.heads, config.kv_heads].map(|heads| (heads * config.head_dim) as i64);
        match self {
            Self::Query => (queries, hidden),
            Self::Key | Self::Value => (keys, hidden),
            Self::Output => (hidden, queries),
            Self::Gate | Self::Up => (intermediate, hidden),
            Self::Down => (hidden, intermediate),
        }
    }
}

/// The weights of one layer. Projections are `[out, in]`.
#[derive(Debug)]
pub struct LayerWeights {
    pub input_norm: Tensor,
    pub query: Tensor,
    pub key: Tensor,
    pub value: Tensor,
    pub output: Tensor,
    pub post_norm: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
    /// Where the family has them.
    pub biases: Option<Biases>,
}

/// What query, key and value projections add, `[out]`.
#[derive(Debug)]
pub struct Biases {
    pub query: Tensor,
    pub key: Tensor,
    pub value: Tensor,
}

impl LayerWeights {
    /// Shares (does not copy) layer `index`'s tensors; `None` if one is missing. Biases are taken if they
    /// are there.
    pub fn from_map(tensors: &BTreeMap<String, Tensor>, index: usize) -> Option<Self> {
        let get = |name: &String| tensors.get(name).map(Tensor::shallow_clone);
        let mut found: Vec<Tensor> = layer_weight_names(index).iter().map(get).collect::<Option<_>>()?;
        found.extend(layer_bias_names(index).iter().filter_map(get));
        Self::from_slice(&found)
    }

    /// From tensors in the order of [`crate::layer_parameter_names`]: nine, or twelve with biases; `None`
    /// for any other number.
    pub fn from_slice(tensors: &[Tensor]) -> Option<Self> {
        let [input_norm, query, key, value, output, post_norm, gate, up, down, biases @ ..] = tensors else {
            return None;
        };
        let biases = match biases {
            [] => None,
            [query, key, value] => Some([query, key, value].map(Tensor::shallow_clone)),
            _ => return None,
        };
        Some(Self {
            input_norm: input_norm.shallow_clone(),
            query: query.shallow_clone(),
            key: key.shallow_clone(),
            value: value.shallow_clone(),
            output: output.shallow_clone(),
            post_norm: post_norm.shallow_clone(),
            gate: gate.shallow_clone(),
            up: up.shallow_clone(),
            down: down.shallow_clone(),
            biases: biases.map(|[query, key, value]| Biases { query, key, value }),
        })
    }

    /// In the order of [`crate::layer_parameter_names`].
    pub fn as_vec(&self) -> Vec<&Tensor> {
        let mut all = vec![
            &self.input_norm,
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.post_norm,
            &self.gate,
            &self.up,
            &self.down,
        ];
        all.extend(self.biases.iter().flat_map(|biases| [&biases.query, &biases.key, &biases.value]));
        all
    }

    /// [`LayerWeights::as_vec`], owned.
    pub fn into_vec(self) -> Vec<Tensor> {
        let Self { input_norm, query, key, value, output, post_norm, gate, up, down, biases } = self;
        let biases = biases.into_iter().flat_map(|biases| [biases.query, biases.key, biases.value]);
        [input_norm, query, key, value, output, post_norm, gate, up, down].into_iter().chain(biases).collect()
    }

    /// Applies `change` to each tensor.
    pub fn map(&self, mut change: impl FnMut(&Tensor) -> Tensor) -> Self {
        Self {
            input_norm: change(&self.input_norm),
            query: change(&self.query),
            key: change(&self.key),
            value: change(&self.value),
            output: change(&self.output),
            post_norm: change(&self.post_norm),
            gate: change(&self.gate),
            up: change(&self.up),
            down: change(&self.down),
            biases: self.biases.as_ref().map(|biases| Biases {
                query: change(&biases.query),
                key: change(&biases.key),
                value: change(&biases.value),
            }),
        }
    }

    /// Queries, keys and values of `x [.., H]`, biases added; `[.., heads · head_dim]` each.
    pub(crate) fn query_key_value(&self, x: &Tensor) -> [Tensor; 3] {
        let biases = self.biases.as_ref();
        let project = |weight: &Tensor, bias: Option<&Tensor>| match bias {
            Some(bias) => x.linear(weight, Some(bias)),
            None => linear(x, weight),
        };
        [
            project(&self.query, biases.map(|biases| &biases.query)),
            project(&self.key, biases.map(|biases| &biases.key)),
            project(&self.value, biases.map(|biases| &biases.value)),
        ]
    }
}

/// Cosines and sines of the rotary embedding, `[positions, head_dim]` each; the sines of the first half
/// with a minus. For rows that several sequences share, what it is at each of their tokens, and which tokens are whose.
#[derive(Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
    /// Lengths of the sequences in each row, where they are several; the rest of a row is padding.
    packed: Option<Vec<Vec<i64>>>,
}

impl Rope {
    /// Tables for positions `0..max_len`, computed in fp32 and then cast.
    pub fn new(config: &Config, max_len: usize, device: Device, kind: Kind) -> Self {
        let mut frequencies = frequencies(config.rope_theta, config.head_dim).unwrap_or_default();
        config.rope_scaling.apply(&mut frequencies, config.rope_theta);
        let positions = Tensor::arange(max_len as i64, (Kind::Float, Device::Cpu));
        let angles = positions.outer(&Tensor::from_slice(&frequencies));
        let magnitude = config.rope_scaling.magnitude();
        let cast = |table: Tensor| (table * magnitude).to_kind(kind).to_device(device);
        let (cos, sin) = (angles.cos(), angles.sin());
        Self { cos: cast(Tensor::cat(&[&cos, &cos], -1)), sin: cast(Tensor::cat(&[&-&sin, &sin], -1)), packed: None }
    }

    /// Positions `start..start + length`.
    pub fn range(&self, start: usize, length: usize) -> Self {
        let cut = |table: &Tensor| table.narrow(0, start as i64, length as i64);
        Self { cos: cut(&self.cos), sin: cut(&self.sin), packed: None }
    }

    /// For rows of `length` tokens, each shared by sequences of these lengths, which begin at position 0 and do not see
    /// each other; `[B, 1, T, head_dim]`.
    pub fn packed(&self, rows: &[Vec<usize>], length: usize) -> Self {
        let positions = rows.iter().flat_map(|row| {
            let padding = length - row.iter().sum::<usize>();
            row.iter().chain([&padding]).flat_map(|sequence| 0..*sequence as i64).collect::<Vec<_>>()
        });
        let positions = Tensor::from_slice(&positions.collect::<Vec<_>>()).to_device(self.cos.device());
        let pick = |table: &Tensor| {
            let picked = table.index_select(0, &positions);
            picked.view([rows.len() as i64, 1, length as i64, table.size()[1]])
        };
        let lengths = |row: &Vec<usize>| row.iter().map(|sequence| *sequence as i64).collect();
        Self { cos: pick(&self.cos), sin: pick(&self.sin), packed: Some(rows.iter().map(lengths).collect()) }
    }

    /// One position for each of `B` sequences, shaped `[B, 1, head_dim]`.
    pub(crate) fn at(&self, positions: &Tensor) -> Self {
        let pick = |table: &Tensor| table.index_select(0, positions).unsqueeze(1);
        Self { cos: pick(&self.cos), sin: pick(&self.sin), packed: None }
    }

    /// Rotates `x [.., T, head_dim]`, pairing unit `i` with `i + head_dim / 2` as Hugging Face does.
    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        (x * &self.cos).addcmul(&x.roll([half], [-1]), &self.sin)
    }
}

/// Unscaled frequencies of the rotary embedding, highest first, `head_dim / 2` of them.
pub(crate) fn frequencies(theta: f64, head_dim: usize) -> Result<Vec<f32>, TchError> {
    let exponents = Tensor::arange((head_dim / 2) as i64, (Kind::Float, Device::Cpu)) * (2.0 / head_dim as f64);
    Vec::try_from(Tensor::from(theta as f32).pow(&exponents).reciprocal())
}

/// Embeds `ids [B, T]` (int64): `[B, T, H]`.
pub fn embed(embedding: &Tensor, ids: &Tensor) -> Tensor {
    Tensor::embedding(embedding, ids, -1, false, false)
}

/// One layer on `x [B, T, H]`, causal, positions from 0. Sequences are padded on the right: nothing
/// before the padding sees it, and the labels there are [`IGNORED`].
pub fn layer_forward(config: &Config, weights: &LayerWeights, x: &Tensor, rope: &Rope) -> Tensor {
    layer_forward_with(config, weights, x, rope, UNADAPTED)
}

/// The last projection, added to what comes out of the attention.
pub(crate) fn layer_output(middle: &Tensor, gated: &Tensor, down: &Tensor) -> Tensor {
    middle + linear(gated, down)
}

/// [`layer_forward`] whose projections are changed by `adapt`.
pub(crate) fn layer_forward_with(
    config: &Config,
    weights: &LayerWeights,
    x: &Tensor,
    rope: &Rope,
    adapt: Adapt<'_>,
) -> Tensor {
    let (middle, gated) = layer_middle_with(config, weights, x, rope, adapt);
    middle + adapt(Projection::Down, &gated, linear(&gated, &weights.down))
}

/// A layer up to its last projection: what comes out of its attention `[B, T, H]`, and the projection's
/// input `[B, T, I]`, gated as SwiGLU (Shazeer 2020) has it.
pub(crate) fn layer_middle(config: &Config, weights: &LayerWeights, x: &Tensor, rope: &Rope) -> (Tensor, Tensor) {
    layer_middle_with(config, weights, x, rope, UNADAPTED)
}

fn layer_middle_with(
    config: &Config,
    weights: &LayerWeights,
    x: &Tensor,
    rope: &Rope,
    adapt: Adapt<'_>,
) -> (Tensor, Tensor) {
    let normed = rms_norm(x, &weights.input_norm, config.eps);
    let middle = x + causal_attention(config, weights, &normed, rope, adapt);
    let normed = rms_norm(&middle, &weights.post_norm, config.eps);
    let gate = adapt(Projection::Gate, &normed, linear(&normed, &weights.gate));
    let up = adapt(Projection::Up, &normed, linear(&normed, &weights.up));
    (middle, swiglu(&gate, &up))
}

/// Logits of `hidden [.., H]`: final norm, then the output projection; `[.., V]`.
pub fn head_logits(config: &Config, hidden: &Tensor, norm: &Tensor, lm_head: &Tensor) -> Tensor {
    linear(&rms_norm(hidden, norm, config.eps), lm_head)
}

/// Sum of the cross entropies of the next tokens, an fp32 scalar.
///
/// `hidden` is `[B, T, H]` before the final norm; `labels` is `[B, T]` int64, aligned with the
/// input ids as Hugging Face's are: the shift happens here, position `t` predicts `labels[t + 1]`.
/// [`IGNORED`] labels cost nothing, not even logits.
pub fn cross_entropy_sum(config: &Config, hidden: &Tensor, norm: &Tensor, lm_head: &Tensor, labels: &Tensor) -> Tensor {
    let (rows, targets) = predicting_rows(labels);
    let flat = hidden.reshape([-1, config.hidden as i64]);
    let mut total = Tensor::zeros([], (Kind::Float, hidden.device()));
    for (rows, targets) in loss_chunks(&rows, &targets) {
        total += chunk_loss(config, &flat.index_select(0, &rows), norm, lm_head, &targets);
    }
    total
}

/// How many labels count in [`cross_entropy_sum`].
pub fn trained_tokens(labels: &Tensor) -> i64 {
    predicting_rows(labels).0.size()[0]
}

/// Flat indices of the positions that predict a label, and those labels.
pub(crate) fn predicting_rows(labels: &Tensor) -> (Tensor, Tensor) {
    let (batch, length) = labels.size2().unwrap_or((0, 0));
    let end = Tensor::full([batch, 1], IGNORED, (Kind::Int64, labels.device()));
    let next = Tensor::cat(&[labels.narrow(1, 1.min(length), (length - 1).max(0)), end], 1).reshape([-1]);
    let rows = next.ne(IGNORED).nonzero().reshape([-1]);
    let targets = next.index_select(0, &rows);
    (rows, targets)
}

/// Pieces of at most [`LOSS_ROWS`] rows, in order.
pub(crate) fn loss_chunks(rows: &Tensor, targets: &Tensor) -> Vec<(Tensor, Tensor)> {
    let count = rows.size()[0];
    (0..count)
        .step_by(LOSS_ROWS as usize)
        .map(|start| {
            let length = LOSS_ROWS.min(count - start);
            (rows.narrow(0, start, length), targets.narrow(0, start, length))
        })
        .collect()
}

/// Summed loss of `hidden [N, H]` against `targets [N]`; the softmax is fp32 whatever the weights.
pub(crate) fn chunk_loss(
    config: &Config,
    hidden: &Tensor,
    norm: &Tensor,
    lm_head: &Tensor,
    targets: &Tensor,
) -> Tensor {
    let logits = head_logits(config, hidden, norm, lm_head).to_kind(Kind::Float);
    logits.cross_entropy_loss(targets, None::<&Tensor>, tch::Reduction::Sum, IGNORED, 0.0)
}

fn causal_attention(config: &Config, weights: &LayerWeights, x: &Tensor, rope: &Rope, adapt: Adapt<'_>) -> Tensor {
    let (batch, length, _) = x.size3().unwrap_or((0, 0, 0));
    let whole = rope.packed.is_none().then(|| rope.range(0, length as usize));
    let rope = whole.as_ref().unwrap_or(rope);
    let heads = |projection: Projection, projected: Tensor, count: usize| {
        adapt(projection, x, projected).view([batch, length, count as i64, config.head_dim as i64]).transpose(1, 2)
    };
    let [query, key, value] = weights.query_key_value(x);
    let query = rope.rotate(&heads(Projection::Query, query, config.heads));
    let key = rope.rotate(&heads(Projection::Key, key, config.kv_heads));
    let value = heads(Projection::Value, value, config.kv_heads);
    let (key, value) = (shared(config, &key), shared(config, &value));
    let mixed = match &rope.packed {
        None => attend_before(config, &query, &key, &value),
        Some(rows) => attend_within(config, rows, &query, &key, &value),
    };
    let mixed = mixed.transpose(1, 2).reshape([batch, length, (config.heads * config.head_dim) as i64]);
    adapt(Projection::Output, &mixed, linear(&mixed, &weights.output))
}

/// Each position sees those before it, as far as the family's window reaches; `[B, heads, T, head_dim]`.
fn attend_before(config: &Config, query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let seen = window_mask(config, query.size()[2], query.device());
    attention(query, key, value, seen.as_ref(), seen.is_none())
}

/// [`attend_before`] within each of the sequences that share a row: each runs by itself, which costs no more than its
/// length asks for and needs no mask. Padding comes out as zeros.
fn attend_within(config: &Config, rows: &[Vec<i64>], query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let (_, heads, length, width) = query.size4().unwrap_or((0, 0, 0, 0));
    let row = |(row, lengths): (i64, &Vec<i64>)| {
        let mut start = 0;
        let mut mixed: Vec<Tensor> = Vec::with_capacity(lengths.len() + 1);
        for sequence in lengths {
            let cut = |x: &Tensor| x.narrow(0, row, 1).narrow(2, start, *sequence);
            mixed.push(attend_before(config, &cut(query), &cut(key), &cut(value)));
            start += sequence;
        }
        if start < length {
            mixed.push(Tensor::zeros([1, heads, length - start, width], (query.kind(), query.device())));
        }
        Tensor::cat(&mixed, 2)
    };
    Tensor::cat(&(0..).zip(rows).map(row).collect::<Vec<_>>(), 0)
}

/// `[T, T]`, what each position sees; `None` where that is all before it.
fn window_mask(config: &Config, length: i64, device: Device) -> Option<Tensor> {
    let window = config.sliding_window.filter(|window| (*window as i64) < length)? as i64;
    Some(Tensor::ones([length, length], (Kind::Bool, device)).tril(0).triu(1 - window))
}

/// Repeats each key or value head for the queries of its group.
pub(crate) fn shared(config: &Config, x: &Tensor) -> Tensor {
    if config.kv_heads == config.heads {
        return x.shallow_clone();
    }
    x.repeat_interleave_self_int((config.heads / config.kv_heads) as i64, 1, None)
}

/// Softmax attention scaled by 1/√head_dim over `[B, heads, T, head_dim]`.
pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(query, key, value, mask, 0.0, causal, None, false)
}

pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    autograd::linear(x, weight)
}
