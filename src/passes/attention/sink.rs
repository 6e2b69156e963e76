//! Sinks of an attention in single operators: a column of scores appended before the softmax and removed after it.
//!
//! gpt-oss's form: `Concat(scores, sinks)`, optionally minus the maximum of each row, `Softmax`, `Slice` of all columns
//! but the last. When executed, the column must be one constant number per head.

use super::find::{Uses, is_largest_of};
use crate::graph::ValueId;
use crate::graph::op::{Binary, Op};
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::PartialEvaluator;

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
