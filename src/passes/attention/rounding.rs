//! Roundings to codes inside attention: where they are, and that the canonical operators round there too.
//!
//! Attention is recognised on a *skeleton*, the export with these roundings taken out ([`skeleton`]), since what moves and
//! rotates rows is linear only without them. Where each rounding lies is found here, walking from an operand back to its
//! projection or cache; what it rounds is proven by execution on the skeleton, up to a factor, which goes into the
//! rounding's scale. A rounding with one scale for all elements commutes with every movement, so that it can be applied to
//! the rows before they are written to a cache, or to the whole cache when it is read. Gives the [`RowRounding`] of
//! projections and the roundings of caches, scores and probabilities; [`Unplaced`] names what has no such place.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::cache::ExportCache;
use super::find::FoundAttention;
use super::layout::TokenLayout;
use super::projection::{Noise, Projection, RowOrder, Rows, Tables, tolerance};
use super::rope::Table;
use super::trace::Trace;
use crate::graph::eval::eval_node;
use crate::graph::op::{Binary, Op, Rounding};
use crate::graph::{Graph, NodeId, ValueId};
use crate::passes::dependence::{Dependence, classify};
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::quantized::before_attention;
use crate::passes::roles::Roles;
use crate::tensor::{DType, Tensor};

/// Roundings of rows `rotate(scale * pick(source))`, in units of the rows at each place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowRounding {
    /// Of what is picked of the projection.
    pub before: Vec<Rounding>,
    /// Inside the rotation; `None` where it rounds nothing.
    pub rotation: Option<RotationRounding>,
    /// Of the rows.
    pub after: Vec<Rounding>,
}

/// Roundings of `cos * x + sin * turned(x)`, where `turned` gives each pair `(a, b)` as `(-b, a)`, and of the elements that
/// are not rotated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RotationRounding {
    /// Of what is multiplied by cosines, and of what is turned, where that is not the same.
    pub apart: [Vec<Rounding>; 2],
    /// Of the products with cosines.
    pub cos: Vec<Rounding>,
    /// Of the first and the second half of the turned rows, before [`Self::turned`].
    pub halves: [Vec<Rounding>; 2],
    /// Of the turned rows.
    pub turned: Vec<Rounding>,
    /// Of the products with sines.
    pub sin: Vec<Rounding>,
    /// Where a head has elements that are not rotated: of those that are, before the rotation.
    pub first: Vec<Rounding>,
    /// Of the sum, where a head has elements that are not rotated.
    pub rotated: Vec<Rounding>,
    /// Of those.
    pub passed: Vec<Rounding>,
}

/// Roundings of a cache's elements as they are read, the first one first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheRounding {
    /// Of rows that the same call wrote.
    pub new: Vec<Rounding>,
    /// Of rows of earlier calls, where that is not the same: each call rounds the past before it uses it.
    pub older: Option<Vec<Rounding>>,
}

/// All roundings of one attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerRounding {
    /// Of the query's rows, which are not scaled.
    pub query: RowRounding,
    /// Of the elements of the key cache, as it is read.
    pub key: CacheRounding,
    /// Of the elements of the value cache, as it is read.
    pub value: CacheRounding,
    /// Of the scaled scores before soft cap and mask.
    pub scores: Option<Rounding>,
    /// Of the scores behind the soft cap, before the mask.
    pub capped: Option<Rounding>,
    /// Of the softmax's result.
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
    let mut stack: Vec<ValueId> = graph.outputs.clone();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        if let Some((_, node)) = graph.def(id)
            && !matches!(node.op, Op::Shape { .. } | Op::Size)
        {
            stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
        }
    }
    let matters = |id: &ValueId| seen.contains(id) && !is_empty(graph, *id);
    roundings.keys().copied().filter(matters).collect()
}

/// Whether a value has no elements, such as those of a head that is rotated as a whole behind its rotated ones.
fn is_empty(graph: &Graph, value: ValueId) -> bool {
    let shape = graph.shape(value);
    shape.is_some_and(|shape| shape.iter().any(|dim| dim.as_const() == Some(0)))
}

