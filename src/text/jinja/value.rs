//! Values in templates: Python's, with its printing, equality, order and truth.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::rc::{Rc, Weak};

use super::Error;
use super::ast::{For, Macro};
use super::eval::Frame;

/// Maximum nesting of values.
pub(super) const MOST_NESTED: usize = 100;

#[derive(Clone)]
pub(super) enum Value {
    /// The missing name or attribute.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Rc<str>),
    /// Marked as safe HTML, which Python calls Markup.
    Safe(Rc<str>),
    List(Rc<Vec<Value>>),
    Tuple(Rc<Vec<Value>>),
    /// A group of `groupby`: the common value, and the list.
    Group(Rc<Vec<Value>>),
    Dict(Rc<Dict>),
    /// `dict.items()` and similar views.
    View(View, Rc<Dict>),
    Range(Range),
    /// A generator: its items are produced once, on demand.
    Stream(Rc<Stream>),
    Object(Rc<Object>),
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

impl Range {
    pub fn len(&self) -> usize {
        let span = match self.step > 0 {
            true => self.stop - self.start,
            false => self.start - self.stop,
        };
        let step = self.step.abs();
        usize::try_from(span.max(0).div_euclid(step) + i128::from(span.max(0).rem_euclid(step) > 0))
            .unwrap_or(usize::MAX)
    }

    pub fn get(&self, index: usize) -> i128 {
        self.start + self.step * index as i128
    }
}

/// Produces the items of a generator.
type Make = Box<dyn FnOnce() -> Result<Vec<Value>, Error>>;

/// See [`Value::Stream`].
pub(super) struct Stream {
    make: RefCell<Option<Make>>,
    items: RefCell<std::collections::VecDeque<Value>>,
    /// Number of chained source generators.
    depth: usize,
}

impl Stream {
    fn fill(&self) -> Result<(), Error> {
        let make = self.make.borrow_mut().take();
        if let Some(make) = make {
            let items = make()?;
            self.items.borrow_mut().extend(items);
        }
        Ok(())
    }

    /// The next item.
    pub fn next(&self) -> Result<Option<Value>, Error> {
        self.fill()?;
        Ok(self.items.borrow_mut().pop_front())
    }

    fn rest(&self) -> Result<Vec<Value>, Error> {
        self.fill()?;
        Ok(self.items.borrow_mut().drain(..).collect())
    }
}

/// Keys in the order they were first set.
#[derive(Clone, Default)]
pub(super) struct Dict(pub Vec<(Value, Value)>);

impl Dict {
    pub fn get(&self, key: &Value) -> Option<&Value> {
        self.0.iter().find(|(k, _)| equal(k, key)).map(|(_, v)| v)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        let is = |k: &Value| matches!(k, Value::Str(k) | Value::Safe(k) if **k == *key);
        self.0.iter().find(|(k, _)| is(k)).map(|(_, v)| v)
    }

    /// An equal key keeps its first form.
    pub fn set(&mut self, key: Value, value: Value) -> Result<(), Error> {
        hashable(&key)?;
        match self.0.iter_mut().find(|(k, _)| equal(k, &key)) {
            Some((_, place)) => *place = value,
            None => self.0.push((key, value)),
        }
        Ok(())
    }
}

/// Callables, and objects with a state.
pub(super) enum Object {
    Function(&'static str),
    Method(Value, &'static str),
    /// With its defining scope, which may contain it.
    Macro(Rc<Macro>, Weak<Frame>),
    Namespace(RefCell<Vec<(String, Value)>>),
    Joiner(Value, Cell<bool>),
    Cycler(Vec<Value>, Cell<usize>),
    Loop(Loop),
}

/// `loop` of a `for`.
pub(super) struct Loop {
    pub items: Vec<Value>,
    pub index: Cell<usize>,
    pub depth: usize,
    pub last_changed: RefCell<Option<Vec<Value>>>,
    pub recursive: Option<(Rc<For>, Weak<Frame>)>,
}

impl Value {
    pub fn str(text: impl AsRef<str>) -> Self {
        Value::Str(text.as_ref().into())
    }

    pub fn list(items: Vec<Value>) -> Self {
        Value::List(Rc::new(items))
    }

    pub fn tuple(items: Vec<Value>) -> Self {
        Value::Tuple(Rc::new(items))
    }

    pub fn stream(items: Vec<Value>) -> Self {
        Value::Stream(Rc::new(Stream {
            make: RefCell::new(None),
            items: RefCell::new(items.into()),
            depth: 0,
        }))
    }

    /// A generator over the items of `source`, which are read when the first one is requested.
    pub fn generator(
        source: &Value,
        make: impl FnOnce(&Value) -> Result<Vec<Value>, Error> + 'static,
    ) -> Result<Self, Error> {
        let depth = match source {
            Value::Stream(stream) => stream.depth + 1,
            _ => 0,
        };
        if depth > MOST_NESTED {
            return Err(Error::unsupported(format!(
                "more than {MOST_NESTED} generators one over the other"
            )));
        }
        let source = source.clone();
        Ok(Value::Stream(Rc::new(Stream {
            make: RefCell::new(Some(Box::new(move || make(&source)))),
            items: RefCell::default(),
            depth,
        })))
    }

    pub fn undefined(what: impl AsRef<str>) -> Self {
        Value::Undefined(what.as_ref().into())
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Value::Undefined(_))
    }

    /// The text of a string, safe or not.
    pub fn as_str(&self) -> Option<&Rc<str>> {
        match self {
            Value::Str(text) | Value::Safe(text) => Some(text),
            _ => None,
        }
    }

    /// A number for an index or a count; `true` is 1.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(number) => Some(*number),
            Value::Bool(is) => Some(i128::from(*is)),
            _ => None,
        }
    }

