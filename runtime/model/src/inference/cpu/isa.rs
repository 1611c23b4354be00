//! What a kernel needs of an instruction set. Kernels are written once, over [`Isa`]; which one runs
//! is found out when the engine starts. All of them add in the same order, so that a machine with
//! AVX-512 gives the same bits as one with AVX2 only.

use super::matrix::{Block4, Block8, GROUP, NARROW};
use super::multiply::{Stored, by_panels, wide_sums};

/// What a rounded group of activations takes.
pub const GROUP_BYTES: usize = 2 * GROUP;
/// The largest rounded activation.
const LARGEST: f32 = 127.0 * 128.0;

/// Eight fp32 numbers.
pub trait Lanes: Copy {
    fn zero() -> Self;
    fn splat(value: f32) -> Self;
    /// # Safety
    /// `from` has eight readable numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `to` has room for eight numbers.
    unsafe fn store(self, to: *mut f32);
    /// Eight fp16 numbers.
    /// # Safety
    /// `from` has eight readable numbers.
    unsafe fn load_half(from: *const u16) -> Self;
    /// Eight bf16 numbers.
    /// # Safety
    /// `from` has eight readable numbers.
    unsafe fn load_bf16(from: *const u16) -> Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// `self * factor + summand`, rounded once.
    fn fused(self, factor: Self, summand: Self) -> Self;
    /// e to the power of each; 0 below -87.
    fn exp(self) -> Self;

    fn to_array(self) -> [f32; 8] {
        let mut array = [0.0; 8];
        // SAFETY: the array has eight numbers.
        unsafe { self.store(array.as_mut_ptr()) };
        array
    }

    /// Pairwise, always in the same order.
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.to_array();
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    fn largest(self) -> f32 {
        self.to_array().into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Rows of rounded activations, one after another, from the first of a tile on.
#[derive(Clone, Copy, Debug)]
pub struct Rounded {
    /// [`GROUP_BYTES`] a group.
    pub numbers: *const i8,
    /// One a group.
    pub scales: *const f32,
    /// One a group: the scale times the sum of its integers.
    pub sums: *const f32,
    /// Of each row.
    pub groups: usize,
}

impl Rounded {
    /// # Safety
    /// There is such a group.
    #[inline(always)]
    pub unsafe fn group(&self, row: usize, group: usize) -> *const i8 {
        // SAFETY: the caller's promise.
        unsafe { self.numbers.add((row * self.groups + group) * GROUP_BYTES) }
    }

    /// # Safety
    /// As for [`Rounded::group`].
    #[inline(always)]
    pub unsafe fn scale(&self, row: usize, group: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *self.scales.add(row * self.groups + group) }
    }

    /// # Safety
    /// As for [`Rounded::group`].
    #[inline(always)]
    pub unsafe fn sum(&self, row: usize, group: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *self.sums.add(row * self.groups + group) }
    }
}

/// Products of a tile's rows with two panels side by side.
pub type Products = [[f32; 2 * NARROW]; 8];

/// An instruction set. The integer sums are exact, hence the same everywhere.
pub trait Isa: Sized {
    type F: Lanes;

    /// Of so many rows to come, those that share loaded weights of 4 or 8 bits; at most 8.
    fn narrow_rows(left: usize) -> usize {
        left.min(4)
    }

    /// The same of fp32 or bf16 weights: at most 6, or 12.
    fn wide_rows(left: usize) -> usize {
        left.min(6)
    }

    /// Products of `rows` rows, as [`Isa::narrow_rows`] says, with two panels of 4-bit weights. Each is the sum over the
    /// groups in their order of: integer sum, times the activations' scale, times the weights' scale, added with one
    /// rounding; then the minimum times the activations' sum, added with one rounding.
    /// # Safety
    /// Both panels have a block for each group of `x`, and `x` has the rows; the machine has the instruction set.
    #[inline(always)]
    unsafe fn nibbles(panels: [&[Block4]; 2], x: Rounded, rows: usize, to: &mut Products) {
        // SAFETY: the caller's promise.
        unsafe { by_panels::<Self, Block4>(panels, x, rows, to) }
    }

    /// The same for 8-bit weights, which have no minimum.
    /// # Safety
    /// As for [`Isa::nibbles`].
    #[inline(always)]
    unsafe fn bytes(panels: [&[Block8]; 2], x: Rounded, rows: usize, to: &mut Products) {
        // SAFETY: the caller's promise.
        unsafe { by_panels::<Self, Block8>(panels, x, rows, to) }
    }

    /// Products of `M` rows, `stride` numbers apart, with one panel of 16 outputs: the first eight, and the others.
    /// # Safety
    /// `x` points to `M` rows of as many numbers as the panel has inputs; the machine has the instruction set.
    #[inline(always)]
    unsafe fn wide<T: Stored, const M: usize>(x: *const f32, stride: usize, weights: &[T]) -> [[Self::F; M]; 2] {
        // SAFETY: the caller's promise.
        unsafe { wide_sums::<Self::F, T, M>(x, stride, weights) }
    }

    /// For eight outputs, the sums of products of one block of 4-bit weights with `M` groups of
    /// activations.
    /// # Safety
    /// Each of `x` points to a group as [`Isa::quantize`] leaves it; the machine has the instruction set.
    unsafe fn nibble_sums<const M: usize>(block: &Block4, x: [*const i8; M]) -> [Self::F; M];

    /// The same for 8-bit weights.
    /// # Safety
    /// As for [`Isa::nibble_sums`].
    unsafe fn byte_sums<const M: usize>(block: &Block8, x: [*const i8; M]) -> [Self::F; M];

