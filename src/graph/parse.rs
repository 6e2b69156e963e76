//! Reads the text form of a graph, as [`dump`](super::dump()) writes it.
//!
//! The parser restores what a dump omits: the bytes of constants with more than eight elements ([`parse_with`] requests
//! them, [`parse`] leaves them absent), the origins of constants, and the name of a node whose output is named after
//! it. So `dump(parse(dump(graph)))` is `dump(graph)`. A canonical graph gets the interface that follows from its
//! names. In a graph written by hand, a constant can also be `= random(7)`, random elements with that seed, or `=
//! full(0.5)`; `from a.name` at the end of its line names its origin, which makes it a weight. The types of a node's
//! output and of a graph output can be omitted; inference finds them.

use std::cell::RefCell;

use super::op::{AttributeError, AttributeSource};
use super::{Constant, Definition, Graph, LAPIDARY, MICROSOFT, Op, Shape, ValueId};
use crate::dim::Dim;
use crate::ir_text::{self, Cursor, Lines, ParseError, Parsed};
use crate::tensor::{DType, Tensor};

/// The graph of a dump. Constants whose elements the text does not show are absent.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    parse_with(text, |_, dtype, shape| Constant::absent(dtype, shape.to_vec()))
}

/// The graph of a dump. `fill` provides constants whose elements the text does not show, by name, dtype and shape.
pub fn parse_with(text: &str, fill: impl FnMut(&str, DType, &[usize]) -> Constant) -> Result<Graph, ParseError> {
    let mut lines = Lines::of(text);
    let mut parser = Parser {
        graph: Graph::default(),
        fill,
        awaited: Vec::new(),
    };
    parser.header(lines.next("\"graph\"")?)?;
    lines.title("inputs")?;
    while let Some(line) = lines.item() {
        parser.input(line)?;
    }
    if lines.eat_title("constants") {
        while let Some(line) = lines.item() {
            parser.constant(line)?;
        }
    }
    lines.title("nodes")?;
    while let Some(line) = lines.item() {
        parser.node(line)?;
    }
    lines.title("outputs")?;
    while let Some(line) = lines.item() {
        parser.output(line)?;
    }
    lines.end()?;
    match parser
        .awaited
        .into_iter()
        .find(|(value, _)| is_dead(&parser.graph, *value))
    {
        Some((_, error)) => Err(error),
        None => {
            let mut graph = parser.graph;
            // A text has only names. A graph that is not canonical has no interface.
            let _ = graph.set_canonical_interface();
            Ok(graph)
        }
    }
}

fn is_dead(graph: &Graph, value: ValueId) -> bool {
    matches!(graph.value(value).definition, Definition::Dead)
}

struct Parser<F> {
    graph: Graph,
    fill: F,
    /// Values that were read before their definition, with the error if there is none.
    awaited: Vec<(ValueId, ParseError)>,
}

/// `name: dtype[shape]`.
struct Typed {
    name: String,
    at: usize,
    dtype: Option<DType>,
    shape: Option<Shape>,
}

impl Typed {
    fn read(line: &mut Cursor) -> Parsed<Typed> {
        let at = line.position();
        let name = read_name(line)?;
        if !line.eat(": ") {
            return Ok(Typed {
                name,
                at,
                dtype: None,
                shape: None,
            });
        }
        let dtype = match line.eat("?") {
            true => None,
            false => Some(line.dtype()?),
        };
        let shape = match line.eat("[?]") {
            true => None,
            false => Some(line.shape()?),
        };
        Ok(Typed { name, at, dtype, shape })
    }
}

/// A value's name: bare ones may hold colons, but do not end with one.
fn read_name(line: &mut Cursor) -> Parsed<String> {
    if line.rest().starts_with('"') {
        return line.name(&[]);
    }
    let rest = line.rest();
    let end = rest.find([',', ' ']).unwrap_or(rest.len());
    let end = if rest[..end].ends_with(':') { end - 1 } else { end };
    let name = &rest[..end];
    if name.is_empty() || name == "=" {
        return Err(line.error("a name"));
    }
    line.eat(name);
    Ok(name.to_string())
}

