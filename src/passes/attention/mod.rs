//! Recognizes the attention layers of an export: an [`AttentionLayer`] for each, with its projections, caches and
//! window.
//!
//! | module | what it recognizes |
//! |---|---|
//! | [`find`] | each attention: its operands, mask terms, scale and soft cap |
//! | [`sink`] | attention sinks |
//! | [`latent`] | caches of latent rows, rewritten before the analysis |
//! | [`trace`] | the projections and caches that an operand is computed from |
//! | [`layout`] | which axes are batch, tokens, heads and slots |
//! | [`projection`] | the columns of a projection that form the rows, with scale and rotation |
//! | [`parts`] | heads that are concatenated from parts |
//! | [`rope`] | rotary tables |
//! | [`rounding`] | roundings to codes, and their places in the canonical operators |
//! | [`cache`] | which output is the update of which input, and that it appends rows |
//! | [`bias`] | slopes of heads (ALiBi) |
//! | [`mask`] | causal, with or without a sliding window |
//! | [`beyond`] | the same at lengths that small trials do not reach |
//! | [`fingerprint`] | equal computations, so that one layer is executed and others are compared with it |
//!
//! [`analyze`] puts them together into an [`Analysis`], which `emit` turns into canonical operators and `recognize`
//! reports. Nothing is rewritten here. Everything that was not recognized becomes an [`Obstacle`], so that users see
//! all obstacles at once.

mod beyond;
mod bias;
pub(super) mod cache;
mod find;
mod fingerprint;
pub(super) mod latent;
pub(super) mod layout;
mod mask;
mod parts;
pub(super) mod projection;
pub(super) mod rope;
pub(super) mod rounding;
mod sink;
mod trace;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use crate::graph::op::Op;
use crate::graph::{AttentionScores, Graph, ValueId};
use crate::passes::dependence::Dependence;
use crate::passes::lengths::{last_where, lengths};
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::roles::{InputRole, Roles};
use crate::tensor::DType;
use cache::{ExportCache, Operand};
use find::FoundAttention;
pub use mask::MASKED;
use mask::{Masks, ProvenMask};
use projection::{Projection, RowOrder, Rows, Tables};
use rounding::{LayerRounding, Unplaced};
use trace::Trace;

/// One attention, in terms of the canonical graph.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// What `find` found in the export.
    pub found: FoundAttention,
    pub query: Projection,
    pub key_cache: ValueId,
    pub value_cache: ValueId,
    /// Factor of the key operand relative to the cache; part of the scale.
    pub key_factor: f32,
    /// Scale, all parts together, soft cap and window.
    pub scores: AttentionScores,
    /// Slope per head: what is added to a score per slot; empty for none.
    pub slopes: Vec<f32>,
    pub rounding: LayerRounding,
}

/// Something that prevents the graph from becoming canonical.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Obstacle {
    /// Which attention, counted from 0 in order of execution.
    pub layer: Option<usize>,
    /// Node or value of the export.
    pub at: String,
    /// What was not recognized, and why.
    pub reason: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}: ")?;
        }
        write!(f, "{}: {}", self.at, self.reason)
    }
}

/// The analysis of an export's attention.
#[derive(Debug, Default)]
pub struct Analysis {
    pub layers: Vec<AttentionLayer>,
    pub caches: HashMap<ValueId, ExportCache>,
    /// Rotated rows that are not operands themselves, such as the inputs of per-head norms, `[batch, heads, tokens,
    /// head_dim]`.
    pub rotated: Vec<(ValueId, Projection)>,
    pub tables: Tables,
    /// The output that is neither a cache nor input of another such output.
    pub logits: Option<ValueId>,
    pub obstacles: Vec<Obstacle>,
    /// Positions covered by the shortest table of the export.
    pub position_limit: Option<usize>,
    /// Lengths at which masks and tables of positions may change, each with the constant that it comes from.
    pub lengths: BTreeMap<usize, String>,
    /// Roundings inside attention without a place in the canonical operators.
    pub unplaced: Vec<Unplaced>,
    /// Values of roundings that the attention layers include, or that must stay in the graph.
    pub roundings: Roundings,
}