    /// Rounds a group of activations to integers of 15 bits; returns their scale and the sum of the
    /// integers. An integer is 128 · high + low; the high parts come first, then the low ones. (With
    /// 8 bits a group's largest activation would drown the others: SmolLM2 then answers otherwise.)
    /// # Safety
    /// `from` points to [`GROUP`] numbers, `to` has room for [`GROUP_BYTES`]; the machine has the set.
    unsafe fn quantize(from: *const f32, to: *mut i8) -> (f32, i32);
}

/// The instruction sets that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl InstructionSet {
    /// The best that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                let wide = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
                return if wide && has!("avx512vnni") { Self::Vnni } else { Self::Avx2 };
            }
        }
        Self::Portable
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => "avx512-vnni",
        }
    }
}

/// Runs `$function::<SET>($arguments)` compiled for the given [`InstructionSet`].
macro_rules! dispatch {
    ($set:expr, $function:ident ( $($argument:ident : $type:ty),* )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($argument: $type),*) {
            // SAFETY: the caller's promise, and the features are enabled here.
            unsafe { $function::<$crate::inference::cpu::isa::Avx2>($($argument),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn vnni($($argument: $type),*) {
            // SAFETY: as above.
            unsafe { $function::<$crate::inference::cpu::isa::Vnni>($($argument),*) }
        }
        match $set {
            #[cfg(target_arch = "x86_64")]
            $crate::inference::cpu::isa::InstructionSet::Avx2 => avx2($($argument),*),
            #[cfg(target_arch = "x86_64")]
            $crate::inference::cpu::isa::InstructionSet::Vnni => vnni($($argument),*),
            $crate::inference::cpu::isa::InstructionSet::Portable => {
                $function::<$crate::inference::cpu::isa::Portable>($($argument),*)
            }
        }
    }};
}
pub(super) use dispatch;

#[cfg(target_arch = "x86_64")]
pub use super::x86::{Avx2, Vnni};

/// Any machine.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Lanes for [f32; 8] {
    #[inline(always)]
    fn zero() -> Self {
        [0.0; 8]
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(|bits| half::f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * other[lane])
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] / other[lane])
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane].max(other[lane]))
    }

    #[inline(always)]
    fn fused(self, factor: Self, summand: Self) -> Self {
        std::array::from_fn(|lane| self[lane].mul_add(factor[lane], summand[lane]))
    }

    #[inline(always)]
    fn exp(self) -> Self {
        self.map(|value| if value < SMALLEST_EXPONENT { 0.0 } else { value.exp() })
    }
}

/// Below it e^x is not a normal fp32 number.
pub const SMALLEST_EXPONENT: f32 = -87.0;

impl Isa for Portable {
    type F = [f32; 8];

    #[inline(always)]
    unsafe fn nibble_sums<const M: usize>(block: &Block4, x: [*const i8; M]) -> [Self::F; M] {
        x.map(|x| {
            // SAFETY: the caller's promise.
            let x = unsafe { &*x.cast::<[i8; GROUP_BYTES]>() };
            std::array::from_fn(|lane| {
                let products = (0..GROUP).map(|k| i32::from(block.number(lane, k)) * rounded(x, k));
                products.sum::<i32>() as f32
            })
        })
    }

    #[inline(always)]
    unsafe fn byte_sums<const M: usize>(block: &Block8, x: [*const i8; M]) -> [Self::F; M] {
        x.map(|x| {
            // SAFETY: the caller's promise.
            let x = unsafe { &*x.cast::<[i8; GROUP_BYTES]>() };
            std::array::from_fn(|lane| {
                let products = (0..GROUP).map(|k| i32::from(block.number(lane, k)) * rounded(x, k));
                products.sum::<i32>() as f32
            })
        })
    }

    #[inline(always)]
    unsafe fn quantize(from: *const f32, to: *mut i8) -> (f32, i32) {
        // SAFETY: the caller's promise.
        let (from, to) = unsafe { (&*from.cast::<[f32; GROUP]>(), &mut *to.cast::<[i8; GROUP_BYTES]>()) };
        let largest = from.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        let (scale, inverse) = scales(largest);
        let mut sum = 0;
        for (index, value) in from.iter().enumerate() {
            let number = (value * inverse).round_ties_even() as i32;
            let high = (number + 64) >> 7;
            to[index] = high as i8;
            to[GROUP + index] = (number - (high << 7)) as i8;
            sum += number;
        }
        (scale, sum)
    }
}

/// Integer `index` of a rounded group.
#[inline(always)]
pub fn rounded(group: &[i8; GROUP_BYTES], index: usize) -> i32 {
    128 * i32::from(group[index]) + i32::from(group[GROUP + index])
}

/// Scale of a group whose largest number is this, and its inverse.
#[inline(always)]
pub fn scales(largest: f32) -> (f32, f32) {
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    (largest / LARGEST, inverse)
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe fn exponentials<I: Isa>(from: &[f32; 8], to: &mut [f32; 8]) {
        // SAFETY: both have eight numbers.
        unsafe { I::F::load(from.as_ptr()).exp().store(to.as_mut_ptr()) }
    }

    #[test]
    fn exponentials_are_exact_to_a_few_bits_and_zero_far_below() {
        let values = [-200.0f32, -86.9, -10.5, -1.0, -1e-6, 0.0, 0.5, 20.25];
        let mut found = [0.0; 8];
        let (from, to) = (&values, &mut found);
        // SAFETY: the machine has the set that was detected.
        unsafe { dispatch!(InstructionSet::detect(), exponentials(from: &[f32; 8], to: &mut [f32; 8])) };
        for (value, found) in values.into_iter().zip(found) {
            let expected = if value < -87.0 { 0.0 } else { f64::from(value).exp() as f32 };
            assert!((found - expected).abs() <= expected * 3e-7, "e^{value}: {found} instead of {expected}");
        }
    }
}
