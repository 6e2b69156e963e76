//! Terminals as automata over characters, and the overlap of two of them.

use std::collections::{HashMap, HashSet};

use super::chars::{Bytes, CharSet};
use super::regular::{Id, Regular, Regulars};

/// Maximum states of a terminal that is compared with others. A larger one is split.
const MOST_STATES: usize = 5000;
/// Maximum transitions between those states.
const MOST_STEPS: usize = 200_000;
/// Maximum pairs of states that are examined. Beyond that, terminals count as conflicting.
const MOST_PAIRS: usize = 2_000_000;

/// The states of a terminal: its characters (Glushkov's construction).
#[derive(Default)]
struct Automaton {
    chars: Vec<CharSet>,
    first: Vec<u32>,
    next: Vec<Vec<u32>>,
    /// The total size of `next`.
    steps: usize,
    ends: Vec<bool>,
    /// First bytes of its texts.
    lead: Bytes,
    is_too_large: bool,
}

/// The overlap of two terminals.
#[derive(Clone, Copy)]
pub struct Common {
    /// Whether they share a text.
    pub is_common: bool,
    /// Bytes that continue a text of the first one in the second one.
    pub more: Bytes,
}

/// The automata of a grammar's terminals, and results for pairs of them.
pub struct Automata {
    all: HashMap<Id, Automaton>,
    compared: HashMap<(Id, Id), Common>,
    /// Remaining budget of pairs.
    pairs: usize,
}

impl Default for Automata {
    fn default() -> Self {
        Automata {
            all: HashMap::new(),
            compared: HashMap::new(),
            pairs: MOST_PAIRS,
        }
    }
}

impl Automata {
    /// First bytes of a terminal's texts.
    pub fn lead(&mut self, id: Id, regulars: &Regulars) -> Bytes {
        self.get(id, regulars).lead
    }

    fn get(&mut self, id: Id, regulars: &Regulars) -> &Automaton {
        self.all.entry(id).or_insert_with(|| Automaton::of(id, regulars))
    }

    /// The overlap of two terminals. If that is too much work, everything overlaps.
    pub fn compare(&mut self, a: Id, b: Id, regulars: &Regulars) -> Common {
        if let Some(common) = self.compared.get(&(a, b)) {
            return *common;
        }
        self.get(a, regulars);
        self.get(b, regulars);
        let (one, other) = (&self.all[&a], &self.all[&b]);
        let common = match one.is_too_large || other.is_too_large {
            true => None,
            false => one.compare(other, &mut self.pairs),
        };
        let common = common.unwrap_or(Common {
            is_common: true,
            more: Bytes::ALL,
        });
        self.compared.insert((a, b), common);
        common
    }
}

/// A part of an automaton: its first and last states.
struct Part {
    first: Vec<u32>,
    last: Vec<u32>,
    is_nullable: bool,
}

impl Automaton {
    fn of(id: Id, regulars: &Regulars) -> Self {
        let mut made = Automaton::default();
        let part = made.part(id, regulars);
        made.ends = vec![false; made.chars.len()];
        for state in part.last {
            made.ends[state as usize] = true;
        }
        for state in &part.first {
            made.lead.add(made.chars[*state as usize].lead_bytes());
        }
        made.first = part.first;
        for next in &mut made.next {
            next.sort_unstable();
            next.dedup();
        }
        if made.is_too_large {
            made.lead = Bytes::ALL;
        }
        made
    }

    fn part(&mut self, id: Id, regulars: &Regulars) -> Part {
        if self.is_too_large || self.chars.len() > MOST_STATES {
            self.is_too_large = true;
            return Part::empty();
        }
        match regulars.get(id) {
            Regular::Chars(set) => {
                let state = self.chars.len() as u32;
                self.chars.push(set.clone());
                self.next.push(Vec::new());
                Part {
                    first: vec![state],
                    last: vec![state],
                    is_nullable: false,
                }
            }
            Regular::Seq(parts) => {
                let mut whole = Part::empty();
                for part in parts.iter().rev() {
                    let part = self.part(*part, regulars);
                    whole = self.join(part, whole);
                }
                whole
            }
            Regular::Any(parts) => {
                let mut whole = Part {
                    is_nullable: false,
                    ..Part::empty()
                };
                for part in parts {
                    let part = self.part(*part, regulars);
                    whole.first.extend(part.first);
                    whole.last.extend(part.last);
                    whole.is_nullable |= part.is_nullable;
                }
                whole
            }
            Regular::Repeat(id, least, most) => {
                let mut whole = Part::empty();
                match most {
                    None => {
                        whole = self.part(*id, regulars);
                        self.link(&whole.last, &whole.first);
                        whole.is_nullable |= *least == 0;
                    }
                    // x{0,3} is (x (x x?)?)?.
                    Some(most) => {
                        for _ in *least..*most {
                            let part = self.part(*id, regulars);
                            whole = self.join(part, whole);
                            whole.is_nullable = true;
                        }
                    }
                }
                let again = match most {
                    None => least.saturating_sub(1),
                    Some(_) => *least,
                };
                for _ in 0..again {
                    let part = self.part(*id, regulars);
                    whole = self.join(part, whole);
                }
                whole
            }
        }
    }

    fn link(&mut self, from: &[u32], to: &[u32]) {
        // Repeated large alternatives: each state is followed by each.
        self.steps = self.steps.saturating_add(from.len() * to.len());
        if self.steps > MOST_STEPS {
            self.is_too_large = true;
            return;
        }
        for state in from {
            self.next[*state as usize].extend(to);
        }
    }

    fn join(&mut self, mut a: Part, mut b: Part) -> Part {
        self.link(&a.last, &b.first);
        if a.is_nullable {
            a.first.append(&mut b.first);
        }
        if b.is_nullable {
            // The longer list is reused: repeated optional parts have long lists of last states.
            match a.last.len() < b.last.len() {
                true => b.last.append(&mut a.last),
                false => {
                    a.last.append(&mut b.last);
                    b.last = a.last;
                }
            }
        }
        Part {
            first: a.first,
            last: b.last,
            is_nullable: a.is_nullable && b.is_nullable,
        }
    }

    /// Follows both with all texts. `None`: the `budget` is exhausted.
    fn compare(&self, other: &Automaton, budget: &mut usize) -> Option<Common> {
        let mut common = Common {
            is_common: false,
            more: Bytes::default(),
        };
        let mut seen = HashSet::new();
        let mut new = Vec::new();
        let mut pairs = |a: &[u32], b: &[u32], new: &mut Vec<(u32, u32)>, budget: &mut usize| {
            for one in a {
                for two in b {
                    *budget = budget.checked_sub(1)?;
                    if self.chars[*one as usize].meets(&other.chars[*two as usize]) && seen.insert((*one, *two)) {
                        new.push((*one, *two));
                    }
                }
            }
            Some(())
        };
        pairs(&self.first, &other.first, &mut new, budget)?;
        while let Some((one, two)) = new.pop() {
            let next = &other.next[two as usize];
            if self.ends[one as usize] {
                common.is_common |= other.ends[two as usize];
                for state in next {
                    common.more.add(other.chars[*state as usize].lead_bytes());
                }
            }
            pairs(&self.next[one as usize], next, &mut new, budget)?;
        }
        Some(common)
    }
}

impl Part {
    fn empty() -> Part {
        Part {
            first: Vec::new(),
            last: Vec::new(),
            is_nullable: true,
        }
    }
}
