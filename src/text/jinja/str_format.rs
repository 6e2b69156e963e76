//! `'{} {name:>5}'.format(…)`: Python's format strings.

use super::Error;
use super::attributes;
use super::call::Args;
use super::numbers::{float_as, magnitude};
use super::operators::check_size;
use super::print::float;
use super::value::Value;

pub(super) fn format(template: &str, args: &Args) -> Result<String, Error> {
    let mut state = State { args, next: Some(0) };
    let chars: Vec<char> = template.chars().collect();
    state.text(&chars, 2)
}

struct State<'a> {
    args: &'a Args,
    /// The number of the next unnumbered field; `None` once fields are numbered.
    next: Option<usize>,
}

impl State<'_> {
    fn text(&mut self, chars: &[char], depth: usize) -> Result<String, Error> {
        let bad = |message: &str| Error::failed(format!("format(): {message}"));
        let mut out = String::new();
        let mut at = 0;
        while at < chars.len() {
            let c = chars[at];
            let doubled = chars.get(at + 1) == Some(&c);
            at += 1;
            match c {
                '{' | '}' if doubled => {
                    out.push(c);
                    at += 1;
                }
                '}' => return Err(bad("a single \"}\"")),
                '{' => {
                    let mut open = 1;
                    let start = at;
                    while open > 0 {
                        match chars.get(at) {
                            Some('{') => open += 1,
                            Some('}') => open -= 1,
                            Some(_) => {}
                            None => return Err(bad("a \"{\" without \"}\"")),
                        }
                        at += 1;
                    }
                    if depth == 0 {
                        return Err(bad("fields nested too deep"));
                    }
                    out.push_str(&self.field(&chars[start..at - 1], depth)?);
                }
                c => out.push(c),
            }
            check_size(out.len(), 1)?;
        }
        Ok(out)
    }

    /// `name!conversion:spec`
    fn field(&mut self, chars: &[char], depth: usize) -> Result<String, Error> {
        let mut brackets = 0;
        let end = chars.iter().position(|c| {
            brackets += i32::from(*c == '[') - i32::from(*c == ']');
            brackets == 0 && (*c == '!' || *c == ':')
        });
        let end = end.unwrap_or(chars.len());
        let name: String = chars[..end].iter().collect();
        let mut rest = &chars[end..];
        let mut value = self.value(&name)?;
        if rest.first() == Some(&'!') {
            value = match rest.get(1) {
                Some('s') => Value::Str(value.to_text()?),
                Some('r') => Value::str(value.repr()?),
                _ => return Err(Error::unsupported("a conversion other than !r and !s in format()")),
            };
            rest = &rest[2..];
            if !rest.is_empty() && rest[0] != ':' {
                return Err(Error::failed("format(): expected \":\" behind a conversion"));
            }
        }
        let spec = match rest.split_first() {
            Some((_, spec)) => self.text(spec, depth - 1)?,
            None => String::new(),
        };
        format_value(&value, &spec)
    }

    /// `0.name[key]`
    fn value(&mut self, name: &str) -> Result<Value, Error> {
        let first = name.find(['.', '[']).unwrap_or(name.len());
        let (head, mut rest) = name.split_at(first);
        let mut value = match head.parse::<usize>() {
            Ok(number) if head.chars().all(|c| c.is_ascii_digit()) => {
                if self.next.is_some_and(|next| next > 0) {
                    return Err(Error::failed("format(): fields with and without numbers"));
                }
                self.next = None;
                self.args.positional.get(number)
            }
            _ if head.is_empty() => {
                let Some(next) = &mut self.next else {
                    return Err(Error::failed("format(): fields with and without numbers"));
                };
                *next += 1;
                self.args.positional.get(*next - 1)
            }
            _ => self.args.named.iter().find(|(n, _)| n == head).map(|(_, value)| value),
        }
        .cloned()
        .ok_or_else(|| Error::failed(format!("format(): no argument for {head:?}")))?;
        while !rest.is_empty() {
            if let Some(attribute) = rest.strip_prefix('.') {
                let end = attribute.find(['.', '[']).unwrap_or(attribute.len());
                value = attributes::attribute(&value, &attribute[..end])?;
                rest = &attribute[end..];
            } else {
                let key = rest.strip_prefix('[').and_then(|key| key.split_once(']'));
                let Some((key, after)) = key else {
                    return Err(Error::failed("format(): expected \".\" or \"[\" in a field"));
                };
                let index = match key.parse::<i128>() {
                    Ok(number) if key.chars().all(|c| c.is_ascii_digit()) => Value::Int(number),
                    _ => Value::str(key),
                };
                value = attributes::item(&value, &index)?;
                rest = after;
            }
            if value.is_undefined() {
                return Err(Error::failed(format!("format(): there is no {name:?}")));
            }
        }
        Ok(value)
    }
}

