//! What a kernel needs of an instruction set. Kernels are written once, over [`Isa`]; which one runs
//! is found out when the engine starts. All of them add in the same order, so that a machine with
//! VNNI gives the same bits as one with AVX2 only.

use super::matrix::{Block4, Block8, GROUP};

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

/// An instruction set. The integer sums are exact, hence the same everywhere.
pub trait Isa {
    type F: Lanes;

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
                let vnni = has!("avx512vnni") && has!("avx512vl");
                return if vnni { Self::Vnni } else { Self::Avx2 };
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
        #[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
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
const SMALLEST_EXPONENT: f32 = -87.0;

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
fn scales(largest: f32) -> (f32, f32) {
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    (largest / LARGEST, inverse)
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// AVX2, FMA and F16C: Haswell (2013) and later, Zen and later.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2;

    /// Also the dot products of AVX-512 VNNI, on 256 bits: Ice Lake and later, Zen 4 and later.
    #[derive(Clone, Copy, Debug)]
    pub struct Vnni;

    // SAFETY (of all blocks here): these types are only used below `dispatch!`, which has checked
    // that the machine has the instructions.
    impl Lanes for __m256 {
        #[inline(always)]
        fn zero() -> Self {
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn load_half(from: *const u16) -> Self {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { _mm256_mul_ps(self, other) }
        }

        #[inline(always)]
        fn div(self, other: Self) -> Self {
            unsafe { _mm256_div_ps(self, other) }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            unsafe { _mm256_max_ps(self, other) }
        }

        #[inline(always)]
        fn fused(self, factor: Self, summand: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, summand) }
        }

        /// 2^n · e^r with |r| ≤ ln 2 / 2, e^r by a polynomial of degree 6 (Taylor; its error is
        /// below fp32's rounding).
        #[inline(always)]
        fn exp(self) -> Self {
            unsafe {
                let clamped = _mm256_min_ps(_mm256_max_ps(self, Self::splat(SMALLEST_EXPONENT)), Self::splat(88.0));
                let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                    clamped.mul(Self::splat(std::f32::consts::LOG2_E)),
                );
                // ln 2 in two parts, the first of which times n is exact.
                let r = _mm256_fnmadd_ps(n, Self::splat(0.693_359_4), clamped);
                let r = _mm256_fnmadd_ps(n, Self::splat(-2.121_944_4e-4), r);
                let mut power = Self::splat(1.0 / 720.0);
                for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                    power = power.fused(r, Self::splat(coefficient));
                }
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                let scaled = power.mul(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)));
                let normal = _mm256_cmp_ps::<_CMP_GE_OQ>(self, Self::splat(SMALLEST_EXPONENT));
                _mm256_and_ps(scaled, normal)
            }
        }
    }

    /// 32 integers as bytes.
    #[inline(always)]
    unsafe fn bytes(numbers: [__m256i; 4]) -> __m256i {
        unsafe {
            let packed = _mm256_packs_epi16(
                _mm256_packs_epi32(numbers[0], numbers[1]),
                _mm256_packs_epi32(numbers[2], numbers[3]),
            );
            // Packing works within halves; this puts the fours back in order.
            _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
        }
    }

    /// Sums of whole integers from those of their parts.
    #[inline(always)]
    unsafe fn joined<const M: usize>(highs: [__m256i; M], lows: [__m256i; M]) -> [__m256; M] {
        unsafe {
            let mut whole = [_mm256_setzero_ps(); M];
            for row in 0..M {
                whole[row] = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32::<7>(highs[row]), lows[row]));
            }
            whole
        }
    }

    /// Four bytes at `x`, in every lane.
    #[inline(always)]
    unsafe fn four(x: *const i8) -> __m256i {
        unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) }
    }

    impl Isa for Avx2 {
        type F = __m256;

        #[inline(always)]
        unsafe fn nibble_sums<const M: usize>(block: &Block4, x: [*const i8; M]) -> [Self::F; M] {
            unsafe {
                let mask = _mm256_set1_epi8(0xf);
                // Sums of 16 products of at most 15 · 127 fit in 16 bits.
                let mut highs = [_mm256_setzero_si256(); M];
                let mut lows = [_mm256_setzero_si256(); M];
                for quad in 0..4 {
                    let packed = _mm256_loadu_si256(block.nibbles[quad].as_ptr().cast());
                    let front = _mm256_and_si256(packed, mask);
                    let back = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
                    for row in 0..M {
                        let x = x[row].add(4 * quad);
                        let first = _mm256_maddubs_epi16(front, four(x));
                        let second = _mm256_maddubs_epi16(back, four(x.add(16)));
                        highs[row] = _mm256_add_epi16(highs[row], _mm256_add_epi16(first, second));
                        let first = _mm256_maddubs_epi16(front, four(x.add(GROUP)));
                        let second = _mm256_maddubs_epi16(back, four(x.add(GROUP + 16)));
                        lows[row] = _mm256_add_epi16(lows[row], _mm256_add_epi16(first, second));
                    }
                }
                let (ones, factor) = (_mm256_set1_epi16(1), _mm256_set1_epi16(128));
                let mut whole = [Self::F::zero(); M];
                for row in 0..M {
                    let high = _mm256_madd_epi16(highs[row], factor);
                    whole[row] = _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_madd_epi16(lows[row], ones)));
                }
                whole
            }
        }

        #[inline(always)]
        unsafe fn byte_sums<const M: usize>(block: &Block8, x: [*const i8; M]) -> [Self::F; M] {
            unsafe {
                let ones = _mm256_set1_epi16(1);
                let mut highs = [_mm256_setzero_si256(); M];
                let mut lows = [_mm256_setzero_si256(); M];
                for quad in 0..8 {
                    let weights = _mm256_loadu_si256(block.numbers[quad].as_ptr().cast());
                    // The instruction wants one side without sign; two products fit in 16 bits.
                    let sizes = _mm256_abs_epi8(weights);
                    for row in 0..M {
                        let x = x[row].add(4 * quad);
                        let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(four(x), weights));
                        highs[row] = _mm256_add_epi32(highs[row], _mm256_madd_epi16(pairs, ones));
                        let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(four(x.add(GROUP)), weights));
                        lows[row] = _mm256_add_epi32(lows[row], _mm256_madd_epi16(pairs, ones));
                    }
                }
                joined(highs, lows)
            }
        }

        #[inline(always)]
        unsafe fn quantize(from: *const f32, to: *mut i8) -> (f32, i32) {
            unsafe {
                let sign = Self::F::splat(-0.0);
                let mut values = [Self::F::zero(); 4];
                let mut largest = Self::F::zero();
                for quarter in 0..4 {
                    values[quarter] = Self::F::load(from.add(8 * quarter));
                    largest = largest.max(_mm256_andnot_ps(sign, values[quarter]));
                }
                let (scale, inverse) = scales(largest.largest());
                let inverse = Self::F::splat(inverse);
                let mut all = _mm256_setzero_si256();
                let mut highs = [_mm256_setzero_si256(); 4];
                let mut lows = [_mm256_setzero_si256(); 4];
                for quarter in 0..4 {
                    let number = _mm256_cvtps_epi32(values[quarter].mul(inverse));
                    all = _mm256_add_epi32(all, number);
                    highs[quarter] = _mm256_srai_epi32::<7>(_mm256_add_epi32(number, _mm256_set1_epi32(64)));
                    lows[quarter] = _mm256_sub_epi32(number, _mm256_slli_epi32::<7>(highs[quarter]));
                }
                let mut lanes = [0i32; 8];
                _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all);
                _mm256_storeu_si256(to.cast(), bytes(highs));
                _mm256_storeu_si256(to.add(GROUP).cast(), bytes(lows));
                (scale, lanes.iter().sum())
            }
        }
    }

    impl Isa for Vnni {
        type F = __m256;

        #[inline(always)]
        unsafe fn nibble_sums<const M: usize>(block: &Block4, x: [*const i8; M]) -> [Self::F; M] {
            unsafe {
                let mask = _mm256_set1_epi8(0xf);
                let mut highs = [_mm256_setzero_si256(); M];
                let mut lows = [_mm256_setzero_si256(); M];
                for quad in 0..4 {
                    let packed = _mm256_loadu_si256(block.nibbles[quad].as_ptr().cast());
                    let front = _mm256_and_si256(packed, mask);
                    let back = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
                    for row in 0..M {
                        let x = x[row].add(4 * quad);
                        highs[row] = _mm256_dpbusd_epi32(highs[row], front, four(x));
                        highs[row] = _mm256_dpbusd_epi32(highs[row], back, four(x.add(16)));
                        lows[row] = _mm256_dpbusd_epi32(lows[row], front, four(x.add(GROUP)));
                        lows[row] = _mm256_dpbusd_epi32(lows[row], back, four(x.add(GROUP + 16)));
                    }
                }
                joined(highs, lows)
            }
        }

        #[inline(always)]
        unsafe fn byte_sums<const M: usize>(block: &Block8, x: [*const i8; M]) -> [Self::F; M] {
            unsafe {
                let mut highs = [_mm256_setzero_si256(); M];
                let mut lows = [_mm256_setzero_si256(); M];
                for quad in 0..8 {
                    let weights = _mm256_loadu_si256(block.numbers[quad].as_ptr().cast());
                    let sizes = _mm256_abs_epi8(weights);
                    for row in 0..M {
                        let x = x[row].add(4 * quad);
                        highs[row] = _mm256_dpbusd_epi32(highs[row], sizes, _mm256_sign_epi8(four(x), weights));
                        let low = _mm256_sign_epi8(four(x.add(GROUP)), weights);
                        lows[row] = _mm256_dpbusd_epi32(lows[row], sizes, low);
                    }
                }
                joined(highs, lows)
            }
        }

        #[inline(always)]
        unsafe fn quantize(from: *const f32, to: *mut i8) -> (f32, i32) {
            unsafe { Avx2::quantize(from, to) }
        }
    }
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
