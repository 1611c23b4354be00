//! Projections: activations times weights. Each output is one sum over the inputs in their order, in
//! one accumulator, whatever the number of rows, threads and panels: a token's numbers do not depend
//! on what else is in the batch.

use super::activations::Activations;
use super::isa::{InstructionSet, Isa, Lanes, Products, Rounded, dispatch};
use super::matrix::{Block4, Block8, GROUP, Matrix, NARROW, Panels, WIDE};
use super::share::Shared;
use super::team::Team;

/// Outputs that a thread takes at a time: few enough to share 576 evenly, enough to write whole
/// cache lines.
const STRIP: usize = 32;

/// One or several matrices over the same inputs, their outputs side by side.
#[derive(Debug)]
pub struct Projection {
    parts: Vec<Matrix>,
    outputs: usize,
    strips: Vec<Strip>,
}

/// Panels of one part that a thread computes at a time.
#[derive(Clone, Copy, Debug)]
struct Strip {
    part: usize,
    first_panel: usize,
    panels: usize,
    /// Where its first output goes.
    column: usize,
}

/// What becomes of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Replace,
    /// Adds to what is there: a residual connection.
    Add,
}

impl Projection {
    pub fn new(parts: Vec<Matrix>) -> Self {
        let mut strips = Vec::new();
        let mut outputs = 0;
        for (part, matrix) in parts.iter().enumerate() {
            let (width, panels) = (matrix.width(), matrix.outputs.div_ceil(matrix.width()));
            for first_panel in (0..panels).step_by(STRIP / width) {
                let column = outputs + first_panel * width;
                strips.push(Strip { part, first_panel, panels: (STRIP / width).min(panels - first_panel), column });
            }
            outputs += matrix.outputs;
        }
        Self { parts, outputs, strips }
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether it reads the rounded activations.
    pub fn is_quantized(&self) -> bool {
        self.parts.iter().any(Matrix::is_quantized)
    }

    /// The weights of one output of a projection that is one matrix.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        self.parts[0].row(output, to);
    }

    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Matrix::bytes).sum()
    }

    /// Products of all rows of `x`, into `[rows, outputs]`.
    pub fn apply(&self, set: InstructionSet, team: &mut Team, x: &Activations, out: &mut [f32], write: Write) {
        let out = Shared::new(out);
        team.each(self.strips.len(), |index| {
            let strip = &self.strips[index];
            let job = Job { matrix: &self.parts[strip.part], strip, x, out, outputs: self.outputs, write };
            let job = &job;
            // SAFETY: the set was detected; strips are different columns.
            unsafe { dispatch!(set, compute(job: &Job<'_>)) }
        });
    }
}

/// One strip's work.
#[derive(Clone, Copy)]
struct Job<'a> {
    matrix: &'a Matrix,
    strip: &'a Strip,
    x: &'a Activations,
    out: Shared<f32>,
    outputs: usize,
    write: Write,
}

#[inline(always)]
unsafe fn compute<I: Isa>(job: &Job<'_>) {
    // SAFETY: the caller's promises.
    unsafe {
        match &job.matrix.panels {
            Panels::F32(weights) => wide_strip::<I, f32>(job, weights),
            Panels::Bf16(weights) => wide_strip::<I, u16>(job, weights),
            Panels::Int8(blocks) => narrow_strip::<I, Block8>(job, blocks),
            Panels::Int4(blocks) => narrow_strip::<I, Block4>(job, blocks),
        }
    }
}

/// A weight that is stored in a panel of 16.
pub trait Stored: Copy {
    /// # Safety
    /// `from` has eight weights.
    unsafe fn load<F: Lanes>(from: *const Self) -> F;
    /// # Safety
    /// `from` has sixteen weights; the machine has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_16(from: *const Self) -> std::arch::x86_64::__m512;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<F: Lanes>(from: *const Self) -> F {
        // SAFETY: the caller's promise.
        unsafe { F::load(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_16(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }
}

impl Stored for u16 {
    #[inline(always)]
    unsafe fn load<F: Lanes>(from: *const Self) -> F {
        // SAFETY: the caller's promise.
        unsafe { F::load_bf16(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        unsafe {
            let numbers = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(numbers))
        }
    }
}

/// Panels inside, rows outside: a few rows' activations and the strip's weights stay in the cache.
#[inline(always)]
unsafe fn wide_strip<I: Isa, T: Stored>(job: &Job<'_>, weights: &[T]) {
    let mut row = 0;
    while row < job.x.rows {
        let rows = I::wide_rows(job.x.rows - row);
        // SAFETY: the caller's promises.
        unsafe {
            match rows {
                1 => wide_rows::<I, T, 1>(job, weights, row),
                2 => wide_rows::<I, T, 2>(job, weights, row),
                3 => wide_rows::<I, T, 3>(job, weights, row),
                4 => wide_rows::<I, T, 4>(job, weights, row),
                5 => wide_rows::<I, T, 5>(job, weights, row),
                6 => wide_rows::<I, T, 6>(job, weights, row),
                _ => wide_rows::<I, T, 12>(job, weights, row),
            }
        }
        row += rows;
    }
}

/// `M` rows from `row` on, all panels of the strip.
#[inline(always)]
unsafe fn wide_rows<I: Isa, T: Stored, const M: usize>(job: &Job<'_>, weights: &[T], row: usize) {
    let length = WIDE * job.matrix.inputs;
    for panel in 0..job.strip.panels {
        let index = job.strip.first_panel + panel;
        // SAFETY: the caller's promises; panels are as long as `inputs` says.
        unsafe {
            let x = job.x.values.as_ptr().add(row * job.x.columns);
            let [low, high] = I::wide::<T, M>(x, job.x.columns, &weights[index * length..][..length]);
            for within in 0..M {
                let out = job.out(row + within, panel * WIDE, WIDE);
                let (first, second) = out.split_at_mut(out.len().min(WIDE / 2));
                put(first, low[within], job.write);
                put(second, high[within], job.write);
            }
        }
    }
}

/// What [`Isa::wide`] is where lanes are eight.
/// # Safety
/// As for that.
#[inline(always)]
pub unsafe fn wide_sums<F: Lanes, T: Stored, const M: usize>(
    x: *const f32,
    stride: usize,
    weights: &[T],
) -> [[F; M]; 2] {
    let mut low = [F::zero(); M];
    let mut high = [F::zero(); M];
    for column in 0..weights.len() / WIDE {
        // SAFETY: the panel has 16 weights for each column; the rows are the caller's promise.
        unsafe {
            let from = weights.as_ptr().add(column * WIDE);
            let (first, second): (F, F) = (T::load(from), T::load(from.add(8)));
            for row in 0..M {
                let value = F::splat(*x.add(row * stride + column));
                low[row] = first.fused(value, low[row]);
                high[row] = second.fused(value, high[row]);
            }
        }
    }
    [low, high]
}

/// Blocks of integer weights.
pub trait Quantized: Sized {
    /// # Safety
    /// As for [`Isa::nibbles`].
    unsafe fn products<I: Isa>(panels: [&[Self]; 2], x: Rounded, rows: usize, to: &mut Products);
    /// # Safety
    /// As for [`Isa::nibble_sums`].
    unsafe fn sums<I: Isa, const M: usize>(&self, x: [*const i8; M]) -> [I::F; M];
    fn scales(&self) -> &[u16; NARROW];
    fn minima(&self) -> Option<&[u16; NARROW]>;
}

impl Quantized for Block4 {
    #[inline(always)]
    unsafe fn products<I: Isa>(panels: [&[Self]; 2], x: Rounded, rows: usize, to: &mut Products) {
        // SAFETY: the caller's promise.
        unsafe { I::nibbles(panels, x, rows, to) }
    }

    #[inline(always)]
    unsafe fn sums<I: Isa, const M: usize>(&self, x: [*const i8; M]) -> [I::F; M] {
        // SAFETY: the caller's promise.
        unsafe { I::nibble_sums(self, x) }
    }

    fn scales(&self) -> &[u16; NARROW] {
        &self.scales
    }

    fn minima(&self) -> Option<&[u16; NARROW]> {
        Some(&self.minima)
    }
}

impl Quantized for Block8 {
    #[inline(always)]
    unsafe fn products<I: Isa>(panels: [&[Self]; 2], x: Rounded, rows: usize, to: &mut Products) {
        // SAFETY: the caller's promise.
        unsafe { I::bytes(panels, x, rows, to) }
    }

    #[inline(always)]
    unsafe fn sums<I: Isa, const M: usize>(&self, x: [*const i8; M]) -> [I::F; M] {
        // SAFETY: the caller's promise.
        unsafe { I::byte_sums(self, x) }
    }

    fn scales(&self) -> &[u16; NARROW] {
        &self.scales
    }

    fn minima(&self) -> Option<&[u16; NARROW]> {
        None
    }
}

/// Two panels at a time; where one is left over, it is computed twice.
#[inline(always)]
unsafe fn narrow_strip<I: Isa, B: Quantized>(job: &Job<'_>, blocks: &[B]) {
    let groups = job.matrix.inputs / GROUP;
    let mut products: Products = [[0.0; 2 * NARROW]; 8];
    // SAFETY: the caller's promises; there is a block for each group.
    unsafe {
        let mut row = 0;
        while row < job.x.rows {
            let rows = I::narrow_rows(job.x.rows - row);
            let x = job.x.rounded(row);
            for first in (0..job.strip.panels).step_by(2) {
                let last = (first + 1).min(job.strip.panels - 1);
                let panels = [first, last].map(|panel| &blocks[(job.strip.first_panel + panel) * groups..][..groups]);
                B::products::<I>(panels, x, rows, &mut products);
                let width = (1 + last - first) * NARROW;
                for (within, products) in products[..rows].iter().enumerate() {
                    for (out, product) in job.out(row + within, first * NARROW, width).iter_mut().zip(products) {
                        *out = if job.write == Write::Add { *out + product } else { *product };
                    }
                }
            }
            row += rows;
        }
    }
}

/// What [`Isa::nibbles`] and [`Isa::bytes`] are where lanes are eight: one panel after the other.
/// # Safety
/// As for these.
#[inline(always)]
pub unsafe fn by_panels<I: Isa, B: Quantized>(panels: [&[B]; 2], x: Rounded, rows: usize, to: &mut Products) {
    for (index, panel) in panels.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => panel_rows::<I, B, 1>(panel, x, index, to),
                2 => panel_rows::<I, B, 2>(panel, x, index, to),
                3 => panel_rows::<I, B, 3>(panel, x, index, to),
                _ => panel_rows::<I, B, 4>(panel, x, index, to),
            }
        }
    }
}

#[inline(always)]
unsafe fn panel_rows<I: Isa, B: Quantized, const M: usize>(panel: &[B], x: Rounded, index: usize, to: &mut Products) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut groups = [std::ptr::null(); M];
        let mut totals = [I::F::zero(); M];
        for (group, block) in panel.iter().enumerate() {
            for row in 0..M {
                groups[row] = x.group(row, group);
            }
            let sums = block.sums::<I, M>(groups);
            let scales = I::F::load_half(block.scales().as_ptr());
            for row in 0..M {
                let scaled = sums[row].mul(I::F::splat(x.scale(row, group)));
                totals[row] = scaled.fused(scales, totals[row]);
                if let Some(minima) = block.minima() {
                    let minima = I::F::load_half(minima.as_ptr());
                    totals[row] = minima.fused(I::F::splat(x.sum(row, group)), totals[row]);
                }
            }
        }
        for row in 0..M {
            totals[row].store(to[row].as_mut_ptr().add(index * NARROW));
        }
    }
}

