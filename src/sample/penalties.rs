//! Repetition, frequency and presence penalties, over the last tokens.
//!
//! The repetition penalty (Keskar et al., CTRL, 2019) divides positive logits and multiplies the others, so that both
//! decrease; then `count * frequency + presence` is subtracted. Each token of the window is divided or multiplied once,
//! whatever its count.

use super::tally::Tally;
use super::{Candidates, Sampler, window};

pub struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    last_n: Option<usize>,
    counts: Tally,
}

impl Penalties {
    /// `repetition` above 0, 1 is off; the others of 0 or more, 0 is off. `last_n`: number of last tokens, or all.
    pub fn new(repetition: f32, frequency: f32, presence: f32, last_n: Option<usize>) -> Self {
        Penalties {
            repetition,
            frequency,
            presence,
            last_n,
            counts: Tally::default(),
        }
    }
}

impl Sampler for Penalties {
    fn apply(&mut self, candidates: &mut Candidates, history: &[u32]) {
        self.counts.clear(candidates.vocabulary());
        for token in window(history, self.last_n) {
            self.counts.count(*token);
        }
        candidates.rewrite(&self.counts, |_, count, logit| {
            let logit = match logit > 0.0 {
                true => logit / self.repetition,
                false => logit * self.repetition,
            };
            logit - (count as f32 * self.frequency + self.presence)
        });
    }
}