/// Roundings inside attention, by their results.
#[derive(Debug, Default)]
pub struct Roundings {
    /// All that affect the outputs.
    pub all: HashSet<ValueId>,
    /// Those that a recognized attention includes.
    pub placed: HashSet<ValueId>,
}

/// Recognizes every attention of a sorted, inferred graph. Rotary tables get `max_positions` rows, or fewer if the
/// export's own tables are shorter.
pub fn analyze(graph: &Graph, roles: &Roles, max_positions: usize) -> Analysis {
    let mut analysis = Analysis::default();
    let (skeleton, dynamic) = rounding::skeleton(graph, roles);
    analysis.unplaced = dynamic;
    let evaluator = match &skeleton {
        Some(skeleton) => PartialEvaluator::without(skeleton.roundings.clone(), &skeleton.graph, roles),
        None => PartialEvaluator::new(graph, roles),
    };
    if let Some(skeleton) = &skeleton {
        analysis.roundings.all = rounding::effective(graph, &skeleton.roundings);
    }
    let graph = evaluator.graph;
    let trace = Trace::new(&evaluator);
    let (found, unrecognized) = find::find(&evaluator);
    let masks = prove_masks(&evaluator, &found, max_positions, &mut analysis);
    let last = analysis.position_limit.unwrap_or(usize::MAX).min(max_positions);
    analysis.tables.positions = last.max(8);
    for softmax in unrecognized {
        analysis.obstacles.push(Obstacle {
            layer: None,
            at: softmax.node,
            reason: format!("this softmax belongs to no known form of attention: {}", softmax.reason),
        });
    }
    analysis.obstacles.extend(left_packed(graph));
    for (index, (attention, mask)) in found.into_iter().zip(masks).enumerate() {
        let at = attention.name.clone();
        let obstacle = |reason: String| Obstacle {
            layer: Some(index),
            at: at.clone(),
            reason,
        };
        let operands = operands(&trace, &evaluator, &attention, &mut analysis);
        match (operands, mask) {
            (Ok((query, ..)), Ok(mask)) if ![0, 1, query.heads].contains(&mask.slopes.len()) => {
                let reason = format!("it has biases of {} heads, and {}", mask.slopes.len(), query.heads);
                analysis.obstacles.push(obstacle(reason));
            }
            (Ok((mut query, key_cache, value_cache, key_factor)), Ok(mask)) => analysis.layers.push(AttentionLayer {
                rounding: LayerRounding::default(),
                slopes: slopes(graph, &attention, mask.slopes, query.heads),
                key_cache,
                value_cache,
                key_factor,
                scores: AttentionScores {
                    scale: snapped(
                        key_factor * query.take_scale() * attention.scale as f32,
                        &evaluator,
                        &attention,
                    ),
                    softcap: attention.softcap.map(|cap| cap as f32),
                    window: mask.window,
                },
                query,
                found: attention,
            }),
            (operands, mask) => {
                analysis.obstacles.extend(operands.err().map(&obstacle));
                analysis.obstacles.extend(mask.err().map(&obstacle));
            }
        }
    }
    if skeleton.is_some() {
        place_roundings(&trace, &evaluator, &mut analysis);
    }
    if analysis.obstacles.is_empty() {
        unmatched(&evaluator, &mut analysis);
        if skeleton.is_none() {
            rotated_before_norms(&trace, &evaluator, &mut analysis);
        }
    } else if let Some(encoder) = encoder(graph, roles) {
        analysis.obstacles = vec![encoder];
    }
    analysis
}

