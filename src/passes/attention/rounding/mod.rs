//! Roundings to codes inside attention: where they are, and the proof that the canonical operators round there too.
//!
//! Attention is recognized on a *skeleton*, the export with these roundings taken out ([`skeleton`]), since what moves and
//! rotates rows is linear only without them. Where each rounding lies is found here, walking from an operand back to its
//! projection or cache; what it rounds is proven by execution on the skeleton, up to a factor, which goes into the
//! rounding's scale. A rounding with one scale for all elements commutes with every movement, so that it can be applied to
//! the rows before they are written to a cache, or to the whole cache when it is read. Gives the [`RowRounding`] of
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

/// Roundings of rows `rotate(scale * pick(source))`, in units of the rows at each place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowRounding {
    /// Rounding of what is picked of the projection.
    pub before: Vec<Rounding>,
    /// Inside the rotation; `None` where it rounds nothing.
    pub rotation: Option<RotationRounding>,
    /// Rounding of the rows.
    pub after: Vec<Rounding>,
}

/// Roundings of `cos * x + sin * turned(x)`, where `turned` gives each pair `(a, b)` as `(-b, a)`, and of the elements that
/// are not rotated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RotationRounding {
    /// Rounding of what is multiplied by cosines, and of what is turned, where that is not the same.
    pub apart: [Vec<Rounding>; 2],
    /// Rounding of the products with cosines.
    pub cos: Vec<Rounding>,
    /// Rounding of the first and the second half of the turned rows, before [`Self::turned`].
    pub halves: [Vec<Rounding>; 2],
    /// Rounding of the turned rows.
    pub turned: Vec<Rounding>,
    /// Rounding of the products with sines.
    pub sin: Vec<Rounding>,
    /// Where a head has elements that are not rotated: of those that are, before the rotation.
    pub first: Vec<Rounding>,
    /// Rounding of the sum, where a head has elements that are not rotated.
    pub rotated: Vec<Rounding>,
    /// Rounding of those.
    pub passed: Vec<Rounding>,
}

/// Roundings of a cache's elements as they are read, the first one first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheRounding {
    /// Rounding of rows that the same call wrote.
    pub new: Vec<Rounding>,
    /// Rounding of rows of earlier calls, where that is not the same: each call rounds the past before it uses it.
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
    /// What is rounded, in the export.
    pub value: String,
    /// Why it is not understood.
    pub reason: String,
}

/// A graph without the roundings inside its attention.
pub struct Skeleton {
    pub graph: Graph,
    /// Those taken out, by the value that they give.
    pub roundings: HashMap<ValueId, Rounding>,
}

/// The skeleton of a graph with roundings of data inside attention; `None` if there are none. Roundings of what depends on
/// positions alone stay: they are executed. Those over the range of all of a tensor have no fixed scale, so no place.
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

/// The name of what a rounding rounds.
pub fn name_of_rounded(graph: &Graph, output: ValueId) -> String {
    let input = graph.def(output).and_then(|(_, node)| node.input(0));
    graph.value(input.unwrap_or(output)).name.clone()
}

/// Roundings that the outputs depend on other than by shapes.
pub fn effective(graph: &Graph, roundings: &HashMap<ValueId, Rounding>) -> HashSet<ValueId> {
    let seen = reaching_outputs(graph);
    let matters = |id: &ValueId| seen.contains(id) && !is_empty(graph, *id);
    roundings.keys().copied().filter(matters).collect()
}

/// Whether a value has no elements, such as those of a head that is rotated as a whole after its rotated ones.
fn is_empty(graph: &Graph, value: ValueId) -> bool {
    let shape = graph.shape(value);
    shape.is_some_and(|shape| shape.iter().any(|dim| dim.as_const() == Some(0)))
}

/// Finds the roundings of one attention.
pub struct Places<'a, 'b, 'g> {
    pub trace: &'a Trace<'b, 'g>,
    pub evaluator: &'b PartialEvaluator<'g>,
    pub tables: &'a Tables,
    /// Values of roundings whose place is known.
    pub placed: HashSet<ValueId>,
}

impl Places<'_, '_, '_> {
    fn unplaced<T>(&self, output: ValueId, reason: impl Into<String>) -> Result<T, Unplaced> {
        Err(Unplaced {
            value: name_of_rounded(self.evaluator.graph, output),
            reason: reason.into(),
        })
    }

    /// Of scores or probabilities, the first one first: as many as there are places.
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

/// Whether an operator gives elements of its operands unchanged.
fn moves(op: &Op) -> bool {
    matches!(op, Op::Gather { .. }) || moves_elements(op)
}

/// The roundings of an attention whose operands are known.
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
        // Without a cap the two places are one after the other.
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
