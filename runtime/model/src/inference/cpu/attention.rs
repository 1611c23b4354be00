//! Softmax attention over keys and values in blocks. The keys of a block lie transposed, so that one
//! instruction works on eight positions; queries of a group share what is loaded (Ainslie et al.
//! 2023). Each query goes through what it sees in order and by itself: its result does not depend
//! on how a prompt was cut, or on who else is in the batch.

use super::super::BLOCK_TOKENS;
use super::isa::{InstructionSet, Isa, Lanes, dispatch};
use super::share::Shared;
use crate::Config;
use std::cell::RefCell;
use std::ops::Range;

/// Queries that share loaded keys and values.
const QUERIES: usize = 4;
/// Units of a value that are summed at a time.
const UNITS: usize = 16;

/// Keys and values of all blocks of one layer.
#[derive(Debug)]
pub struct LayerCache {
    shape: Shape,
    /// `[block, head, unit, position]`.
    keys: Vec<f32>,
    /// `[block, head, position, unit]`, units padded to whole [`UNITS`].
    values: Vec<f32>,
}

/// Sizes that attention goes by.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Positions that one attends to, itself among them.
    pub window: usize,
}

impl Shape {
    pub fn new(config: &Config) -> Self {
        let window = config.sliding_window.unwrap_or(usize::MAX);
        Self { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, window }
    }

    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(UNITS)
    }

    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Bytes of one layer's keys and values of one token.
    pub fn token_bytes(&self) -> usize {
        self.kv_heads * (self.head_dim + self.padded()) * size_of::<f32>()
    }
}

impl LayerCache {
    /// The memory is taken from the system when it is first written.
    pub fn new(shape: Shape, blocks: usize) -> Self {
        let positions = blocks * shape.kv_heads * BLOCK_TOKENS;
        Self { shape, keys: vec![0.0; positions * shape.head_dim], values: vec![0.0; positions * shape.padded()] }
    }

    pub fn share(&mut self) -> SharedCache {
        SharedCache { shape: self.shape, keys: Shared::new(&mut self.keys), values: Shared::new(&mut self.values) }
    }
}

/// A layer's cache, for several threads.
#[derive(Clone, Copy, Debug)]
pub struct SharedCache {
    shape: Shape,
    keys: Shared<f32>,
    values: Shared<f32>,
}

impl SharedCache {
    /// Keys and values `[kv_heads, head_dim]` of one token.
    /// # Safety
    /// No other thread touches this place of the cache meanwhile.
    pub unsafe fn write(&self, block: usize, slot: usize, key: &[f32], value: &[f32]) {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        let padded = self.shape.padded();
        for head in 0..kv_heads {
            let at = block * kv_heads + head;
            let keys = self.keys.pointer(at * head_dim * BLOCK_TOKENS + slot, (head_dim - 1) * BLOCK_TOKENS + 1);
            let values = self.values.pointer((at * BLOCK_TOKENS + slot) * padded, head_dim);
            let from = head * head_dim..(head + 1) * head_dim;
            for (unit, (key, value)) in key[from.clone()].iter().zip(&value[from]).enumerate() {
                // SAFETY: within what `pointer` has checked; the rest is the caller's promise.
                unsafe {
                    *keys.add(unit * BLOCK_TOKENS) = *key;
                    *values.add(unit) = *value;
                }
            }
        }
    }

    fn key_block(&self, block: u32, head: usize) -> *const f32 {
        let length = self.shape.head_dim * BLOCK_TOKENS;
        self.keys.pointer((block as usize * self.shape.kv_heads + head) * length, length)
    }

    fn value_block(&self, block: u32, head: usize) -> *const f32 {
        let length = self.shape.padded() * BLOCK_TOKENS;
        self.values.pointer((block as usize * self.shape.kv_heads + head) * length, length)
    }
}

