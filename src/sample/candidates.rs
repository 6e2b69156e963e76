//! The tokens that may still be drawn, with their current logits. Every sampler rewrites this list.
//!
//! Logits and ids are separate vectors, so that passes over a whole vocabulary are passes over plain `f32`s; ids
//! are not stored until the first token is dropped. Every logit is finite, and the list is never empty.

use super::BadLogits;
use super::tally::Tally;
use super::vectors::{BLOCK, all_finite, block_with, compress_from, max, vectors};

/// A token that may still be drawn, with its current logit (natural-log scale, not normalized).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Candidates {
    logits: Vec<f32>,
    /// Ids of `logits`; empty while all tokens are candidates, in the order of ids.
    ids: Vec<u32>,
    vocabulary: usize,
    /// Buffer of [`Candidates::top`].
    keys: Vec<Key>,
}

/// The token with the largest logit of a row, the lowest id among equals: [`Candidates::best`] of a new row, without a
/// copy of it.
pub(super) fn best_of(logits: &[f32]) -> Result<u32, BadLogits> {
    are_finite(logits)?;
    let best = vectors(|| {
        let max = max(logits);
        let block = block_with(logits, 0, max)?;
        let start = block * BLOCK;
        let at = logits[start..].iter().position(|logit| *logit == max)?;
        Some(start + at)
    });
    Ok(best.expect("never empty, and the maximum is one of them") as u32)
}

/// Whether every logit of a row is finite, or some are minus infinity.
fn are_finite(logits: &[f32]) -> Result<bool, BadLogits> {
    if vectors(|| all_finite(logits)) && !logits.is_empty() {
        return Ok(true);
    }
    if let Some(id) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        let value = logits[id];
        return Err(BadLogits::NotFinite { id: id as u32, value });
    }
    match logits.iter().all(|l| *l == f32::NEG_INFINITY) {
        true => Err(BadLogits::Nothing),
        false => Ok(false),
    }
}

impl Candidates {
    /// Takes a new row of logits, `[vocabulary]`. Negative infinity is a probability of zero: such a token is not a
    /// candidate. NaN and positive infinity are refused.
    pub fn fill(&mut self, logits: &[f32]) -> Result<(), BadLogits> {
        self.ids.clear();
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.vocabulary = logits.len();
        if !are_finite(logits)? {
            self.retain(|c| c.logit != f32::NEG_INFINITY);
        }
        Ok(())
    }

