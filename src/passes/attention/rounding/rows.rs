//! Roundings of rows: of the columns picked from a projection, of the terms of its rotation, of the result.

use std::ops::Range;

use super::{Places, RotationRounding, RowRounding, Unplaced, moves};
use crate::graph::ValueId;
use crate::graph::op::{Binary, Op, Rounding};
use crate::passes::attention::layout::TokenLayout;
use crate::passes::attention::projection::{Noise, Projection, RowOrder, Rows, Tables, tolerance};
use crate::passes::attention::rope::Table;
use crate::tensor::DType;

const NO_ROTATION: &str = "it is a part of a rotary embedding that is not understood";

/// How a value is computed from a projection: roundings, and linear arithmetic between them.
#[derive(Clone, PartialEq, Debug)]
enum Tree {
    /// The projection.
    Source,
    /// A rounding with its result and its input.
    Round(Rounding, ValueId, ValueId, Box<Tree>),
    /// Arithmetic without roundings.
    Linear(Box<Tree>),
    /// The sum of two values with different roundings.
    Sum([(ValueId, Box<Tree>); 2]),
    /// Two concatenated values with different roundings.
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

/// The kinds of values in a row's computation, up to a factor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// The columns picked from the projection.
    Picked,
    /// The part that is not rotated.
    Passed,
    /// The rows.
    Rotated,
    /// Their rotated part, and the terms of it.
    RotatedPart,
    CosPart,
    SinPart,
    /// The rotated part, each pair `(a, b)` as `(-b, a)`.
    Turned,
    /// The first or the second half of the turned part.
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

/// A chain of roundings.
struct Stages {
    /// Outermost first: the input of the rounding, and its factor.
    roundings: Vec<(Kind, f64, Rounding)>,
    /// The input of the innermost rounding.
    end: Tree,
}

impl Stages {
    /// The roundings of this kind, innermost first, for values with the factor `scale`.
    fn of(&self, kind: Kind, scale: f32) -> Vec<Rounding> {
        let these = self.roundings.iter().rev().filter(|(of, ..)| *of == kind);
        let mut found: Vec<Rounding> = these
            .map(|(_, factor, rounding)| rounding.scaled(f64::from(scale) / factor))
            .collect();
        found.dedup();
        found
    }
}

impl Places<'_, '_, '_> {
    /// Roundings of rows with this projection. `scale` is the factor with which they are written.
    pub fn rows(&mut self, value: ValueId, projection: &Projection, scale: f32) -> Result<RowRounding, Unplaced> {
        if projection.rest.is_some() {
            return Err(Unplaced {
                value: self.evaluator.graph.value(value).name.clone(),
                reason: "its heads are joined of several parts".into(),
            });
        }
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

    /// The roundings at the top of a tree, each of one of these kinds.
    fn stages(&mut self, mut tree: Tree, projection: &Projection, kinds: &[Kind]) -> Result<Stages, Unplaced> {
        let mut roundings = Vec::new();
        loop {
            tree = match tree {
                Tree::Linear(inner) => *inner,
                Tree::Round(rounding, output, at, inner) => {
                    let mut known = kinds.iter();
                    let known = match *inner {
                        // Elements of the projection, possibly more than these heads pick.
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

    /// Roundings inside a rotation, and of its input.
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
            // The first half has the opposite sign.
            for ((half, other), sign) in found.halves.iter_mut().zip(others).zip([-1.0, 1.0]) {
                *half = scaled(other, sign).chain(half.drain(..)).collect();
            }
        }
        Ok((found, Vec::new()))
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
            format!("{} ({}) reads it with different rounding", node.op.name(), node.name),
        )
    }

    /// The factor of a value if it is of this kind; proved at small positions and at the last ones.
    fn factor(&self, value: ValueId, kind: Kind, projection: &Projection) -> Option<f64> {
        let evaluator = self.evaluator;
        let shape = evaluator.graph.shape(value)?;
        let order = TokenLayout::of(shape, evaluator.roles).map_or(RowOrder::Canonical, RowOrder::Tokens);
        let (tables, of) = of_kind(kind, projection, self.tables)?;
        let columns = kind.columns(projection);
        let sizes = [projection.heads, columns.len()];
        let rows = Rows::new(evaluator, value, order, &[projection.source], sizes);
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
        // Rounding in the export's arithmetic must not result in a factor of 0.99999994.
        let whole = |by: f32| if (by.abs() - 1.0).abs() < 1e-3 { by.signum() } else { by };
        factor.map(|by| f64::from(whole(by)))
    }
}

/// Equal, ignoring which of several equal roundings are meant.
fn same(a: &Tree, b: &Tree) -> bool {
    match (a, b) {
        (Tree::Source, Tree::Source) => true,
        (Tree::Round(p, v, _, a), Tree::Round(q, w, _, b)) => v == w && p == q && same(a, b),
        (Tree::Linear(a), Tree::Linear(b)) => same(a, b),
        (a, b) => a == b,
    }
}

/// The heads with the elements of this kind, and the table that computes them.
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
    // If neighbors are paired, no half is turned.
    if matches!(kind, Kind::TurnedHalf(_)) && rope.interleaved {
        return None;
    }
    let Table { half, cos, sin, long } = tables.tables[rope.table].clone();
    if long.is_some() {
        return None;
    }
    rope.table = 0;
    let filled = |value: f32| vec![value; cos.len()];
    let (cos, sin) = match kind {
        Kind::CosPart => (cos.clone(), filled(0.0)),
        Kind::SinPart => (filled(0.0), sin),
        Kind::Turned | Kind::TurnedHalf(_) => (filled(0.0), filled(1.0)),
        Kind::Rotated | Kind::RotatedPart | Kind::Picked | Kind::Passed => (cos, sin),
    };
    own.tables.push(Table::new(half, cos, sin));
    Some((own, of))
}
