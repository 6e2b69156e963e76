//! The text form of a graph: one line per node, for readers, snapshots and test files. [`parse`](super::parse) reads it
//! back.
//!
//! ```text
//! graph main (pytorch 2.15.0, opset 18)
//! inputs
//!   input_ids: i64[batch, tokens]
//! constants
//!   embed.weight: f32[320, 64]
//!   axes: i64[1] = [-1]
//! nodes
//!   embed: f32[batch, tokens, 64] = Gather embed.weight, input_ids
//! outputs
//!   logits: f32[batch, tokens, 320]
//! ```
//!
//! The order of lines is that of the graph and names are those of its values, so equal graphs give equal text. A node's
//! own name follows after `#` if it differs from its output's name. Unread constants are omitted, and so are the
//! elements of constants with more than eight elements. A quantized weight has its format in parentheses, `(quantized:
//! u4 in blocks of 32 on axis 1)`; the parser treats it like other constants without elements. `?` is an unknown type.
//! A name with spaces or punctuation is in quotes.

use std::collections::HashSet;
use std::fmt::{self, Display, Write};

use super::{Attribute, Definition, Graph, Node, Op, Shape, ValueId};
use crate::ir_text::{self, MAX_SHOWN};
use crate::tensor::{DType, Tensor};

/// The text form of a graph, made when it is displayed.
pub struct Dump<'a> {
    graph: &'a Graph,
    style: Style,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Can be parsed back.
    Text,
    /// The input of architecture hashes: like [`Style::Text`], but without quotes around names and domains of
    /// operators, and with numbers in the precision of f32.
    Identity,
}

/// See the module's head.
pub fn dump(graph: &Graph) -> Dump<'_> {
    let style = Style::Text;
    Dump { graph, style }
}

/// The text whose BLAKE3 hash is the `architecture_hash` of a package. It must never change for a graph: packages are
/// compared by it. It differs from [`dump`] only in graphs with names that need quotes, f64 constants, or an operator
/// name that occurs in two domains.
pub fn identity_text(graph: &Graph) -> Dump<'_> {
    let style = Style::Identity;
    Dump { graph, style }
}

impl Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let graph = self.graph;
        writeln!(f, "{}", self.header())?;
        self.section(f, "inputs", graph.inputs.iter().copied())?;
        let mut read: HashSet<ValueId> = graph.outputs.iter().copied().chain(graph.embedding).collect();
        for id in graph.node_ids() {
            read.extend(graph.node(id).inputs.iter().flatten());
        }
        let constant = |v: &ValueId| read.contains(v) && graph.constant(*v).is_some();
        self.section(f, "constants", graph.value_ids().filter(constant))?;
        writeln!(f, "nodes")?;
        for id in graph.node_ids() {
            writeln!(f, "  {}", self.node_line(graph.node(id)))?;
        }
        self.section(f, "outputs", graph.outputs.iter().copied())
    }
}

