//! Logits of all tokens, if the export selects some of them.
//!
//! An export for generation may keep only the last token before or after its head, or as many as an input specifies.
//! The canonical graph has logits of every token: the runtime chooses rows. So the selection is removed if everything
//! between it and the logits works on each token separately, and if its execution gives all rows, the last ones, or
//! those that the input names. Anything else is an [`Obstacle`].

use std::collections::{BTreeMap, HashMap, HashSet};

use super::PassError;
use super::attention::Obstacle;
use super::dependence::Dependence;
use super::lengths::{lengths, positions};
use super::partial_eval::{PartialEvaluator, Trial};
use super::pattern::{finish, ints, rank};
use super::roles::{InputRole, Roles};
use crate::dim::{Dim, Sym};
use crate::graph::op::{Op, RowWise};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::tensor::{DType, Tensor};

/// A node that chooses rows, and its replacement.
struct Choice {
    node: NodeId,
    /// `[batch, tokens, n]`
    rows: ValueId,
    /// After it: axes of one token, inserted where the choice has dropped the token axis.
    unsqueezed: Vec<NodeId>,
    /// Values between it and the logits, whose shapes change.
    behind: Vec<ValueId>,
}

/// The longest length that a choice is executed at.
const LONGEST: usize = 1 << 16;

/// Removes choices of rows and returns their number. The graph must be inferred and sorted; infer again.
pub fn run(graph: &mut Graph, roles: &Roles) -> Result<usize, PassError> {
    let mut count = 0;
    loop {
        let found = {
            let evaluator = PartialEvaluator::new(graph, roles);
            let ids: Vec<NodeId> = graph.node_ids().rev().collect();
            ids.into_iter().find_map(|id| {
                let choice = choice(&evaluator, id)?;
                Some(prove(&evaluator, &choice).map(|()| choice))
            })
        };
        match found {
            None => break,
            Some(Err(obstacle)) => {
                return Err(PassError::Obstacles {
                    obstacles: vec![obstacle],
                });
            }
            Some(Ok(choice)) => take_out(graph, choice),
        }
        count += 1;
        finish(graph, count)?;
        // The shapes show whether another choice precedes this one.
        super::infer(graph)?;
    }
    let uses = graph.uses();
    let left = graph
        .inputs
        .iter()
        .filter(|id| roles.of.get(id) == Some(&InputRole::ChosenRows));
    let left: Vec<Obstacle> = left
        .filter(|id| uses.contains_key(id))
        .map(|id| Obstacle {
            layer: None,
            at: graph.value(*id).name.clone(),
            reason: "this input was taken for the number of tokens that get logits, and it does something else".into(),
        })
        .collect();
    match left.is_empty() {
        true => Ok(count),
        false => Err(PassError::Obstacles { obstacles: left }),
    }
}

/// The node as one that picks tokens, if nothing but operators on single tokens is between it and an output.
fn choice(evaluator: &PartialEvaluator<'_>, id: NodeId) -> Option<Choice> {
    let graph = evaluator.graph;
    let node = graph.node(id);
    let (Op::Slice | Op::Gather { .. }, Some(rows), Some(chosen)) = (&node.op, node.input(0), node.output(0)) else {
        return None;
    };
    let (from, to) = (graph.shape(rows)?, graph.shape(chosen)?);
    let [batch, tokens, width] = &from[..] else { return None };
    let picks = match &to[..] {
        [b, t, w] => (b, w) == (batch, width) && t != tokens,
        [b, w] => matches!(node.op, Op::Gather { .. }) && (b, w) == (batch, width),
        _ => false,
    };
    if !picks || *tokens != Dim::sym(Sym::tokens()) {
        return None;
    }
    // Values after it without the token axis, and those with it.
    let mut flat: HashSet<ValueId> = HashSet::new();
    let mut behind = vec![chosen];
    flat.extend((to.len() == 2).then_some(chosen));
    let mut unsqueezed = Vec::new();
    for reader in graph.node_ids() {
        let node = graph.node(reader);
        let reached = |v: ValueId| behind.contains(&v);
        if reader == id || !node.inputs.iter().flatten().any(|v| reached(*v)) {
            continue;
        }
        let [Some(output)] = node.outputs[..] else { return None };
        let is_flat = node.inputs.iter().flatten().any(|v| flat.contains(v));
        if is_flat && node.op == Op::Unsqueeze {
            let axes = node.input(1).and_then(|axes| ints(graph, axes))?;
            if axes != [1] && axes != [-2] {
                return None;
            }
            unsqueezed.push(reader);
        } else if !on_single_tokens(evaluator, node, &behind, is_flat.then_some(&flat)) {
            return None;
        } else if is_flat {
            flat.insert(output);
        }
        behind.push(output);
    }
    let given: Vec<&ValueId> = behind.iter().filter(|v| graph.outputs.contains(v)).collect();
    (given.len() == 1).then_some(Choice {
        node: id,
        rows,
        unsqueezed,
        behind,
    })
}

