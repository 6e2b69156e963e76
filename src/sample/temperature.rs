//! Temperature: every logit divided by one number. Above 1 the distribution is flatter, below 1 sharper.

use super::{Candidates, Sampler};

pub struct Temperature(f32);

impl Temperature {
    /// `temperature` must be above 0; greedy decoding is a [`super::Draw`], not a temperature.
    pub fn new(temperature: f32) -> Self {
        Temperature(temperature)
    }
}

impl Sampler for Temperature {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        candidates.map(|logit| logit / self.0);
    }
}
