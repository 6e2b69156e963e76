//! Caches: which output is the update of which input, in which layout, with proof that reading and writing have the
//! canonical semantics.
//!
//! Input: the key or value operand of an attention. How a cache is written does not matter: when executed,
//! concatenation, scatters, selects and operators with a past must all give a cache whose used slots are the old ones
//! followed by the new rows, and an operand that repeats its heads over the query heads.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::beyond::far_past;
use super::fingerprint::fingerprint;
use super::layout::{CacheLayout, TokenLayout};
use super::projection::{Noise, Projection, RowOrder, Rows, Tables, noise, tolerance};
use super::rounding::RowRounding;
use super::trace::Trace;
use crate::graph::ValueId;
use crate::passes::partial_eval::{PartialEvaluator, Trial, tensor_of};
use crate::tensor::{DType, Tensor};

/// A recognized cache of the export.
#[derive(Clone, Debug)]
pub struct ExportCache {
    pub input: ValueId,
    pub output: ValueId,
    pub layout: CacheLayout,
    pub heads: usize,
    pub dim: usize,
    /// The projections of the rows.
    pub sources: Vec<ValueId>,
    /// The rows written in each call.
    pub rows: Projection,
    /// Rounding of these rows.
    pub rounding: RowRounding,
}

/// A key or value operand of an attention.
pub struct Operand {
    pub value: ValueId,
    /// `[.., head_dim, slots]`
    pub transposed: bool,
    pub query_heads: usize,
    /// It may have as many heads as the cache.
    pub grouped: bool,
    /// Known only for keys.
    pub dim: Option<usize>,
    /// Known for values of flat caches: the number of the keys.
    pub heads: Option<usize>,
}

/// The cache that an operand reads, and the factor between the two.
pub fn solve(
    trace: &Trace<'_, '_>,
    evaluator: &PartialEvaluator<'_>,
    operand: &Operand,
    known: &mut HashMap<ValueId, ExportCache>,
    tables: &mut Tables,
) -> Result<(ValueId, f32), String> {
    let name = |id: ValueId| evaluator.graph.value(id).name.clone();
    let (caches, new) = trace.cache_and_new(operand.value);
    let [input] = caches[..] else {
        return Err(match caches.len() {
            0 => format!(
                "{} does not come from a cache; export the model with past keys and values",
                name(operand.value)
            ),
            _ => format!(
                "{} comes from several caches: {}",
                name(operand.value),
                names(evaluator, &caches)
            ),
        });
    };
    if new.is_empty() {
        return Err(format!(
            "{} depends only on the cache {}, where a projection was expected",
            name(operand.value),
            name(input)
        ));
    }
    let cache = match known.entry(input) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(find(trace, evaluator, operand, input, &new, tables)?),
    };
    let context = format!(
        "read {} {} {} {:?} {} {}",
        operand.transposed, operand.query_heads, operand.grouped, cache.layout, cache.heads, cache.dim
    );
    let leaves: Vec<ValueId> = [input].into_iter().chain(new).collect();
    let print = fingerprint(evaluator, operand.value, &leaves, &context);
    let factor = match tables.proven.reads.get(&print) {
        Some(factor) => *factor,
        None => {
            let factor = read(evaluator, operand, cache, tables, &proving_trial(evaluator, 2, 3))?;
            if let Some(past) = far_past(evaluator, operand.value, &leaves, tables, 2) {
                let far = read(evaluator, operand, cache, tables, &evaluator.trial(1, past, 2))?;
                if (far - factor).abs() > 1e-3 * factor.abs() {
                    let name = name(operand.value);
                    return Err(format!(
                        "{name} is scaled by {factor} at first, and by {far} after {past} tokens"
                    ));
                }
            }
            tables.proven.reads.insert(print, factor);
            factor
        }
    };
    Ok((input, factor))
}

fn names(evaluator: &PartialEvaluator<'_>, ids: &[ValueId]) -> String {
    let names: Vec<&str> = ids.iter().map(|id| evaluator.graph.value(*id).name.as_str()).collect();
    names.join(", ")
}

