//! Elementary functions in fp32, free of branches so that loops over them vectorize.
//!
//! All are generic over [`Simd`] only for `mul_add`; they stay within a few units in the last place of the true value
//! and treat NaN and the infinities as IEEE 754 and C do.

use super::super::simd::Simd;

/// Coefficients of 2^f on [-0.5, 0.5], from the highest power (Cephes `expf`, in terms of r = f ln 2).
const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    5e-1,
];

/// The smallest argument whose exponential is a normal number.
const LOWEST: f32 = -87.3;

#[inline(always)]
pub fn exp<S: Simd>(x: f32) -> f32 {
    // Below, the result would be subnormal, which costs a hundred cycles: it is 0. Above, infinity. NaN passes both.
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > 89.0 { 89.0 } else { clamped };
    // Adding 1.5 * 2^23 rounds to an integer without a call, and keeps it in the low bits.
    let shifter = 12_582_912.0f32;
    let rounded = S::mul_add(clamped, std::f32::consts::LOG2_E, shifter);
    let n = rounded - shifter;
    // ln 2 in two pieces, so that r is more precise than one f32 allows.
    let r = S::mul_add(n, -0.693_359_4, clamped);
    let r = S::mul_add(n, 2.121_944_4e-4, r);
    let mut p = EXP[0];
    for c in &EXP[1..] {
        p = S::mul_add(p, r, *c);
    }
    let y = S::mul_add(p * r, r, r) + 1.0;
    // 2^n in two factors: n reaches 128, outside one exponent.
    let n = (rounded.to_bits() as i32).wrapping_sub(0x4b40_0000);
    let half = n >> 1;
    let scale = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let y = y * scale(half) * scale(n.wrapping_sub(half));
    if x < LOWEST { 0.0 } else { y }
}

#[inline(always)]
pub fn sigmoid<S: Simd>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<S>(-x))
}

#[inline(always)]
pub fn tanh<S: Simd>(x: f32) -> f32 {
    let t = x.abs();
    // Near 0 the exponential form cancels: a polynomial in x² (Cephes `tanhf`).
    let s = t * t;
    let mut p = -5.704_988_7e-3f32;
    for c in [2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = S::mul_add(p, s, c);
    }
    let small = S::mul_add(p * s, t, t);
    let large = 1.0 - 2.0 / (exp::<S>(2.0 * t) + 1.0);
    let magnitude = if t < 0.625 { small } else { large };
    if x.is_nan() { x } else { magnitude.copysign(x) }
}

/// After N. Juffa's `erff`: two minimax polynomials, error below 1 ulp.
#[inline(always)]
pub fn erf<S: Simd>(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let f = S::mul_add;
    let r = f(-1.728_534_7e-5, t, 3.831_971_3e-4);
    let u = f(-3.883_964_4e-3, t, 2.425_462_2e-2);
    let mut r = f(r, s, u);
    for c in [-1.067_778_8e-1, -6.348_468_7e-1, -1.287_175_1e-1] {
        r = f(r, t, c);
    }
    let r = f(r, t, -t);
    let large = (1.0 - exp::<S>(r)).copysign(x);
    let mut p = -5.967_617e-4f32;
    for c in [
        4.991_194e-3,
        -2.676_813_5e-2,
        1.128_199_26e-1,
        -3.761_253_6e-1,
        1.283_791_7e-1,
    ] {
        p = f(p, s, c);
    }
    let small = f(p, x, x);
    // Beyond 9.5 the first polynomial overflows its range; the result is ±1 there.
    let saturated = if t > 9.5 { 1f32.copysign(x) } else { large };
    if t > 0.927_734_4 { saturated } else { small }
}

/// `x/2 (1 + erf(x/√2))`
#[inline(always)]
pub fn gelu_erf<S: Simd>(x: f32) -> f32 {
    let y = 0.5 * x * (1.0 + erf::<S>(x * std::f32::consts::FRAC_1_SQRT_2));
    // -∞ * 0: the limit is 0, as everywhere to the left of it.
    if x == f32::NEG_INFINITY { 0.0 } else { y }
}

/// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`
#[inline(always)]
pub fn gelu_tanh<S: Simd>(x: f32) -> f32 {
    let inner = 0.797_884_6 * S::mul_add(0.044_715 * x * x, x, x);
    let y = 0.5 * x * (1.0 + tanh::<S>(inner));
    if x == f32::NEG_INFINITY { 0.0 } else { y }
}

/// `ln(1 + e^x)`
pub fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p() + if x.is_nan() { x } else { 0.0 }
}

/// The nearest number of `f8e4m3fn`, ties to even, saturated at 448.
#[inline(always)]
pub fn round_e4m3(x: f32) -> f32 {
    round_float8(x, 448.0, 3, -6)
}

/// The nearest number of `f8e5m2`, ties to even, saturated at 57344.
#[inline(always)]
pub fn round_e5m2(x: f32) -> f32 {
    round_float8(x, 57344.0, 2, -14)
}

/// Rounds to a multiple of the float's spacing near x, which is a power of two, so both the quotient and the product
/// are exact.
#[inline(always)]
fn round_float8(x: f32, max: f32, mantissa: i32, least_exponent: i32) -> f32 {
    let x = if x > max { max } else { x };
    let x = if x < -max { -max } else { x };
    let least = (127 + least_exponent) << 23;
    let exponent = (x.to_bits() as i32 & 0x7f80_0000).max(least);
    let unit = f32::from_bits((exponent - (mantissa << 23)) as u32);
    (x / unit).round_ties_even() * unit
}

