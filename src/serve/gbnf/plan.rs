//! Cuts rules into terminals and the structure around them.

use std::collections::{HashMap, HashSet};

use super::regular::{Id, Regular, Regulars};
use super::{Expr, Grammar};

/// A part of a rule that is not regular.
#[derive(Clone, Debug)]
pub enum Node {
    /// A nonempty terminal, and its occurrence in the plan.
    Terminal(Id, usize),
    /// A token of the model, and its occurrence.
    Token(String, usize),
    /// Another rule that is not regular.
    Rule(usize),
    /// A sequence; empty: the empty text.
    Seq(Vec<Node>),
    /// Alternatives.
    Any(Vec<Node>),
    /// Repetition.
    Repeat(Box<Node>, u32, Option<u32>),
}

/// An occurrence: a terminal or a token.
#[derive(Clone, Debug)]
pub enum Place {
    /// A terminal.
    Terminal(Id),
    /// A token.
    Token,
}

/// All reachable rules that are not regular, and a rule for each split expression.
#[derive(Debug)]
pub struct Plan {
    /// By their indices in the grammar, followed by those of split expressions; `None`: regular, or not reachable.
    pub rules: Vec<Option<Node>>,
    /// The occurrences.
    pub places: Vec<Place>,
    /// The first rule.
    pub root: usize,
}

/// Cuts all rules. Expressions in `split` are not terminals but consist of smaller ones. `None`: everything except
/// characters is split.
pub fn cut(grammar: &Grammar, known: &[Option<Id>], regulars: &mut Regulars, split: Option<&HashSet<Id>>) -> Plan {
    let mut cutter = Cutter {
        known,
        regulars,
        split,
        places: Vec::new(),
        reached: vec![Reached::Rule(grammar.root)],
        split_rules: HashMap::new(),
        rules: vec![None; grammar.rules.len()],
    };
    while let Some(reached) = cutter.reached.pop() {
        match reached {
            Reached::Rule(index) if cutter.rules[index].is_none() => {
                cutter.rules[index] = Some(cutter.node(&grammar.rules[index].body));
            }
            Reached::Rule(_) => {}
            Reached::Split(id, index) => cutter.rules[index] = Some(cutter.parts(id)),
        }
    }
    Plan {
        rules: cutter.rules,
        places: cutter.places,
        root: grammar.root,
    }
}

enum Reached {
    Rule(usize),
    /// With its rule.
    Split(Id, usize),
}

struct Cutter<'a> {
    known: &'a [Option<Id>],
    regulars: &'a mut Regulars,
    split: Option<&'a HashSet<Id>>,
    places: Vec<Place>,
    reached: Vec<Reached>,
    split_rules: HashMap<Id, usize>,
    rules: Vec<Option<Node>>,
}

impl Cutter<'_> {
    fn node(&mut self, expr: &Expr) -> Node {
        if let Some(id) = self.regulars.of(expr, self.known) {
            return self.terminal(id);
        }
        match expr {
            // Always regular.
            Expr::Chars(_) => Node::Seq(Vec::new()),
            Expr::Token(text) => {
                self.places.push(Place::Token);
                Node::Token(text.clone(), self.places.len() - 1)
            }
            Expr::Rule(index) => {
                self.reached.push(Reached::Rule(*index));
                Node::Rule(*index)
            }
            Expr::Seq(parts) => {
                let mut nodes = Vec::new();
                // Adjacent regular parts become one terminal.
                let mut run = Vec::new();
                for part in parts {
                    match self.regulars.of(part, self.known) {
                        Some(id) => run.push(id),
                        None => {
                            self.end_run(&mut run, &mut nodes);
                            nodes.push(self.node(part));
                        }
                    }
                }
                self.end_run(&mut run, &mut nodes);
                Node::Seq(nodes)
            }
            Expr::Any(parts) => {
                let (mut regular, mut nodes) = (Vec::new(), Vec::new());
                for part in parts {
                    match self.regulars.of(part, self.known) {
                        Some(id) => regular.push(id),
                        None => nodes.push(self.node(part)),
                    }
                }
                if !regular.is_empty() {
                    let id = self.regulars.any(regular);
                    nodes.push(self.terminal(id));
                }
                Node::Any(nodes)
            }
            Expr::Repeat(part, least, most) => Node::Repeat(Box::new(self.node(part)), *least, *most),
        }
    }

    fn end_run(&mut self, run: &mut Vec<Id>, nodes: &mut Vec<Node>) {
        if !run.is_empty() {
            let id = self.regulars.seq(std::mem::take(run));
            nodes.push(self.terminal(id));
        }
    }

    fn terminal(&mut self, id: Id) -> Node {
        if self.regulars.is_empty(id) {
            return Node::Seq(Vec::new());
        }
        if self.regulars.is_nullable(id) {
            let filled = self.regulars.filled(id);
            return Node::Repeat(Box::new(self.terminal(filled)), 0, Some(1));
        }
        let is_split =
            self.split.is_none_or(|split| split.contains(&id)) && !matches!(self.regulars.get(id), Regular::Chars(_));
        if !is_split {
            self.places.push(Place::Terminal(id));
            return Node::Terminal(id, self.places.len() - 1);
        }
        // One rule for all occurrences, since an expression may occur very often.
        if let Some(index) = self.split_rules.get(&id) {
            return Node::Rule(*index);
        }
        let index = self.rules.len();
        self.rules.push(None);
        self.split_rules.insert(id, index);
        self.reached.push(Reached::Split(id, index));
        Node::Rule(index)
    }

    /// The body of the rule of a split expression.
    fn parts(&mut self, id: Id) -> Node {
        match self.regulars.get(id).clone() {
            Regular::Chars(_) => self.terminal(id),
            Regular::Seq(parts) => Node::Seq(parts.into_iter().map(|part| self.terminal(part)).collect()),
            Regular::Any(parts) => Node::Any(parts.into_iter().map(|part| self.terminal(part)).collect()),
            Regular::Repeat(part, least, most) => Node::Repeat(Box::new(self.terminal(part)), least, most),
        }
    }
}

impl Node {
    /// Adds the rules that it refers to.
    pub fn names(&self, into: &mut Vec<usize>) {
        match self {
            Node::Terminal(..) | Node::Token(..) => {}
            Node::Rule(index) => into.push(*index),
            Node::Seq(parts) | Node::Any(parts) => parts.iter().for_each(|part| part.names(into)),
            Node::Repeat(part, ..) => part.names(into),
        }
    }
}