/// Slopes from the mask, and those of an operator.
fn slopes(graph: &Graph, attention: &FoundAttention, mut of_mask: Vec<f32>, heads: usize) -> Vec<f32> {
    if let [of_all] = of_mask[..] {
        of_mask = vec![of_all; heads];
    }
    let constant = attention.slopes.and_then(|id| graph.constant(id)?.materialize().ok());
    let of_operator = constant.map(|numbers| numbers.to_f32()).unwrap_or_default();
    of_mask.resize(of_mask.len().max(of_operator.len()), 0.0);
    for (slope, more) in of_mask.iter_mut().zip(of_operator) {
        *slope += more;
    }
    of_mask
}

/// Rotations that are followed by per-head norms (HunYuan). Unrecognized ones stay unchanged.
fn rotated_before_norms(trace: &Trace<'_, '_>, evaluator: &PartialEvaluator<'_>, analysis: &mut Analysis) {
    let graph = evaluator.graph;
    for node in graph.node_ids().map(|id| graph.node(id)) {
        let is_norm = matches!(node.op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. });
        let Some(value) = node.input(0).filter(|_| is_norm) else {
            continue;
        };
        let sources: Vec<ValueId> = trace.sources(value).iter().copied().collect();
        let (Some(shape), [source]) = (graph.shape(value), &sources[..]) else {
            continue;
        };
        let canonical = layout::TokenLayout::of(shape, evaluator.roles).is_some_and(|of| of.is_canonical(shape.len()));
        let sizes = |axis: usize| shape.get(axis).and_then(|dim| dim.as_const()).map(|n| n as usize);
        let (Some(heads), Some(dim), true) = (sizes(1), sizes(3), canonical && *source != value) else {
            continue;
        };
        let rows = Rows::new(evaluator, value, RowOrder::Canonical, &sources, [heads, dim]);
        // Without positional values there is no rotation.
        if !rows.positional_numbers().is_empty()
            && let Ok(projection) = rows.solve(&mut analysis.tables)
            && projection.rotated().is_some()
        {
            analysis.rotated.push((value, projection));
        }
    }
}

/// Finds the roundings of every layer.
fn place_roundings(trace: &Trace<'_, '_>, evaluator: &PartialEvaluator<'_>, analysis: &mut Analysis) {
    let mut places = rounding::Places {
        trace,
        evaluator,
        tables: &analysis.tables,
        placed: HashSet::new(),
    };
    for cache in analysis.caches.values_mut() {
        let rows = trace.rows_before_cache(cache.output, &cache.sources);
        let rows = rows.expect("a cache was found by the rows written to it");
        match places.rows(rows, &cache.rows, cache.rows.scale) {
            Ok(found) => cache.rounding = found,
            Err(unplaced) => analysis.unplaced.push(unplaced),
        }
    }
    for layer in &mut analysis.layers {
        let caches = [layer.key_cache, layer.value_cache].map(|id| &analysis.caches[&id]);
        match rounding::of_layer(&mut places, &layer.found, &layer.query, caches, layer.key_factor) {
            Ok(found) => layer.rounding = found,
            Err(unplaced) => analysis.unplaced.push(unplaced),
        }
    }
    let mut seen = HashSet::new();
    analysis.unplaced.retain(|unplaced| seen.insert(unplaced.clone()));
    analysis.roundings.placed = places.placed;
}

/// Attention operators that `decompose` did not decompose.
fn left_packed(graph: &Graph) -> impl Iterator<Item = Obstacle> {
    let nodes = graph.node_ids().map(|id| graph.node(id));
    nodes
        .filter(|node| matches!(node.op, Op::GroupQueryAttention(_)))
        .map(|node| Obstacle {
            layer: None,
            at: node.name.clone(),
            reason: match [11, 12, 13, 14, 15].map(|i| node.input(i).map(|v| &graph.value(v).name)) {
                [_, Some(scale), ..] | [_, _, Some(scale), ..] => {
                    format!("its k_scale or v_scale {scale}, of a quantized cache, is not supported")
                }
                [.., Some(_), None] => "it has a q_norm_weight and no k_norm_weight".into(),
                [.., None, Some(_)] => "it has a k_norm_weight and no q_norm_weight".into(),
                [Some(sinks), ..] => {
                    format!("its head_sink {sinks} is not a constant of one number per head, or other inputs are not recognized")
                }
                _ => "its inputs have shapes or dtypes that are not understood".into(),
            },
        })
}