impl<F: FnMut(&str, DType, &[usize]) -> Constant> Parser<F> {
    fn header(&mut self, mut line: Cursor) -> Parsed<()> {
        line.expect("graph")?;
        if line.eat(" ") && !line.rest().starts_with('(') {
            self.graph.name = line.name(&[])?;
            line.eat(" ");
        }
        if line.eat("(") {
            self.producer(&mut line)?;
            while !line.eat(")") {
                line.expect(", ")?;
                self.opset(&mut line)?;
            }
        }
        line.expect_end()
    }

    /// The first entry in brackets: the producer, or an opset.
    fn producer(&mut self, line: &mut Cursor) -> Parsed<()> {
        if line.rest().starts_with("opset ") {
            return self.opset(line);
        }
        let producer = &mut self.graph.producer;
        if line.rest().starts_with('"') {
            producer.name = line.name(&[])?;
            if line.eat(" ") {
                producer.version = line.name(&[])?;
            }
            return Ok(());
        }
        let whole = line.take(|c| !matches!(c, ',' | ')'));
        (producer.name, producer.version) = match whole.rsplit_once(' ') {
            Some((name, version)) => (name.to_string(), version.to_string()),
            None => (whole.to_string(), String::new()),
        };
        Ok(())
    }

    fn opset(&mut self, line: &mut Cursor) -> Parsed<()> {
        let domain = match line.eat("opset") {
            true => String::new(),
            false => line.name(&[')'])?,
        };
        line.expect(" ")?;
        let version = line.integer()?;
        self.graph.producer.opsets.push((domain, version));
        Ok(())
    }

    /// A new value, or one that was read already; an error if it is defined.
    fn define(&mut self, line: &Cursor, typed: Typed, what: &str) -> Parsed<ValueId> {
        let id = match self.graph.find(&typed.name) {
            Some(id) if is_dead(&self.graph, id) => id,
            Some(_) => {
                return Err(line.error_at(typed.at, format!("{what} with a name of its own")));
            }
            None => self.graph.add_value(&typed.name),
        };
        let value = self.graph.value_mut(id);
        (value.dtype, value.shape) = (typed.dtype, typed.shape);
        Ok(id)
    }

    fn input(&mut self, mut line: Cursor) -> Parsed<()> {
        let typed = Typed::read(&mut line)?;
        line.expect_end()?;
        let id = self.define(&line, typed, "an input")?;
        self.graph.value_mut(id).definition = Definition::Input;
        self.graph.inputs.push(id);
        Ok(())
    }

    fn constant(&mut self, mut line: Cursor) -> Parsed<()> {
        let start = line.position();
        let typed = Typed::read(&mut line)?;
        let sizes = typed.shape.iter().flatten().map(Dim::as_const);
        let sizes: Option<Vec<usize>> = sizes.map(|d| d.and_then(|d| usize::try_from(d).ok())).collect();
        let (Some(dtype), Some(shape)) = (
            typed.dtype,
            sizes.filter(|sizes| typed.shape.is_some() && ir_text::volume(sizes).is_some()),
        ) else {
            return Err(line.error_at(
                start,
                "a constant whose dtype and sizes are known, and that a machine can address",
            ));
        };
        let mut constant = if line.eat(" = random(") {
            let seed = line.integer()?;
            line.expect(")")?;
            Constant::tensor(ir_text::made_up(dtype, shape, seed))
        } else if line.eat(" = full(") {
            let number = line.number(dtype)?;
            line.expect(")")?;
            let count = shape.iter().product();
            Constant::tensor(ir_text::tensor_of(dtype, shape, &vec![number; count]))
        } else if line.eat(" = ") {
            Constant::tensor(line.elements(dtype, &shape)?)
        } else if line.eat(" (absent)") {
            Constant::absent(dtype, shape)
        } else {
            // The quantization format is useless without the codes.
            if line.eat(" (quantized: ") {
                line.take(|c| c != ')');
                line.expect(")")?;
            }
            (self.fill)(&typed.name, dtype, &shape)
        };
        if line.eat(" from ") {
            constant = constant.with_origin(&line.name(&[])?);
        }
        line.expect_end()?;
        let id = self.define(&line, typed, "a constant")?;
        self.graph.set_constant(id, constant);
        Ok(())
    }

