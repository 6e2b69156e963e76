//! What is known about the condition of an `If` while the model is read.

use std::collections::{HashMap, HashSet};

use crate::dim::Dim;
use crate::graph::eval::Evaluator;
use crate::graph::{Definition, Graph, Op, ValueId, infer};
use crate::tensor::{DType, Tensor};

/// See the module's head.
pub(super) enum Condition {
    /// It is the same in every call.
    Known(bool),
    /// It is computed from one boolean input of the model alone, and differs with it.
    Input {
        /// The input.
        id: ValueId,
        /// The condition for a false and for a true input.
        at: [bool; 2],
    },
    /// Something that it is computed from has not been read yet.
    Pending,
    /// Anything else, with what it depends on.
    Open(String),
}

/// Examines a condition: executes it if it depends on constants or on one boolean input, and infers it from the fixed
/// dims of inputs otherwise. Names of dims are ignored: exporters give one name to different lengths.
pub(super) fn condition(graph: &Graph, id: ValueId) -> Condition {
    let Some((mut part, wanted)) = part(graph, id) else {
        return Condition::Pending;
    };
    let inputs: Vec<ValueId> = part
        .inputs
        .iter()
        .filter_map(|i| graph.find(&part.value(*i).name))
        .collect();
    let run = |part: &Graph, bindings| {
        let tensor = Evaluator::new(part, bindings).value(wanted).ok()?;
        tensor.scalar().map(|value| value != 0.0)
    };
    match inputs[..] {
        [] => match run(&part, HashMap::new()) {
            Some(value) => return Condition::Known(value),
            None => return Condition::Open("its condition is not one constant".into()),
        },
        [input] if is_flag(graph, input) => {
            let rank = graph.shape(input).map_or(0, Vec::len);
            let at = |value: bool| {
                let tensor = Tensor::from_bool(vec![1; rank], &[value]);
                run(&part, HashMap::from([(part.inputs[0], tensor)]))
            };
            match (at(false), at(true)) {
                (Some(a), Some(b)) if a == b => return Condition::Known(a),
                (Some(a), Some(b)) => return Condition::Input { id: input, at: [a, b] },
                _ => {}
            }
        }
        _ => {}
    }
    if part.sort().is_ok()
        && let Ok(facts) = infer(&mut part)
        && let Some(value) = facts.contents(wanted).and_then(|c| c.single()?.as_const())
    {
        return Condition::Known(value != 0);
    }
    Condition::Open(dependence(graph, id, &inputs))
}

/// A boolean of one element.
fn is_flag(graph: &Graph, id: ValueId) -> bool {
    let value = graph.value(id);
    let one = |shape: &Vec<Dim>| shape.len() <= 1 && shape.iter().all(|d| d.as_const().is_none_or(|n| n == 1));
    value.dtype == Some(DType::Bool) && value.shape.as_ref().is_some_and(one)
}

/// The nodes that compute a value, as its own graph, whose inputs have their own name for each dim that is not
/// fixed. `None`: it reads a value that is not defined yet.
fn part(graph: &Graph, id: ValueId) -> Option<(Graph, ValueId)> {
    let (values, whole) = computed_from(graph, &[id], |_| true);
    if !whole {
        return None;
    }
    let mut part = Graph::new("condition");
    let mut copies: HashMap<ValueId, ValueId> = HashMap::new();
    let mut nodes = HashSet::new();
    for id in &values {
        let value = graph.value(*id);
        let copy = part.add_value(&value.name);
        copies.insert(*id, copy);
        match &value.definition {
            Definition::Constant(constant) => part.set_constant(copy, constant.clone()),
            Definition::Input => {
                let free = |(axis, dim): (usize, &Dim)| match dim.as_const() {
                    Some(size) => Dim::from(size),
                    None => Dim::named(format!("{}.{axis}", value.name)),
                };
                let shape = value.shape.as_ref().map(|s| s.iter().enumerate().map(free).collect());
                let input = part.value_mut(copy);
                (input.dtype, input.shape, input.definition) = (value.dtype, shape, Definition::Input);
                part.inputs.push(copy);
            }
            Definition::Node { node, .. } => {
                nodes.insert(*node);
            }
            Definition::Dead => {}
        }
    }
    for id in nodes {
        let node = graph.node(id);
        let inputs = node.inputs.iter().map(|v| v.map(|v| copies[&v])).collect();
        // Outputs that the condition does not need are omitted if that does not change the others.
        let mut outputs = Vec::new();
        for output in &node.outputs {
            outputs.push(output.map(|v| {
                let name = &graph.value(v).name;
                *copies.entry(v).or_insert_with(|| part.add_value(name))
            }));
        }
        part.add_node_with_outputs(&node.name, node.op.clone(), inputs, outputs);
    }
    let wanted = copies[&id];
    part.outputs.push(wanted);
    Some((part, wanted))
}

/// Values that some values are computed from, themselves included, through operators that `follow`; and whether all of
/// them are defined.
pub(super) fn computed_from(graph: &Graph, from: &[ValueId], follow: impl Fn(&Op) -> bool) -> (Vec<ValueId>, bool) {
    let mut found: Vec<ValueId> = Vec::new();
    let mut seen: HashSet<ValueId> = HashSet::new();
    let mut stack = from.to_vec();
    let mut whole = true;
    while let Some(id) = stack.pop() {
        if !seen.insert(id) {
            continue;
        }
        found.push(id);
        match &graph.value(id).definition {
            Definition::Dead => whole = false,
            Definition::Node { node, .. } => {
                let node = graph.node(*node);
                if follow(&node.op) {
                    stack.extend(node.inputs.iter().flatten());
                }
            }
            Definition::Input | Definition::Constant(_) => {}
        }
    }
    (found, whole)
}

/// Follows values, but not into nodes that read only a shape.
pub(super) fn by_value(op: &Op) -> bool {
    !matches!(op, Op::Shape { .. } | Op::Size)
}

/// `its condition depends on the values of a and on the lengths of b`
fn dependence(graph: &Graph, id: ValueId, inputs: &[ValueId]) -> String {
    let (read, _) = computed_from(graph, &[id], by_value);
    let names = |by_value: bool| {
        let of = inputs.iter().filter(|i| read.contains(i) == by_value);
        let mut names: Vec<&str> = of.map(|i| graph.value(*i).name.as_str()).collect();
        names.sort_unstable();
        let more = names.len().saturating_sub(3);
        names.truncate(3);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        (!names.is_empty()).then(|| names.join(", ") + &more)
    };
    let values = names(true).map(|names| format!("the values of {names}"));
    let lengths = names(false).map(|names| format!("the lengths of {names}"));
    let parts: Vec<String> = [values, lengths].into_iter().flatten().collect();
    format!("its condition depends on {}", parts.join(" and on "))
}
