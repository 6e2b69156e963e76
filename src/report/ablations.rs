//! One switch at a time: runs that say so, and runs of Lapidary whose settings differ in one key.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::benchmarks::{Verdict, decode_at, prefill_of, text_of};
use super::input::{Group, ResultFile};
use super::markdown::{cite, ms, table, times};

/// What one switch does: a baseline, and runs with the switch in other positions.
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

/// All ablations of a group, by name.
pub fn ablations(group: &Group) -> Vec<Ablation<'_>> {
    let mut found: BTreeMap<String, Ablation<'_>> = BTreeMap::new();
    let ours: Vec<&ResultFile> = group
        .results
        .iter()
        .filter(|r| r.of.system.name == "lapidary")
        .collect();
    for run in &group.ablations {
        let tag = &run.of.system.settings["ablation"];
        let text = |key: &str| tag.get(key).map(plain);
        let (name, position) = (text("group").unwrap_or_default(), text("switch").unwrap_or_default());
        // The untagged run that is most like it.
        let same_system = |r: &&&ResultFile| r.of.system.name == run.of.system.name;
        let near = |r: &&&ResultFile| differing(&r.of.system.settings, &run.of.system.settings).len();
        let Some(baseline) = group
            .results
            .iter()
            .collect::<Vec<_>>()
            .iter()
            .filter(same_system)
            .min_by_key(near)
            .copied()
        else {
            continue;
        };
        let entry = found.entry(name.clone()).or_insert_with(|| Ablation {
            name,
            baseline,
            runs: Vec::new(),
        });
        entry.runs.push((position, run));
    }
    if let Some((first, others)) = ours.split_first() {
        for other in others {
            if let [key] = &differing(&first.of.system.settings, &other.of.system.settings)[..] {
                let entry = found.entry(key.clone()).or_insert_with(|| Ablation {
                    name: key.clone(),
                    baseline: first,
                    runs: Vec::new(),
                });
                let position = other
                    .of
                    .system
                    .settings
                    .get(key)
                    .map_or_else(|| "unset".to_string(), plain);
                entry.runs.push((position, other));
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
    /// Where the switch is in the baseline.
    fn usual(&self) -> String {
        let settings = &self.baseline.of.system.settings;
        settings.get(&self.name).map_or_else(|| "usual".to_string(), plain)
    }

    /// Everything that the baseline and a run both measured.
    pub fn table(&self, group: &Group) -> String {
        let mut rows = Vec::new();
        for (position, run) in &self.runs {
            let mut row = |what: String, usual: f64, other: f64| {
                rows.push(vec![
                    Verdict::of(run, group).word(),
                    what,
                    position.clone(),
                    ms(usual),
                    ms(other),
                    times(other / usual),
                    format!("{}{}", cite(self.baseline.source), cite(run.source)),
                ]);
            };
            let base = &self.baseline.of;
            for d in &run.of.decode {
                if let Some(usual) = decode_at(base, d.live) {
                    row(format!("a token behind {}", d.live), usual.ms.median, d.ms.median);
                }
            }
            for p in &run.of.prefill {
                if let Some(usual) = prefill_of(base, p.tokens) {
                    row(format!("prefill of {}", p.tokens), usual.ms.median, p.ms.median);
                }
            }
            for e in &run.of.end_to_end {
                if let Some(usual) = text_of(base, (e.prompt, e.new_tokens)) {
                    let what = format!("{} + {}, all of it", e.prompt, e.new_tokens);
                    row(what, usual.latency_ms.median, e.latency_ms.median);
                }
            }
        }
        let usual = format!("{} (ms)", self.usual());
        table(
            &[
                "outputs",
                "what",
                "switch",
                &usual,
                "switched (ms)",
                "switched / usual",
                "",
            ],
            &rows,
        )
    }
}
