//! Merged decoders: the branch that reads past keys and values is converted, and the other branch must be the
//! same model.
//!
//! Both are executed for one short prompt, with the export's own weights: the logits and the keys and values that they give
//! must agree. The passes prove that the converted branch also computes a prompt without a past. One that was traced with a single
//! token, and lets several attend to one another, is given the prompt token after token.
//!
//! Memory: weights stay in the mapped file. Casts of weights and dequantized codes are computed right before the node that reads
//! them and dropped after it, in whatever order the export lists the nodes.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::ConvertError;
use crate::graph::eval::eval_node;
use crate::graph::op::Family;
use crate::graph::{Graph, NodeId, Switch, ValueId};
use crate::onnx;
use crate::passes::partial_eval::tensor_of;
use crate::passes::roles::{self, InputRole};
use crate::tensor::{DType, Tensor};

/// Token ids that every vocabulary has.
const PROMPT: [i64; 3] = [1, 3, 2];

/// Refuses a merged decoder, whose branch `switch` selects, if the branches give different answers.
pub(super) fn check(model: &Path, switch: &Switch) -> Result<(), ConvertError> {
    let (mut kept, mut left_out) = (onnx::read(model)?, onnx::read_prompt_branch(model)?);
    kept.remove_dead_nodes();
    left_out.remove_dead_nodes();
    compare(&kept, &left_out).map_err(|reason| ConvertError::Branches {
        path: model.to_path_buf(),
        switch: switch.name.clone(),
        reason,
    })
}

fn compare(kept: &Graph, left_out: &Graph) -> Result<(), String> {
    let (of, _) = roles::guess(kept);
    let roles: HashMap<&str, InputRole> = of
        .iter()
        .map(|(id, role)| (kept.value(*id).name.as_str(), *role))
        .collect();
    let without = answers(left_out, &roles, None)?;
    let found = answers(kept, &roles, None).and_then(|with_past| agree(kept, &with_past, &without));
    // What keeps the tokens of a prompt apart says nothing against it where they come one by one.
    found.or_else(|reason| {
        let by_token = in_turn(kept, &roles).and_then(|with_past| agree(kept, &with_past, &without).ok());
        by_token.ok_or(reason)
    })
}

/// The logits of every token of the prompt, given one after the other, and the caches after the last. `None`: that cannot be had.
fn in_turn(kept: &Graph, roles: &HashMap<&str, InputRole>) -> Option<Vec<Tensor>> {
    let is_cache = |id: &&ValueId| roles.get(kept.value(**id).name.as_str()) == Some(&InputRole::Cache);
    let caches: Vec<ValueId> = kept.inputs.iter().filter(is_cache).copied().collect();
    let mut logits: Vec<Tensor> = Vec::new();
    let mut past: HashMap<ValueId, Tensor> = HashMap::new();
    for token in 0..PROMPT.len() {
        let mut outputs = answers(kept, roles, Some((token, &past))).ok()?;
        // Logits come first, and caches in the order in which they are taken.
        let updated = outputs.split_off(1);
        if updated.len() != caches.len() {
            return None;
        }
        past = caches.iter().copied().zip(updated).collect();
        logits.append(&mut outputs);
    }
    let rows: Vec<f64> = logits.iter().flat_map(Tensor::to_f64).collect();
    let mut shape = logits.first()?.shape().to_vec();
    *shape.get_mut(1)? = PROMPT.len();
    let joined = tensor_of(logits[0].dtype(), shape, &rows);
    let caches = caches.iter().filter_map(|cache| past.remove(cache));
    Some(std::iter::once(joined).chain(caches).collect())
}

/// Whether the outputs of both branches agree; how not, if they do not.
fn agree(kept: &Graph, with_past: &[Tensor], without: &[Tensor]) -> Result<(), String> {
    let mut nodes = kept.node_ids();
    let quantized = nodes.any(|id| kept.node(id).op.info().family == Family::Quantization);
    for ((id, a), b) in kept.outputs.iter().zip(with_past).zip(without) {
        let name = &kept.value(*id).name;
        if a.shape() != b.shape() || a.dtype() != b.dtype() {
            return Err(format!(
                "{name} is {}{:?} with past keys and values and {}{:?} without",
                a.dtype(),
                a.shape(),
                b.dtype(),
                b.shape()
            ));
        }
        let (x, y) = (a.to_f64(), b.to_f64());
        let largest = x.iter().fold(1.0, |most: f64, v| most.max(v.abs()));
        let limit = tolerance(a.dtype(), quantized) * largest;
        let pairs = x.iter().zip(&y);
        let worst = pairs
            .map(|(x, y)| if x == y { 0.0 } else { (x - y).abs() })
            .fold(
                0.0,
                |worst: f64, d| if d.is_nan() { f64::INFINITY } else { worst.max(d) },
            );
        if worst > limit {
            return Err(format!("{name} is {worst:.3} apart, of numbers up to {largest:.3}"));
        }
    }
    Ok(())
}