    pub fn as_number(&self) -> Option<f64> {
        match self {
            Value::Float(number) => Some(*number),
            other => other.as_int().map(|number| number as f64),
        }
    }

    /// Python's name of the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Safe(_) => "Markup",
            Value::List(_) => "list",
            Value::Tuple(_) | Value::Group(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::View(View::Keys, _) => "dict_keys",
            Value::View(View::Values, _) => "dict_values",
            Value::View(View::Items, _) => "dict_items",
            Value::Range(_) => "range",
            Value::Stream(_) => "generator",
            Value::Object(object) => match &**object {
                Object::Function(_) => "function",
                Object::Method(..) => "method",
                Object::Macro(..) => "Macro",
                Object::Namespace(_) => "Namespace",
                Object::Joiner(..) => "Joiner",
                Object::Cycler(..) => "Cycler",
                Object::Loop(_) => "LoopContext",
            },
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(is) => *is,
            Value::Int(number) => *number != 0,
            Value::Float(number) => *number != 0.0,
            Value::Str(text) | Value::Safe(text) => !text.is_empty(),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => !items.is_empty(),
            Value::Dict(dict) | Value::View(_, dict) => !dict.0.is_empty(),
            Value::Range(range) => range.len() > 0,
            Value::Object(object) => match &**object {
                Object::Loop(state) => !state.items.is_empty(),
                _ => true,
            },
            Value::Stream(_) => true,
        }
    }

    /// Number of items, if it has one.
    pub fn len(&self) -> Option<usize> {
        match self {
            Value::Undefined(_) => Some(0),
            Value::Str(text) | Value::Safe(text) => Some(text.chars().count()),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => Some(items.len()),
            Value::Dict(dict) | Value::View(_, dict) => Some(dict.0.len()),
            Value::Range(range) => Some(range.len()),
            Value::Object(object) => match &**object {
                Object::Loop(state) => Some(state.items.len()),
                _ => None,
            },
            _ => None,
        }
    }

    /// Its items in iteration order, if it has some and is not a generator.
    pub fn items(&self) -> Option<Vec<Value>> {
        Some(match self {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) | Value::Safe(text) => text.chars().map(|c| Value::str(c.to_string())).collect(),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => items.to_vec(),
            Value::Dict(dict) | Value::View(View::Keys, dict) => dict.0.iter().map(|(k, _)| k.clone()).collect(),
            Value::View(View::Values, dict) => dict.0.iter().map(|(_, v)| v.clone()).collect(),
            Value::View(View::Items, dict) => {
                let pair = |(k, v): &(Value, Value)| Value::tuple(vec![k.clone(), v.clone()]);
                dict.0.iter().map(pair).collect()
            }
            Value::Range(range) => (0..range.len()).map(|i| Value::Int(range.get(i))).collect(),
            _ => return None,
        })
    }

    /// Its items, or why it has none. A generator is consumed.
    pub fn iterate(&self) -> Result<Vec<Value>, Error> {
        if let Value::Stream(stream) = self {
            return stream.rest();
        }
        self.items()
            .ok_or_else(|| Error::failed(format!("{} is not iterable", self.described())))
    }

    /// For messages.
    pub fn described(&self) -> String {
        match self {
            Value::Undefined(what) => format!("{what:?}, which is undefined,"),
            other => format!("a value of type {}", other.type_name()),
        }
    }
}