const NO_ROTATION: &str = "it is a part of a rotary embedding that is not understood";

/// How a value is made of a projection: roundings, and linear arithmetic between them.
#[derive(Clone, PartialEq, Debug)]
enum Tree {
    /// The projection.
    Source,
    /// A rounding with the value that it gives and the one that it rounds.
    Round(Rounding, ValueId, ValueId, Box<Tree>),
    /// Arithmetic without roundings.
    Linear(Box<Tree>),
    /// The sum of two values, rounded otherwise.
    Sum([(ValueId, Box<Tree>); 2]),
    /// Two values one after the other, rounded otherwise.
    Parts([(ValueId, Box<Tree>); 2]),
}

impl Tree {
    fn without_linear(self) -> Tree {
        match self {
            Tree::Linear(tree) => *tree,
            tree => tree,
        }
    }

    fn a_rounding(&self) -> Option<ValueId> {
        match self {
            Tree::Source => None,
            Tree::Round(_, output, _, _) => Some(*output),
            Tree::Linear(tree) => tree.a_rounding(),
            Tree::Sum([(_, a), (_, b)]) | Tree::Parts([(_, a), (_, b)]) => a.a_rounding().or_else(|| b.a_rounding()),
        }
    }
}

/// What a value of a row's computation is, times a factor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// What is picked of the projection.
    Picked,
    /// The part of it that is not rotated.
    Passed,
    /// The rows.
    Rotated,
    /// Their rotated part, and the terms of it.
    RotatedPart,
    CosPart,
    SinPart,
    /// The rotated part, each pair `(a, b)` as `(-b, a)`.
    Turned,
    /// The first or the second half of that.
    TurnedHalf(usize),
}

impl Kind {
    /// The elements of a head.
    fn columns(self, projection: &Projection) -> Range<usize> {
        let rotated = projection.rope.map_or(0, |rope| rope.rotary_dim);
        match self {
            Kind::Picked | Kind::Rotated => 0..projection.dim,
            Kind::Passed => rotated..projection.dim,
            Kind::RotatedPart | Kind::CosPart | Kind::SinPart | Kind::Turned => 0..rotated,
            Kind::TurnedHalf(half) => half * rotated / 2..(half + 1) * rotated / 2,
        }
    }
}

/// Roundings one after the other.
struct Stages {
    /// Outermost first: what is rounded, times which factor.
    roundings: Vec<(Kind, f64, Rounding)>,
    /// What is rounded first.
    end: Tree,
}

impl Stages {
    /// The roundings of this kind, innermost first, where its values are to have the factor `scale`.
    fn of(&self, kind: Kind, scale: f32) -> Vec<Rounding> {
        let these = self.roundings.iter().rev().filter(|(of, ..)| *of == kind);
        let mut found: Vec<Rounding> = these
            .map(|(_, factor, rounding)| rounding.scaled(f64::from(scale) / factor))
            .collect();
        found.dedup();
        found
    }
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

