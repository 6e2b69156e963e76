//! Finds the attention layers of an export: each `Softmax` over scores, and each `Attention` operator.
//!
//! Walks from the softmax back to the matrix product of queries and keys, through scales, soft caps, masks and casts in
//! any meaningful order, and forward to the product with the values, through guards against rows of NaN. Returns a
//! [`FoundAttention`] for each. `trace` and `projection` analyze the operands, `mask` the masks.

use std::collections::HashMap;

use super::rounding::{Unplaced, name_of_rounded};
use super::sink;
use crate::graph::op::{Attention, BiasedAttention, Binary, Op, Reduction, Rounding, Unary};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::pattern::nan_guarded;

/// A rounding, with its result.
pub type RoundedValue = (ValueId, Rounding);

/// One attention of the export.
#[derive(Clone, Debug)]
pub struct FoundAttention {
    /// Name of the `Softmax` or `Attention` node.
    pub name: String,
    /// `[.., tokens, head_dim]`; the leading axes count batch and query heads.
    pub query: ValueId,
    /// `[.., slots, head_dim]`, or `[.., head_dim, slots]` when `key_transposed`.
    pub key: ValueId,
    pub key_transposed: bool,
    /// `[.., slots, head_dim]`
    pub value: ValueId,
    /// `[.., tokens, slots]`: the scores, or a value of the same shape.
    pub scores: Option<ValueId>,
    pub mask: Vec<MaskTerm>,
    /// Factor of the scores, without those in the operands.
    pub scale: f64,
    pub softcap: Option<f64>,
    /// Roundings of the scores, in units of the scaled scores, the last one first.
    pub rounded_scores: Vec<RoundedValue>,
    /// Those after a soft cap.
    pub rounded_capped: Vec<RoundedValue>,
    /// Roundings of the softmax's result, the first one first.
    pub rounded_probabilities: Vec<RoundedValue>,
    /// Other roundings of scores, which have no place in the canonical operators.
    pub unplaced: Vec<Unplaced>,
    /// A constant with a number per query head: the score of an additional slot, which has no value.
    pub sinks: Option<ValueId>,
    /// A constant `[heads]`: times the slot number, it is added to the score of each slot.
    pub slopes: Option<ValueId>,
    /// Key and value may have fewer heads than the query.
    pub grouped: bool,
    /// `[.., tokens, head_dim]`
    pub output: ValueId,
}

/// A positional value that acts on the scores.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MaskTerm {
    pub value: ValueId,
    pub effect: MaskEffect,
    /// Axes of the scores at that place, with which the axes of the value are aligned from the last one: `[batch,
    /// heads, tokens, slots]`, possibly with batch and heads merged, or with heads split.
    pub rank: usize,
}

/// How a positional value acts on the scores.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MaskEffect {
    /// Added, and the sum multiplied by the factor.
    Add(Factor),
    /// Scores stay where it is true.
    Keep,
    /// Scores stay where it is false.
    Drop,
}

/// A number as a part of a key: equal if its bits are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Factor(u64);

impl Factor {
    pub fn new(factor: f64) -> Self {
        Factor(factor.to_bits())
    }

    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

/// A softmax that does not belong to a known form of attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unrecognized {
    pub node: String,
    pub reason: String,
}

/// All attention layers in order of execution, and softmaxes that are not recognized.
pub fn find(evaluator: &PartialEvaluator<'_>) -> (Vec<FoundAttention>, Vec<Unrecognized>) {
    let graph = evaluator.graph;
    let uses = graph.uses();
    let (mut found, mut unrecognized) = (Vec::new(), Vec::new());
    for id in graph.node_ids() {
        let node = graph.node(id);
        let result = match &node.op {
            Op::Softmax { axis } => from_softmax(evaluator, &uses, node, *axis),
            Op::Attention(how) => from_operator(graph, node, how, 7),
            Op::BiasedAttention(how) => from_biased_operator(graph, node, how),
            _ => continue,
        };
        match result {
            Ok(attention) => found.push(attention),
            Err(reason) => unrecognized.push(Unrecognized {
                node: node.name.clone(),
                reason,
            }),
        }
    }
    (found, unrecognized)
}

