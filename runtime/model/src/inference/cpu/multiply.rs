//! Projections: activations times weights. Each output is one sum over the inputs in their order, in
//! one accumulator, whatever the number of rows, threads and panels: a token's numbers do not depend
//! on what else is in the batch.

use super::activations::Activations;
use super::isa::{GROUP_BYTES, InstructionSet, Isa, Lanes, dispatch};
use super::matrix::{Block4, Block8, GROUP, Matrix, NARROW, Panels, WIDE};
use super::share::Shared;
use super::team::Team;

/// Outputs that a thread takes at a time: few enough to share 576 evenly, enough to write whole
/// cache lines.
const STRIP: usize = 32;
/// Rows that share a loaded weight: as many as there are registers for.
const NARROW_ROWS: usize = 4;
pub const WIDE_ROWS: usize = 6;

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

/// Panels inside, rows outside: a few rows' activations and the strip's weights stay in the cache.
#[inline(always)]
unsafe fn compute<I: Isa>(job: &Job<'_>) {
    let tile = if job.matrix.is_quantized() { NARROW_ROWS } else { WIDE_ROWS };
    for row in (0..job.x.rows).step_by(tile) {
        // SAFETY: the caller's promises.
        unsafe {
            match tile.min(job.x.rows - row) {
                1 => rows::<I, 1>(job, row),
                2 => rows::<I, 2>(job, row),
                3 => rows::<I, 3>(job, row),
                4 => rows::<I, 4>(job, row),
                5 => rows::<I, 5>(job, row),
                _ => rows::<I, 6>(job, row),
            }
        }
    }
}

/// `M` rows from `row` on, all panels of the strip.
#[inline(always)]
unsafe fn rows<I: Isa, const M: usize>(job: &Job<'_>, row: usize) {
    let matrix = job.matrix;
    let (width, groups) = (matrix.width(), matrix.inputs / GROUP);
    for panel in 0..job.strip.panels {
        let index = job.strip.first_panel + panel;
        let tile =
            Tile { row, column: job.strip.column + panel * width, width: width.min(matrix.outputs - index * width) };
        // SAFETY: the caller's promises; panels are as long as `inputs` says.
        unsafe {
            match &matrix.panels {
                Panels::F32(weights) => {
                    let weights = &weights[index * WIDE * matrix.inputs..][..WIDE * matrix.inputs];
                    wide::<I, f32, M>(job, &tile, weights);
                }
                Panels::Bf16(weights) => {
                    let weights = &weights[index * WIDE * matrix.inputs..][..WIDE * matrix.inputs];
                    wide::<I, u16, M>(job, &tile, weights);
                }
                Panels::Int8(blocks) => bytes::<I, M>(job, &tile, &blocks[index * groups..][..groups]),
                Panels::Int4(blocks) => nibbles::<I, M>(job, &tile, &blocks[index * groups..][..groups]),
            }
        }
    }
}

/// Where a panel's products go.
struct Tile {
    row: usize,
    column: usize,
    width: usize,
}

/// A weight that is stored in a panel of 16.
pub trait Stored: Copy {
    unsafe fn load<F: Lanes>(from: *const Self) -> F;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<F: Lanes>(from: *const Self) -> F {
        // SAFETY: the caller's promise.
        unsafe { F::load(from) }
    }
}

impl Stored for u16 {
    #[inline(always)]
    unsafe fn load<F: Lanes>(from: *const Self) -> F {
        // SAFETY: the caller's promise.
        unsafe { F::load_bf16(from) }
    }
}

#[inline(always)]
unsafe fn wide<I: Isa, T: Stored, const M: usize>(job: &Job<'_>, tile: &Tile, weights: &[T]) {
    // SAFETY: `weights` are 16 for each column; rows `row..row + M` exist.
    unsafe {
        let x = job.x.values.as_ptr().add(tile.row * job.x.columns);
        let (low, high) = wide_sums::<I, T, M>(x, job.x.columns, weights);
        for row in 0..M {
            store(job, tile, row, 0, low[row]);
            store(job, tile, row, NARROW, high[row]);
        }
    }
}

