//! XTC, "exclude top choices" (p-e-w, text-generation-webui PR 6335): with some probability, drops all but the least
//! probable of the candidates that reach a threshold, so that the text leaves its beaten track.

use rand_chacha::ChaCha8Rng;

use super::draw::uniform;
use super::softmax::weigh;
use super::{Candidates, Sampler};

pub struct Xtc {
    probability: f32,
    threshold: f32,
    rng: ChaCha8Rng,
    weights: Vec<f32>,
}

impl Xtc {
    /// `probability` above 0 that a step is changed, `threshold` at most 0.5: above, no two candidates can reach it.
    pub fn new(probability: f32, threshold: f32, rng: ChaCha8Rng) -> Self {
        Xtc {
            probability,
            threshold,
            rng,
            weights: Vec::new(),
        }
    }
}

impl Sampler for Xtc {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        if candidates.len() < 2 || uniform(&mut self.rng) >= f64::from(self.probability) {
            return;
        }
        let weighed = weigh(candidates.logits(), candidates.max(), &mut self.weights);
        let reached = (f64::from(self.threshold) * weighed.total) as f32;
        // The least probable that reaches the threshold; of equals the last, as if sorted with lower ids first.
        let mut choices = 0;
        let mut least = 0;
        for (i, w) in self.weights.iter().enumerate() {
            if *w >= reached {
                let id = candidates.get(i).id;
                let now = self.weights[least];
                if choices == 0 || *w < now || *w == now && id > candidates.get(least).id {
                    least = i;
                }
                choices += 1;
            }
        }
        if choices > 1 {
            candidates.retain_indexed(|i, _| self.weights[i] < reached || i == least);
        }
    }
}
