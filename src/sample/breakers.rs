//! Sequence breakers: tokens at which DRY stops matching, so that expected repetitions (turns of a chat template, list
//! markers) are allowed.
//!
//! A breaker is a sequence of tokens, kept as its first token, the *head*, and the rest, the *tail*. A breaker *string*
//! becomes many such sequences, because a tokenizer can split it into tokens in many ways: every token of the
//! vocabulary that contains the string is a head without a tail, and every token that ends with a prefix of it is a
//! head whose tail is the tokens of the rest, as in llama.cpp (`get_overlapping_token_sequences`).

use std::collections::HashMap;

/// Maximum length in bytes; longer strings are truncated, as in llama.cpp, at a character boundary.
const LONGEST_STRING: usize = 40;
/// Maximum tokens of a tail; the rest is ignored.
const LONGEST_TAIL: usize = 20;

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Breakers {
    heads: IdSet,
    /// Heads that are a complete breaker.
    single: IdSet,
    tails: HashMap<u32, Vec<Vec<u32>>>,
}

impl Breakers {
    /// Breakers given as token ids. Empty ones are ignored.
    pub fn from_ids<S: AsRef<[u32]>>(breakers: impl IntoIterator<Item = S>) -> Self {
        let mut out = Breakers::default();
        for breaker in breakers {
            out.add_ids(breaker.as_ref());
        }
        out
    }

    /// Adds one given as token ids.
    pub fn add_ids(&mut self, breaker: &[u32]) {
        if let Some((head, tail)) = breaker.split_first() {
            self.insert(*head, tail.to_vec());
        }
    }

    /// Adds the breakers of a string, and returns the number of heads (a token that can begin it in two ways counts
    /// twice). `token_bytes` are the bytes of every token by id, and `encode` gives the tokens of the rest of the
    /// string, which may begin inside a character. 0: the string cannot occur in text made of these tokens, or is
    /// empty.
    pub fn add_string<E>(
        &mut self,
        breaker: &str,
        token_bytes: &[Vec<u8>],
        mut encode: impl FnMut(&[u8]) -> Result<Vec<u32>, E>,
    ) -> Result<usize, E> {
        let breaker = &breaker.as_bytes()[..breaker.floor_char_boundary(LONGEST_STRING)];
        let Some(first) = breaker.first() else {
            return Ok(0);
        };
        let mut added = 0;
        // Many tokens have the same end, and encoding is slow.
        let mut tails: HashMap<usize, Vec<u32>> = HashMap::new();
        for (id, bytes) in token_bytes.iter().enumerate() {
            let id = id as u32;
            if bytes.windows(breaker.len()).any(|w| w == breaker) {
                self.insert(id, Vec::new());
                added += 1;
                continue;
            }
            for at in (0..bytes.len()).filter(|at| bytes[*at] == *first) {
                let overlap = bytes.len() - at;
                if !breaker.starts_with(&bytes[at..]) {
                    continue;
                }
                let tail = match tails.get(&overlap) {
                    Some(tail) => tail.clone(),
                    None => {
                        let mut tail = encode(&breaker[overlap..])?;
                        tail.truncate(LONGEST_TAIL);
                        tails.entry(overlap).or_insert(tail).clone()
                    }
                };
                self.insert(id, tail);
                added += 1;
            }
        }
        Ok(added)
    }

    fn insert(&mut self, head: u32, tail: Vec<u32>) {
        self.heads.insert(head);
        if tail.is_empty() {
            self.single.insert(head);
        }
        let tails = self.tails.entry(head).or_default();
        if !tails.contains(&tail) {
            tails.push(tail);
        }
    }

    /// Whether nothing breaks a repetition.
    pub fn is_empty(&self) -> bool {
        self.tails.is_empty()
    }

    /// Whether this token alone is a breaker.
    pub fn is_single(&self, id: u32) -> bool {
        self.single.contains(id)
    }

    /// Tokens at the end of `window` after the last breaker in it; all of them if there is none.
    pub fn free_suffix(&self, window: &[u32]) -> usize {
        if self.is_empty() {
            return window.len();
        }
        for (at, token) in window.iter().enumerate().rev() {
            if !self.heads.contains(*token) {
                continue;
            }
            let after = &window[at + 1..];
            let tails = self.tails.get(token).into_iter().flatten();
            if let Some(longest) = tails.filter(|t| after.starts_with(t)).map(Vec::len).max() {
                return after.len() - longest;
            }
        }
        window.len()
    }
}

