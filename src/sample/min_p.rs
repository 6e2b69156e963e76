//! Min-p (Nguyen et al., 2024): keeps candidates at least `p` times as probable as the most probable one.

use super::{Candidates, Sampler};

/// ln `p`: a ratio of probabilities is a difference of logits.
pub struct MinP(f32);

impl MinP {
    /// `p` above 0, up to 1.
    pub fn new(p: f32) -> Self {
        MinP(p.ln())
    }
}

impl Sampler for MinP {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        candidates.keep_from(candidates.max() + self.0);
    }
}