/// `decompose::attention` has converted the operator to four dimensions, without a past and without its own causality.
/// The first `inputs` of its inputs are those of ONNX.
fn from_operator(graph: &Graph, node: &Node, how: &Attention, inputs: usize) -> Result<FoundAttention, String> {
    let input = |i: usize| node.input(i).ok_or_else(|| format!("its input {i} is missing"));
    if how.is_causal || how.q_num_heads.is_some() || (4..inputs).any(|i| node.input(i).is_some()) {
        return Err("it has inputs of a shape or dtype, or head counts, that are not understood".into());
    }
    if (1..4).any(|i| node.output(i).is_some_and(|v| graph.outputs.contains(&v))) {
        return Err("its scores are an output of the model".into());
    }
    let (query, key, value) = (input(0)?, input(1)?, input(2)?);
    let dim = graph.shape(query).and_then(|s| s.last()).and_then(|d| d.as_const());
    if dim.is_none() && how.scale.is_none() {
        return Err("its head_dim is not known".into());
    }
    let scores = how.scores(dim.unwrap_or(1) as usize);
    let mask = node.input(3).map(|value| MaskTerm {
        value,
        effect: match graph.value(value).dtype {
            Some(crate::tensor::DType::Bool) => MaskEffect::Keep,
            _ => MaskEffect::Add(Factor::new(1.0)),
        },
        rank: 4,
    });
    Ok(FoundAttention {
        name: node.name.clone(),
        query,
        key,
        key_transposed: false,
        value,
        scores: None,
        mask: mask.into_iter().collect(),
        scale: f64::from(scores.scale),
        softcap: scores.softcap.map(f64::from),
        rounded_scores: Vec::new(),
        rounded_capped: Vec::new(),
        rounded_probabilities: Vec::new(),
        unplaced: Vec::new(),
        sinks: None,
        slopes: None,
        grouped: true,
        output: node.output(0).ok_or("its output is not used")?,
    })
}

/// Lapidary's own operator, from `decompose::attention` or from a graph that Lapidary wrote.
fn from_biased_operator(graph: &Graph, node: &Node, how: &BiasedAttention) -> Result<FoundAttention, String> {
    let mut found = from_operator(graph, node, &how.unbiased(), 4)?;
    let constant = |i: usize| {
        let id = node.input(i).filter(|v| graph.constant(*v).is_some());
        id.ok_or("its slopes and sinks are not constant")
    };
    found.slopes = Some(constant(4)?);
    found.sinks = Some(constant(5)?);
    Ok(found)
}

pub(super) type Uses = HashMap<ValueId, Vec<(NodeId, usize)>>;

fn from_softmax(
    evaluator: &PartialEvaluator<'_>,
    uses: &Uses,
    node: &Node,
    axis: i64,
) -> Result<FoundAttention, String> {
    let graph = evaluator.graph;
    let all_scores = node.input(0).ok_or("its input is missing")?;
    let rank = graph.shape(all_scores).map_or(0, Vec::len) as i64;
    if axis != -1 && axis != rank - 1 {
        return Err("it is not over the last axis".into());
    }
    let (scores, sinks) = match sink::of_scores(evaluator, all_scores)? {
        Some((scores, sinks)) => (scores, Some(sinks)),
        None => (all_scores, None),
    };
    let chain = back_to_product(evaluator, scores)?;
    let mut probabilities = node.output(0).ok_or("its output is not used")?;
    if sinks.is_some() {
        probabilities = sink::without(evaluator, uses, probabilities, scores)?;
    }
    let (mut output, value, rounded_probabilities) = forward_to_product(evaluator, uses, probabilities)?;
    let mut sinks = sinks;
    if sinks.is_none()
        && let Some((product, numbers)) = sink::as_factor(evaluator, uses, scores, output)?
    {
        (output, sinks) = (product, Some(numbers));
    }
    Ok(FoundAttention {
        name: node.name.clone(),
        query: chain.left,
        key: chain.right,
        key_transposed: true,
        value,
        scores: Some(scores),
        mask: chain.mask,
        scale: chain.scale,
        softcap: chain.softcap,
        rounded_scores: chain.rounded,
        rounded_capped: chain.capped,
        rounded_probabilities,
        unplaced: chain.unplaced,
        sinks,
        slopes: None,
        grouped: false,
        output,
    })
}

