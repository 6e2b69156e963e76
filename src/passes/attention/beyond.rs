//! Proofs at lengths that small trials do not reach.
//!
//! `projection` and `cache` identify rows at a few small sizes. A scaling that begins at position 8192, another rotary
//! table for long prompts, a cache that keeps only its last 128 slots: small sizes do not show any of these. So the
//! same is proved around each length that the computation contains, and at the last position of a package. It is also
//! proved that the rows read one table row per position, however many tokens one run has.

use std::collections::{BTreeMap, HashSet};

use super::projection::{Projection, Rows, Tables};
use crate::dim::{Dim, Sym};
use crate::graph::ValueId;
use crate::graph::op::Op;
use crate::passes::dependence::Dependence;
use crate::passes::lengths::{last_where, lengths, positions};
use crate::passes::partial_eval::{PartialEvaluator, Stuck};
use crate::tensor::{DType, Tensor};

/// Elements of the largest positional value that is compared as a whole.
const LARGEST: usize = 1 << 26;

impl Rows<'_, '_> {
    /// Proves a projection, found at small sizes, at all others that its computation distinguishes.
    pub(super) fn prove_beyond(&self, projection: &Projection, tables: &Tables) -> Result<(), String> {
        let named = lengths(self.evaluator.graph, [self.value], |id| self.sources.contains(&id));
        // Limited by the rows of the tables.
        for (seed, past) in positions(&named, tables.positions).into_iter().enumerate() {
            let trial = self.evaluator.trial(1, past, 1);
            self.prove(projection, tables, &trial, 101 + seed as u64)?;
        }
        Ok(())
    }

    /// Proves, once for each, that the positional values that the rows read are functions of the position alone.
    pub(super) fn prove_positional(&self, tables: &mut Tables) -> Result<(), String> {
        for id in self.positional_numbers() {
            if tables.proven.positional.contains(&id) {
                continue;
            }
            let named = lengths(self.evaluator.graph, [id], |_| false);
            let switch = one_row_a_position(self.evaluator, id, &named, tables.positions)?;
            match (switch, tables.switch) {
                (Some(new), Some(known)) if new != known => {
                    return Err(format!(
                        "its rotary tables switch at {known} and, in {}, at {new} positions: only one length is understood",
                        self.evaluator.graph.value(id).name
                    ));
                }
                (Some(new), _) => tables.switch = Some(new),
                (None, _) => {}
            }
            tables.proven.positional.insert(id);
        }
        Ok(())
    }

    /// Positional values that are combined with the data between the source and the rows, such as cosines.
    pub(super) fn positional_numbers(&self) -> Vec<ValueId> {
        let evaluator = self.evaluator;
        let graph = evaluator.graph;
        // Rows that are the source itself, such as per-head norms without a rotation, read none.
        let mut stack = vec![self.value];
        stack.retain(|value| !self.sources.contains(value));
        let mut seen: HashSet<ValueId> = self.sources.iter().copied().chain([self.value]).collect();
        let mut found = Vec::new();
        while let Some(id) = stack.pop() {
            let inputs = graph
                .def(id)
                .into_iter()
                .flat_map(|(_, node)| node.inputs.iter().flatten());
            for input in inputs.filter(|v| seen.insert(**v)) {
                match evaluator.dependence(*input) {
                    Dependence::Data => stack.push(*input),
                    Dependence::Positional if graph.value(*input).dtype.is_some_and(DType::is_float) => {
                        found.push(*input);
                    }
                    _ => {}
                }
            }
        }
        found
    }
}

