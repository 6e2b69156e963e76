//! The conversion of one model, step by step: what each pass did, which layers were built, what became of the weights.

use std::collections::BTreeMap;

use super::conversion::{Conversion, LoweredProfile};
use super::input::Sourced;
use super::markdown::{MISSING, cite, or_missing, percent, table};
use crate::passes;
use crate::target::Prefill;
use crate::units::bytes;

/// Everything about one conversion, as sections below a heading of its own.
pub fn section(conversion: &Sourced<Conversion>) -> String {
    let c = &conversion.of;
    let cited = cite(conversion.source);
    let opsets: Vec<String> = c
        .source
        .opsets
        .iter()
        .map(|(domain, version)| format!("{domain} {version}"))
        .collect();
    // Exporters that the passes do not know by their habits still sign what they write.
    let writer = match c.source.exporter.as_str() {
        "unknown" if !c.source.producer.trim().is_empty() => c.source.producer.trim(),
        exporter => exporter,
    };
    let mut out = format!(
        "### {} ({})\n\nFrom `{}`, written by {} (opsets {}): {}.{cited}\n\n",
        c.name,
        c.dtype,
        c.source.file,
        writer,
        opsets.join(", "),
        c.architecture,
    );
    out += &passes(c, &cited);
    out += &layers(c, &cited);
    out += &engines(c, &cited);
    out
}

fn passes(c: &Conversion, cited: &str) -> String {
    let (Some(first), Some(last)) = (c.passes.first(), c.passes.last()) else {
        return format!("The package does not say what its passes did.{cited}\n\n");
    };
    let changed = c
        .passes
        .iter()
        .filter(|p| p.rewrites > 0 || p.nodes_before != p.nodes_after);
    let rows: Vec<Vec<String>> = changed
        .map(|p| {
            vec![
                p.name.clone(),
                passes::info(&p.name).map_or("", |info| info.description).to_string(),
                p.rewrites.to_string(),
                p.nodes_before.to_string(),
                p.nodes_after.to_string(),
            ]
        })
        .collect();
    let mut idle: Vec<&str> = Vec::new();
    for p in c
        .passes
        .iter()
        .filter(|p| p.rewrites == 0 && p.nodes_before == p.nodes_after)
    {
        if !idle.contains(&p.name.as_str()) {
            idle.push(&p.name);
        }
    }
    let share = last.nodes_after as f64 / first.nodes_before.max(1) as f64;
    format!(
        "The export has {} nodes, the canonical graph {}, {} of them.{cited} The passes that changed it, in their order:\n\n\
         {}\nPasses that looked and had nothing to change: {}.\n\n",
        first.nodes_before,
        last.nodes_after,
        percent(share),
        table(
            &["pass", "what it does", "rewrites", "nodes before", "nodes after"],
            &rows
        ),
        if idle.is_empty() {
            "none".to_string()
        } else {
            idle.join(", ")
        },
    )
}

/// Kinds of layers in each profile; profiles with the same layers share a column.
fn layers(c: &Conversion, cited: &str) -> String {
    let mut columns: Vec<(Vec<&str>, &LoweredProfile)> = Vec::new();
    for profile in &c.profiles {
        match columns.iter_mut().find(|(_, first)| first.layers == profile.layers) {
            Some((names, _)) => names.push(&profile.profile),
            None => columns.push((vec![&profile.profile], profile)),
        }
    }
    let kinds: BTreeMap<&String, ()> = columns
        .iter()
        .flat_map(|(_, p)| p.layers.keys())
        .map(|k| (k, ()))
        .collect();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for kind in kinds.keys() {
        let counts = columns
            .iter()
            .map(|(_, p)| p.layers.get(*kind).map_or(MISSING.to_string(), usize::to_string));
        rows.push(std::iter::once(kind.to_string()).chain(counts).collect());
    }
    let totals = columns.iter().map(|(_, p)| p.total().to_string());
    rows.push(std::iter::once("all".to_string()).chain(totals).collect());
    let mut header = vec!["layer".to_string()];
    header.extend(columns.iter().map(|(names, _)| names.join(", ")));
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    format!(
        "Lowered for its profiles (batch, tokens of a call, slots of the cache), it has these TensorRT layers, weights not \
         counted:{cited}\n\n{}\n",
        table(&header, &rows)
    )
}

fn engines(c: &Conversion, cited: &str) -> String {
    let rows: Vec<Vec<String>> = c
        .profiles
        .iter()
        .filter_map(|p| {
            let e = p.engine.as_ref()?;
            let word = |value: serde_json::Value| value.as_str().unwrap_or_default().to_string();
            let built = (e.build_ms > 0).then(|| format!("{:.1}", e.build_ms as f64 / 1e3));
            Some(vec![
                p.profile.clone(),
                word(serde_json::json!(e.weight_mode)),
                word(serde_json::json!(e.refit)),
                bytes(e.bytes),
                built.unwrap_or_else(|| "from a cache".to_string()),
                p.weights.to_string(),
                e.tensorrt.clone(),
            ])
        })
        .collect();
    if rows.is_empty() {
        return format!(
            "The package has no engines: it runs on the CPU executor, which reads the same layers.{cited}\n\n"
        );
    }
    let header = [
        "profile",
        "weights",
        "refit",
        "plan",
        "build s",
        "weights of the network",
        "TensorRT-RTX",
    ];
    format!(
        "Engines, built without a GPU unless weights can be refitted:{cited}\n\n{}\n",
        table(&header, &rows)
    )
}

/// Shapes that each package has engines for.
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

/// What became of the weights of each package.
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
