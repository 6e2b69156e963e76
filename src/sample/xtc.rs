//! XTC, "exclude top choices" (p-e-w, text-generation-webui PR 6335): with some probability, drops all but the least
//! probable of the candidates that reach a threshold, so that the text becomes less predictable.

use rand_chacha::ChaCha8Rng;

use super::draw::{move_to, uniform};
use super::softmax::weigh;
use super::vectors::{BLOCK, block_with, vectors};
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
        let (mut choices, mut least, mut from) = (0, 0, 0);
        while let Some(block) = vectors(|| block_with(&self.weights, from, reached)) {
            from = block + 1;
            let start = block * BLOCK;
            for i in start..(start + BLOCK).min(self.weights.len()) {
                let (w, now) = (self.weights[i], self.weights[least]);
                if w < reached {
                    continue;
                }
                let is_later = || candidates.get(i).id > candidates.get(least).id;
                if choices == 0 || w < now || w == now && is_later() {
                    least = i;
                }
                choices += 1;
            }
        }
        if choices > 1 {
            candidates.retain_indexed(|i, _| self.weights[i] < reached || i == least);
        }
    }

    fn move_to(&mut self, position: usize) {
        move_to(&mut self.rng, position);
    }
}
