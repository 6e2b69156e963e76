//! Writes the grammar in Lark's syntax. Each regular expression is a separate terminal, which others refer to: shared
//! parts are written once, and groups are not nested.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::Grammar;
use super::chars::CharSet;
use super::plan::{Node, Place, Plan};
use super::regular::{Id, Regular, Regulars};

/// The text of a grammar that is one regular expression.
pub fn of_regular(regulars: &mut Regulars, root: Id) -> String {
    if regulars.is_empty(root) {
        return "start: \"\"\n".to_string();
    }
    let filled = regulars.filled(root);
    let mark = match regulars.is_nullable(root) {
        true => "?",
        false => "",
    };
    let mut text = format!("start: T{}{mark}\n", filled.0);
    terminals(regulars, [filled], &mut text);
    text
}

/// The text of a grammar with recursion.
pub fn of_plan(grammar: &Grammar, plan: &Plan, regulars: &Regulars) -> String {
    let mut writer = Writer {
        grammar,
        plan,
        lines: Vec::new(),
        groups: 0,
    };
    for (index, rule) in plan.rules.iter().enumerate() {
        if let Some(node) = rule {
            let name = writer.rule(index);
            let body = writer.alternatives(node);
            writer.lines.push(format!("{name}: {body}"));
        }
    }
    let mut text = writer.lines.join("\n");
    text.push('\n');
    let used = plan.places.iter().filter_map(|place| match place {
        Place::Terminal(id) => Some(*id),
        Place::Token => None,
    });
    terminals(regulars, used, &mut text);
    text
}

struct Writer<'a> {
    grammar: &'a Grammar,
    plan: &'a Plan,
    lines: Vec<String>,
    groups: usize,
}

impl Writer<'_> {
    fn rule(&self, index: usize) -> String {
        if index == self.plan.root {
            return "start".to_string();
        }
        match self.grammar.rules.get(index) {
            Some(rule) => format!("r{index}_{}", rule.name.to_ascii_lowercase().replace('-', "_")),
            None => format!("s{index}"),
        }
    }

    fn alternatives(&mut self, node: &Node) -> String {
        match node {
            Node::Any(parts) => {
                let parts: Vec<String> = parts.iter().map(|part| self.sequence(part)).collect();
                parts.join(" | ")
            }
            node => self.sequence(node),
        }
    }

    fn sequence(&mut self, node: &Node) -> String {
        match node {
            Node::Seq(parts) if !parts.is_empty() => {
                let parts: Vec<String> = parts.iter().map(|part| self.item(part)).collect();
                parts.join(" ")
            }
            node => self.item(node),
        }
    }

    fn item(&mut self, node: &Node) -> String {
        match node {
            Node::Repeat(_, _, Some(0)) => "\"\"".to_string(),
            Node::Repeat(part, least, most) => format!("{}{}", self.atom(part), times(*least, *most)),
            node => self.atom(node),
        }
    }

    fn atom(&mut self, node: &Node) -> String {
        match node {
            Node::Terminal(id, _) => format!("T{}", id.0),
            Node::Token(text, _) => text.clone(),
            Node::Rule(index) => self.rule(*index),
            Node::Seq(parts) if parts.is_empty() => "\"\"".to_string(),
            node => {
                let name = format!("g{}", self.groups);
                self.groups += 1;
                let body = self.alternatives(node);
                self.lines.push(format!("{name}: {body}"));
                name
            }
        }
    }
}

fn times(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".to_string(),
        (1, None) => "+".to_string(),
        (0, Some(1)) => "?".to_string(),
        (1, Some(1)) => String::new(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

/// Definitions of these, and of all their parts.
fn terminals(regulars: &Regulars, used: impl IntoIterator<Item = Id>, text: &mut String) {
    let mut waiting: Vec<Id> = used.into_iter().collect();
    let mut written = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if !written.insert(id) {
            continue;
        }
        let body = match regulars.get(id) {
            Regular::Chars(set) => class(set),
            Regular::Seq(parts) => sequence(regulars, parts, &mut waiting),
            Regular::Any(parts) => {
                waiting.extend(parts);
                let parts: Vec<String> = parts.iter().map(|part| format!("T{}", part.0)).collect();
                parts.join(" | ")
            }
            Regular::Repeat(part, least, most) => {
                waiting.push(*part);
                format!("T{}{}", part.0, times(*least, *most))
            }
        };
        // Writing to a text cannot fail.
        let _ = writeln!(text, "T{}: {body}", id.0);
    }
}

/// Single characters are written inline.
fn sequence(regulars: &Regulars, parts: &[Id], waiting: &mut Vec<Id>) -> String {
    let mut items: Vec<String> = Vec::new();
    let mut literal = String::new();
    for part in parts {
        let single = match regulars.get(*part) {
            Regular::Chars(set) => set.single(),
            _ => None,
        };
        match single {
            Some(c) => literal.push(c),
            None => {
                if !literal.is_empty() {
                    items.push(quoted(&std::mem::take(&mut literal)));
                }
                waiting.push(*part);
                items.push(format!("T{}", part.0));
            }
        }
    }
    if !literal.is_empty() || items.is_empty() {
        items.push(quoted(&literal));
    }
    items.join(" ")
}

/// As JSON, with DEL escaped too, which llguidance's lexer requires.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(c);
            }
            '\0'..='\x1F' | '\x7F' => {
                let _ = write!(quoted, "\\u{:04x}", c as u32);
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn class(set: &CharSet) -> String {
    let mut text = String::from("/[");
    let push = |text: &mut String, code: u32| match char::from_u32(code) {
        Some(c) if c.is_ascii_alphanumeric() => text.push(c),
        _ => {
            let _ = write!(text, "\\x{{{code:X}}}");
        }
    };
    for (first, last) in set.ranges() {
        push(&mut text, *first);
        if last > first {
            text.push('-');
            push(&mut text, *last);
        }
    }
    text.push_str("]/");
    text
}