    /// Tokens left; at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.logits.len()
    }
    /// Length of the row of logits this began with.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }
    /// The logits of all candidates, in the order of [`Candidates::get`].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
    /// One candidate; `index` is below [`Candidates::len`].
    pub fn get(&self, index: usize) -> Candidate {
        Candidate {
            id: self.id(index),
            logit: self.logits[index],
        }
    }
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Candidate> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    fn is_whole(&self) -> bool {
        self.ids.is_empty()
    }
    fn id(&self, index: usize) -> u32 {
        match self.is_whole() {
            true => index as u32,
            false => self.ids[index],
        }
    }

    /// The largest logit.
    pub fn max(&self) -> f32 {
        vectors(|| max(&self.logits))
    }

    /// The most probable candidate; the lowest id among equals.
    pub fn best(&self) -> Candidate {
        let max = self.max();
        let mut best: Option<u32> = None;
        let mut from = 0;
        while let Some(block) = vectors(|| block_with(&self.logits, from, max)) {
            let ids = self.block(block).filter(|c| c.logit == max).map(|c| c.id);
            best = ids.chain(best).min();
            from = block + 1;
        }
        let id = best.expect("never empty, and the maximum is one of them");
        Candidate { id, logit: max }
    }

    /// The candidates of a block.
    fn block(&self, block: usize) -> impl Iterator<Item = Candidate> + '_ {
        let start = block * BLOCK;
        (start..(start + BLOCK).min(self.len())).map(|i| self.get(i))
    }

    /// Rewrites every logit. Results that are not finite become the nearest finite number.
    pub fn map(&mut self, f: impl Fn(f32) -> f32) {
        for logit in &mut self.logits {
            *logit = finite(f(*logit));
        }
    }

    /// Rewrites the logits of tokens that are in the tally; `f` gets id, tallied value and logit. Results that are not
    /// finite become the nearest finite number. While no candidate was dropped, it visits only the tallied tokens.
    pub fn rewrite(&mut self, tally: &Tally, mut f: impl FnMut(u32, u32, f32) -> f32) {
        if self.is_whole() {
            for (id, value) in tally.iter() {
                if let Some(logit) = self.logits.get_mut(id as usize) {
                    *logit = finite(f(id, value, *logit));
                }
            }
            return;
        }
        for (id, logit) in self.ids.iter().zip(&mut self.logits) {
            if let Some(value) = tally.get(*id) {
                *logit = finite(f(*id, value, *logit));
            }
        }
    }

    /// Adds to the logits of some tokens, unique and sorted by id. Results that are not finite become the nearest
    /// finite number.
    pub fn add(&mut self, amounts: impl Iterator<Item = (u32, f32)>) {
        if self.is_whole() {
            for (id, amount) in amounts {
                if let Some(logit) = self.logits.get_mut(id as usize) {
                    *logit = finite(*logit + amount);
                }
            }
            return;
        }
        let amounts: Vec<(u32, f32)> = amounts.collect();
        for (id, logit) in self.ids.iter().zip(&mut self.logits) {
            if let Ok(at) = amounts.binary_search_by_key(id, |(id, _)| *id) {
                *logit = finite(*logit + amounts[at].1);
            }
        }
    }

    /// Keeps the candidates for which `keep` is true; if there is none, the most probable one stays.
    pub fn retain(&mut self, keep: impl Fn(Candidate) -> bool) {
        self.retain_indexed(|_, candidate| keep(candidate));
    }

    /// Like [`Candidates::retain`], with the current index of a candidate.
    pub fn retain_indexed(&mut self, keep: impl Fn(usize, Candidate) -> bool) {
        // Found first, because the list is overwritten from the start; needed only if nothing else is kept.
        let mut kept = 0;
        let mut ids = std::mem::take(&mut self.ids);
        let whole = ids.is_empty();
        let first = (0..self.len()).find(|i| {
            let id = if whole { *i as u32 } else { ids[*i] };
            keep(
                *i,
                Candidate {
                    id,
                    logit: self.logits[*i],
                },
            )
        });
        let Some(first) = first else {
            self.ids = ids;
            let best = self.best();
            return self.keep_only(best);
        };
        if whole {
            ids.reserve(self.len());
        }
        for i in first..self.len() {
            let id = if whole { i as u32 } else { ids[i] };
            let logit = self.logits[i];
            if keep(i, Candidate { id, logit }) {
                self.logits[kept] = logit;
                if whole {
                    ids.push(id);
                } else {
                    ids[kept] = id;
                }
                kept += 1;
            }
        }
        self.logits.truncate(kept);
        ids.truncate(kept);
        self.ids = ids;
    }

    /// Keeps logits of at least `floor`, or the most probable candidate if there is none.
    pub fn keep_from(&mut self, floor: f32) {
        if !self.is_whole() {
            return self.retain(|c| c.logit >= floor);
        }
        if vectors(|| block_with(&self.logits, 0, floor)).is_none() {
            let best = self.best();
            return self.keep_only(best);
        }
        vectors(|| compress_from(&mut self.logits, &mut self.ids, floor));
    }

    fn keep_only(&mut self, candidate: Candidate) {
        self.logits.clear();
        self.logits.push(candidate.logit);
        self.ids.clear();
        self.ids.push(candidate.id);
    }

    /// The `k` most probable candidates, in descending order; the lower id first among equals. All of them if there are
    /// fewer.
    pub fn top(&mut self, k: usize) -> impl ExactSizeIterator<Item = Candidate> + '_ {
        self.collect_top(k);
        self.keys.iter().map(|key| key.candidate())
    }

    /// Keeps the first `n` (at least 1) candidates of the last [`Candidates::top`], in that order. Nothing may have
    /// changed in between.
    pub fn keep_top(&mut self, n: usize) {
        debug_assert!(n >= 1);
        self.keys.truncate(n.max(1));
        self.logits.clear();
        self.ids.clear();
        self.logits.extend(self.keys.iter().map(|key| key.candidate().logit));
        self.ids.extend(self.keys.iter().map(|key| key.candidate().id));
    }

    fn collect_top(&mut self, k: usize) {
        let k = k.clamp(1, self.len());
        // Space for candidates before the best k are selected again, which amortizes the selection.
        let room = (4 * k).max(1024);
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        let mut floor = Key(0);
        let mut floor_logit = f32::MIN;
        let mut from = 0;
        while let Some(block) = vectors(|| block_with(&self.logits, from, floor_logit)) {
            from = block + 1;
            let found = self.block(block).filter(|c| c.logit >= floor_logit);
            keys.extend(found.map(|c| Key::new(c.id, c.logit)).filter(|key| *key > floor));
            if keys.len() >= room {
                keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
                keys.truncate(k);
                floor = keys[k - 1];
                floor_logit = floor.candidate().logit;
            }
        }
        if k < keys.len() {
            keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            keys.truncate(k);
        }
        keys.sort_unstable_by(|a, b| b.cmp(a));
        self.keys = keys;
    }
}

