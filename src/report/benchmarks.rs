//! Answers and times of the groups of one machine: tables with a column for each model.

use super::ceilings::Ceilings;
use super::input::{Group, ResultFile};
use super::markdown::{cite, flops, ms, or_missing, percent, rate, table, times, tiny};
use super::matrix::{Cell, heads, labeled, labels, matrix};
use super::measure::{Measure, Time};
use crate::bench::compare::{CompareError, Comparison, compare};
use crate::bench::result::Document;
use crate::terms::{
    CAPACITY, CONTEXT_LENGTH, GPU_TIME, HOST_OVERHEAD, MBU, MFU, OUTPUT_RATE, PREFILL, PREFILL_RATE, TPOT, TTFT,
};
use crate::units::bytes;

/// Whether a system's answers equal the reference's.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Computed here from both files.
    Compared(Comparison),
    /// By the program that wrote the result, if the reference is not among the files.
    Recorded(Comparison),
    None(&'static str),
}

impl Verdict {
    pub fn of(result: &ResultFile, group: &Group) -> Verdict {
        let recorded = result.of.outputs.as_ref().and_then(|o| o.reference.clone());
        let Some(reference) = &group.reference else {
            return recorded.map_or(Verdict::None("no reference"), Verdict::Recorded);
        };
        match compare(&result.of, &reference.of) {
            Ok(found) => Verdict::Compared(found),
            Err(CompareError::NoOutputs(_)) => Verdict::None("not recorded"),
            Err(CompareError::Prompts) => Verdict::None("other prompts"),
            Err(CompareError::NoRows) => Verdict::None("no logits in common"),
        }
    }

    pub fn comparison(&self) -> Option<&Comparison> {
        match self {
            Verdict::Compared(found) | Verdict::Recorded(found) => Some(found),
            Verdict::None(_) => None,
        }
    }

    /// The verdict, with the number of rows of logits.
    pub fn word(&self) -> String {
        let (found, note) = match self {
            Verdict::Compared(found) => (found, ""),
            Verdict::Recorded(found) => (found, ", as recorded"),
            Verdict::None(why) => return why.to_string(),
        };
        let word = if found.equal { "equal" } else { "**not equal**" };
        format!("{word} ({} rows{note})", found.rows)
    }
}

pub fn unstable(stable: bool) -> String {
    if stable { "" } else { "unstable" }.to_string()
}

/// Each system, each model: the verdict, the worst row of logits, how often both rank the same token first.
pub fn answers(groups: &[&Group]) -> String {
    let cell = |group: &Group, label: &str| -> Cell {
        let r = labeled(group, label)?;
        let verdict = Verdict::of(r, group);
        let numbers = verdict.comparison().map_or(String::new(), |c| {
            let error = tiny(c.worst_relative_logit_error);
            let clear = match c.differing_though_clear {
                0 => String::new(),
                n => format!(", clear disagreements: {n}"),
            };
            format!(": {error} of {}, {} of {}{clear}", c.limit, c.same_best, c.rows)
        });
        let sources = [r.source].into_iter().chain(group.reference.iter().map(|r| r.source));
        Some((verdict.word() + &numbers, sources.collect()))
    };
    let row = |label: &str| (vec![label.to_string()], groups.iter().map(|g| cell(g, label)).collect());
    matrix(
        &["system"],
        &heads(groups),
        labels(groups).into_iter().map(row).collect(),
    )
}

/// Each measurement of one kind and each system, for each model.
fn side_by_side(
    groups: &[&Group],
    first: [&str; 2],
    key: impl Fn(Measure) -> Option<String>,
) -> (String, Vec<(Measure, String)>) {
    let all = Measure::union(groups.iter().flat_map(|g| &g.results));
    let kind: Vec<(Measure, String)> = all.into_iter().filter_map(|m| Some((m, key(m)?))).collect();
    let mut rows = Vec::new();
    for (m, key) in &kind {
        for label in labels(groups) {
            let cell = |group: &&Group| -> Cell {
                let r = labeled(group, label)?;
                Some((Time::of(*m, r, group)?.cell(), vec![r.source]))
            };
            let keys = vec![key.clone(), label.to_string()];
            rows.push((keys, groups.iter().map(cell).collect()));
        }
    }
    (matrix(&first, &heads(groups), rows), kind)
}

/// A table below a descriptive sentence; empty without measurements.
fn introduced(sentence: &str, groups: &[&Group], (table, kind): (String, Vec<(Measure, String)>)) -> String {
    match table.is_empty() {
        true => String::new(),
        false => format!("{sentence}{}\n\n{table}", outcome(groups, &kind)),
    }
}

