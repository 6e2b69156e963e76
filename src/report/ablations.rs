//! One switch at a time: runs that say so, and runs of Lapidary whose settings differ in one key.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::benchmarks::{Verdict, decode_at, prefill_of, text_of};
use super::input::{Group, ResultFile, SourceId};
use super::markdown::{cite, ms, table, times};
use crate::bench::Document;

/// What one switch does: a baseline, and runs with the switch in other positions. Runs that are like another baseline are
/// another ablation of the same name.
#[derive(Clone, Debug)]
pub struct Ablation<'a> {
    /// What the switch is called.
    pub name: String,
    pub baseline: &'a ResultFile,
    /// Position and run.
    pub runs: Vec<(String, &'a ResultFile)>,
}

/// Settings that only repeat what another one says: the first follows from the second.
const FOLLOWS: [(&str, &str); 3] = [
    ("capacities", "cache"),
    ("prefill_chunks", "shapes"),
    ("prefill_range", "shapes"),
];

type Found<'a> = BTreeMap<(String, SourceId), Ablation<'a>>;

/// Where the two have something in common.
fn add<'a>(found: &mut Found<'a>, name: &str, baseline: &'a ResultFile, position: String, run: &'a ResultFile) {
    if common(&baseline.of, &run.of).is_empty() {
        return;
    }
    let entry = found.entry((name.to_string(), baseline.source));
    let ablation = entry.or_insert_with(|| Ablation {
        name: name.to_string(),
        baseline,
        runs: Vec::new(),
    });
    ablation.runs.push((position, run));
}

/// What both measured: in words, milliseconds of the one and of the other.
fn common(a: &Document, b: &Document) -> Vec<(String, f64, f64)> {
    let decode = b.decode.iter().filter_map(|d| {
        let usual = decode_at(a, d.live)?;
        Some((format!("a token behind {}", d.live), usual.ms.median, d.ms.median))
    });
    let prefill = b.prefill.iter().filter_map(|p| {
        let usual = prefill_of(a, p.tokens)?;
        Some((format!("prefill of {}", p.tokens), usual.ms.median, p.ms.median))
    });
    let whole = b.end_to_end.iter().filter_map(|e| {
        let usual = text_of(a, (e.prompt, e.new_tokens))?;
        let what = format!("{} + {}, all of it", e.prompt, e.new_tokens);
        Some((what, usual.latency_ms.median, e.latency_ms.median))
    });
    decode.chain(prefill).chain(whole).collect()
}

/// All ablations of a group, by name.
pub fn ablations(group: &Group) -> Vec<Ablation<'_>> {
    let mut found = Found::new();
    let ours: Vec<&ResultFile> = group
        .results
        .iter()
        .filter(|r| r.of.system.name == "lapidary")
        .collect();
    for run in &group.ablations {
        let tag = &run.of.system.settings["ablation"];
        let text = |key: &str| tag.get(key).map(plain);
        let (name, position) = (text("group").unwrap_or_default(), text("switch").unwrap_or_default());
        // The untagged runs that are most like it; several where each differs in one thing.
        let like = group.results.iter().filter(|r| r.of.system.name == run.of.system.name);
        let near = |r: &ResultFile| differing(&r.of.system.settings, &run.of.system.settings).len();
        let nearest = like.clone().map(near).min();
        for baseline in like.filter(|r| Some(near(r)) == nearest) {
            add(&mut found, &name, baseline, position.clone(), run);
        }
    }
    if let Some((first, others)) = ours.split_first() {
        for other in others {
            if let [key] = &differing(&first.of.system.settings, &other.of.system.settings)[..] {
                let position = other.of.system.settings.get(key);
                let position = position.map_or_else(|| "unset".to_string(), plain);
                add(&mut found, key, first, position, other);
            }
        }
    }
    found.into_values().collect()
}

/// Text without quotes, other values as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Keys with different values, without those that follow from another that is among them, and without the tag itself.
fn differing(a: &Map<String, Value>, b: &Map<String, Value>) -> Vec<String> {
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    let keys = keys.into_iter().filter(|k| *k != "ablation" && a.get(*k) != b.get(*k));
    let keys: Vec<String> = keys.cloned().collect();
    let follows = |key: &String| {
        FOLLOWS
            .iter()
            .any(|(what, of)| key == what && keys.iter().any(|k| k == of))
    };
    keys.iter().filter(|k| !follows(k)).cloned().collect()
}

impl Ablation<'_> {
    /// `cuda_graphs, against Lapidary (true)`
    pub fn title(&self) -> String {
        let usual = self.usual().map(|usual| format!(" ({usual})")).unwrap_or_default();
        format!("{}, against {}{usual}", self.name, self.baseline.of.system.label)
    }

    /// The switch's position in the baseline, where its settings have it.
    pub fn usual(&self) -> Option<String> {
        self.baseline.of.system.settings.get(&self.name).map(plain)
    }

    /// Everything that the baseline and a run both measured.
    pub fn table(&self, group: &Group) -> String {
        let mut rows = Vec::new();
        for (position, run) in &self.runs {
            for (what, usual, switched) in common(&self.baseline.of, &run.of) {
                rows.push(vec![
                    Verdict::of(run, group).word(),
                    what,
                    position.clone(),
                    ms(usual),
                    ms(switched),
                    times(switched / usual),
                    format!("{}{}", cite(self.baseline.source), cite(run.source)),
                ]);
            }
        }
        let header = [
            "outputs",
            "what",
            "switch",
            "usual ms",
            "switched ms",
            "switched / usual",
            "",
        ];
        table(&header, &rows)
    }
}
