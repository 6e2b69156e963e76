//! Input dims that the export fixed and that a decoder session needs to vary.
//!
//! A session feeds one sequence, any number of new tokens and a cache that grows. An export for one token per call, or
//! with a mask of 128 columns and a growing cache, does not support this. All such dims are refused together, with
//! their meaning and how to export them as symbolic dims. A batch of 1 is fine, and a batch that is the same everywhere
//! is made symbolic later ([`batch`](super::batch)).

use std::collections::HashMap;

use super::MaskWindows;
use super::roles::InputRole;
use crate::dim::Dim;
use crate::graph::{Graph, ValueId};

/// Limits the size of proofs by execution.
const MOST_SEQUENCES: i64 = 64;

/// The axis that counts sequences of an input.
fn batch_axis(role: InputRole, rank: usize) -> Option<usize> {
    let named = match role {
        InputRole::InputIds
        | InputRole::Embeddings
        | InputRole::PastLength
        | InputRole::TotalLength
        | InputRole::LastPosition => true,
        InputRole::PaddingMask => rank == 2,
        InputRole::FullMask => rank == 4,
        InputRole::Cache => rank == 3 || rank == 4,
        InputRole::Positions if rank > 1 => return Some(rank - 2),
        _ => false,
    };
    (named && rank > 0).then_some(0)
}

/// The number of sequences that the export fixed, if it is greater than 1 and the only one. Inputs of positions may
/// have one row for all of them.
pub fn batch(graph: &Graph, of: &HashMap<ValueId, InputRole>) -> Option<usize> {
    let mut number = None;
    for id in &graph.inputs {
        let (Some(role), Some(shape)) = (of.get(id), graph.shape(*id)) else {
            continue;
        };
        let Some(fixed) = batch_axis(*role, shape.len()).and_then(|axis| shape[axis].as_const()) else {
            continue;
        };
        let one_for_all = fixed == 1 && role.is_positional();
        if !one_for_all && *number.get_or_insert(fixed) != fixed {
            return None;
        }
    }
    let number = number.filter(|number| (2..=MOST_SEQUENCES).contains(number))?;
    usize::try_from(number).ok()
}

/// Every dim that must vary: `input_ids [2, tokens]: batch is 2 (axis 0)`. `growing`: caches grow by concatenation;
/// `batch`: see there.
pub fn find(graph: &Graph, of: &HashMap<ValueId, InputRole>, growing: bool, batch: Option<usize>) -> Vec<String> {
    let (mut found, mut caches) = (Vec::new(), Vec::new());
    for id in &graph.inputs {
        let (Some(role), Some(shape)) = (of.get(id), graph.shape(*id)) else {
            continue;
        };
        let last = shape.len().wrapping_sub(1);
        // What each axis counts, and the accepted fixed numbers.
        let one: &[i64] = &[1];
        let sequences = [1, batch.map_or(1, |number| number as i64)];
        let mut axes: Vec<(usize, &str, &[i64])> = Vec::new();
        axes.extend(batch_axis(*role, shape.len()).map(|axis| (axis, "batch", &sequences[..])));
        match role {
            InputRole::InputIds | InputRole::Embeddings => axes.push((1, "the number of new tokens", &[])),
            // A single position may be that of the first token.
            InputRole::Positions if shape.len() == 1 => axes.push((last, "the number of new tokens", one)),
            InputRole::Positions => axes.push((last, "the number of new tokens", &[])),
            InputRole::PaddingMask if shape.len() == 2 => axes.push((1, TOTAL, &[])),
            InputRole::FullMask if shape.len() == 4 => {
                axes.extend([(2, "the number of new tokens", one), (3, TOTAL, &[][..])]);
            }
            _ => {}
        }
        for (axis, what, good) in axes {
            let fixed = shape.get(axis).and_then(Dim::as_const);
            let Some(number) = fixed.filter(|number| !good.contains(number)) else {
                continue;
            };
            // A static cache fixes how many slots its mask has.
            if what == TOTAL && !growing {
                continue;
            }
            let name = &graph.value(*id).name;
            let text = format!("{name} {shape:?}: {what} is {number} (axis {axis})");
            match role {
                // For thirty layers one is enough.
                InputRole::Cache => caches.push(text),
                _ => found.push(text),
            }
        }
    }
    let more = caches.len().saturating_sub(1);
    found.extend(caches.into_iter().next().map(|text| match more {
        0 => text,
        n => format!("{text}, as of {n} other caches"),
    }));
    found
}

const TOTAL: &str = "the length of past and new tokens";

/// Inputs that mask attention, `name [shape]`, if there are several, or one whose name indicates that it is not causal;
/// and only their names. Masks with a given window are known.
pub fn unknown_masks(
    graph: &Graph,
    of: &HashMap<ValueId, InputRole>,
    windows: &MaskWindows,
) -> Option<(Vec<String>, Vec<String>)> {
    let with = |role: InputRole| -> Vec<ValueId> {
        let inputs = graph.inputs.iter().copied();
        inputs.filter(|id| of.get(id) == Some(&role)).collect()
    };
    let describe = |ids: &[ValueId]| -> Vec<String> {
        let one = |id: &ValueId| match graph.shape(*id) {
            Some(shape) => format!("{} {shape:?}", graph.value(*id).name),
            None => graph.value(*id).name.clone(),
        };
        ids.iter().map(one).collect()
    };
    for masks in [with(InputRole::FullMask), with(InputRole::PaddingMask)] {
        let local = |id: &ValueId| {
            let name = graph.value(*id).name.to_lowercase();
            ["sliding", "window", "local", "chunk"]
                .iter()
                .any(|word| name.contains(word))
        };
        let name = |id: &ValueId| graph.value(*id).name.clone();
        if masks.iter().all(|id| windows.contains_key(&name(id))) {
            continue;
        }
        if masks.len() > 1 || masks.iter().any(local) {
            return Some((describe(&masks), masks.iter().map(name).collect()));
        }
    }
    None
}
