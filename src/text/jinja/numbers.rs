//! Numbers as Python reads, rounds and writes them.

use super::Error;

/// Digits with single underscores between them, as Python allows in text.
fn without_underscores(text: &str, digit: fn(char) -> bool) -> Option<String> {
    let mut before = '_';
    for c in text.chars() {
        if c == '_' && !digit(before) || before == '_' && !digit(c) {
            return None;
        }
        before = c;
    }
    (before != '_').then(|| text.replace('_', ""))
}

/// `int(text, base)`; `None` if that raises.
pub(super) fn parse_int(text: &str, base: u32) -> Result<Option<i128>, Error> {
    if !text.is_ascii() {
        return Err(Error::unsupported("reading a number from text beyond ASCII"));
    }
    let text = text.trim_matches(super::text::is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .find(|(prefix, of)| (base == *of || base == 0) && lower.starts_with(prefix));
    let (digits, base) = match prefixed {
        // An underscore may follow the prefix.
        Some((_, of)) => (lower[2..].strip_prefix('_').unwrap_or(&lower[2..]), of),
        None => (&lower[..], base),
    };
    let base = match base {
        0 if digits.starts_with('0') && digits.trim_matches(['0', '_']).is_empty() => 10,
        0 if digits.starts_with('0') => return Ok(None),
        0 => 10,
        2..=36 => base,
        _ => return Ok(None),
    };
    let Some(digits) = without_underscores(digits, |c| c.is_ascii_alphanumeric()) else {
        return Ok(None);
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(base)) {
        return Ok(None);
    }
    match i128::from_str_radix(&digits, base) {
        Ok(number) => Ok(Some(if negative { -number } else { number })),
        Err(_) => Err(Error::unsupported("an integer of more than 127 bits")),
    }
}

/// `float(text)`; `None` if that raises.
pub(super) fn parse_float(text: &str) -> Result<Option<f64>, Error> {
    if !text.is_ascii() {
        return Err(Error::unsupported("reading a number from text beyond ASCII"));
    }
    let text = text.trim_matches(super::text::is_space);
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text).to_ascii_lowercase();
    if matches!(unsigned.as_str(), "inf" | "infinity" | "nan") {
        return Ok(text.parse().ok());
    }
    if !unsigned.chars().all(|c| c.is_ascii_digit() || "._e+-".contains(c)) {
        return Ok(None);
    }
    let mut parts = Vec::new();
    for part in unsigned.split(['.', 'e', '+', '-']) {
        match part.is_empty() {
            true => parts.push(String::new()),
            false => match without_underscores(part, |c| c.is_ascii_digit()) {
                Some(part) => parts.push(part),
                None => return Ok(None),
            },
        }
    }
    Ok(text.replace('_', "").parse().ok())
}

/// `round(number, digits)` of a float: to nearest even, by the exact value.
pub(super) fn round(number: f64, digits: i128) -> Result<f64, Error> {
    if !number.is_finite() || digits > 300 {
        return Ok(number);
    }
    if digits >= 0 {
        let text = format!("{number:.*}", digits as usize);
        return Ok(text.parse().unwrap_or(number));
    }
    if digits < -22 || number.abs() >= 1e15 {
        return Err(Error::unsupported("rounding large numbers"));
    }
    let unit = 10f64.powi((-digits) as i32);
    let lower = (number / unit).floor() * unit;
    let (below, above) = (number - lower, lower + unit - number);
    let is_odd = (lower / unit).rem_euclid(2.0) == 1.0;
    Ok(if below > above || below == above && is_odd {
        lower + unit
    } else {
        lower
    })
}

/// Float formats: `%e`, `%f`, `%g` and related ones.
pub(super) fn float_as(number: f64, kind: char, precision: usize, alternate: bool) -> Result<String, Error> {
    if precision > 400 {
        return Err(Error::unsupported("a precision of more than 400 digits"));
    }
    let upper = kind.is_ascii_uppercase();
    let kind = kind.to_ascii_lowercase();
    let mut text = match kind {
        _ if number.is_nan() => "nan".to_string(),
        _ if number.is_infinite() => if number > 0.0 { "inf" } else { "-inf" }.to_string(),
        'f' => point(format!("{number:.precision$}"), alternate),
        'e' => exponent(&format!("{number:.precision$e}"), alternate),
        _ => {
            let precision = precision.max(1);
            let scientific = format!("{:.*e}", precision - 1, number);
            let power: i32 = scientific
                .split_once('e')
                .and_then(|(_, e)| e.parse().ok())
                .unwrap_or_default();
            let trimmed = |text: String| match alternate || !text.contains('.') {
                true => text,
                false => text.trim_end_matches('0').trim_end_matches('.').to_string(),
            };
            if (-4..precision as i32).contains(&power) {
                trimmed(point(
                    format!("{:.*}", (precision as i32 - 1 - power) as usize, number),
                    alternate,
                ))
            } else {
                let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
                let digits = trimmed(point(digits.to_string(), alternate));
                exponent(&format!("{digits}e{power}"), false)
            }
        }
    };
    if upper {
        text = text.to_uppercase();
    }
    Ok(text)
}

fn point(text: String, alternate: bool) -> String {
    match alternate && !text.contains('.') {
        true => text + ".",
        false => text,
    }
}

/// At least two digits of exponent, and its sign.
fn exponent(text: &str, alternate: bool) -> String {
    let (digits, power) = text.split_once('e').unwrap_or((text, "0"));
    let power: i32 = power.parse().unwrap_or_default();
    let sign = if power < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", point(digits.to_string(), alternate), power.abs())
}

/// Digits of an integer without its sign.
pub(super) fn magnitude(number: i128, base: u32, upper: bool) -> String {
    let number = number.unsigned_abs();
    match (base, upper) {
        (2, _) => format!("{number:b}"),
        (8, _) => format!("{number:o}"),
        (16, false) => format!("{number:x}"),
        (16, true) => format!("{number:X}"),
        _ => number.to_string(),
    }
}
