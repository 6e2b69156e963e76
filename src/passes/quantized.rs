//! Quantized activations and what is left of quantized weights, in the forms that the rest of the pipeline knows.
//!
//! - `DequantizeLinear` of a constant is a constant; of a `Gather` of a constant, a `Gather` of one.
//! - `QuantizeLinear` and `DequantizeLinear` of one scale become [`Op::RoundToCodes`]; `DynamicQuantizeLinear` and
//!   `DequantizeLinear`, [`Op::DynamicRoundToCodes`]. Its range is that of all tokens of a run, as ONNX says it, so answers
//!   depend a little on how a prompt is cut into runs.
//! - `MatMulInteger`, with the conversion and the scales behind it, becomes a product of rounded activations with a
//!   quantized weight.
//!
//! Rounding inside attention and its rotary embedding (of scores, probabilities, rotated keys) has no place in a fused
//! attention with a static cache: it is refused by name, unless [`ActivationPolicy::Partial`] leaves that out or
//! [`ActivationPolicy::Float`] all of it. [`Activations::left_out`] names what is left out.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;

use super::PassError;
use super::pattern::{finish, redefine};
use crate::graph::op::{Binary, Op};
use crate::graph::{Constant, Graph, NodeId, ValueId};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

/// What becomes of activations that an export quantizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPolicy {
    /// They are rounded to what their codes stand for; an export that rounds inside attention is refused.
    #[default]
    Quantized,
    /// They are rounded outside attention and its rotary embedding, and floating point inside.
    Partial,
    /// They stay floating point.
    Float,
}

/// What the pass found of quantized activations.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activations {
    /// What was asked for.
    pub policy: ActivationPolicy,
    /// Places where activations are rounded to codes, by the names that their values have.
    pub rounded: Vec<String>,
    /// Places of the export where they are not, because of the policy or because they are inside attention.
    pub left_out: Vec<String>,
}

impl Activations {
    /// Whether there is nothing to say: the export quantizes none.
    pub fn is_empty(&self) -> bool {
        self.rounded.is_empty() && self.left_out.is_empty()
    }
}

impl fmt::Display for Activations {
    /// `9 rounded to codes, 12 left in floating point`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rounded to codes", self.rounded.len())?;
        match self.left_out.len() {
            0 => Ok(()),
            n => write!(f, ", {n} left in floating point"),
        }
    }
}

/// Rewrites quantization. Gives the number of rewrites and what is to be known of activations.
pub fn run(graph: &mut Graph, policy: ActivationPolicy) -> Result<(usize, Activations), PassError> {
    let mut rewrites = 0;
    let mut rounded = Vec::new();
    for id in graph.node_ids().collect::<Vec<_>>() {
        if !graph.contains(id) {
            continue;
        }
        let done = match graph.node(id).op {
            Op::DequantizeLinear { axis, block_size } => dequantize(graph, id, axis, block_size, &mut rounded),
            Op::Binary(Binary::Mul) => integer_product(graph, id, &mut rounded),
            _ => None,
        };
        rewrites += usize::from(done.is_some());
    }
    if rewrites == 0 {
        return Ok((
            0,
            Activations {
                policy,
                ..Activations::default()
            },
        ));
    }
    graph.sort()?;
    graph.remove_dead_nodes();
    let mut found = Activations {
        policy,
        ..Activations::default()
    };
    let attended = before_attention(graph);
    rounded.retain(|id| graph.contains(*id));
    for id in rounded {
        let node = graph.node(id);
        let (Some(input), Some(output)) = (node.input(0), node.output(0)) else {
            continue;
        };
        let name = graph.value(input).name.clone();
        if policy == ActivationPolicy::Float || attended.contains(&output) {
            redefine(graph, id, Op::Identity, vec![Some(input)]);
            found.left_out.push(name);
        } else {
            after_movements(graph, id);
            found.rounded.push(name);
        }
    }
    if policy == ActivationPolicy::Quantized && !found.left_out.is_empty() {
        return Err(PassError::RoundedAttention { values: found.left_out });
    }
    Ok((finish(graph, rewrites)?, found))
}

