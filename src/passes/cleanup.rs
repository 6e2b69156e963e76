//! Removes operators that change nothing, and merges equal nodes and constants with equal bytes.
//!
//! Inferred shapes show whether a broadcast or a reshape has an effect; without them it stays. An operator whose
//! result is a graph output stays too, because the output's name is part of the export's interface.

use std::collections::HashMap;

use super::PassError;
use super::pattern::{finish, ints, node_of, redefine, same_shape, scalar};
use crate::graph::op::{Binary, Moves, Op};
use crate::graph::{Constant, ConstantSource};
use crate::graph::{Graph, Node, ValueId};
use crate::tensor::DType;

/// Removes operators that change nothing and merges equal ones. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut rewrites = 0;
    loop {
        let round = merge_constants(graph)
            + remove_noops(graph)
            + merge_chains(graph)
            + softmax_before_flatten(graph)
            + merge_nodes(graph);
        finish(graph, round)?;
        if round == 0 {
            return Ok(rewrites);
        }
        rewrites += round;
    }
}

/// Nodes whose result equals one of their inputs.
pub(super) fn remove_noops(graph: &mut Graph) -> usize {
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        let Some(output) = node.output(0) else { continue };
        if graph.outputs.contains(&output) {
            continue;
        }
        if let Some(source) = unchanged(graph, node, output).or_else(|| undone(graph, output)) {
            keep_type(graph, output, source);
            graph.replace_uses(output, source);
            graph.remove_node(id);
            count += 1;
        }
    }
    count
}

/// The value before a chain of reshapes that restores its shape.
fn undone(graph: &Graph, output: ValueId) -> Option<ValueId> {
    let mut at = output;
    loop {
        at = node_of(graph, at).filter(|n| is_reshape(&n.op))?.input(0)?;
        if same_shape(graph, at, output) {
            return Some(at);
        }
    }
}

/// Operators that keep the elements and their order.
fn is_reshape(op: &Op) -> bool {
    op.info().moves == Moves::InOrder
}

/// A reshape of a reshape reads the first one's input, and two transposes become one.
fn merge_chains(graph: &mut Graph) -> usize {
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        let Some((x, inner)) = node.input(0).and_then(|x| Some((x, node_of(graph, x)?))) else {
            continue;
        };
        let Some(source) = inner.input(0) else { continue };
        match (&node.op, &inner.op) {
            (Op::Reshape { allowzero }, op) if is_reshape(op) => {
                // A 0 copies a dim of the operand, which another operand does not have.
                let target = node.input(1).and_then(|t| ints(graph, t));
                let absolute = target.is_some_and(|t| *allowzero || !t.contains(&0));
                // It must not read a value that its own result restores; `undone` handles those.
                if absolute && source != x {
                    graph.node_mut(id).inputs[0] = Some(source);
                    count += 1;
                }
            }
            (Op::Transpose { perm: Some(outer) }, Op::Transpose { perm: Some(first) })
                if outer.len() == first.len() =>
            {
                let perm = Some(outer.iter().map(|p| first[*p]).collect());
                let node = graph.node_mut(id);
                node.op = Op::Transpose { perm };
                node.inputs[0] = Some(source);
                count += 1;
            }
            _ => {}
        }
    }
    count
}

/// A softmax of a tensor with merged leading axes is the softmax of the tensor itself, flattened afterwards.
fn softmax_before_flatten(graph: &mut Graph) -> usize {
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        let (Op::Softmax { axis } | Op::LogSoftmax { axis }) = node.op else {
            continue;
        };
        let Some((flat, flatten)) = node.input(0).and_then(|x| Some((x, node_of(graph, x)?))) else {
            continue;
        };
        let (Op::Flatten { .. }, Some(source), -1 | 1) = (&flatten.op, flatten.input(0), axis) else {
            continue;
        };
        let last = |v: ValueId| graph.shape(v).and_then(|shape| shape.last());
        if last(flat).is_none() || last(flat) != last(source) {
            continue;
        }
        let over_last = match node.op {
            Op::Softmax { .. } => Op::Softmax { axis: -1 },
            _ => Op::LogSoftmax { axis: -1 },
        };
        let (name, flatten) = (node.name.clone(), flatten.op.clone());
        let result = graph.add_node(&name, over_last, &[source]);
        keep_type(graph, source, result);
        redefine(graph, id, flatten, vec![Some(result)]);
        count += 1;
    }
    count
}

/// Copies the type of `from` to `to`, if `to` has none yet.
fn keep_type(graph: &mut Graph, from: ValueId, to: ValueId) {
    let (dtype, shape) = (graph.value(from).dtype, graph.value(from).shape.clone());
    let value = graph.value_mut(to);
    value.dtype = value.dtype.or(dtype);
    value.shape = value.shape.take().or(shape);
}