#[derive(Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn parse(text: &str) -> Result<Spec, Error> {
    let bad = || Error::failed(format!("{text:?} is not a format"));
    let chars: Vec<char> = text.chars().collect();
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    let mut spec = Spec::default();
    let mut at = 0;
    if is_align(chars.get(1)) {
        (spec.fill, spec.align, at) = (Some(chars[0]), Some(chars[1]), 2);
    } else if is_align(chars.first()) {
        (spec.align, at) = (Some(chars[0]), 1);
    }
    let take = |at: &mut usize, set: &str| {
        let found = chars.get(*at).copied().filter(|c| set.contains(*c));
        *at += usize::from(found.is_some());
        found
    };
    spec.sign = take(&mut at, "+- ");
    if chars.get(at) == Some(&'z') {
        return Err(Error::unsupported("the format option z"));
    }
    spec.alternate = take(&mut at, "#").is_some();
    spec.zero = take(&mut at, "0").is_some();
    let number = |at: &mut usize| -> Result<Option<usize>, Error> {
        let mut text = String::new();
        while let Some(digit) = take(at, "0123456789") {
            text.push(digit);
        }
        match text.is_empty() {
            true => Ok(None),
            false => text.parse().map(Some).map_err(|_| bad()),
        }
    };
    spec.width = number(&mut at)?.unwrap_or(0);
    check_size(spec.width, 1)?;
    spec.grouping = take(&mut at, ",_");
    if take(&mut at, ".").is_some() {
        spec.precision = Some(number(&mut at)?.ok_or_else(bad)?);
    }
    spec.kind = chars.get(at).copied();
    match at + 1 < chars.len() {
        true => Err(bad()),
        false => Ok(spec),
    }
}

fn format_value(value: &Value, text: &str) -> Result<String, Error> {
    if text.is_empty() {
        return value.to_text().map(|text| text.to_string());
    }
    let spec = parse(text)?;
    let bad = || Error::failed(format!("the format {text:?} does not fit {}", value.described()));
    match value {
        Value::Str(string) => {
            if spec.sign.is_some() || spec.alternate || spec.grouping.is_some() || spec.align == Some('=') {
                return Err(bad());
            }
            if spec.kind.is_some_and(|kind| kind != 's') {
                return Err(bad());
            }
            let cut: String = string.chars().take(spec.precision.unwrap_or(usize::MAX)).collect();
            Ok(pad(&spec, "", &cut, '<'))
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => number(value, &spec, bad),
        Value::Safe(_) => Err(Error::unsupported("format() of escaped text")),
        _ => Err(bad()),
    }
}

fn number(value: &Value, spec: &Spec, bad: impl Fn() -> Error) -> Result<String, Error> {
    let integer = value.as_int();
    let kind = spec.kind.unwrap_or(if integer.is_some() { 'd' } else { ' ' });
    let (negative, prefix, digits) = match (integer, kind) {
        (_, 'n') => return Err(Error::unsupported("the format n, which depends on the locale")),
        (Some(number), 'c') if spec.precision.is_none() && spec.sign.is_none() && spec.grouping.is_none() => {
            let c = u32::try_from(number).ok().and_then(char::from_u32).ok_or_else(&bad)?;
            (false, "", c.to_string())
        }
        (Some(number), 'b' | 'o' | 'x' | 'X' | 'd') => {
            if spec.precision.is_some() || spec.grouping == Some(',') && kind != 'd' {
                return Err(bad());
            }
            let (base, prefix) = match kind {
                'b' => (2, "0b"),
                'o' => (8, "0o"),
                'x' => (16, "0x"),
                'X' => (16, "0X"),
                _ => (10, ""),
            };
            let prefix = if spec.alternate { prefix } else { "" };
            let every = if base == 10 { 3 } else { 4 };
            (
                number < 0,
                prefix,
                grouped(magnitude(number, base, kind == 'X'), spec.grouping, every),
            )
        }
        (_, 'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' | ' ') => {
            let number = value.as_number().ok_or_else(&bad)?;
            let precision = spec.precision.unwrap_or(6);
            let text = match kind {
                ' ' if spec.precision.is_some() || spec.alternate => {
                    return Err(Error::unsupported("a precision without a type in format()"));
                }
                ' ' => float(number),
                '%' => float_as(number * 100.0, 'f', precision, spec.alternate)? + "%",
                kind => float_as(number, kind, precision, spec.alternate)?,
            };
            let (negative, text) = match text.strip_prefix('-') {
                Some(digits) => (true, digits.to_string()),
                None => (false, text),
            };
            let whole = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let (whole, rest) = text.split_at(whole);
            (negative, "", grouped(whole.to_string(), spec.grouping, 3) + rest)
        }
        _ => return Err(bad()),
    };
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    if spec.zero && spec.grouping.is_some() && spec.width > 0 {
        return Err(Error::unsupported("zeros and separators together in format()"));
    }
    Ok(pad(spec, &format!("{sign}{prefix}"), &digits, '>'))
}

/// A separator before every `every` digits from the right.
fn grouped(digits: String, separator: Option<char>, every: usize) -> String {
    let Some(separator) = separator else {
        return digits;
    };
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(every) {
            out.push(separator);
        }
        out.push(c);
    }
    out
}

fn pad(spec: &Spec, prefix: &str, text: &str, default: char) -> String {
    let missing = spec.width.saturating_sub(prefix.chars().count() + text.chars().count());
    let zeros = spec.zero && spec.align.is_none();
    let fill = |n: usize| {
        let c = spec.fill.unwrap_or(if spec.zero { '0' } else { ' ' });
        std::iter::repeat_n(c, n).collect::<String>()
    };
    match spec
        .align
        .unwrap_or(if zeros && default == '>' { '=' } else { default })
    {
        '<' => format!("{prefix}{text}{}", fill(missing)),
        '^' => format!("{}{prefix}{text}{}", fill(missing / 2), fill(missing - missing / 2)),
        '=' => format!("{prefix}{}{text}", fill(missing)),
        _ => format!("{}{prefix}{text}", fill(missing)),
    }
}
