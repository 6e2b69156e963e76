//! Ablations: runs that are tagged as one, and runs of Lapidary whose settings differ in one key.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::benchmarks::Verdict;
use super::input::{Group, ResultFile, SourceId};
use super::markdown::{ms, times};
use super::matrix::{Cell, matrix};
use super::measure::Measure;
use crate::bench::Document;

/// One setting: a baseline, and runs with other values of it. Runs that resemble another baseline form another ablation
/// of the same name.
#[derive(Clone, Debug)]
pub struct Ablation<'a> {
    /// Name of the switch.
    pub name: String,
    pub baseline: &'a ResultFile,
    /// Position and run.
    pub runs: Vec<(String, &'a ResultFile)>,
}

/// Redundant settings: the first follows from the second.
const FOLLOWS: [(&str, &str); 4] = [
    ("refit", "weights"),
    ("capacities", "cache"),
    ("prefill_chunks", "shapes"),
    ("prefill_range", "shapes"),
];

type Found<'a> = BTreeMap<(String, SourceId), Ablation<'a>>;

/// If the two have something in common.
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

/// Measurements that two runs share.
fn common(a: &Document, b: &Document) -> Vec<Measure> {
    let measured = Measure::all(b).into_iter();
    measured.filter(|m| m.of(a).is_some()).collect()
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
        // The untagged runs that are most similar; several if each differs in one setting.
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
                let position = choices(&other.of.system.settings).get(key).copied();
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

/// Keys with different values, without those that follow from another one, and without the tag itself. The lowering's
/// choices count individually if both files have them; older files do not.
fn differing(a: &Map<String, Value>, b: &Map<String, Value>) -> Vec<String> {
    let (a, b) = (choices(a), choices(b));
    let lowered = |side: &BTreeMap<String, &Value>| side.keys().any(|key| is_lowering(key));
    let both_lowered = lowered(&a) && lowered(&b);
    let keys: BTreeSet<&String> = a
        .keys()
        .chain(b.keys())
        .filter(|key| both_lowered || !is_lowering(key))
        .collect();
    let keys: Vec<&String> = keys.into_iter().filter(|k| a.get(*k) != b.get(*k)).collect();
    let follows = |key: &String| {
        FOLLOWS
            .iter()
            .any(|(what, of)| key == what && keys.iter().any(|k| k == of))
    };
    keys.iter().filter(|k| !follows(k)).map(|k| k.to_string()).collect()
}

fn is_lowering(key: &str) -> bool {
    key.starts_with("lowering.")
}

/// Settings by name, without the tag; those of the lowering one by one, as `lowering.attention`.
fn choices(settings: &Map<String, Value>) -> BTreeMap<String, &Value> {
    let of = |(key, value)| -> Vec<(String, &Value)> {
        let key: &String = key;
        let value: &Value = value;
        match value.as_object() {
            Some(lowering) if key == "lowering" => lowering
                .iter()
                .map(|(choice, value)| (format!("{key}.{choice}"), value))
                .collect(),
            _ => vec![(key.clone(), value)],
        }
    };
    settings
        .iter()
        .filter(|(key, _)| *key != "ablation")
        .flat_map(of)
        .collect()
}

impl Ablation<'_> {
    /// `cuda_graphs, against Lapidary (true)`
    pub fn title(&self) -> String {
        let usual = self.usual().map(|usual| format!(" ({usual})")).unwrap_or_default();
        format!("{}, against {}{usual}", self.name, self.baseline.of.system.label)
    }

    /// The switch's position in the baseline, if its settings have it.
    pub fn usual(&self) -> Option<String> {
        choices(&self.baseline.of.system.settings)
            .get(&self.name)
            .copied()
            .map(plain)
    }

    /// A row for the default and each other value, a column for each measurement that the baseline shares with a run.
    pub fn table(&self, group: &Group) -> String {
        let all = self.runs.iter().flat_map(|(_, run)| common(&self.baseline.of, &run.of));
        let mut measures: Vec<Measure> = all.collect();
        measures.sort_unstable();
        measures.dedup();
        let row = |position: String, r: &ResultFile| {
            let cell = |m: &Measure| -> Cell {
                let (default, default_stable) = m.of(&self.baseline.of)?;
                let (took, stable) = m.of(&r.of)?;
                let is_default = r.source == self.baseline.source;
                let mut notes: Vec<String> = (!is_default).then(|| times(took / default)).into_iter().collect();
                notes.extend((!stable || !default_stable).then(|| "unstable".to_string()));
                let text = match notes.is_empty() {
                    true => ms(took),
                    false => format!("{} ({})", ms(took), notes.join(", ")),
                };
                Some((text, vec![r.source]))
            };
            let keys = vec![position, Verdict::of(r, group).word()];
            (keys, measures.iter().map(cell).collect())
        };
        let default = format!("default{}", self.usual().map(|u| format!(" ({u})")).unwrap_or_default());
        let rows = std::iter::once(row(default, self.baseline));
        let rows = rows.chain(self.runs.iter().map(|(position, run)| row(position.clone(), run)));
        let heads: Vec<String> = measures.iter().map(|m| m.what()).collect();
        matrix(&[&self.name, "outputs"], &heads, rows.collect())
    }

    /// A sentence: the value that changes the time of the first measurement most.
    pub fn outcome(&self) -> String {
        let ratios = self.runs.iter().filter_map(|(position, run)| {
            let m = *common(&self.baseline.of, &run.of).first()?;
            let ratio = m.of(&run.of)?.0 / m.of(&self.baseline.of)?.0;
            Some((position, m, ratio))
        });
        let most = ratios.max_by(|a, b| (a.2.ln().abs()).total_cmp(&b.2.ln().abs()));
        most.map_or(String::new(), |(position, m, ratio)| {
            format!("With *{position}*, {} is {} the default's.", m.what(), times(ratio))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn choices_of_the_lowering_count_one_by_one_where_both_have_them() {
        let of = |value: Value| value.as_object().unwrap().clone();
        let usual = of(json!({"weights": "bind", "lowering": {"attention": "by_capacity", "fold_groups": true}}));
        let layer = of(json!({"weights": "bind", "lowering": {"attention": "layer", "fold_groups": true}}));
        let before = of(json!({"weights": "bind"}));
        assert_eq!(differing(&usual, &layer), ["lowering.attention"]);
        assert!(differing(&usual, &before).is_empty() && differing(&before, &layer).is_empty());
        let stripped = of(json!({"weights": "strip", "refit": "general"}));
        assert_eq!(differing(&before, &stripped), ["weights"]);
        let identical = of(json!({"weights": "strip", "refit": "identical"}));
        assert_eq!(differing(&identical, &stripped), ["refit"]);
    }
}
