//! Template source to tokens, by the rules of Jinja's lexer with `trim_blocks` and `lstrip_blocks` on and
//! `keep_trailing_newline` off, which is how transformers sets them.
//!
//! Line ends of all kinds become `\n`; one at the end of the template is removed. Whitespace is Python's.

use super::Error;
use super::text::{is_space, rstrip};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// Text outside of tags.
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    /// An operator or a bracket.
    Op(&'static str),
}

/// A token and the line it begins in, from 1.
pub(super) type Lexed = (Token, usize);

/// Longest first.
const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

pub(super) fn lex(source: &str) -> Result<Vec<Lexed>, Error> {
    let mut source = newlines(source);
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer {
        source: &source,
        at: 0,
        out: Vec::new(),
        line_starting: true,
    };
    while lexer.root()? {}
    Ok(lexer.out)
}

/// `\r\n` and `\r` as `\n`.
pub(super) fn newlines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    out: Vec<Lexed>,
    /// Whether nothing or a newline precedes.
    line_starting: bool,
}

/// The whitespace control of a sign at a tag's border.
#[derive(Clone, Copy, PartialEq)]
enum Sign {
    Minus,
    Plus,
    None,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn line(&self) -> usize {
        1 + self.source[..self.at].matches('\n').count()
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        Err(Error::syntax(self.line(), message))
    }

    fn push(&mut self, token: Token) {
        let line = self.line();
        self.out.push((token, line));
    }

    /// A sign, if there is one.
    fn sign(&mut self) -> Sign {
        let sign = match self.rest().chars().next() {
            Some('-') => Sign::Minus,
            Some('+') => Sign::Plus,
            _ => return Sign::None,
        };
        self.at += 1;
        sign
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(is_space).len();
    }

    /// Text up to a tag, after the tag's whitespace control.
    fn data(&mut self, text: &str, sign: Sign, strips_line: bool) {
        let mut text = text;
        if sign == Sign::Minus {
            text = rstrip(text);
        } else if sign == Sign::None && strips_line {
            let line = text.rfind('\n').map_or(0, |i| i + 1);
            let indent = &text[line..];
            if (line > 0 || self.line_starting) && !indent.is_empty() && indent.chars().all(is_space) {
                text = &text[..line];
            }
        }
        if !text.is_empty() {
            self.push(Token::Data(text.to_string()));
        }
    }

    /// Text and the tag after it; false at the end.
    fn root(&mut self) -> Result<bool, Error> {
        let rest = self.rest();
        let tags = ["{%", "{{", "{#"].map(|tag| rest.find(tag).map(|at| (at, tag)));
        let Some((length, tag)) = tags.into_iter().flatten().min() else {
            if !rest.is_empty() {
                self.push(Token::Data(rest.to_string()));
            }
            return Ok(false);
        };
        let text = &rest[..length];
        let start = self.at + length;
        // Lines of the text are counted from its beginning.
        let before = self.at;
        self.at = start + 2;
        let sign = self.sign();
        let after_sign = self.at;
        self.at = before;
        self.data(text, sign, tag != "{{");
        self.at = after_sign;
        match tag {
            "{#" => self.comment()?,
            "{{" => {
                self.line_starting = false;
                self.push(Token::VariableBegin);
                self.inside(false)?;
            }
            _ => {
                if !self.raw()? {
                    self.line_starting = false;
                    self.push(Token::BlockBegin);
                    self.inside(true)?;
                }
            }
        }
        Ok(true)
    }

    /// The end of a block, comment or raw tag, if it is here: `-` removes whitespace after it, no sign removes one
    /// newline.
    fn tag_end(&mut self, end: &str) -> bool {
        let start = self.at;
        let sign = self.sign();
        if !self.rest().starts_with(end) {
            self.at = start;
            return false;
        }
        self.at += end.len();
        match sign {
            Sign::Minus => self.skip_space(),
            Sign::Plus => {}
            Sign::None if self.rest().starts_with('\n') => self.at += 1,
            Sign::None => {}
        }
        self.line_starting = self.source[..self.at].ends_with('\n');
        true
    }

    fn comment(&mut self) -> Result<(), Error> {
        if self.rest().is_empty() {
            return Ok(());
        }
        while let Some(next) = self.rest().chars().next() {
            if self.tag_end("#}") {
                return Ok(());
            }
            self.at += next.len_utf8();
        }
        self.fail("missing end of comment tag")
    }