/// The message for the decoder of an encoder–decoder model, if this is one: it attends to text that is not its own.
fn encoder(graph: &Graph, roles: &Roles) -> Option<Obstacle> {
    let inputs = graph
        .inputs
        .iter()
        .filter(|id| roles.of.get(id) != Some(&InputRole::Unread));
    let names = inputs.map(|id| graph.value(*id).name.as_str());
    let of_encoder: Vec<&str> = names.filter(|name| name.contains("encoder")).take(3).collect();
    (!of_encoder.is_empty()).then(|| Obstacle {
        layer: None,
        at: of_encoder.join(", "),
        reason: "these inputs come from an encoder: the decoder of an encoder-decoder model is not supported, only \
            decoder-only models"
            .into(),
    })
}

/// The mask of each attention. Sets the position limit, and records the lengths of everything positional, recognized or
/// not.
fn prove_masks(
    evaluator: &PartialEvaluator<'_>,
    found: &[FoundAttention],
    max_positions: usize,
    analysis: &mut Analysis,
) -> Vec<Result<ProvenMask, String>> {
    let terms: HashSet<ValueId> = found.iter().flat_map(|a| &a.mask).map(|term| term.value).collect();
    let (numbers, tables) = (positional_numbers(evaluator, &terms), rotary_tables(evaluator));
    let all = terms
        .into_iter()
        .chain(numbers.iter().copied())
        .chain(tables.iter().copied());
    analysis.lengths = lengths(evaluator.graph, all, |_| false);
    analysis.position_limit = position_limit(evaluator, &numbers, &tables, max_positions);
    let last = analysis.position_limit.unwrap_or(usize::MAX).min(max_positions);
    let masks = Masks::default();
    let mut proven: Vec<_> = found.iter().map(|a| masks.prove(evaluator, a, last)).collect();
    for mask in proven.iter().flatten() {
        analysis.position_limit = analysis.position_limit.into_iter().chain(mask.limit).min();
    }
    // A mask that the caller fills is causal only by convention. If only some layers read it, the others have a
    // different mask, so it is unclear which of them is the causal one.
    let given = |a: &FoundAttention| given_mask(evaluator, a);
    if found.iter().any(|a| given(a).is_some()) {
        for (attention, mask) in found.iter().zip(&mut proven) {
            if mask.is_ok() && given(attention).is_none() {
                *mask = Err("it does not read the mask that is an input of the export and other layers read: what \
                             the caller puts there cannot be known; export with an attention_mask of [batch, past + tokens]"
                    .into());
            }
        }
    }
    proven
}

/// The mask of `[.., tokens, slots]` that the caller fills, if the attention reads one.
fn given_mask(evaluator: &PartialEvaluator<'_>, attention: &FoundAttention) -> Option<ValueId> {
    let graph = evaluator.graph;
    let mut stack: Vec<ValueId> = attention.mask.iter().map(|term| term.value).collect();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        if evaluator.roles.of.get(&id) == Some(&InputRole::FullMask) {
            return Some(id);
        }
        if let Some((_, node)) = graph.def(id)
            && !matches!(node.op, Op::Shape { .. } | Op::Size)
        {
            stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
        }
    }
    None
}

/// Query, with its scale; caches of keys and values; the factor of the keys.
type Operands = (Projection, ValueId, ValueId, f32);