/// Whether each token of the result is computed only from the same token of the values after the choice (`behind`),
/// also with more tokens. `flat`: values without a token axis, if the node reads one of them.
fn on_single_tokens(
    evaluator: &PartialEvaluator<'_>,
    node: &Node,
    behind: &[ValueId],
    flat: Option<&HashSet<ValueId>>,
) -> bool {
    let graph = evaluator.graph;
    let constant = |v: ValueId| evaluator.dependence(v) == Dependence::Constant;
    if node.op == Op::MatMul {
        let weight = node.input(1);
        return node.input(0).is_some_and(|x| behind.contains(&x))
            && weight.is_some_and(|w| constant(w) && rank(graph, w) == Some(2));
    }
    let works = match node.op.info().row_wise {
        RowWise::Always => true,
        RowWise::OverLastAxis => node
            .op
            .axis()
            .is_some_and(|axis| axis == -1 || (flat.is_none() && axis == 2)),
        RowWise::Never => false,
    };
    let most = if flat.is_some() { 2 } else { 3 };
    // The same for every token, and for every sequence.
    let row = |v: ValueId| {
        let shape = graph.shape(v).filter(|_| constant(v));
        shape.is_some_and(|shape| {
            let leading = shape.split_last().map_or(&[][..], |(_, leading)| leading);
            shape.len() <= most && leading.iter().all(|dim| dim.as_const() == Some(1))
        })
    };
    let alike = |v: ValueId| behind.contains(&v) && flat.is_none_or(|flat| flat.contains(&v));
    works && node.inputs.iter().flatten().all(|v| alike(*v) || row(*v))
}

/// Executes a choice on numbered rows.
fn prove(evaluator: &PartialEvaluator<'_>, choice: &Choice) -> Result<(), Obstacle> {
    let graph = evaluator.graph;
    let node = graph.node(choice.node);
    let obstacle = |reason: String| Obstacle {
        layer: None,
        at: node.name.clone(),
        reason: format!("it chooses tokens that get logits, and {reason}"),
    };
    let index: Vec<ValueId> = node.inputs[1..].iter().flatten().copied().collect();
    let inputs: Vec<ValueId> = graph
        .inputs
        .iter()
        .copied()
        .filter(|id| feeds(graph, *id, &index))
        .collect();
    let named = lengths(graph, index.iter().copied(), |_| false);
    let counts: Vec<ValueId> = inputs
        .into_iter()
        .filter(|id| evaluator.roles.of.get(id) == Some(&InputRole::ChosenRows))
        .collect();
    if counts.len() > 1 {
        return Err(obstacle("several inputs say which".into()));
    }
    for (batch, past, tokens) in sizes(&named) {
        let trial = evaluator.trial(batch, past, tokens);
        let given = counts
            .first()
            .map_or_else(|| Ok(vec![None]), |id| samples(evaluator, &trial, *id));
        for given in given.map_err(&obstacle)? {
            let seen = chosen(evaluator, &trial, choice, &given).map_err(&obstacle)?;
            let expected: Vec<usize> = match &given {
                Some((_, Given::Rows(rows))) => rows.clone(),
                Some((_, Given::Count(count))) => (tokens.saturating_sub(*count)..tokens).collect(),
                None => (tokens.saturating_sub(seen.len().max(1))..tokens).collect(),
            };
            if seen != expected {
                return Err(obstacle(format!(
                    "of {tokens} tokens after {past} past ones these are {}, not {}",
                    listed(&seen),
                    listed(&expected)
                )));
            }
        }
        if tokens > 64 {
            evaluator.forget(&trial);
        }
    }
    Ok(())
}

/// A list, shortened.
fn listed(rows: &[usize]) -> String {
    match rows {
        [first, .., last] if rows.len() > 8 => format!("{} from {first} to {last}", rows.len()),
        _ => format!("{rows:?}"),
    }
}

/// The value of an input that selects the tokens with logits.
enum Given {
    /// This many, from the end.
    Count(usize),
    /// These tokens.
    Rows(Vec<usize>),
}

