//! The end of every chain: the largest logit, or a seeded draw from the softmax of what is left.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::Candidate;

pub enum Draw {
    Greedy,
    /// ChaCha8 is specified bit for bit, so a seed means the same on every machine and in every version.
    Seeded(Box<ChaCha8Rng>),
}

impl Draw {
    pub fn greedy() -> Self {
        Draw::Greedy
    }
    pub fn seeded(seed: u64) -> Self {
        Draw::Seeded(Box::new(ChaCha8Rng::seed_from_u64(seed)))
    }

    /// The id drawn. Of equal logits, greedy takes the one that comes first. `candidates` is not empty.
    pub fn pick(&mut self, candidates: &[Candidate]) -> u32 {
        let mut best = candidates[0];
        for candidate in &candidates[1..] {
            if candidate.logit > best.logit {
                best = *candidate;
            }
        }
        let Draw::Seeded(rng) = self else {
            return best.id;
        };
        let weight = |c: &Candidate| f64::from(c.logit - best.logit).exp();
        let total: f64 = candidates.iter().map(weight).sum();
        // 53 random bits: every double in [0, 1) on an even grid.
        let uniform = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for candidate in candidates {
            left -= weight(candidate);
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding can leave a sliver above zero.
        best.id
    }
}
