//! The text form of a graph: one line a node, for people and for snapshots.
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
//! own name stands behind `#` where it says more than its output's name. Constants that nothing reads are left out.

use std::collections::HashSet;
use std::fmt::{self, Display, Write};

use super::{Attribute, Definition, Graph, Node, ValueId};
use crate::tensor::Tensor;

/// Constants up to this many elements are shown with their values.
const MAX_SHOWN: usize = 8;

/// The text form of a graph, made when it is displayed.
pub struct Dump<'a>(&'a Graph);

/// See the module's head.
pub fn dump(graph: &Graph) -> Dump<'_> {
    Dump(graph)
}

impl Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let graph = self.0;
        writeln!(f, "{}", header(graph))?;
        section(f, graph, "inputs", graph.inputs.iter().copied())?;
        let mut read: HashSet<ValueId> = graph.outputs.iter().copied().collect();
        for id in graph.node_ids() {
            read.extend(graph.node(id).inputs.iter().flatten());
        }
        let constant = |v: &ValueId| read.contains(v) && graph.constant(*v).is_some();
        section(f, graph, "constants", graph.value_ids().filter(constant))?;
        writeln!(f, "nodes")?;
        for id in graph.node_ids() {
            writeln!(f, "  {}", node_line(graph, graph.node(id)))?;
        }
        section(f, graph, "outputs", graph.outputs.iter().copied())
    }
}

fn header(graph: &Graph) -> String {
    let producer = &graph.producer;
    let mut about: Vec<String> = Vec::new();
    if !producer.name.is_empty() {
        about.push(format!("{} {}", producer.name, producer.version).trim().to_string());
    }
    for (domain, version) in &producer.opsets {
        about.push(match domain.as_str() {
            "" => format!("opset {version}"),
            domain => format!("{domain} {version}"),
        });
    }
    let name = if graph.name.is_empty() { "graph" } else { "graph " };
    match about.is_empty() {
        true => format!("{name}{}", graph.name),
        false => format!("{name}{} ({})", graph.name, about.join(", ")),
    }
}

fn section(
    f: &mut fmt::Formatter<'_>,
    graph: &Graph,
    title: &str,
    values: impl Iterator<Item = ValueId>,
) -> fmt::Result {
    writeln!(f, "{title}")?;
    for value in values {
        writeln!(f, "  {}{}", typed(graph, value), shown(graph, value))?;
    }
    Ok(())
}

/// `name: dtype[shape]`, with `?` for what is not known.
fn typed(graph: &Graph, value: ValueId) -> String {
    let value = graph.value(value);
    let dtype = value.dtype.map_or("?", |d| d.name());
    match &value.shape {
        Some(shape) => format!("{}: {dtype}{shape:?}", value.name),
        None => format!("{}: {dtype}[?]", value.name),
    }
}

fn shown(graph: &Graph, value: ValueId) -> String {
    let Definition::Constant(constant) = &graph.value(value).definition else {
        return String::new();
    };
    if constant.len() > MAX_SHOWN {
        return String::new();
    }
    match constant.materialize() {
        Ok(tensor) => format!(" = {}", elements(&tensor)),
        Err(_) => " (absent)".to_string(),
    }
}

/// The elements of a small tensor; of a scalar without brackets.
fn elements(tensor: &Tensor) -> String {
    let list: Vec<String> = if tensor.dtype().is_float() {
        tensor.to_f64().iter().map(|v| float(*v)).collect()
    } else {
        tensor.to_i64().iter().map(i64::to_string).collect()
    };
    match tensor.shape() {
        [] => list.join(""),
        _ => format!("[{}]", list.join(", ")),
    }
}

/// Shortest text that reads back as the same fp32, so that 1e-5 stays 1e-5.
fn float(value: f64) -> String {
    format!("{:?}", value as f32)
}

fn node_line(graph: &Graph, node: &Node) -> String {
    let mut line = String::new();
    for (i, output) in node.outputs.iter().enumerate() {
        line.push_str(if i > 0 { ", " } else { "" });
        match output {
            Some(value) => line.push_str(&typed(graph, *value)),
            None => line.push('_'),
        }
    }
    let _ = write!(line, " = {}", node.op.name());
    let attributes: Vec<String> = node
        .op
        .attributes()
        .iter()
        .map(|(name, value)| format!("{name}={}", attribute(value)))
        .collect();
    if !attributes.is_empty() {
        let _ = write!(line, "({})", attributes.join(", "));
    }
    for (i, input) in node.inputs.iter().enumerate() {
        line.push_str(if i > 0 { ", " } else { " " });
        line.push_str(input.map_or("_", |v| &graph.value(v).name));
    }
    let first = node.outputs.iter().flatten().next();
    if first.is_none_or(|v| !graph.value(*v).name.starts_with(&node.name)) {
        let _ = write!(line, "  # {}", node.name);
    }
    line
}

fn attribute(value: &Attribute) -> String {
    match value {
        Attribute::Int(v) => v.to_string(),
        Attribute::Float(v) => format!("{v:?}"),
        Attribute::Ints(v) => format!("{v:?}"),
        Attribute::Text(v) => (*v).to_string(),
        Attribute::DType(v) => v.to_string(),
        Attribute::Tensor(v) => format!("{} {}", v.dtype(), elements(v)),
    }
}