/// A set of ids, as bits for usual sizes: queried once per token of the history.
#[derive(Clone, Debug, Default, PartialEq)]
struct IdSet {
    bits: Vec<u64>,
    large: Vec<u32>,
}

impl IdSet {
    const BITS: u32 = 1 << 22;

    fn insert(&mut self, id: u32) {
        if id >= Self::BITS {
            return self.large.push(id);
        }
        let word = id as usize / 64;
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        self.bits[word] |= 1 << (id % 64);
    }

    fn contains(&self, id: u32) -> bool {
        match self.bits.get(id as usize / 64) {
            Some(word) => word >> (id % 64) & 1 == 1,
            None => id >= Self::BITS && self.large.contains(&id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [&str; 10] = ["a", "b", "\n", "a\n", "\n\n", "User", ":", "x Us", "er", "er:"];

    fn token_bytes() -> Vec<Vec<u8>> {
        WORDS.iter().map(|w| w.as_bytes().to_vec()).collect()
    }

    /// Greedy longest match over [`WORDS`].
    fn encode(text: &[u8]) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let fits = |w: &&(usize, Vec<u8>)| rest.starts_with(&w.1);
            let words: Vec<(usize, Vec<u8>)> = token_bytes().into_iter().enumerate().collect();
            let (id, word) = words
                .iter()
                .filter(fits)
                .max_by_key(|w| w.1.len())
                .ok_or("unknown")?
                .clone();
            ids.push(id as u32);
            rest = &rest[word.len()..];
        }
        Ok(ids)
    }

    fn of(string: &str) -> (Breakers, usize) {
        let mut breakers = Breakers::default();
        let added = breakers.add_string(string, &token_bytes(), encode).unwrap();
        (breakers, added)
    }

    #[test]
    fn tokens_that_contain_the_string_break_alone() {
        let (breakers, added) = of("\n");
        assert_eq!(added, 3);
        let single: Vec<u32> = (0..10).filter(|id| breakers.is_single(*id)).collect();
        assert_eq!(single, [2, 3, 4]);
        assert_eq!(breakers.free_suffix(&[0, 3, 1, 1]), 2);
        assert_eq!(breakers.free_suffix(&[0, 1]), 2);
        assert_eq!(breakers.free_suffix(&[2]), 0);
        assert_eq!(breakers.free_suffix(&[]), 0);
    }

    #[test]
    fn tokens_that_end_with_a_beginning_need_the_tail() {
        // "User:" is User + ":", or "x Us" + "er:".
        let (breakers, added) = of("User:");
        assert_eq!(added, 2);
        assert_eq!(breakers.tails[&5], [vec![6]]);
        assert_eq!(breakers.tails[&7], [vec![9]]);
        assert!(!breakers.is_single(5));
        assert_eq!(breakers.free_suffix(&[5, 6, 0, 1]), 2);
        assert_eq!(breakers.free_suffix(&[5, 0, 6, 1]), 4);
        assert_eq!(breakers.free_suffix(&[0, 5]), 2);
        assert_eq!(breakers.free_suffix(&[0, 7, 9]), 0);
    }

    #[test]
    fn of_several_tails_the_longest_that_matches_counts() {
        let breakers = Breakers::from_ids([vec![1], vec![1, 2], vec![1, 2, 3], vec![1, 9, 9, 9]]);
        assert_eq!(breakers.free_suffix(&[0, 1, 2, 3, 4]), 1);
        assert_eq!(breakers.free_suffix(&[0, 1, 2, 4]), 1);
        assert_eq!(breakers.free_suffix(&[0, 1, 9, 9]), 2);
        assert!(breakers.is_single(1) && !breakers.is_single(2));
        let large = Breakers::from_ids([[u32::MAX]]);
        assert_eq!(large.free_suffix(&[u32::MAX, 5, u32::MAX - 1]), 2);
        assert!(Breakers::from_ids([[0u32; 0]]).is_empty());
    }

    #[test]
    fn strings_are_cut_and_what_cannot_occur_adds_nothing() {
        assert_eq!(of("").1, 0);
        assert_eq!(of("zzz").1, 0);
        // Forty times "a", whatever follows; a head leaves 39 of them, of which 20 are used.
        let (breakers, _) = of(&("a".repeat(40) + "zzz"));
        assert_eq!(breakers.tails[&0], [vec![0; 20]]);
        // 39 letters and a character of two bytes: cut before it.
        let (cut, _) = of(&("a".repeat(39) + "é"));
        assert_eq!(cut.tails[&0], [vec![0; 20]]);
    }
}
