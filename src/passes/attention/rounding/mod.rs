//! Roundings to codes inside attention: finds them, and proves that the canonical operators round at the same places.
//!
//! Attention is recognized on a *skeleton*, the export without these roundings ([`skeleton`]), since movement and
//! rotation of rows are linear only without them. This module locates each rounding, walking from an operand back to
//! its projection or cache. What it rounds is proved by execution on the skeleton, up to a factor, which goes into the
//! rounding's scale. A rounding with one scale for all elements commutes with every movement, so it can be applied to
//! the rows before they are written to a cache, or to the whole cache when it is read. Returns the [`RowRounding`] of
//! projections and the roundings of caches, scores and probabilities; [`Unplaced`] names the others.

mod caches;
mod rows;

use std::collections::{HashMap, HashSet};

use super::cache::ExportCache;
use super::find::FoundAttention;
use super::projection::{Projection, Tables};
use super::trace::{Trace, moves_elements};
use crate::graph::op::{Op, Rounding};
use crate::graph::{Graph, NodeId, ValueId};
use crate::passes::dependence::{Dependence, classify, reaching_outputs};
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::quantized::before_attention;
use crate::passes::roles::Roles;

/// Roundings of rows `rotate(scale * pick(source))`, each in the units at its place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowRounding {
    /// Rounding of the columns picked from the projection.
    pub before: Vec<Rounding>,
    /// Roundings inside the rotation; `None` if there are none.
    pub rotation: Option<RotationRounding>,
    /// Rounding of the rows.
    pub after: Vec<Rounding>,
}

/// Roundings of `cos * x + sin * turned(x)`, where `turned` maps each pair `(a, b)` to `(-b, a)`, and of the elements
/// that are not rotated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RotationRounding {
    /// Rounding of the factor of the cosines, and of the elements before they are turned, if the two differ.
    pub apart: [Vec<Rounding>; 2],
    /// Rounding of the products with cosines.
    pub cos: Vec<Rounding>,
    /// Rounding of the first and the second half of the turned rows, before [`Self::turned`].
    pub halves: [Vec<Rounding>; 2],
    /// Rounding of the turned rows.
    pub turned: Vec<Rounding>,
    /// Rounding of the products with sines.
    pub sin: Vec<Rounding>,
    /// If a head has elements that are not rotated: rounding of the rotated ones, before the rotation.
    pub first: Vec<Rounding>,
    /// Rounding of the sum, if a head has elements that are not rotated.
    pub rotated: Vec<Rounding>,
    /// Rounding of the elements that are not rotated.
    pub passed: Vec<Rounding>,
}

/// Roundings of a cache's elements as they are read, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheRounding {
    /// Rounding of rows that the same call wrote.
    pub new: Vec<Rounding>,
    /// Rounding of rows of earlier calls, if it differs: each call rounds the past before it uses it.
    pub older: Option<Vec<Rounding>>,
}

/// All roundings of one attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerRounding {
    /// Rounding of the query's rows, which are not scaled.
    pub query: RowRounding,
    /// Rounding of the elements of the key cache, as it is read.
    pub key: CacheRounding,
    /// Rounding of the elements of the value cache, as it is read.
    pub value: CacheRounding,
    /// Rounding of the scaled scores before soft cap and mask.
    pub scores: Option<Rounding>,
    /// Rounding of the scores after the soft cap, before the mask.
    pub capped: Option<Rounding>,
    /// Rounding of the softmax's result.
    pub probabilities: Option<Rounding>,
}

/// A rounding that the canonical operators cannot do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unplaced {
    /// The rounded value in the export.
    pub value: String,
    /// Why it has no place.
    pub reason: String,
}

/// A graph without the roundings inside its attention.
pub struct Skeleton {
    pub graph: Graph,
    /// The removed roundings, by their results.
    pub roundings: HashMap<ValueId, Rounding>,
}