/// Compares whole prompts with shorter ones and with single tokens. A value without a token axis must be the same for
/// all. Returns the longest run after which the rows differ, if there is one: they must be functions of the position on
/// both sides.
fn one_row_a_position(
    evaluator: &PartialEvaluator<'_>,
    id: ValueId,
    named: &BTreeMap<usize, String>,
    end: usize,
) -> Result<Option<usize>, String> {
    let value = evaluator.graph.value(id);
    let Some(shape) = &value.shape else { return Ok(None) };
    let axis = shape.iter().position(|dim| *dim == Dim::sym(Sym::tokens()));
    let width = evaluator
        .dims(&evaluator.trial(1, 0, 1), id)
        .map_or(1, |dims| dims.iter().product());
    let end = end
        .min(evaluator.roles.capacity.unwrap_or(usize::MAX))
        .min(LARGEST / usize::max(width, 1));
    let rows = |past: usize, tokens: usize| -> Result<Tensor, Stuck> {
        let trial = evaluator.trial(1, past, tokens);
        let rows = evaluator.eval(&trial, id);
        if tokens > 64 {
            evaluator.forget(&trial);
        }
        rows
    };
    let text = |stuck: Stuck| format!("it reads {}, which could not be computed: {stuck}", value.name);
    let whole = rows(0, end).map_err(text)?;
    let slack = 2.0 * super::projection::tolerance(value.dtype.unwrap_or(DType::F32));
    let same = |whole: &Tensor, past: usize, part: &Tensor| match axis {
        Some(axis) => agrees(whole, part, axis, past, slack),
        // Not comparable; left to the proofs of rows.
        None if whole.shape() != part.shape() => true,
        None => near(&whole.to_f32(), &part.to_f32(), slack),
    };
    let singles = positions(named, end).into_iter().map(|past| (past, 1));
    let prompts = named
        .keys()
        .flat_map(|n| [(0, *n), (0, n + 1)])
        .filter(|(_, n)| *n < end);
    let few = 8.min(end);
    let start = rows(0, few).map_err(text)?;
    let as_short = |n: usize| rows(0, n).is_ok_and(|long| same(&long, 0, &start));
    let switch = (!as_short(end)).then(|| last_where(few, end, as_short));
    let short = switch.map(|last| rows(0, last).map_err(text)).transpose()?;
    let around = switch
        .into_iter()
        .flat_map(|last| [(last - 1, 1), (last, 1), (0, last), (0, last + 1)]);
    for (past, tokens) in singles.chain(prompts).chain(around) {
        let part = rows(past, tokens).map_err(text)?;
        let whole = match (&short, switch) {
            (Some(short), Some(last)) if past + tokens <= last => short,
            _ => &whole,
        };
        if !same(whole, past, &part) {
            let few = switch.map_or(String::new(), |last| {
                format!("; up to {last} tokens it may not, see --capacity")
            });
            return Err(format!(
                "its rotary table depends on more than the position, and is not one of two for short and long runs (in {}{few}); export \
                 with a fixed scaling",
                value.name
            ));
        }
    }
    // Without a token axis, and unless it is a table itself, it is a factor of the whole run, which no table can hold.
    match (switch, axis) {
        (Some(last), None) if !is_table(evaluator, id) => Err(format!(
            "{} is another number in runs of more than {last} tokens (see --capacity); export with a fixed scaling",
            value.name
        )),
        _ => Ok(switch),
    }
}

/// Whether all readers of a value look up its rows by position.
fn is_table(evaluator: &PartialEvaluator<'_>, id: ValueId) -> bool {
    let graph = evaluator.graph;
    let looks_up = |node: &crate::graph::Node| match node.op {
        Op::RotaryEmbedding { .. } => node.input(3).is_some() && node.input(0) != Some(id),
        Op::ContribRotaryEmbedding { .. } => node.input(0) != Some(id),
        _ => false,
    };
    let nodes = graph.node_ids().map(|node| graph.node(node));
    let mut readers = nodes.filter(|node| node.inputs.contains(&Some(id)));
    readers.all(looks_up)
}

/// Whether `part` is `whole` from row `start` of the axis on.
fn agrees(whole: &Tensor, part: &Tensor, axis: usize, start: usize, slack: f32) -> bool {
    let (all, few) = (whole.shape(), part.shape());
    if all.len() != few.len() || all[..axis] != few[..axis] || all[axis + 1..] != few[axis + 1..] {
        return false;
    }
    let inner: usize = all[axis + 1..].iter().product();
    let (long, short) = (all[axis] * inner, few[axis] * inner);
    if short == 0 || start + few[axis] > all[axis] {
        return short == 0;
    }
    let (all, few) = (whole.to_f32(), part.to_f32());
    let mut blocks = all.chunks(long).zip(few.chunks(short));
    blocks.all(|(all, few)| near(&all[start * inner..start * inner + short], few, slack))
}

fn near(a: &[f32], b: &[f32], slack: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= slack * a.abs().max(1.0))
}

/// A past beyond each length in the computation of `value` from `leaves`, if it has to be tested: up to the capacity of
/// a cache.
pub(super) fn far_past(
    evaluator: &PartialEvaluator<'_>,
    value: ValueId,
    leaves: &[ValueId],
    tables: &Tables,
    tokens: usize,
) -> Option<usize> {
    let capacity = evaluator.roles.capacity.unwrap_or(usize::MAX);
    let most = tables.positions.min(capacity).checked_sub(tokens)?;
    let named = lengths(evaluator.graph, [value], |id| leaves.contains(&id));
    let longest = named.keys().rev().find(|length| **length < most)?;
    Some(longest + 1).filter(|past| *past > 2)
}
