//! The role of each graph input, and the symbolic dims that follow from it.
//!
//! Assigns every input of an inferred export an [`InputRole`]: by its name if exporters use that name, else by its use.
//! Binds the dims of the inputs to `batch`, `tokens`, `past` and `capacity`, so that every later pass sees one name per
//! length. A role is only a *claim* here. `projection` and `mask` prove it later by executing the graph; this module
//! only has to be right for models that pass the proof.

mod by_use;

use std::collections::{HashMap, HashSet};

use super::{MaskWindows, PassError, fixed_dims};
use crate::dim::{Dim, Sym};
use crate::graph::infer::bind_input_dims;
use crate::graph::op::Op;
use crate::graph::{Graph, ValueId};
use crate::tensor::DType;

/// The content of a graph input, as a function of (batch, past, tokens).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputRole {
    /// Token ids, `[batch, tokens]`.
    InputIds,
    /// A row of floats per token, `[batch, tokens, hidden]`.
    Embeddings,
    /// 1 for every used position, `[batch, past + tokens]`; further columns, if any, are 0.
    PaddingMask,
    /// The whole mask, filled by the caller: `[.., tokens, slots]`, bool, integer or additive.
    FullMask,
    /// `past + t` for token `t`, along the last axis.
    Positions,
    /// `past` in every element.
    PastLength,
    /// `past + tokens` in every element.
    TotalLength,
    /// `past + tokens - 1` in every element.
    LastPosition,
    /// Keys or values of earlier calls.
    Cache,
    /// How many tokens get logits, counted from the last, or which ones; used only before the logits.
    ChosenRows,
    /// Read by nothing.
    Unread,
}

impl InputRole {
    /// Determined by token counts alone, without token ids.
    pub fn is_positional(self) -> bool {
        !matches!(
            self,
            InputRole::InputIds | InputRole::Embeddings | InputRole::Cache | InputRole::ChosenRows
        )
    }
}

/// The roles of all inputs, and what the export fixed.
#[derive(Clone, Debug)]
pub struct Roles {
    /// By input.
    pub of: HashMap<ValueId, InputRole>,
    /// The one input of token ids or embeddings.
    pub token_input: ValueId,
    /// Cache inputs in the order of the export.
    pub caches: Vec<ValueId>,
    /// Caches grow by concatenation; otherwise they have a fixed number of slots.
    pub growing: bool,
    /// For masks that the caller fills and whose window was given: how many positions a query attends to.
    pub windows: HashMap<ValueId, Option<usize>>,
    /// Sequences per call, if the export fixed them.
    pub batch: Option<usize>,
    /// Slots of a static cache, where the export fixed them.
    pub capacity: Option<usize>,
}

/// The role of each input as far as it is known, and the names of inputs without one.
pub fn guess(graph: &Graph) -> (HashMap<ValueId, InputRole>, Vec<String>) {
    let uses = graph.uses();
    let mut of = HashMap::new();
    let mut unmatched = Vec::new();
    for id in graph.inputs.iter().copied() {
        let read = uses.contains_key(&id) || graph.outputs.contains(&id);
        let role = if read {
            embeddings(graph, id, &uses)
                .or_else(|| by_use::float_mask(graph, id, &uses))
                .or_else(|| role_by_name(graph, id))
                .or_else(|| by_use::role(graph, id, &uses))
        } else {
            Some(InputRole::Unread)
        };
        match role {
            Some(role) => {
                of.insert(id, role);
            }
            None => unmatched.push(graph.value(id).name.clone()),
        }
    }
    (of, unmatched)
}

