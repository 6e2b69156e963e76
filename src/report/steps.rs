//! Conversions, step by step: passes, layers and weights, with a column per model.

use std::collections::BTreeSet;

use super::conversion::{Conversion, LoweredProfile};
use super::input::Sourced;
use super::markdown::{MISSING, cite, or_missing, percent, table};
use super::matrix::{Cell, matrix};
use crate::passes;
use crate::target::Prefill;
use crate::units::bytes;

/// `llama-1b fp16`
fn heads(conversions: &[Sourced<Conversion>]) -> Vec<String> {
    let head = |c: &Sourced<Conversion>| format!("{} {}", c.of.name, c.of.dtype);
    conversions.iter().map(head).collect()
}

/// A row of an optional fact of each conversion.
fn row(
    keys: &[&str],
    conversions: &[Sourced<Conversion>],
    of: impl Fn(&Conversion) -> Option<String>,
) -> (Vec<String>, Vec<Cell>) {
    let cell = |c: &Sourced<Conversion>| -> Cell { Some((of(&c.of)?, vec![c.source])) };
    (
        keys.iter().map(|key| key.to_string()).collect(),
        conversions.iter().map(cell).collect(),
    )
}

/// The exports: exporter, architecture, nodes before and after.
pub fn exports(conversions: &[Sourced<Conversion>]) -> String {
    let writer = |c: &Conversion| match c.source.exporter.as_str() {
        // Unknown exporters still write their name into the file.
        "unknown" if !c.source.producer.trim().is_empty() => c.source.producer.trim().to_string(),
        exporter => exporter.to_string(),
    };
    let opsets = |c: &Conversion| {
        let opsets = c
            .source
            .opsets
            .iter()
            .map(|(domain, version)| format!("{domain} {version}"));
        opsets.collect::<Vec<_>>().join(", ")
    };
    let nodes = |c: &Conversion| Some((c.passes.first()?.nodes_before, c.passes.last()?.nodes_after));
    let tensorrt = |c: &Conversion| {
        let engines = c.profiles.iter().filter_map(|p| p.engine.as_ref());
        let versions: BTreeSet<&str> = engines.map(|e| e.tensorrt.as_str()).collect();
        Some(versions.into_iter().collect::<Vec<_>>().join(", ")).filter(|v| !v.is_empty())
    };
    let rows = vec![
        row(&["written by"], conversions, |c| Some(writer(c))),
        row(&["opsets"], conversions, |c| Some(opsets(c))),
        row(&["architecture"], conversions, |c| Some(c.architecture.to_string())),
        row(&["nodes of the export"], conversions, |c| Some(nodes(c)?.0.to_string())),
        row(&["nodes of the canonical graph"], conversions, |c| {
            let (before, after) = nodes(c)?;
            Some(format!("{after} ({})", percent(after as f64 / before.max(1) as f64)))
        }),
        row(&["TensorRT-RTX"], conversions, tensorrt),
    ];
    matrix(&["export"], &heads(conversions), rows)
}

/// Rewrites and nodes of each pass that changed a graph.
pub fn passes(conversions: &[Sourced<Conversion>]) -> String {
    let changed = |c: &Conversion| -> Vec<(String, usize)> {
        // A pass that runs several times has a row for each run.
        let mut seen = Vec::new();
        let all = c.passes.iter().map(|p| {
            seen.push(p.name.clone());
            let nth = seen.iter().filter(|name| **name == p.name).count();
            (p, nth)
        });
        let all = all.filter(|(p, _)| p.rewrites > 0 || p.nodes_before != p.nodes_after);
        all.map(|(p, nth)| (p.name.clone(), nth)).collect()
    };
    // In the order of the passes of the conversion that ran most.
    let mut keys: Vec<(String, usize)> = Vec::new();
    let mut longest: Vec<&Sourced<Conversion>> = conversions.iter().collect();
    longest.sort_by_key(|c| std::cmp::Reverse(changed(&c.of).len()));
    for key in longest.iter().flat_map(|c| changed(&c.of)) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let rows = keys.iter().map(|(name, nth)| {
        let cell = |c: &Conversion| {
            let p = c.passes.iter().filter(|p| p.name == *name).nth(nth - 1)?;
            Some(format!("{}: {} → {}", p.rewrites, p.nodes_before, p.nodes_after))
        };
        let does = passes::info(name).map_or("", |info| info.description);
        row(&[name.as_str(), does], conversions, cell)
    });
    matrix(&["pass", "what it does"], &heads(conversions), rows.collect())
}

/// Batch, tokens and capacity of `b1-t128-c1024`.
fn shape(profile: &str) -> Option<[usize; 3]> {
    let mut parts = profile.split('-').map(|part| part.get(1..)?.parse().ok());
    Some([parts.next()??, parts.next()??, parts.next()??])
}

/// `decode, capacity 256, 1024`, or `prefill`, of profiles with the same layers.
fn kind(profiles: &[&LoweredProfile]) -> String {
    let shapes: Option<Vec<[usize; 3]>> = profiles.iter().map(|p| shape(&p.profile)).collect();
    let Some(shapes) = shapes else {
        return profiles
            .iter()
            .map(|p| p.profile.as_str())
            .collect::<Vec<_>>()
            .join(", ");
    };
    let capacities: BTreeSet<usize> = shapes.iter().map(|[.., capacity]| *capacity).collect();
    let capacities: Vec<String> = capacities.iter().map(usize::to_string).collect();
    let what = match shapes.iter().all(|[_, tokens, _]| *tokens == 1) {
        true => "decode",
        false => "prefill",
    };
    format!("{what}, capacity {}", capacities.join(", "))
}