/// The input that the node returns unchanged.
fn unchanged(graph: &Graph, node: &Node, output: ValueId) -> Option<ValueId> {
    let x = node.input(0)?;
    let dtype = |v: ValueId| graph.value(v).dtype;
    let same = match &node.op {
        Op::Identity => true,
        Op::Cast { to } => dtype(x) == Some(*to),
        Op::CastLike => dtype(x).is_some() && dtype(x) == dtype(node.input(1)?),
        Op::Concat { .. } => node.inputs.len() == 1,
        Op::Transpose { perm: Some(perm) } => perm.iter().copied().eq(0..perm.len()),
        Op::Transpose { perm: None } => graph.shape(x).is_some_and(|s| s.len() < 2),
        Op::Reshape { .. } | Op::Expand | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze => {
            same_shape(graph, x, output)
        }
        Op::Slice => is_whole_slice(graph, node, x, output),
        Op::Clip => node.input(1).is_none() && node.input(2).is_none(),
        Op::Split { .. } => node.outputs.len() == 1,
        Op::Reduce {
            noop_with_empty_axes: true,
            ..
        } => node.input(1).is_none(),
        Op::Tile => ints(graph, node.input(1)?)?.iter().all(|r| *r == 1),
        Op::Where => return chosen(graph, node, output),
        Op::Binary(op) => return neutral(graph, *op, x, node.input(1)?, output),
        _ => false,
    };
    same.then_some(x)
}

fn is_whole_slice(graph: &Graph, node: &Node, x: ValueId, output: ValueId) -> bool {
    let whole = || -> Option<bool> {
        let (starts, ends) = (ints(graph, node.input(1)?)?, ints(graph, node.input(2)?)?);
        let steps = match node.input(4) {
            Some(steps) => ints(graph, steps)?,
            None => vec![1; starts.len()],
        };
        // Ends that are dims of the tensor itself are handled by the shapes below.
        let far = starts.iter().all(|s| *s == 0 || *s == i64::MIN) && ends.iter().all(|e| *e >= i64::from(i32::MAX));
        Some(far && steps.iter().all(|s| *s == 1))
    };
    let forward = || -> bool {
        match node.input(4) {
            None => true,
            Some(steps) => ints(graph, steps).is_some_and(|s| s.iter().all(|s| *s > 0)),
        }
    };
    // A forward slice as long as the axis is the whole axis.
    whole() == Some(true) || (forward() && same_shape(graph, x, output))
}

/// The choice of a `Where` whose condition is the same constant everywhere.
fn chosen(graph: &Graph, node: &Node, output: ValueId) -> Option<ValueId> {
    let condition = truth(graph, node.input(0)?)?;
    let choice = node.input(if condition { 1 } else { 2 })?;
    same_shape(graph, choice, output).then_some(choice)
}

/// The value of a bool constant all of whose elements agree.
fn truth(graph: &Graph, value: ValueId) -> Option<bool> {
    let constant = graph.constant(value)?;
    if constant.dtype() != DType::Bool || constant.is_empty() {
        return None;
    }
    let tensor = constant.materialize().ok()?;
    let first = tensor.data()[0] != 0;
    tensor.data().iter().all(|b| (*b != 0) == first).then_some(first)
}

/// `x + 0`, `x * 1`, `x ^ 1`, `x and true` and the like.
fn neutral(graph: &Graph, op: Binary, a: ValueId, b: ValueId, output: ValueId) -> Option<ValueId> {
    let is = |v: ValueId, wanted: f64| uniform(graph, v) == Some(wanted);
    let (left, right) = match op {
        Binary::Add => (is(a, 0.0), is(b, 0.0)),
        Binary::Mul => (is(a, 1.0), is(b, 1.0)),
        Binary::Sub => (false, is(b, 0.0)),
        Binary::Div | Binary::Pow => (false, is(b, 1.0)),
        Binary::And => (truth(graph, a) == Some(true), truth(graph, b) == Some(true)),
        Binary::Or => (truth(graph, a) == Some(false), truth(graph, b) == Some(false)),
        Binary::Max | Binary::Min if a == b => return Some(a),
        _ => (false, false),
    };
    // A neutral constant of rank 0 broadcasts nothing; of any other shape it may.
    let keeps = |x: ValueId, constant: ValueId| {
        graph.shape(constant).is_some_and(Vec::is_empty) || same_shape(graph, x, output)
    };
    if right && keeps(a, b) {
        return Some(a);
    }
    (left && keeps(b, a)).then_some(b)
}