fn sizes(named: &BTreeMap<usize, String>) -> Vec<(usize, usize, usize)> {
    let mut sizes = vec![(1, 0, 5), (2, 3, 1), (2, 2, 4), (1, 0, 1), (1, 7, 3)];
    let longest = named.keys().next_back().map_or(0, |longest| longest + 2).min(LONGEST);
    let far = positions(named, longest).into_iter().filter(|n| *n > 0);
    sizes.extend(far.map(|tokens| (1, 0, tokens)));
    sizes
}

/// Whether values are computed from an input.
fn feeds(graph: &Graph, input: ValueId, values: &[ValueId]) -> bool {
    let mut stack = values.to_vec();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        if id == input {
            return true;
        }
        if let Some((_, node)) = graph.def(id) {
            stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
        }
    }
    false
}

/// Values of the input to test: a count, or a list of tokens if its length is free.
fn samples(
    evaluator: &PartialEvaluator<'_>,
    trial: &Trial,
    id: ValueId,
) -> Result<Vec<Option<(ValueId, Given)>>, String> {
    let shape = evaluator.graph.shape(id).cloned().unwrap_or_default();
    let tokens = trial.sizes.tokens;
    let given = match &shape[..] {
        [] => vec![1, 2, tokens].into_iter().map(Given::Count).collect(),
        [one] if one.as_const() == Some(1) => vec![1, 2, tokens].into_iter().map(Given::Count).collect(),
        [dim] if dim.as_const().is_none() => vec![
            Given::Rows((0..tokens).collect()),
            Given::Rows(vec![tokens - 1]),
            Given::Rows(vec![tokens / 2, tokens - 1, 0]),
        ],
        other => return Err(format!("the input that says which has the shape {other:?}")),
    };
    Ok(given.into_iter().map(|given| Some((id, given))).collect())
}

/// Which tokens are chosen, the same in every sequence.
fn chosen(
    evaluator: &PartialEvaluator<'_>,
    trial: &Trial,
    choice: &Choice,
    given: &Option<(ValueId, Given)>,
) -> Result<Vec<usize>, String> {
    const WIDTH: usize = 2;
    let graph = evaluator.graph;
    let (batch, tokens) = (trial.sizes.batch, trial.sizes.tokens);
    let dtype = |v: ValueId, otherwise: DType| graph.value(v).dtype.unwrap_or(otherwise);
    let numbers: Vec<f32> = (0..batch * tokens * WIDTH).map(|i| i as f32).collect();
    let mut feeds = HashMap::from([(choice.rows, Tensor::from_f32(vec![batch, tokens, WIDTH], &numbers))]);
    if let Some((id, given)) = given {
        let (values, shape) = match given {
            Given::Count(count) => (vec![*count as f64], vec![1; rank(graph, *id).unwrap_or(0)]),
            Given::Rows(rows) => (rows.iter().map(|row| *row as f64).collect(), vec![rows.len()]),
        };
        let tensor = super::partial_eval::tensor_of(dtype(*id, DType::I64), shape, &values);
        feeds.insert(*id, tensor);
    }
    let output = graph.node(choice.node).output(0).expect("a choice has a result");
    let results = evaluator
        .run(trial, &feeds, &[output])
        .map_err(|stuck| stuck.to_string())?;
    let result = &results[0];
    let count = result.len() / (batch * WIDTH).max(1);
    let values = result.to_f32();
    let row = |at: usize| values[at * WIDTH] as usize / WIDTH;
    let first: Vec<usize> = (0..count).map(row).collect();
    let whole = values.len() == batch * count * WIDTH
        && (0..batch * count).all(|at| {
            let (sequence, token) = (at / count, first[at % count]);
            let start = ((sequence * tokens + token) * WIDTH) as f32;
            (0..WIDTH).all(|column| values[at * WIDTH + column] == start + column as f32)
        });
    match whole {
        true => Ok(first),
        false => Err("what it gives are no rows of its operand".into()),
    }
}

fn take_out(graph: &mut Graph, choice: Choice) {
    for value in &choice.behind {
        graph.value_mut(*value).shape = None;
    }
    for id in choice.unsqueezed.into_iter().chain([choice.node]) {
        let node = graph.node(id);
        let from = if id == choice.node {
            Some(choice.rows)
        } else {
            node.input(0)
        };
        let (Some(from), Some(to)) = (from, node.output(0)) else {
            continue;
        };
        // An output keeps its name.
        let node = graph.node_mut(id);
        (node.op, node.inputs) = (Op::Identity, vec![Some(from)]);
        if !graph.outputs.contains(&to) {
            graph.replace_uses(to, from);
        }
    }
}