fn operands(
    trace: &Trace<'_, '_>,
    evaluator: &PartialEvaluator<'_>,
    attention: &FoundAttention,
    analysis: &mut Analysis,
) -> Result<Operands, String> {
    let graph = evaluator.graph;
    let name = |id: ValueId| graph.value(id).name.clone();
    let shape = graph
        .shape(attention.query)
        .ok_or_else(|| format!("the shape of {} is not known", name(attention.query)))?;
    let dim = shape
        .last()
        .and_then(|d| d.as_const())
        .ok_or("the head_dim of its queries is not known")? as usize;
    let trial = evaluator.trial(1, 0, 1);
    let volume: usize = evaluator
        .dims(&trial, attention.query)
        .map_err(|stuck| stuck.to_string())?
        .iter()
        .product();
    let query_heads = volume / (trial.sizes.batch * trial.sizes.tokens * dim).max(1);

    let mut operand = Operand {
        value: attention.key,
        transposed: attention.key_transposed,
        query_heads,
        grouped: attention.grouped,
        dim: Some(dim),
        heads: None,
    };
    let (key_cache, key_factor) = cache::solve(trace, evaluator, &operand, &mut analysis.caches, &mut analysis.tables)?;
    operand.heads = Some(analysis.caches[&key_cache].heads);
    (operand.value, operand.transposed, operand.dim) = (attention.value, false, None);
    let (value_cache, value_factor) =
        cache::solve(trace, evaluator, &operand, &mut analysis.caches, &mut analysis.tables)?;
    if key_cache == value_cache {
        return Err(format!("keys and values come from one cache, {}", name(key_cache)));
    }
    if value_factor != 1.0 {
        return Err(format!("its values are scaled by {value_factor}"));
    }
    let sources = trace.sources(attention.query);
    let sources: Vec<ValueId> = sources.iter().copied().collect();
    let rows = Rows::new(
        evaluator,
        attention.query,
        RowOrder::Canonical,
        &sources,
        [query_heads, dim],
    );
    let query = rows
        .solve(&mut analysis.tables)
        .map_err(|reason| format!("its queries {}: {reason}", name(attention.query)))?;
    Ok((query, key_cache, value_cache, key_factor))
}

/// The usual `1/sqrt(head_dim)` if the measured factor equals it up to rounding in the export's arithmetic.
fn snapped(scale: f32, evaluator: &PartialEvaluator<'_>, attention: &FoundAttention) -> f32 {
    let dim = evaluator
        .graph
        .shape(attention.query)
        .and_then(|s| s.last())
        .and_then(|d| d.as_const());
    let usual = dim.map_or(0.0, |d| AttentionScores::usual_scale(d as usize));
    let slack = match evaluator.graph.value(attention.query).dtype {
        Some(dtype) if dtype.is_half() => 4e-3,
        _ => 1e-5,
    };
    if (scale - usual).abs() <= slack * usual {
        usual
    } else {
        scale
    }
}

/// Every cache must have a reader, and every output but one must be a cache.
fn unmatched(evaluator: &PartialEvaluator<'_>, analysis: &mut Analysis) {
    let graph = evaluator.graph;
    let name = |id: ValueId| graph.value(id).name.clone();
    let written: Vec<ValueId> = analysis.caches.values().map(|c| c.output).collect();
    let lost: Vec<String> = evaluator
        .roles
        .caches
        .iter()
        .filter(|c| !analysis.caches.contains_key(*c))
        .map(|c| name(*c))
        .collect();
    let others: Vec<ValueId> = graph.outputs.iter().copied().filter(|o| !written.contains(o)).collect();
    // Additional outputs of hidden states are those that the logits are computed from.
    let last: Vec<ValueId> = match others.len() {
        0 | 1 => others.clone(),
        _ => others
            .iter()
            .copied()
            .filter(|o| !is_before_head(graph, *o, &others))
            .collect(),
    };
    if let [logits] = last[..] {
        analysis.logits = Some(logits);
    }
    if !lost.is_empty() {
        analysis.obstacles.push(Obstacle {
            layer: None,
            at: lost.join(", "),
            reason: "no attention reads these caches".into(),
        });
    }
    if analysis.logits.is_none() {
        let found: Vec<String> = others.iter().map(|o| name(*o)).collect();
        analysis.obstacles.push(Obstacle {
            layer: None,
            at: if found.is_empty() {
                "outputs".into()
            } else {
                found.join(", ")
            },
            reason: format!(
                "{} outputs are no caches, where one (the logits) was expected",
                others.len()
            ),
        });
    }
}

