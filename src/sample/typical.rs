//! Locally typical sampling (Meister et al., 2022): keeps the candidates whose surprise is nearest to the entropy, until
//! they hold more than `p` of the probability.

use super::softmax::{Weighed, weigh};
use super::{Candidates, ROUNDING, Sampler};

pub struct Typical {
    p: f32,
    weights: Vec<f32>,
    /// The distance from typical, and the index, as one sortable integer.
    order: Vec<u64>,
    kept: Vec<bool>,
}

/// Candidates sorted at first.
const FIRST: usize = 256;

impl Typical {
    /// `p` from 0 up to, but not 1, which is off.
    pub fn new(p: f32) -> Self {
        Typical {
            p,
            weights: Vec::new(),
            order: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl Sampler for Typical {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        let Weighed { max, total } = weigh(candidates.logits(), candidates.max(), &mut self.weights);
        let log_total = total.ln();
        // −ln p of a candidate; entropy is its mean.
        let surprise = |logit: f32| log_total - f64::from(logit - max);
        let pairs = || candidates.logits().iter().zip(&self.weights);
        let entropy: f64 = pairs()
            .map(|(l, w)| {
                if *w > 0.0 {
                    f64::from(*w) / total * surprise(*l)
                } else {
                    0.0
                }
            })
            .sum();
        self.order.clear();
        // The bits of floats of 0 or more sort as they do.
        let far = |l: &f32| ((surprise(*l) - entropy).abs() as f32).to_bits();
        let key = |(i, l)| u64::from(far(l)) << 32 | i as u64;
        self.order.extend(candidates.logits().iter().enumerate().map(key));

        self.kept.clear();
        self.kept.resize(candidates.len(), false);
        let (mut sum, mut sorted, mut next) = (0.0, 0, FIRST);
        // Sorted only as far as needed.
        'enough: while sorted < self.order.len() {
            let rest = &mut self.order[sorted..];
            let now = next.min(rest.len());
            if now < rest.len() {
                rest.select_nth_unstable(now);
            }
            rest[..now].sort_unstable();
            for key in &rest[..now] {
                let i = *key as u32 as usize;
                self.kept[i] = true;
                sum += f64::from(self.weights[i]) / total;
                if sum > f64::from(self.p) + ROUNDING {
                    break 'enough;
                }
            }
            (sorted, next) = (sorted + now, next * 8);
        }
        candidates.retain_indexed(|i, _| self.kept[i]);
    }
}
