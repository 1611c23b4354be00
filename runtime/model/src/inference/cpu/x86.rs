//! The instruction sets of x86-64 processors.

use super::isa::{Isa, Lanes, Products, Rounded, SMALLEST_EXPONENT, scales};
use super::matrix::{Block4, Block8, GROUP};
use super::multiply::Stored;
use std::arch::x86_64::*;

/// AVX2, FMA and F16C: Haswell (2013) and later, Zen and later.
#[derive(Clone, Copy, Debug)]
pub struct Avx2;

/// Also AVX-512 and its dot products of integers (VNNI): Ice Lake and later, Zen 4 and later. Two panels side by side are as
/// wide as a register.
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
        let packed =
            _mm256_packs_epi16(_mm256_packs_epi32(numbers[0], numbers[1]), _mm256_packs_epi32(numbers[2], numbers[3]));
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
    fn narrow_rows(left: usize) -> usize {
        left.min(8)
    }

    #[inline(always)]
    fn wide_rows(left: usize) -> usize {
        if left < 12 { left.min(6) } else { 12 }
    }

    #[inline(always)]
    unsafe fn nibbles(panels: [&[Block4]; 2], x: Rounded, rows: usize, to: &mut Products) {
        unsafe { side_by_side::<Block4>(panels, x, rows, to) }
    }

    #[inline(always)]
    unsafe fn bytes(panels: [&[Block8]; 2], x: Rounded, rows: usize, to: &mut Products) {
        unsafe { side_by_side::<Block8>(panels, x, rows, to) }
    }

    #[inline(always)]
    unsafe fn wide<T: Stored, const M: usize>(x: *const f32, stride: usize, weights: &[T]) -> [[Self::F; M]; 2] {
        unsafe {
            let mut sums = [_mm512_setzero_ps(); M];
            for column in 0..weights.len() / 16 {
                let weight = T::load_16(weights.as_ptr().add(column * 16));
                for row in 0..M {
                    let value = _mm512_set1_ps(*x.add(row * stride + column));
                    sums[row] = _mm512_fmadd_ps(weight, value, sums[row]);
                }
            }
            // No closures: they would not have this function's instructions, and pass registers through memory.
            let mut halves = [[_mm256_setzero_ps(); M]; 2];
            for row in 0..M {
                halves[0][row] = _mm512_castps512_ps256(sums[row]);
                halves[1][row] = _mm512_extractf32x8_ps::<1>(sums[row]);
            }
            halves
        }
    }

    #[inline(always)]
    unsafe fn nibble_sums<const M: usize>(block: &Block4, x: [*const i8; M]) -> [Self::F; M] {
        unsafe { Avx2::nibble_sums(block, x) }
    }

    #[inline(always)]
    unsafe fn byte_sums<const M: usize>(block: &Block8, x: [*const i8; M]) -> [Self::F; M] {
        unsafe { Avx2::byte_sums(block, x) }
    }

    #[inline(always)]
    unsafe fn quantize(from: *const f32, to: *mut i8) -> (f32, i32) {
        unsafe { Avx2::quantize(from, to) }
    }
}

/// Blocks of which two, side by side, are multiplied at a time.
trait Paired: Sized {
    /// Integer sums of 16 outputs for `M` groups of activations: of their high parts, and of their low ones.
    /// # Safety
    /// The machine has VNNI; each of `x` points to a group as [`Isa::quantize`] leaves it.
    unsafe fn sums<const M: usize>(pair: [&Self; 2], x: [*const i8; M]) -> [[__m512i; M]; 2];
    /// Scales and, where there are some, minima of 16 outputs.
    /// # Safety
    /// The machine has AVX-512.
    unsafe fn scales(pair: [&Self; 2]) -> (__m512, Option<__m512>);
}

/// Two halves of a register.
#[inline(always)]
unsafe fn both<T>(first: *const T, second: *const T) -> __m512i {
    unsafe {
        let first = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
        _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(second.cast()))
    }
}

/// 16 fp16 numbers.
#[inline(always)]
unsafe fn halves(first: &[u16; 8], second: &[u16; 8]) -> __m512 {
    unsafe {
        let (first, second) = (_mm_loadu_si128(first.as_ptr().cast()), _mm_loadu_si128(second.as_ptr().cast()));
        _mm512_cvtph_ps(_mm256_set_m128i(second, first))
    }
}

