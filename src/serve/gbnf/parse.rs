//! Parses the text of a grammar.

use std::collections::HashMap;

use super::chars::CharSet;
use super::{Expr, GbnfError, Grammar, Rule};

/// Maximum repetitions of one expression, the same as llama.cpp's.
const MOST_REPETITIONS: u32 = 2000;
/// Maximum nesting of groups.
const DEEPEST: usize = 100;
const OPERATORS: [char; 4] = ['*', '+', '?', '{'];

/// Reads a grammar.
pub fn parse(text: &str) -> Result<Grammar, GbnfError> {
    let mut parser = Parser {
        chars: text.chars().collect(),
        at: 0,
        line: 1,
        column: 1,
        names: HashMap::new(),
        used: Vec::new(),
        rules: Vec::new(),
    };
    parser.skip(true);
    while parser.peek().is_some() {
        parser.rule()?;
        parser.skip(true);
    }
    parser.finish()
}

/// Whether a name may contain this character.
pub fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    line: usize,
    column: usize,
    /// Indices of rules, in the order in which their names occur.
    names: HashMap<String, usize>,
    /// Name, with line and column of its first occurrence.
    used: Vec<(String, usize, usize)>,
    /// Rules by index, once they are read.
    rules: Vec<Option<Rule>>,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        // "\r\n" is one line end.
        if c == '\n' || (c == '\r' && self.peek() != Some('\n')) {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
        Some(c)
    }

    /// The current input, for a message.
    fn here(&self) -> String {
        match self.peek() {
            None => "the end".to_string(),
            Some('\n' | '\r') => "the end of the line".to_string(),
            Some(c) => format!("{c:?}"),
        }
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, GbnfError> {
        Err(GbnfError::Syntax {
            line: self.line,
            column: self.column,
            message: message.into(),
        })
    }

    /// Skips spaces and comments, and line ends where they are allowed.
    fn skip(&mut self, over_lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => {
                    self.next();
                }
                '#' => {
                    while !matches!(self.peek(), None | Some('\n' | '\r')) {
                        self.next();
                    }
                }
                '\n' | '\r' if over_lines => {
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(is_of_name) {
            self.next();
        }
        self.chars[start..self.at].iter().collect()
    }

    fn place(&mut self, name: String, line: usize, column: usize) -> usize {
        if let Some(place) = self.names.get(&name) {
            return *place;
        }
        let place = self.rules.len();
        self.names.insert(name.clone(), place);
        self.used.push((name, line, column));
        self.rules.push(None);
        place
    }

    fn rule(&mut self) -> Result<(), GbnfError> {
        let (line, column) = (self.line, self.column);
        let name = self.name();
        if name.is_empty() {
            return self.error(format!("{} is here, where a rule begins (name ::= …)", self.here()));
        }
        self.skip(false);
        for c in "::=".chars() {
            if self.peek() != Some(c) {
                return self.error(format!(
                    "{} is here, where ::= follows the name {name:?} of a rule",
                    self.here()
                ));
            }
            self.next();
        }
        self.skip(true);
        let body = self.alternatives(0)?;
        if !matches!(self.peek(), None | Some('\n' | '\r')) {
            return self.error(format!("{} is here, where a rule goes on or ends", self.here()));
        }
        let place = self.place(name.clone(), line, column);
        if let Some(first) = &self.rules[place] {
            let first = first.line;
            return Err(GbnfError::Repeated { line, first, name });
        }
        self.rules[place] = Some(Rule { name, line, body });
        Ok(())
    }

    /// `depth`: nesting of groups. Line ends are allowed within groups and after `|`.
    fn alternatives(&mut self, depth: usize) -> Result<Expr, GbnfError> {
        let mut found = vec![self.sequence(depth)?];
        loop {
            // An alternative on a separate line.
            let (at, line, column) = (self.at, self.line, self.column);
            self.skip(true);
            if self.peek() != Some('|') {
                (self.at, self.line, self.column) = (at, line, column);
                break;
            }
            self.next();
            self.skip(true);
            found.push(self.sequence(depth)?);
        }
        Ok(match found.len() {
            1 => found.remove(0),
            _ => Expr::Any(found),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, GbnfError> {
        let mut found = Vec::new();
        loop {
            let expr = match self.peek() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.next();
                    Expr::Chars(CharSet::all())
                }
                Some('(') => self.group(depth)?,
                Some('<') => self.token()?,
                Some('!') => {
                    return self.error("\"any token but\" (!<…>) is not supported; use a class of characters, [^…]");
                }
                Some(c) if OPERATORS.contains(&c) => {
                    return self.error(format!("{c:?} is here, and nothing before it that it could repeat"));
                }
                Some(c) if is_of_name(c) => {
                    let (line, column) = (self.line, self.column);
                    let name = self.name();
                    Expr::Rule(self.place(name, line, column))
                }
                _ => break,
            };
            self.skip(depth > 0);
            found.push(self.repeated(expr, depth)?);
        }
        Ok(match found.len() {
            1 => found.remove(0),
            _ => Expr::Seq(found),
        })
    }

    fn repeated(&mut self, mut expr: Expr, depth: usize) -> Result<Expr, GbnfError> {
        let mut operators = 0;
        while let Some(c) = self.peek().filter(|c| OPERATORS.contains(c)) {
            operators += 1;
            if operators > DEEPEST {
                return self.error(format!("more than {DEEPEST} repetitions of one thing"));
            }
            let (least, most) = match c {
                '*' => (0, None),
                '+' => (1, None),
                '?' => (0, Some(1)),
                _ => self.range(depth)?,
            };
            self.next();
            self.skip(depth > 0);
            expr = Expr::Repeat(Box::new(expr), least, most);
        }
        Ok(expr)
    }

    /// `{m}`, `{m,}` and `{m,n}`, up to the last brace.
    fn range(&mut self, depth: usize) -> Result<(u32, Option<u32>), GbnfError> {
        self.next();
        self.skip(depth > 0);
        let least = self.number()?;
        self.skip(depth > 0);
        let mut most = Some(least);
        if self.peek() == Some(',') {
            self.next();
            self.skip(depth > 0);
            most = None;
            if self.peek() != Some('}') {
                let number = self.number()?;
                if number < least {
                    return self.error(format!("{{{least},{number}}}: the most is less than the least"));
                }
                most = Some(number);
                self.skip(depth > 0);
            }
        }
        match self.peek() {
            Some('}') => Ok((least, most)),
            _ => self.error(format!("{} is here, where a repetition ends with '}}'", self.here())),
        }
    }

    fn number(&mut self) -> Result<u32, GbnfError> {
        let start = self.at;
        let mut number = 0u32;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(10)) {
            number = number.saturating_mul(10).saturating_add(digit);
            self.next();
        }
        match (start == self.at, number > MOST_REPETITIONS) {
            (true, _) => self.error(format!(
                "{} is here, where a number of repetitions belongs",
                self.here()
            )),
            (_, true) => self.error(format!(
                "more than {MOST_REPETITIONS} repetitions; use {{m,}} for any number"
            )),
            _ => Ok(number),
        }
    }

    fn group(&mut self, depth: usize) -> Result<Expr, GbnfError> {
        if depth >= DEEPEST {
            return self.error(format!("more than {DEEPEST} groups in each other"));
        }
        let (line, column) = (self.line, self.column);
        self.next();
        self.skip(true);
        let expr = self.alternatives(depth + 1)?;
        self.skip(true);
        match self.peek() {
            Some(')') => {
                self.next();
                Ok(expr)
            }
            None => Err(GbnfError::Syntax {
                line,
                column,
                message: "this group has no ')'".to_string(),
            }),
            Some(_) => self.error(format!(
                "{} is here, where a group goes on or ends with ')'",
                self.here()
            )),
        }
    }

    fn literal(&mut self) -> Result<Expr, GbnfError> {
        let (line, column) = (self.line, self.column);
        self.next();
        let mut found = Vec::new();
        loop {
            match self.peek() {
                None => {
                    return Err(GbnfError::Syntax {
                        line,
                        column,
                        message: "this text has no second '\"'".to_string(),
                    });
                }
                Some('"') => {
                    self.next();
                    break;
                }
                Some(_) => found.push(Expr::Chars(CharSet::one(self.char()?))),
            }
        }
        Ok(match found.len() {
            1 => found.remove(0),
            _ => Expr::Seq(found),
        })
    }

    fn class(&mut self) -> Result<Expr, GbnfError> {
        let (line, column) = (self.line, self.column);
        self.next();
        let is_negated = self.peek() == Some('^');
        if is_negated {
            self.next();
        }
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                None => {
                    return Err(GbnfError::Syntax {
                        line,
                        column,
                        message: "this class has no ']'".to_string(),
                    });
                }
                Some(']') => {
                    self.next();
                    break;
                }
                Some(_) => {
                    let first = self.char()?;
                    let mut last = first;
                    if self.peek() == Some('-') && !matches!(self.chars.get(self.at + 1), None | Some(']')) {
                        self.next();
                        last = self.char()?;
                        if last < first {
                            return self.error(format!("{first:?} to {last:?} is not a range: it goes down"));
                        }
                    }
                    ranges.push((first as u32, last as u32));
                }
            }
        }
        let set = CharSet::of(ranges);
        let set = match is_negated {
            true => set.complement(),
            false => set,
        };
        match set.is_empty() {
            true => Err(GbnfError::Syntax {
                line,
                column,
                message: "no character is of this class".to_string(),
            }),
            false => Ok(Expr::Chars(set)),
        }
    }

    /// A character, possibly escaped.
    fn char(&mut self) -> Result<char, GbnfError> {
        let c = self.next().unwrap_or_default();
        if c != '\\' {
            return Ok(c);
        }
        let digits = match self.peek() {
            Some('t') => return Ok(self.took('\t')),
            Some('r') => return Ok(self.took('\r')),
            Some('n') => return Ok(self.took('\n')),
            Some(c @ ('\\' | '"' | '[' | ']')) => return Ok(self.took(c)),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => {
                let message = format!(
                    "{} after '\\' is not an escape; those are \\n \\r \\t \\\\ \\\" \\[ \\] \\xHH \\uHHHH \\UHHHHHHHH",
                    self.here()
                );
                return self.error(message);
            }
        };
        self.next();
        let mut code = 0u32;
        for _ in 0..digits {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(16)) else {
                return self.error(format!(
                    "{} is here, where {digits} hexadecimal digits belong",
                    self.here()
                ));
            };
            code = (code << 4) | digit;
            self.next();
        }
        match char::from_u32(code) {
            Some(c) => Ok(c),
            None => self.error(format!("U+{code:04X} is not a character")),
        }
    }

    fn took(&mut self, c: char) -> char {
        self.next();
        c
    }

    /// `<name>` or `<[id]>`.
    fn token(&mut self) -> Result<Expr, GbnfError> {
        let (line, column) = (self.line, self.column);
        let mut text = String::new();
        while let Some(c) = self.peek().filter(|c| !c.is_whitespace()) {
            text.push(c);
            self.next();
            if c == '>' {
                break;
            }
        }
        let inside = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
        let id = inside.and_then(|inside| inside.strip_prefix('[')?.strip_suffix(']'));
        let is_token = match (inside, id) {
            (_, Some(id)) => id.parse::<u32>().is_ok(),
            (Some(name), None) => !name.is_empty() && !name.starts_with('[') && !name.contains('<'),
            (None, None) => false,
        };
        match is_token {
            true => Ok(Expr::Token(text)),
            false => Err(GbnfError::Syntax {
                line,
                column,
                message: format!("{text:?} is not a token: write <name> or <[id]>"),
            }),
        }
    }

    fn finish(self) -> Result<Grammar, GbnfError> {
        let root = self.names.get("root").copied();
        let mut rules = Vec::with_capacity(self.rules.len());
        for (rule, (name, line, column)) in self.rules.into_iter().zip(self.used) {
            match rule {
                Some(rule) => rules.push(rule),
                None => return Err(GbnfError::Undefined { line, column, name }),
            }
        }
        match root {
            Some(root) => Ok(Grammar { rules, root }),
            None => Err(GbnfError::NoRoot),
        }
    }
}
