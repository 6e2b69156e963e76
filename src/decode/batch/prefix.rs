//! Which prefix of a prompt is in a cache, and the caches of finished sequences.

/// A cache and the tokens in it.
pub(super) struct Cached {
    pub slot: usize,
    pub capacity: usize,
    /// Every token fed.
    pub tokens: Vec<u32>,
    /// Leading tokens that were computed as whole chunks of a prompt.
    pub exact: usize,
    /// How they were computed.
    pub computed: Computed,
}

/// What determines how a prompt's tokens are computed, besides the tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Computed {
    /// As a run beyond the switch of rotary tables.
    pub is_long: bool,
    /// At this capacity; 0 if the capacity does not matter.
    pub capacity: usize,
}

impl Cached {
    /// Leading tokens that a prompt can reuse, a multiple of the chunk.
    pub fn common(&self, prompt: &[u32], computed: Computed, chunk: usize) -> usize {
        if self.computed != computed {
            return 0;
        }
        let pairs = self.tokens[..self.exact].iter().zip(prompt);
        let shared = pairs.take_while(|(a, b)| a == b).count();
        shared / chunk * chunk
    }

    fn begins_with(&self, other: &Cached) -> bool {
        self.computed == other.computed && self.tokens.starts_with(&other.tokens)
    }
}

/// Caches of finished sequences, the most recently used last. Their tokens are exact.
#[derive(Default)]
pub(super) struct Kept(Vec<Cached>);

impl Kept {
    pub fn iter(&self) -> impl Iterator<Item = &Cached> {
        self.0.iter()
    }

    /// Notes that the first `shared` tokens of a slot were copied. If it has no others, removes it and returns true:
    /// the caller must close it.
    pub fn used(&mut self, slot: usize, shared: usize) -> bool {
        let Some(at) = self.0.iter().position(|cached| cached.slot == slot) else {
            return false;
        };
        let cached = self.0.remove(at);
        let all = cached.exact == shared;
        if !all {
            self.0.push(cached);
        }
        all
    }

    /// Keeps one more, up to `most`. Returns the slots to close: the oldest, those of its prefixes, or its own if
    /// another has the same tokens.
    pub fn add(&mut self, cached: Cached, most: usize) -> Vec<usize> {
        if let Some(at) = self.0.iter().position(|other| other.begins_with(&cached)) {
            let other = self.0.remove(at);
            self.0.push(other);
            return vec![cached.slot];
        }
        let all = std::mem::take(&mut self.0).into_iter();
        let (covered, others): (Vec<Cached>, Vec<Cached>) = all.partition(|other| cached.begins_with(other));
        self.0 = others;
        let mut closed: Vec<usize> = covered.into_iter().map(|other| other.slot).collect();
        self.0.push(cached);
        let beyond = self.0.len().saturating_sub(most);
        closed.extend(self.0.drain(..beyond).map(|cached| cached.slot));
        closed
    }

    /// Removes the least recently used one other than `besides`; returns its slot.
    pub fn remove_oldest(&mut self, besides: Option<usize>) -> Option<usize> {
        let at = self.0.iter().position(|cached| Some(cached.slot) != besides)?;
        Some(self.0.remove(at).slot)
    }
}
