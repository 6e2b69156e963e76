//! Regular expressions over characters, each stored once, and the rules that are regular.

use std::collections::HashMap;

use super::chars::CharSet;
use super::{Expr, Grammar};

/// A regular expression, by its index in [`Regulars`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u32);

/// A regular expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Regular {
    /// One character.
    Chars(CharSet),
    /// A sequence; empty: the empty text.
    Seq(Vec<Id>),
    /// At least two alternatives.
    Any(Vec<Id>),
    /// Repetition, with minimum and maximum. The repeated expression is not empty.
    Repeat(Id, u32, Option<u32>),
}

/// All expressions of a grammar. Parts have smaller indices.
#[derive(Default)]
pub struct Regulars {
    all: Vec<Regular>,
    /// Whether an expression matches the empty text.
    nullable: Vec<bool>,
    places: HashMap<Regular, Id>,
    filled: HashMap<Id, Id>,
}

impl Regulars {
    /// The expression of an index.
    pub fn get(&self, id: Id) -> &Regular {
        &self.all[id.0 as usize]
    }

    /// Whether it matches the empty text.
    pub fn is_nullable(&self, id: Id) -> bool {
        self.nullable[id.0 as usize]
    }

    /// Whether it matches only the empty text.
    pub fn is_empty(&self, id: Id) -> bool {
        matches!(self.get(id), Regular::Seq(parts) if parts.is_empty())
    }

    fn keep(&mut self, regular: Regular) -> Id {
        if let Some(id) = self.places.get(&regular) {
            return *id;
        }
        let nullable = match &regular {
            Regular::Chars(_) => false,
            Regular::Seq(parts) => parts.iter().all(|part| self.is_nullable(*part)),
            Regular::Any(parts) => parts.iter().any(|part| self.is_nullable(*part)),
            Regular::Repeat(part, least, _) => *least == 0 || self.is_nullable(*part),
        };
        let id = Id(self.all.len() as u32);
        self.all.push(regular.clone());
        self.nullable.push(nullable);
        self.places.insert(regular, id);
        id
    }

    /// The empty text.
    pub fn empty(&mut self) -> Id {
        self.keep(Regular::Seq(Vec::new()))
    }

    /// One character.
    pub fn chars(&mut self, set: CharSet) -> Id {
        self.keep(Regular::Chars(set))
    }

    /// One after another.
    pub fn seq(&mut self, mut parts: Vec<Id>) -> Id {
        parts.retain(|part| !self.is_empty(*part));
        match parts[..] {
            [part] => part,
            _ => self.keep(Regular::Seq(parts)),
        }
    }

    /// One of these alternatives; at least one.
    pub fn any(&mut self, parts: Vec<Id>) -> Id {
        let mut set = CharSet::default();
        let mut others: Vec<Id> = Vec::new();
        let mut has_empty = false;
        for part in parts {
            match self.get(part) {
                Regular::Chars(chars) => set = set.union(chars),
                Regular::Seq(parts) if parts.is_empty() => has_empty = true,
                _ => others.push(part),
            }
        }
        if !set.is_empty() {
            others.push(self.chars(set));
        }
        others.sort_unstable();
        others.dedup();
        let some = match others[..] {
            [] => return self.empty(),
            [part] => part,
            _ => self.keep(Regular::Any(others)),
        };
        match has_empty {
            true => self.repeat(some, 0, Some(1)),
            false => some,
        }
    }

    /// So many times.
    pub fn repeat(&mut self, part: Id, least: u32, most: Option<u32>) -> Id {
        if most == Some(0) || self.is_empty(part) {
            return self.empty();
        }
        if (least, most) == (1, Some(1)) {
            return part;
        }
        match self.is_nullable(part) {
            true => {
                let part = self.filled(part);
                self.keep(Regular::Repeat(part, 0, most))
            }
            false => self.keep(Regular::Repeat(part, least, most)),
        }
    }

    /// The same without the empty text; it must match others.
    pub fn filled(&mut self, id: Id) -> Id {
        if !self.is_nullable(id) {
            return id;
        }
        if let Some(filled) = self.filled.get(&id) {
            return *filled;
        }
        let filled = match self.get(id).clone() {
            Regular::Chars(_) => id,
            Regular::Any(parts) => {
                let parts = parts.into_iter().map(|part| self.filled(part)).collect();
                self.any(parts)
            }
            Regular::Repeat(part, _, most) => self.repeat(part, 1, most),
            // From the end: either the first part is not empty, or it is and the rest is not.
            Regular::Seq(parts) => {
                let mut rest = self.empty();
                let mut rest_filled = None;
                for part in parts.into_iter().rev() {
                    let part_filled = self.filled(part);
                    let begun = self.seq(vec![part_filled, rest]);
                    rest_filled = Some(match rest_filled {
                        None => begun,
                        Some(later) => self.any(vec![begun, later]),
                    });
                    rest = self.seq(vec![part, rest]);
                }
                rest_filled.unwrap_or(id)
            }
        };
        self.filled.insert(id, filled);
        filled
    }