    /// Of rows with this projection. `scale` is the factor with which they are written.
    pub fn rows(&mut self, value: ValueId, projection: &Projection, scale: f32) -> Result<RowRounding, Unplaced> {
        let tree = self.tree(value, projection.source)?;
        let whole = match projection.rope {
            Some(_) => Kind::Rotated,
            None => Kind::Picked,
        };
        let outer = self.stages(tree, projection, &[whole, Kind::Picked])?;
        let mut found = RowRounding {
            after: outer.of(whole, scale),
            ..RowRounding::default()
        };
        let partial = projection.rope.is_some_and(|rope| rope.rotary_dim < projection.dim);
        let before = outer.of(Kind::Picked, 1.0);
        match outer.end {
            Tree::Source if whole == Kind::Picked => {}
            Tree::Source => found.before = before,
            Tree::Sum(parts) if !partial => {
                let (rotation, before) = self.rotation(parts, projection, scale)?;
                (found.rotation, found.before) = (Some(rotation), before);
            }
            Tree::Parts([(front, rotated), (back, passed)]) if partial => {
                let first = [&rotated, &passed].into_iter().find_map(|tree| tree.a_rounding());
                let first = first.expect("parts are kept for their roundings");
                let kinds = [(front, Kind::RotatedPart), (back, Kind::Passed)];
                if kinds
                    .iter()
                    .any(|(value, kind)| self.factor(*value, *kind, projection).is_none())
                {
                    return self.unplaced(first, NO_ROTATION);
                }
                let rotated = self.stages(*rotated, projection, &[Kind::RotatedPart, Kind::Picked])?;
                let passed = self.stages(*passed, projection, &[Kind::Passed, Kind::Picked])?;
                let of_sum = rotated.of(Kind::RotatedPart, scale);
                let below = rotated.of(Kind::Picked, 1.0);
                let (mut rotation, before) = match rotated.end {
                    Tree::Sum(parts) => self.rotation(parts, projection, scale)?,
                    Tree::Source => (RotationRounding::default(), below),
                    Tree::Parts(_) | Tree::Linear(_) | Tree::Round(..) => return self.unplaced(first, NO_ROTATION),
                };
                if passed.end != Tree::Source {
                    return self.unplaced(first, NO_ROTATION);
                }
                let scaled = |rounding: Rounding| rounding.scaled(f64::from(scale));
                rotation.first = before.into_iter().map(scaled).collect();
                rotation.rotated = of_sum;
                rotation.passed = passed.of(Kind::Picked, scale);
                rotation.passed.extend(passed.of(Kind::Passed, scale));
                found.rotation = Some(rotation);
            }
            other => {
                let rounding = other.a_rounding().expect("sums and parts are kept for their roundings");
                return self.unplaced(rounding, NO_ROTATION);
            }
        }
        found.rotation = found
            .rotation
            .filter(|rotation| *rotation != RotationRounding::default());
        Ok(found)
    }

    /// The roundings on top of a tree, each of one of these kinds.
    fn stages(&mut self, mut tree: Tree, projection: &Projection, kinds: &[Kind]) -> Result<Stages, Unplaced> {
        let mut roundings = Vec::new();
        loop {
            tree = match tree {
                Tree::Linear(inner) => *inner,
                Tree::Round(rounding, output, at, inner) => {
                    let mut known = kinds.iter();
                    let known = match *inner {
                        // Elements of the projection, be it more of them than these heads pick.
                        Tree::Source if kinds.contains(&Kind::Picked) => Some((Kind::Picked, 1.0)),
                        _ => known.find_map(|kind| Some((*kind, self.factor(at, *kind, projection)?))),
                    };
                    let Some((kind, factor)) = known else {
                        return self.unplaced(output, NO_ROTATION);
                    };
                    roundings.push((kind, factor, rounding));
                    self.placed.insert(output);
                    *inner
                }
                end @ (Tree::Source | Tree::Sum(_) | Tree::Parts(_)) => return Ok(Stages { roundings, end }),
            };
        }
    }

