//! `'%s and %d' % values`: Python's printf.

use super::Error;
use super::numbers::{float_as, magnitude};
use super::operators::check_size;
use super::value::Value;

pub(super) fn format(format: &str, value: &Value) -> Result<String, Error> {
    let (values, by_name) = match value {
        Value::Tuple(items) | Value::Group(items) => (items.to_vec(), false),
        Value::Undefined(_) | Value::Object(_) | Value::Stream(_) => {
            return Err(Error::unsupported(format!("the operator % with {}", value.described())));
        }
        // Values with items by key may be unused.
        other => (
            vec![other.clone()],
            matches!(other, Value::Dict(_) | Value::List(_) | Value::Range(_)),
        ),
    };
    let mut values = values.into_iter();
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let bad = |message: &str| Error::failed(format!("{message} in the format {format:?}"));
        let mut named = None;
        if chars.next_if_eq(&'(').is_some() {
            let mut key = String::new();
            let mut open = 1;
            for c in chars.by_ref() {
                open += i32::from(c == '(') - i32::from(c == ')');
                if open == 0 {
                    break;
                }
                key.push(c);
            }
            let Value::Dict(dict) = value else {
                return Err(bad("a name without a dict"));
            };
            named = Some(
                dict.get_str(&key)
                    .cloned()
                    .ok_or_else(|| bad(&format!("no value for {key:?}")))?,
            );
        }
        let mut spec = Spec::default();
        while let Some(flag) = chars.next_if(|c| "#0- +".contains(*c)) {
            match flag {
                '#' => spec.alternate = true,
                '0' => spec.zero = true,
                '-' => spec.left = true,
                ' ' => spec.space = true,
                _ => spec.plus = true,
            }
        }
        let by_position = named.is_none();
        let mut next = || values.next().ok_or_else(|| bad("too few values"));
        let mut number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<Option<i128>, Error> {
            if chars.next_if_eq(&'*').is_some() {
                let value = next()?;
                return value
                    .as_int()
                    .map(Some)
                    .ok_or_else(|| bad("a width that is not an integer"));
            }
            let mut number = None;
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                let digit = i128::from(digit.to_digit(10).unwrap_or_default());
                number = Some((number.unwrap_or(0i128) * 10 + digit).min(1 << 32));
            }
            Ok(number)
        };
        let width = number(&mut chars)?.unwrap_or(0);
        if width < 0 {
            spec.left = true;
        }
        spec.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
        check_size(spec.width, 1)?;
        if chars.next_if_eq(&'.').is_some() {
            let precision = number(&mut chars)?.unwrap_or(0).max(0);
            spec.precision = Some(usize::try_from(precision).unwrap_or(usize::MAX));
        }
        let _ = chars.next_if(|c| "hlL".contains(*c));
        let kind = chars.next().ok_or_else(|| bad("an incomplete conversion"))?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None if by_position => next()?,
            None => unreachable!("it is one of the two"),
        };
        out.push_str(&spec.convert(kind, &value)?);
        check_size(out.len(), 1)?;
    }
    match values.next() {
        Some(_) if !by_name => Err(Error::failed(format!(
            "not every value is used in the format {format:?}"
        ))),
        _ => Ok(out),
    }
}

#[derive(Default)]
struct Spec {
    alternate: bool,
    zero: bool,
    left: bool,
    space: bool,
    plus: bool,
    width: usize,
    precision: Option<usize>,
}

impl Spec {
    fn convert(&self, kind: char, value: &Value) -> Result<String, Error> {
        let no_number = || Error::failed(format!("%{kind} takes a number, not {}", value.described()));
        let integer = |value: &Value| match value {
            Value::Float(number) if number.is_finite() && number.abs() < 1e38 => Some(number.trunc() as i128),
            other => other.as_int(),
        };
        let (sign, digits) = match kind {
            's' | 'r' => {
                let text = match kind {
                    's' => value.to_text()?.to_string(),
                    _ => value.repr()?,
                };
                let cut = self.precision.map_or(text.clone(), |n| text.chars().take(n).collect());
                return Ok(self.pad("", &cut, false));
            }
            'c' => {
                let text = match value {
                    Value::Str(text) if text.chars().count() == 1 => text.to_string(),
                    other => {
                        let code = other
                            .as_int()
                            .and_then(|n| u32::try_from(n).ok())
                            .and_then(char::from_u32);
                        code.ok_or_else(|| Error::failed("%c takes one character"))?.to_string()
                    }
                };
                return Ok(self.pad("", &text, false));
            }
            'd' | 'i' | 'u' => {
                let number = integer(value).ok_or_else(no_number)?;
                (number < 0, magnitude(number, 10, false))
            }
            'x' | 'X' | 'o' => {
                let number = value.as_int().ok_or_else(no_number)?;
                (
                    number < 0,
                    magnitude(number, if kind == 'o' { 8 } else { 16 }, kind == 'X'),
                )
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                let number = value.as_number().ok_or_else(no_number)?;
                let text = float_as(number, kind, self.precision.unwrap_or(6), self.alternate)?;
                match text.strip_prefix('-') {
                    Some(digits) => (true, digits.to_string()),
                    None => (false, text),
                }
            }
            'a' => return Err(Error::unsupported("the conversion %a")),
            kind => return Err(Error::failed(format!("{kind:?} is not a conversion"))),
        };
        let mut digits = digits;
        if "diuxXo".contains(kind)
            && let Some(precision) = self.precision
        {
            check_size(precision, 1)?;
            let missing = precision.saturating_sub(digits.len());
            digits.insert_str(0, &"0".repeat(missing));
        }
        let sign = if sign {
            "-"
        } else if self.plus {
            "+"
        } else if self.space {
            " "
        } else {
            ""
        };
        let prefix = match kind {
            'x' | 'X' | 'o' if self.alternate => format!("{sign}0{kind}"),
            _ => sign.to_string(),
        };
        Ok(self.pad(&prefix, &digits, self.zero && !digits.contains(['n', 'N'])))
    }

    fn pad(&self, prefix: &str, text: &str, zero: bool) -> String {
        let length = prefix.chars().count() + text.chars().count();
        let missing = self.width.saturating_sub(length);
        match (self.left, zero) {
            (true, _) => format!("{prefix}{text}{}", " ".repeat(missing)),
            (false, true) => format!("{prefix}{}{text}", "0".repeat(missing)),
            (false, false) => format!("{}{prefix}{text}", " ".repeat(missing)),
        }
    }
}