fn find(
    trace: &Trace<'_, '_>,
    evaluator: &PartialEvaluator<'_>,
    operand: &Operand,
    input: ValueId,
    sources: &[ValueId],
    tables: &mut Tables,
) -> Result<ExportCache, String> {
    let graph = evaluator.graph;
    let name = &graph.value(input).name;
    let output = graph.outputs.iter().copied().find(|o| {
        let (caches, _) = trace.cache_and_new(*o);
        caches == [input]
    });
    let output = output.ok_or_else(|| format!("no output is the update of the cache {name}"))?;
    if trace.sources(output).len() != 1 + sources.len() {
        return Err(format!(
            "the output {} returns the cache {name} unchanged or mixed with other values",
            graph.value(output).name
        ));
    }
    let rows_value = trace.rows_before_cache(output, sources).ok_or_else(|| {
        format!(
            "the output {} does not consist of the attention's operands",
            graph.value(output).name
        )
    })?;
    let shape = graph.shape(rows_value).cloned().unwrap_or_default();
    let order = TokenLayout::of(&shape, evaluator.roles).ok_or_else(|| {
        format!(
            "{} has the shape {shape:?}, in which no axis counts tokens",
            graph.value(rows_value).name
        )
    })?;

    let trial = proving_trial(evaluator, 2, 3);
    let dims = evaluator.dims(&trial, input).map_err(|stuck| stuck.to_string())?;
    let mut reasons = Vec::new();
    for layout in CacheLayout::candidates(dims.len()) {
        let Some((heads, _, dim)) = layout.split(&dims, operand.heads, operand.dim) else {
            continue;
        };
        if operand.dim.is_some_and(|d| d != dim) {
            continue;
        }
        let order = RowOrder::Tokens(order.clone());
        let rows = Rows::new(evaluator, rows_value, order, sources, [heads, dim]);
        let found = rows.solve(tables).and_then(|projection| {
            let cache = ExportCache {
                input,
                output,
                layout: *layout,
                heads,
                dim,
                sources: sources.to_vec(),
                rows: projection,
                rounding: RowRounding::default(),
            };
            let context = format!("cache {layout:?} {heads} {dim}");
            let leaves: Vec<ValueId> = [input].iter().chain(sources).copied().collect();
            let print = fingerprint(evaluator, output, &leaves, &context);
            if !tables.proven.writes.contains(&print) {
                write(evaluator, &cache, tables, &trial)?;
                write(evaluator, &cache, tables, &proving_trial(evaluator, 0, 2))?;
                if let Some(past) = far_past(evaluator, output, &leaves, tables, 2) {
                    write(evaluator, &cache, tables, &evaluator.trial(1, past, 2))?;
                }
                tables.proven.writes.insert(print);
            }
            Ok(cache)
        });
        match found {
            Ok(cache) => return Ok(cache),
            Err(reason) => reasons.push(reason),
        }
    }
    let reason = reasons
        .into_iter()
        .next()
        .unwrap_or_else(|| format!("its shape {dims:?} is not that of a cache"));
    Err(format!("the cache {name}: {reason}"))
}

/// Sizes that fit a small static cache.
fn proving_trial(evaluator: &PartialEvaluator<'_>, past: usize, tokens: usize) -> std::rc::Rc<Trial> {
    evaluator.trial(2, past, tokens)
}

/// The values fed to a cache and its source, and the expected cache.
struct Scene {
    feeds: HashMap<ValueId, Tensor>,
    /// `[batch, heads, slots, dim]` after the call.
    expected: Vec<f32>,
    slots: usize,
}

fn scene(
    evaluator: &PartialEvaluator<'_>,
    cache: &ExportCache,
    tables: &Tables,
    trial: &Trial,
) -> Result<Scene, String> {
    let text = |stuck: crate::passes::partial_eval::Stuck| stuck.to_string();
    let (batch, past, tokens) = (trial.sizes.batch, trial.sizes.past, trial.sizes.tokens);
    let dims = evaluator.dims(trial, cache.input).map_err(text)?;
    let (heads, before, dim) = cache
        .layout
        .split(&dims, Some(cache.heads), Some(cache.dim))
        .ok_or("the shape of the cache changed")?;
    if before < past || (evaluator.roles.growing && before > past) {
        return Err(format!(
            "the cache has {before} slots where {past} were expected: is its length free?"
        ));
    }
    let held = noise(batch * heads * before * dim, 11);
    let mut stored = vec![0.0; held.len()];
    for (i, place) in cache.layout.places(batch, heads, before, dim).into_iter().enumerate() {
        stored[i] = held[place];
    }
    let dtype = evaluator.graph.value(cache.input).dtype.unwrap_or(DType::F32);
    let rows = Rows::new(
        evaluator,
        cache.rows.source,
        RowOrder::Canonical,
        &cache.sources,
        [heads, dim],
    );
    let x = Noise::new(&rows, 23).map_err(text)?;
    let mut feeds = rows.feed(trial, |b, t, c| x.at(b, t, c)).map_err(text)?;
    feeds.insert(cache.input, tensor_of(dtype, dims, &stored));
    let new = cache.rows.rows(tables, trial, |b, t, c| x.at(b, t, c) as f32);
    let slots = if evaluator.roles.growing {
        before + tokens
    } else {
        before
    };
    let mut expected = vec![0.0; batch * heads * slots * dim];
    for (group, rows) in expected.chunks_mut((slots * dim).max(1)).enumerate() {
        for (i, cell) in rows.iter_mut().enumerate() {
            let (s, d) = (i / dim, i % dim);
            *cell = if (past..past + tokens).contains(&s) {
                new[(group * tokens + s - past) * dim + d]
            } else {
                held[(group * before + s) * dim + d] as f32
            };
        }
    }
    Ok(Scene { feeds, expected, slots })
}