    /// A `raw` block, after its `{%` and sign.
    fn raw(&mut self) -> Result<bool, Error> {
        let start = self.at;
        self.skip_space();
        let is_raw = self.rest().starts_with("raw");
        if is_raw {
            self.at += 3;
            self.skip_space();
        }
        let begins = is_raw && (self.rest().starts_with("%}") || self.rest().starts_with("-%}"));
        if !begins {
            self.at = start;
            return Ok(false);
        }
        let sign = self.sign();
        self.at += 2;
        if sign == Sign::Minus {
            self.skip_space();
        }
        self.line_starting = self.source[..self.at].ends_with('\n');
        let (text_start, mut from) = (self.at, self.at);
        while let Some(found) = self.source[from..].find("{%") {
            self.at = from + found + 2;
            let sign = self.sign();
            self.skip_space();
            if self.rest().starts_with("endraw") {
                self.at += 6;
                self.skip_space();
                if ["%}", "-%}", "+%}"].iter().any(|end| self.rest().starts_with(end)) {
                    let end = self.at;
                    self.at = text_start;
                    let text = &self.source[text_start..from + found];
                    self.data(text, sign, true);
                    self.at = end;
                    self.tag_end("%}");
                    return Ok(true);
                }
            }
            from += found + 2;
        }
        self.at = text_start;
        match self.rest().is_empty() {
            true => Ok(true),
            false => self.fail("missing end of raw directive"),
        }
    }

    /// Tokens of a tag up to its end.
    fn inside(&mut self, is_block: bool) -> Result<(), Error> {
        let mut brackets: Vec<&str> = Vec::new();
        loop {
            if brackets.is_empty() {
                if is_block && self.tag_end("%}") {
                    self.push(Token::BlockEnd);
                    return Ok(());
                }
                let rest = self.rest();
                if !is_block && (rest.starts_with("}}") || rest.starts_with("-}}")) {
                    let strips = rest.starts_with('-');
                    self.at += 2 + usize::from(strips);
                    if strips {
                        self.skip_space();
                    }
                    self.line_starting = self.source[..self.at].ends_with('\n');
                    self.push(Token::VariableEnd);
                    return Ok(());
                }
            }
            let Some(next) = self.rest().chars().next() else {
                // The parser reports the missing end.
                return Ok(());
            };
            if is_space(next) {
                self.skip_space();
            } else if next.is_ascii_digit() {
                self.number()?;
            } else if next == '"' || next == '\'' {
                self.string(next)?;
            } else if next.is_alphanumeric() || next == '_' {
                self.name()?;
            } else {
                self.operator(&mut brackets)?;
            }
        }
    }

    fn name(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let name = &rest[..rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len())];
        if name.chars().next().is_some_and(|c| !c.is_alphabetic() && c != '_') {
            return self.fail(format!("invalid character in identifier {name:?}"));
        }
        self.push(Token::Name(name.to_string()));
        self.at += name.len();
        Ok(())
    }

    fn operator(&mut self, brackets: &mut Vec<&'static str>) -> Result<(), Error> {
        let rest = self.rest();
        let Some(op) = OPERATORS.iter().copied().find(|op| *op != "!" && rest.starts_with(op)) else {
            return self.fail(format!("unexpected character {:?}", rest.chars().next().unwrap_or(' ')));
        };
        match op {
            "(" => brackets.push(")"),
            "[" => brackets.push("]"),
            "{" => brackets.push("}"),
            ")" | "]" | "}" => match brackets.pop() {
                Some(expected) if expected == op => {}
                Some(expected) => return self.fail(format!("unexpected {op:?}, expected {expected:?}")),
                None => return self.fail(format!("unexpected {op:?}")),
            },
            _ => {}
        }
        self.push(Token::Op(op));
        self.at += op.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let after_point = self.source[..self.at].ends_with('.');
        if let Some(length) = float_length(rest).filter(|_| !after_point) {
            let number: f64 = rest[..length].replace('_', "").parse().expect("the form was checked");
            self.push(Token::Float(number));
            self.at += length;
            return Ok(());
        }
        let (digits, radix, prefix) = match rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0x") if digits(&rest[2..], 16) > 0 => (&rest[2..], 16, 2),
            Some("0o") if digits(&rest[2..], 8) > 0 => (&rest[2..], 8, 2),
            Some("0b") if digits(&rest[2..], 2) > 0 => (&rest[2..], 2, 2),
            _ => (rest, 10, 0),
        };
        // A decimal number must not begin with a zero, unless it is zero.
        let length = match radix == 10 && digits.starts_with('0') {
            true => digits.len() - digits.trim_start_matches('0').len(),
            false => self::digits(digits, radix),
        };
        let text = digits[..length].replace('_', "");
        let Ok(number) = i128::from_str_radix(&text, radix) else {
            return Err(Error::unsupported(format!(
                "the integer {text}, which is larger than 127 bits,"
            )));
        };
        self.push(Token::Int(number));
        self.at += prefix + length;
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<(), Error> {
        let body = &self.rest()[1..];
        let mut escaped = false;
        for (i, c) in body.char_indices() {
            if escaped {
                escaped = false;
            } else if c == '\\' {
                escaped = true;
            } else if c == quote {
                let text = unescape(&body[..i]).map_err(|message| Error::syntax(self.line(), message))?;
                self.push(Token::Str(text));
                self.at += i + 2;
                return Ok(());
            }
        }
        self.fail(format!("unexpected character {quote:?}"))
    }
}

