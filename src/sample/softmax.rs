//! Probabilities of candidates: exponentials with the same bits on every machine.
//!
//! The exponential of the C library differs between systems in its last bit, which is enough to let one seed draw
//! different tokens. This one consists only of additions and multiplications, whose results IEEE 754 defines, and the
//! compiler can vectorize a loop over it.

use super::vectors::{BLOCK, vectors};

/// Probabilities up to a common factor.
#[derive(Clone, Copy, Debug)]
pub struct Weighed {
    /// The largest logit, whose weight is 1.
    pub max: f32,
    /// The sum of all weights.
    pub total: f64,
}

/// Writes `exp(logit − max)` of each logit to `weights`. `max` is the largest of the logits, which are finite.
pub fn weigh(logits: &[f32], max: f32, weights: &mut Vec<f32>) -> Weighed {
    weights.resize(logits.len(), 0.0);
    Weighed {
        max,
        total: vectors(|| exponentials(logits, max, weights)),
    }
}

/// The weights, and their sum.
#[inline(always)]
fn exponentials(logits: &[f32], max: f32, weights: &mut [f32]) -> f64 {
    let mut lanes = [0.0f64; BLOCK];
    let whole = logits.len() / BLOCK * BLOCK;
    let (logits, last_logits) = logits.split_at(whole);
    let (weights, last_weights) = weights.split_at_mut(whole);
    for (logits, weights) in logits.chunks_exact(BLOCK).zip(weights.chunks_exact_mut(BLOCK)) {
        for i in 0..BLOCK {
            weights[i] = exp(logits[i] - max);
        }
        for i in 0..BLOCK {
            lanes[i] += f64::from(weights[i]);
        }
    }
    for i in 0..last_logits.len() {
        last_weights[i] = exp(last_logits[i] - max);
        lanes[i] += f64::from(last_weights[i]);
    }
    lanes.iter().sum()
}

/// `e^x` for `x <= 0`, within two units in the last place; 0 below −87, where f32 runs out of normal numbers.
///
/// Range reduction and polynomial after S. Moshier's Cephes library, `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 leaves the rounded quotient in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] = [
        1.987_569_1e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut polynomial = COEFFICIENTS[0];
    for c in &COEFFICIENTS[1..] {
        polynomial = polynomial * r + c;
    }
    let mantissa = polynomial * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { mantissa * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_the_last_digits() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (ours - exact).abs() <= 2.0 * f64::from(f32::EPSILON) * exact,
                "{x}: {ours} {exact}"
            );
        }
        assert_eq!((exp(0.0), exp(-0.0), exp(-87.1), exp(f32::MIN)), (1.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn weights_sum_to_their_total() {
        let logits: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut weights = Vec::new();
        let weighed = weigh(&logits, max, &mut weights);
        let total: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
        assert!((weighed.total / total - 1.0).abs() < 1e-7);
        assert_eq!(weights.iter().copied().fold(0.0, f32::max), 1.0);
    }
}
