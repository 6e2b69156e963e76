//! Recognizes how a graph chooses experts: its results for trial logits are compared with those of every known kind of
//! routing. The weights of the experts are found where their results are combined (`body`).

use super::gating::scalars;
use super::region::Flow;
use super::trial::{Random, Trial, agree};
use crate::graph::eval::eval_op;
use crate::graph::op::{Binary, ChosenWeights, Op, Reduction, RouterScores, Routing};
use crate::graph::{Graph, NodeId, ValueId};
use crate::passes::roles::Roles;
use crate::tensor::{DType, Tensor};

/// A recognized choice of experts.
#[derive(Clone, Debug)]
pub struct Found {
    /// How it follows from the logits.
    pub routing: Routing,
    /// `[.., experts]`.
    pub logits: ValueId,
    /// Added to the scores only for the choice.
    pub correction: Option<ValueId>,
    /// Number of experts.
    pub experts: usize,
}

/// A node that chooses experts for every token, and how many of how many.
#[derive(Clone, Debug)]
pub struct Choice {
    pub node: NodeId,
    /// The scores.
    pub scores: ValueId,
    /// The indices, if they have a reader.
    pub chosen: Option<ValueId>,
    pub top_k: usize,
    pub experts: usize,
}

/// The choice of a node along the last axis, if it is one.
pub fn choice(graph: &Graph, id: NodeId) -> Option<Choice> {
    let node = graph.node(id);
    let scores = node.input(0)?;
    let shape = graph.shape(scores)?;
    let last = |axis: i64| axis == -1 || axis + 1 == shape.len() as i64;
    let experts = usize::try_from(shape.last()?.as_const()?).ok()?;
    let (chosen, top_k) = match node.op {
        Op::TopK {
            axis, largest: true, ..
        } if last(axis) => {
            let either = node.output(1).or_else(|| node.output(0))?;
            let top_k = graph.shape(either)?.last()?.as_const()?;
            (node.output(1), usize::try_from(top_k).ok()?)
        }
        Op::ArgMax { axis, .. } if last(axis) => (node.output(0), 1),
        _ => return None,
    };
    Some(Choice {
        node: id,
        scores,
        chosen,
        top_k,
        experts,
    })
}

/// Which logits of trial tokens are drawn.
#[derive(Clone, Copy, Debug)]
pub enum Draw {
    /// Every expert is chosen by some token.
    Covering,
    /// Any.
    Any,
    /// Those of a token lie within twice this share of their size, so that it matters where a margin ends.
    Close(f32),
}

/// Logits for trial tokens.
pub fn logits(dtype: DType, shape: Vec<usize>, top_k: usize, draw: Draw, seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let experts = shape.last().copied().unwrap_or(1).max(1);
    let count: usize = shape.iter().product();
    let mut values: Vec<f64> = (0..count).map(|_| random.next() * 2.0).collect();
    for (row, values) in values.chunks_exact_mut(experts).enumerate() {
        match draw {
            Draw::Covering => (0..top_k).for_each(|i| values[(row * top_k + i) % experts] += 4.0),
            Draw::Any => {}
            Draw::Close(margin) => {
                let size = (1.0 + random.next().abs()) * random.next().signum();
                for value in values {
                    *value = size + *value / 2.0 * f64::from(margin) * size.abs();
                }
            }
        }
    }
    Tensor::from_f64_as(dtype, shape, &values)
}

/// The result of a linear layer that the scores are computed from.
fn logits_of(flow: &Flow<'_>, choice: &Choice) -> Option<ValueId> {
    let mut candidates = std::iter::once(choice.scores).chain(flow.dominators(choice.scores));
    candidates.find(|value| is_linear(flow, *value))
}

/// Whether a value is a product, perhaps with a bias: a constant is none if something reads the product without it, but a
/// correction of the choice.
fn is_linear(flow: &Flow<'_>, value: ValueId) -> bool {
    let graph = flow.graph;
    let product = |value: ValueId| {
        graph
            .def(value)
            .is_some_and(|(_, node)| matches!(node.op, Op::MatMul | Op::Gemm { .. } | Op::FusedMatMul { .. }))
    };
    let Some((_, node)) = graph.def(value) else {
        return false;
    };
    match node.op {
        Op::Binary(Binary::Add) => {
            let constant = |v: ValueId| graph.constant(v).is_some();
            let with_bias = |v: ValueId| product(v) && flow.only_reader(v).is_some();
            match (node.input(0), node.input(1)) {
                (Some(a), Some(b)) => with_bias(a) && constant(b) || constant(a) && with_bias(b),
                _ => false,
            }
        }
        _ => product(value),
    }
}

