//! Arguments of calls, and the built-in functions.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::Error;
use super::strftime::strftime;
use super::value::{Dict, Object, Range, Value};

/// Evaluated arguments.
#[derive(Default)]
pub(super) struct Args {
    pub positional: Vec<Value>,
    pub named: Vec<(String, Value)>,
}

impl Args {
    pub fn add_named(&mut self, name: &str, value: Value) -> Result<(), Error> {
        if self.named.iter().any(|(n, _)| n == name) {
            return Err(Error::failed(format!("the argument {name:?} is given twice")));
        }
        self.named.push((name.to_string(), value));
        Ok(())
    }

    /// The arguments for these parameters. A parameter in parentheses, `(x)`, cannot be passed by name.
    pub fn bind<const N: usize>(self, of: &str, parameters: &[&str; N]) -> Result<[Option<Value>; N], Error> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return Err(Error::failed(format!("{of} takes at most {N} arguments")));
        }
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            match parameters.iter().position(|parameter| *parameter == name) {
                Some(at) if bound[at].is_none() => bound[at] = Some(value),
                Some(_) => return Err(Error::failed(format!("{of} gets the argument {name:?} twice"))),
                None => return Err(Error::failed(format!("{of} takes no argument {name:?}"))),
            }
        }
        Ok(bound)
    }

    /// Arguments by position only.
    pub fn unnamed(self, of: &str) -> Result<Vec<Value>, Error> {
        match self.named.first() {
            None => Ok(self.positional),
            Some((name, _)) => Err(Error::failed(format!("{of} takes no argument {name:?}"))),
        }
    }
}

/// A required argument.
pub(super) fn need(value: Option<Value>, of: &str) -> Result<Value, Error> {
    value.ok_or_else(|| Error::failed(format!("{of} needs another argument")))
}

pub(super) fn int(value: &Value, of: &str) -> Result<i128, Error> {
    let number = value.as_int();
    number.ok_or_else(|| Error::failed(format!("{of} takes no {} here", value.type_name())))
}

pub(super) fn text(value: &Value, of: &str) -> Result<Rc<str>, Error> {
    let text = value.as_str().cloned();
    text.ok_or_else(|| Error::failed(format!("{of} takes no {} here", value.type_name())))
}

pub(super) fn set_named(values: &mut Vec<(String, Value)>, name: &str, value: Value) {
    match values.iter_mut().find(|(n, _)| n == name) {
        Some((_, place)) => *place = value,
        None => values.push((name.to_string(), value)),
    }
}

/// transformers reserves these for Python.
pub(super) fn check_namespace_name(name: &str) -> Result<(), Error> {
    match name.starts_with('_') {
        true => Err(Error::failed(format!(
            "a namespace cannot hold {name:?}: the name begins with an underscore"
        ))),
        false => Ok(()),
    }
}

/// Entries of `dict(…)` and `namespace(…)`.
fn entries(of: &str, args: Args) -> Result<Dict, Error> {
    let mut dict = Dict::default();
    if args.positional.len() > 1 {
        return Err(Error::failed(format!("{of} takes one dict or list of pairs")));
    }
    match args.positional.first() {
        None => {}
        Some(Value::Dict(given)) => dict = (**given).clone(),
        Some(given) => {
            for pair in given.iterate()? {
                let pair = pair.iterate()?;
                let [key, value] = &pair[..] else {
                    return Err(Error::failed(format!("{of} takes pairs")));
                };
                dict.set(key.clone(), value.clone())?;
            }
        }
    }
    for (name, value) in args.named {
        dict.set(Value::str(name), value)?;
    }
    Ok(dict)
}

pub(super) fn function(name: &'static str, args: Args) -> Result<Value, Error> {
    let object = |object| Ok(Value::Object(Rc::new(object)));
    match name {
        "raise_exception" => {
            let [message] = args.bind(name, &["message"])?;
            Err(Error::Raised(need(message, name)?.to_text()?.to_string()))
        }
        "strftime_now" => {
            let [format] = args.bind(name, &["format"])?;
            let format = text(&need(format, name)?, name)?;
            strftime(&format, &chrono::Local::now().naive_local()).map(Value::str)
        }
        "dict" => entries(name, args).map(|dict| Value::Dict(Rc::new(dict))),
        "namespace" => {
            let mut values = Vec::new();
            for (key, value) in entries(name, args)?.0 {
                let Some(key) = key.as_str() else {
                    return Err(Error::unsupported("a namespace whose names are not text"));
                };
                check_namespace_name(key)?;
                values.push((key.to_string(), value));
            }
            object(Object::Namespace(RefCell::new(values)))
        }
        "range" => {
            let bounds: Vec<i128> = args
                .unnamed(name)?
                .iter()
                .map(|value| int(value, name))
                .collect::<Result<_, _>>()?;
            let (start, stop, step) = match bounds[..] {
                [stop] => (0, stop, 1),
                [start, stop] => (start, stop, 1),
                [start, stop, step] if step != 0 => (start, stop, step),
                _ => {
                    return Err(Error::failed(
                        "range takes one to three numbers, and a step that is not zero",
                    ));
                }
            };
            // Differences stay within the type's range.
            if [start, stop, step].iter().any(|n| n.abs() > 1 << 100) {
                return Err(Error::failed("range is too large"));
            }
            let range = Range { start, stop, step };
            match range.len() > 100_000 {
                true => Err(Error::failed(
                    "range is larger than 100000, which Jinja's sandbox does not allow",
                )),
                false => Ok(Value::Range(range)),
            }
        }
        "joiner" => {
            let [separator] = args.bind(name, &["sep"])?;
            object(Object::Joiner(
                separator.unwrap_or_else(|| Value::str(", ")),
                Cell::new(false),
            ))
        }
        "cycler" => {
            let items = args.unnamed(name)?;
            match items.is_empty() {
                true => Err(Error::failed("cycler needs items")),
                false => object(Object::Cycler(items, Cell::new(0))),
            }
        }
        name => Err(Error::unsupported(format!("the function {name:?}"))),
    }
}
