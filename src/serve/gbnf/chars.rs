//! Sets of characters, and the bytes that they begin with in UTF-8.

/// A set of Unicode scalar values: sorted ranges, both ends included, that neither overlap nor are adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CharSet(Vec<(u32, u32)>);

const LAST: u32 = char::MAX as u32;
/// Code points that are not characters.
const SURROGATES: (u32, u32) = (0xD800, 0xDFFF);

impl CharSet {
    /// All characters.
    pub fn all() -> Self {
        CharSet::of(vec![(0, LAST)])
    }

    /// One character.
    pub fn one(c: char) -> Self {
        CharSet(vec![(c as u32, c as u32)])
    }

    /// The characters of these ranges, which may overlap.
    pub fn of(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        let mut kept = Vec::with_capacity(merged.len() + 1);
        for (first, last) in merged {
            if first < SURROGATES.0 {
                kept.push((first, last.min(SURROGATES.0 - 1)));
            }
            if last > SURROGATES.1 {
                kept.push((first.max(SURROGATES.1 + 1), last.min(LAST)));
            }
        }
        CharSet(kept)
    }

    /// All other characters.
    pub fn complement(&self) -> Self {
        let mut ranges = Vec::with_capacity(self.0.len() + 1);
        let mut next = 0;
        for (first, last) in &self.0 {
            if next < *first {
                ranges.push((next, first - 1));
            }
            next = last + 1;
        }
        if next <= LAST {
            ranges.push((next, LAST));
        }
        CharSet::of(ranges)
    }

    /// Characters of either set.
    pub fn union(&self, other: &CharSet) -> Self {
        CharSet::of([&self.0[..], &other.0].concat())
    }

    /// Whether a character is in both.
    pub fn meets(&self, other: &CharSet) -> bool {
        let (mut i, mut j) = (0, 0);
        while let (Some(a), Some(b)) = (self.0.get(i), other.0.get(j)) {
            if a.0 <= b.1 && b.0 <= a.1 {
                return true;
            }
            match a.1 < b.1 {
                true => i += 1,
                false => j += 1,
            }
        }
        false
    }

    /// Whether there is no character in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, both ends included.
    pub fn ranges(&self) -> &[(u32, u32)] {
        &self.0
    }

    /// The character, if it is one.
    pub fn single(&self) -> Option<char> {
        match self.0[..] {
            [(first, last)] if first == last => char::from_u32(first),
            _ => None,
        }
    }

    /// The first bytes of its characters.
    pub fn lead_bytes(&self) -> Bytes {
        let mut bytes = Bytes::default();
        for (first, last) in &self.0 {
            // The first byte grows with the code point.
            for byte in lead(*first)..=lead(*last) {
                bytes.0[usize::from(byte) / 64] |= 1 << (byte % 64);
            }
        }
        bytes
    }
}

fn lead(code: u32) -> u8 {
    // `CharSet::of` keeps only scalar values.
    let c = char::from_u32(code).unwrap_or('\0');
    let mut buffer = [0; 4];
    c.encode_utf8(&mut buffer).as_bytes()[0]
}

/// A set of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([u64; 4]);

impl Bytes {
    /// All bytes.
    pub const ALL: Bytes = Bytes([u64::MAX; 4]);

    /// Adds the bytes of another set.
    pub fn add(&mut self, other: Bytes) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    /// Whether a byte is in both.
    pub fn meets(self, other: Bytes) -> bool {
        self.0.iter().zip(other.0).any(|(word, more)| word & more != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_what_their_characters_are() {
        let sets = [
            CharSet::all(),
            CharSet::default(),
            CharSet::one('\0'),
            CharSet::one(char::MAX),
            CharSet::of(vec![(0x61, 0x7A), (0x70, 0x80), (0x81, 0x90)]),
            CharSet::of(vec![(0xD000, 0xE001)]),
            CharSet::of(vec![(0x3B1, 0x3C9), (0x1F600, 0x1F64F), (0x30, 0x39)]),
        ];
        let has = |set: &CharSet, code: u32| set.ranges().iter().any(|(a, b)| (*a..=*b).contains(&code));
        let samples = [
            0, 0x2F, 0x35, 0x61, 0x7F, 0x8F, 0x91, 0x3B1, 0x3C9, 0x3CA, 0xD7FF, 0xE000, 0xE002, 0x1F601, LAST,
        ];
        for set in &sets {
            let complement = set.complement();
            assert_eq!(complement.complement(), *set);
            assert!(!set.meets(&complement));
            assert_eq!(set.union(&complement), CharSet::all());
            for code in samples {
                assert_ne!(has(set, code), has(&complement, code), "{code:x} of {set:?}");
            }
            assert!(!has(set, 0xD800) && !has(set, 0xDFFF));
        }
        for (a, b) in sets.iter().flat_map(|a| sets.iter().map(move |b| (a, b))) {
            let common = samples.iter().any(|code| has(a, *code) && has(b, *code));
            assert!(!common || a.meets(b), "{a:?} {b:?}");
        }
        assert!(!sets[4].meets(&sets[6]) && sets[4].meets(&CharSet::one('\u{90}')));
    }

    #[test]
    fn lead_bytes_are_those_of_utf8() {
        let greek = CharSet::of(vec![(0x3B1, 0x3C9)]).lead_bytes();
        assert!(greek.meets(CharSet::one('α').lead_bytes()) && greek.meets(CharSet::one('Ͽ').lead_bytes()));
        assert!(!greek.meets(CharSet::one('a').lead_bytes()) && !greek.meets(CharSet::one('я').lead_bytes()));
        assert!(CharSet::all().lead_bytes().meets(CharSet::one('😀').lead_bytes()));
        assert!(!CharSet::default().lead_bytes().meets(Bytes::ALL));
    }
}
