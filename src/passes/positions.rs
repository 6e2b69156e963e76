//! The remaining uses of the export's positions once its attention is canonical: embeddings of positions.
//!
//! A positional value that data still reads is either one table row per position (GPT-2's `wpe`), which becomes a
//! `Gather` by the canonical `position_ids`, or the operand of a shape operator that nothing needs. Executing it shows
//! whether it is a function of the position alone. Anything else is an obstacle.

use std::collections::{HashMap, HashSet};

use super::attention::Obstacle;
use super::dependence::Dependence;
use super::lengths::{lengths, positions};
use super::partial_eval::{PartialEvaluator, Stuck};
use super::roles::Roles;
use crate::dim::Dim;
use crate::graph::op::Op;
use crate::graph::{Constant, Definition, Graph, ValueId};
use crate::tensor::{DType, Tensor};

/// A value to replace by rows of a table, gathered by `position_ids`.
struct Rows {
    old: ValueId,
    table: Constant,
    name: String,
}

/// Rewrites them. Returns the number of rewrites and the rows of the shortest table.
pub fn run(
    graph: &mut Graph,
    roles: &Roles,
    position_ids: ValueId,
    max_positions: usize,
) -> Result<(usize, Option<usize>), Vec<Obstacle>> {
    let mut obstacles = Vec::new();
    let mut found = Vec::new();
    let mut bypass = Vec::new();
    {
        let evaluator = PartialEvaluator::new(graph, roles);
        let stale = stale(graph);
        let mut seen = HashSet::new();
        for id in graph.node_ids() {
            let node = graph.node(id);
            let is_data = node
                .outputs
                .iter()
                .flatten()
                .any(|v| evaluator.dependence(*v) == Dependence::Data);
            for (input, value) in node.inputs.iter().enumerate() {
                let Some(value) = *value else { continue };
                if !is_data || !stale.contains(&value) || evaluator.dependence(value) != Dependence::Positional {
                    continue;
                }
                if matches!(node.op, Op::Expand) && input == 1 {
                    let shape = |v: Option<ValueId>| v.and_then(|v| graph.shape(v)).cloned();
                    if let (Some(x), Some(y)) = (node.input(0), node.output(0))
                        && shape(Some(x)).is_some()
                        && shape(Some(x)) == shape(Some(y))
                    {
                        bypass.push((y, x));
                        continue;
                    }
                }
                if !seen.insert(value) {
                    continue;
                }
                match table(&evaluator, value, max_positions) {
                    Ok((table, name)) => found.push(Rows {
                        old: value,
                        table,
                        name,
                    }),
                    Err(reason) => obstacles.push(Obstacle {
                        layer: None,
                        at: node.name.clone(),
                        reason: format!("it reads {}, and {reason}", graph.value(value).name),
                    }),
                }
            }
        }
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    let rewrites = found.len() + bypass.len();
    let limit = found.iter().map(|rows| rows.table.shape()[0]).min();
    for (old, new) in bypass {
        graph.replace_uses(old, new);
    }
    for Rows { old, table, name } in found {
        let width = Dim::from(table.shape()[1]);
        let dtype = table.dtype();
        let table = graph.add_constant(&name, table);
        let rows = graph.add_node(&format!("{name}.rows"), Op::Gather { axis: 0 }, &[table, position_ids]);
        let mut shape = graph.shape(position_ids).cloned().unwrap_or_default();
        shape.push(width);
        let value = graph.value_mut(rows);
        (value.dtype, value.shape) = (Some(dtype), Some(shape.clone()));
        let rank = graph.shape(old).map_or(3, Vec::len);
        let rows = if rank == 4 {
            let axes = graph.add_i64(&format!("{name}.axes"), &[1]);
            shape.insert(1, Dim::from(1usize));
            let rows = graph.add_node(&format!("{name}.heads"), Op::Unsqueeze, &[rows, axes]);
            let value = graph.value_mut(rows);
            (value.dtype, value.shape) = (Some(dtype), Some(shape));
            rows
        } else {
            rows
        };
        graph.replace_uses(old, rows);
    }
    Ok((rewrites, limit))
}

/// Values that depend, even if only by shape, on an input that the canonical graph does not have.
fn stale(graph: &Graph) -> HashSet<ValueId> {
    let inputs: HashSet<ValueId> = graph.inputs.iter().copied().collect();
    let is_old = |id: &ValueId| matches!(graph.value(*id).definition, Definition::Input) && !inputs.contains(id);
    let mut stale: HashSet<ValueId> = graph.value_ids().filter(is_old).collect();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if node.inputs.iter().flatten().any(|v| stale.contains(v)) {
            stale.extend(node.outputs.iter().flatten());
        }
    }
    stale
}

