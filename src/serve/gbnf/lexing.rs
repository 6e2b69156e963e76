//! Terminals that llguidance's lexer handles correctly.
//!
//! The lexer follows all terminals that the parser allows, takes the longest text that is one of them, and never
//! backtracks. It passes to the parser all terminals that match that text. So it fails exactly where a terminal has
//! ended for the grammar but continues for the lexer: where `p` and `q` are allowed together, `w` is a text of `p`, a
//! byte `b` may come after `p`, and `wb` begins a text of `q`. [`plan`] splits such a `q` until there is none. A
//! terminal of one character is never such a `q`, so this terminates.

use std::collections::HashSet;

use super::Grammar;
use super::automaton::Automata;
use super::chars::Bytes;
use super::plan::{Node, Place, Plan, cut};
use super::regular::{Id, Regular, Regulars};

/// Maximum rounds of splitting. After them everything is split.
const ROUNDS: usize = 40;
/// Maximum occurrences of terminals that are compared. With more, everything is split.
const MOST_PLACES: usize = 1000;

/// Cuts a grammar into terminals that the lexer handles correctly.
pub fn plan(grammar: &Grammar, known: &[Option<Id>], regulars: &mut Regulars) -> Plan {
    let mut split = HashSet::new();
    let mut automata = Automata::default();
    for _ in 0..ROUNDS {
        let plan = cut(grammar, known, regulars, Some(&split));
        if plan.places.len() > MOST_PLACES {
            break;
        }
        let before = split.len();
        split.extend(too_long(&plan, regulars, &mut automata));
        if split.len() == before {
            return plan;
        }
    }
    cut(grammar, known, regulars, None)
}

/// Terminals that the lexer would continue where another one has ended.
fn too_long(plan: &Plan, regulars: &Regulars, automata: &mut Automata) -> HashSet<Id> {
    let next = Following::of(plan);
    let ids: Vec<Option<Id>> = plan
        .places
        .iter()
        .map(|place| match place {
            Place::Terminal(id) => Some(*id),
            Place::Token => None,
        })
        .collect();
    let lead: Vec<Bytes> = ids
        .iter()
        .map(|id| id.map_or(Bytes::default(), |id| automata.lead(id, regulars)))
        .collect();
    let after: Vec<Bytes> = next
        .after
        .iter()
        .map(|places| {
            let mut bytes = Bytes::default();
            places.each(|place| bytes.add(lead[place]));
            bytes
        })
        .collect();
    let mut found = HashSet::new();
    for (p, q) in next.together(plan, regulars, automata) {
        let (Some(p_id), Some(q_id)) = (ids[p], ids[q]) else {
            continue;
        };
        for ((place, id), other) in [((p, p_id), q_id), ((q, q_id), p_id)] {
            let is_one_character = matches!(regulars.get(other), Regular::Chars(_));
            if !is_one_character && automata.compare(id, other, regulars).more.meets(after[place]) {
                found.insert(other);
            }
        }
    }
    found
}

/// A set of occurrences.
#[derive(Clone, Default, PartialEq)]
struct Places(Vec<u64>);

impl Places {
    fn insert(&mut self, place: usize) {
        if self.0.len() <= place / 64 {
            self.0.resize(place / 64 + 1, 0);
        }
        self.0[place / 64] |= 1 << (place % 64);
    }

    fn has(&self, place: usize) -> bool {
        self.0
            .get(place / 64)
            .is_some_and(|word| word & (1 << (place % 64)) != 0)
    }

    /// Returns true if one is new.
    fn add(&mut self, other: &Places) -> bool {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        let mut is_changed = false;
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            is_changed |= *more & !*word != 0;
            *word |= more;
        }
        is_changed
    }

    fn each(&self, mut f: impl FnMut(usize)) {
        for (index, word) in self.0.iter().enumerate() {
            let mut word = *word;
            while word != 0 {
                f(index * 64 + word.trailing_zeros() as usize);
                word &= word - 1;
            }
        }
    }
}

/// Rules to process, without duplicates.
struct Queue {
    waiting: Vec<usize>,
    is_waiting: Vec<bool>,
}

impl Queue {
    fn of(waiting: Vec<usize>, count: usize) -> Self {
        let mut is_waiting = vec![false; count];
        waiting.iter().for_each(|index| is_waiting[*index] = true);
        Queue { waiting, is_waiting }
    }

    fn add(&mut self, more: &[usize]) {
        for index in more {
            if !std::mem::replace(&mut self.is_waiting[*index], true) {
                self.waiting.push(*index);
            }
        }
    }

    fn next(&mut self) -> Option<usize> {
        let index = self.waiting.pop()?;
        self.is_waiting[index] = false;
        Some(index)
    }
}

/// The first occurrences of a node, and whether it matches the empty text.
#[derive(Clone, Default, PartialEq)]
struct First {
    places: Places,
    is_nullable: bool,
}

