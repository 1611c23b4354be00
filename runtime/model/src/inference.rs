//! Inference with a key-value cache: sequences of different lengths share the linear layers of a
//! step, each attends to its own cache.

use crate::layers::{LayerWeights, Rope, attention, embed, feed_forward, head_logits, linear, rms_norm, shared};
use crate::parameters::{EMBEDDING, FINAL_NORM, check, head_name};
use crate::{Config, ModelError};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Positions that a new cache has room for.
const FIRST_CAPACITY: usize = 128;

/// Weights on their device, ready to generate.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    embedding: Tensor,
    layers: Vec<LayerWeights>,
    norm: Tensor,
    lm_head: Tensor,
    rope: Rope,
    max_length: usize,
}

/// The keys and values of one sequence.
#[derive(Debug)]
pub struct Sequence {
    /// One entry a layer, `[kv_heads, capacity, head_dim]` each.
    caches: Vec<LayerCache>,
    length: usize,
    capacity: usize,
}

#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl Engine {
    /// Copies the weights to `device` as `kind` (fp32 or bf16). Sequences are bounded by
    /// `max_length` tokens, or by the model's own limit if that is smaller.
    pub fn new(
        config: &Config,
        tensors: &BTreeMap<String, Tensor>,
        device: Device,
        kind: Kind,
        max_length: Option<usize>,
    ) -> Result<Self, ModelError> {
        check(config, tensors)?;
        let moved: BTreeMap<String, Tensor> = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.f_to_device(device)?.f_to_kind(kind)?.detach())))
            .collect::<Result<_, ModelError>>()?;
        let take = |name: &str| missing_if_none(name, moved.get(name).map(Tensor::shallow_clone));
        let layer = |index| missing_if_none(&format!("model.layers.{index}"), LayerWeights::from_map(&moved, index));
        let max_length = max_length.unwrap_or(config.max_position).min(config.max_position);
        Ok(Self {
            embedding: take(EMBEDDING)?,
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            norm: take(FINAL_NORM)?,
            lm_head: take(head_name(config))?,
            rope: Rope::new(config, max_length, device, kind),
            max_length,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Most tokens that a sequence may hold, prompt and completion together.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence {
        let capacity = FIRST_CAPACITY.min(self.max_length);
        let caches = (0..self.config.layers).map(|_| self.empty_cache(capacity)).collect();
        Sequence { caches, length: 0, capacity }
    }

    /// Appends `ids` to a sequence, new or not, and returns the logits `[V]` (fp32) of what follows.
    pub fn prefill(&self, sequence: &mut Sequence, ids: &[u32]) -> Result<Tensor, ModelError> {
        let ids = self.checked_ids(ids)?;
        self.make_room(sequence, ids.len())?;
        tch::no_grad(|| {
            let ids = Tensor::from_slice(&ids).to_device(self.device()).unsqueeze(0);
            let mut x = embed(&self.embedding, &ids);
            let mask = self.mask_after(sequence.length, ids.size()[1]);
            for (weights, cache) in self.layers.iter().zip(&mut sequence.caches) {
                x = self.prefill_layer(weights, cache, sequence.length, x, mask.as_ref());
            }
            sequence.length += ids.size()[1] as usize;
            Ok(self.logits(&x.select(0, 0).slice(0, -1, None, 1)).squeeze_dim(0))
        })
    }

    /// Appends one token to each sequence and returns the logits `[B, V]` (fp32) of what follows.
    /// `tokens` has one entry for each sequence.
    pub fn decode(&self, sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<Tensor, ModelError> {
        let ids = self.checked_ids(tokens)?;
        for sequence in sequences.iter_mut() {
            self.make_room(sequence, 1)?;
        }
        tch::no_grad(|| {
            let positions: Vec<i64> = sequences.iter().map(|sequence| sequence.length as i64).collect();
            let rope = self.rope.at(&Tensor::from_slice(&positions).to_device(self.device()));
            let mut x = embed(&self.embedding, &Tensor::from_slice(&ids).to_device(self.device()));
            for (index, weights) in self.layers.iter().enumerate() {
                x = self.decode_layer(weights, sequences, index, x, &rope);
            }
            for sequence in sequences.iter_mut() {
                sequence.length += 1;
            }
            Ok(self.logits(&x))
        })
    }

    fn device(&self) -> Device {
        self.embedding.device()
    }

    fn checked_ids(&self, ids: &[u32]) -> Result<Vec<i64>, ModelError> {
        let vocabulary = self.config.vocab;
        match ids.iter().find(|id| **id as usize >= vocabulary) {
            Some(id) => Err(ModelError::UnknownToken { id: *id, vocabulary }),
            None if ids.is_empty() => Err(ModelError::TooLong { tokens: 0, max_length: self.max_length }),
            None => Ok(ids.iter().map(|id| i64::from(*id)).collect()),
        }
    }

    fn empty_cache(&self, capacity: usize) -> LayerCache {
        let shape = [self.config.kv_heads as i64, capacity as i64, self.config.head_dim as i64];
        let zeros = || Tensor::zeros(shape, (self.embedding.kind(), self.device()));
        LayerCache { keys: zeros(), values: zeros() }
    }

    /// Doubles the caches until `more` positions fit.
    fn make_room(&self, sequence: &mut Sequence, more: usize) -> Result<(), ModelError> {
        let needed = sequence.length + more;
        if needed > self.max_length {
            return Err(ModelError::TooLong { tokens: needed, max_length: self.max_length });
        }
        if needed <= sequence.capacity {
            return Ok(());
        }
        let capacity = needed.next_power_of_two().min(self.max_length);
        for cache in &mut sequence.caches {
            let grown = self.empty_cache(capacity);
            grown.write(0, &cache.keys, &cache.values);
            *cache = grown;
        }
        sequence.capacity = capacity;
        Ok(())
    }

    /// Which of `past + length` keys each of `length` new positions sees; `None` if plainly causal.
    fn mask_after(&self, past: usize, length: i64) -> Option<Tensor> {
        let all = Tensor::ones([length, past as i64 + length], (Kind::Bool, self.device()));
        (past > 0).then(|| all.tril(past as i64))
    }

    fn prefill_layer(
        &self,
        weights: &LayerWeights,
        cache: &mut LayerCache,
        past: usize,
        x: Tensor,
        mask: Option<&Tensor>,
    ) -> Tensor {
        let length = x.size()[1];
        let rope = self.rope.range(past, length as usize);
        let normed = rms_norm(&x, &weights.input_norm, self.config.eps);
        let heads = |projection: &Tensor, count: usize| {
            linear(&normed, projection).view([length, count as i64, self.config.head_dim as i64]).transpose(0, 1)
        };
        let query = rope.rotate(&heads(&weights.query, self.config.heads)).unsqueeze(0);
        let key = rope.rotate(&heads(&weights.key, self.config.kv_heads));
        cache.write(past, &key, &heads(&weights.value, self.config.kv_heads));
        let (keys, values) = cache.first(past + length as usize);
        let (keys, values) = (shared(&self.config, &keys), shared(&self.config, &values));
        let mixed = attention(&query, &keys, &values, mask, mask.is_none());
        let mixed = mixed.transpose(1, 2).reshape([1, length, self.attended()]);
        self.finish_layer(weights, x, &mixed)
    }

    fn decode_layer(
        &self,
        weights: &LayerWeights,
        sequences: &mut [&mut Sequence],
        index: usize,
        x: Tensor,
        rope: &Rope,
    ) -> Tensor {
        let normed = rms_norm(&x, &weights.input_norm, self.config.eps);
        let heads = |projection: &Tensor, count: usize| {
            linear(&normed, projection).view([-1, count as i64, self.config.head_dim as i64])
        };
        let queries = rope.rotate(&heads(&weights.query, self.config.heads));
        let keys = rope.rotate(&heads(&weights.key, self.config.kv_heads));
        let values = heads(&weights.value, self.config.kv_heads);
        let mixed: Vec<Tensor> = sequences
            .iter_mut()
            .enumerate()
            .map(|(row, sequence)| {
                let pick = |x: &Tensor| x.get(row as i64);
                self.attend_one(sequence, index, &pick(&queries), &pick(&keys), &pick(&values))
            })
            .collect();
        self.finish_layer(weights, x, &Tensor::stack(&mixed, 0))
    }

    /// One new position of one sequence. The queries of a key-value head take the place of
    /// positions, so that its keys are read once and not repeated.
    fn attend_one(
        &self,
        sequence: &mut Sequence,
        index: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Tensor {
        let cache = &sequence.caches[index];
        cache.write(sequence.length, &key.unsqueeze(1), &value.unsqueeze(1));
        let (keys, values) = cache.first(sequence.length + 1);
        let group = (self.config.heads / self.config.kv_heads) as i64;
        let query = query.view([1, self.config.kv_heads as i64, group, self.config.head_dim as i64]);
        attention(&query, &keys, &values, None, false).reshape([self.attended()])
    }

    fn finish_layer(&self, weights: &LayerWeights, x: Tensor, mixed: &Tensor) -> Tensor {
        let x = x + linear(mixed, &weights.output);
        let normed = rms_norm(&x, &weights.post_norm, self.config.eps);
        x + feed_forward(weights, &normed)
    }

    fn logits(&self, hidden: &Tensor) -> Tensor {
        head_logits(&self.config, hidden, &self.norm, &self.lm_head).to_kind(Kind::Float)
    }

    fn attended(&self) -> i64 {
        (self.config.heads * self.config.head_dim) as i64
    }
}

impl Sequence {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

impl LayerCache {
    /// Stores `[kv_heads, n, head_dim]` at `position`.
    fn write(&self, position: usize, keys: &Tensor, values: &Tensor) {
        let length = keys.size()[1];
        let at = |cache: &Tensor| cache.narrow(1, position as i64, length);
        at(&self.keys).copy_(keys);
        at(&self.values).copy_(values);
    }

    /// The first `length` positions, shaped `[1, kv_heads, length, head_dim]`, not copied.
    fn first(&self, length: usize) -> (Tensor, Tensor) {
        let cut = |cache: &Tensor| cache.narrow(1, 0, length as i64).unsqueeze(0);
        (cut(&self.keys), cut(&self.values))
    }
}

fn missing_if_none<T>(name: &str, found: Option<T>) -> Result<T, ModelError> {
    found.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), expected: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::layer_forward;
    use crate::tiny::tiny;

    fn engine(max_length: Option<usize>) -> Engine {
        let model = tiny(3);
        Engine::new(&model.config, &model.tensors, Device::Cpu, Kind::Float, max_length).unwrap()
    }

    fn ids(length: u32) -> Vec<u32> {
        (0..length).map(|index| 3 + index * 37 % 280).collect()
    }

    /// Logits of every position by the training path.
    fn reference(ids: &[u32]) -> Tensor {
        let model = tiny(3);
        let (config, tensors) = (&model.config, &model.tensors);
        let rope = Rope::new(config, ids.len(), Device::Cpu, Kind::Float);
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let mut x = embed(&tensors[EMBEDDING], &Tensor::from_slice(&ids).unsqueeze(0));
        for index in 0..config.layers {
            x = layer_forward(config, &LayerWeights::from_map(tensors, index).unwrap(), &x, &rope);
        }
        head_logits(config, &x, &tensors[FINAL_NORM], &tensors[EMBEDDING]).squeeze_dim(0)
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn cached_logits_equal_those_of_the_training_path() {
        let ids = ids(200);
        let expected = reference(&ids);
        let engine = engine(None);
        let mut sequence = engine.sequence();
        let prefilled = engine.prefill(&mut sequence, &ids[..50]).unwrap();
        assert!(difference(&prefilled, &expected.get(49)) < 1e-5);
        let extended = engine.prefill(&mut sequence, &ids[50..150]).unwrap();
        assert!(difference(&extended, &expected.get(149)) < 1e-5);
        for position in 150..200 {
            let logits = engine.decode(&mut [&mut sequence], &ids[position..=position]).unwrap();
            assert!(difference(&logits.get(0), &expected.get(position as i64)) < 1e-5, "at {position}");
        }
    }

    #[test]
    fn a_batch_of_different_lengths_decodes_as_each_alone() {
        let engine = engine(None);
        let prompts = [ids(3), ids(140), ids(31)];
        let prefilled = |prompt: &Vec<u32>| {
            let mut sequence = engine.sequence();
            drop(engine.prefill(&mut sequence, prompt).unwrap());
            sequence
        };
        let mut together: Vec<Sequence> = prompts.iter().map(prefilled).collect();
        let logits = engine.decode(&mut together.iter_mut().collect::<Vec<_>>(), &[7, 8, 9]).unwrap();
        for (row, prompt) in prompts.iter().enumerate() {
            let alone = engine.decode(&mut [&mut prefilled(prompt)], &[7 + row as u32]).unwrap();
            assert!(difference(&logits.get(row as i64), &alone.get(0)) < 1e-5);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_the_sequence_usable() {
        let engine = engine(Some(10));
        let mut sequence = engine.sequence();
        drop(engine.prefill(&mut sequence, &ids(9)).unwrap());
        assert!(matches!(engine.prefill(&mut sequence, &ids(2)), Err(ModelError::TooLong { tokens: 11, .. })));
        assert!(matches!(engine.decode(&mut [&mut sequence], &[9999]), Err(ModelError::UnknownToken { .. })));
        drop(engine.decode(&mut [&mut sequence], &[3]).unwrap());
        assert_eq!(sequence.len(), 10);
        assert!(engine.decode(&mut [&mut sequence], &[3]).is_err());
    }
}
