//! Caches of what keys and values are computed from, as multi-head latent attention keeps them, or joined of.
//!
//! Where an export appends rows to caches and computes keys and values from the whole caches (a product with a weight lies
//! between, or rows of several heads are joined into one, as in differential attention), the graph is rewritten to what exports
//! of other models do: keys and values of the new tokens are computed, and appended to caches of keys and values. Both are
//! equal if the computation between them works slot by slot. Execution proves that: with all slots at once, and with the first
//! and the last slots alone. Heads that are repeated are cached once. Without a proof the graph stays unchanged, and the analysis
//! refuses it.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::find::{self, FoundAttention, Uses};
use super::projection::{noise, tolerance};
use super::trace::Trace;
use crate::dim::{Dim, Sym};
use crate::graph::infer::infer;
use crate::graph::op::Op;
use crate::graph::{Definition, Graph, NodeId, ValueId};
use crate::passes::PassError;
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::{PartialEvaluator, Stuck, tensor_of};
use crate::passes::roles::{InputRole, Roles};
use crate::tensor::{DType, Tensor};

/// A cache that grows by concatenation.
#[derive(Clone, Copy, Debug)]
struct Append {
    input: ValueId,
    new: ValueId,
    /// The cache with the new rows, an output of the model.
    all: ValueId,
    axis: usize,
}

/// One attention to rewrite.
struct Plan {
    attention: FoundAttention,
    /// Its caches, which no other attention reads.
    caches: Vec<Append>,
}

/// Rewrites what it can prove. Returns the number of rewritten attention layers; the graph is inferred afterwards.
pub fn run(graph: &mut Graph, roles: &mut Roles) -> Result<usize, PassError> {
    if !roles.growing {
        return Ok(0);
    }
    let plans = plans(graph, roles);
    let mut rewrites = 0;
    for plan in plans {
        // On a copy, so that a failed proof leaves the graph unchanged.
        let mut copy = graph.clone();
        let Some(operands) = copied(&mut copy, &roles.caches, &plan)? else {
            continue;
        };
        let Ok(repeats) = proven(&copy, roles, &plan, &operands) else {
            continue;
        };
        *graph = copy;
        rewrite(graph, roles, &plan, &operands, repeats)?;
        rewrites += 1;
    }
    Ok(rewrites)
}

fn plans(graph: &Graph, roles: &Roles) -> Vec<Plan> {
    let evaluator = PartialEvaluator::new(graph, roles);
    let (found, _) = find::find(&evaluator);
    let trace = Trace::new(&evaluator);
    let of_each: Vec<BTreeSet<ValueId>> = found
        .iter()
        .map(|attention| caches_behind(&evaluator, [attention.key, attention.value]).0)
        .collect();
    let uses = graph.uses();
    let mut plans = Vec::new();
    for (index, attention) in found.iter().enumerate() {
        let mut others = of_each.iter().enumerate().filter(|(other, _)| *other != index);
        let shared = others.any(|(_, caches)| !caches.is_disjoint(&of_each[index]));
        let computed = [attention.key, attention.value].into_iter().any(|operand| {
            let sources = trace.sources(operand);
            let mut sources = sources.iter().filter(|source| !trace.is_cache(**source));
            sources.any(|source| {
                let (caches, by_product) = caches_behind(&evaluator, [*source]);
                by_product && !caches.is_disjoint(&of_each[index])
            })
        });
        let joined = is_joined(graph, attention, &of_each[index]);
        if !(computed || joined) || shared {
            continue;
        }
        let caches = of_each[index].iter().map(|cache| append(graph, &uses, *cache));
        if let Some(caches) = caches.collect() {
            plans.push(Plan {
                attention: attention.clone(),
                caches,
            });
        }
    }
    plans
}