/// The effect of a `Where` condition on its input `i`.
fn chosen(i: usize) -> MaskEffect {
    match i {
        1 => MaskEffect::Keep,
        _ => MaskEffect::Drop,
    }
}

struct Chain {
    left: ValueId,
    right: ValueId,
    mask: Vec<MaskTerm>,
    scale: f64,
    softcap: Option<f64>,
    rounded: Vec<RoundedValue>,
    capped: Vec<RoundedValue>,
    unplaced: Vec<Unplaced>,
}

fn back_to_product(evaluator: &PartialEvaluator<'_>, scores: ValueId) -> Result<Chain, String> {
    let graph = evaluator.graph;
    let scalar = |id: ValueId| graph.constant(id).and_then(|c| c.materialize().ok()?.scalar());
    let (mut mask, mut outer, mut inner, mut cap) = (Vec::new(), 1.0, 1.0, None);
    let mut at = scores;
    let (mut rounded, mut capped): (Vec<RoundedValue>, Vec<_>) = Default::default();
    let mut unplaced: Vec<Unplaced> = Vec::new();
    let refuse = |unplaced: &mut Vec<Unplaced>, output: ValueId, reason: &str| {
        unplaced.push(Unplaced {
            value: name_of_rounded(graph, output),
            reason: reason.into(),
        });
    };
    let mut masks = 0;
    for _ in 0..64 {
        // If masked scores are rounded, masked slots must stay masked.
        if mask.len() > masks {
            masks = mask.len();
            rounded.retain(|(output, rounding)| {
                let hides = rounding.lowest() <= super::mask::MASKED;
                if !hides {
                    refuse(
                        &mut unplaced,
                        *output,
                        "its scores are rounded after the mask, which hides slots no longer",
                    );
                }
                hides
            });
        }
        if let Some(rounding) = evaluator.rounding(at) {
            let after = cap.map_or(outer, |cap| cap * inner);
            match after > 0.0 {
                true => rounded.push((at, rounding.scaled(after))),
                false => refuse(
                    &mut unplaced,
                    at,
                    "its scores are scaled by no positive number behind it",
                ),
            }
        }
        let Some((_, node)) = graph.def(at) else {
            return Err("its scores are an input of the model".into());
        };
        let data: Vec<usize> = (0..node.inputs.len())
            .filter(|i| {
                node.input(*i)
                    .is_some_and(|v| evaluator.dependence(v) == Dependence::Data)
            })
            .collect();
        let other = |i: usize| node.input(1 - i).expect("a binary operator has two inputs");
        let rank = graph.shape(at).map_or(4, Vec::len);
        let term = |value: ValueId, effect: MaskEffect| MaskTerm { value, effect, rank };
        let added = MaskEffect::Add(Factor::new(outer));
        match (&node.op, &data[..]) {
            (Op::MatMul, [0, 1]) => {
                let (scale, softcap) = match cap {
                    // cap * tanh(inner * s) is the soft cap of s scaled by inner * cap.
                    Some(cap) if outer == 1.0 => (inner * cap, Some(cap)),
                    Some(_) => return Err("its scores are scaled after their soft cap".into()),
                    None => (outer, None),
                };
                return Ok(Chain {
                    left: node.input(0).expect("data input"),
                    right: node.input(1).expect("data input"),
                    mask,
                    scale,
                    softcap,
                    rounded,
                    capped,
                    unplaced,
                });
            }
            (Op::Identity | Op::Cast { .. } | Op::CastLike, [0, ..]) => at = node.input(0).expect("data input"),
            // Subtracting a constant from a row does not change its softmax.
            (Op::Binary(Binary::Sub), [0, 1]) if outer == 1.0 && is_largest_of(graph, at) => {
                at = node.input(0).expect("data input");
            }
            (Op::Reshape { .. } | Op::Squeeze | Op::Unsqueeze, [0]) if keeps_last_two(graph, node) => {
                at = node.input(0).expect("data input");
            }
            (Op::Binary(Binary::Add) | Op::Where, [_] | [0, _]) if cap.is_some() => {
                return Err("its mask is before the soft cap, so it hides no slots".into());
            }
            (Op::Binary(Binary::Add), [i]) => {
                mask.push(term(other(*i), added));
                at = node.input(*i).expect("data input");
            }
            // A mask computed from token ids: accepted as a mask here, so that `mask` can report the reason.
            (Op::Binary(Binary::Add), [0, 1]) => {
                let i = usize::from(!leads_to_product(graph, node.input(0)));
                mask.push(term(other(i), added));
                at = node.input(i).expect("data input");
            }
            (Op::Where, [0, i @ (1 | 2)]) => {
                let condition = node.input(0).expect("Where has three inputs");
                mask.push(term(condition, chosen(*i)));
                at = node.input(*i).expect("data input");
            }
            (Op::Where, [i @ (1 | 2)]) => {
                let rest = node.input(3 - i).expect("Where has three inputs");
                let condition = node.input(0).expect("Where has three inputs");
                if !scalar(rest).is_some_and(|v| v <= super::mask::MASKED) {
                    return Err("a Where among its scores does not mask".into());
                }
                mask.push(term(condition, chosen(*i)));
                at = node.input(*i).expect("data input");
            }
            // A floor so low that the raised scores are still masked.
            (Op::Binary(Binary::Max), [i])
                if cap.is_none() && scalar(other(*i)).is_some_and(|floor| floor * outer <= super::mask::MASKED) =>
            {
                at = node.input(*i).expect("data input");
            }
            (Op::Binary(op @ (Binary::Mul | Binary::Div)), [i]) if *op == Binary::Mul || *i == 0 => {
                let factor = scalar(other(*i)).ok_or("its scores are multiplied by a tensor")?;
                let factor = if *op == Binary::Mul { factor } else { 1.0 / factor };
                at = node.input(*i).expect("data input");
                let tanh = before_roundings(evaluator, at);
                let is_tanh = graph
                    .def(tanh)
                    .is_some_and(|(_, n)| matches!(n.op, Op::Unary(Unary::Tanh)));
                if cap.is_some() {
                    inner *= factor;
                } else if is_tanh {
                    cap = Some(factor);
                    if at != tanh {
                        refuse(&mut unplaced, at, "its scores are rounded within their soft cap");
                        at = tanh;
                    }
                    capped = std::mem::take(&mut rounded);
                    at = graph
                        .def(at)
                        .and_then(|(_, n)| n.input(0))
                        .ok_or("a Tanh without input")?;
                } else {
                    outer *= factor;
                }
            }
            _ => {
                return Err(format!(
                    "its scores come from {:?} ({}), not from a product of queries and keys",
                    node.op.name(),
                    node.name
                ));
            }
        }
    }
    Err("its scores come from too long a chain".into())
}