    /// The regular expression of an expression with known rules, or `None`.
    pub fn of(&mut self, expr: &Expr, rules: &[Option<Id>]) -> Option<Id> {
        Some(match expr {
            Expr::Chars(set) => self.chars(set.clone()),
            Expr::Rule(index) => rules[*index]?,
            Expr::Token(_) => return None,
            Expr::Seq(parts) => {
                let parts = parts.iter().map(|part| self.of(part, rules)).collect::<Option<_>>()?;
                self.seq(parts)
            }
            Expr::Any(parts) => {
                let parts = parts.iter().map(|part| self.of(part, rules)).collect::<Option<_>>()?;
                self.any(parts)
            }
            Expr::Repeat(part, least, most) => {
                let part = self.of(part, rules)?;
                self.repeat(part, *least, *most)
            }
        })
    }
}

/// The expression of each rule that is regular: without recursion, or with its own name only at one end, as in `ws ::=
/// ([ \t] ws)?`.
pub fn of_rules(grammar: &Grammar, regulars: &mut Regulars) -> Vec<Option<Id>> {
    let count = grammar.rules.len();
    // Rules that a rule depends on, and its dependents.
    let mut missing = vec![0usize; count];
    let mut waiting: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (index, rule) in grammar.rules.iter().enumerate() {
        let mut named = Vec::new();
        names(&rule.body, &mut named);
        named.sort_unstable();
        named.dedup();
        for other in named.into_iter().filter(|other| *other != index) {
            missing[index] += 1;
            waiting[other].push(index);
        }
    }
    let mut rules = vec![None; count];
    let mut ready: Vec<usize> = (0..count).filter(|index| missing[*index] == 0).collect();
    while let Some(index) = ready.pop() {
        let body = &grammar.rules[index].body;
        let found = match mentions(body, index) {
            false => regulars.of(body, &rules),
            true => at_one_end(body, index, &rules, regulars),
        };
        if found.is_none() {
            continue;
        }
        rules[index] = found;
        for other in &waiting[index] {
            missing[*other] -= 1;
            if missing[*other] == 0 {
                ready.push(*other);
            }
        }
    }
    rules
}

/// Adds the rules that an expression refers to.
pub fn names(expr: &Expr, into: &mut Vec<usize>) {
    match expr {
        Expr::Chars(_) | Expr::Token(_) => {}
        Expr::Rule(index) => into.push(*index),
        Expr::Seq(parts) | Expr::Any(parts) => parts.iter().for_each(|part| names(part, into)),
        Expr::Repeat(part, ..) => names(part, into),
    }
}

fn mentions(expr: &Expr, rule: usize) -> bool {
    let mut named = Vec::new();
    names(expr, &mut named);
    named.contains(&rule)
}

/// `X ::= A X | B` is `A* B`, and `X ::= X A | B` is `B A*` (Arden's rule).
fn at_one_end(body: &Expr, rule: usize, rules: &[Option<Id>], regulars: &mut Regulars) -> Option<Id> {
    for is_last in [true, false] {
        let Some((around, without)) = split(body, rule, is_last) else {
            continue;
        };
        let around = regulars.of(&Expr::Any(around), rules)?;
        let without = regulars.of(&Expr::Any(without), rules)?;
        let around = regulars.repeat(around, 0, None);
        return Some(match is_last {
            true => regulars.seq(vec![around, without]),
            false => regulars.seq(vec![without, around]),
        });
    }
    None
}

/// The alternatives that end (or begin) with the rule, without it, and those that do not have it. `None`: it also
/// occurs elsewhere.
fn split(expr: &Expr, rule: usize, is_last: bool) -> Option<(Vec<Expr>, Vec<Expr>)> {
    if !mentions(expr, rule) {
        return Some((Vec::new(), vec![expr.clone()]));
    }
    match expr {
        Expr::Rule(_) => Some((vec![Expr::Seq(Vec::new())], Vec::new())),
        Expr::Seq(parts) => {
            let (end, others) = match is_last {
                true => parts.split_last()?,
                false => parts.split_first()?,
            };
            if others.iter().any(|part| mentions(part, rule)) {
                return None;
            }
            let (around, without) = split(end, rule, is_last)?;
            let join = |end: Expr| {
                let others = others.iter().cloned();
                match is_last {
                    true => Expr::Seq(others.chain([end]).collect()),
                    false => Expr::Seq(std::iter::once(end).chain(others).collect()),
                }
            };
            let around = around.into_iter().map(join).collect();
            let without = without.into_iter().map(join).collect();
            Some((around, without))
        }
        Expr::Any(parts) => {
            let (mut around, mut without) = (Vec::new(), Vec::new());
            for part in parts {
                let (more_around, more_without) = split(part, rule, is_last)?;
                around.extend(more_around);
                without.extend(more_without);
            }
            Some((around, without))
        }
        Expr::Repeat(part, 0, Some(1)) => {
            let (around, mut without) = split(part, rule, is_last)?;
            without.push(Expr::Seq(Vec::new()));
            Some((around, without))
        }
        Expr::Repeat(part, 1, Some(1)) => split(part, rule, is_last),
        _ => None,
    }
}
