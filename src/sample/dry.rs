//! DRY, "don't repeat yourself" (p-e-w, text-generation-webui PR 5677), with the semantics of llama.cpp.
//!
//! If the last `n` tokens occurred before, the token that followed them would continue the repetition: its
//! logit loses `multiplier * base^(n - allowed_length)`, from `n = allowed_length` on, for the longest such `n`. Matches
//! do not reach back over a sequence breaker ([`Breakers`]). The lengths come from the Z-algorithm over the reversed
//! window (D. Gusfield, *Algorithms on Strings, Trees and Sequences*, 1.3), whose time is linear for every input.

use std::sync::Arc;

use super::breakers::Breakers;
use super::tally::Tally;
use super::{Candidates, Sampler, window};

/// The settings of DRY.
#[derive(Clone, Debug, PartialEq)]
pub struct DrySettings {
    /// 0 is off; 0.8 is the usual advice.
    pub multiplier: f32,
    /// Below 1 is off.
    pub base: f32,
    /// Shorter repetitions have no penalty.
    pub allowed_length: usize,
    /// Number of last tokens that are searched; `None`: all. 0 is off.
    pub penalty_last_n: Option<usize>,
    /// Tokens that end a repetition.
    pub breakers: Arc<Breakers>,
}

impl Default for DrySettings {
    /// Off. Breakers depend on the tokenizer: see [`super::DEFAULT_BREAKERS`].
    fn default() -> Self {
        DrySettings {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            penalty_last_n: None,
            breakers: Arc::default(),
        }
    }
}

impl DrySettings {
    /// Whether it changes anything.
    pub fn is_on(&self) -> bool {
        self.multiplier != 0.0 && self.base >= 1.0 && self.penalty_last_n != Some(0)
    }

    /// The largest exponent whose power is finite; `None` if no power of the base can be too large.
    fn largest_exponent(&self) -> Option<u32> {
        /// ln of the largest f32, as in llama.cpp.
        const LN_MAX: f32 = 88.722_84;
        (self.base > 1.000_001).then(|| (LN_MAX / self.base.ln()) as u32)
    }

    /// The penalty of a repetition that is `excess` tokens longer than the allowed length.
    fn penalty(&self, excess: u32) -> f32 {
        // As in llama.cpp, a base whose first power is already infinite is not clamped.
        let exponent = match self.largest_exponent() {
            Some(largest) if largest > 0 => excess.min(largest),
            _ => excess,
        };
        self.multiplier * self.base.powf(exponent as f32)
    }
}

/// See the module's head.
pub struct Dry {
    settings: DrySettings,
    /// Penalties of the shortest repetitions, by excess: computing a power costs more than everything else per token.
    penalties: Vec<f32>,
    matches: Vec<u32>,
    /// The longest repetition that each token would continue.
    longest: Tally,
}

impl Dry {
    /// A sampler with these settings.
    pub fn new(settings: DrySettings) -> Self {
        Dry {
            penalties: (0..256).map(|excess| settings.penalty(excess)).collect(),
            settings,
            matches: Vec::new(),
            longest: Tally::default(),
        }
    }

    /// Fills `self.longest` for tokens below `vocabulary`.
    fn measure(&mut self, history: &[u32], vocabulary: usize) {
        self.longest.clear(vocabulary);
        let settings = &self.settings;
        let window = window(history, settings.penalty_last_n);
        if window.len() <= settings.allowed_length {
            return;
        }
        let limit = settings.breakers.free_suffix(window);
        if limit < settings.allowed_length {
            return;
        }
        suffix_matches(window, limit, &mut self.matches);
        // The match that ends `k` tokens before the end was followed by the token after it.
        let followers = window.iter().rev();
        for (length, follower) in self.matches[1..].iter().zip(followers) {
            if *length as usize >= settings.allowed_length {
                self.longest.raise(*follower, *length);
            }
        }
    }
}

impl Sampler for Dry {
    fn apply(&mut self, candidates: &mut Candidates, history: &[u32]) {
        if !self.settings.is_on() {
            return;
        }
        self.measure(history, candidates.vocabulary());
        let settings = &self.settings;
        let allowed = settings.allowed_length as u32;
        candidates.rewrite(&self.longest, |id, length, logit| {
            if settings.breakers.is_single(id) {
                return logit;
            }
            let excess = length - allowed;
            let known = self.penalties.get(excess as usize).copied();
            logit - known.unwrap_or_else(|| settings.penalty(excess))
        });
    }
}

/// `matches[k]`: how many of the last tokens, at most `limit`, also precede the last `k`: the Z-function of the
/// reversed window. `matches[0]` is unused.
fn suffix_matches(window: &[u32], limit: usize, matches: &mut Vec<u32>) {
    let n = window.len();
    matches.clear();
    matches.resize(n, 0);
    // The match that reaches furthest back so far: it begins `start` before the end and is known up to `end`.
    let (mut start, mut end) = (0, 0);
    let newest = window[n - 1];
    for k in 1..n {
        // By far the most common case, and the only one that matters for speed in ordinary text.
        if k >= end && window[n - 1 - k] != newest {
            continue;
        }
        let most = limit.min(n - k);
        let mut length = match k < end {
            true => (matches[k - start] as usize).min(end - k),
            false => 0,
        };
        // Only tokens beyond `end` are compared, and every match moves `end`: linear overall.
        if k + length >= end && length < most {
            let (new, old) = (&window[..n - length], &window[..n - k - length]);
            let pairs = new.iter().rev().zip(old.iter().rev()).take(most - length);
            length += pairs.take_while(|(new, old)| new == old).count();
            if k + length > end {
                (start, end) = (k, k + length);
            }
        }
        matches[k] = length as u32;
    }
}

#[cfg(test)]
#[path = "dry_tests.rs"]
mod tests;