/// Whether a value is another one minus the maximum of its last axis.
pub(super) fn is_largest_of(graph: &Graph, id: ValueId) -> bool {
    let Some((_, node)) = graph.def(id).filter(|(_, n)| matches!(n.op, Op::Binary(Binary::Sub))) else {
        return false;
    };
    let mut largest = node.input(1);
    while let Some((_, cast)) = largest
        .and_then(|v| graph.def(v))
        .filter(|(_, n)| matches!(n.op, Op::Identity))
    {
        largest = cast.input(0);
    }
    let Some((_, reduce)) = largest.and_then(|v| graph.def(v)) else {
        return false;
    };
    let rank = reduce.input(0).and_then(|v| graph.shape(v)).map_or(0, Vec::len) as i64;
    let axes = reduce.input(1).and_then(|v| graph.constant(v)?.materialize().ok());
    let last = axes.is_some_and(|axes| matches!(axes.to_i64()[..], [axis] if axis == -1 || axis == rank - 1));
    let reduction = Reduction::Max;
    matches!(reduce.op, Op::Reduce { reduction: found, keepdims: true, .. } if found == reduction)
        && last
        && reduce.input(0) == node.input(0)
}

/// The value before removed roundings.
fn before_roundings(evaluator: &PartialEvaluator<'_>, mut at: ValueId) -> ValueId {
    while let (Some(_), Some((_, node))) = (evaluator.rounding(at), evaluator.graph.def(at)) {
        at = node.input(0).unwrap_or(at);
    }
    at
}