pub(super) fn too_nested() -> Error {
    Error::unsupported(format!("a value nested more than {MOST_NESTED} levels deep"))
}

/// Refuses to store a value that is nested too deep to be printed or dropped, or that would contain its own container.
/// `steps` is the maximum number of parts.
pub(super) fn check_nesting(
    value: &Value,
    owner: Option<&Rc<Object>>,
    depth: usize,
    steps: &mut usize,
) -> Result<(), Error> {
    if depth > MOST_NESTED || *steps == 0 {
        return Err(too_nested());
    }
    *steps -= 1;
    let mut inner = |value: &Value| check_nesting(value, owner, depth + 1, steps);
    match value {
        Value::List(items) | Value::Tuple(items) | Value::Group(items) => items.iter().try_for_each(inner),
        Value::Dict(dict) | Value::View(_, dict) => {
            dict.0.iter().try_for_each(|(k, v)| inner(k).and_then(|()| inner(v)))
        }
        Value::Stream(stream) => stream.items.borrow().iter().try_for_each(inner),
        Value::Object(object) => {
            if owner.is_some_and(|owner| Rc::ptr_eq(owner, object)) {
                return Err(Error::unsupported("a namespace inside itself"));
            }
            match &**object {
                Object::Namespace(values) => values.borrow().iter().try_for_each(|(_, value)| inner(value)),
                Object::Method(of, _) | Object::Joiner(of, _) => inner(of),
                Object::Cycler(items, _) => items.iter().try_for_each(inner),
                Object::Loop(state) => state.items.iter().try_for_each(inner),
                Object::Function(_) | Object::Macro(..) => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

fn sequence(value: &Value) -> Option<(u8, &[Value])> {
    match value {
        Value::List(items) => Some((0, items)),
        Value::Tuple(items) | Value::Group(items) => Some((1, items)),
        _ => None,
    }
}

/// `a == b`.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return a == b;
    }
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return a == b;
    }
    if let (Some(a), Some(b)) = (a.as_number(), b.as_number()) {
        return a == b;
    }
    if let (Some((kind, a)), Some((other, b))) = (sequence(a), sequence(b)) {
        return kind == other && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b));
    }
    match (a, b) {
        (Value::None, Value::None) | (Value::Undefined(_), Value::Undefined(_)) => true,
        (Value::Dict(a), Value::Dict(b)) => {
            let same = |(key, value): &(Value, Value)| b.get(key).is_some_and(|other| equal(value, other));
            a.0.len() == b.0.len() && a.0.iter().all(same)
        }
        (Value::Range(a), Value::Range(b)) => {
            a.len() == b.len() && (a.len() == 0 || a.start == b.start && (a.len() == 1 || a.step == b.step))
        }
        _ => is_same(a, b),
    }
}

/// Whether two values are the same object with a state.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => match (&**a, &**b) {
            (Object::Function(a), Object::Function(b)) => a == b,
            _ => Rc::ptr_eq(a, b),
        },
        (Value::Stream(a), Value::Stream(b)) => Rc::ptr_eq(a, b),
        _ => false,
    }
}

/// `a < b` and the other comparisons; an error for values without an order.
pub(super) fn compare(a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Some(a.chars().cmp(b.chars())));
    }
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (a.as_number(), b.as_number()) {
        return Ok(a.partial_cmp(&b));
    }
    if let (Some((kind, items)), Some((other, others))) = (sequence(a), sequence(b))
        && kind == other
    {
        for (a, b) in items.iter().zip(others) {
            if !equal(a, b) {
                return compare(a, b);
            }
        }
        return Ok(Some(items.len().cmp(&others.len())));
    }
    Err(Error::failed(format!(
        "{} and {} have no order",
        a.described(),
        b.described()
    )))
}

/// Refuses what cannot be a key.
pub(super) fn hashable(value: &Value) -> Result<(), Error> {
    match value {
        Value::List(_) | Value::Dict(_) | Value::View(..) => Err(Error::failed(format!(
            "{} cannot be the key of a dict",
            value.described()
        ))),
        Value::Tuple(items) | Value::Group(items) => items.iter().try_for_each(hashable),
        _ => Ok(()),
    }
}
