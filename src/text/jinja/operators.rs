//! Operators on values, with Python's semantics.

use std::rc::Rc;

use super::Error;
use super::html::escape;
use super::percent;
use super::value::{Range, Value, View, compare, equal};

/// Text and lists larger than this are refused: otherwise a template of a few words could use all memory.
pub(super) const LARGEST: usize = 1 << 24;

pub(super) fn check_size(length: usize, times: usize) -> Result<(), Error> {
    match length.checked_mul(times).is_some_and(|n| n <= LARGEST) {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "a value of more than {LARGEST} characters or items"
        ))),
    }
}

fn mismatch(op: &str, a: &Value, b: &Value) -> Error {
    Error::failed(format!(
        "the operator {op} does not take {} and {}",
        a.described(),
        b.described()
    ))
}

fn too_large() -> Error {
    Error::unsupported("an integer of more than 127 bits")
}

pub(super) fn unary(op: &str, value: &Value) -> Result<Value, Error> {
    let negative = op == "-";
    match value {
        Value::Float(number) => Ok(Value::Float(if negative { -number } else { *number })),
        other => match other.as_int() {
            Some(number) if negative => number.checked_neg().map(Value::Int).ok_or_else(too_large),
            Some(number) => Ok(Value::Int(number)),
            None => Err(Error::failed(format!(
                "the operator {op} does not take {}",
                value.described()
            ))),
        },
    }
}

pub(super) fn binary(op: &str, a: &Value, b: &Value) -> Result<Value, Error> {
    match (op, a, b) {
        ("+", Value::Str(a), Value::Str(b)) => {
            check_size(a.len() + b.len(), 1)?;
            Ok(Value::str(format!("{a}{b}")))
        }
        ("+", Value::Safe(_), Value::Str(_) | Value::Safe(_)) | ("+", Value::Str(_), Value::Safe(_)) => {
            Ok(Value::Safe(format!("{}{}", escape(a)?, escape(b)?).into()))
        }
        ("+", Value::List(a), Value::List(b)) => {
            check_size(a.len() + b.len(), 1)?;
            Ok(Value::list(a.iter().chain(&**b).cloned().collect()))
        }
        ("+", Value::Tuple(a) | Value::Group(a), Value::Tuple(b) | Value::Group(b)) => {
            check_size(a.len() + b.len(), 1)?;
            Ok(Value::tuple(a.iter().chain(&**b).cloned().collect()))
        }
        ("*", value, times) if times.as_int().is_some() && value.as_number().is_none() => repeat(value, times),
        ("*", times, value) if times.as_int().is_some() && value.as_number().is_none() => repeat(value, times),
        ("%", Value::Str(format), value) => percent::format(format, value).map(Value::str),
        ("%", Value::Safe(_), _) => Err(Error::unsupported("the operator % on escaped text")),
        _ => match (a.as_int(), b.as_int(), a.as_number(), b.as_number()) {
            (Some(a), Some(b), ..) => integers(op, a, b),
            (_, _, Some(a), Some(b)) => floats(op, a, b),
            _ => Err(mismatch(op, a, b)),
        },
    }
}

fn repeat(value: &Value, times: &Value) -> Result<Value, Error> {
    let times = usize::try_from(times.as_int().unwrap_or_default().max(0)).unwrap_or(usize::MAX);
    check_size(value.len().unwrap_or_default().max(1), times)?;
    let items = |items: &Vec<Value>| {
        Rc::new(
            std::iter::repeat_n(items, times)
                .flatten()
                .cloned()
                .collect::<Vec<Value>>(),
        )
    };
    match value {
        Value::Str(text) => Ok(Value::str(text.repeat(times))),
        Value::Safe(text) => Ok(Value::Safe(text.repeat(times).into())),
        Value::List(list) => Ok(Value::List(items(list))),
        Value::Tuple(list) | Value::Group(list) => Ok(Value::Tuple(items(list))),
        other => Err(mismatch("*", other, &Value::Int(times as i128))),
    }
}

fn by_zero() -> Error {
    Error::failed("division by zero")
}

fn integers(op: &str, a: i128, b: i128) -> Result<Value, Error> {
    let number = match op {
        "+" => a.checked_add(b),
        "-" => a.checked_sub(b),
        "*" => a.checked_mul(b),
        "/" | "//" | "%" if b == 0 => return Err(by_zero()),
        // Correctly rounded in Python, also for integers.
        "/" if a.abs() < 1 << 53 && b.abs() < 1 << 53 => return Ok(Value::Float(a as f64 / b as f64)),
        "/" => return Err(Error::unsupported("the quotient of integers beyond 53 bits")),
        // Rounded down.
        "//" => a
            .checked_div(b)
            .map(|q| q - i128::from(a % b != 0 && (a < 0) != (b < 0))),
        "%" => a
            .checked_rem(b)
            .map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r }),
        "**" if b < 0 => return floats(op, a as f64, b as f64),
        "**" => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        _ => unreachable!("the parser's operators"),
    };
    number.map(Value::Int).ok_or_else(too_large)
}

