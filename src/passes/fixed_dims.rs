//! Dims of the inputs that the export fixed and a decoder session needs free.
//!
//! A session feeds one sequence, any number of new tokens and a cache that grows. An export for two sequences, or for one
//! token a call, or with a mask of 128 columns beside a growing cache, computes something else or nothing. All such dims are
//! refused together, with what they count and how to free them; a batch of 1 is what a session feeds.

use std::collections::HashMap;

use super::MaskWindows;
use super::roles::InputRole;
use crate::dim::Dim;
use crate::graph::{Graph, ValueId};

/// Every dim that has to be free: `input_ids [2, tokens]: batch is 2 (axis 0)`. `growing`: caches grow by concatenation.
pub fn find(graph: &Graph, of: &HashMap<ValueId, InputRole>, growing: bool) -> Vec<String> {
    let (mut found, mut caches) = (Vec::new(), Vec::new());
    for id in &graph.inputs {
        let (Some(role), Some(shape)) = (of.get(id), graph.shape(*id)) else {
            continue;
        };
        let last = shape.len().wrapping_sub(1);
        let before = shape.len().wrapping_sub(2);
        // What each axis counts, and the numbers that are as good as a free dim.
        let one: &[i64] = &[1];
        let axes: Vec<(usize, &str, &[i64])> = match role {
            InputRole::InputIds | InputRole::Embeddings => {
                vec![(0, "batch", one), (1, "the number of new tokens", &[])]
            }
            // One position may be that of the first token.
            InputRole::Positions if shape.len() == 1 => vec![(last, "the number of new tokens", one)],
            InputRole::Positions => vec![(before, "batch", one), (last, "the number of new tokens", &[])],
            InputRole::PaddingMask if shape.len() == 2 => vec![(0, "batch", one), (1, TOTAL, &[])],
            InputRole::FullMask if shape.len() == 4 => {
                vec![(0, "batch", one), (2, "the number of new tokens", one), (3, TOTAL, &[])]
            }
            InputRole::PastLength | InputRole::TotalLength | InputRole::LastPosition => vec![(0, "batch", one)],
            InputRole::Cache if shape.len() == 3 || shape.len() == 4 => vec![(0, "batch", one)],
            _ => Vec::new(),
        };
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
                // Of thirty layers one is enough.
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

/// Inputs that mask attention, `name [shape]`, if there are several, or one whose name says that it is no causal one; and
/// their names alone. Those that a window is given for are known.
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
