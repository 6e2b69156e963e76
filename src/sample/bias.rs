//! Logit bias: a number added to the logit of some tokens, before anything else. Minus infinity bans a token.

use super::{Candidates, Sampler};

pub struct LogitBias {
    /// Sorted by id.
    biases: Vec<(u32, f32)>,
}

impl LogitBias {
    /// The last of several biases for one token applies. NaN and plus infinity are not allowed.
    pub fn new(biases: &[(u32, f32)]) -> Self {
        let by_id: std::collections::BTreeMap<u32, f32> = biases.iter().copied().collect();
        LogitBias {
            biases: by_id.into_iter().collect(),
        }
    }

    fn of(&self, id: u32) -> Option<f32> {
        let at = self.biases.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        Some(self.biases[at].1)
    }
}

impl Sampler for LogitBias {
    fn apply(&mut self, candidates: &mut Candidates, _history: &[u32]) {
        // Bans first: if everything is banned, the most probable token by the model's own logits stays.
        if self.biases.iter().any(|(_, bias)| *bias == f32::NEG_INFINITY) {
            candidates.retain(|c| self.of(c.id) != Some(f32::NEG_INFINITY));
        }
        candidates.add(self.biases.iter().copied().filter(|(_, bias)| bias.is_finite()));
    }
}