/// Some positions of one sequence, one key-value head of them.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    pub cache: SharedCache,
    /// The sequence's blocks in order.
    pub blocks: &'a [u32],
    pub head: usize,
    /// Where the first of them is in the batch, and in its sequence.
    pub row: usize,
    pub position: usize,
    pub count: usize,
    /// `[rows, stride]`, queries first.
    pub queries: &'a [f32],
    pub stride: usize,
    /// `[rows, heads · head_dim]`.
    pub out: Shared<f32>,
}

/// # Safety
/// No other thread writes these rows and heads of `out`; all keys and values up to the last position
/// are written, and the blocks are within the cache.
pub unsafe fn attend(set: InstructionSet, task: &Task<'_>) {
    // SAFETY: the caller's promise.
    unsafe { dispatch!(set, all_queries(task: &Task<'_>)) }
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[inline(always)]
unsafe fn all_queries<I: Isa>(task: &Task<'_>) {
    let total = task.count * task.cache.shape.group();
    let room = (task.position + task.count).next_multiple_of(BLOCK_TOKENS) * QUERIES;
    let mut scores = SCORES.take();
    if scores.len() < room {
        scores.resize(room, 0.0);
    }
    for first in (0..total).step_by(QUERIES) {
        // SAFETY: the caller's promises.
        unsafe {
            match QUERIES.min(total - first) {
                1 => some_queries::<I, 1>(task, first, &mut scores),
                2 => some_queries::<I, 2>(task, first, &mut scores),
                3 => some_queries::<I, 3>(task, first, &mut scores),
                _ => some_queries::<I, 4>(task, first, &mut scores),
            }
        }
    }
    SCORES.set(scores);
}

/// What some queries see together.
#[derive(Clone, Copy)]
struct Span {
    first_block: usize,
    /// Positions up to the last one seen.
    length: usize,
    /// The same in whole blocks: scores of a query.
    room: usize,
}

impl Span {
    fn blocks<'a>(&self, task: &Task<'a>) -> impl Iterator<Item = (usize, &'a u32)> + use<'a> {
        task.blocks[..self.length.div_ceil(BLOCK_TOKENS)].iter().enumerate().skip(self.first_block)
    }
}

/// `M` queries: those of a group one after the other, then the next position's.
#[inline(always)]
unsafe fn some_queries<I: Isa, const M: usize>(task: &Task<'_>, first: usize, scores: &mut [f32]) {
    let shape = task.cache.shape;
    let group = shape.group();
    let mut queries = [std::ptr::null(); M];
    let mut lengths = [0; M];
    for index in 0..M {
        let (position, within) = ((first + index) / group, (first + index) % group);
        let at = (task.row + position) * task.stride + (task.head * group + within) * shape.head_dim;
        queries[index] = task.queries[at..][..shape.head_dim].as_ptr();
        lengths[index] = task.position + position + 1;
    }
    // Positions rise, so that the last query sees the furthest, and the first one the furthest back.
    let length = lengths[M - 1];
    let room = length.next_multiple_of(BLOCK_TOKENS);
    let first_block = lengths[0].saturating_sub(shape.window) / BLOCK_TOKENS;
    // SAFETY: `scores` has room for `M` rows of `room` numbers; blocks hold `length` positions.
    unsafe {
        let span = Span { first_block, length, room };
        score::<I, M>(task, &queries, span, scores);
        let mut inverses = [0.0; M];
        for index in 0..M {
            let before = first_block * BLOCK_TOKENS;
            let seen = lengths[index].saturating_sub(shape.window) - before..lengths[index] - before;
            inverses[index] = softmax::<I>(&mut scores[index * room + before..(index + 1) * room], seen);
        }
        mix::<I, M>(task, first, span, scores, &inverses);
    }
}

/// Scaled products of queries and keys.
#[inline(always)]
unsafe fn score<I: Isa, const M: usize>(task: &Task<'_>, queries: &[*const f32; M], span: Span, scores: &mut [f32]) {
    let head_dim = task.cache.shape.head_dim;
    let scale = I::F::splat(1.0 / (head_dim as f32).sqrt());
    for (index, block) in span.blocks(task) {
        let keys = task.cache.key_block(*block, task.head);
        let mut low = [I::F::zero(); M];
        let mut high = [I::F::zero(); M];
        // SAFETY: the block has `head_dim` times 16 keys, each query `head_dim` units.
        unsafe {
            for unit in 0..head_dim {
                let first = I::F::load(keys.add(unit * BLOCK_TOKENS));
                let second = I::F::load(keys.add(unit * BLOCK_TOKENS + 8));
                for query in 0..M {
                    let value = I::F::splat(*queries[query].add(unit));
                    low[query] = first.fused(value, low[query]);
                    high[query] = second.fused(value, high[query]);
                }
            }
            for query in 0..M {
                let to = scores.as_mut_ptr().add(query * span.room + index * BLOCK_TOKENS);
                low[query].mul(scale).store(to);
                high[query].mul(scale).store(to.add(8));
            }
        }
    }
}

/// Turns the scores that are seen into weights, the others into 0; returns 1 / their sum.
#[inline(always)]
unsafe fn softmax<I: Isa>(scores: &mut [f32], seen: Range<usize>) -> f32 {
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let mut largest = I::F::splat(f32::NEG_INFINITY);
    for at in (0..scores.len()).step_by(8) {
        // SAFETY: scores are whole blocks of 16.
        largest = largest.max(unsafe { I::F::load(scores.as_ptr().add(at)) });
    }
    let shift = I::F::splat(-largest.largest());
    let mut sum = I::F::zero();
    for at in (0..scores.len()).step_by(8) {
        // SAFETY: as above.
        unsafe {
            let weight = I::F::load(scores.as_ptr().add(at)).add(shift).exp();
            sum = sum.add(weight);
            weight.store(scores.as_mut_ptr().add(at));
        }
    }
    sum.sum().recip()
}

/// Values weighted by the scores.
#[inline(always)]
unsafe fn mix<I: Isa, const M: usize>(task: &Task<'_>, first: usize, span: Span, scores: &[f32], inverses: &[f32; M]) {
    let shape = task.cache.shape;
    let padded = shape.padded();
    for unit in (0..padded).step_by(UNITS) {
        let mut low = [I::F::zero(); M];
        let mut high = [I::F::zero(); M];
        for (index, block) in span.blocks(task) {
            let values = task.cache.value_block(*block, task.head);
            for slot in 0..BLOCK_TOKENS.min(span.length - index * BLOCK_TOKENS) {
                // SAFETY: the block has 16 times `padded` values; scores as in `score`.
                unsafe {
                    let from = values.add(slot * padded + unit);
                    let (left, right) = (I::F::load(from), I::F::load(from.add(8)));
                    for query in 0..M {
                        let weight = *scores.as_ptr().add(query * span.room + index * BLOCK_TOKENS + slot);
                        let weight = I::F::splat(weight);
                        low[query] = left.fused(weight, low[query]);
                        high[query] = right.fused(weight, high[query]);
                    }
                }
            }
        }
        for query in 0..M {
            let inverse = I::F::splat(inverses[query]);
            // SAFETY: the caller's promise.
            unsafe { store::<I>(task, first + query, unit, low[query].mul(inverse), high[query].mul(inverse)) };
        }
    }
}

/// Writes 16 units of a query's result, as far as the head has them.
#[inline(always)]
unsafe fn store<I: Isa>(task: &Task<'_>, query: usize, unit: usize, low: I::F, high: I::F) {
    let shape = task.cache.shape;
    let (position, within) = (query / shape.group(), query % shape.group());
    let row = (task.row + position) * shape.heads * shape.head_dim;
    let at = row + (task.head * shape.group() + within) * shape.head_dim + unit;
    let width = UNITS.min(shape.head_dim - unit);
    // SAFETY: these are this task's own.
    let out = unsafe { task.out.slice(at, width) };
    if width == UNITS {
        // SAFETY: `out` has 16 numbers.
        unsafe {
            low.store(out.as_mut_ptr());
            high.store(out.as_mut_ptr().add(8));
        }
    } else {
        let units = low.to_array().into_iter().chain(high.to_array());
        out.iter_mut().zip(units).for_each(|(out, unit)| *out = unit);
    }
}
