//! Translates llama.cpp's grammars (GBNF) into llguidance's variant of Lark.
//!
//! [`to_lark`] translates a grammar's text into that of an equivalent one. GBNF works on characters. llguidance has a
//! lexer, which always takes the longest terminal and does not backtrack, and a parser of terminals. One terminal per
//! character would be equivalent but too slow: within a JSON string nearly all tokens may come next, and each would be
//! parsed character by character. So the translation makes terminals as long as possible without ambiguity for the
//! lexer:
//!
//! - `parse` reads the text: [`Expr`] for each rule.
//! - `regular` finds the rules that are regular expressions, including direct recursion at an end of a rule, and has
//!   their algebra.
//! - `plan` cuts all rules into terminals, the largest parts that are regular, and what is around them.
//! - `automaton` compares terminals, and `lexing` finds those that the lexer would take too long. They are split into
//!   their parts and planned again, in the worst case down to single characters, which the lexer always handles
//!   correctly.
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

/// Maximum length of a grammar, in bytes, in GBNF or Lark.
pub const LONGEST: usize = 128 << 10;

/// Why a text is not a valid GBNF grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GbnfError {
    /// A syntax error.
    #[error("GBNF, line {line}, column {column}: {message}")]
    Syntax {
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// What was found, and what was expected.
        message: String,
    },
    /// A name without a rule.
    #[error("GBNF, line {line}, column {column}: there is no rule {name:?}")]
    Undefined {
        /// Line of the first use of the name.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// The name.
        name: String,
    },
    /// Two rules with the same name.
    #[error("GBNF, line {line}: rule {name:?} is already defined in line {first}")]
    Repeated {
        /// Line of the second rule.
        line: usize,
        /// Line of the first one.
        first: usize,
        /// Their name.
        name: String,
    },
    /// A rule that refers to itself in each alternative.
    #[error("GBNF, line {line}: no text of rule {name:?} has an end, since each of its alternatives leads back to it")]
    Endless {
        /// Line of the rule.
        line: usize,
        /// Its name.
        name: String,
    },
    /// No root rule.
    #[error("GBNF: there is no rule \"root\", which a text begins with")]
    NoRoot,
}

/// An expression of a rule.
#[derive(Clone, Debug, PartialEq)]
enum Expr {
    /// One character.
    Chars(CharSet),
    /// A sequence; empty: the empty text.
    Seq(Vec<Expr>),
    /// Alternatives.
    Any(Vec<Expr>),
    /// Repetition, with minimum and maximum.
    Repeat(Box<Expr>, u32, Option<u32>),
    /// A rule, by index.
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

/// The rules of a grammar. All names have one.
#[derive(Debug)]
struct Grammar {
    rules: Vec<Rule>,
    root: usize,
}

/// Whether a text is GBNF rather than Lark: its first rule has `::=`.
pub fn is_gbnf(text: &str) -> bool {
    let lines = text.lines().map(str::trim_start);
    let mut lines = lines.skip_while(|line| line.is_empty() || line.starts_with('#'));
    // A `::=` on the line after the name's comment is valid GBNF and is not recognized here: it is unusual.
    let rest = lines.next().unwrap_or_default().trim_start_matches(parse::is_of_name);
    rest.trim_start().starts_with("::=")
}

/// The same grammar in llguidance's variant of Lark, with the rule `start`.
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

/// Checks that each rule has a finite text.
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
