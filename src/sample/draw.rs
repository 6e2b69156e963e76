//! The end of every chain: the largest logit, or a seeded draw from the softmax of the candidates.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::Candidates;
use super::softmax::{Weighed, weigh};

/// See the module's head.
pub enum Draw {
    /// The largest logit.
    Greedy,
    /// ChaCha8 is specified bit for bit, so a seed gives the same numbers on every machine and in every version.
    Seeded(Box<ChaCha8Rng>),
}

/// A token drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Token id.
    pub id: u32,
    /// Its probability among the remaining candidates.
    pub probability: f64,
}

/// Independent random numbers of one seed: the draw's own.
pub const DRAW_STREAM: u64 = 0;
/// Those of XTC.
pub const XTC_STREAM: u64 = 1;

pub fn rng(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// Moves to the number that [`uniform`] returns after `position` others; each is two words.
pub fn move_to(rng: &mut ChaCha8Rng, position: usize) {
    rng.set_word_pos(2 * position as u128);
}

/// In [0, 1), from 53 random bits: every double on an even grid.
pub fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

impl Draw {
    /// The largest logit, the lowest id of equals.
    pub fn greedy() -> Self {
        Draw::Greedy
    }
    /// A draw from the softmax.
    pub fn seeded(seed: u64) -> Self {
        Draw::Seeded(Box::new(rng(seed, DRAW_STREAM)))
    }

    /// Moves to the random number of a position.
    pub fn move_to(&mut self, position: usize) {
        if let Draw::Seeded(rng) = self {
            move_to(rng, position);
        }
    }

    /// The token drawn. Among equal logits, greedy takes the lowest id. `weights` is a buffer.
    pub fn pick(&mut self, candidates: &Candidates, weights: &mut Vec<f32>) -> Drawn {
        let Draw::Seeded(rng) = self else {
            return Drawn {
                id: candidates.best().id,
                probability: 1.0,
            };
        };
        let Weighed { total, .. } = weigh(candidates.logits(), candidates.max(), weights);
        let mut left = uniform(rng) * total;
        let mut at = None;
        for (i, weight) in weights.iter().enumerate() {
            // A weight of zero cannot be drawn, regardless of rounding.
            if *weight > 0.0 {
                at = Some(i);
                left -= f64::from(*weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        let at = at.expect("the largest logit weighs 1");
        Drawn {
            id: candidates.get(at).id,
            probability: f64::from(weights[at]) / total,
        }
    }
}