    /// Inside a rotation, and of what is rotated.
    fn rotation(
        &mut self,
        [a, b]: [(ValueId, Box<Tree>); 2],
        projection: &Projection,
        scale: f32,
    ) -> Result<(RotationRounding, Vec<Rounding>), Unplaced> {
        let first = a.1.a_rounding().or_else(|| b.1.a_rounding());
        let first = first.expect("a sum is kept for its roundings");
        let is = |value: ValueId, kind| self.factor(value, kind, projection).is_some();
        let (cos, sin) = if is(a.0, Kind::CosPart) && is(b.0, Kind::SinPart) {
            (a.1, b.1)
        } else if is(b.0, Kind::CosPart) && is(a.0, Kind::SinPart) {
            (b.1, a.1)
        } else {
            return self.unplaced(first, NO_ROTATION);
        };
        let cos = self.stages(*cos, projection, &[Kind::CosPart, Kind::Picked])?;
        let sin = self.stages(*sin, projection, &[Kind::SinPart, Kind::Turned, Kind::Picked])?;
        let mut found = RotationRounding {
            cos: cos.of(Kind::CosPart, scale),
            sin: sin.of(Kind::SinPart, scale),
            turned: sin.of(Kind::Turned, scale),
            ..RotationRounding::default()
        };
        let before = cos.of(Kind::Picked, 1.0);
        let mut others = vec![sin.of(Kind::Picked, 1.0)];
        let is_whole = matches!(sin.end, Tree::Source);
        let mut ends = vec![cos.end];
        match sin.end {
            Tree::Parts(halves) => {
                others.clear();
                for (half, (value, tree)) in halves.into_iter().enumerate() {
                    if self.factor(value, Kind::TurnedHalf(half), projection).is_none() {
                        return self.unplaced(first, NO_ROTATION);
                    }
                    let stages = self.stages(*tree, projection, &[Kind::TurnedHalf(half), Kind::Picked])?;
                    found.halves[half] = stages.of(Kind::TurnedHalf(half), scale);
                    others.push(stages.of(Kind::Picked, 1.0));
                    ends.push(stages.end);
                }
            }
            end => ends.push(end),
        }
        if ends.iter().any(|end| *end != Tree::Source) {
            return self.unplaced(first, NO_ROTATION);
        }
        if others.iter().all(|other| *other == before) {
            return Ok((found, before));
        }
        let scaled = |roundings: Vec<Rounding>, sign: f32| {
            let by = f64::from(sign * scale);
            roundings.into_iter().map(move |rounding| rounding.scaled(by))
        };
        found.apart[0] = scaled(before, 1.0).collect();
        if is_whole {
            found.apart[1] = others.into_iter().flat_map(|other| scaled(other, 1.0)).collect();
        } else {
            // The first half is what is turned, with the other sign.
            for ((half, other), sign) in found.halves.iter_mut().zip(others).zip([-1.0, 1.0]) {
                *half = scaled(other, sign).chain(half.drain(..)).collect();
            }
        }
        Ok((found, Vec::new()))
    }

    /// Of a cache's elements as an operand reads them. `factor` is that of the operand.
    fn reads(&mut self, operand: ValueId, cache: &ExportCache, factor: f32) -> Result<CacheRounding, Unplaced> {
        let read = self.to_write(operand)?;
        let stored = self.to_write(cache.output)?;
        let mut roundings = Vec::new();
        for (output, rounding, after) in &read.roundings {
            let before = f64::from(factor) / after;
            if !before.is_finite() || before == 0.0 {
                return self.unplaced(*output, format!("it is scaled by {before} before"));
            }
            // A factor of the export's arithmetic that is 1 up to its own error.
            let before = if (before - 1.0).abs() < 1e-3 { 1.0 } else { before };
            roundings.push(rounding.scaled(1.0 / before));
            self.placed.insert(*output);
        }
        roundings.reverse();
        roundings.dedup();
        if stored.roundings.is_empty() && read.past.is_empty() {
            return Ok(CacheRounding {
                new: roundings,
                older: None,
            });
        }
        // What a call stores is rounded: the next one reads it rounded, as this one reads it.
        let mut written: Vec<Rounding> = stored.roundings.iter().map(|(_, rounding, _)| *rounding).collect();
        written.dedup();
        let first = stored
            .roundings
            .iter()
            .map(|(output, ..)| *output)
            .chain(read.past.iter().map(|(output, _)| *output));
        let first = first.clone().next().expect("one of both has a rounding");
        if read.write != stored.write {
            return self.unplaced(first, "what is stored in the cache is not what is read");
        }
        if stored.roundings.iter().any(|(.., after)| *after != 1.0) || written.len() > 1 {
            return self.unplaced(first, "the cache is stored scaled, or rounded twice");
        }
        if let [rounding] = written[..]
            && roundings.first() != Some(&rounding)
        {
            return self.unplaced(first, "the cache is stored rounded, but not so read");
        }
        let past: Vec<Rounding> = read.past.iter().rev().map(|(_, rounding)| *rounding).collect();
        let held = written.first().or(cache.rounding.after.last()).and_then(|held| numbers(*held));
        let again: Vec<Rounding> = past.iter().chain(&written).copied().collect();
        let once = held.as_ref().and_then(|held| applied(&again, held));
        // A row is read as it was stored, or as it is from the second call on for good.
        let mut older = None;
        if !past.is_empty() && once != held {
            let twice = once.as_ref().and_then(|once| applied(&again, once));
            let settles = match held {
                Some(_) => once.is_some() && twice == once,
                None => again.len() == 1,
            };
            if !settles {
                return self.unplaced(first, "each call rounds past keys or values anew, to other codes than they have");
            }
            older = Some(written.iter().chain(&past).chain(&roundings).copied().collect());
        }
        self.placed.extend(read.past.iter().map(|(output, _)| *output));
        self.placed.extend(stored.roundings.iter().map(|(output, ..)| *output));
        Ok(CacheRounding { new: roundings, older })
    }

