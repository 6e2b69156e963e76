//! Converts quantized activations and the remaining forms of quantized weights to the forms that the rest of the
//! pipeline supports.
//!
//! - `DequantizeLinear` of a constant becomes a constant; of a `Gather` of a constant, a `Gather` of one; of other
//!   moved codes, it moves before the movement (`moved_codes`).
//! - `QuantizeLinear` and `DequantizeLinear` with one scale become [`Op::RoundToCodes`]; `DynamicQuantizeLinear` and
//!   `DequantizeLinear`, [`Op::DynamicRoundToCodes`]. Its range covers all tokens of a run, as in ONNX, so answers
//!   depend slightly on how a prompt is cut into runs.
//! - `MatMulInteger`, with the conversion and the scales after it, becomes a product of rounded activations with a
//!   quantized weight.
//!
//! Rounding inside attention and its rotary embedding (of scores, probabilities, rotated keys) stays in the graph for
//! `attention`, which finds its place in the canonical operators or refuses it by name, unless
//! [`ActivationPolicy::Partial`] drops it or [`ActivationPolicy::Float`] drops all rounding. [`Activations::left_out`]
//! names what is dropped.

use std::collections::HashSet;
use std::fmt;

use super::PassError;
use super::pattern::{binary, either_order, finish, node_of, only_reader, redefine, scalar};
use crate::graph::op::{Binary, Op, Rounding};
use crate::graph::{Constant, Graph, NodeId, ValueId};
use crate::tensor::quantized::Granularity;

/// Treatment of activations that an export quantizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPolicy {
    /// They are rounded to the values of their codes; an export with a rounding inside attention that cannot be kept is
    /// refused.
    #[default]
    Quantized,
    /// They are rounded outside attention and its rotary embedding, and stay in floating point inside.
    Partial,
    /// They stay in floating point.
    Float,
}

/// What the pass found about quantized activations.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activations {
    /// The requested policy.
    pub policy: ActivationPolicy,
    /// Places where activations are rounded to codes, by the names of the values.
    pub rounded: Vec<String>,
    /// Places in the export where rounding was dropped, because of the policy or because they are inside attention.
    pub left_out: Vec<String>,
}

impl Activations {
    /// Whether the export quantizes no activations.
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

/// Rewrites quantization. Returns the number of rewrites and the findings about activations.
pub fn run(graph: &mut Graph, policy: ActivationPolicy) -> Result<(usize, Activations), PassError> {
    let mut rewrites = super::moved_codes::dequantize_first(graph)?;
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
    let kept = |id: &NodeId| match policy {
        ActivationPolicy::Quantized => true,
        ActivationPolicy::Partial => !graph
            .node(*id)
            .output(0)
            .is_some_and(|output| attended.contains(&output)),
        ActivationPolicy::Float => false,
    };
    let no_scale = |id: &NodeId| {
        let node = graph.node(*id);
        let scale = Rounding::of(&node.op)?.scale;
        let name = &graph.value(node.input(0)?).name;
        (!scale.is_finite() || scale <= 0.0).then(|| format!("{name} ({scale})"))
    };
    let values: Vec<String> = rounded.iter().filter(|id| kept(id)).filter_map(no_scale).collect();
    if !values.is_empty() {
        return Err(PassError::RoundingScale { values });
    }
    for id in rounded {
        let node = graph.node(id);
        let (Some(input), Some(output)) = (node.input(0), node.output(0)) else {
            continue;
        };
        let name = graph.value(input).name.clone();
        let inside = attended.contains(&output);
        if policy == ActivationPolicy::Float || policy == ActivationPolicy::Partial && inside {
            redefine(graph, id, Op::Identity, vec![Some(input)]);
            found.left_out.push(name);
        } else {
            // Those inside belong to the attention, wherever they are among movements.
            if !inside {
                after_movements(graph, id);
            }
            found.rounded.push(name);
        }
    }
    Ok((finish(graph, rewrites)?, found))
}

/// Whether a value is the output `i` of a node.
fn is_output(graph: &Graph, value: Option<ValueId>, node: NodeId, i: usize) -> bool {
    value.and_then(|value| graph.producer_of(value)) == Some((node, i))
}

/// A scale and its zero point, 0 if there is none; `None` unless both are single constants.
fn scale_and_zero(graph: &Graph, scale: Option<ValueId>, zero: Option<ValueId>) -> Option<(f64, f64)> {
    let zero = match zero {
        Some(zero) => scalar(graph, zero)?,
        None => 0.0,
    };
    Some((scalar(graph, scale?)?, zero))
}

/// A new node with one operand and the operand's type.
fn typed_like(graph: &mut Graph, name: &str, op: Op, x: ValueId) -> ValueId {
    let made = graph.add_node(name, op, &[x]);
    let like = graph.value(x);
    let (dtype, shape) = (like.dtype, like.shape.clone());
    (graph.value_mut(made).dtype, graph.value_mut(made).shape) = (dtype, shape);
    made
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
            let (number, offset) = scale_and_zero(graph, Some(scale), zero)?;
            if scale_and_zero(graph, source.input(1), source.input(2))? != (number, offset) {
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
            let parts = [Some(codes), Some(scale), zero];
            if !(0..3).all(|i| is_output(graph, parts[i], from, i)) {
                return None;
            }
            let x = source.input(0)?;
            redefine(graph, id, Op::DynamicRoundToCodes, vec![Some(x)]);
            rounded.push(id);
        }
        // Codes from a lookup in a table of codes.
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

/// The constant of codes, scale and zero point; `None` unless all are constants that fit together.
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
    let granularity = Granularity::of_attributes(codes.shape().len(), axis, block_size, scales.shape())?;
    Constant::quantized(codes, scales, zeros, granularity).ok()
}

/// A table of codes whose rows are looked up and then dequantized, as a quantized table: with one scale, or one per
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
    // The axis counted from the end is the same.
    let from_end = if axis < 0 { -axis } else { rank as i64 - axis };
    let on = width as i64 - from_end;
    (on >= 1).then(|| quantized(graph, table, scale, zero, on, 0)).flatten()
}

