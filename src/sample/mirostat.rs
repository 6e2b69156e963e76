//! Mirostat 2 (Basu et al., 2020): keeps the surprise of the text near a target by feedback.
//!
//! Keeps the candidates whose surprise is at most `mu` bits; after each draw `mu` moves against the error. It replaces
//! the truncating samplers and begins at twice the target.

use super::softmax::weigh;
use super::{Candidates, Sampler};

pub struct Mirostat {
    tau: f32,
    eta: f32,
    mu: f32,
    weights: Vec<f32>,
}

impl Mirostat {
    /// `tau`: the target surprise, in bits. `eta`: how fast `mu` is corrected.
    pub fn new(tau: f32, eta: f32) -> Self {
        Mirostat {
            tau,
            eta,
            mu: 2.0 * tau,
            weights: Vec::new(),
        }
    }
}

impl Sampler for Mirostat {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        let weighed = weigh(candidates.logits(), candidates.max(), &mut self.weights);
        // −log2(p) <= mu, with p = exp(logit − max) / total.
        let floor = -f64::from(self.mu) * std::f64::consts::LN_2 + weighed.total.ln();
        candidates.keep_from((f64::from(weighed.max) + floor) as f32);
    }

    fn drawn(&mut self, probability: f64) {
        let error = -probability.log2() as f32 - self.tau;
        self.mu -= self.eta * error;
    }

    fn reset(&mut self) {
        self.mu = 2.0 * self.tau;
    }
}