/// How Lapidary compares with the fastest other system in each model and measurement.
fn outcome(groups: &[&Group], kind: &[(Measure, String)]) -> String {
    let mut factors: Vec<f64> = Vec::new();
    for group in groups {
        for (m, _) in kind {
            let others = group.results.iter().filter(|r| r.of.system.name != "lapidary");
            let found = others.filter_map(|r| Time::of(*m, r, group)?.factor);
            factors.extend(found.min_by(f64::total_cmp));
        }
    }
    if factors.is_empty() {
        return String::new();
    }
    let faster = factors.iter().filter(|f| **f >= 1.0).count();
    let least = factors.iter().copied().fold(f64::INFINITY, f64::min);
    let most = factors.iter().copied().fold(0.0, f64::max);
    let range = match factors.len() {
        1 => times(least),
        _ => format!("{} to {}", times(least), times(most)),
    };
    format!(
        " Lapidary is the fastest in {faster} of {} comparisons; the fastest other system takes {range} its time.",
        factors.len()
    )
}

/// Median time per output token by context length.
pub fn decode(groups: &[&Group]) -> String {
    let first = [CONTEXT_LENGTH.column, "system"];
    let key = |m| match m {
        Measure::Token(live) => Some(live.to_string()),
        _ => None,
    };
    let sentence = "Time per output token in ms: compare the systems of one context.";
    introduced(sentence, groups, side_by_side(groups, first, key))
}

/// Median time to first token by prompt length.
pub fn prefill(groups: &[&Group]) -> String {
    let key = |m| match m {
        Measure::Prompt(tokens) => Some(tokens.to_string()),
        _ => None,
    };
    let sentence = "Time to first token in ms, by tokens of the prompt.";
    introduced(sentence, groups, side_by_side(groups, [PREFILL.column, "system"], key))
}

/// Median latency of whole texts.
pub fn end_to_end(groups: &[&Group]) -> String {
    let key = |m| match m {
        Measure::Text(prompt, new) => Some(format!("{prompt} + {new}")),
        _ => None,
    };
    let sentence = "Latency in ms of a whole text: a prompt, then greedy tokens.";
    introduced(
        sentence,
        groups,
        side_by_side(groups, ["prompt + output", "system"], key),
    )
}

/// Lapidary's decode steps: tail latency, the host's part, the share of the bandwidth.
pub fn decode_of_ours(groups: &[&Group]) -> String {
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for (group, head) in groups.iter().zip(heads(groups)) {
        let Some(r) = group.ours() else { continue };
        let ceilings = Ceilings::of(group);
        for d in &r.of.decode {
            rows.push(vec![
                head.clone(),
                d.live.to_string(),
                ms(d.ms.median),
                ms(d.ms.p90),
                ms(d.ms.p99),
                or_missing(d.gpu_ms.map(ms)),
                or_missing(d.gpu_ms.map(|gpu| ms((d.ms.median - gpu).max(0.0)))),
                rate(d.output_tokens_per_s),
                or_missing(ceilings.mbu(&r.of, d).map(percent)),
                or_missing(d.capacity.map(|c| c.to_string())),
                unstable(d.stable) + &cite(r.source),
            ]);
            if ceilings.mbu(&r.of, d).is_some() {
                notes.push(format!("{head}: {}", ceilings.bandwidth_note()));
            }
        }
    }
    let header = [
        "model",
        CONTEXT_LENGTH.column,
        TPOT.column,
        "p90",
        "p99",
        GPU_TIME.column,
        HOST_OVERHEAD.column,
        OUTPUT_RATE.column,
        MBU.column,
        CAPACITY.column,
        "",
    ];
    with_notes(table(&header, &rows), notes)
}

/// Lapidary's prefill: tail latency, and the share of the peak.
pub fn prefill_of_ours(groups: &[&Group]) -> String {
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for (group, head) in groups.iter().zip(heads(groups)) {
        let Some(r) = group.ours() else { continue };
        let ceilings = Ceilings::of(group);
        for p in &r.of.prefill {
            rows.push(vec![
                head.clone(),
                p.tokens.to_string(),
                ms(p.ms.median),
                ms(p.ms.p90),
                ms(p.ms.p99),
                rate(p.prefill_tokens_per_s),
                or_missing(ceilings.mfu(&r.of, p).map(percent)),
                unstable(p.stable) + &cite(r.source),
            ]);
            if ceilings.mfu(&r.of, p).is_some() {
                notes.push(format!("{head}: {}", ceilings.peak_note()));
            }
        }
    }
    let header = [
        "model",
        PREFILL.column,
        TTFT.column,
        "p90",
        "p99",
        PREFILL_RATE.column,
        MFU.column,
        "",
    ];
    with_notes(table(&header, &rows), notes)
}