fn scalar(graph: &Graph, value: Option<ValueId>) -> Option<f64> {
    graph.constant(value?)?.materialize().ok()?.scalar()
}

fn dequantize(graph: &mut Graph, id: NodeId, axis: i64, block_size: usize, rounded: &mut Vec<NodeId>) -> Option<()> {
    let node = graph.node(id);
    let (codes, scale, zero) = (node.input(0)?, node.input(1)?, node.input(2));
    let output = node.output(0)?;
    if let Some(constant) = quantized(graph, codes, scale, zero, axis, block_size) {
        graph.set_constant(output, constant);
        return Some(());
    }
    let (from, source) = graph.def(codes)?;
    match source.op {
        Op::QuantizeLinear { to, block_size: 0, .. } if block_size == 0 => {
            let number = scalar(graph, Some(scale))?;
            let offset = match zero {
                Some(_) => scalar(graph, zero)?,
                None => 0.0,
            };
            let theirs = (
                scalar(graph, source.input(1))?,
                source.input(2).map(|z| scalar(graph, Some(z))),
            );
            if theirs.0 != number || theirs.1.unwrap_or(Some(0.0))? != offset {
                return None;
            }
            let x = source.input(0)?;
            let op = Op::RoundToCodes {
                to,
                scale: number as f32,
                zero_point: offset as i64,
            };
            redefine(graph, id, op, vec![Some(x)]);
            rounded.push(id);
        }
        Op::DynamicQuantizeLinear => {
            let own = |i: usize, value: Option<ValueId>| value.and_then(|v| graph.producer_of(v)) == Some((from, i));
            if !own(0, Some(codes)) || !own(1, Some(scale)) || !own(2, zero) {
                return None;
            }
            let x = source.input(0)?;
            redefine(graph, id, Op::DynamicRoundToCodes, vec![Some(x)]);
            rounded.push(id);
        }
        // Codes looked up in a table of codes.
        Op::Gather { axis: 0 } => {
            let (table, indices) = (source.input(0)?, source.input(1)?);
            let name = graph.value(table).name.clone();
            let table = looked_up(graph, table, scale, zero, axis, block_size, graph.shape(codes)?.len())?;
            let table = graph.add_constant(&format!("{name}.table"), table);
            redefine(graph, id, Op::Gather { axis: 0 }, vec![Some(table), Some(indices)]);
        }
        _ => return None,
    }
    Some(())
}

/// The constant that codes, scale and zero point make; `None` unless all are constants that belong together.
fn quantized(
    graph: &Graph,
    codes: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
    axis: i64,
    block_size: usize,
) -> Option<Constant> {
    let (codes, scales) = (graph.constant(codes)?.clone(), graph.constant(scale)?.clone());
    let zeros = match zero {
        Some(zero) => Some(graph.constant(zero)?.clone()),
        None => None,
    };
    let rank = codes.shape().len() as i64;
    let at = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok();
    let granularity = match block_size {
        0 if scales.len() == 1 && scales.shape().len() <= 1 => Granularity::Tensor,
        0 => Granularity::Channel { axis: at? },
        size => Granularity::Block { axis: at?, size },
    };
    Constant::quantized(codes, scales, zeros, granularity).ok()
}

/// A table of codes whose rows are looked up and then dequantized, as a quantized table: with one scale, or one for each
/// column.
fn looked_up(
    graph: &Graph,
    table: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
    axis: i64,
    block_size: usize,
    rank: usize,
) -> Option<Constant> {
    let width = graph.constant(table)?.shape().len();
    let scales = graph.constant(scale)?;
    if block_size != 0 {
        return None;
    }
    if scales.len() == 1 {
        return quantized(graph, table, scale, zero, 0, 0);
    }
    // The axis counts from the end alike.
    let from_end = if axis < 0 { -axis } else { rank as i64 - axis };
    let on = width as i64 - from_end;
    (on >= 1).then(|| quantized(graph, table, scale, zero, on, 0)).flatten()
}

