//! Roundings of a cache: of stored rows, of the past, and of rows as they are read.

use super::{CacheRounding, Places, Unplaced, moves};
use crate::graph::eval::eval_node;
use crate::graph::op::{Binary, Op, Rounding};
use crate::graph::{NodeId, ValueId};
use crate::passes::attention::cache::ExportCache;
use crate::tensor::{DType, Tensor};

impl Places<'_, '_, '_> {
    /// Rounding of a cache's elements as an operand reads them. `factor` is the operand's factor.
    pub(super) fn reads(
        &mut self,
        operand: ValueId,
        cache: &ExportCache,
        factor: f32,
    ) -> Result<CacheRounding, Unplaced> {
        let read = self.to_write(operand)?;
        let stored = self.to_write(cache.output)?;
        let mut roundings = Vec::new();
        for (output, rounding, after) in &read.roundings {
            let before = f64::from(factor) / after;
            if !before.is_finite() || before == 0.0 {
                return self.unplaced(*output, format!("it is scaled by {before} before"));
            }
            // A factor of the export's arithmetic that is 1 up to rounding.
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
        // Stored rows are rounded: the next call reads them rounded, as this one does.
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
        let held = written
            .first()
            .or(cache.rounding.after.last())
            .and_then(|held| numbers(*held));
        let again: Vec<Rounding> = past.iter().chain(&written).copied().collect();
        let once = held.as_ref().and_then(|held| applied(&again, held));
        // A row is read as it was stored, or as it stays from the second call on.
        let mut older = None;
        if !past.is_empty() && once != held {
            let twice = once.as_ref().and_then(|once| applied(&again, once));
            let settles = match held {
                Some(_) => once.is_some() && twice == once,
                None => again.len() == 1,
            };
            if !settles {
                return self.unplaced(first, "each call rounds past keys or values again, to different codes");
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

    /// A value that does not depend on the data.
    fn scalar(&self, value: ValueId) -> Option<f64> {
        let trial = self.evaluator.trial(1, 2, 3);
        let tensor = self.evaluator.eval(&trial, value).ok()?;
        (tensor.len() == 1).then(|| tensor.to_f64()[0])
    }
}

/// The steps between a value and the point where past and new rows are joined.
#[derive(Default)]
struct Read {
    /// Outermost first: the result, the rounding, and the factor after it.
    roundings: Vec<(ValueId, Rounding, f64)>,
    /// The point where they are joined.
    write: Option<NodeId>,
    /// Roundings of only the past.
    past: Vec<(ValueId, Rounding)>,
}

/// All values of 8-bit codes.
fn numbers(how: Rounding) -> Option<Vec<f32>> {
    if !matches!(how.to, DType::I8 | DType::U8 | DType::F8E4M3Fn | DType::F8E5M2) {
        return None;
    }
    let bytes: Vec<u8> = (0..=255).collect();
    let codes = Tensor::new(how.to, vec![bytes.len()], bytes.into()).ok()?;
    let codes = codes.to_f64().into_iter().filter(|code| code.is_finite());
    Some(
        codes
            .map(|code| (code - how.zero_point as f64) as f32 * how.scale)
            .collect(),
    )
}

/// Rounds numbers, in this order.
fn applied(roundings: &[Rounding], numbers: &[f32]) -> Option<Vec<f32>> {
    let mut x = Tensor::from_f32(vec![numbers.len()], numbers);
    for rounding in roundings {
        x = eval_node(&rounding.operator(), &[Some(x)], 1).ok()?.pop().flatten()?;
    }
    Some(x.to_f32())
}
