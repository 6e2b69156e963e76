//! Whether an export can be converted, before anything is written: one answer for `convert` and `inspect`.
//!
//! An export can be converted if its operators are well formed, the passes make it canonical, and the result lowers to
//! networks for one token and for several. Lowering rarely fails, but only it finds sizes of the exporter's example in
//! a reshape.

use std::path::Path;

use super::{ConvertError, ModelFiles, branches, capacities, check, faults, masks, trained_context};
use crate::graph::{Graph, ValueId, infer};
use crate::help::Help;
use crate::lower::{self, LowerOptions};
use crate::network::{Profile, WeightMode};
use crate::passes::{self, Canonical, CanonicalizeOptions, Recognition};
use crate::spec::Conversion;
use crate::target::Precision;

/// The findings about an export, and what prevents its conversion.
pub struct Examination {
    /// What the passes recognized and did not recognize.
    pub recognition: Recognition,
    /// The canonical graph; `None` if the passes fail.
    pub canonical: Option<Graph>,
    /// Invalid operators and operands.
    pub faults: Vec<String>,
    /// All reasons as text; empty if the export can be converted.
    pub reasons: Vec<String>,
    /// Advice.
    pub help: Option<String>,
}

/// Examines an export as `convert` would with `conversion`, and continues after the first obstacle. `graph` is sorted.
pub fn examine(files: &ModelFiles, graph: &Graph, conversion: &Conversion) -> Examination {
    let model = files.model.as_path();
    let mut conversion = conversion.clone();
    mask_windows(files, graph, &mut conversion);
    let options = pass_options(files, &conversion, false);
    let mut typed = graph.clone();
    let faults = match infer(&mut typed) {
        Ok(_) => faults(&typed),
        Err(_) => Vec::new(),
    };
    let (recognition, canonical) = passes::recognize(graph, &options);
    // Invalid operators come first: they also cause failures in the passes.
    let mut reasons = match faults.is_empty() {
        true => recognition.obstacles.iter().map(|o| o.to_string()).collect(),
        false => faults.clone(),
    };
    let mut help = recognition.help.clone().filter(|_| faults.is_empty());
    if let (true, Some(canonical)) = (reasons.is_empty(), &canonical) {
        reasons = quantized_faults(&canonical.graph);
    }
    if reasons.is_empty()
        && let Some(canonical) = &canonical
        && let Err(error) = runnable(model, canonical).and_then(|()| match &graph.producer.switch {
            Some(switch) => branches::check(model, switch),
            None => Ok(()),
        })
    {
        help = error.help();
        reasons.extend(match error {
            ConvertError::Unrunnable { reason, .. } => Some(reason),
            ConvertError::Branches { switch, reason, .. } => Some(super::error::branches(&switch, &reason)),
            other => Some(other.to_string()),
        });
    }
    Examination {
        canonical: canonical.map(|canonical| canonical.graph),
        recognition,
        faults,
        reasons,
        help,
    }
}

/// The canonical graph of an export that can be converted.
pub(super) fn canonical(
    files: &ModelFiles,
    graph: Graph,
    conversion: &Conversion,
    allow_overflow: bool,
) -> Result<Canonical, ConvertError> {
    let model = files.model.as_path();
    check(model, &graph)?;
    let options = pass_options(files, conversion, allow_overflow);
    let canonical = passes::canonicalize(graph, &options).map_err(|source| ConvertError::Pass {
        path: model.to_path_buf(),
        source,
    })?;
    let faults = quantized_faults(&canonical.graph);
    if !faults.is_empty() {
        let path = model.to_path_buf();
        return Err(ConvertError::Invalid { path, faults });
    }
    runnable(model, &canonical)?;
    Ok(canonical)
}

/// Quantized weights with numbers that no model can use: scales that are NaN, infinite, or zero over codes that are
/// not. Absent weights are not checked.
fn quantized_faults(graph: &Graph) -> Vec<String> {
    let uses = graph.uses();
    let constants = graph.value_ids().filter(|id| uses.contains_key(id));
    let fault = |id: ValueId| {
        let constant = graph.constant(id).filter(|constant| constant.is_present())?;
        let error = constant.as_quantized()?.check_values().ok()?.err()?;
        let name = constant.origin().unwrap_or(&graph.value(id).name);
        Some(format!("the quantized weight {name:?}: {error}"))
    };
    constants.filter_map(fault).collect()
}

/// Without flags: the configuration's windows for masks that the caller fills.
pub(super) fn mask_windows(files: &ModelFiles, graph: &Graph, conversion: &mut Conversion) {
    if conversion.mask_windows.is_empty() {
        let options = pass_options(files, conversion, true);
        conversion.mask_windows = masks::of_config(graph, &files.configs, &options).unwrap_or_default();
    }
}

fn pass_options(files: &ModelFiles, conversion: &Conversion, allow_overflow: bool) -> CanonicalizeOptions {
    // Without tables there is no limit.
    let capacities = capacities(&files.model, conversion, None, trained_context(&files.configs)).unwrap_or_default();
    let last = capacities.last().copied();
    let windows = conversion.mask_windows.iter();
    let windows = windows.map(|(name, window)| (name.clone(), Some(*window).filter(|w| *w > 0)));
    CanonicalizeOptions {
        dtype: conversion.dtype.map(Precision::dtype),
        max_positions: last.unwrap_or_else(|| CanonicalizeOptions::default().max_positions),
        allow_overflow,
        activations: conversion.activations,
        mask_windows: windows.collect(),
    }
}

/// Lowers for one token and for a few, as a session and the engines do.
fn runnable(model: &Path, canonical: &Canonical) -> Result<(), ConvertError> {
    let capacity = canonical.architecture.max_positions.map_or(64, |limit| limit.min(64));
    let options = LowerOptions {
        weight_mode: WeightMode::Bind,
        ..LowerOptions::default()
    };
    for tokens in [1, 3.min(capacity)] {
        let profile = Profile::prefill(tokens, capacity);
        lower::lower(&canonical.graph, &profile, &options).map_err(|error| ConvertError::Unrunnable {
            path: model.to_path_buf(),
            reason: format!("what it is rewritten to cannot run for {tokens} new tokens: {error}"),
        })?;
    }
    Ok(())
}