/// Whether rows of keys or values are wider than those of the caches of heads that they are read from.
fn is_joined(graph: &Graph, attention: &FoundAttention, caches: &BTreeSet<ValueId>) -> bool {
    let last = |id: ValueId, from_end: usize| {
        let shape = graph.shape(id).filter(|shape| shape.len() == 4)?;
        shape[4 - from_end].as_const()
    };
    let widths = [
        last(attention.key, if attention.key_transposed { 2 } else { 1 }),
        last(attention.value, 1),
    ];
    let of_caches: Option<Vec<i64>> = caches.iter().map(|cache| last(*cache, 1)).collect();
    let widest = of_caches.and_then(|widths| widths.into_iter().max());
    widest.is_some_and(|widest| widths.iter().flatten().any(|width| *width > widest))
}

/// The cache inputs that data values are computed from, no further than where rows are appended to caches; and whether a
/// product is on the way.
fn caches_behind<const N: usize>(evaluator: &PartialEvaluator<'_>, of: [ValueId; N]) -> (BTreeSet<ValueId>, bool) {
    let graph = evaluator.graph;
    let mut stack = of.to_vec();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    let (mut caches, mut by_product) = (BTreeSet::new(), false);
    while let Some(id) = stack.pop() {
        if evaluator.roles.of.get(&id) == Some(&InputRole::Cache) {
            caches.insert(id);
            continue;
        }
        let Some((_, node)) = graph.def(id) else { continue };
        by_product |= matches!(node.op, Op::MatMul | Op::Gemm { .. });
        let mut inputs: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
        // Rows appended to a cache come from the layer's input, and so from all previous layers.
        if matches!(node.op, Op::Concat { .. })
            && inputs
                .iter()
                .any(|v| evaluator.roles.of.get(v) == Some(&InputRole::Cache))
        {
            inputs.retain(|v| evaluator.roles.of.get(v) == Some(&InputRole::Cache));
        }
        let data = inputs
            .into_iter()
            .filter(|v| evaluator.dependence(*v) == Dependence::Data);
        stack.extend(data.filter(|v| seen.insert(*v)));
    }
    (caches, by_product)
}

/// The one concatenation of a cache, if it is an output of the model.
fn append(graph: &Graph, uses: &Uses, input: ValueId) -> Option<Append> {
    let mut data = uses
        .get(&input)?
        .iter()
        .filter(|(node, _)| !matches!(graph.node(*node).op, Op::Shape { .. } | Op::Size));
    let ((node, 0), None) = (data.next()?, data.next()) else {
        return None;
    };
    let node = graph.node(*node);
    let Op::Concat { axis } = node.op else { return None };
    let rank = graph.shape(input)?.len();
    let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok()?;
    let all = node.output(0)?;
    let fits = node.inputs.len() == 2 && graph.outputs.contains(&all) && axis < rank;
    fits.then_some(Append {
        input,
        new: node.input(1)?,
        all,
        axis,
    })
}

/// Key and value of the new tokens, in the copy.
struct NewRows {
    key: ValueId,
    value: ValueId,
}

/// Computes key and value from the new rows alone, as if nothing were cached. `None`: they do not have the shape of
/// keys and values.
fn copied(graph: &mut Graph, caches: &[ValueId], plan: &Plan) -> Result<Option<NewRows>, PassError> {
    let mut made: HashMap<ValueId, ValueId> = plan.caches.iter().map(|c| (c.all, c.new)).collect();
    for cache in caches {
        let empty = empty_cache(graph, *cache);
        made.extend(empty.map(|empty| (*cache, empty)));
    }
    let key = copy(graph, plan.attention.key, &mut made);
    let value = copy(graph, plan.attention.value, &mut made);
    graph.sort()?;
    infer(graph)?;
    let tokens = Dim::sym(Sym::tokens());
    let slots = |id: ValueId, axis: usize| {
        let shape = graph.shape(id).filter(|shape| shape.len() == 4)?;
        Some(shape[axis] == tokens && shape[1].as_const().is_some())
    };
    let key_axis = if plan.attention.key_transposed { 3 } else { 2 };
    let fit = slots(key, key_axis) == Some(true) && slots(value, 2) == Some(true);
    Ok(fit.then_some(NewRows { key, value }))
}

