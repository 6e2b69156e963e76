//! Common parts of the text forms of graphs and networks: names, dims, dtypes, elements, and a cursor that reads them.
//!
//! A name or symbol is in quotes if it contains punctuation.

use std::fmt::{self, Write};

use crate::dim::{Dim, Sym};
use crate::tensor::{DType, Tensor};

/// Constants up to this many elements are shown with their values.
pub(crate) const MAX_SHOWN: usize = 8;

/// A text that is not a graph or network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: expected {expected}, found {found}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
    /// What was expected.
    pub expected: String,
    /// What stands there, in quotes, or "the end of the line".
    pub found: String,
}

/// A name as the text forms write it.
pub(crate) fn name(name: &str) -> String {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | ',' | '(' | ')' | '^');
    let bare = !name.is_empty()
        && name != "_"
        && name != "="
        && !name.starts_with(['#', '@'])
        && !name.ends_with(':')
        && !name.contains(odd);
    if bare { name.to_string() } else { format!("{name:?}") }
}

fn is_symbol_char(c: char) -> bool {
    !(c.is_whitespace() || c.is_control() || matches!(c, '"' | ',' | '+' | '-' | '*' | '[' | ']' | '(' | ')' | '?'))
}

/// A shape, `[batch, 2*tokens + 1]`. The symbols of ordinary dims need no quotes, so this is mostly `{shape:?}`.
pub(crate) fn shape(shape: &[Dim]) -> String {
    let mut text = String::from("[");
    for (i, dim) in shape.iter().enumerate() {
        text.push_str(if i > 0 { ", " } else { "" });
        dim.write_with(&mut text, |symbol| {
            let bare = symbol.starts_with(|c: char| !c.is_ascii_digit()) && symbol.chars().all(is_symbol_char);
            if bare {
                symbol.to_string()
            } else {
                format!("{symbol:?}")
            }
        });
    }
    text.push(']');
    text
}

/// The shortest text that reads back as the same number of this type, so that the f32 1e-5 stays 1e-5.
pub(crate) fn float(dtype: DType, value: f64) -> String {
    match dtype {
        DType::F64 => format!("{value:?}"),
        _ => format!("{:?}", value as f32),
    }
}

/// The elements of a small tensor; of a scalar without brackets.
pub(crate) fn elements(tensor: &Tensor) -> String {
    let list: Vec<String> = if tensor.dtype().is_float_format() {
        tensor.to_f64().iter().map(|v| float(tensor.dtype(), *v)).collect()
    } else {
        tensor.to_i64().iter().map(i64::to_string).collect()
    };
    match tensor.shape() {
        [] => list.join(""),
        _ => format!("[{}]", list.join(", ")),
    }
}

/// A tensor of integers or floats given as numbers.
pub(crate) fn tensor_of(dtype: DType, shape: Vec<usize>, numbers: &[Number]) -> Tensor {
    if dtype.is_float_format() {
        let values: Vec<f64> = numbers.iter().map(|n| n.float).collect();
        return Tensor::from_f64_as(dtype, shape, &values);
    }
    let values: Vec<i64> = numbers.iter().map(|n| n.integer).collect();
    Tensor::from_i64_as(dtype, shape, &values)
}

/// Small numbers with no pattern, the same for the same seed; of integers 0 and 1.
pub fn made_up(dtype: DType, shape: Vec<usize>, seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    };
    let count = shape.iter().product();
    let numbers: Vec<Number> = (0..count)
        .map(|_| next())
        .map(|float| Number {
            float,
            integer: i64::from(float > 0.0),
        })
        .collect();
    tensor_of(dtype, shape, &numbers)
}

/// A number of a text, in both classes of element types.
#[derive(Clone, Copy)]
pub(crate) struct Number {
    pub float: f64,
    pub integer: i64,
}

/// Reads one line from left to right.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    line: usize,
    text: &'a str,
    at: usize,
}

pub(crate) type Parsed<T> = Result<T, ParseError>;

impl<'a> Cursor<'a> {
    /// `line` counts from 1.
    pub(crate) fn new(line: usize, text: &'a str) -> Self {
        Cursor { line, text, at: 0 }
    }

    pub(crate) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub(crate) fn at_end(&self) -> bool {
        self.rest().is_empty()
    }

    /// Where the next character stands.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Continues at a position of this line.
    pub(crate) fn go_to(&mut self, at: usize) {
        self.at = at;
    }