/// All kinds of routing that choose the same experts as the graph, which differ in the weights; the reason if there is
/// none.
pub fn candidates(flow: &Flow<'_>, roles: &Roles, choice: &Choice) -> Result<Vec<Found>, String> {
    let graph = flow.graph;
    let experts = choice.experts;
    let logits_id = logits_of(flow, choice).ok_or("its scores do not come from a linear layer")?;
    let dtype = graph.value(logits_id).dtype.unwrap_or(DType::F32);
    let cone = flow.cone(choice.scores, &[logits_id]);
    let turns = in_turn(graph, &cone, choice);
    let top_k = choice.top_k * turns.len();
    if top_k == 0 || top_k > experts {
        return Err(format!("it chooses {top_k} of {experts} experts"));
    }
    let margins = match turns.len() {
        1 => Vec::new(),
        _ => margins(flow, logits_id),
    };
    // Numbers that may be added to scores, and choices of groups ahead of this one.
    let mut corrections: Vec<Option<ValueId>> = vec![None];
    let mut groups: Vec<[usize; 3]> = Vec::new();
    for id in &cone {
        let node = graph.node(*id);
        let per_expert = |v: &ValueId| {
            let constant = graph.constant(*v);
            constant.is_some_and(|c| c.len() == experts && c.dtype().is_float() && experts > 1)
        };
        if matches!(node.op, Op::Binary(Binary::Add)) {
            corrections.extend(node.inputs.iter().flatten().copied().filter(per_expert).map(Some));
        }
    }
    groups.extend(groups_of(graph, &cone, experts));
    let tokens = experts.div_ceil(top_k) + 3;
    let mut trials = Vec::new();
    for (draw, seed) in [(Draw::Covering, 11), (Draw::Any, 12), (Draw::Any, 13)] {
        let mut trial = Trial::new(graph, roles, tokens);
        let shape = trial.dims(logits_id).filter(|dims| dims.last() == Some(&experts));
        let shape = shape.ok_or("the sizes of its logits are not known")?;
        let tensor = logits(dtype, shape, top_k, draw, seed);
        trial.bind(logits_id, tensor.clone());
        let mut chosen = Vec::new();
        for turn in &turns {
            let value = turn.chosen.ok_or("nothing reads which experts it chooses")?;
            let value = trial.value(value).ok_or("its choice depends on more than its logits")?;
            chosen.push(value.to_i64());
        }
        trials.push((tensor, side_by_side(&chosen, choice.top_k)));
    }
    let mut found = Vec::new();
    for scores in [RouterScores::Softmax, RouterScores::Sigmoid, RouterScores::Logits] {
        for correction in &corrections {
            for [groups, top_groups, group_best] in std::iter::once([0, 0, 0]).chain(groups.iter().copied()) {
                let routing = |(weights, margin)| Routing {
                    top_k,
                    scores,
                    weights,
                    margin,
                    scale: 1.0,
                    groups,
                    top_groups,
                    group_best,
                };
                let with = |how| Found {
                    routing: routing(how),
                    logits: logits_id,
                    correction: *correction,
                    experts,
                };
                let alike = trials.iter().all(|(tensor, chosen)| {
                    let routed = with((ChosenWeights::Scores, 0.0)).route(graph, tensor);
                    routed.is_some_and(|[_, experts]| experts.to_i64() == *chosen)
                });
                if alike {
                    let plain = [
                        ChosenWeights::Normalized,
                        ChosenWeights::Scores,
                        ChosenWeights::Softmax,
                        ChosenWeights::Sigmoid,
                    ];
                    let mixers = margins.iter().map(|margin| (ChosenWeights::SparseMixer, *margin));
                    found.extend(plain.map(|weights| (weights, 0.0)).into_iter().chain(mixers).map(with));
                }
            }
        }
    }
    match found.is_empty() {
        true => Err("it chooses experts by its logits in no known way".to_string()),
        false => Ok(found),
    }
}