impl Job<'_> {
    /// Outputs of a row, from `offset` in the strip on, as far as the matrix has them.
    /// # Safety
    /// No other thread has them: columns are this strip's.
    #[inline(always)]
    unsafe fn out<'a>(&self, row: usize, offset: usize, width: usize) -> &'a mut [f32] {
        let before = self.strip.first_panel * self.matrix.width() + offset;
        let width = width.min(self.matrix.outputs.saturating_sub(before));
        // SAFETY: the caller's promise.
        unsafe { self.out.slice(row * self.outputs + self.strip.column + offset, width) }
    }
}

/// Writes the first of eight products, as many as there is room for.
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub unsafe fn put<F: Lanes>(out: &mut [f32], products: F, write: Write) {
    if out.len() < NARROW {
        for (out, product) in out.iter_mut().zip(products.to_array()) {
            *out = if write == Write::Add { *out + product } else { product };
        }
        return;
    }
    // SAFETY: `out` has eight numbers.
    unsafe {
        let products = if write == Write::Add { F::load(out.as_ptr()).add(products) } else { products };
        products.store(out.as_mut_ptr());
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::GROUP_BYTES;
    use super::super::matrix::Format;
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| (((index + seed) * 7919 % 1009) as f32 - 504.0) / 500.0).collect()
    }

    fn activations(rows: usize, columns: usize, quantized: bool) -> Activations {
        let mut x = Activations::default();
        x.shape(rows, columns, quantized);
        x.values.copy_from_slice(&values(rows * columns, 5));
        let shared = x.share();
        // SAFETY: one thread, any machine.
        (0..rows).for_each(|row| unsafe { shared.round_row::<super::super::isa::Portable>(row) });
        x
    }

    fn product(set: InstructionSet, threads: usize, x: &Activations, projection: &Projection) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.rows * projection.outputs()];
        projection.apply(set, &mut Team::new(threads).unwrap(), x, &mut out, Write::Replace);
        out
    }

    /// Sums in fp64 of the numbers that the formats hold.
    fn expected(x: &Activations, projection: &Projection) -> Vec<f64> {
        let mut rows = Vec::new();
        for matrix in &projection.parts {
            for output in 0..matrix.outputs {
                let mut row = vec![0.0; matrix.inputs];
                matrix.row(output, &mut row);
                rows.push((row, matrix.is_quantized()));
            }
        }
        let value = |row: usize, column: usize, rounded: bool| match rounded {
            true => {
                let group = (row * x.columns + column) / GROUP;
                let numbers = x.numbers[group * GROUP_BYTES..].first_chunk().unwrap();
                f64::from(x.scales[group]) * f64::from(super::super::isa::rounded(numbers, column % GROUP))
            }
            false => f64::from(x.values[row * x.columns + column]),
        };
        (0..x.rows)
            .flat_map(|row| {
                rows.iter().map(move |(weights, rounded)| {
                    weights.iter().enumerate().map(|(k, w)| f64::from(*w) * value(row, k, *rounded)).sum()
                })
            })
            .collect()
    }

    fn projection(formats: &[Format], inputs: usize) -> Projection {
        let part = |(index, format): (usize, &Format)| {
            Matrix::new(&values((37 + 16 * index) * inputs, index * 31), inputs, *format)
        };
        Projection::new(formats.iter().enumerate().map(part).collect())
    }

    const ALL: [Format; 4] = [Format::F32, Format::Bf16, Format::Int8, Format::Int4];

    #[test]
    fn products_are_those_of_the_numbers_that_the_formats_hold() {
        for format in ALL {
            let projection = projection(&[format, Format::Int4, format], 96);
            let x = activations(21, 96, true);
            for set in [InstructionSet::Portable, InstructionSet::detect()] {
                let found = product(set, 2, &x, &projection);
                for (found, expected) in found.iter().zip(expected(&x, &projection)) {
                    assert!((f64::from(*found) - expected).abs() < 2e-5, "{format:?} {set:?}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_alone_and_in_any_batch() {
        for format in ALL {
            let projection = projection(&[format], 128);
            let x = activations(21, 128, true);
            let together = product(InstructionSet::detect(), 3, &x, &projection);
            for row in 0..21 {
                let mut alone = Activations::default();
                alone.shape(1, 128, true);
                alone.values.copy_from_slice(&x.values[row * 128..][..128]);
                alone.numbers.copy_from_slice(&x.numbers[row * 4 * GROUP_BYTES..][..4 * GROUP_BYTES]);
                alone.scales.copy_from_slice(&x.scales[row * 4..][..4]);
                alone.sums.copy_from_slice(&x.sums[row * 4..][..4]);
                let outputs = projection.outputs();
                let found = product(InstructionSet::detect(), 1, &alone, &projection);
                assert_eq!(found, together[row * outputs..][..outputs], "{format:?}, row {row}");
            }
        }
    }

    #[test]
    fn the_portable_and_the_fast_kernels_of_quantised_weights_agree_to_the_bit() {
        for format in [Format::Int8, Format::Int4] {
            let projection = projection(&[format], 64);
            let x = activations(37, 64, true);
            let fast = product(InstructionSet::detect(), 1, &x, &projection);
            assert_eq!(fast, product(InstructionSet::Portable, 1, &x, &projection), "{format:?}");
        }
    }

    #[test]
    fn the_fast_rounding_of_activations_is_that_of_the_portable_one() {
        let x = activations(3, 96, true);
        let mut fast = Activations::default();
        fast.shape(3, 96, true);
        fast.values.copy_from_slice(&x.values);
        let shared = &fast.share();
        unsafe fn all<I: Isa>(x: &super::super::activations::SharedActivations) {
            // SAFETY: one thread.
            (0..3).for_each(|row| unsafe { x.round_row::<I>(row) });
        }
        // SAFETY: the set was detected.
        unsafe { dispatch!(InstructionSet::detect(), all(shared: &super::super::activations::SharedActivations)) };
        assert_eq!((&fast.numbers, &fast.scales, &fast.sums), (&x.numbers, &x.scales, &x.sums));
    }

    #[test]
    fn adding_keeps_what_is_there() {
        let projection = projection(&[Format::F32], 32);
        let x = activations(2, 32, false);
        let plain = product(InstructionSet::detect(), 1, &x, &projection);
        let mut out = vec![1.5; plain.len()];
        projection.apply(InstructionSet::detect(), &mut Team::new(1).unwrap(), &x, &mut out, Write::Add);
        for (added, plain) in out.iter().zip(&plain) {
            assert_eq!(*added, 1.5 + plain);
        }
    }
}