    /// From a value back to where past and new rows meet.
    fn to_write(&self, value: ValueId) -> Result<Read, Unplaced> {
        let (graph, evaluator) = (self.evaluator.graph, self.evaluator);
        let mut read = Read::default();
        let (mut at, mut after) = (value, 1.0);
        let mut named = None;
        loop {
            if let Some(rounding) = evaluator.rounding(at) {
                read.roundings.push((at, rounding, after));
                named = Some(at);
            }
            let Some((id, node)) = graph.def(at) else {
                return Ok(read);
            };
            let data: Vec<ValueId> = self.data(node);
            let [input] = data[..] else {
                let same = |v: &ValueId| self.trace.sources(*v) == self.trace.sources(at);
                if let Some(input) = data.iter().copied().find(same) {
                    // Several operands with the same elements.
                    at = input;
                    continue;
                }
                read.write = Some(id);
                let past = data
                    .iter()
                    .copied()
                    .filter(|v| self.trace.sources(*v).iter().all(|s| self.trace.is_cache(*s)));
                for mut at in past {
                    while let Some((_, node)) = graph.def(at) {
                        read.past.extend(evaluator.rounding(at).map(|rounding| (at, rounding)));
                        match (self.data(node)[..].first(), read.past.last()) {
                            (Some(input), _) if moves(&node.op) => at = *input,
                            (_, Some((output, _))) => {
                                return self
                                    .unplaced(*output, format!("{} is between it and the cache", node.op.name()));
                            }
                            _ => break,
                        }
                    }
                }
                return Ok(read);
            };
            let other = node.inputs.iter().flatten().copied().find(|v| *v != input);
            match (&node.op, other) {
                (Op::Binary(op @ (Binary::Mul | Binary::Div)), Some(other)) => match (self.scalar(other), op) {
                    (Some(factor), Binary::Mul) => after *= factor,
                    (Some(factor), _) if node.input(0) == Some(input) => after /= factor,
                    _ => {
                        return match named {
                            Some(output) => self.unplaced(output, "the cache is multiplied by a tensor behind it"),
                            None => Ok(read),
                        };
                    }
                },
                (op, _) if moves(op) => {}
                _ => {
                    return match named {
                        Some(output) => {
                            self.unplaced(output, format!("{} is between it and the cache", node.op.name()))
                        }
                        None => Ok(read),
                    };
                }
            }
            at = input;
        }
    }

    /// A number that does not depend on the data.
    fn scalar(&self, value: ValueId) -> Option<f64> {
        let trial = self.evaluator.trial(1, 2, 3);
        let tensor = self.evaluator.eval(&trial, value).ok()?;
        (tensor.len() == 1).then(|| tensor.to_f64()[0])
    }

    fn data(&self, node: &crate::graph::Node) -> Vec<ValueId> {
        let inputs = node.inputs.iter().flatten().copied();
        let mut data: Vec<ValueId> = inputs
            .filter(|v| self.evaluator.dependence(*v) == Dependence::Data && !is_empty(self.evaluator.graph, *v))
            .collect();
        data.dedup();
        data
    }