/// Tolerance relative to the largest number: the branches may only differ in the order of rounding. Activations that
/// are rounded to few codes may differ by one code.
fn tolerance(dtype: DType, quantized: bool) -> f64 {
    match dtype {
        DType::Bf16 => 1e-1,
        _ if quantized => 5e-2,
        DType::F16 => 2e-2,
        _ => 1e-3,
    }
}

/// The outputs for the prompt, without a past; or for one token of it, after what the caches hold.
fn answers(
    graph: &Graph,
    roles: &HashMap<&str, InputRole>,
    one: Option<(usize, &HashMap<ValueId, Tensor>)>,
) -> Result<Vec<Tensor>, String> {
    let uses = graph.uses();
    let mut bindings = HashMap::new();
    for id in graph.inputs.iter().filter(|id| uses.contains_key(id)) {
        let name = graph.value(*id).name.as_str();
        let held = one.and_then(|(_, past)| past.get(id).cloned());
        let start = one.map(|(token, _)| token);
        let tensor = held.or_else(|| roles.get(name).and_then(|role| input(graph, *id, *role, start)));
        let tensor = tensor.ok_or_else(|| format!("they cannot be compared: it is not known what to give {name}"))?;
        bindings.insert(*id, tensor);
    }
    executed(graph, bindings).map_err(|(at, error)| format!("they cannot be compared: {at}: {error}"))
}

/// Nodes in the order of a depth-first walk from the outputs: a value with a single reader is computed right before it.
fn by_reader(graph: &Graph) -> Vec<NodeId> {
    let mut seen: HashSet<NodeId> = HashSet::new();
    let mut order = Vec::new();
    for output in &graph.outputs {
        let mut stack: Vec<(NodeId, usize)> = graph.producer_of(*output).map(|(id, _)| (id, 0)).into_iter().collect();
        while let Some((id, next)) = stack.pop() {
            if next == 0 && !seen.insert(id) {
                continue;
            }
            match graph.node(id).inputs.get(next) {
                None => order.push(id),
                Some(input) => {
                    stack.push((id, next + 1));
                    let producer = input.and_then(|value| graph.producer_of(value));
                    stack.extend(producer.map(|(id, _)| (id, 0)));
                }
            }
        }
    }
    order
}

/// The outputs. A tensor is dropped after its last reader, and a weight is in memory for one node.
fn executed(graph: &Graph, mut known: HashMap<ValueId, Tensor>) -> Result<Vec<Tensor>, (String, String)> {
    let mut readers: HashMap<ValueId, usize> = HashMap::new();
    let nodes = by_reader(graph);
    let read = nodes.iter().flat_map(|id| graph.node(*id).inputs.iter().flatten());
    for id in read.chain(&graph.outputs) {
        *readers.entry(*id).or_default() += 1;
    }
    let tensor = |known: &HashMap<ValueId, Tensor>, id: ValueId| -> Result<Tensor, (String, String)> {
        if let Some(tensor) = known.get(&id) {
            return Ok(tensor.clone());
        }
        let name = || graph.value(id).name.clone();
        let constant = graph
            .constant(id)
            .ok_or_else(|| (name(), "it is not computed".to_string()))?;
        constant.materialize().map_err(|error| (name(), error.to_string()))
    };
    for id in nodes {
        let node = graph.node(id);
        let inputs = node
            .inputs
            .iter()
            .map(|input| input.map(|v| tensor(&known, v)).transpose());
        let inputs: Vec<Option<Tensor>> = inputs.collect::<Result<_, _>>()?;
        let results = eval_node(&node.op, &inputs, node.outputs.len());
        let results = results.map_err(|error| (node.name.clone(), error.to_string()))?;
        for (output, result) in node.outputs.iter().zip(results) {
            if let (Some(output), Some(result)) = (output, result)
                && readers.contains_key(output)
            {
                known.insert(*output, result);
            }
        }
        for input in node.inputs.iter().flatten() {
            let left = readers.entry(*input).or_default();
            *left = left.saturating_sub(1);
            if *left == 0 {
                known.remove(input);
            }
        }
    }
    graph.outputs.iter().map(|id| tensor(&known, *id)).collect()
}

