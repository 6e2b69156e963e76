//! Top-p, or nucleus sampling (Holtzman et al., 2019): keeps the most probable candidates that together hold `p`.

use super::softmax::{exp, weigh};
use super::{Candidates, ROUNDING, Sampler};

pub struct TopP {
    p: f32,
    weights: Vec<f32>,
}

/// Candidates sorted at first. Nuclei are small: sorting a whole vocabulary is seldom needed.
const FIRST: usize = 256;

impl TopP {
    /// `p` from 0 up to, but not 1, which is off.
    pub fn new(p: f32) -> Self {
        TopP { p, weights: Vec::new() }
    }
}

impl Sampler for TopP {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        let weighed = weigh(candidates.logits(), candidates.max(), &mut self.weights);
        let enough = (f64::from(self.p) - ROUNDING) * weighed.total;
        let mut sorted = FIRST;
        loop {
            let mut sum = 0.0;
            let found = candidates.top(sorted).position(|c| {
                sum += f64::from(exp(c.logit - weighed.max));
                sum >= enough
            });
            if let Some(last) = found {
                return candidates.keep_top(last + 1);
            }
            if sorted >= candidates.len() {
                // Rounding left the sum of all below p.
                return;
            }
            sorted *= 8;
        }
    }
}
