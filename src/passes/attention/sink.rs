//! Sinks of an attention that is written out, in two forms.
//!
//! gpt-oss joins a column of scores to the others before the softmax and leaves it out after it: `Concat(scores, sinks)`, perhaps
//! less the largest of each row, `Softmax`, `Slice` of all columns but the last. The column has to be, when run, one constant
//! number for each head.
//!
//! Granite multiplies what attention gives without sinks by `sigmoid(log sum exp(scores) - sink)`, which is the share that a
//! softmax with one more score would leave to the others. Whatever computes the factor is run, and has to give that.

use std::collections::{HashMap, HashSet};

use super::find::{Uses, is_largest_of};
use super::projection::{noise, tolerance};
use crate::graph::ValueId;
use crate::graph::op::{Binary, Op};
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::{PartialEvaluator, Stuck, tensor_of};
use crate::tensor::DType;

/// Nodes that may compute a factor from scores.
const FACTOR_NODES: usize = 24;

/// The operands of a softmax over scores and sinks: the scores, and the constant with a number per head. `None`:
/// nothing is appended to the scores.
pub fn of_scores(evaluator: &PartialEvaluator<'_>, mut at: ValueId) -> Result<Option<(ValueId, ValueId)>, String> {
    let graph = evaluator.graph;
    for _ in 0..8 {
        let Some((_, node)) = graph.def(at) else {
            return Ok(None);
        };
        match node.op {
            Op::Identity | Op::Cast { .. } => at = node.input(0).unwrap_or(at),
            Op::Binary(Binary::Sub) if is_largest_of(graph, at) => at = node.input(0).unwrap_or(at),
            Op::Concat { axis } => {
                let rank = graph.shape(at).map_or(0, Vec::len) as i64;
                let (Some(scores), Some(sinks), 2) = (node.input(0), node.input(1), node.inputs.len()) else {
                    return Err("its scores are joined of other than two parts".into());
                };
                if (axis != -1 && axis != rank - 1) || evaluator.dependence(sinks) == Dependence::Data {
                    return Err("its scores are joined of parts that are not scores and sinks".into());
                }
                return Ok(Some((scores, constant_of(evaluator, sinks)?)));
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// The constant with the numbers of a column, head by head.
fn constant_of(evaluator: &PartialEvaluator<'_>, column: ValueId) -> Result<ValueId, String> {
    let graph = evaluator.graph;
    let name = &graph.value(column).name;
    let mut at = column;
    while graph.constant(at).is_none() {
        let node = graph.def(at).map(|(_, node)| node);
        let movement = node.filter(|node| {
            matches!(
                node.op,
                Op::Identity | Op::Cast { .. } | Op::Reshape { .. } | Op::Expand | Op::Unsqueeze | Op::Squeeze
            )
        });
        at = movement
            .and_then(|node| node.input(0))
            .ok_or_else(|| format!("the column {name} beside its scores is not constant"))?;
    }
    let numbers = graph.constant(at).expect("found").materialize();
    let numbers = numbers.map_err(|error| error.to_string())?.to_f32();
    for (batch, past, tokens) in [(2, 3, 2), (1, 0, 4)] {
        let trial = evaluator.trial(batch, past, tokens);
        // The number of sequences that the export fixed.
        let batch = trial.sizes.batch;
        let seen = evaluator.eval(&trial, column).map_err(|stuck| stuck.to_string())?;
        let shape = seen.shape();
        let rows = shape.len() >= 2 && shape[shape.len() - 2..] == [tokens, 1];
        let heads: usize = if rows {
            shape[1..shape.len() - 2].iter().product()
        } else {
            0
        };
        let same = |(i, number): (usize, &f32)| *number == numbers[i / tokens % heads.max(1)];
        if heads != numbers.len() || shape[0] != batch || !seen.to_f32().iter().enumerate().all(same) {
            return Err(format!(
                "the column {name} of shape {shape:?} beside its scores is not one number for each head"
            ));
        }
    }
    Ok(at)
}

/// After the softmax: the probabilities without those of the sinks.
pub fn without(
    evaluator: &PartialEvaluator<'_>,
    uses: &Uses,
    mut at: ValueId,
    scores: ValueId,
) -> Result<ValueId, String> {
    let graph = evaluator.graph;
    for _ in 0..8 {
        let [reader] = uses.get(&at).map(Vec::as_slice).unwrap_or_default() else {
            return Err("its probabilities are read by several nodes".into());
        };
        let node = graph.node(reader.0);
        let output = node.output(0).ok_or("a node without output")?;
        match node.op {
            Op::Identity | Op::Cast { .. } => at = output,
            Op::Slice => {
                let ints = |i: usize| Some(graph.constant(node.input(i)?)?.materialize().ok()?.to_i64());
                let from_first = ints(1).is_some_and(|starts| starts == [0]);
                let step = node.input(4).is_none() || ints(4).is_some_and(|steps| steps == [1]);
                if !from_first || !step || graph.shape(output) != graph.shape(scores) {
                    return Err(format!("{} does not leave out the sinks alone", node.name));
                }
                return Ok(output);
            }
            _ => break,
        }
    }
    Err("the probabilities of its sinks are not left out".into())
}

/// The product with the values times a factor that follows from the scores alone, and the constant of the sinks that this factor
/// stands for. `None`: nothing of that kind is behind the product.
pub fn as_factor(
    evaluator: &PartialEvaluator<'_>,
    uses: &Uses,
    scores: ValueId,
    product: ValueId,
) -> Result<Option<(ValueId, ValueId)>, String> {
    let graph = evaluator.graph;
    let readers = uses.get(&product).map(Vec::as_slice).unwrap_or_default();
    let [(reader, input)] = readers else { return Ok(None) };
    let node = graph.node(*reader);
    let (Op::Binary(Binary::Mul), Some(output), Some(factor)) = (&node.op, node.output(0), node.input(1 - input))
    else {
        return Ok(None);
    };
    let Some(constants) = factor_of(evaluator, factor, scores) else {
        return Ok(None);
    };
    let heads = graph.shape(scores).filter(|shape| shape.len() == 4);
    let heads = heads.and_then(|shape| usize::try_from(shape[1].as_const()?).ok());
    for id in constants {
        let constant = graph.constant(id).filter(|constant| Some(constant.len()) == heads);
        let Some(numbers) = constant.and_then(|constant| constant.materialize().ok()) else {
            continue;
        };
        if shares(evaluator, [scores, product, output], &numbers.to_f64()).map_err(|stuck| stuck.to_string())? {
            return Ok(Some((output, id)));
        }
    }
    Err(format!(
        "its result is multiplied by {}, which follows from its scores and is not the share that sinks leave",
        graph.value(factor).name
    ))
}

/// The constants that a value is computed with, if it is computed from the scores, and from no other data.
fn factor_of(evaluator: &PartialEvaluator<'_>, factor: ValueId, scores: ValueId) -> Option<Vec<ValueId>> {
    let graph = evaluator.graph;
    let mut stack = vec![factor];
    let mut seen = HashSet::from([factor]);
    let mut constants = Vec::new();
    let (mut nodes, mut reads_scores) = (0, false);
    while let Some(id) = stack.pop() {
        if id == scores {
            reads_scores = true;
        } else if graph.constant(id).is_some() {
            constants.push(id);
        } else if evaluator.dependence(id) != Dependence::Positional {
            let (_, node) = graph.def(id)?;
            nodes += 1;
            if nodes > FACTOR_NODES {
                return None;
            }
            // Sizes are known without what has them.
            if !matches!(node.op, Op::Shape { .. } | Op::Size) {
                stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
            }
        }
    }
    reads_scores.then_some(constants)
}

/// Whether the output is the product, of each row the share that a sink of its head leaves to its scores.
fn shares(
    evaluator: &PartialEvaluator<'_>,
    [scores, product, output]: [ValueId; 3],
    sinks: &[f64],
) -> Result<bool, Stuck> {
    let dtype = |id: ValueId| evaluator.graph.value(id).dtype.unwrap_or(DType::F32);
    for (seed, (batch, past, tokens)) in [(2, 3, 2), (1, 0, 4), (1, 40, 1)].into_iter().enumerate() {
        let trial = evaluator.trial(batch, past, tokens);
        let (of_scores, of_product) = (evaluator.dims(&trial, scores)?, evaluator.dims(&trial, product)?);
        let fed = |id: ValueId, dims: &[usize], size: f64, seed: u64| {
            let values: Vec<f64> = noise(dims.iter().product(), seed).iter().map(|v| v * size).collect();
            tensor_of(dtype(id), dims.to_vec(), &values)
        };
        let seed = 61 + 2 * seed as u64;
        let x = fed(scores, &of_scores, 4.0, seed);
        let y = fed(product, &of_product, 1.0, seed + 1);
        let feeds = HashMap::from([(scores, x.clone()), (product, y.clone())]);
        let found = evaluator.run(&trial, &feeds, &[output])?[0].to_f64();
        let (slots, width) = (of_scores[3].max(1), of_product.last().copied().unwrap_or(1).max(1));
        let rows: Vec<f64> = x
            .to_f64()
            .chunks(slots)
            .map(|row| row.iter().map(|s| s.exp()).sum())
            .collect();
        let limit = 4.0 * f64::from(tolerance(dtype(output)).max(tolerance(dtype(scores))));
        let right = |(i, (found, whole)): (usize, (&f64, f64))| {
            let row = i / width;
            let head = row / of_scores[2].max(1) % sinks.len();
            let wanted = rows.get(row).map(|sum| whole * sum / (sum + sinks[head].exp()));
            wanted.is_some_and(|wanted| (found - wanted).abs() <= limit)
        };
        let given = y.to_f64();
        if found.len() != given.len() || !found.iter().zip(given).enumerate().all(right) {
            return Ok(false);
        }
    }
    Ok(true)
}