/// A cache without slots, for shape computations.
fn empty_cache(graph: &mut Graph, cache: ValueId) -> Option<ValueId> {
    let past = Dim::sym(Sym::past());
    let axis = graph.shape(cache)?.iter().position(|dim| *dim == past)?;
    let zero = graph.add_i64("latent.zero", &[0]);
    let axis = graph.add_i64("latent.axis", &[axis as i64]);
    let name = format!("{}.empty", graph.value(cache).name);
    Some(graph.add_node(&name, Op::Slice, &[cache, zero, zero, axis]))
}

/// A copy of everything that a value is computed from, down to the values in `made`. Constants and inputs are not
/// copied.
fn copy(graph: &mut Graph, id: ValueId, made: &mut HashMap<ValueId, ValueId>) -> ValueId {
    let mut stack = vec![id];
    while let Some(at) = stack.last().copied() {
        if made.contains_key(&at) {
            stack.pop();
            continue;
        }
        let Definition::Node { node, .. } = graph.value(at).definition else {
            made.insert(at, at);
            continue;
        };
        let missing: Vec<ValueId> = graph.node(node).inputs.iter().flatten().copied().collect();
        let missing: Vec<ValueId> = missing.into_iter().filter(|v| !made.contains_key(v)).collect();
        if missing.is_empty() {
            copy_node(graph, node, made);
            stack.pop();
        } else {
            stack.extend(missing);
        }
    }
    made[&id]
}

fn copy_node(graph: &mut Graph, id: NodeId, made: &mut HashMap<ValueId, ValueId>) {
    let node = graph.node(id).clone();
    let inputs: Vec<Option<ValueId>> = node.inputs.iter().map(|input| input.map(|v| made[&v])).collect();
    if inputs == node.inputs {
        made.extend(node.outputs.iter().flatten().map(|v| (*v, *v)));
        return;
    }
    let outputs: Vec<Option<ValueId>> = node
        .outputs
        .iter()
        .map(|output| {
            let name = format!("{}.new", graph.value((*output)?).name);
            let (dtype, copy) = (graph.value((*output)?).dtype, graph.add_value(&name));
            graph.value_mut(copy).dtype = dtype;
            Some(copy)
        })
        .collect();
    for (old, new) in node.outputs.iter().zip(&outputs) {
        made.extend(old.zip(*new));
    }
    graph.add_node_with_outputs(&format!("{}.new", node.name), node.op, inputs, outputs);
}