/// Whether a value is a product of two computed tensors, ignoring scales and casts.
fn leads_to_product(graph: &Graph, mut id: Option<ValueId>) -> bool {
    for _ in 0..8 {
        let Some((_, node)) = id.and_then(|id| graph.def(id)) else {
            return false;
        };
        id = match node.op {
            Op::MatMul => return node.input(1).is_some_and(|v| graph.constant(v).is_none()),
            Op::Binary(Binary::Mul | Binary::Div) | Op::Cast { .. } | Op::Reshape { .. } | Op::Unary(Unary::Tanh) => {
                node.input(0)
            }
            _ => return false,
        };
    }
    false
}

fn keeps_last_two(graph: &Graph, node: &Node) -> bool {
    let shape = |v: Option<ValueId>| v.and_then(|v| graph.shape(v));
    match (shape(node.input(0)), shape(node.output(0))) {
        (Some(a), Some(b)) if a.len() >= 2 && b.len() >= 2 => a[a.len() - 2..] == b[b.len() - 2..],
        _ => false,
    }
}

/// The product of the probabilities with the values, the values, and the roundings in between.
fn forward_to_product(
    evaluator: &PartialEvaluator<'_>,
    uses: &Uses,
    probabilities: ValueId,
) -> Result<(ValueId, ValueId, Vec<RoundedValue>), String> {
    let graph = evaluator.graph;
    let mut rounded = Vec::new();
    let mut at = probabilities;
    for _ in 0..16 {
        rounded.extend(evaluator.rounding(at).map(|rounding| (at, rounding)));
        let readers = uses.get(&at).map(Vec::as_slice).unwrap_or_default();
        if graph.outputs.contains(&at) {
            return Err("its probabilities are an output of the model".into());
        }
        let is_nan_guard =
            |(node, input): (NodeId, usize)| input == 2 && nan_guarded(graph, graph.node(node)) == Some(at);
        let next = match readers {
            [only] => *only,
            [..] => match readers.iter().find(|r| is_nan_guard(**r)) {
                Some(guard) if readers.len() == 2 => *guard,
                _ => return Err("its probabilities are read by several nodes".into()),
            },
        };
        let node = graph.node(next.0);
        let output = node.output(0).ok_or("a node without output")?;
        match (&node.op, next.1) {
            (Op::MatMul, 0) => {
                return Ok((output, node.input(1).ok_or("a MatMul without values")?, rounded));
            }
            (Op::Identity | Op::Cast { .. } | Op::CastLike, 0) => at = output,
            (Op::Where, 2) if is_nan_guard(next) => at = output,
            (Op::Reshape { .. } | Op::Squeeze | Op::Unsqueeze, 0) if keeps_last_two(graph, node) => at = output,
            _ => {
                return Err(format!(
                    "its probabilities go to {} ({}), not to a product with the values",
                    node.op.name(),
                    node.name
                ));
            }
        }
    }
    Err("its probabilities go through too long a chain".into())
}
