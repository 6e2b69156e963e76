//! Top-nσ (Tang et al., 2024): keeps logits within `n` standard deviations of the largest one.
//!
//! Mean and deviation are those of the logits before any temperature, so the kept set does not depend on it.

use super::vectors::{Spread, spread, vectors};
use super::{Candidates, Sampler};

pub struct TopNSigma {
    n: f32,
    at_most: Option<usize>,
}

impl TopNSigma {
    /// `n` above 0. `at_most`: keeps no more than this many, which a top-k right after it would do. Both keep the
    /// largest logits, so combining them changes nothing and is faster.
    pub fn new(n: f32, at_most: Option<usize>) -> Self {
        TopNSigma { n, at_most }
    }
}

impl Sampler for TopNSigma {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        let Spread { min, max, variance } = vectors(|| spread(candidates.logits()));
        // A penalty can be so large that its square exceeds f32: then everything is near.
        let deviation = if variance.is_finite() {
            variance.max(0.0).sqrt() as f32
        } else {
            f32::INFINITY
        };
        let floor = max - self.n * deviation;
        match self.at_most {
            Some(k) if k < candidates.len() => {
                let kept = candidates.top(k).filter(|c| c.logit >= floor).count();
                candidates.keep_top(kept.max(1));
            }
            _ if floor > min => candidates.keep_from(floor),
            _ => {}
        }
    }
}