fn finite(logit: f32) -> f32 {
    match logit.is_nan() {
        // An infinite bonus minus an infinite penalty: invalid settings must not make a token more likely.
        true => f32::MIN,
        false => logit.clamp(f32::MIN, f32::MAX),
    }
}

/// A candidate as one integer that sorts by logit, and by lower id among equal logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    fn new(id: u32, logit: f32) -> Self {
        // Adding zero makes −0 a 0: equal logits must have equal bits. Then the usual order-preserving map of a float's
        // bits: flip all of a negative number's, and the sign of the others.
        let bits = (logit + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Key(u64::from(ordered) << 32 | u64::from(!id))
    }

    fn candidate(self) -> Candidate {
        let ordered = (self.0 >> 32) as u32;
        let bits = if ordered >> 31 == 1 {
            ordered & !(1 << 31)
        } else {
            !ordered
        };
        Candidate {
            id: !(self.0 as u32),
            logit: f32::from_bits(bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::default();
        candidates.fill(logits).unwrap();
        candidates
    }

    fn ids(candidates: &Candidates) -> Vec<u32> {
        candidates.iter().map(|c| c.id).collect()
    }

    fn waves(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) * 0.01).collect()
    }

    #[test]
    fn top_is_what_sorting_gives() {
        for n in [1, 2, 15, 16, 17, 1000, 5000] {
            for (name, logits) in [
                ("waves", waves(n)),
                ("rising", (0..n).map(|i| i as f32 - 3.0).collect()),
                ("falling", (0..n).map(|i| -(i as f32)).collect()),
                ("equal", vec![0.5; n]),
            ] {
                let mut sorted: Vec<u32> = (0..n as u32).collect();
                sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
                for k in [1, 3, 40, n] {
                    let mut candidates = filled(&logits);
                    let top: Vec<u32> = candidates.top(k).map(|c| c.id).collect();
                    assert_eq!(top, sorted[..k.min(n)], "{name} {n} {k}");
                    candidates.keep_top(2);
                    assert_eq!(ids(&candidates), sorted[..2.min(k).min(n)]);
                }
            }
        }
    }

    #[test]
    fn keys_hold_the_candidate() {
        for logit in [0.0, -0.0, 1.5, -1.5, f32::MIN, f32::MAX, 1e-40, -1e-40] {
            for id in [0, 1, u32::MAX] {
                assert_eq!(Key::new(id, logit).candidate(), Candidate { id, logit });
            }
        }
        assert_eq!(Key::new(3, 0.0), Key::new(3, -0.0));
    }

    #[test]
    fn filters_keep_at_least_the_best() {
        let logits = waves(100);
        for first in [false, true] {
            let mut candidates = filled(&logits);
            if first {
                candidates.retain(|c| c.id % 2 == 0);
            }
            let best = candidates.best();
            let mut other = filled(&logits);
            candidates.keep_from(1e9);
            assert_eq!(candidates.iter().collect::<Vec<_>>(), [best]);
            other.retain(|_| false);
            assert_eq!(other.len(), 1);
        }
        let mut candidates = filled(&logits);
        candidates.keep_from(0.0);
        let expected: Vec<u32> = (0..100).filter(|i| logits[*i as usize] >= 0.0).collect();
        assert_eq!(ids(&candidates), expected);
        candidates.retain(|c| c.id < 50);
        assert!(candidates.iter().all(|c| c.id < 50 && c.logit == logits[c.id as usize]));
    }

    #[test]
    fn what_is_no_number_is_refused_and_minus_infinity_is_no_candidate() {
        let mut candidates = Candidates::default();
        let nan = candidates.fill(&[0.0, f32::NAN]).unwrap_err();
        assert_eq!(nan.to_string(), "the logit of token 1 is NaN");
        let infinite = candidates.fill(&[0.0, f32::NEG_INFINITY, f32::INFINITY]).unwrap_err();
        assert_eq!(infinite.to_string(), "the logit of token 2 is inf");
        for nothing in [&[][..], &[f32::NEG_INFINITY; 20]] {
            assert_eq!(candidates.fill(nothing), Err(BadLogits::Nothing));
        }
        candidates.fill(&[1.0, f32::NEG_INFINITY, 3.0]).unwrap();
        assert_eq!(ids(&candidates), [0, 2]);
        assert_eq!(candidates.vocabulary(), 3);
    }
}