/// Assigns roles and rewrites the dims of all values in terms of `batch`, `tokens`, `past` and `capacity`. All problems
/// of the inputs are reported at once.
pub fn assign(graph: &mut Graph, mask_windows: &MaskWindows) -> Result<Roles, PassError> {
    let uses = graph.uses();
    let (of, unmatched) = guess(graph);
    let mut errors = Vec::new();
    let with = |role: InputRole| -> Vec<ValueId> {
        let inputs = graph.inputs.iter().copied();
        inputs.filter(|id| of.get(id) == Some(&role)).collect()
    };
    let mut ids = with(InputRole::InputIds);
    ids.extend(with(InputRole::Embeddings));
    let caches = with(InputRole::Cache);
    if !unmatched.is_empty() {
        errors.push(PassError::UnmatchedInputs { names: unmatched });
    }
    if ids.len() != 1 {
        errors.push(PassError::TokenInput {
            found: ids.iter().map(|id| graph.value(*id).name.clone()).collect(),
        });
    }
    if caches.is_empty() {
        errors.push(PassError::NoCache);
    }
    if let Some(name) = oversized(graph) {
        errors.push(PassError::InputRank {
            found: format!("{:?}", graph.shape(name).cloned().unwrap_or_default()),
            name: graph.value(name).name.clone(),
            expected: "dims from 1 to the size of a real model's",
        });
    }
    let growing = caches.iter().any(|id| grows(graph, *id, &uses));
    let fixed_batch = fixed_dims::batch(graph, &of);
    let fixed = fixed_dims::find(graph, &of, growing, fixed_batch);
    if !fixed.is_empty() {
        errors.push(PassError::FixedDims { dims: fixed });
    }
    if let Some((names, inputs)) = fixed_dims::unknown_masks(graph, &of, mask_windows) {
        errors.push(PassError::UnknownMasks { names, inputs });
    }
    let full_masks = with(InputRole::FullMask);
    let mut windows = HashMap::new();
    for (name, window) in mask_windows {
        match full_masks.iter().find(|id| graph.value(**id).name == *name) {
            Some(id) => drop(windows.insert(*id, *window)),
            None => errors.push(PassError::NoSuchMask {
                name: name.clone(),
                masks: full_masks.iter().map(|id| graph.value(*id).name.clone()).collect(),
            }),
        }
    }
    let ([token_input], true) = (&ids[..], errors.is_empty()) else {
        return Err(PassError::together(errors));
    };
    let token_input = *token_input;

    let constant = |dim: Option<&Dim>| dim.and_then(Dim::as_const).map(|n| n as usize);
    let ids_shape = graph.shape(token_input).cloned().unwrap_or_default();
    let embeds = of.get(&token_input) == Some(&InputRole::Embeddings);
    if ids_shape.len() != if embeds { 3 } else { 2 } {
        return Err(PassError::InputRank {
            name: graph.value(token_input).name.clone(),
            expected: "[batch, tokens]",
            found: format!("{ids_shape:?}"),
        });
    }
    if embeds && let Some(several) = with(InputRole::Positions).into_iter().find(|id| has_axes(graph, *id)) {
        return Err(PassError::InputRank {
            name: graph.value(several).name.clone(),
            expected: "[batch, tokens]: in a prompt of embeddings only the export's own processor knows the positions of \
                       several axes, those of images and of text",
            found: format!("{:?}", graph.shape(several).cloned().unwrap_or_default()),
        });
    }
    // One input with a fixed batch fixes it for all.
    let padding = with(InputRole::PaddingMask);
    let batches = caches.iter().chain(&padding).map(|id| graph.shape(*id)?.first());
    let batch =
        fixed_batch.or_else(|| batches.fold(constant(Some(&ids_shape[0])), |known, dim| known.or(constant(dim))));
    let batch_dim = batch.map_or_else(|| Dim::sym(Sym::batch()), Dim::from);
    let tokens_dim = Dim::sym(Sym::tokens());
    let total = &Dim::sym(Sym::past()) + &tokens_dim;
    let mut bindings: Vec<(ValueId, usize, Dim)> = Vec::new();
    // Lengths that the export fixed stay as they are.
    let mut bind = |graph: &Graph, id: ValueId, axis: usize, to: &Dim| {
        let dim = graph.shape(id).and_then(|s| s.get(axis));
        if dim.is_some_and(|d| d.as_const().is_none()) {
            bindings.push((id, axis, to.clone()));
        }
    };
    bind(graph, token_input, 0, &batch_dim);
    bind(graph, token_input, 1, &tokens_dim);
    let mut capacity = None;
    for id in &caches {
        let shape = graph.shape(*id).cloned().unwrap_or_default();
        if shape.len() < 3 || shape.len() > 4 {
            return Err(PassError::InputRank {
                name: graph.value(*id).name.clone(),
                expected: "[batch, kv_heads, slots, head_dim] or [batch, slots, kv_heads*head_dim]",
                found: format!("{shape:?}"),
            });
        }
        bind(graph, *id, 0, &batch_dim);
        match slot_axis(&shape) {
            Some(axis) if growing => bind(graph, *id, axis, &Dim::sym(Sym::past())),
            Some(axis) => bind(graph, *id, axis, &Dim::sym(Sym::capacity())),
            None if growing => {
                return Err(PassError::InputRank {
                    name: graph.value(*id).name.clone(),
                    expected: "a symbolic length, since the cache grows by concatenation",
                    found: format!("{shape:?}"),
                });
            }
            None => capacity = capacity.or(constant(shape.get(if shape.len() == 3 { 1 } else { 2 }))),
        }
    }
    for (id, role) in graph
        .inputs
        .clone()
        .into_iter()
        .filter_map(|id| Some((id, *of.get(&id)?)))
    {
        let rank = graph.shape(id).map_or(0, Vec::len);
        match role {
            InputRole::Positions => {
                if rank > 0 {
                    bind(graph, id, rank - 1, &tokens_dim);
                }
                if rank > 1 {
                    bind(graph, id, rank - 2, &batch_dim);
                }
            }
            InputRole::PaddingMask | InputRole::FullMask => {
                bind(graph, id, 0, &batch_dim);
                if role == InputRole::FullMask && rank > 1 {
                    bind(graph, id, rank - 2, &tokens_dim);
                }
                bind(graph, id, rank.saturating_sub(1), &total);
            }
            InputRole::PastLength | InputRole::TotalLength | InputRole::LastPosition if rank > 0 => {
                bind(graph, id, 0, &batch_dim)
            }
            _ => {}
        }
    }
    rename_shared_dims(graph, &bindings);
    bind_input_dims(graph, &bindings)?;
    Ok(Roles {
        token_input,
        windows,
        growing,
        batch,
        capacity,
        caches,
        of,
    })
}

