//! Tests: the names after `is`.

use super::Error;
use super::call::{Args, int, need};
use super::names;
use super::operators::{binary, compared, contains};
use super::text::is_cased;
use super::value::{Object, Value};

pub(super) fn apply(name: &str, value: &Value, args: Args) -> Result<bool, Error> {
    if !names::TESTS.contains(&name) {
        return Err(Error::failed(format!("no test named {name:?}")));
    }
    let of = format!("the test {name:?}");
    let operator = match name {
        "==" | "eq" | "equalto" => Some("=="),
        "!=" | "ne" => Some("!="),
        "<" | "lt" | "lessthan" => Some("<"),
        "<=" | "le" => Some("<="),
        ">" | "gt" | "greaterthan" => Some(">"),
        ">=" | "ge" => Some(">="),
        _ => None,
    };
    if let Some(operator) = operator {
        let [other] = args.bind(&of, &["b"])?;
        return compared(operator, value, &need(other, &of)?);
    }
    match name {
        "in" => {
            let [container] = args.bind(&of, &["seq"])?;
            return contains(&need(container, &of)?, value);
        }
        "sameas" => {
            let [other] = args.bind(&of, &["other"])?;
            return same(value, &need(other, &of)?);
        }
        "divisibleby" => {
            let [number] = args.bind(&of, &["num"])?;
            let rest = binary("%", value, &need(number, &of)?)?;
            return match rest.as_number() {
                Some(rest) => Ok(rest == 0.0),
                None => Err(Error::failed(format!("{of} takes numbers"))),
            };
        }
        _ => {}
    }
    args.bind(&of, &[])?;
    Ok(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.as_number().is_some(),
        "string" => value.as_str().is_some(),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => {
            let is_view = matches!(value, Value::View(..));
            let is_loop = matches!(value, Value::Object(object) if matches!(**object, Object::Loop(_)));
            value.len().is_some() && !is_view && !is_loop
        }
        "iterable" => match value {
            Value::Stream(_) => true,
            Value::Object(object) => matches!(**object, Object::Loop(_)),
            other => other.items().is_some(),
        },
        "callable" => match value {
            Value::Undefined(_) => true,
            Value::Object(object) => !matches!(**object, Object::Namespace(_) | Object::Cycler(..)),
            _ => false,
        },
        "escaped" => matches!(value, Value::Safe(_)),
        "even" | "odd" => match binary("%", value, &Value::Int(2))? {
            Value::Str(_) => return Err(Error::failed(format!("{of} takes numbers"))),
            rest => rest.as_number() == Some(if name == "odd" { 1.0 } else { 0.0 }),
        },
        "lower" => has_case(&value.to_text()?, char::is_lowercase),
        "upper" => has_case(&value.to_text()?, char::is_uppercase),
        "filter" | "test" if super::value::hashable(value).is_err() => {
            return Err(Error::failed(format!("{of} takes a name, not {}", value.described())));
        }
        "filter" => value.as_str().is_some_and(|name| names::FILTERS.contains(&&**name)),
        _ => value.as_str().is_some_and(|name| names::TESTS.contains(&&**name)),
    })
}

/// `str.islower` and `str.isupper`: some character has a case, and every such character has this case.
pub(super) fn has_case(text: &str, is: fn(char) -> bool) -> bool {
    text.chars().any(is_cased) && text.chars().filter(|c| is_cased(*c)).all(is)
}

/// Identity, where it does not depend on Python's object storage.
fn same(a: &Value, b: &Value) -> Result<bool, Error> {
    let is_small = |value: &Value| int(value, "").is_ok_and(|number| (-5..=256).contains(&number));
    Ok(match (a, b) {
        (Value::None, Value::None) => true,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(x), Value::Int(y)) if is_small(a) || is_small(b) => x == y,
        (Value::List(a), Value::List(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Object(_), Value::Object(_)) => super::value::equal(a, b),
        _ if a.type_name() != b.type_name() => false,
        _ => return Err(Error::unsupported(format!("the test \"sameas\" on {}", a.described()))),
    })
}