fn coarsest<'i>(evaluator: &PartialEvaluator<'_>, ids: impl IntoIterator<Item = &'i ValueId>) -> f32 {
    let of = |id: &ValueId| tolerance(evaluator.graph.value(*id).dtype.unwrap_or(DType::F32));
    ids.into_iter().map(of).fold(0.0, f32::max)
}

/// Proves that the output is the input with the new rows in the slots from `past` on.
fn write(evaluator: &PartialEvaluator<'_>, cache: &ExportCache, tables: &Tables, trial: &Trial) -> Result<(), String> {
    let scene = scene(evaluator, cache, tables, trial)?;
    let result = evaluator
        .run(trial, &scene.feeds, &[cache.output])
        .map_err(|stuck| stuck.to_string())?;
    let values = result[0].to_f32();
    let places = cache
        .layout
        .places(trial.sizes.batch, cache.heads, scene.slots, cache.dim);
    let limit =
        4.0 * coarsest(evaluator, cache.sources.iter().chain([&cache.input])) * cache.rows.largest_scale().max(1.0);
    let same = values.len() == places.len()
        && places
            .iter()
            .zip(&values)
            .all(|(place, v)| (scene.expected[*place] - v).abs() <= limit);
    if same {
        return Ok(());
    }
    Err(format!(
        "with {} past and {} new tokens, the output {} is not the cache with the new rows after the past ones",
        trial.sizes.past,
        trial.sizes.tokens,
        evaluator.graph.value(cache.output).name
    ))
}

/// Proves that the operand is the written cache with its heads repeated over the query heads, and returns its scale.
fn read(
    evaluator: &PartialEvaluator<'_>,
    operand: &Operand,
    cache: &ExportCache,
    tables: &Tables,
    trial: &Trial,
) -> Result<f32, String> {
    let name = &evaluator.graph.value(operand.value).name;
    let scene = scene(evaluator, cache, tables, trial)?;
    let result = evaluator
        .run(trial, &scene.feeds, &[operand.value])
        .map_err(|stuck| stuck.to_string())?;
    let (tensor, batch, dim) = (&result[0], trial.sizes.batch, cache.dim);
    let shape = tensor.shape();
    let rank = shape.len();
    let unlike = || {
        format!(
            "{name} has the shape {shape:?}, which is not that of a cache read by {} heads",
            operand.query_heads
        )
    };
    if rank < 3 {
        return Err(unlike());
    }
    let (slots, width) = if operand.transposed {
        (shape[rank - 1], shape[rank - 2])
    } else {
        (shape[rank - 2], shape[rank - 1])
    };
    let lead: usize = shape[..rank - 2].iter().product();
    let heads = lead / batch.max(1);
    // A product broadcasts a single head.
    let grouped = heads == cache.heads && (operand.grouped || rank > 4 || heads == 1);
    let live = trial.sizes.past + trial.sizes.tokens;
    if width != dim
        || lead != heads * batch
        || (heads != operand.query_heads && !grouped)
        || !heads.is_multiple_of(cache.heads)
    {
        return Err(unlike());
    }
    if slots < live || slots > scene.slots {
        return Err(format!("{name} holds {slots} slots of a cache with {live} live ones"));
    }
    let repeat = heads / cache.heads;
    let values = tensor.to_f32();
    let (mut pairs, mut held) = (Vec::with_capacity(values.len()), Vec::new());
    for (i, value) in values.iter().enumerate() {
        let (row, inside) = (i / (slots * dim), i % (slots * dim));
        let (s, d) = if operand.transposed {
            (inside % slots, inside / slots)
        } else {
            (inside / dim, inside % dim)
        };
        let (b, h) = (row / heads, row % heads / repeat);
        let expected = scene.expected[((b * cache.heads + h) * scene.slots + s) * dim + d];
        pairs.push((expected, *value));
        if s < trial.sizes.past {
            held.push((expected, *value));
        }
    }
    // New rows include the rounding of their rotation; cached rows are only multiplied.
    let exact = if held.is_empty() { &pairs } else { &held };
    let sum = |of: fn(f64, f64) -> f64| -> f64 { exact.iter().map(|(e, v)| of(f64::from(*e), f64::from(*v))).sum() };
    let mut factor = (sum(|e, v| e * v) / sum(|e, _| e * e)) as f32;
    let limit = 4.0
        * coarsest(evaluator, cache.sources.iter().chain([&cache.input, &operand.value]))
        * factor.abs().max(f32::MIN_POSITIVE);
    if !factor.is_finite() || !pairs.iter().all(|(e, v)| (e * factor - v).abs() <= limit) {
        return Err(format!(
            "{name} is not the cache {} with its heads repeated",
            evaluator.graph.value(cache.input).name
        ));
    }
    // Rounding in the export's arithmetic must not result in a scale of 0.99999994.
    if (factor - 1.0).abs() < 1e-3 {
        factor = 1.0;
    }
    Ok(factor)
}