    fn node(&mut self, mut line: Cursor) -> Parsed<()> {
        let mut outputs = Vec::new();
        if !line.eat(" = ") {
            loop {
                outputs.push(match line.rest().starts_with("_,") || line.rest().starts_with("_ ") {
                    true => {
                        line.eat("_");
                        None
                    }
                    false => {
                        let typed = Typed::read(&mut line)?;
                        Some(self.define(&line, typed, "an output")?)
                    }
                });
                if line.eat(" = ") {
                    break;
                }
                if !line.eat(", ") {
                    return Err(line.error("\", \" or \" = \""));
                }
            }
        }
        let op = operator(&mut line)?;
        let mut inputs = Vec::new();
        if !line.at_end() && !line.rest().starts_with("  #") {
            line.expect(" ")?;
            loop {
                inputs.push(self.operand(&mut line)?);
                if !line.eat(", ") {
                    break;
                }
            }
        }
        let name = match line.eat("  # ") {
            true if line.rest().starts_with('"') => line.name(&[])?,
            true => line.take_rest().to_string(),
            false => match outputs.iter().flatten().next() {
                Some(output) => self.graph.value(*output).name.clone(),
                None => String::new(),
            },
        };
        line.expect_end()?;
        self.graph.add_node_with_outputs(&name, op, inputs, outputs);
        Ok(())
    }

    fn operand(&mut self, line: &mut Cursor) -> Parsed<Option<ValueId>> {
        let at = line.position();
        let name = match line.rest().starts_with('"') {
            true => line.name(&[])?,
            false => match line.name(&[])? {
                left_out if left_out == "_" => return Ok(None),
                name => name,
            },
        };
        Ok(Some(match self.graph.find(&name) {
            Some(id) => id,
            None => {
                let id = self.graph.add_value(&name);
                self.awaited.push((id, line.error_at(at, "a value that is defined")));
                id
            }
        }))
    }

    fn output(&mut self, mut line: Cursor) -> Parsed<()> {
        let typed = Typed::read(&mut line)?;
        let end = line.position();
        if let Some(id) = self.graph.find(&typed.name) {
            let value = self.graph.value(id);
            let given = typed.dtype.is_some() || typed.shape.is_some();
            if given && (value.dtype, &value.shape) != (typed.dtype, &typed.shape) {
                return Err(line.error_at(typed.at, "the type that the value has where it is defined"));
            }
            // A constant's elements are repeated here.
            line.take_rest();
            self.graph.outputs.push(id);
            return Ok(());
        }
        Err(line.error_at(typed.at.min(end), "a value that is defined"))
    }
}

/// An operator with its attributes, up to its operands.
fn operator(line: &mut Cursor) -> Parsed<Op> {
    let start = line.position();
    if line.rest().starts_with('"') {
        let domain = line.name(&[])?;
        line.expect("::")?;
        let op_type = line.name(&[])?;
        return Ok(Op::Unknown { domain, op_type });
    }
    let name = line.name(&['('])?;
    let attributes = Listed::read(line)?;
    let (domain, op_type) = name.rsplit_once("::").unwrap_or(("", &name));
    let read = |domain: &str| {
        Op::read(domain, op_type, &attributes).map_err(|misfit| match misfit {
            Misfit::Text(error) => error,
            Misfit::Attribute(AttributeError::Malformed(reason)) => {
                line.error_at(start, format!("attributes that fit ({reason})"))
            }
            Misfit::Attribute(AttributeError::Unsupported(detail)) => {
                line.error_at(start, format!("an attribute of a known value, not {detail}"))
            }
        })
    };
    let mut op = read(domain)?;
    for other in [MICROSOFT, LAPIDARY] {
        if op.is_none() && domain.is_empty() {
            op = read(other)?;
        }
    }
    match (op, attributes.unread()) {
        (Some(op), None) => Ok(op),
        (_, Some((at, name))) => Err(line.error_at(at, format!("an attribute of {op_type}, which {name} is not"))),
        (None, None) if op_type.is_empty() => Err(line.error_at(start, "an operator")),
        (None, None) => Ok(Op::Unknown {
            domain: domain.to_string(),
            op_type: op_type.to_string(),
        }),
    }
}