    /// An error at an earlier position of this line.
    pub(crate) fn error_at(&self, at: usize, expected: impl fmt::Display) -> ParseError {
        let rest = &self.text[at..];
        let end = rest
            .char_indices()
            .skip(1)
            .find(|(_, c)| c.is_whitespace() || ",()[]=".contains(*c));
        let found = &rest[..end.map_or(rest.len(), |(i, _)| i)];
        ParseError {
            line: self.line,
            column: self.text[..at].chars().count() + 1,
            expected: expected.to_string(),
            found: match found {
                "" => "the end of the line".to_string(),
                found => format!("{found:?}"),
            },
        }
    }

    pub(crate) fn error(&self, expected: impl fmt::Display) -> ParseError {
        self.error_at(self.at, expected)
    }

    /// Skips `token` if it is next.
    pub(crate) fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    pub(crate) fn expect(&mut self, token: &str) -> Parsed<()> {
        match self.eat(token) {
            true => Ok(()),
            false => Err(self.error(format!("{token:?}"))),
        }
    }

    pub(crate) fn expect_end(&self) -> Parsed<()> {
        match self.at_end() {
            true => Ok(()),
            false => Err(self.error("the end of the line")),
        }
    }

    /// Takes characters while the predicate holds.
    pub(crate) fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    pub(crate) fn take_rest(&mut self) -> &'a str {
        let rest = self.rest();
        self.at = self.text.len();
        rest
    }

    /// A text in quotes, as `{:?}` writes it.
    fn quoted(&mut self) -> Parsed<String> {
        let start = self.at;
        self.expect("\"")?;
        let mut text = String::new();
        while let Some(c) = self.take_char() {
            match c {
                '"' => return Ok(text),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
        Err(self.error_at(start, "a name that ends with a quote"))
    }

    fn take_char(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Parsed<char> {
        let start = self.at;
        Ok(match self.take_char() {
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('0') => '\0',
            Some('u') => {
                self.expect("{")?;
                let code = self.take(|c| c.is_ascii_hexdigit());
                self.expect("}")?;
                let found = u32::from_str_radix(code, 16).ok().and_then(char::from_u32);
                found.ok_or_else(|| self.error_at(start, "an escape like \\u{7f}"))?
            }
            Some(other) => other,
            None => return Err(self.error("an escaped character")),
        })
    }

    /// A name, bare up to whitespace or one of `ends`, or in quotes.
    pub(crate) fn name(&mut self, ends: &[char]) -> Parsed<String> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let start = self.at;
        let name = self.take(|c| !c.is_whitespace() && c != ',' && !ends.contains(&c));
        match name {
            "" => Err(self.error_at(start, "a name")),
            name => Ok(name.to_string()),
        }
    }

    pub(crate) fn dtype(&mut self) -> Parsed<DType> {
        let start = self.at;
        let word = self.take(|c| c.is_ascii_alphanumeric());
        dtype_named(word).ok_or_else(|| self.error_at(start, "an element type such as f32 or i64"))
    }

    /// `[a, b]`, each item read by `item`.
    pub(crate) fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        self.expect("[")?;
        let mut items = Vec::new();
        if self.eat("]") {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.eat("]") {
                return Ok(items);
            }
            if !self.eat(", ") {
                return Err(self.error("\", \" or \"]\""));
            }
        }
    }

    pub(crate) fn shape(&mut self) -> Parsed<Vec<Dim>> {
        self.list(Self::dim)
    }

    /// A shape of numbers.
    pub(crate) fn sizes(&mut self) -> Parsed<Vec<usize>> {
        let start = self.at;
        let sizes = self.list(Self::integer)?;
        match volume(&sizes) {
            Some(_) => Ok(sizes),
            None => Err(self.error_at(start, "sizes of a tensor that a machine can address")),
        }
    }

    /// A sum of products of symbols and numbers.
    pub(crate) fn dim(&mut self) -> Parsed<Dim> {
        let mut sum = Dim::default();
        let mut sign = if self.eat("-") { -1 } else { 1 };
        loop {
            let mut product = Dim::constant(sign);
            loop {
                product = &product * &self.factor()?;
                if !self.eat("*") {
                    break;
                }
            }
            sum = &sum + &product;
            sign = match (self.eat(" + "), self.eat(" - ")) {
                (true, _) => 1,
                (_, true) => -1,
                _ => return Ok(sum),
            };
        }
    }

    fn factor(&mut self) -> Parsed<Dim> {
        if self.rest().starts_with('"') {
            return Ok(Dim::sym(Sym::new(self.quoted()?)));
        }
        let start = self.at;
        let word = self.take(is_symbol_char);
        match word.chars().next() {
            None => Err(self.error_at(start, "a dimension")),
            Some(c) if c.is_ascii_digit() => match word.parse() {
                Ok(number) => Ok(Dim::constant(number)),
                Err(_) => Err(self.error_at(start, "a dimension")),
            },
            Some(_) => Ok(Dim::named(word)),
        }
    }

    /// An integer of the requested type.
    pub(crate) fn integer<T: std::str::FromStr>(&mut self) -> Parsed<T> {
        let start = self.at;
        let word = self.take(|c| c.is_ascii_digit() || c == '-');
        word.parse().map_err(|_| self.error_at(start, "a whole number"))
    }

    /// A number that is stored as `dtype`: whole ones for integers.
    pub(crate) fn number(&mut self, dtype: DType) -> Parsed<Number> {
        let start = self.at;
        let word = self.take(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '+'));
        let of = |float: f64, integer: i64| Number { float, integer };
        match (dtype, word) {
            (DType::Bool, "true") => Ok(of(1.0, 1)),
            (DType::Bool, "false") => Ok(of(0.0, 0)),
            (DType::F64, word) => word
                .parse()
                .map(|v| of(v, 0))
                .map_err(|_| self.error_at(start, "a number")),
            (dtype, word) if dtype.is_float_format() => {
                let value = word.parse::<f32>().map_err(|_| self.error_at(start, "a number"))?;
                Ok(of(f64::from(value), 0))
            }
            (_, word) => match word.parse() {
                Ok(integer) => Ok(of(integer as f64, integer)),
                Err(_) => Err(self.error_at(start, "a whole number")),
            },
        }
    }

    /// The elements of a tensor of that shape: a list, or of a scalar the number.
    pub(crate) fn elements(&mut self, dtype: DType, shape: &[usize]) -> Parsed<Tensor> {
        let start = self.at;
        let numbers = match shape {
            [] => vec![self.number(dtype)?],
            _ => self.list(|c| c.number(dtype))?,
        };
        let wanted: usize = shape.iter().product();
        if numbers.len() != wanted {
            return Err(self.error_at(start, format!("{wanted} elements")));
        }
        Ok(tensor_of(dtype, shape.to_vec(), &numbers))
    }
}