/// Products of `M` rows, `stride` numbers apart, with one panel of 16 outputs: the first eight, and the others.
/// # Safety
/// `x` points to `M` rows of as many numbers as the panel has inputs; the machine has the instruction set.
#[inline(always)]
pub unsafe fn wide_sums<I: Isa, T: Stored, const M: usize>(
    x: *const f32,
    stride: usize,
    weights: &[T],
) -> ([I::F; M], [I::F; M]) {
    let mut low = [I::F::zero(); M];
    let mut high = [I::F::zero(); M];
    for column in 0..weights.len() / WIDE {
        // SAFETY: the panel has 16 weights for each column; the rows are the caller's promise.
        unsafe {
            let from = weights.as_ptr().add(column * WIDE);
            let (first, second): (I::F, I::F) = (T::load(from), T::load(from.add(8)));
            for row in 0..M {
                let value = I::F::splat(*x.add(row * stride + column));
                low[row] = first.fused(value, low[row]);
                high[row] = second.fused(value, high[row]);
            }
        }
    }
    (low, high)
}

#[inline(always)]
unsafe fn nibbles<I: Isa, const M: usize>(job: &Job<'_>, tile: &Tile, blocks: &[Block4]) {
    let groups = blocks.len();
    // SAFETY: there is a block for each group; rows `row..row + M` exist.
    unsafe {
        let mut x = [std::ptr::null(); M];
        let mut totals = [I::F::zero(); M];
        for (group, block) in blocks.iter().enumerate() {
            for row in 0..M {
                x[row] = job.x.numbers.as_ptr().add(((tile.row + row) * groups + group) * GROUP_BYTES);
            }
            let sums = I::nibble_sums(block, x);
            let scales = I::F::load_half(block.scales.as_ptr());
            let minima = I::F::load_half(block.minima.as_ptr());
            for row in 0..M {
                let at = (tile.row + row) * groups + group;
                let scaled = sums[row].mul(I::F::splat(*job.x.scales.get_unchecked(at)));
                totals[row] = scaled.fused(scales, totals[row]);
                totals[row] = minima.fused(I::F::splat(*job.x.sums.get_unchecked(at)), totals[row]);
            }
        }
        for row in 0..M {
            store(job, tile, row, 0, totals[row]);
        }
    }
}

#[inline(always)]
unsafe fn bytes<I: Isa, const M: usize>(job: &Job<'_>, tile: &Tile, blocks: &[Block8]) {
    let groups = blocks.len();
    // SAFETY: as in `nibbles`.
    unsafe {
        let mut x = [std::ptr::null(); M];
        let mut totals = [I::F::zero(); M];
        for (group, block) in blocks.iter().enumerate() {
            for row in 0..M {
                x[row] = job.x.numbers.as_ptr().add(((tile.row + row) * groups + group) * GROUP_BYTES);
            }
            let sums = I::byte_sums(block, x);
            let scales = I::F::load_half(block.scales.as_ptr());
            for row in 0..M {
                let scale = *job.x.scales.get_unchecked((tile.row + row) * groups + group);
                totals[row] = sums[row].mul(I::F::splat(scale)).fused(scales, totals[row]);
            }
        }
        for row in 0..M {
            store(job, tile, row, 0, totals[row]);
        }
    }
}

/// Writes eight outputs of a row, from `offset` in the panel on, as far as the matrix has them.
#[inline(always)]
unsafe fn store<F: Lanes>(job: &Job<'_>, tile: &Tile, row: usize, offset: usize, products: F) {
    let width = tile.width.saturating_sub(offset).min(NARROW);
    // SAFETY: these columns are this strip's.
    unsafe {
        let at = (tile.row + row) * job.outputs + tile.column + offset.min(tile.width);
        put(job.out.slice(at, width), products, job.write);
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
            let x = activations(9, 96, true);
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
            let x = activations(11, 128, true);
            let together = product(InstructionSet::detect(), 3, &x, &projection);
            for row in 0..11 {
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
            let x = activations(6, 64, true);
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