/// Bytes of digits, with single underscores between and before them.
fn digits(text: &str, radix: u32) -> usize {
    let mut length = 0;
    for (i, c) in text.char_indices() {
        if c.is_digit(radix) {
            length = i + 1;
        } else if c != '_' || text[..i].ends_with('_') || (i == 0 && radix == 10) {
            break;
        }
    }
    length
}

/// Bytes of a float: digits, then a fraction, an exponent, or both.
fn float_length(text: &str) -> Option<usize> {
    let whole = digits(text, 10);
    let mut length = whole;
    if let Some(fraction) = text[length..].strip_prefix('.') {
        let fraction = digits(fraction, 10);
        if fraction > 0 {
            length += 1 + fraction;
        }
    }
    if let Some(exponent) = text[length..].strip_prefix(['e', 'E']) {
        let sign = usize::from(exponent.starts_with(['+', '-']));
        let exponent = digits(&exponent[sign..], 10);
        if exponent > 0 {
            length += 1 + sign + exponent;
        }
    }
    (length > whole).then_some(length)
}

/// Python's `unicode-escape`, after Jinja has replaced characters beyond ASCII by such escapes.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let code = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>, length: usize, radix: u32| -> Option<u32> {
            let mut code = 0;
            for _ in 0..length {
                code = code * radix + chars.next_if(|c| c.is_digit(radix))?.to_digit(radix)?;
            }
            Some(code)
        };
        let bad =
            |name: &str| format!("a string ends inside an escape \\{name}, or what it stands for is no character");
        match chars.next() {
            None => return Err("a string ends with a backslash".to_string()),
            Some('\n') => {}
            Some(c @ ('\\' | '\'' | '"')) => out.push(c),
            Some('a') => out.push('\x07'),
            Some('b') => out.push('\x08'),
            Some('f') => out.push('\x0c'),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('v') => out.push('\x0b'),
            Some(c @ '0'..='7') => {
                let mut code = c.to_digit(8).unwrap_or_default();
                for _ in 0..2 {
                    let Some(digit) = chars.next_if(|c| c.is_digit(8)) else {
                        break;
                    };
                    code = code * 8 + digit.to_digit(8).unwrap_or_default();
                }
                out.extend(char::from_u32(code));
            }
            Some(kind @ ('x' | 'u' | 'U')) => {
                let length = match kind {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let code = code(&mut chars, length, 16).and_then(char::from_u32);
                out.push(code.ok_or_else(|| bad(&kind.to_string()))?);
            }
            Some('N') => return Err("characters by name (\\N{…}) are not supported".to_string()),
            // Python keeps unknown escapes unchanged; at this point a character beyond ASCII is an escape itself.
            Some(c) if c.is_ascii() => out.extend(['\\', c]),
            Some(c) => {
                let code = u32::from(c);
                out.push_str(&match code {
                    0..=0xFF => format!("\\x{code:02x}"),
                    0x100..=0xFFFF => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    Ok(out)
}