/// Four bytes at `x`, in every lane.
#[inline(always)]
unsafe fn four_16(x: *const i8) -> __m512i {
    unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

impl Paired for Block4 {
    #[inline(always)]
    unsafe fn sums<const M: usize>([a, b]: [&Self; 2], x: [*const i8; M]) -> [[__m512i; M]; 2] {
        unsafe {
            let mask = _mm512_set1_epi8(0xf);
            let mut highs = [_mm512_setzero_si512(); M];
            let mut lows = [_mm512_setzero_si512(); M];
            for quad in 0..4 {
                let packed = both(a.nibbles[quad].as_ptr(), b.nibbles[quad].as_ptr());
                let front = _mm512_and_si512(packed, mask);
                let back = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask);
                for row in 0..M {
                    let x = x[row].add(4 * quad);
                    highs[row] = _mm512_dpbusd_epi32(highs[row], front, four_16(x));
                    lows[row] = _mm512_dpbusd_epi32(lows[row], front, four_16(x.add(GROUP)));
                    highs[row] = _mm512_dpbusd_epi32(highs[row], back, four_16(x.add(16)));
                    lows[row] = _mm512_dpbusd_epi32(lows[row], back, four_16(x.add(GROUP + 16)));
                }
            }
            [highs, lows]
        }
    }

    #[inline(always)]
    unsafe fn scales([a, b]: [&Self; 2]) -> (__m512, Option<__m512>) {
        unsafe { (halves(&a.scales, &b.scales), Some(halves(&a.minima, &b.minima))) }
    }
}

impl Paired for Block8 {
    #[inline(always)]
    unsafe fn sums<const M: usize>([a, b]: [&Self; 2], x: [*const i8; M]) -> [[__m512i; M]; 2] {
        unsafe {
            let zero = _mm512_setzero_si512();
            let mut highs = [zero; M];
            let mut lows = [zero; M];
            for quad in 0..8 {
                let weights = both(a.numbers[quad].as_ptr(), b.numbers[quad].as_ptr());
                // The instruction wants one side without sign: the other one takes it over.
                let (sizes, negative) = (_mm512_abs_epi8(weights), _mm512_movepi8_mask(weights));
                for row in 0..M {
                    let (high, low) = (four_16(x[row].add(4 * quad)), four_16(x[row].add(GROUP + 4 * quad)));
                    let high = _mm512_mask_sub_epi8(high, negative, zero, high);
                    let low = _mm512_mask_sub_epi8(low, negative, zero, low);
                    highs[row] = _mm512_dpbusd_epi32(highs[row], sizes, high);
                    lows[row] = _mm512_dpbusd_epi32(lows[row], sizes, low);
                }
            }
            [highs, lows]
        }
    }

    #[inline(always)]
    unsafe fn scales([a, b]: [&Self; 2]) -> (__m512, Option<__m512>) {
        unsafe { (halves(&a.scales, &b.scales), None) }
    }
}

/// Adds a group's products, of integer sums in two parts, to a row's total.
#[inline(always)]
unsafe fn added(
    total: __m512,
    [high, low]: [__m512i; 2],
    (scale, sum): (f32, f32),
    (scales, minima): (__m512, Option<__m512>),
) -> __m512 {
    unsafe {
        let whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<7>(high), low));
        let total = _mm512_fmadd_ps(_mm512_mul_ps(whole, _mm512_set1_ps(scale)), scales, total);
        match minima {
            Some(minima) => _mm512_fmadd_ps(minima, _mm512_set1_ps(sum), total),
            None => total,
        }
    }
}

/// Products of up to eight rows with two panels.
/// # Safety
/// As for [`Isa::nibbles`].
#[inline(always)]
unsafe fn side_by_side<B: Paired>(panels: [&[B]; 2], x: Rounded, rows: usize, to: &mut Products) {
    unsafe {
        match rows {
            1 => side_by_side_rows::<B, 1>(panels, x, to),
            2 => side_by_side_rows::<B, 2>(panels, x, to),
            3 => side_by_side_rows::<B, 3>(panels, x, to),
            4 => side_by_side_rows::<B, 4>(panels, x, to),
            5 => side_by_side_rows::<B, 5>(panels, x, to),
            6 => side_by_side_rows::<B, 6>(panels, x, to),
            7 => side_by_side_rows::<B, 7>(panels, x, to),
            _ => side_by_side_rows::<B, 8>(panels, x, to),
        }
    }
}

#[inline(always)]
unsafe fn side_by_side_rows<B: Paired, const M: usize>(panels: [&[B]; 2], x: Rounded, to: &mut Products) {
    unsafe {
        let mut totals = [_mm512_setzero_ps(); M];
        for (group, (a, b)) in panels[0].iter().zip(panels[1]).enumerate() {
            let mut groups = [std::ptr::null(); M];
            for row in 0..M {
                groups[row] = x.group(row, group);
            }
            let ([highs, lows], scales) = (B::sums([a, b], groups), B::scales([a, b]));
            for row in 0..M {
                let activations = (x.scale(row, group), x.sum(row, group));
                totals[row] = added(totals[row], [highs[row], lows[row]], activations, scales);
            }
        }
        for row in 0..M {
            _mm512_storeu_ps(to[row].as_mut_ptr(), totals[row]);
        }
    }
}