/// The number of elements of a shape; `None` if no machine can address them.
pub(crate) fn volume(sizes: &[usize]) -> Option<usize> {
    let count = sizes.iter().try_fold(1usize, |count, size| count.checked_mul(*size))?;
    (count <= 1 << 56).then_some(count)
}

/// The dtype of this name.
pub(crate) fn dtype_named(name: &str) -> Option<DType> {
    name.parse().ok()
}

/// The lines of a text with their numbers, empty ones left out.
pub(crate) struct Lines<'a> {
    lines: std::iter::Peekable<Box<dyn Iterator<Item = (usize, &'a str)> + 'a>>,
    last: usize,
}

impl<'a> Lines<'a> {
    pub(crate) fn of(text: &'a str) -> Self {
        let numbered = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim_end()));
        let filled: Box<dyn Iterator<Item = (usize, &'a str)> + 'a> = Box::new(numbered.filter(|(_, l)| !l.is_empty()));
        Lines {
            lines: filled.peekable(),
            last: text.lines().count() + 1,
        }
    }

    /// The next line, whatever it is.
    pub(crate) fn next(&mut self, expected: &str) -> Parsed<Cursor<'a>> {
        match self.lines.next() {
            Some((number, text)) => Ok(Cursor::new(number, text)),
            None => Err(Cursor::new(self.last, "").error(expected)),
        }
    }

    /// Skips a section's title if it is next.
    pub(crate) fn eat_title(&mut self, title: &str) -> bool {
        self.lines.next_if(|(_, line)| *line == title).is_some()
    }

    pub(crate) fn title(&mut self, title: &str) -> Parsed<()> {
        let cursor = self.next(&format!("{title:?}"))?;
        match cursor.rest() == title {
            true => Ok(()),
            false => Err(cursor.error(format!("{title:?}"))),
        }
    }

    /// The next line of a section, past its indentation.
    pub(crate) fn item(&mut self) -> Option<Cursor<'a>> {
        let (number, text) = self.lines.next_if(|(_, line)| line.starts_with("  "))?;
        let mut cursor = Cursor::new(number, text);
        cursor.eat("  ");
        Some(cursor)
    }

    pub(crate) fn end(&mut self) -> Parsed<()> {
        match self.lines.next() {
            None => Ok(()),
            Some((number, text)) => Err(Cursor::new(number, text).error("the end of the text")),
        }
    }
}

/// Appends a list in brackets.
pub(crate) fn push_list<T: fmt::Display>(text: &mut String, items: &[T]) {
    text.push('[');
    for (i, item) in items.iter().enumerate() {
        let _ = write!(text, "{}{item}", if i > 0 { ", " } else { "" });
    }
    text.push(']');
}