/// Exporters may use one name for all dims, and name a mask's length `past_sequence_length + 1`. A name for different
/// lengths carries no information, and a sum may be wrong: they are dropped, and the roles of the dims decide.
fn rename_shared_dims(graph: &mut Graph, bindings: &[(ValueId, usize, Dim)]) {
    let symbol = |graph: &Graph, id: ValueId, axis: usize| graph.shape(id)?.get(axis)?.as_sym().cloned();
    let mut meanings: HashMap<Sym, Vec<&Dim>> = HashMap::new();
    for (id, axis, to) in bindings {
        let known = symbol(graph, *id, *axis).map(|name| meanings.entry(name).or_default());
        if let Some(known) = known.filter(|known| !known.contains(&to)) {
            known.push(to);
        }
    }
    for (number, (id, axis, _)) in bindings.iter().enumerate() {
        let name = symbol(graph, *id, *axis);
        if name.is_none_or(|name| meanings[&name].len() > 1)
            && let Some(shape) = &mut graph.value_mut(*id).shape
        {
            shape[*axis] = Dim::named(format!("export.dim.{number}"));
        }
    }
}

/// An input with a fixed dim of 0 or a size larger than memory: shapes come from untrusted files.
fn oversized(graph: &Graph) -> Option<ValueId> {
    const LARGEST: i64 = 1 << 31;
    graph.inputs.iter().copied().find(|id| {
        let mut fixed = graph.shape(*id).into_iter().flatten().filter_map(Dim::as_const);
        let volume = fixed.try_fold(1i64, |volume, dim| volume.checked_mul(dim));
        !volume.is_some_and(|volume| (1..=LARGEST).contains(&volume))
    })
}

/// The axis of a cache that counts slots: the symbolic one that is not the batch.
fn slot_axis(shape: &[Dim]) -> Option<usize> {
    let order: &[usize] = if shape.len() == 3 { &[1] } else { &[2, 1] };
    order.iter().copied().find(|axis| shape[*axis].as_const().is_none())
}