/// The number that every element of a small constant is.
fn uniform(graph: &Graph, value: ValueId) -> Option<f64> {
    if let Some(number) = scalar(graph, value) {
        return Some(number);
    }
    let constant = graph.constant(value).filter(|c| !c.is_empty() && c.len() <= 64)?;
    let values = constant.materialize().ok()?.to_f64();
    values.iter().all(|v| *v == values[0]).then(|| values[0])
}

/// Nodes that compute the same from the same inputs.
fn merge_nodes(graph: &mut Graph) -> usize {
    // Operators contain floats and so have no hash; their text selects a bucket, equality decides.
    let mut seen: HashMap<(String, Vec<Option<ValueId>>), Vec<crate::graph::NodeId>> = HashMap::new();
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        let is_output = node.outputs.iter().flatten().any(|v| graph.outputs.contains(v));
        if matches!(node.op, Op::Unknown { .. }) {
            continue;
        }
        let bucket = seen.entry((format!("{:?}", node.op), node.inputs.clone())).or_default();
        let twin = bucket.iter().copied().find(|other| {
            let other = graph.node(*other);
            // An output that only one of the two has would have to be moved.
            let covers = (0..node.outputs.len()).all(|i| node.output(i).is_none() || other.output(i).is_some());
            other.op == node.op && other.outputs.len() == node.outputs.len() && covers
        });
        match twin {
            Some(twin) if !is_output => {
                let pairs: Vec<_> = (0..node.outputs.len())
                    .filter_map(|i| Some((graph.node(id).output(i)?, graph.node(twin).output(i)?)))
                    .collect();
                for (old, new) in pairs {
                    keep_type(graph, old, new);
                    graph.replace_uses(old, new);
                }
                graph.remove_node(id);
                count += 1;
            }
            _ => bucket.push(id),
        }
    }
    count
}

/// Constants with the same bytes, or the same recipe on the same bytes.
fn merge_constants(graph: &mut Graph) -> usize {
    let mut seen: HashMap<(DType, Vec<usize>, u64), Vec<ValueId>> = HashMap::new();
    let mut replacements: HashMap<ValueId, ValueId> = HashMap::new();
    let used = graph.uses();
    for id in graph.value_ids() {
        let Some(constant) = graph.constant(id).filter(|_| used.contains_key(&id)) else {
            continue;
        };
        let key = (constant.dtype(), constant.shape().to_vec(), fingerprint(constant));
        let bucket = seen.entry(key).or_default();
        let twin = bucket
            .iter()
            .copied()
            .find(|other| graph.constant(*other).is_some_and(|other| is_same(constant, other)));
        match twin {
            Some(twin) if !graph.outputs.contains(&id) => {
                replacements.insert(id, twin);
            }
            _ => bucket.push(id),
        }
    }
    for (old, new) in &replacements {
        graph.replace_uses(*old, *new);
    }
    replacements.len()
}

/// A hash of some of the bytes: many weights have the same shape, and comparing all bytes would read the whole model.
fn fingerprint(constant: &Constant) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    const RUN: usize = 64;
    const RUNS: usize = 16;
    let mut hasher = DefaultHasher::new();
    match constant.source() {
        ConstantSource::Tensor(tensor) => {
            let data = tensor.data();
            for i in 0..RUNS {
                let start = data.len().saturating_sub(RUN) / RUNS * i;
                data[start..(start + RUN).min(data.len())].hash(&mut hasher);
            }
            data[data.len().saturating_sub(RUN)..].hash(&mut hasher);
        }
        ConstantSource::Derived(derived) => {
            format!("{:?}", derived.transform).hash(&mut hasher);
            derived.inputs.iter().for_each(|c| fingerprint(c).hash(&mut hasher));
        }
        ConstantSource::Absent => constant.origin().hash(&mut hasher),
    }
    hasher.finish()
}

fn is_same(a: &Constant, b: &Constant) -> bool {
    if (a.dtype(), a.shape()) != (b.dtype(), b.shape()) {
        return false;
    }
    match (a.source(), b.source()) {
        (ConstantSource::Tensor(a), ConstantSource::Tensor(b)) => {
            std::ptr::eq(a.data().as_ptr(), b.data().as_ptr()) || a.data() == b.data()
        }
        (ConstantSource::Derived(a), ConstantSource::Derived(b)) => {
            a.transform == b.transform
                && a.inputs.len() == b.inputs.len()
                && a.inputs.iter().zip(&b.inputs).all(|(a, b)| is_same(a, b))
        }
        (ConstantSource::Absent, ConstantSource::Absent) => a.origin().is_some() && a.origin() == b.origin(),
        _ => false,
    }
}