    fn tree(&mut self, value: ValueId, source: ValueId) -> Result<Tree, Unplaced> {
        if value == source {
            return Ok(Tree::Source);
        }
        let graph = self.evaluator.graph;
        let Some((_, node)) = graph.def(value) else {
            return Ok(Tree::Source);
        };
        if let (Some(rounding), Some(at)) = (self.evaluator.rounding(value), node.input(0)) {
            let inner = self.tree(at, source)?;
            if matches!(&inner, Tree::Round(same, ..) if *same == rounding) {
                self.placed.insert(value);
                return Ok(inner);
            }
            return Ok(Tree::Round(rounding, value, at, Box::new(inner)));
        }
        let data = self.data(node);
        let mut trees = Vec::new();
        for input in &data {
            trees.push(self.tree(*input, source)?);
        }
        let Some((first, rest)) = trees.split_first() else {
            return Ok(Tree::Source);
        };
        if moves(&node.op) && rest.iter().all(|tree| same(tree, first)) {
            return Ok(first.clone());
        }
        let bare: Vec<Tree> = trees.iter().cloned().map(Tree::without_linear).collect();
        if bare.iter().all(|tree| same(tree, &bare[0])) {
            return Ok(Tree::Linear(Box::new(bare[0].clone())));
        }
        if let (Op::Binary(Binary::Add), [a, b]) = (&node.op, &data[..]) {
            let [left, right] = [&trees[0], &trees[1]].map(|tree| Box::new(tree.clone()));
            return Ok(Tree::Sum([(*a, left), (*b, right)]));
        }
        if let (Op::Concat { .. }, [a, b]) = (&node.op, &data[..]) {
            let [left, right] = [&trees[0], &trees[1]].map(|tree| Box::new(tree.clone()));
            return Ok(Tree::Parts([(*a, left), (*b, right)]));
        }
        let rounding = trees
            .iter()
            .find_map(Tree::a_rounding)
            .expect("trees without roundings are the same");
        self.unplaced(
            rounding,
            format!(
                "{} ({}) takes it with values rounded otherwise",
                node.op.name(),
                node.name
            ),
        )
    }

    /// The factor of a value that is of this kind, if it is; proven at small positions and at the last ones.
    fn factor(&self, value: ValueId, kind: Kind, projection: &Projection) -> Option<f64> {
        let evaluator = self.evaluator;
        let shape = evaluator.graph.shape(value)?;
        let order = TokenLayout::of(shape, evaluator.roles).map_or(RowOrder::Canonical, RowOrder::Tokens);
        let (tables, of) = of_kind(kind, projection, self.tables)?;
        let columns = kind.columns(projection);
        let rows = Rows {
            evaluator,
            value,
            order,
            source: projection.source,
            heads: projection.heads,
            dim: columns.len(),
        };
        let end = self
            .tables
            .positions
            .min(evaluator.roles.capacity.unwrap_or(usize::MAX));
        let slack = [value, projection.source]
            .map(|id| tolerance(evaluator.graph.value(id).dtype.unwrap_or(DType::F32)))
            .into_iter()
            .fold(0.0, f32::max);
        let mut factor = None;
        for past in [2.min(end.checked_sub(3)?), end - 3] {
            let trial = evaluator.trial(1, past, 3);
            let x = Noise::new(&rows, 41).ok()?;
            let fed = rows.feed(&trial, |b, t, c| x.at(b, t, c)).ok()?;
            let found = rows.run(&trial, fed).ok()?;
            let heads = of.rows(&tables, &trial, |b, t, c| x.at(b, t, c) as f32);
            let part = |head: &[f32]| head[columns.clone()].to_vec();
            let expected: Vec<f32> = heads.chunks(projection.dim).flat_map(part).collect();
            let largest = (0..expected.len()).max_by(|a, b| expected[*a].abs().total_cmp(&expected[*b].abs()))?;
            let by = *factor.get_or_insert(found[largest] / expected[largest]);
            let near = |(a, b): (&f32, &f32)| (a - by * b).abs() <= 4.0 * slack * by.abs();
            if !by.is_finite() || by == 0.0 || !found.iter().zip(&expected).all(near) {
                return None;
            }
        }
        // The export's own arithmetic must not leave a factor of 0.99999994.
        let whole = |by: f32| if (by.abs() - 1.0).abs() < 1e-3 { by.signum() } else { by };
        factor.map(|by| f64::from(whole(by)))
    }
}