/// What a caller gives an input for the prompt, or for one token of it.
fn input(graph: &Graph, id: ValueId, role: InputRole, one: Option<usize>) -> Option<Tensor> {
    let value = graph.value(id);
    let (dtype, shape) = (value.dtype?, value.shape.as_ref()?);
    let (start, tokens) = one.map_or((0, PROMPT.len()), |token| (token, 1));
    let total = start + tokens;
    let rank = shape.len();
    // Lengths by axis, if free: one sequence, the prompt, no past.
    let dims = |free: &dyn Fn(usize) -> usize| -> Option<Vec<usize>> {
        let dims = shape.iter().enumerate();
        dims.map(|(axis, dim)| match dim.as_const() {
            Some(size) => usize::try_from(size).ok(),
            None => Some(free(axis)),
        })
        .collect()
    };
    let of_tokens = |axis: usize| if axis + 1 == rank { tokens } else { 1 };
    let filled = |dims: Vec<usize>, element: &dyn Fn(usize) -> f64| -> Tensor {
        let values: Vec<f64> = (0..dims.iter().product()).map(element).collect();
        tensor_of(dtype, dims, &values)
    };
    let constant = |number: f64| Some(filled(dims(&|_| 1)?, &|_| number));
    match role {
        InputRole::InputIds => Some(filled(dims(&of_tokens)?, &|i| PROMPT[start + i % tokens] as f64)),
        InputRole::Embeddings => {
            let dims = dims(&|axis| if axis == 1 { tokens } else { 1 })?;
            let width = dims.last().copied().unwrap_or(1);
            Some(filled(dims, &|i| ((start * width + i) * 37 % 101) as f64 / 50.0 - 1.0))
        }
        InputRole::PaddingMask => Some(filled(dims(&|axis| if axis + 1 == rank { total } else { 1 })?, &|_| {
            1.0
        })),
        InputRole::Positions => Some(filled(dims(&of_tokens)?, &|i| (start + i % tokens) as f64)),
        InputRole::PastLength => constant(start as f64),
        InputRole::ChosenRows => constant(0.0),
        InputRole::TotalLength => constant(total as f64),
        InputRole::LastPosition => constant(total as f64 - 1.0),
        InputRole::Cache => Some(filled(dims(&|axis| usize::from(axis == 0))?, &|_| 0.0)),
        InputRole::FullMask | InputRole::Unread => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Dim;
    use crate::graph::op::Op;

    /// An exporter that lists all casts of weights first would have all of them in memory.
    #[test]
    fn what_is_computed_from_weights_stands_before_its_reader() {
        let mut graph = Graph::new("layers");
        let mut x = graph.add_input("x", DType::F32, vec![Dim::constant(1), Dim::constant(2)]);
        let weights: Vec<ValueId> = (0..4)
            .map(|i| {
                let half = Tensor::from_f64_as(DType::F16, vec![2, 2], &[1.0, 2.0, 3.0, 4.0]);
                let half = graph.add_constant(&format!("half{i}"), half);
                graph.add_node(&format!("weight{i}"), Op::Cast { to: DType::F32 }, &[half])
            })
            .collect();
        for (i, weight) in weights.into_iter().enumerate() {
            x = graph.add_node(&format!("product{i}"), Op::MatMul, &[x, weight]);
        }
        graph.outputs.push(x);
        let names: Vec<&str> = by_reader(&graph)
            .iter()
            .map(|id| graph.node(*id).name.as_str())
            .collect();
        let expected = (0..4).flat_map(|i| [format!("weight{i}"), format!("product{i}")]);
        assert_eq!(names, expected.collect::<Vec<_>>());
        let given = HashMap::from([(graph.inputs[0], Tensor::from_f32(vec![1, 2], &[1.0, -1.0]))]);
        let found = executed(&graph, given).unwrap();
        // (1, -1) times [[1, 2], [3, 4]] is (-2, -2); each further product adds columns of it.
        assert_eq!(found[0].to_f32(), [-236.0, -344.0]);
    }
}