fn role_by_name(graph: &Graph, id: ValueId) -> Option<InputRole> {
    let value = graph.value(id);
    let name = value.name.to_lowercase();
    let rank = value.shape.as_ref().map_or(0, Vec::len);
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    let float = value.dtype.is_some_and(DType::is_float);
    if has(&["mask", "attention_bias"]) {
        return Some(if rank > 2 {
            InputRole::FullMask
        } else {
            InputRole::PaddingMask
        });
    }
    if float {
        return (rank >= 3 && !has(&["embeds"])).then_some(InputRole::Cache);
    }
    if rank < 2 && has(&["logits_to_keep", "logit_rows", "logits_indices"]) {
        return Some(InputRole::ChosenRows);
    }
    if has(&["position"]) {
        Some(InputRole::Positions)
    } else if has(&["seqlens_k"]) {
        Some(InputRole::LastPosition)
    } else if has(&[
        "write_ind",
        "cache_ind",
        "start_pos",
        "past_seq",
        "past_len",
        "cache_len",
    ]) {
        Some(InputRole::PastLength)
    } else if has(&["seqlen", "total_seq", "total_len", "kv_len", "seq_len"]) {
        Some(InputRole::TotalLength)
    } else if rank == 2 && has(&["input_ids", "token", "ids"]) {
        Some(InputRole::InputIds)
    } else {
        None
    }
}

/// Positions of several axes, `[axes, batch, tokens]`.
fn has_axes(graph: &Graph, id: ValueId) -> bool {
    let shape = graph.shape(id).map(Vec::as_slice).unwrap_or_default();
    shape.len() > 2 && shape[0].as_const().is_none_or(|axes| axes > 1)
}

/// Floats `[batch, tokens, hidden]` that every output is computed from: keys and values of a layer are not computed
/// from their own layer's cache.
fn embeddings(
    graph: &Graph,
    id: ValueId,
    uses: &HashMap<ValueId, Vec<(crate::graph::NodeId, usize)>>,
) -> Option<InputRole> {
    let value = graph.value(id);
    let width = value.shape.as_ref().filter(|shape| shape.len() == 3)?[2].as_const()?;
    // A state of fixed size can have the same width and affect everything; its length is not a number of tokens.
    let counts = value.shape.as_ref().is_some_and(|shape| shape[1].as_const().is_none());
    let named = value.name.to_lowercase().contains("embed");
    if !value.dtype.is_some_and(DType::is_float) || width < 1 || graph.outputs.len() < 2 || !(counts || named) {
        return None;
    }
    let mut seen: HashSet<ValueId> = HashSet::from([id]);
    let mut stack = vec![id];
    while let Some(value) = stack.pop() {
        for (node, _) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            if !matches!(node.op, Op::Shape { .. } | Op::Size) {
                stack.extend(node.outputs.iter().flatten().filter(|v| seen.insert(**v)));
            }
        }
    }
    graph
        .outputs
        .iter()
        .all(|output| seen.contains(output))
        .then_some(InputRole::Embeddings)
}

/// Whether the first operator other than movement appends to the cache.
pub fn grows(graph: &Graph, cache: ValueId, uses: &HashMap<ValueId, Vec<(crate::graph::NodeId, usize)>>) -> bool {
    let mut stack = vec![cache];
    let mut seen = HashSet::new();
    while let Some(value) = stack.pop() {
        for (node, _) in uses.get(&value).into_iter().flatten() {
            if !seen.insert(*node) {
                continue;
            }
            let node = graph.node(*node);
            match &node.op {
                Op::Concat { .. } | Op::Attention(_) => return true,
                Op::GroupQueryAttention(_) => {
                    return graph
                        .shape(cache)
                        .is_none_or(|s| s.len() != 4 || s[2].as_const().is_none());
                }
                Op::Reshape { .. }
                | Op::Transpose { .. }
                | Op::Identity
                | Op::Cast { .. }
                | Op::Unsqueeze
                | Op::QuantizeLinear { .. }
                | Op::DequantizeLinear { .. } => {
                    stack.extend(node.output(0));
                }
                _ => {}
            }
        }
    }
    false
}
