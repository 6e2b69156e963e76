//! Top-nσ (Tang et al., 2024): keeps logits within `n` standard deviations of the largest one.
//!
//! Mean and deviation are those of the logits as they come, before any temperature, so the set kept does not depend on
//! it.

use super::{Candidates, Sampler};

pub struct TopNSigma(f32);

impl TopNSigma {
    /// `n` above 0.
    pub fn new(n: f32) -> Self {
        TopNSigma(n)
    }
}

impl Sampler for TopNSigma {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        if candidates.len() > 1 {
            let max = candidates.max();
            candidates.keep_from(max - self.0 * deviation(candidates.logits(), max));
        }
    }
}

/// The standard deviation. Sums run over distances from `around`, so that squares do not cancel.
fn deviation(logits: &[f32], around: f32) -> f32 {
    const LANES: usize = 8;
    let (mut sums, mut squares) = ([0.0f64; LANES], [0.0f64; LANES]);
    let mut blocks = logits.chunks_exact(LANES);
    for block in &mut blocks {
        for i in 0..LANES {
            let d = f64::from(block[i] - around);
            sums[i] += d;
            squares[i] += d * d;
        }
    }
    for logit in blocks.remainder() {
        let d = f64::from(logit - around);
        sums[0] += d;
        squares[0] += d * d;
    }
    let n = logits.len() as f64;
    let mean = sums.iter().sum::<f64>() / n;
    let variance = squares.iter().sum::<f64>() / n - mean * mean;
    variance.max(0.0).sqrt() as f32
}
