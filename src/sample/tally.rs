//! A number for some of the tokens: a table over ids, and the list of those that have one.
//!
//! Clearing takes time for the entries written, not for the size of the table; a lookup is one load. Ids beyond the vocabulary are
//! ignored: they have no logit.

/// See the module's head.
#[derive(Debug, Default)]
pub struct Tally {
    /// By id; `u32::MAX` where there is none.
    values: Vec<u32>,
    tallied: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Tally {
    /// Clears everything; ids below `vocabulary` can be tallied from now on.
    pub fn clear(&mut self, vocabulary: usize) {
        for id in self.tallied.drain(..) {
            self.values[id as usize] = NONE;
        }
        self.values.resize(vocabulary, NONE);
    }

    pub fn get(&self, id: u32) -> Option<u32> {
        self.values.get(id as usize).copied().filter(|v| *v != NONE)
    }

    /// Counts this token once more.
    pub fn count(&mut self, id: u32) {
        let Some(slot) = self.values.get_mut(id as usize) else {
            return;
        };
        if *slot == NONE {
            self.tallied.push(id);
            *slot = 0;
        }
        *slot += 1;
    }

    /// Sets the larger of `value` and the token's value.
    pub fn raise(&mut self, id: u32, value: u32) {
        let Some(slot) = self.values.get_mut(id as usize) else {
            return;
        };
        if *slot == NONE {
            self.tallied.push(id);
            *slot = value;
        } else if *slot < value {
            // Written only if it changes: in a history of one repeated token each write would wait for the previous
            // one.
            *slot = value;
        }
    }

    /// Ids and their values, in the order they came in first.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.tallied.iter().map(|id| (*id, self.values[*id as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_raises_and_forgets() {
        let mut tally = Tally::default();
        tally.clear(10);
        for id in [3, 9, 3, 10, u32::MAX] {
            tally.count(id);
        }
        tally.raise(9, 7);
        tally.raise(9, 2);
        tally.raise(0, 0);
        assert_eq!(tally.iter().collect::<Vec<_>>(), [(3, 2), (9, 7), (0, 0)]);
        assert_eq!((tally.get(0), tally.get(1), tally.get(10)), (Some(0), None, None));
        tally.clear(4);
        assert_eq!((tally.iter().count(), tally.get(3)), (0, None));
    }
}
