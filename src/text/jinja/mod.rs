//! Jinja with the environment of transformers' chat templates.
//!
//! Input: a template's source and variables. Output: text. The environment is that of transformers' chat templates:
//! Jinja's immutable sandbox with `trim_blocks` and `lstrip_blocks`, loop controls, `generation` blocks, `tojson`
//! without HTML escapes, `raise_exception` and `strftime_now`; values are Python's. Rendered text is identical to
//! Jinja's. Unsupported features, and output that only Python can produce (an address), are refused by name. `names`
//! lists everything in the environment, and whether it is supported.

mod arithmetic;
mod ast;
mod attributes;
mod call;
mod checks;
mod eval;
mod expressions;
mod filters;
mod html;
mod json;
mod lexer;
mod methods;
pub mod names;
mod numbers;
mod operators;
mod order;
mod parser;
mod percent;
mod print;
mod str_format;
mod strftime;
mod text;
mod value;
mod wrap;

use std::rc::Rc;

use value::{Dict, Value};

/// Why a template cannot be rendered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// Invalid syntax.
    #[error("line {line}: {message}")]
    Syntax {
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// It called `raise_exception` with this message.
    #[error("{0}")]
    Raised(String),
    /// It uses a feature of Jinja that this renderer does not support.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// Jinja fails here, too.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    fn syntax(line: usize, message: impl Into<String>) -> Self {
        Error::Syntax {
            line,
            message: message.into(),
        }
    }

    fn unsupported(what: impl Into<String>) -> Self {
        Error::Unsupported(what.into())
    }

    fn failed(message: impl Into<String>) -> Self {
        Error::Failed(message.into())
    }
}

/// A variable of a template.
#[derive(Clone, Debug)]
pub enum Variable {
    /// `none`
    None,
    /// `true` or `false`
    Bool(bool),
    /// A whole number
    Int(i64),
    /// Another number
    Float(f64),
    /// Text
    Text(String),
    /// A list
    List(Vec<Variable>),
    /// A dict with text as keys
    Dict(Vec<(String, Variable)>),
}

impl From<&serde_json::Value> for Variable {
    /// With the types of Python's `json`.
    fn from(value: &serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Variable::None,
            serde_json::Value::Bool(is) => Variable::Bool(*is),
            serde_json::Value::Number(number) => match number.as_i64() {
                Some(number) => Variable::Int(number),
                None => Variable::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Variable::Text(text.clone()),
            serde_json::Value::Array(items) => Variable::List(items.iter().map(Variable::from).collect()),
            serde_json::Value::Object(items) => {
                let pairs = items.iter().map(|(key, value)| (key.clone(), Variable::from(value)));
                Variable::Dict(pairs.collect())
            }
        }
    }
}

impl Variable {
    fn value(&self) -> Value {
        match self {
            Variable::None => Value::None,
            Variable::Bool(is) => Value::Bool(*is),
            Variable::Int(number) => Value::Int((*number).into()),
            Variable::Float(number) => Value::Float(*number),
            Variable::Text(text) => Value::str(text),
            Variable::List(items) => Value::list(items.iter().map(Variable::value).collect()),
            Variable::Dict(items) => {
                let pairs = items.iter().map(|(key, value)| (Value::str(key), value.value()));
                Value::Dict(Rc::new(Dict(pairs.collect())))
            }
        }
    }
}

/// The text of a template.
pub fn render<'a>(source: &str, variables: impl IntoIterator<Item = (&'a str, Variable)>) -> Result<String, Error> {
    let template = parser::parse(source)?;
    let variables = variables
        .into_iter()
        .map(|(name, value)| (name.to_string(), value.value()));
    eval::render(&template, variables.collect())
}