/// Kinds of layers, for each model and each set of profiles with the same layers.
pub fn layers(conversions: &[Sourced<Conversion>]) -> String {
    let mut columns: Vec<(&Sourced<Conversion>, Vec<&LoweredProfile>)> = Vec::new();
    for conversion in conversions {
        let first = columns.len();
        for profile in &conversion.of.profiles {
            match columns[first..].iter_mut().find(|(_, p)| p[0].layers == profile.layers) {
                Some((_, profiles)) => profiles.push(profile),
                None => columns.push((conversion, vec![profile])),
            }
        }
    }
    let heads: Vec<String> = columns
        .iter()
        .map(|(c, profiles)| format!("{}: {}", c.of.name, kind(profiles)))
        .collect();
    let kinds: BTreeSet<&String> = columns.iter().flat_map(|(_, p)| p[0].layers.keys()).collect();
    let counts = |of: &dyn Fn(&LoweredProfile) -> Option<usize>| -> Vec<Cell> {
        let cell = |(c, p): &(&Sourced<Conversion>, Vec<&LoweredProfile>)| -> Cell {
            Some((of(p[0])?.to_string(), vec![c.source]))
        };
        columns.iter().map(cell).collect()
    };
    let mut rows: Vec<(Vec<String>, Vec<Cell>)> = kinds
        .into_iter()
        .map(|kind| (vec![kind.clone()], counts(&|p| p.layers.get(kind).copied())))
        .collect();
    rows.push((vec!["all".to_string()], counts(&|p| Some(p.total()))));
    matrix(&["layer"], &heads, rows)
}

/// Size and build time of each engine.
pub fn engines(conversions: &[Sourced<Conversion>]) -> String {
    let mut names: Vec<&str> = conversions
        .iter()
        .flat_map(|c| &c.of.profiles)
        .filter(|p| p.engine.is_some())
        .map(|p| p.profile.as_str())
        .collect();
    names.sort_by_key(|name| {
        (
            shape(name).map(|[batch, tokens, capacity]| (capacity, batch, tokens)),
            *name,
        )
    });
    names.dedup();
    let rows = names.iter().map(|name| {
        let cell = |c: &Conversion| {
            let p = c.profiles.iter().find(|p| p.profile == *name)?;
            let e = p.engine.as_ref()?;
            let built = match e.build_ms {
                0 => "from a cache".to_string(),
                ms => format!("{:.1} s", ms as f64 / 1e3),
            };
            Some(format!("{}, {built}", bytes(e.bytes)))
        };
        row(&[*name], conversions, cell)
    });
    matrix(&["engine"], &heads(conversions), rows.collect())
}

/// Shapes of each package's engines.
pub fn shapes(conversions: &[Sourced<Conversion>]) -> String {
    let list = |n: &[usize]| n.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let rows = conversions.iter().map(|conversion| {
        let c = &conversion.of;
        let prefill = match &c.prefill {
            Prefill::Chunks(chunks) => format!("chunks of {}", list(chunks)),
            Prefill::Range(r) => format!("{} to {}, best at {}", r.min, r.max, r.opt),
        };
        let engines = c.profiles.iter().filter(|p| p.engine.is_some()).count();
        vec![
            format!("{} {}", c.name, c.dtype),
            prefill,
            list(&c.capacities),
            if engines > 0 {
                engines.to_string()
            } else {
                MISSING.to_string()
            },
            cite(conversion.source),
        ]
    });
    table(
        &["package", "prefill", "cache slots", "engines", ""],
        &rows.collect::<Vec<_>>(),
    )
}

/// The weights of each package.
pub fn weights(conversions: &[Sourced<Conversion>]) -> String {
    let rows = conversions.iter().map(|conversion| {
        let c = &conversion.of;
        let w = &c.weights;
        let plans: u64 = c
            .profiles
            .iter()
            .filter_map(|p| p.engine.as_ref())
            .map(|e| e.bytes)
            .sum();
        let plans = (plans > 0).then_some(plans);
        vec![
            format!("{} {}", c.name, c.dtype),
            serde_json::json!(c.weight_mode)
                .as_str()
                .unwrap_or_default()
                .to_string()
                + if w.stripped { ", stripped" } else { "" },
            w.tensors.to_string(),
            bytes(w.bytes),
            w.named.to_string(),
            w.transposed.to_string(),
            w.shared.to_string(),
            or_missing(plans.map(bytes)),
            or_missing(plans.map(|n| percent(n as f64 / w.bytes.max(1) as f64))),
            cite(conversion.source),
        ]
    });
    let header = [
        "package",
        "carried",
        "tensors",
        "bytes",
        "place in the model known",
        "transposed on the way",
        "stored once more",
        "all plans",
        "of the weights",
        "",
    ];
    table(&header, &rows.collect::<Vec<_>>())
}