/// Used values that still depend on the export's own inputs, as obstacles.
pub fn stale_inputs(graph: &Graph) -> Vec<Obstacle> {
    let inputs: HashSet<ValueId> = graph.inputs.iter().copied().collect();
    let mut readers: HashMap<ValueId, &str> = HashMap::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        for value in node.inputs.iter().flatten() {
            if matches!(graph.value(*value).definition, Definition::Input) && !inputs.contains(value) {
                readers.entry(*value).or_insert(&node.name);
            }
        }
    }
    let mut left: Vec<Obstacle> = readers
        .into_iter()
        .map(|(value, reader)| Obstacle {
            layer: None,
            at: reader.to_string(),
            reason: format!("it still depends on the export's input {}", graph.value(value).name),
        })
        .collect();
    left.sort_by(|a, b| a.at.cmp(&b.at));
    left
}

/// The value as a table `[positions, width]`, and a name for it.
fn table(evaluator: &PartialEvaluator<'_>, id: ValueId, max_positions: usize) -> Result<(Constant, String), String> {
    let graph = evaluator.graph;
    let value = graph.value(id);
    let text = |stuck: Stuck| format!("it could not be computed: {stuck}");
    if !value.dtype.is_some_and(DType::is_float) {
        return Err("it is computed from positions in a way that was not understood".into());
    }
    let mut at = id;
    while let Some((_, node)) = graph.def(at)
        && let (Op::Cast { .. } | Op::Identity, Some(x)) = (&node.op, node.input(0))
        && graph.value(x).dtype.is_some_and(DType::is_float)
    {
        at = x;
    }
    if let Some((_, node)) = graph.def(at)
        && let Op::Gather { axis: 0 } = node.op
        && let (Some(weight), Some(index)) = (node.input(0), node.input(1))
        && let Some(constant) = graph.constant(weight)
        && let [rows, _] = constant.shape()[..]
    {
        let mut offset = None;
        let named = lengths(graph, [index], |_| false);
        let far = positions(&named, max_positions.min(rows));
        let sizes = [(1, 0, 4), (2, 3, 2)].into_iter();
        for (batch, past, tokens) in sizes.chain(far.into_iter().map(|past| (1, past, 1))) {
            let trial = evaluator.trial(batch, past, tokens);
            let index = evaluator.eval(&trial, index).map_err(text)?.to_i64();
            for (i, at) in index.iter().enumerate() {
                let position = (trial.sizes.past + i % trial.sizes.tokens) as i64;
                if *offset.get_or_insert(at - position) != at - position {
                    return Err("its rows are not those of the positions".into());
                }
            }
        }
        let start = offset.unwrap_or(0);
        if start < 0 || start as usize >= rows {
            return Err(format!("its table has no row for position 0 (its offset is {start})"));
        }
        let table = if start == 0 {
            constant.clone()
        } else {
            constant.sliced(0, start as usize, rows)
        };
        return Ok((table, format!("{}.positions", graph.value(weight).name)));
    }
    let rows = |past: usize, tokens: usize| -> Result<(Vec<f32>, usize), String> {
        let trial = evaluator.trial(1, past, tokens);
        let tensor = evaluator.eval(&trial, id).map_err(text)?;
        let width = *tensor.shape().last().ok_or("it is a scalar")?;
        let mut numbers = tensor.to_f32();
        let row = trial.sizes.tokens * width;
        // With a fixed batch, every sequence has the same rows.
        if row > 0 && numbers.len() > row && numbers.chunks(row).all(|other| *other == numbers[..row]) {
            numbers.truncate(row);
        }
        if numbers.len() != row {
            return Err(format!("its shape {:?} is not one row for each token", tensor.shape()));
        }
        Ok((numbers, width))
    };
    let (all, width) = rows(0, max_positions)?;
    let named = lengths(graph, [id], |_| false);
    let singles = positions(&named, max_positions).into_iter().map(|start| (start, 1));
    for (start, count) in singles.chain([(1, 2), (max_positions.saturating_sub(3), 2)]) {
        let (part, _) = rows(start, count)?;
        let same = all[start * width..]
            .iter()
            .zip(&part)
            .all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs().max(1.0));
        if !same {
            return Err("it depends on more than the position".into());
        }
    }
    let table = Tensor::from_f32(vec![max_positions, width], &all);
    let table = Constant::tensor(table).cast(value.dtype.unwrap_or(DType::F32));
    let table = Constant::tensor(table.materialize().map_err(|e| e.to_string())?);
    Ok((table, format!("{}.positions", value.name)))
}
