//! How values print: Python's `str` and `repr`.

use std::fmt::Write;
use std::rc::Rc;

use super::Error;
use super::text::is_printable;
use super::value::{Dict, MOST_NESTED, Object, Value, too_nested};

impl Value {
    /// `str(value)`.
    pub fn to_text(&self) -> Result<Rc<str>, Error> {
        match self {
            Value::Str(text) | Value::Safe(text) => Ok(text.clone()),
            Value::Undefined(_) => Ok("".into()),
            other => {
                let mut out = String::new();
                other.write_repr(&mut out, 0)?;
                Ok(out.into())
            }
        }
    }

    /// `repr(value)`.
    pub fn repr(&self) -> Result<String, Error> {
        let mut out = String::new();
        self.write_repr(&mut out, 0)?;
        Ok(out)
    }

    fn write_repr(&self, out: &mut String, depth: usize) -> Result<(), Error> {
        if depth > MOST_NESTED {
            return Err(too_nested());
        }
        let all = |out: &mut String, items: &[Value]| -> Result<(), Error> {
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                item.write_repr(out, depth + 1)?;
            }
            Ok(())
        };
        match self {
            Value::Undefined(_) => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(is) => out.push_str(if *is { "True" } else { "False" }),
            Value::Int(number) => drop(write!(out, "{number}")),
            Value::Float(number) => out.push_str(&float(*number)),
            Value::Str(text) => quote(text, out),
            Value::Safe(text) => {
                out.push_str("Markup(");
                quote(text, out);
                out.push(')');
            }
            Value::List(items) => {
                out.push('[');
                all(out, items)?;
                out.push(']');
            }
            Value::Tuple(items) | Value::Group(items) => {
                out.push('(');
                all(out, items)?;
                out.push_str(if items.len() == 1 { ",)" } else { ")" });
            }
            Value::Dict(dict) => {
                out.push('{');
                for (i, (key, value)) in dict.0.iter().enumerate() {
                    out.push_str(if i > 0 { ", " } else { "" });
                    key.write_repr(out, depth + 1)?;
                    out.push_str(": ");
                    value.write_repr(out, depth + 1)?;
                }
                out.push('}');
            }
            Value::View(..) => {
                out.push_str(self.type_name());
                out.push_str("([");
                all(out, &self.items().unwrap_or_default())?;
                out.push_str("])");
            }
            Value::Range(range) => {
                let _ = write!(out, "range({}, {}", range.start, range.stop);
                if range.step != 1 {
                    let _ = write!(out, ", {}", range.step);
                }
                out.push(')');
            }
            Value::Object(object) => match &**object {
                Object::Namespace(values) => {
                    let values = values.borrow();
                    let pairs = values.iter().map(|(k, v)| (Value::str(k), v.clone())).collect();
                    out.push_str("<Namespace ");
                    Value::Dict(Rc::new(Dict(pairs))).write_repr(out, depth + 1)?;
                    out.push('>');
                }
                Object::Macro(item, _) if item.name.is_empty() => out.push_str("<Macro anonymous>"),
                Object::Macro(item, _) => drop(write!(out, "<Macro {}>", Value::str(&item.name).repr()?)),
                Object::Loop(state) => drop(write!(
                    out,
                    "<LoopContext {}/{}>",
                    state.index.get() + 1,
                    state.items.len()
                )),
                // Python prints an address.
                _ => return Err(Error::unsupported(format!("printing a {}", self.type_name()))),
            },
            Value::Stream(_) => {
                return Err(Error::unsupported("printing a generator (add the filter `list`)"));
            }
        }
        Ok(())
    }
}

/// `repr` of a string.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(mark);
    for c in text.chars() {
        let code = u32::from(c);
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            _ if code <= 0xFF => drop(write!(out, "\\x{code:02x}")),
            _ if code <= 0xFFFF => drop(write!(out, "\\u{code:04x}")),
            _ => drop(write!(out, "\\U{code:08x}")),
        }
    }
    out.push(mark);
}

/// `repr` of a float: the shortest digits that read back, with an exponent where Python writes one.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let fixed = number.to_string();
    match fixed.contains('.') {
        true => fixed,
        false => fixed + ".0",
    }
}