/// What is between a value and where past and new rows meet.
#[derive(Default)]
struct Read {
    /// Outermost first: the value given, the rounding, and the factor of what follows.
    roundings: Vec<(ValueId, Rounding, f64)>,
    /// Where they meet.
    write: Option<NodeId>,
    /// Roundings of the past alone.
    past: Vec<(ValueId, Rounding)>,
}

/// Every number that codes of 8 bits stand for.
fn numbers(how: Rounding) -> Option<Vec<f32>> {
    if !matches!(how.to, DType::I8 | DType::U8 | DType::F8E4M3Fn | DType::F8E5M2) {
        return None;
    }
    let bytes: Vec<u8> = (0..=255).collect();
    let codes = Tensor::new(how.to, vec![bytes.len()], bytes.into()).ok()?;
    let codes = codes.to_f64().into_iter().filter(|code| code.is_finite());
    Some(codes.map(|code| (code - how.zero_point as f64) as f32 * how.scale).collect())
}

/// Numbers rounded, in this order.
fn applied(roundings: &[Rounding], numbers: &[f32]) -> Option<Vec<f32>> {
    let mut x = Tensor::from_f32(vec![numbers.len()], numbers);
    for rounding in roundings {
        x = eval_node(&rounding.operator(), &[Some(x)], 1).ok()?.pop().flatten()?;
    }
    Some(x.to_f32())
}

/// Equal but for which of several equal roundings are meant.
fn same(a: &Tree, b: &Tree) -> bool {
    match (a, b) {
        (Tree::Source, Tree::Source) => true,
        (Tree::Round(p, v, _, a), Tree::Round(q, w, _, b)) => v == w && p == q && same(a, b),
        (Tree::Linear(a), Tree::Linear(b)) => same(a, b),
        (a, b) => a == b,
    }
}

/// Whether an operator gives elements of its operands unchanged.
fn moves(op: &Op) -> bool {
    matches!(
        op,
        Op::Identity
            | Op::Cast { .. }
            | Op::CastLike
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Flatten { .. }
            | Op::Expand
            | Op::Tile
            | Op::Concat { .. }
            | Op::Split { .. }
            | Op::Slice
            | Op::Gather { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::Where
            | Op::ScatterNd { .. }
            | Op::ScatterElements { .. }
            | Op::TensorScatter { .. }
    )
}

/// The heads that have the elements of this kind, with the table that makes them.
fn of_kind(kind: Kind, projection: &Projection, tables: &Tables) -> Option<(Tables, Projection)> {
    let mut of = Projection {
        scale: 1.0,
        ..projection.clone()
    };
    let mut own = Tables::default();
    if kind == Kind::Picked {
        of.rope = None;
        return Some((own, of));
    }
    let rope = of.rope.as_mut()?;
    // Where neighbours are paired, no half is turned.
    if matches!(kind, Kind::TurnedHalf(_)) && rope.interleaved {
        return None;
    }
    let Table { half, cos, sin } = tables.tables[rope.table].clone();
    rope.table = 0;
    let filled = |value: f32| vec![value; cos.len()];
    let (cos, sin) = match kind {
        Kind::CosPart => (cos.clone(), filled(0.0)),
        Kind::SinPart => (filled(0.0), sin),
        Kind::Turned | Kind::TurnedHalf(_) => (filled(0.0), filled(1.0)),
        Kind::Rotated | Kind::RotatedPart | Kind::Picked | Kind::Passed => (cos, sin),
    };
    own.tables.push(Table { half, cos, sin });
    Some((own, of))
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