/// The skeleton of a graph with roundings of data inside attention; `None` if there are none. Roundings of positional
/// values stay: they are executed. Roundings over the range of a whole tensor have no fixed scale and so no place.
pub fn skeleton(graph: &Graph, roles: &Roles) -> (Option<Skeleton>, Vec<Unplaced>) {
    let rounds = |id: &NodeId| matches!(graph.node(*id).op, Op::RoundToCodes { .. } | Op::DynamicRoundToCodes);
    let all: Vec<NodeId> = graph.node_ids().filter(rounds).collect();
    if all.is_empty() {
        return (None, Vec::new());
    }
    let attended = before_attention(graph);
    let dependence = classify(graph, roles);
    let inside = |id: NodeId| {
        let output = graph.node(id).output(0)?;
        let data = dependence.get(&output) == Some(&Dependence::Data);
        (data && attended.contains(&output)).then_some((id, output))
    };
    let (mut roundings, mut dynamic) = (HashMap::new(), Vec::new());
    let mut bare = graph.clone();
    for (id, output) in all.into_iter().filter_map(inside) {
        let node = bare.node_mut(id);
        match Rounding::of(&node.op) {
            Some(rounding) => drop(roundings.insert(output, rounding)),
            None => dynamic.push(Unplaced {
                value: name_of_rounded(graph, output),
                reason: "the range of its codes is that of the whole tensor".into(),
            }),
        }
        node.op = Op::Identity;
    }
    let found = !roundings.is_empty() || !dynamic.is_empty();
    (found.then_some(Skeleton { graph: bare, roundings }), dynamic)
}

/// The name of a rounding's input.
pub fn name_of_rounded(graph: &Graph, output: ValueId) -> String {
    let input = graph.def(output).and_then(|(_, node)| node.input(0));
    graph.value(input.unwrap_or(output)).name.clone()
}

/// Roundings that affect the outputs, not only their shapes.
pub fn effective(graph: &Graph, roundings: &HashMap<ValueId, Rounding>) -> HashSet<ValueId> {
    let seen = reaching_outputs(graph);
    let matters = |id: &ValueId| seen.contains(id) && !is_empty(graph, *id);
    roundings.keys().copied().filter(matters).collect()
}

/// Whether a value has no elements, such as the rest of a head that is rotated as a whole.
fn is_empty(graph: &Graph, value: ValueId) -> bool {
    let shape = graph.shape(value);
    shape.is_some_and(|shape| shape.iter().any(|dim| dim.as_const() == Some(0)))
}

/// Finds the roundings of one attention.
pub struct Places<'a, 'b, 'g> {
    pub trace: &'a Trace<'b, 'g>,
    pub evaluator: &'b PartialEvaluator<'g>,
    pub tables: &'a Tables,
    /// Results of roundings with a known place.
    pub placed: HashSet<ValueId>,
}

impl Places<'_, '_, '_> {
    fn unplaced<T>(&self, output: ValueId, reason: impl Into<String>) -> Result<T, Unplaced> {
        Err(Unplaced {
            value: name_of_rounded(self.evaluator.graph, output),
            reason: reason.into(),
        })
    }

    /// Roundings of scores or probabilities, in order: as many as there are places.
    fn few<const N: usize>(&mut self, found: &[(ValueId, Rounding)]) -> Result<[Option<Rounding>; N], Unplaced> {
        let mut places = Vec::new();
        for (output, rounding) in found {
            if places.last() != Some(rounding) {
                places.push(*rounding);
            }
            if places.len() > N {
                return self.unplaced(*output, "it is rounded once more, to other codes");
            }
            self.placed.insert(*output);
        }
        Ok(std::array::from_fn(|i| places.get(i).copied()))
    }

    fn data(&self, node: &crate::graph::Node) -> Vec<ValueId> {
        let inputs = node.inputs.iter().flatten().copied();
        let mut data: Vec<ValueId> = inputs
            .filter(|v| self.evaluator.dependence(*v) == Dependence::Data && !is_empty(self.evaluator.graph, *v))
            .collect();
        data.dedup();
        data
    }
}

/// Whether an operator returns elements of its operands unchanged.
fn moves(op: &Op) -> bool {
    matches!(op, Op::Gather { .. }) || moves_elements(op)
}

/// Finds the roundings of an attention with known operands.
pub fn of_layer(
    places: &mut Places<'_, '_, '_>,
    found: &FoundAttention,
    query: &Projection,
    [key, value]: [&ExportCache; 2],
    key_factor: f32,
) -> Result<LayerRounding, Unplaced> {
    if let Some(unplaced) = found.unplaced.first() {
        return Err(unplaced.clone());
    }
    let before: Vec<_> = found.rounded_scores.iter().rev().copied().collect();
    let behind: Vec<_> = found.rounded_capped.iter().rev().copied().collect();
    let (scores, capped) = match found.softcap {
        Some(_) => (places.few::<1>(&before)?[0], places.few::<1>(&behind)?[0]),
        // Without a soft cap the two places are adjacent.
        None => places.few::<2>(&before)?.into(),
    };
    Ok(LayerRounding {
        query: places.rows(found.query, query, 1.0)?,
        key: places.reads(found.key, key, key_factor)?,
        value: places.reads(found.value, value, 1.0)?,
        scores,
        capped,
        probabilities: places.few::<1>(&found.rounded_probabilities)?[0],
    })
}
