//! Top-k (Fan et al., 2018): keeps the `k` most probable candidates.

use super::{Candidates, Sampler};

pub struct TopK(usize);

impl TopK {
    /// `k` of at least 1.
    pub fn new(k: usize) -> Self {
        TopK(k)
    }
}

impl Sampler for TopK {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        if self.0 < candidates.len() {
            let kept = candidates.top(self.0).len();
            candidates.keep_top(kept);
        }
    }
}