/// `Cast(MatMulInteger(codes of x, b, zero, zero of b)) * (scale of x * scale of b)` as `MatMul(rounded x, b)`.
fn integer_product(graph: &mut Graph, id: NodeId, rounded: &mut Vec<NodeId>) -> Option<()> {
    let node = graph.node(id).clone();
    let output = node.output(0)?;
    for (product, scales) in [(0, 1), (1, 0)] {
        let Some((_, cast)) = graph.def(node.input(product)?) else {
            continue;
        };
        if !matches!(cast.op, Op::Cast { to } if to.is_float()) {
            continue;
        }
        let Some((_, integer)) = graph.def(cast.input(0)?) else {
            continue;
        };
        if integer.op != Op::MatMulInteger {
            continue;
        }
        let integer = integer.clone();
        let Some((_, factors)) = graph.def(node.input(scales)?) else {
            continue;
        };
        if factors.op != Op::Binary(Binary::Mul) {
            continue;
        }
        let (a, b) = (integer.input(0)?, integer.input(1)?);
        let (from, source) = graph.def(a)?;
        let own = |i: usize, value: Option<ValueId>| value.and_then(|v| graph.producer_of(v)) == Some((from, i));
        if source.op != Op::DynamicQuantizeLinear || !own(0, Some(a)) || !own(2, integer.input(2)) {
            return None;
        }
        let scale_b = match (factors.input(0)?, factors.input(1)?) {
            (x, other) | (other, x) if own(1, Some(x)) => other,
            _ => return None,
        };
        let x = source.input(0)?;
        let weight = integer_weight(graph, b, scale_b, integer.input(3))?;
        let (x_name, b_name) = (graph.value(x).name.clone(), graph.value(b).name.clone());
        // One rounding for all products of x.
        let known = rounded.iter().copied().find(|known| {
            let node = graph.node(*known);
            node.op == Op::DynamicRoundToCodes && node.input(0) == Some(x)
        });
        let near = match known {
            Some(known) => graph.node(known).output(0)?,
            None => {
                let near = graph.add_node(&format!("{x_name}.rounded"), Op::DynamicRoundToCodes, &[x]);
                let value = graph.value(x);
                let (dtype, shape) = (value.dtype, value.shape.clone());
                (graph.value_mut(near).dtype, graph.value_mut(near).shape) = (dtype, shape);
                rounded.push(graph.producer_of(near)?.0);
                near
            }
        };
        let weight = graph.add_constant(&format!("{b_name}.weight"), weight);
        redefine(graph, id, Op::MatMul, vec![Some(near), Some(weight)]);
        debug_assert_eq!(graph.node(id).output(0), Some(output));
        return Some(());
    }
    None
}

/// 8-bit codes `[in, out]` with a scale and a zero point for all, or for each column.
fn integer_weight(graph: &Graph, codes: ValueId, scale: ValueId, zero: Option<ValueId>) -> Option<Constant> {
    let codes = graph.constant(codes)?.clone();
    let scales = graph.constant(scale)?.clone();
    let zeros = match zero {
        Some(zero) => Some(graph.constant(zero)?.clone()),
        None => None,
    };
    let [_, columns] = codes.shape()[..] else {
        return None;
    };
    if scales.len() == 1 && zeros.as_ref().is_none_or(|z| z.len() == 1) {
        let flat = |part: Constant| part.reshaped(Vec::new());
        return Constant::quantized(codes, flat(scales), zeros.map(flat), Granularity::Tensor).ok();
    }
    // One of the two may be for all columns.
    let spread = |part: Constant| match part.len() {
        1 => Some(Constant::concat(&vec![part.reshaped(vec![1]); columns], 0)),
        n if n == columns => Some(part.reshaped(vec![columns])),
        _ => None,
    };
    let zeros = match zeros {
        Some(zeros) => Some(spread(zeros)?),
        None => None,
    };
    Constant::quantized(codes, spread(scales)?, zeros, Granularity::Channel { axis: 1 }).ok()
}