/// Whether other outputs are computed from this one through a product: hidden states before the head. Without a product
/// (for example probabilities) it is unclear which output is meant.
fn is_before_head(graph: &Graph, id: ValueId, others: &[ValueId]) -> bool {
    let is_product = |op: &Op| matches!(op, Op::MatMul | Op::Gemm { .. });
    let reached = |through_products: bool| {
        let mut stack: Vec<ValueId> = others.iter().copied().filter(|other| *other != id).collect();
        let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
        while let Some(at) = stack.pop() {
            let Some((_, node)) = graph.def(at) else { continue };
            if is_product(&node.op) && !through_products {
                continue;
            }
            for input in node.inputs.iter().flatten() {
                if *input == id {
                    return true;
                }
                stack.extend(Some(*input).filter(|v| seen.insert(*v)));
            }
        }
        false
    };
    reached(true) && !reached(false)
}

/// Every positional value that data reads, except those in `masks`.
fn positional_numbers(evaluator: &PartialEvaluator<'_>, masks: &HashSet<ValueId>) -> Vec<ValueId> {
    let graph = evaluator.graph;
    let is = |id: ValueId, dependence| evaluator.dependence(id) == dependence;
    let float = |id: ValueId| graph.value(id).dtype.is_some_and(DType::is_float);
    let mut numbers: Vec<ValueId> = Vec::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if node.outputs.iter().flatten().any(|v| is(*v, Dependence::Data)) {
            let positional = |v: &ValueId| is(*v, Dependence::Positional) && float(*v) && !masks.contains(v);
            numbers.extend(node.inputs.iter().flatten().filter(|v| positional(v)));
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Tables in which operators themselves look up rows by position.
fn rotary_tables(evaluator: &PartialEvaluator<'_>) -> Vec<ValueId> {
    let graph = evaluator.graph;
    let table = |id| {
        let node = graph.node(id);
        let (table, index) = match node.op {
            Op::RotaryEmbedding { .. } => node.input(1).zip(node.input(3))?,
            Op::ContribRotaryEmbedding { .. } => node.input(2).zip(node.input(1))?,
            _ => return None,
        };
        let positional = evaluator.dependence(index) == Dependence::Positional;
        (positional && evaluator.dependence(table) != Dependence::Data).then_some(table)
    };
    graph.node_ids().filter_map(table).collect()
}

/// Tables of positions limit the positions: the largest total length, if less than `last`, at which all these values
/// can be computed. Masks have their own limit.
fn position_limit(
    evaluator: &PartialEvaluator<'_>,
    numbers: &[ValueId],
    tables: &[ValueId],
    last: usize,
) -> Option<usize> {
    let rows = |table: &ValueId| {
        evaluator
            .graph
            .shape(*table)?
            .first()?
            .as_const()
            .map(|rows| rows as usize)
    };
    let mut limit: Option<usize> = tables.iter().filter_map(rows).min();
    for number in numbers {
        let computed = |total: usize| {
            let trial = evaluator.trial(1, total - 1, 1);
            let value = evaluator.eval(&trial, *number);
            // A slice beyond the end of a table succeeds, but is too short.
            value.is_ok_and(|value| evaluator.dims(&trial, *number).is_ok_and(|dims| dims == value.shape()))
        };
        let end = limit.unwrap_or(usize::MAX).min(last);
        if end > 1 && computed(1) && !computed(end) {
            limit = Some(last_where(1, end, computed));
        }
    }
    limit
}