/// The choices of one expert each, in their order, of which this one is the last: each knows which ones those before it chose.
fn in_turn(graph: &Graph, cone: &[NodeId], last: &Choice) -> Vec<Choice> {
    let one_of = |choice: &Choice| choice.top_k == 1 && choice.experts == last.experts;
    let before = cone.iter().filter_map(|id| choice(graph, *id)).filter(one_of);
    let mut turns: Vec<Choice> = before.filter(|_| last.top_k == 1).collect();
    turns.push(last.clone());
    turns
}

/// Rows of each choice's `k` experts as rows of all of them.
fn side_by_side(chosen: &[Vec<i64>], k: usize) -> Vec<i64> {
    let rows = chosen.iter().map(|turn| turn.len()).min().unwrap_or(0) / k.max(1);
    let row = |i: usize| chosen.iter().flat_map(move |turn| turn[i * k..][..k].iter().copied());
    (0..rows).flat_map(row).collect()
}

/// What something that follows from the logits is compared with: shares below 1.
fn margins(flow: &Flow<'_>, logits: ValueId) -> Vec<f32> {
    let graph = flow.graph;
    let Some((of, _)) = graph.producer_of(logits) else {
        return Vec::new();
    };
    let behind = flow.descendants(of);
    let mut nodes = Vec::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        let compares = matches!(
            node.op,
            Op::Binary(Binary::Greater | Binary::GreaterOrEqual | Binary::Less | Binary::LessOrEqual)
        );
        let inputs = || node.inputs.iter().flatten();
        if compares && inputs().any(|v| behind.contains(v)) {
            nodes.push(id);
            nodes.extend(inputs().filter_map(|v| Some(graph.producer_of(*v)?.0)));
        }
    }
    let shares = scalars(graph, &nodes)
        .into_iter()
        .filter(|share| (1e-6..1.0).contains(share));
    shares.map(|share| share as f32).collect()
}

impl Found {
    /// Weights and experts for these logits.
    pub fn route(&self, graph: &Graph, logits: &Tensor) -> Option<[Tensor; 2]> {
        let correction = match self.correction {
            Some(value) => {
                let constant = graph.constant(value)?.reshaped(vec![self.experts]);
                Some(constant.materialize().ok()?)
            }
            None => None,
        };
        let inputs = [Some(logits.clone()), correction];
        let results = eval_op(&Op::Routing(self.routing.clone()), &inputs).ok()?;
        let mut results = results.into_iter().flatten();
        Some([results.next()?, results.next()?])
    }
}

/// The factor of `found` relative to `wanted`.
pub fn factor(f: &[f64], w: &[f64], tolerance: f64) -> Option<f64> {
    if f.len() != w.len() || f.is_empty() {
        return None;
    }
    let (sum, square) = f
        .iter()
        .zip(w)
        .fold((0.0, 0.0), |(s, q), (f, w)| (s + f * w, q + w * w));
    let factor = sum / square;
    let scaled: Vec<f64> = w.iter().map(|w| w * factor).collect();
    let scale = scaled
        .iter()
        .map(|v| v.abs())
        .fold(0.0, f64::max)
        .max(f64::MIN_POSITIVE);
    let relative: Vec<f64> = f.iter().map(|v| v / scale).collect();
    let scaled: Vec<f64> = scaled.iter().map(|v| v / scale).collect();
    (factor.is_finite() && factor != 0.0 && agree(&relative, &scaled, tolerance)).then_some(factor)
}

/// Groups of experts in choices before the last one: their number, how many are chosen, and how many experts rank a
/// group.
fn groups_of(graph: &Graph, cone: &[NodeId], experts: usize) -> Vec<[usize; 3]> {
    let mut found = Vec::new();
    let choices: Vec<Choice> = cone.iter().filter_map(|id| choice(graph, *id)).collect();
    for of_groups in &choices {
        let groups = of_groups.experts;
        if groups < 2 || !experts.is_multiple_of(groups) || groups == experts {
            continue;
        }
        let size = experts / groups;
        let within = choices.iter().filter(|c| c.experts == size && c.node != of_groups.node);
        let mut best: Vec<usize> = within.map(|c| c.top_k).collect();
        let by_maximum = cone.iter().any(|id| {
            matches!(
                graph.node(*id).op,
                Op::Reduce {
                    reduction: Reduction::Max,
                    ..
                }
            )
        });
        if by_maximum || best.is_empty() {
            best.push(1);
        }
        found.extend(best.into_iter().map(|best| [groups, of_groups.top_k, best]));
    }
    found
}
