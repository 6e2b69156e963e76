//! llama.cpp's form of grammars, GBNF, as the form of Lark that llguidance takes.
//!
//! [`to_lark`] takes a grammar's text and gives that of an equal one. GBNF knows characters alone. llguidance has a lexer, which
//! always takes the longest terminal and does not go back, and a parser of terminals. A grammar of characters, one terminal for each, would
//! be equal and too slow: within a string of JSON nearly all tokens may come next, and each would be parsed character by character. So
//! the translation makes terminals as long as it can while the lexer has no choice to make:
//!
//! - `parse` reads the text: [`Expr`] for each rule.
//! - `regular` finds the rules that are regular expressions, direct recursion at an end of a rule included, and is their algebra.
//! - `plan` cuts all rules into terminals, the largest parts that are regular, and what is around them.
//! - `automaton` compares terminals, and `lexing` finds those that the lexer would take too long. They are split into their parts, and planned again: at the end of
//!   that there are single characters, where the lexer cannot go wrong.
//! - `lark` writes the text.
//!
//! GBNF's syntax is that of llama.cpp's `grammars/README.md` and `src/llama-grammar.cpp`. Beyond it, names may have `_`, an alternative
//! may begin with `|` on a new line, and rules may be left-recursive.

mod automaton;
mod chars;
mod lark;
mod lexing;
mod parse;
mod plan;
mod regular;

use chars::CharSet;
use regular::Regulars;

/// The longest grammar, in bytes, in this form or in Lark's.
pub const LONGEST: usize = 128 << 10;

/// Why a text is not a grammar of this form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GbnfError {
    /// Something else than what belongs here.
    #[error("GBNF, line {line}, column {column}: {message}")]
    Syntax {
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// What is there, and what belongs there.
        message: String,
    },
    /// A name without a rule.
    #[error("GBNF, line {line}, column {column}: there is no rule {name:?}")]
    Undefined {
        /// Where the name is used first.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// The name.
        name: String,
    },
    /// Two rules of one name.
    #[error("GBNF, line {line}: rule {name:?} is there already, in line {first}")]
    Repeated {
        /// Of the second rule.
        line: usize,
        /// Line of the first one.
        first: usize,
        /// Their name.
        name: String,
    },
    /// A rule that refers to itself in each alternative.
    #[error("GBNF, line {line}: no text of rule {name:?} has an end, since each of its alternatives leads back to it")]
    Endless {
        /// Of the rule.
        line: usize,
        /// Its name.
        name: String,
    },
    /// No beginning.
    #[error("GBNF: there is no rule \"root\", which a text begins with")]
    NoRoot,
}

/// Something of a rule.
#[derive(Clone, Debug, PartialEq)]
enum Expr {
    /// One character.
    Chars(CharSet),
    /// One after another; none: the empty text.
    Seq(Vec<Expr>),
    /// One of several.
    Any(Vec<Expr>),
    /// So many times at least, and at most.
    Repeat(Box<Expr>, u32, Option<u32>),
    /// A rule, by its place.
    Rule(usize),
    /// A token of the model, as llama.cpp and llguidance both write it: `<name>` or `<[id]>`.
    Token(String),
}

/// `name ::= body`.
#[derive(Debug)]
struct Rule {
    name: String,
    line: usize,
    body: Expr,
}

/// The rules of a text. All names have one.
#[derive(Debug)]
struct Grammar {
    rules: Vec<Rule>,
    root: usize,
}

/// Whether a text is in this form and not in Lark's: its first rule has `::=`.
pub fn is_gbnf(text: &str) -> bool {
    let lines = text.lines().map(str::trim_start);
    let mut lines = lines.skip_while(|line| line.is_empty() || line.starts_with('#'));
    // A `::=` on the line after the name's comment is valid GBNF and is not recognized here: it is unusual.
    let rest = lines.next().unwrap_or_default().trim_start_matches(parse::is_of_name);
    rest.trim_start().starts_with("::=")
}

/// The same grammar in the form of Lark that llguidance takes, with the rule `start`.
pub fn to_lark(text: &str) -> Result<String, GbnfError> {
    let grammar = parse::parse(text)?;
    check_ends(&grammar)?;
    let mut regulars = Regulars::default();
    let rules = regular::of_rules(&grammar, &mut regulars);
    if let Some(root) = rules[grammar.root] {
        return Ok(lark::of_regular(&mut regulars, root));
    }
    let plan = lexing::plan(&grammar, &rules, &mut regulars);
    Ok(lark::of_plan(&grammar, &plan, &regulars))
}

/// Each rule has a text with an end.
fn check_ends(grammar: &Grammar) -> Result<(), GbnfError> {
    fn ends(expr: &Expr, known: &[bool]) -> bool {
        match expr {
            Expr::Chars(_) | Expr::Token(_) => true,
            Expr::Seq(parts) => parts.iter().all(|part| ends(part, known)),
            Expr::Any(parts) => parts.iter().any(|part| ends(part, known)),
            Expr::Repeat(part, least, _) => *least == 0 || ends(part, known),
            Expr::Rule(index) => known[*index],
        }
    }
    let count = grammar.rules.len();
    let mut naming = vec![Vec::new(); count];
    for (index, rule) in grammar.rules.iter().enumerate() {
        let mut named = Vec::new();
        regular::names(&rule.body, &mut named);
        named.sort_unstable();
        named.dedup();
        named.into_iter().for_each(|other| naming[other].push(index));
    }
    let mut known = vec![false; count];
    let mut waiting: Vec<usize> = (0..count).collect();
    while let Some(index) = waiting.pop() {
        if !known[index] && ends(&grammar.rules[index].body, &known) {
            known[index] = true;
            waiting.extend(&naming[index]);
        }
    }
    match known.iter().position(|ends| !ends) {
        None => Ok(()),
        Some(index) => Err(GbnfError::Endless {
            line: grammar.rules[index].line,
            name: grammar.rules[index].name.clone(),
        }),
    }
}
