//! Runs a syntax tree: statements write text, expressions return values.
//!
//! Scopes are Jinja's: a variable set in an `if` is visible after it, one set in a loop, a macro or a `with` is not.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::ast::{Arguments, Body, Expr, Filter, For, Literal, Macro, Statement, Target};
use super::call::{self, Args};
use super::operators::{LARGEST, binary, compared, slice, unary};
use super::value::{Dict, Loop, Object, Value, check_nesting};
use super::{Error, attributes, checks, filters, methods, names};

/// Maximum steps of a template: more than any chat needs, and a limit for nested loops.
const MOST_STEPS: u64 = 5_000_000;
/// Maximum nesting of calls, loops and expressions.
const DEEPEST: usize = 200;

/// Maximum parts of a value in a variable.
const MOST_PARTS: usize = 1 << 20;

/// Names of one scope.
pub(super) struct Frame {
    names: RefCell<Vec<(String, Value)>>,
    parent: Option<Rc<Frame>>,
}

impl Frame {
    fn child(parent: &Rc<Frame>) -> Rc<Frame> {
        Rc::new(Frame {
            names: RefCell::default(),
            parent: Some(parent.clone()),
        })
    }

    fn set(&self, name: &str, value: Value) {
        let mut names = self.names.borrow_mut();
        match names.iter_mut().find(|(n, _)| n == name) {
            Some((_, place)) => *place = value,
            None => names.push((name.to_string(), value)),
        }
    }

    fn get(&self, name: &str) -> Option<Value> {
        let mut frame = Some(self);
        while let Some(here) = frame {
            if let Some((_, value)) = here.names.borrow().iter().find(|(n, _)| n == name) {
                return Some(value.clone());
            }
            frame = here.parent.as_deref();
        }
        None
    }
}

/// What follows a statement.
#[derive(PartialEq)]
enum Flow {
    Next,
    Break,
    Continue,
}

pub(super) fn render(template: &Body, variables: Vec<(String, Value)>) -> Result<String, Error> {
    let run = Run {
        steps: Cell::new(0),
        depth: Cell::new(0),
        loops: Cell::new(0),
    };
    let root = Rc::new(Frame {
        names: RefCell::new(variables),
        parent: None,
    });
    let mut out = String::new();
    run.body(template, &Frame::child(&root), &mut out)?;
    Ok(out)
}

fn gone(name: &str) -> Error {
    Error::unsupported(format!("{name:?} outside of the scope it was defined in"))
}

pub(super) struct Run {
    steps: Cell<u64>,
    depth: Cell<usize>,
    /// Nesting of recursive loops.
    loops: Cell<usize>,
}

impl Run {
    fn step(&self) -> Result<(), Error> {
        self.steps(1)
    }

    fn steps(&self, count: u64) -> Result<(), Error> {
        self.steps.set(self.steps.get() + count);
        match self.steps.get() > MOST_STEPS {
            true => Err(Error::unsupported(format!(
                "a template that takes more than {MOST_STEPS} steps"
            ))),
            false => Ok(()),
        }
    }

    fn deeper<T>(&self, run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        if self.depth.get() >= DEEPEST {
            return Err(Error::unsupported(format!(
                "a template that nests more than {DEEPEST} levels deep"
            )));
        }
        self.depth.set(self.depth.get() + 1);
        let result = run();
        self.depth.set(self.depth.get() - 1);
        result
    }