/// Distinct sentences below a table.
fn with_notes(table: String, mut notes: Vec<String>) -> String {
    notes.dedup();
    match notes.is_empty() {
        true => table,
        false => format!("{table}\n{}\n", notes.join(" ")),
    }
}

/// What was run when, with which versions.
pub fn conditions(groups: &[&Group]) -> String {
    let all = |group: &'_ Group| -> Vec<ResultFile> {
        let measured = group.reference.iter().chain(&group.results).chain(&group.ablations);
        measured.cloned().collect()
    };
    let runs: Vec<Vec<ResultFile>> = groups.iter().map(|g| all(g)).collect();
    let mut labels: Vec<&str> = Vec::new();
    for r in runs.iter().flatten() {
        if !labels.contains(&r.of.system.label.as_str()) {
            labels.push(&r.of.system.label);
        }
    }
    let row = |label: &str| {
        let found: Vec<Option<&ResultFile>> = runs
            .iter()
            .map(|runs| runs.iter().find(|r| r.of.system.label == label))
            .collect();
        let cell = |r: &Option<&ResultFile>| -> Cell {
            let r = (*r)?;
            Some((format!("{}, {}", day(&r.of), commit(&r.of)), vec![r.source]))
        };
        let mut versions: Vec<String> = found.iter().flatten().flat_map(|r| versions(&r.of)).collect();
        versions.sort_unstable();
        versions.dedup();
        (
            vec![label.to_string(), versions.join(", ")],
            found.iter().map(cell).collect(),
        )
    };
    let table = matrix(
        &["run", "versions"],
        &heads(groups),
        labels.into_iter().map(row).collect(),
    );
    format!("{table}\n{}\n", machines(groups))
}

pub fn day(d: &Document) -> &str {
    d.date.split('T').next().unwrap_or(&d.date)
}

/// Twelve digits, and `+` for uncommitted changes.
pub fn commit(d: &Document) -> String {
    d.commit.chars().take(12).collect::<String>() + if d.commit.ends_with("+changes") { "+" } else { "" }
}

pub fn versions(d: &Document) -> Vec<String> {
    let driver = d.machine.gpu.as_ref().and_then(|gpu| gpu.driver.as_ref());
    let known = d
        .versions
        .iter()
        .filter_map(|(name, version)| Some((name.as_str(), version.as_ref()?)));
    let all = known.chain(driver.map(|driver| ("driver", driver)));
    all.map(|(name, version)| format!("{name} {version}")).collect()
}

/// A sentence for each model: the machine's properties measured by its runs.
fn machines(groups: &[&Group]) -> String {
    let range = |values: Vec<f64>, show: &dyn Fn(f64) -> String| -> Option<String> {
        let least = values.iter().copied().min_by(f64::total_cmp)?;
        let most = values.iter().copied().max_by(f64::total_cmp)?;
        let (least, most) = (show(least), show(most));
        Some(if least == most {
            least
        } else {
            format!("{least} to {most}")
        })
    };
    let sentence = |group: &&Group| {
        let all: Vec<&ResultFile> = group
            .reference
            .iter()
            .chain(&group.results)
            .chain(&group.ablations)
            .collect();
        let bandwidths = all.iter().filter_map(|r| r.of.machine.copy_bandwidth_bytes_per_s);
        let peaks = all.iter().filter_map(|r| Some(r.of.machine.peak_flops.as_ref()?.flops));
        let mut sources: Vec<&str> = all
            .iter()
            .filter_map(|r| Some(r.of.machine.peak_flops.as_ref()?.source.as_str()))
            .collect();
        sources.sort_unstable();
        sources.dedup();
        let bandwidth = range(bandwidths.collect(), &|b| format!("{}/s", bytes(b as u64)));
        let peak = range(peaks.collect(), &flops).map(|peak| format!("peak {peak} ({})", sources.join("; ")));
        let found: Vec<String> = bandwidth
            .map(|b| format!("copy bandwidth {b}"))
            .into_iter()
            .chain(peak)
            .collect();
        format!("{} {}: {}.", group.model, group.dtype, found.join(", "))
    };
    groups.iter().map(sentence).collect::<Vec<_>>().join(" ")
}
