//! Filters that take and give numbers.

use super::call::{Args, int, text};
use super::filters::described;
use super::operators::binary;
use super::order::path;
use super::value::Value;
use super::{Error, numbers};

fn is_given(value: &Option<Value>) -> bool {
    !matches!(value, None | Some(Value::None))
}

pub(super) fn number(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    let of = described(name);
    let no_number = || Error::failed(format!("{of} takes a number, not {}", value.described()));
    match name {
        "abs" => {
            args.bind(&of, &[])?;
            match (value, value.as_int()) {
                (Value::Float(number), _) => Ok(Value::Float(number.abs())),
                (_, Some(number)) => Ok(Value::Int(number.abs())),
                _ => Err(no_number()),
            }
        }
        "round" => {
            let [precision, method] = args.bind(&of, &["precision", "method"])?;
            let precision = precision.map_or(Ok(0), |p| int(&p, &of))?;
            let method = method.map_or(Ok("common".into()), |m| text(&m, &of))?;
            if !["common", "ceil", "floor"].contains(&&*method) {
                return Err(Error::failed(format!("{of} has the methods common, ceil and floor")));
            }
            let number = value.as_number().ok_or_else(no_number)?;
            if &*method == "common" {
                return match value.as_int() {
                    Some(number) if precision >= 0 => Ok(Value::Int(number)),
                    Some(_) => Err(Error::unsupported("rounding integers to tens")),
                    None => Ok(Value::Float(numbers::round(number, precision)?)),
                };
            }
            if !number.is_finite() || precision.abs() > 22 {
                return Err(Error::unsupported("rounding up or down so far"));
            }
            let scale = 10f64.powi(precision as i32);
            let scaled = number * scale;
            let whole = if &*method == "ceil" {
                scaled.ceil()
            } else {
                scaled.floor()
            };
            Ok(Value::Float(whole / scale))
        }
        "int" => {
            let [default, base] = args.bind(&of, &["default", "base"])?;
            let base = base.map_or(Ok(10), |base| int(&base, &of))?;
            let by_float = |number: Option<f64>| match number {
                Some(number) if number.is_finite() && number.abs() < 1e38 => Some(Value::Int(number.trunc() as i128)),
                _ => None,
            };
            let found = match value {
                Value::Str(text) | Value::Safe(text) => {
                    let base = u32::try_from(base).unwrap_or(u32::MAX);
                    match numbers::parse_int(text, base)? {
                        Some(number) => Some(Value::Int(number)),
                        None => by_float(numbers::parse_float(text)?),
                    }
                }
                Value::Float(number) if number.is_infinite() => return Err(no_number()),
                Value::Float(number) => by_float(Some(*number)),
                Value::Undefined(_) => return Err(no_number()),
                other => other.as_int().map(Value::Int),
            };
            Ok(found.or(default).unwrap_or(Value::Int(0)))
        }
        "float" => {
            let [default] = args.bind(&of, &["default"])?;
            let found = match value {
                Value::Str(text) | Value::Safe(text) => numbers::parse_float(text)?,
                Value::Undefined(_) => return Err(no_number()),
                other => other.as_number(),
            };
            Ok(found.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        "sum" => {
            let [attribute, start] = args.bind(&of, &["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            if total.as_str().is_some() {
                return Err(Error::failed(format!("{of} does not take text")));
            }
            let mut terms = Vec::new();
            for item in value.iterate()? {
                let item = match is_given(&attribute) {
                    true => path(&item, attribute.as_ref().unwrap_or(&Value::None), None)?,
                    false => item,
                };
                terms.extend(item.as_number());
                total = binary("+", &total, &item)?;
            }
            match total {
                // Since 3.12 Python adds floats with a correction.
                Value::Float(sum) if corrected_sum(&terms) != sum && sum.is_finite() && terms.len() > 2 => Err(
                    Error::unsupported("the filter \"sum\" of floats whose sum depends on the version of Python"),
                ),
                total => Ok(total),
            }
        }
        _ => {
            let [binary_units] = args.bind(&of, &["binary"])?;
            let bytes = match value.as_str() {
                Some(text) => numbers::parse_float(text)?,
                None => value.as_number(),
            };
            let bytes = bytes.ok_or_else(no_number)?;
            let is_binary = binary_units.is_some_and(|b| b.is_true());
            let (base, suffix) = if is_binary { (1024f64, "iB") } else { (1000f64, "B") };
            Ok(Value::str(if bytes == 1.0 {
                "1 Byte".to_string()
            } else if bytes < base {
                format!("{} Bytes", bytes.trunc())
            } else {
                let prefixes = [if is_binary { 'K' } else { 'k' }, 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'];
                let mut unit = base;
                let mut prefix = prefixes[0];
                for next in prefixes {
                    unit *= base;
                    prefix = next;
                    if bytes < unit {
                        break;
                    }
                }
                format!("{:.1} {prefix}{suffix}", base * bytes / unit)
            }))
        }
    }
}

fn corrected_sum(terms: &[f64]) -> f64 {
    let (mut sum, mut lost) = (0f64, 0f64);
    for term in terms {
        let next = sum + term;
        lost += if sum.abs() >= term.abs() {
            (sum - next) + term
        } else {
            (term - next) + sum
        };
        sum = next;
    }
    sum + lost
}
