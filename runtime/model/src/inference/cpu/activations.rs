//! What goes into a projection: rows of fp32 numbers and, where the weights are quantised, the same
//! rounded to integers in groups of 32.

use super::isa::{GROUP_BYTES, Isa, Rounded};
use super::matrix::GROUP;
use super::share::Shared;

/// `rows × columns` numbers.
#[derive(Debug, Default)]
pub struct Activations {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f32>,
    /// Rounded, [`GROUP_BYTES`] a group; empty if they are not asked for.
    pub numbers: Vec<i8>,
    /// One a group.
    pub scales: Vec<f32>,
    /// One a group: the scale times the sum of its numbers.
    pub sums: Vec<f32>,
}

impl Activations {
    /// Room for so many numbers; what was there is lost.
    pub fn shape(&mut self, rows: usize, columns: usize, quantized: bool) {
        (self.rows, self.columns) = (rows, columns);
        self.values.resize(rows * columns, 0.0);
        let groups = if quantized { rows * (columns / GROUP) } else { 0 };
        self.numbers.resize(groups * GROUP_BYTES, 0);
        self.scales.resize(groups, 0.0);
        self.sums.resize(groups, 0.0);
    }

    /// The rounded rows from this one on.
    pub fn rounded(&self, row: usize) -> Rounded {
        let groups = self.columns / GROUP;
        let at = row * groups;
        Rounded {
            numbers: self.numbers[at * GROUP_BYTES..].as_ptr(),
            scales: self.scales[at..].as_ptr(),
            sums: self.sums[at..].as_ptr(),
            groups,
        }
    }

    /// For loops whose threads write different rows.
    pub fn share(&mut self) -> SharedActivations {
        SharedActivations {
            columns: self.columns,
            quantized: !self.numbers.is_empty(),
            values: Shared::new(&mut self.values),
            numbers: Shared::new(&mut self.numbers),
            scales: Shared::new(&mut self.scales),
            sums: Shared::new(&mut self.sums),
        }
    }
}

/// [`Activations`] that several threads write, each row by one of them.
#[derive(Clone, Copy, Debug)]
pub struct SharedActivations {
    columns: usize,
    quantized: bool,
    values: Shared<f32>,
    numbers: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<f32>,
}

impl SharedActivations {
    /// Row `row`.
    /// # Safety
    /// No other thread touches that row meanwhile.
    #[inline(always)]
    pub unsafe fn row<'a>(&self, row: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.values.slice(row * self.columns, self.columns) }
    }

    /// Rounds a row once it is written.
    /// # Safety
    /// As for [`SharedActivations::row`]; the machine has the instruction set.
    #[inline(always)]
    pub unsafe fn round_row<I: Isa>(&self, row: usize) {
        if !self.quantized {
            return;
        }
        let groups = self.columns / GROUP;
        // SAFETY: the caller's promise.
        let (values, numbers, scales, sums) = unsafe {
            (
                self.row(row),
                self.numbers.slice(row * groups * GROUP_BYTES, groups * GROUP_BYTES),
                self.scales.slice(row * groups, groups),
                self.sums.slice(row * groups, groups),
            )
        };
        for group in 0..groups {
            // SAFETY: a row is whole groups.
            let (scale, sum) = unsafe {
                I::quantize(values.as_ptr().add(group * GROUP), numbers.as_mut_ptr().add(group * GROUP_BYTES))
            };
            scales[group] = scale;
            sums[group] = scale * sum as f32;
        }
    }
}