/// Values from which a product of two activations, or an attention operator, is reached without a linear layer between.
fn before_attention(graph: &Graph) -> HashSet<ValueId> {
    let mut found: HashSet<ValueId> = HashSet::new();
    let constant = constants(graph);
    for id in graph.node_ids().rev() {
        let node = graph.node(id);
        // Shapes and the like say nothing of elements.
        let info = node.op.info();
        let is_parameter = |i: usize| info.inputs.get(i).is_some_and(|input| input.parameter);
        let read = node.inputs.iter().enumerate().filter(move |(i, _)| !is_parameter(*i));
        let inputs = || read.clone().filter_map(|(_, input)| *input);
        let attends = match node.op {
            Op::MatMul | Op::FusedMatMul { .. } | Op::Gemm { .. } => {
                !inputs().take(2).any(|input| constant.contains(&input))
            }
            Op::Attention(_) | Op::GroupQueryAttention(_) | Op::RotaryEmbedding { .. } => true,
            Op::ContribRotaryEmbedding { .. } => true,
            _ => false,
        };
        let is_linear = matches!(node.op, Op::MatMul | Op::FusedMatMul { .. } | Op::Gemm { .. }) && !attends;
        let reaches = node.outputs.iter().flatten().any(|output| found.contains(output));
        if attends || reaches && !is_linear {
            found.extend(inputs());
        }
    }
    found
}

/// Values made of constants alone.
fn constants(graph: &Graph) -> HashSet<ValueId> {
    let mut known: HashSet<ValueId> = graph.value_ids().filter(|v| graph.constant(*v).is_some()).collect();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if !node.inputs.is_empty() && node.inputs.iter().flatten().all(|input| known.contains(input)) {
            known.extend(node.outputs.iter().flatten());
        }
    }
    known
}

/// Rounds behind the movements that follow, where the result of attention is recognised by them.
fn after_movements(graph: &mut Graph, id: NodeId) {
    let uses = graph.uses();
    let only = |value: ValueId| match uses.get(&value).map(Vec::as_slice) {
        Some([(user, 0)]) => Some(*user),
        _ => None,
    };
    let is_output: BTreeSet<ValueId> = graph.outputs.iter().copied().collect();
    let node = graph.node(id);
    let (Some(x), Some(y)) = (node.input(0), node.output(0)) else {
        return;
    };
    let is_product = graph.def(x).is_some_and(|(_, source)| source.op == Op::MatMul);
    let mut end = y;
    while !is_output.contains(&end)
        && let Some(user) = only(end)
        && let (Op::Transpose { .. } | Op::Reshape { .. }, Some(next)) =
            (&graph.node(user).op, graph.node(user).output(0))
    {
        end = next;
    }
    if !is_product || end == y || is_output.contains(&end) {
        return;
    }
    let op = graph.node(id).op.clone();
    let name = graph.node(id).name.clone();
    redefine(graph, id, Op::Identity, vec![Some(x)]);
    let readers: HashMap<NodeId, Vec<usize>> =
        uses.get(&end)
            .into_iter()
            .flatten()
            .fold(HashMap::new(), |mut all, (user, input)| {
                all.entry(*user).or_default().push(*input);
                all
            });
    let moved = graph.add_node(&name, op, &[end]);
    let (dtype, shape): (Option<DType>, _) = (graph.value(end).dtype, graph.value(end).shape.clone());
    (graph.value_mut(moved).dtype, graph.value_mut(moved).shape) = (dtype, shape);
    for (user, inputs) in readers {
        for input in inputs {
            graph.node_mut(user).inputs[input] = Some(moved);
        }
    }
}