/// The occurrences that may follow one.
struct Following {
    first: Places,
    after: Vec<Places>,
}

impl Following {
    fn of(plan: &Plan) -> Self {
        let count = plan.rules.len();
        let nodes = || {
            plan.rules
                .iter()
                .enumerate()
                .filter_map(|(index, node)| Some((index, node.as_ref()?)))
        };
        let mut named = vec![Vec::new(); count];
        let mut naming = vec![Vec::new(); count];
        for (index, node) in nodes() {
            node.names(&mut named[index]);
            named[index].sort_unstable();
            named[index].dedup();
            named[index].iter().for_each(|other: &usize| naming[*other].push(index));
        }
        let mut first = vec![First::default(); count];
        let mut queue = Queue::of(nodes().map(|(index, _)| index).collect(), count);
        while let Some(index) = queue.next() {
            let Some(node) = &plan.rules[index] else { continue };
            let now = first_of(node, &first);
            if now != first[index] {
                first[index] = now;
                queue.add(&naming[index]);
            }
        }
        let mut walk = Walk {
            first: &first,
            after: vec![Places::default(); plan.places.len()],
            after_rule: vec![Places::default(); count],
            changed: Vec::new(),
        };
        let mut queue = Queue::of(nodes().map(|(index, _)| index).collect(), count);
        while let Some(index) = queue.next() {
            let Some(node) = &plan.rules[index] else { continue };
            let after = walk.after_rule[index].clone();
            walk.node(node, &after);
            queue.add(&std::mem::take(&mut walk.changed));
        }
        let after = walk.after;
        Following {
            first: std::mem::take(&mut first[plan.root]).places,
            after,
        }
    }

    /// Distinct pairs of occurrences that the parser may allow at the same time.
    fn together(&self, plan: &Plan, regulars: &Regulars, automata: &mut Automata) -> Vec<(usize, usize)> {
        let count = self.after.len();
        let mut with = vec![Places::default(); count];
        let mut new = Vec::new();
        let add = |a: &Places, b: &Places, with: &mut Vec<Places>, new: &mut Vec<(usize, usize)>| {
            a.each(|p| {
                b.each(|q| {
                    if !with[p].has(q) {
                        with[p].insert(q);
                        with[q].insert(p);
                        new.push((p.min(q), p.max(q)));
                    }
                });
            });
        };
        add(&self.first, &self.first, &mut with, &mut new);
        let mut found = Vec::new();
        while let Some((p, q)) = new.pop() {
            found.push((p, q));
            let have_one_text = match (&plan.places[p], &plan.places[q]) {
                (Place::Terminal(p), Place::Terminal(q)) => p == q || automata.compare(*p, *q, regulars).is_common,
                // A token may be given by name and by number.
                (Place::Token, Place::Token) => true,
                _ => false,
            };
            if have_one_text {
                add(&self.after[p], &self.after[q], &mut with, &mut new);
            }
        }
        found
    }
}

fn first_of(node: &Node, rules: &[First]) -> First {
    let mut found = First::default();
    match node {
        Node::Terminal(_, place) | Node::Token(_, place) => found.places.insert(*place),
        Node::Rule(index) => found = rules[*index].clone(),
        Node::Seq(parts) => {
            found.is_nullable = true;
            for part in parts {
                let part = first_of(part, rules);
                found.places.add(&part.places);
                if !part.is_nullable {
                    found.is_nullable = false;
                    break;
                }
            }
        }
        Node::Any(parts) => {
            for part in parts {
                let part = first_of(part, rules);
                found.places.add(&part.places);
                found.is_nullable |= part.is_nullable;
            }
        }
        Node::Repeat(part, least, most) => {
            if *most != Some(0) {
                found = first_of(part, rules);
            }
            found.is_nullable |= *least == 0 || *most == Some(0);
        }
    }
    found
}

struct Walk<'a> {
    first: &'a [First],
    after: Vec<Places>,
    after_rule: Vec<Places>,
    /// Rules whose follow set has grown.
    changed: Vec<usize>,
}

impl Walk<'_> {
    fn node(&mut self, node: &Node, after: &Places) {
        match node {
            Node::Terminal(_, place) | Node::Token(_, place) => {
                self.after[*place].add(after);
            }
            Node::Rule(index) => {
                if self.after_rule[*index].add(after) {
                    self.changed.push(*index);
                }
            }
            Node::Seq(parts) => {
                let mut after = after.clone();
                for part in parts.iter().rev() {
                    self.node(part, &after);
                    let first = first_of(part, self.first);
                    match first.is_nullable {
                        true => {
                            after.add(&first.places);
                        }
                        false => after = first.places,
                    }
                }
            }
            Node::Any(parts) => parts.iter().for_each(|part| self.node(part, after)),
            Node::Repeat(part, _, most) => {
                let mut after = after.clone();
                if *most != Some(1) {
                    after.add(&first_of(part, self.first).places);
                }
                self.node(part, &after);
            }
        }
    }
}
