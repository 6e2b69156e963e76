//! Attributes and items of values, as in Jinja: `value.name` is an attribute or else an item, `value[index]` an item or
//! else an attribute.

use std::rc::Rc;

use super::Error;
use super::names;
use super::value::{Object, Value};

/// `value.name`: an attribute, else an item.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    let found = python_attribute(value, name)?;
    if !found.is_undefined() {
        return Ok(found);
    }
    Ok(match value {
        Value::Dict(dict) => dict.get_str(name).cloned().unwrap_or(found),
        _ => found,
    })
}

/// `value[index]`: an item, else an attribute.
pub(super) fn item(value: &Value, index: &Value) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::failed(format!("{} has no items", value.described())));
    }
    let at = |length: usize| {
        let index = index.as_int()?;
        let index = if index < 0 { index + length as i128 } else { index };
        usize::try_from(index).ok().filter(|index| *index < length)
    };
    let found = match value {
        Value::List(items) | Value::Tuple(items) | Value::Group(items) => at(items.len()).map(|i| items[i].clone()),
        Value::Str(text) => {
            let length = if index.as_int().is_some() {
                text.chars().count()
            } else {
                0
            };
            at(length)
                .and_then(|i| text.chars().nth(i))
                .map(|c| Value::str(c.to_string()))
        }
        Value::Safe(_) if index.as_int().is_some() => {
            return Err(Error::unsupported("items of escaped text"));
        }
        Value::Range(range) => at(range.len()).map(|i| Value::Int(range.get(i))),
        Value::Dict(dict) => dict.get(index).cloned(),
        _ => None,
    };
    match (found, index.as_str()) {
        (Some(found), _) => Ok(found),
        (None, Some(name)) => python_attribute(value, name),
        (None, None) => Ok(Value::undefined("an item that does not exist")),
    }
}

/// Python's `getattr`.
pub(super) fn python_attribute(value: &Value, name: &str) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::failed(format!("{} has no attributes", value.described())));
    }
    if name.starts_with("__") {
        return Err(Error::unsupported(format!("the attribute {name:?}")));
    }
    let method = |known: &'static [&'static str]| {
        let name = known.iter().find(|known| **known == name)?;
        Some(Value::Object(Rc::new(Object::Method(value.clone(), name))))
    };
    let not_here = || {
        Err(Error::unsupported(format!(
            "the attribute {name:?} of a {}",
            value.type_name()
        )))
    };
    let found = match value {
        Value::Str(_) => method(&names::STRING_METHODS),
        Value::Safe(_) => {
            match names::STRING_METHODS.contains(&name) || ["escape", "striptags", "unescape"].contains(&name) {
                true => return Err(Error::unsupported(format!("the method {name:?} of escaped text"))),
                false => None,
            }
        }
        Value::List(_) => method(&names::LIST_METHODS),
        Value::Tuple(_) => method(&["count", "index"]),
        Value::Group(items) => match name {
            "grouper" => Some(items[0].clone()),
            "list" => Some(items[1].clone()),
            _ => method(&["count", "index"]),
        },
        Value::Dict(_) => method(&names::DICT_METHODS),
        Value::View(..) if ["isdisjoint", "mapping"].contains(&name) => return not_here(),
        Value::Range(range) => match name {
            "start" => Some(Value::Int(range.start)),
            "stop" => Some(Value::Int(range.stop)),
            "step" => Some(Value::Int(range.step)),
            _ => method(&["count", "index"]),
        },
        Value::Int(_) | Value::Bool(_) | Value::Float(_) if names::NUMBER_ATTRIBUTES.contains(&name) => {
            return not_here();
        }
        Value::Stream(_) => return not_here(),
        Value::Object(object) => object_attribute(value, object, name)?,
        _ => None,
    };
    Ok(found.unwrap_or_else(|| Value::undefined(name)))
}

fn object_attribute(value: &Value, object: &Rc<Object>, name: &str) -> Result<Option<Value>, Error> {
    let method = |name| Some(Value::Object(Rc::new(Object::Method(value.clone(), name))));
    let not_here = || {
        Err(Error::unsupported(format!(
            "the attribute {name:?} of a {}",
            value.type_name()
        )))
    };
    Ok(match &**object {
        Object::Namespace(values) => values
            .borrow()
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.clone()),
        Object::Loop(state) => {
            let (index, length) = (state.index.get() as i128, state.items.len() as i128);
            let neighbor = |index: i128| {
                let item = usize::try_from(index).ok().and_then(|i| state.items.get(i));
                item.cloned()
                    .unwrap_or_else(|| Value::undefined("an item outside of the loop"))
            };
            Some(match name {
                "index" => Value::Int(index + 1),
                "index0" => Value::Int(index),
                "revindex" => Value::Int(length - index),
                "revindex0" => Value::Int(length - index - 1),
                "first" => Value::Bool(index == 0),
                "last" => Value::Bool(index + 1 == length),
                "length" => Value::Int(length),
                "depth" => Value::Int(state.depth as i128 + 1),
                "depth0" => Value::Int(state.depth as i128),
                "previtem" => neighbor(index - 1),
                "nextitem" => neighbor(index + 1),
                "cycle" => return Ok(method("cycle")),
                "changed" => return Ok(method("changed")),
                _ => return Ok(None),
            })
        }
        Object::Cycler(items, at) => match name {
            "current" => Some(items[at.get()].clone()),
            "next" => method("next"),
            "reset" => method("reset"),
            "items" | "pos" => return not_here(),
            _ => None,
        },
        Object::Macro(item, _) => match name {
            "name" if item.name.is_empty() => Some(Value::None),
            "name" => Some(Value::str(&item.name)),
            "arguments" => {
                let names = item.parameters.iter().map(|(name, _)| Value::str(name));
                Some(Value::tuple(names.collect()))
            }
            "catch_kwargs" | "catch_varargs" | "caller" | "explicit_caller" => return not_here(),
            _ => None,
        },
        Object::Joiner(..) if ["sep", "used"].contains(&name) => return not_here(),
        Object::Function("dict") if names::DICT_METHODS.contains(&name) => return not_here(),
        Object::Function(_) | Object::Joiner(..) => None,
        Object::Method(..) => return not_here(),
    })
}