#[cfg(test)]
mod tests {
    use super::super::super::simd::{Isa, Kernel};
    use super::*;

    /// Every number of the float, its neighbors in f32, and the midpoints, against the table of codes.
    #[test]
    fn floats_of_eight_bits_are_the_nearest_codes() {
        use crate::tensor::{DType, Tensor};
        for (dtype, round) in [
            (DType::F8E4M3Fn, round_e4m3 as fn(f32) -> f32),
            (DType::F8E5M2, round_e5m2),
        ] {
            let codes = Tensor::new(dtype, vec![256], bytes::Bytes::from_iter(0..=u8::MAX)).unwrap();
            let mut numbers: Vec<f32> = codes.to_f32().into_iter().filter(|v| v.is_finite()).collect();
            numbers.sort_by(f32::total_cmp);
            let middles: Vec<f32> = numbers.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            numbers.extend(middles);
            numbers.extend([1e9, -1e9, f32::INFINITY, 1e-30]);
            for x in numbers.into_iter().flat_map(|x| [x, x.next_up(), x.next_down()]) {
                let expected = Tensor::from_f64_as(dtype, vec![1], &[f64::from(x)]).to_f32()[0];
                assert_eq!(round(x), expected, "{dtype}: {x:e}");
            }
            assert!(round(f32::NAN).is_nan());
        }
    }

    struct Apply<'a>(&'a [f32], fn_name::Name);
    mod fn_name {
        #[derive(Clone, Copy, Debug)]
        pub enum Name {
            Exp,
            Sigmoid,
            Tanh,
            Erf,
            GeluErf,
            GeluTanh,
        }
    }
    use fn_name::Name;
    const ALL: [Name; 6] = [
        Name::Exp,
        Name::Sigmoid,
        Name::Tanh,
        Name::Erf,
        Name::GeluErf,
        Name::GeluTanh,
    ];

    impl Kernel for Apply<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len()];
            for (x, y) in self.0.iter().zip(&mut out) {
                *y = match self.1 {
                    Name::Exp => exp::<S>(*x),
                    Name::Sigmoid => sigmoid::<S>(*x),
                    Name::Tanh => tanh::<S>(*x),
                    Name::Erf => erf::<S>(*x),
                    Name::GeluErf => gelu_erf::<S>(*x),
                    Name::GeluTanh => gelu_tanh::<S>(*x),
                };
            }
            out
        }
    }

    /// erf by its Taylor series, or the continued fraction of erfc where that converges faster.
    fn erf64(x: f64) -> f64 {
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= -x * x / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            return sum * 2.0 / std::f64::consts::PI.sqrt();
        }
        let t = x.abs();
        let fraction = (1..100).rev().fold(t, |f, k| t + k as f64 / 2.0 / f);
        x.signum() * (1.0 - (-t * t).exp() / fraction / std::f64::consts::PI.sqrt())
    }

    fn reference(name: Name, x: f64) -> f64 {
        match name {
            Name::Exp => x.exp(),
            Name::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Name::Tanh => x.tanh(),
            Name::Erf => erf64(x),
            Name::GeluErf => 0.5 * x * (1.0 + erf64(x / 2f64.sqrt())),
            Name::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
        }
    }

    #[test]
    fn close_to_the_true_values_everywhere() {
        let xs: Vec<f32> = (-20_000..=20_000)
            .map(|i| i as f32 * 5e-4 * (1.0 + (i % 7) as f32))
            .collect();
        for isa in Isa::available() {
            for name in ALL {
                // SAFETY: the kernel has slices in place of pointers, and the instruction set is available.
                let got = unsafe { isa.run(Apply(&xs, name)) };
                for (x, y) in xs.iter().zip(got) {
                    let want = reference(name, f64::from(*x));
                    let error = (f64::from(y) - want).abs();
                    // The GELUs cancel for negative x; their error is absolute, of the size of an ulp of x.
                    let scale = match name {
                        Name::GeluErf | Name::GeluTanh => want.abs().max(f64::from(x.abs())),
                        _ => want.abs(),
                    };
                    let infinite = want > f64::from(f32::MAX) && y == f32::INFINITY;
                    assert!(
                        infinite || error <= 4e-7 * scale + 1e-37,
                        "{isa:?} {name:?}({x}) = {y}, not {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn special_values_are_ieee() {
        let xs = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e38, -1e38];
        for isa in Isa::available() {
            // SAFETY: as above.
            let run = |name| unsafe { isa.run(Apply(&xs, name)) };
            for name in ALL {
                assert!(run(name)[0].is_nan(), "{isa:?} {name:?}");
            }
            assert_eq!(run(Name::Exp)[1..], [f32::INFINITY, 0.0, 1.0, 1.0, f32::INFINITY, 0.0]);
            assert_eq!(run(Name::Sigmoid)[1..], [1.0, 0.0, 0.5, 0.5, 1.0, 0.0]);
            assert_eq!(run(Name::Tanh)[1..], [1.0, -1.0, 0.0, 0.0, 1.0, -1.0]);
            assert_eq!(run(Name::Erf)[1..], [1.0, -1.0, 0.0, 0.0, 1.0, -1.0]);
            assert_eq!(run(Name::GeluErf)[1..], [f32::INFINITY, 0.0, 0.0, 0.0, 1e38, 0.0]);
            assert_eq!(run(Name::GeluTanh)[1..], [f32::INFINITY, 0.0, 0.0, 0.0, 1e38, 0.0]);
        }
        assert!(softplus(f32::NAN).is_nan());
        assert_eq!(softplus(100.0), 100.0);
    }
}
