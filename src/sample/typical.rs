//! Locally typical sampling (Meister et al., 2022): keeps the candidates whose surprise is nearest to the entropy, until
//! they hold more than `p` of the probability.

use super::softmax::{Weighed, weigh};
use super::{Candidates, ROUNDING, Sampler};

pub struct Typical {
    p: f32,
    weights: Vec<f32>,
    /// How far from typical, and the index.
    order: Vec<(f32, u32)>,
    kept: Vec<bool>,
}

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
        let far = |l: &f32| (surprise(*l) - entropy).abs() as f32;
        self.order
            .extend(candidates.logits().iter().enumerate().map(|(i, l)| (far(l), i as u32)));
        self.order
            .sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));

        self.kept.clear();
        self.kept.resize(candidates.len(), false);
        let mut sum = 0.0;
        for (_, i) in &self.order {
            self.kept[*i as usize] = true;
            sum += f64::from(self.weights[*i as usize]) / total;
            if sum > f64::from(self.p) + ROUNDING {
                break;
            }
        }
        candidates.retain_indexed(|i, _| self.kept[i]);
    }
}