/// Runs the operands over whole caches, and their copies over the first and the last slots. Gives how often each head is
/// repeated.
fn proven(graph: &Graph, roles: &Roles, plan: &Plan, rows: &NewRows) -> Result<usize, Stuck> {
    let evaluator = PartialEvaluator::new(graph, roles);
    let limit = |id: ValueId| 4.0 * tolerance(graph.value(id).dtype.unwrap_or(DType::F32));
    let key_axis = if plan.attention.key_transposed { 3 } else { 2 };
    let operands = [
        (plan.attention.key, rows.key, key_axis),
        (plan.attention.value, rows.value, 2),
    ];
    let mut repeats = None;
    for (batch, past, tokens) in [(2, 3, 2), (1, 6, 1), (1, 40, 3)] {
        let total = past + tokens;
        let trial = evaluator.trial(batch, past, tokens);
        let mut caches = HashMap::new();
        for (n, cache) in plan.caches.iter().enumerate() {
            let dims = evaluator.dims(&trial, cache.all)?;
            let dtype = graph.value(cache.all).dtype.unwrap_or(DType::F32);
            let values = noise(dims.iter().product(), 31 + n as u64);
            caches.insert(cache.all, tensor_of(dtype, dims, &values));
        }
        let whole = evaluator.run(&trial, &caches, &operands.map(|(old, ..)| old))?;
        // The last slots after the others, and the same slots as the first of a sequence.
        for (start, end) in [(past, total), (0, past)] {
            let trial = evaluator.trial(batch, start, end - start);
            let mut parts = HashMap::new();
            for cache in &plan.caches {
                let all = &caches[&cache.all];
                let dims = evaluator.dims(&trial, cache.new)?;
                let part = columns(&all.to_f64(), all.shape(), cache.axis, start..end);
                parts.insert(cache.new, tensor_of(all.dtype(), dims, &part));
            }
            let new = evaluator.run(&trial, &parts, &operands.map(|(_, new, _)| new))?;
            let seen = new.iter().map(repeated_heads).fold(0, gcd);
            repeats = Some(repeats.map_or(seen, |before| gcd(before, seen)));
            for ((old, new), (value, _, axis)) in whole.iter().zip(&new).zip(operands) {
                let expected = columns(&old.to_f64(), old.shape(), axis, start..end);
                let largest = expected.iter().fold(1.0, |most: f64, v| most.max(v.abs()));
                let near = |(a, b): (&f64, &f64)| (a - b).abs() <= f64::from(limit(value)) * largest;
                let found = new.to_f64();
                if found.len() != expected.len() || !found.iter().zip(&expected).all(near) {
                    return Err(Stuck {
                        at: graph.value(value).name.clone(),
                        reason: "it is not computed slot by slot".into(),
                    });
                }
            }
        }
    }
    Ok(repeats.unwrap_or(1).max(1))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// How many heads in turn are the same, everywhere in `[batch, heads, ..]`.
fn repeated_heads(rows: &Tensor) -> usize {
    let shape = rows.shape();
    let (heads, values) = (shape[1].max(1), rows.to_f64());
    let size = values.len() / (shape[0].max(1) * heads);
    let is = |repeats: &usize| {
        let same = |(i, head): (usize, &[f64])| {
            let first = i - i % repeats;
            head == &values[first * size..][..size]
        };
        heads.is_multiple_of(*repeats) && values.chunks(size.max(1)).enumerate().all(same)
    };
    (1..=heads).rev().find(is).unwrap_or(1)
}

/// A part of one axis.
fn columns(values: &[f64], shape: &[usize], axis: usize, part: std::ops::Range<usize>) -> Vec<f64> {
    let inner: usize = shape[axis + 1..].iter().product();
    let of_one = |block: &[f64]| block[part.start * inner..part.end * inner].to_vec();
    values.chunks((shape[axis] * inner).max(1)).flat_map(of_one).collect()
}

/// Of `[batch, heads, ..]` the first head of so many in turn.
fn every_head(graph: &mut Graph, rows: ValueId, repeats: usize, name: &str) -> ValueId {
    let ints = [0, i64::MAX, 1, repeats as i64];
    let [start, end, axis, step] = ints.map(|n| graph.add_i64(&format!("{name}.heads"), &[n]));
    graph.add_node(&format!("{name}.once"), Op::Slice, &[rows, start, end, axis, step])
}

/// Each of the heads, of rows of this width, so often that there are `heads`.
fn repeated(graph: &mut Graph, all: ValueId, [heads, repeats, width]: [i64; 3], name: &str) -> ValueId {
    let axis = graph.add_i64(&format!("{name}.axis"), &[2]);
    let apart = graph.add_node(&format!("{name}.apart"), Op::Unsqueeze, &[all, axis]);
    let to = graph.add_i64(&format!("{name}.repeats"), &[1, 1, repeats, 1, 1]);
    let expanded = graph.add_node(&format!("{name}.expanded"), Op::Expand, &[apart, to]);
    let shape = graph.add_i64(&format!("{name}.whole"), &[0, heads, -1, width]);
    graph.add_node(
        &format!("{name}.repeated"),
        Op::Reshape { allowzero: false },
        &[expanded, shape],
    )
}

/// Caches of keys and values in the place of the others, of every `repeats`-th head.
fn rewrite(graph: &mut Graph, roles: &mut Roles, plan: &Plan, rows: &NewRows, repeats: usize) -> Result<(), PassError> {
    let attention = &plan.attention;
    let mut names: Vec<[String; 2]> = Vec::new();
    for cache in &plan.caches {
        let name = |id: ValueId| graph.value(id).name.clone();
        names.push([name(cache.input), name(cache.all)]);
    }
    for cache in &plan.caches {
        for id in [cache.input, cache.all] {
            let free = graph.fresh_name(&format!("{}.latent", graph.value(id).name));
            graph.rename(id, &free);
        }
    }
    let position = |ids: &[ValueId], id: ValueId| ids.iter().position(|known| *known == id).unwrap_or(0);
    let first_input = position(&graph.inputs, plan.caches[0].input);
    let first_output = position(&graph.outputs, plan.caches[0].all);
    let first_cache = position(&roles.caches, plan.caches[0].input);
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    let operands = [
        ("key", attention.key, rows.key, attention.key_transposed),
        ("value", attention.value, rows.value, false),
    ];
    for (n, (part, old, new, transposed)) in operands.into_iter().enumerate() {
        let turn = |graph: &mut Graph, x: ValueId, name: &str| match transposed {
            true => {
                let perm = Some(vec![0, 1, 3, 2]);
                graph.add_node(name, Op::Transpose { perm }, &[x])
            }
            false => x,
        };
        let base = format!("{}.{part}", attention.name);
        let rows = turn(graph, new, &format!("{base}.rows"));
        let mut shape = graph.shape(new).cloned().unwrap_or_default();
        if transposed {
            shape.swap(2, 3);
        }
        let [heads, width] = [1, 3].map(|axis| shape[axis].as_const().unwrap_or(-1));
        let rows = match repeats {
            1 => rows,
            _ => every_head(graph, rows, repeats, &base),
        };
        shape[1] = Dim::constant(heads / repeats as i64);
        shape[2] = Dim::sym(Sym::past());
        let named = names.get(n).cloned();
        let [input, output] = named.unwrap_or_else(|| [format!("past.{base}"), format!("present.{base}")]);
        let dtype = graph.value(new).dtype.unwrap_or(DType::F32);
        let past = graph.add_input(&graph.fresh_name(&input), dtype, shape);
        graph.inputs.pop();
        let all = graph.add_node(&output, Op::Concat { axis: 2 }, &[past, rows]);
        let read = match repeats {
            1 => all,
            _ => repeated(graph, all, [heads, repeats as i64, width], &base),
        };
        let operand = turn(graph, read, &format!("{base}.turned"));
        graph.replace_uses(old, operand);
        inputs.push(past);
        outputs.push(all);
    }
    // Sizes are read from the new caches: batch and slots are the same.
    for cache in &plan.caches {
        graph.replace_uses(cache.input, inputs[0]);
    }
    let old: Vec<ValueId> = plan.caches.iter().flat_map(|c| [c.input, c.all]).collect();
    graph.inputs.retain(|id| !old.contains(id));
    graph.outputs.retain(|id| !old.contains(id));
    roles.caches.retain(|id| !old.contains(id));
    let insert = |ids: &mut Vec<ValueId>, at: usize, new: &[ValueId]| {
        let at = at.min(ids.len());
        ids.splice(at..at, new.iter().copied());
    };
    insert(&mut graph.inputs, first_input, &inputs);
    insert(&mut graph.outputs, first_output, &outputs);
    insert(&mut roles.caches, first_cache, &inputs);
    roles.of.retain(|id, _| !old.contains(id));
    roles.of.extend(inputs.iter().map(|id| (*id, InputRole::Cache)));
    graph.sort()?;
    graph.remove_dead_nodes();
    infer(graph)?;
    Ok(())
}