/// Attributes in brackets, read on demand.
struct Listed<'a> {
    list: Vec<Item<'a>>,
    read: RefCell<Vec<String>>,
    /// The line, for errors.
    line: Cursor<'a>,
}

struct Item<'a> {
    name: &'a str,
    at: usize,
    value_at: usize,
}

impl<'a> Listed<'a> {
    fn read(line: &mut Cursor<'a>) -> Parsed<Self> {
        let mut list = Vec::new();
        if line.eat("(") {
            loop {
                let at = line.position();
                let name = line.take(|c| c.is_alphanumeric() || c == '_');
                line.expect("=")?;
                let value_at = line.position();
                let mut depth = 0;
                let mut end = None;
                for (i, c) in line.rest().char_indices() {
                    match c {
                        '[' => depth += 1,
                        ']' => depth -= 1,
                        ',' | ')' if depth == 0 => {
                            end = Some(i);
                            break;
                        }
                        _ => {}
                    }
                }
                let end = end.ok_or_else(|| line.error("an attribute's value and \")\""))?;
                let value = &line.rest()[..end];
                line.eat(value);
                list.push(Item { name, at, value_at });
                if line.eat(")") {
                    break;
                }
                line.expect(", ")?;
            }
        }
        Ok(Listed {
            list,
            read: RefCell::default(),
            line: line.clone(),
        })
    }

    fn get<T>(&self, name: &str, value: impl FnOnce(&mut Cursor<'a>) -> Parsed<T>) -> Parsed<Option<T>> {
        let Some(item) = self.list.iter().find(|item| item.name == name) else {
            return Ok(None);
        };
        self.read.borrow_mut().push(name.to_string());
        let mut cursor = self.line.clone();
        cursor.go_to(item.value_at);
        let value = value(&mut cursor)?;
        match cursor.rest().starts_with([',', ')']) {
            true => Ok(Some(value)),
            false => Err(cursor.error("the end of the attribute")),
        }
    }

    fn unread(&self) -> Option<(usize, &'a str)> {
        let read = self.read.borrow();
        let unread = self.list.iter().find(|item| !read.iter().any(|name| name == item.name));
        unread.map(|item| (item.at, item.name))
    }
}

/// Why an operator's attributes do not fit.
enum Misfit {
    /// The text of an attribute.
    Text(ParseError),
    /// The reason.
    Attribute(AttributeError),
}

impl From<AttributeError> for Misfit {
    fn from(error: AttributeError) -> Self {
        Misfit::Attribute(error)
    }
}

impl From<ParseError> for Misfit {
    fn from(error: ParseError) -> Self {
        Misfit::Text(error)
    }
}

impl AttributeSource for Listed<'_> {
    type Error = Misfit;

    fn int(&self, name: &str) -> Result<Option<i64>, Misfit> {
        Ok(self.get(name, |c| c.integer())?)
    }
    fn float(&self, name: &str) -> Result<Option<f32>, Misfit> {
        Ok(self.get(name, |c| Ok(c.number(DType::F32)?.float as f32))?)
    }
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, Misfit> {
        Ok(self.get(name, |c| c.list(Cursor::integer))?)
    }
    fn text(&self, name: &str) -> Result<Option<String>, Misfit> {
        Ok(self.get(name, |c| Ok(c.take(char::is_alphanumeric).to_string()))?)
    }
    fn dtype(&self, name: &str) -> Result<Option<DType>, Misfit> {
        Ok(self.get(name, |c| c.dtype())?)
    }
    fn tensor(&self, name: &str) -> Result<Option<Tensor>, Misfit> {
        Ok(self.get(name, |c| {
            let dtype = c.dtype()?;
            c.expect(" ")?;
            // The text has no shape: a single number is a scalar, a list is a vector.
            match c.rest().starts_with('[') {
                false => c.elements(dtype, &[]),
                true => {
                    let numbers = c.list(|c| c.number(dtype))?;
                    Ok(ir_text::tensor_of(dtype, vec![numbers.len()], &numbers))
                }
            }
        })?)
    }
    fn ignore(&self, _: &[&str]) {}
}