/// `Cast(MatMulInteger(codes of x, b, zero, zero of b)) * (scale of x * scale of b)` as `MatMul(rounded x, b)`.
fn integer_product(graph: &mut Graph, id: NodeId, rounded: &mut Vec<NodeId>) -> Option<()> {
    let node = graph.node(id);
    let operands = either_order([node.input(0)?, node.input(1)?]);
    let (integer, factors) = operands.into_iter().find_map(|[product, factors]| {
        let cast = node_of(graph, product).filter(|node| matches!(node.op, Op::Cast { to } if to.is_float()))?;
        let integer = node_of(graph, cast.input(0)?).filter(|node| node.op == Op::MatMulInteger)?;
        Some((integer.clone(), binary(graph, factors, Binary::Mul)?))
    })?;
    let (a, b) = (integer.input(0)?, integer.input(1)?);
    let (from, source) = graph.def(a)?;
    let is_dynamic = source.op == Op::DynamicQuantizeLinear;
    if !is_dynamic || !is_output(graph, Some(a), from, 0) || !is_output(graph, integer.input(2), from, 2) {
        return None;
    }
    let mut orders = either_order(factors).into_iter();
    let [_, scale_b] = orders.find(|[x, _]| is_output(graph, Some(*x), from, 1))?;
    let x = source.input(0)?;
    let weight = integer_weight(graph, b, scale_b, integer.input(3))?;
    // One rounding for all products of x.
    let mut all = rounded.iter().map(|known| graph.node(*known));
    let known = all.find(|node| node.op == Op::DynamicRoundToCodes && node.input(0) == Some(x));
    let near = match known {
        Some(known) => known.output(0)?,
        None => {
            let name = format!("{}.rounded", graph.value(x).name);
            let near = typed_like(graph, &name, Op::DynamicRoundToCodes, x);
            rounded.push(graph.producer_of(near)?.0);
            near
        }
    };
    let name = format!("{}.weight", graph.value(b).name);
    let weight = graph.add_constant(&name, weight);
    redefine(graph, id, Op::MatMul, vec![Some(near), Some(weight)]);
    Some(())
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
    // One of the two may be shared by all columns.
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

/// Values that reach a product of two activations, or an attention operator, without a linear layer in between.
pub(super) fn before_attention(graph: &Graph) -> HashSet<ValueId> {
    let mut found: HashSet<ValueId> = HashSet::new();
    let constant = constants(graph);
    for id in graph.node_ids().rev() {
        let node = graph.node(id);
        // Shape operators do not read elements.
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

/// Values computed from constants alone.
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

/// Moves the rounding after the movements that follow, by which the result of attention is recognized.
fn after_movements(graph: &mut Graph, id: NodeId) {
    let node = graph.node(id);
    let (Some(x), Some(y)) = (node.input(0), node.output(0)) else {
        return;
    };
    if node_of(graph, x).is_none_or(|source| source.op != Op::MatMul) {
        return;
    }
    let uses = graph.uses();
    let mut end = y;
    while let Some(user) = only_reader(graph, &uses, end)
        && let (Op::Transpose { .. } | Op::Reshape { .. }, Some(next)) =
            (&graph.node(user).op, graph.node(user).output(0))
    {
        end = next;
    }
    if end == y || graph.outputs.contains(&end) {
        return;
    }
    let (op, name) = (graph.node(id).op.clone(), graph.node(id).name.clone());
    redefine(graph, id, Op::Identity, vec![Some(x)]);
    let moved = typed_like(graph, &name, op, end);
    for (user, input) in uses.get(&end).into_iter().flatten() {
        graph.node_mut(*user).inputs[*input] = Some(moved);
    }
}