fn floats(op: &str, a: f64, b: f64) -> Result<Value, Error> {
    let number = match op {
        "+" => a + b,
        "-" => a - b,
        "*" => a * b,
        "/" | "//" | "%" if b == 0.0 => return Err(by_zero()),
        "/" => a / b,
        "//" | "%" => {
            let (quotient, rest) = divmod(a, b);
            if op == "//" { quotient } else { rest }
        }
        "**" if a == 0.0 && b < 0.0 => return Err(by_zero()),
        "**" if a < 0.0 && b.fract() != 0.0 => return Err(Error::unsupported("a complex number")),
        "**" => {
            let number = a.powf(b);
            match number.is_infinite() && a.is_finite() && b.is_finite() {
                true => return Err(Error::failed("the result of ** is too large")),
                false => number,
            }
        }
        _ => unreachable!("the parser's operators"),
    };
    Ok(Value::Float(number))
}

/// The quotient rounded down and the remainder, with the sign of `b`.
fn divmod(a: f64, b: f64) -> (f64, f64) {
    let mut rest = a % b;
    let mut quotient = (a - rest) / b;
    if rest == 0.0 {
        rest = 0f64.copysign(b);
    } else if (b < 0.0) != (rest < 0.0) {
        rest += b;
        quotient -= 1.0;
    }
    if quotient == 0.0 {
        return (0f64.copysign(a / b), rest);
    }
    let floor = quotient.floor();
    (floor + f64::from(quotient - floor > 0.5), rest)
}

pub(super) fn compared(op: &str, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(match op {
        "==" => equal(a, b),
        "!=" => !equal(a, b),
        "in" => contains(b, a)?,
        "not in" => !contains(b, a)?,
        _ => {
            if a.is_undefined() || b.is_undefined() {
                return Err(mismatch(op, a, b));
            }
            let order = compare(a, b)?;
            match op {
                "<" => order.is_some_and(|order| order.is_lt()),
                "<=" => order.is_some_and(|order| order.is_le()),
                ">" => order.is_some_and(|order| order.is_gt()),
                _ => order.is_some_and(|order| order.is_ge()),
            }
        }
    })
}

/// `item in container`.
pub(super) fn contains(container: &Value, item: &Value) -> Result<bool, Error> {
    match container {
        Value::Str(text) | Value::Safe(text) => match item.as_str() {
            Some(part) => Ok(text.contains(&**part)),
            None => Err(mismatch("in", item, container)),
        },
        Value::Dict(dict) | Value::View(View::Keys, dict) => {
            super::value::hashable(item)?;
            Ok(dict.get(item).is_some())
        }
        Value::Stream(stream) => {
            // Items up to the found one are consumed.
            while let Some(other) = stream.next()? {
                if equal(&other, item) {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        other => match other.items() {
            Some(items) => Ok(items.iter().any(|other| equal(other, item))),
            None => Err(mismatch("in", item, container)),
        },
    }
}

/// `value[start:stop:step]`; `None` if it has no slices.
pub(super) fn slice(value: &Value, bounds: [Option<i128>; 3]) -> Result<Option<Value>, Error> {
    let Some(length) = value.len() else {
        return Ok(None);
    };
    let [start, stop, step] = bounds;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::failed("the step of a slice is zero"));
    }
    let (low, high) = if step > 0 {
        (0, length as i128)
    } else {
        (-1, length as i128 - 1)
    };
    let bound = |index: Option<i128>, default: i128| match index {
        None => default,
        Some(index) if index < 0 => index.saturating_add(length as i128).clamp(low, high),
        Some(index) => index.clamp(low, high),
    };
    let range = Range {
        start: bound(start, if step > 0 { low } else { high }),
        stop: bound(stop, if step > 0 { high } else { low }),
        step,
    };
    let indices = || (0..range.len()).map(|i| range.get(i) as usize);
    let pick = |items: &[Value]| indices().map(|i| items[i].clone()).collect::<Vec<Value>>();
    let text = |text: &str| {
        let chars: Vec<char> = text.chars().collect();
        indices().map(|i| chars[i]).collect::<String>()
    };
    Ok(Some(match value {
        Value::Str(string) => Value::str(text(string)),
        Value::Safe(string) => Value::Safe(text(string).into()),
        Value::List(items) => Value::list(pick(items)),
        Value::Tuple(items) | Value::Group(items) => Value::tuple(pick(items)),
        Value::Range(of) => {
            let at = |index: i128| of.start + of.step * index;
            Value::Range(Range {
                start: at(range.start),
                stop: at(range.stop),
                step: of.step * step,
            })
        }
        _ => return Ok(None),
    }))
}