    fn body(&self, body: &[Statement], frame: &Rc<Frame>, out: &mut String) -> Result<Flow, Error> {
        for statement in body {
            let flow = self.deeper(|| self.statement(statement, frame, out))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, statement: &Statement, frame: &Rc<Frame>, out: &mut String) -> Result<Flow, Error> {
        self.step()?;
        match statement {
            Statement::Text(text) => out.push_str(text),
            Statement::Print(expression) => out.push_str(&self.value(expression, frame)?.to_text()?),
            Statement::If { branches, otherwise } => {
                for (condition, body) in branches {
                    if self.value(condition, frame)?.is_true() {
                        return self.body(body, frame, out);
                    }
                }
                return self.body(otherwise, frame, out);
            }
            Statement::For(item) => {
                let over = self.value(&item.over, frame)?;
                self.for_loop(item, over, frame, out)?;
            }
            Statement::Set(target, expression) => {
                let value = self.value(expression, frame)?;
                self.assign(target, value, frame)?;
            }
            Statement::SetBlock { target, filter, body } => {
                let value = self.captured(body, filter, frame)?;
                self.assign(target, value, frame)?;
            }
            Statement::FilterBlock { filter, body } => {
                out.push_str(&self.captured(body, filter, frame)?.to_text()?);
            }
            Statement::Macro(item) => {
                let value = Value::Object(Rc::new(Object::Macro(item.clone(), Rc::downgrade(frame))));
                frame.set(&item.name, value);
            }
            Statement::Call { call, body } => {
                let Expr::Call(callee, arguments) = call else {
                    unreachable!("the parser takes nothing else");
                };
                let callee = self.value(callee, frame)?;
                let mut args = self.arguments(arguments, frame)?;
                let caller = Value::Object(Rc::new(Object::Macro(body.clone(), Rc::downgrade(frame))));
                args.named.push(("caller".to_string(), caller));
                out.push_str(&self.call(&callee, args)?.to_text()?);
            }
            Statement::With { values, body } => {
                let inner = Frame::child(frame);
                for (target, expression) in values {
                    let value = self.value(expression, frame)?;
                    self.assign(target, value, &inner)?;
                }
                return self.body(body, &inner, out);
            }
            Statement::Generation(item) => out.push_str(&self.call_macro(item, frame, Args::default())?.to_text()?),
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        match out.len() > LARGEST {
            true => Err(Error::unsupported(format!("a prompt of more than {LARGEST} bytes"))),
            false => Ok(Flow::Next),
        }
    }

    /// The output of a body, through filters.
    fn captured(&self, body: &Body, filters: &[Filter], frame: &Rc<Frame>) -> Result<Value, Error> {
        let mut text = String::new();
        self.body(body, &Frame::child(frame), &mut text)?;
        let mut value = Value::str(text);
        for filter in filters {
            value = self.filtered(value, filter, frame)?;
        }
        Ok(value)
    }

    fn assign(&self, target: &Target, value: Value, frame: &Rc<Frame>) -> Result<(), Error> {
        // Stored values can be nested deeper with each expression.
        let mut parts = MOST_PARTS;
        match target {
            Target::Name(name) => {
                check_nesting(&value, None, 0, &mut parts)?;
                frame.set(name, value);
            }
            Target::Tuple(targets) => {
                let values = value.iterate()?;
                if values.len() != targets.len() {
                    let (found, wanted) = (values.len(), targets.len());
                    return Err(Error::failed(format!("{found} values for {wanted} names")));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, frame)?;
                }
            }
            Target::Attribute(name, attribute) => {
                let Value::Object(object) = self.name(name, frame)? else {
                    return Err(Error::failed(format!(
                        "{name:?} is not a namespace, and {attribute:?} of it cannot be set"
                    )));
                };
                let Object::Namespace(values) = &*object else {
                    return Err(Error::failed(format!(
                        "{name:?} is not a namespace, and {attribute:?} of it cannot be set"
                    )));
                };
                call::check_namespace_name(attribute)?;
                check_nesting(&value, Some(&object), 0, &mut parts)?;
                call::set_named(&mut values.borrow_mut(), attribute, value);
            }
        }
        Ok(())
    }

    fn for_loop(&self, item: &Rc<For>, over: Value, frame: &Rc<Frame>, out: &mut String) -> Result<(), Error> {
        let mut items = Vec::new();
        for value in over.iterate()? {
            // A separate scope costs more than an expression.
            self.steps(20)?;
            if let Some(condition) = &item.only {
                let inner = Frame::child(frame);
                self.assign(&item.target, value.clone(), &inner)?;
                if !self.value(condition, &inner)?.is_true() {
                    continue;
                }
            }
            items.push(value);
        }
        if items.is_empty() {
            self.body(&item.otherwise, &Frame::child(frame), out)?;
            return Ok(());
        }
        let state = Rc::new(Object::Loop(Loop {
            items: items.clone(),
            index: Cell::new(0),
            depth: self.loops.get(),
            last_changed: RefCell::default(),
            recursive: item.recursive.then(|| (item.clone(), Rc::downgrade(frame))),
        }));
        // As in Jinja, an iteration that ends early does not count as one.
        let mut any_whole = false;
        for (index, value) in items.into_iter().enumerate() {
            if let Object::Loop(state) = &*state {
                state.index.set(index);
            }
            let inner = Frame::child(frame);
            inner.set("loop", Value::Object(state.clone()));
            self.assign(&item.target, value, &inner)?;
            let flow = self.body(&item.body, &inner, out)?;
            any_whole |= flow == Flow::Next;
            if flow == Flow::Break {
                // The rest of a generator could be used again, but it is unknown how much of it Jinja has consumed.
                if matches!(&over, Value::Stream(stream) if Rc::strong_count(stream) > 1) {
                    return Err(Error::unsupported(
                        "leaving a loop over a generator that is in a variable",
                    ));
                }
                break;
            }
        }
        if !any_whole {
            self.body(&item.otherwise, &Frame::child(frame), out)?;
        }
        Ok(())
    }

    fn name(&self, name: &str, frame: &Rc<Frame>) -> Result<Value, Error> {
        if let Some(value) = frame.get(name) {
            return Ok(value);
        }
        if let Some(name) = names::GLOBALS.iter().find(|global| **global == name) {
            return Ok(Value::Object(Rc::new(Object::Function(name))));
        }
        match name {
            "self" | "super" => Err(Error::unsupported(format!("the name {name:?}"))),
            _ => Ok(Value::undefined(name)),
        }
    }

    fn value(&self, expression: &Expr, frame: &Rc<Frame>) -> Result<Value, Error> {
        self.step()?;
        self.deeper(|| self.expression(expression, frame))
    }

    fn values(&self, all: &[Expr], frame: &Rc<Frame>) -> Result<Vec<Value>, Error> {
        all.iter().map(|expression| self.value(expression, frame)).collect()
    }

    fn expression(&self, expression: &Expr, frame: &Rc<Frame>) -> Result<Value, Error> {
        let value = |expression: &Expr| self.value(expression, frame);
        Ok(match expression {
            Expr::Literal(literal) => match literal {
                Literal::None => Value::None,
                Literal::Bool(is) => Value::Bool(*is),
                Literal::Int(number) => Value::Int(*number),
                Literal::Float(number) => Value::Float(*number),
                Literal::Str(text) => Value::Str(text.clone()),
            },
            Expr::Name(name) => self.name(name, frame)?,
            Expr::List(items) => Value::list(self.values(items, frame)?),
            Expr::Tuple(items) => Value::tuple(self.values(items, frame)?),
            Expr::Dict(pairs) => {
                let mut dict = Dict::default();
                for (key, item) in pairs {
                    dict.set(value(key)?, value(item)?)?;
                }
                Value::Dict(Rc::new(dict))
            }
            Expr::Attribute(of, name) => attributes::attribute(&value(of)?, name)?,
            Expr::Item(of, index) => attributes::item(&value(of)?, &value(index)?)?,
            Expr::Slice(of, bounds) => {
                let of = value(of)?;
                let mut parts = [None; 3];
                for (part, bound) in parts.iter_mut().zip(bounds) {
                    let Some(bound) = bound else { continue };
                    let bound = value(bound)?;
                    *part = bound.as_int();
                    if part.is_none() && !matches!(bound, Value::None) {
                        return Err(Error::failed(format!("{} in a slice", bound.described())));
                    }
                }
                let found = if of.is_undefined() { None } else { slice(&of, parts)? };
                found.ok_or_else(|| Error::failed(format!("{} has no slices", of.described())))?
            }
            Expr::Call(callee, arguments) => {
                let callee = value(callee)?;
                let args = self.arguments(arguments, frame)?;
                self.call(&callee, args)?
            }
            Expr::Filter(of, filter) => self.filtered(value(of)?, filter, frame)?,
            Expr::Test(of, name, arguments) => {
                let of = value(of)?;
                Value::Bool(checks::apply(name, &of, self.arguments(arguments, frame)?)?)
            }
            Expr::Unary(op, of) => unary(op, &value(of)?)?,
            Expr::Binary(op, a, b) => binary(op, &value(a)?, &value(b)?)?,
            Expr::And(a, b) => match value(a)? {
                a if a.is_true() => value(b)?,
                a => a,
            },
            Expr::Or(a, b) => match value(a)? {
                a if a.is_true() => a,
                _ => value(b)?,
            },
            Expr::Not(of) => Value::Bool(!value(of)?.is_true()),
            Expr::Compare(first, rest) => {
                let mut left = value(first)?;
                for (op, right) in rest {
                    let right = value(right)?;
                    if !compared(op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Expr::Concat(all) => {
                let mut text = String::new();
                for part in all {
                    text.push_str(&value(part)?.to_text()?);
                }
                super::operators::check_size(text.len(), 1)?;
                Value::str(text)
            }
            Expr::If(condition, then, otherwise) => match (value(condition)?.is_true(), otherwise) {
                (true, _) => value(then)?,
                (false, Some(otherwise)) => value(otherwise)?,
                (false, None) => Value::undefined("an if without else"),
            },
        })
    }

    fn filtered(&self, value: Value, filter: &Filter, frame: &Rc<Frame>) -> Result<Value, Error> {
        filters::apply(&filter.name, &value, self.arguments(&filter.arguments, frame)?)
    }

    fn arguments(&self, arguments: &Arguments, frame: &Rc<Frame>) -> Result<Args, Error> {
        let mut args = Args {
            positional: self.values(&arguments.positional, frame)?,
            named: Vec::new(),
        };
        for (name, expression) in &arguments.named {
            args.add_named(name, self.value(expression, frame)?)?;
        }
        if let Some(list) = &arguments.list {
            args.positional.extend(self.value(list, frame)?.iterate()?);
        }
        if let Some(dict) = &arguments.dict {
            let Value::Dict(dict) = self.value(dict, frame)? else {
                return Err(Error::failed("the argument after ** is not a dict"));
            };
            for (name, value) in &dict.0 {
                let Some(name) = name.as_str() else {
                    return Err(Error::failed("the names of arguments are not text"));
                };
                args.add_named(name, value.clone())?;
            }
        }
        Ok(args)
    }

    fn call(&self, callee: &Value, args: Args) -> Result<Value, Error> {
        if let Value::Object(object) = callee {
            match &**object {
                Object::Function(name) => return call::function(name, args),
                Object::Method(of, name) => return methods::call(of, name, args),
                Object::Macro(item, frame) => {
                    let frame = frame.upgrade().ok_or_else(|| gone(&item.name))?;
                    return self.deeper(|| self.call_macro(item, &frame, args));
                }
                Object::Joiner(separator, was_used) => {
                    args.bind("joiner", &[])?;
                    return Ok(match was_used.replace(true) {
                        true => separator.clone(),
                        false => Value::str(""),
                    });
                }
                Object::Loop(state) => {
                    let Some((item, frame)) = &state.recursive else {
                        return Err(Error::failed("the loop is not recursive"));
                    };
                    let frame = &frame.upgrade().ok_or_else(|| gone("loop"))?;
                    let [over] = args.bind("loop", &["iterable"])?;
                    let over = over.ok_or_else(|| Error::failed("loop() needs what to go over"))?;
                    let mut out = String::new();
                    self.loops.set(self.loops.get() + 1);
                    let result = self.deeper(|| self.for_loop(item, over, frame, &mut out));
                    self.loops.set(self.loops.get() - 1);
                    result?;
                    return Ok(Value::str(out));
                }
                _ => {}
            }
        }
        Err(Error::failed(format!("{} cannot be called", callee.described())))
    }

    fn call_macro(&self, item: &Rc<Macro>, frame: &Rc<Frame>, args: Args) -> Result<Value, Error> {
        let inner = Frame::child(frame);
        let Args { positional, mut named } = args;
        let mut positional = positional.into_iter();
        let mut take_named = |name: &str| {
            let at = named.iter().position(|(n, _)| n == name)?;
            Some(named.remove(at).1)
        };
        // A default may refer to a parameter, which may have no value yet.
        for (name, _) in &item.parameters {
            inner.set(name, Value::undefined(name));
        }
        for (name, default) in &item.parameters {
            // A parameter given both by position and by name stays, for `kwargs` or to be refused.
            let given = positional.next().or_else(|| take_named(name));
            let value = match (given, default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.value(default, &inner)?,
                (None, None) => continue,
            };
            inner.set(name, value);
        }
        if item.uses_caller {
            let caller = take_named("caller").unwrap_or_else(|| Value::undefined("caller"));
            inner.set("caller", caller);
        }
        let rest: Vec<Value> = positional.collect();
        if item.uses_kwargs {
            let pairs = named.drain(..).map(|(name, value)| (Value::str(name), value)).collect();
            inner.set("kwargs", Value::Dict(Rc::new(Dict(pairs))));
        } else if let Some((name, _)) = named.first() {
            return Err(Error::failed(format!(
                "the macro {:?} takes no argument {name:?}",
                item.name
            )));
        }
        if item.uses_varargs {
            inner.set("varargs", Value::tuple(rest));
        } else if !rest.is_empty() {
            let takes = item.parameters.len();
            return Err(Error::failed(format!(
                "the macro {:?} takes no more than {takes} arguments",
                item.name
            )));
        }
        let mut out = String::new();
        self.body(&item.body, &inner, &mut out)?;
        Ok(Value::str(out))
    }
}