impl Dump<'_> {
    fn name(&self, name: &str) -> String {
        match self.style {
            Style::Text => ir_text::name(name),
            Style::Identity => name.to_string(),
        }
    }

    fn shape(&self, shape: &Shape) -> String {
        match self.style {
            Style::Text => ir_text::shape(shape),
            Style::Identity => format!("{shape:?}"),
        }
    }

    fn header(&self) -> String {
        let producer = &self.graph.producer;
        let mut about: Vec<String> = Vec::new();
        if !producer.name.is_empty() {
            about.push(self.name_of_producer(&producer.name, &producer.version));
        }
        for (domain, version) in &producer.opsets {
            about.push(match domain.as_str() {
                "" => format!("opset {version}"),
                domain => format!("{} {version}", self.name(domain)),
            });
        }
        let mut line = String::from("graph");
        if !self.graph.name.is_empty() {
            let _ = write!(line, " {}", self.name(&self.graph.name));
        }
        if !about.is_empty() {
            let _ = write!(line, " ({})", about.join(", "));
        }
        line
    }

    fn name_of_producer(&self, name: &str, version: &str) -> String {
        let plain = |text: &str| !text.contains([',', '(', ')', '"']) && text.trim() == text;
        let spaced = version.contains(' ') || version.is_empty() && name.contains(' ');
        match self.style {
            Style::Text if !plain(name) || !plain(version) || spaced || name == "opset" => match version {
                "" => format!("{name:?}"),
                version => format!("{name:?} {version:?}"),
            },
            _ => format!("{name} {version}").trim().to_string(),
        }
    }

    fn section(&self, f: &mut fmt::Formatter<'_>, title: &str, values: impl Iterator<Item = ValueId>) -> fmt::Result {
        writeln!(f, "{title}")?;
        for value in values {
            writeln!(f, "  {}{}", self.typed(value), self.shown(value))?;
        }
        Ok(())
    }

    /// `name: dtype[shape]`, with `?` for what is unknown.
    fn typed(&self, value: ValueId) -> String {
        let value = self.graph.value(value);
        let name = self.name(&value.name);
        let dtype = value.dtype.map_or("?", |d| d.name());
        match &value.shape {
            Some(shape) => format!("{name}: {dtype}{}", self.shape(shape)),
            None => format!("{name}: {dtype}[?]"),
        }
    }

    fn shown(&self, value: ValueId) -> String {
        let Definition::Constant(constant) = &self.graph.value(value).definition else {
            return String::new();
        };
        if let Some(parts) = constant.as_quantized() {
            return format!(" (quantized: {parts})");
        }
        if constant.len() > MAX_SHOWN {
            return String::new();
        }
        match constant.materialize() {
            Ok(tensor) => format!(" = {}", self.elements(&tensor)),
            Err(_) => " (absent)".to_string(),
        }
    }

    fn elements(&self, tensor: &Tensor) -> String {
        match (self.style, tensor.dtype()) {
            (Style::Identity, DType::F64) => {
                let rounded: Vec<f32> = tensor.to_f64().iter().map(|v| *v as f32).collect();
                ir_text::elements(&Tensor::from_f32(tensor.shape().to_vec(), &rounded))
            }
            _ => ir_text::elements(tensor),
        }
    }

    fn operator(&self, op: &Op) -> String {
        if self.style == Style::Identity {
            return op.name();
        }
        let taken = |domain: &str| Op::is_known(domain, op.op_type());
        match op {
            Op::Unknown { domain, op_type } => {
                let plain = ir_text::name(op_type) == *op_type && !op_type.contains(':');
                let plain_domain = domain.is_empty() || ir_text::name(domain) == *domain;
                let read_as_known =
                    taken(domain) || domain.is_empty() && [super::MICROSOFT, super::LAPIDARY].into_iter().any(taken);
                match plain && plain_domain && !read_as_known {
                    true => op.name(),
                    false => format!("{domain:?}::{op_type:?}"),
                }
            }
            op if !op.domain().is_empty() && taken("") => format!("{}::{}", op.domain(), op.op_type()),
            op => op.name(),
        }
    }

    fn node_line(&self, node: &Node) -> String {
        let mut line = String::new();
        for (i, output) in node.outputs.iter().enumerate() {
            line.push_str(if i > 0 { ", " } else { "" });
            match output {
                Some(value) => line.push_str(&self.typed(*value)),
                None => line.push('_'),
            }
        }
        let _ = write!(line, " = {}", self.operator(&node.op));
        let attributes: Vec<String> = node
            .op
            .attributes()
            .iter()
            .map(|(name, value)| format!("{name}={}", self.attribute(value)))
            .collect();
        if !attributes.is_empty() {
            let _ = write!(line, "({})", attributes.join(", "));
        }
        for (i, input) in node.inputs.iter().enumerate() {
            line.push_str(if i > 0 { ", " } else { " " });
            line.push_str(&input.map_or("_".to_string(), |v| self.name(&self.graph.value(v).name)));
        }
        let first = node.outputs.iter().flatten().next();
        if first.is_none_or(|v| !self.graph.value(*v).name.starts_with(&node.name)) {
            let name = match self.style {
                Style::Text
                    if node.name.contains(char::is_control)
                        || node.name.starts_with('"')
                        || node.name.trim() != node.name =>
                {
                    format!("{:?}", node.name)
                }
                _ => node.name.clone(),
            };
            let _ = write!(line, "  # {name}");
        }
        line
    }

    fn attribute(&self, value: &Attribute) -> String {
        match value {
            Attribute::Int(v) => v.to_string(),
            Attribute::Float(v) => format!("{v:?}"),
            Attribute::Ints(v) => format!("{v:?}"),
            Attribute::Text(v) => (*v).to_string(),
            Attribute::DType(v) => v.to_string(),
            Attribute::Tensor(v) => format!("{} {}", v.dtype(), self.elements(v)),
        }
    }
}
