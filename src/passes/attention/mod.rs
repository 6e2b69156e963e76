//! The attention of an export, recognised: one [`AttentionLayer`] for each, with its projections, caches and window.
//!
//! | module | what it recognises |
//! |---|---|
//! | [`find`] | each attention: its operands, mask terms, scale and soft cap |
//! | [`trace`] | the projections and caches that an operand is made of |
//! | [`layout`] | where batch, tokens, heads and slots lie among the axes |
//! | [`projection`] | which columns of a projection the rows are, scaled and rotated how |
//! | [`rope`] | rotary tables |
//! | [`cache`] | which output is the update of which input, and that it appends rows |
//! | [`mask`] | causal, with or without a sliding window |
//! | [`fingerprint`] | equal computations, so that one layer is executed and the others compared with it |
//!
//! [`analyse`] puts them together into an [`Analysis`], which `emit` turns into canonical operators and `recognise`
//! reports. Nothing is rewritten here. Everything that was not recognised becomes an [`Obstacle`], so that a user sees all
//! of them at once.

pub(super) mod cache;
mod find;
mod fingerprint;
pub(super) mod layout;
mod mask;
pub(super) mod projection;
mod rope;
mod trace;

use std::collections::HashMap;
use std::fmt;

use crate::graph::op::Op;
use crate::graph::{AttentionScores, Graph, ValueId};
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::roles::Roles;
use cache::{ExportCache, Operand};
use find::FoundAttention;
use mask::Masks;
use projection::{Projection, RowOrder, Rows, Tables};
use trace::Trace;

/// One attention, in terms of the canonical graph.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// What `find` saw in the export.
    pub found: FoundAttention,
    pub query: Projection,
    pub key_cache: ValueId,
    pub value_cache: ValueId,
    /// Scale, all parts together, soft cap and window.
    pub scores: AttentionScores,
}

/// Something that keeps the graph from becoming canonical.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Obstacle {
    /// Which attention, counted from 0 in order of execution.
    pub layer: Option<usize>,
    /// Node or value of the export.
    pub at: String,
    /// What was not recognised there, and why.
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

/// What is known of an export's attention.
#[derive(Debug, Default)]
pub struct Analysis {
    pub layers: Vec<AttentionLayer>,
    pub caches: HashMap<ValueId, ExportCache>,
    pub tables: Tables,
    pub obstacles: Vec<Obstacle>,
    /// Rows of the shortest table that is indexed by positions.
    pub position_limit: Option<usize>,
}

/// Recognises every attention of a sorted, inferred graph. Rotary tables get `max_positions` rows, fewer where the
/// export's own tables are shorter.
pub fn analyse(graph: &Graph, roles: &Roles, max_positions: usize) -> Analysis {
    let evaluator = PartialEvaluator::new(graph, roles);
    let trace = Trace::new(&evaluator);
    let masks = Masks::default();
    let position_limit = position_limit(&evaluator);
    let mut analysis = Analysis {
        position_limit,
        ..Analysis::default()
    };
    analysis.tables.positions = position_limit
        .map_or(max_positions, |limit| limit.min(max_positions))
        .max(8);
    let (found, unrecognised) = find::find(&evaluator);
    for softmax in unrecognised {
        analysis.obstacles.push(Obstacle {
            layer: None,
            at: softmax.node,
            reason: format!("this softmax is no attention that Lapidary knows: {}", softmax.reason),
        });
    }
    for (index, attention) in found.into_iter().enumerate() {
        let at = attention.name.clone();
        let obstacle = |reason: String| Obstacle {
            layer: Some(index),
            at: at.clone(),
            reason,
        };
        let window = masks.window(&evaluator, &attention);
        let operands = operands(&trace, &evaluator, &attention, &mut analysis);
        match (operands, window) {
            (Ok((query, key_cache, value_cache, scale)), Ok(window)) => analysis.layers.push(AttentionLayer {
                query,
                key_cache,
                value_cache,
                scores: AttentionScores {
                    scale: snapped(scale * attention.scale as f32, &evaluator, &attention),
                    softcap: attention.softcap.map(|cap| cap as f32),
                    window,
                },
                found: attention,
            }),
            (operands, window) => {
                analysis.obstacles.extend(operands.err().map(&obstacle));
                analysis.obstacles.extend(window.err().map(&obstacle));
            }
        }
    }
    if analysis.obstacles.is_empty() {
        unmatched(&evaluator, &mut analysis);
    }
    analysis
}

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
    let mut sources = sources.iter();
    let (Some(source), None) = (sources.next(), sources.next()) else {
        return Err(format!(
            "its queries {} are made of several projections",
            name(attention.query)
        ));
    };
    let rows = Rows {
        evaluator,
        value: attention.query,
        order: RowOrder::Canonical,
        source: *source,
        heads: query_heads,
        dim,
    };
    let query = rows
        .solve(&mut analysis.tables)
        .map_err(|reason| format!("its queries {}: {reason}", name(attention.query)))?;
    let scale = key_factor * query.scale;
    let query = Projection { scale: 1.0, ..query };
    Ok((query, key_cache, value_cache, scale))
}

/// The usual `1/sqrt(head_dim)` where the measured factor is that up to rounding of the export's own arithmetic.
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

/// Every cache must have been read, and every output but one must be a cache.
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
    if !lost.is_empty() {
        analysis.obstacles.push(Obstacle {
            layer: None,
            at: lost.join(", "),
            reason: "no attention reads these caches".into(),
        });
    }
    if others.len() != 1 {
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

/// Tables in the export that are indexed by positions bound how far positions may go.
fn position_limit(evaluator: &PartialEvaluator<'_>) -> Option<usize> {
    use crate::passes::dependence::Dependence;
    let graph = evaluator.graph;
    let table = |id: Option<ValueId>| {
        graph
            .constant(id?)
            .filter(|c| c.dtype().is_float())
            .map(|c| c.shape().to_vec())
    };
    let positional = |id: Option<ValueId>| id.is_some_and(|v| evaluator.dependence(v) == Dependence::Positional);
    let limit = |id| {
        let node = graph.node(id);
        let rows = match node.op {
            Op::Gather { axis: 0 } if positional(node.input(1)) => table(node.input(0))?,
            Op::RotaryEmbedding { .. } if positional(node.input(3)) => table(node.input(1))?,
            Op::ContribRotaryEmbedding { .. } if positional(node.input(1)) => table(node.input(2))?,
            _ => return None,
        };
        (rows.len() > 1).then(|| rows[0])
    };
    graph.node_ids().filter_map(limit).min()
}
