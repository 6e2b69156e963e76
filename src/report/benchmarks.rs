//! The tables of a group: what systems answered, then how fast they were, side by side.

use super::ceilings::Ceilings;
use super::input::{Group, ResultFile};
use super::markdown::{MISSING, cite, flops, ms, or_missing, percent, rate, table, times, tiny};
use crate::bench::compare::{CompareError, Comparison, compare};
use crate::bench::result::{Decode, Document, EndToEnd, Prefill};
use crate::terms::{
    CAPACITY, CONTEXT_LENGTH, COPY_BANDWIDTH, GPU_TIME, LATENCY, MBU, MFU, OUTPUT_RATE, PREFILL, PREFILL_RATE, TOP1,
    TPOT, TTFT,
};
use crate::units::bytes;

/// Whether a system answers as the reference does.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Computed here, of both files.
    Compared(Comparison),
    /// By the program that wrote the result; the reference is not among the files.
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

    /// For the first column of tables: the verdict, and over how many rows of logits.
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

/// How many times as long as ours it takes.
fn ratio(value: f64, ours: Option<f64>, is_ours: bool) -> String {
    match ours {
        _ if is_ours => "1".to_string(),
        Some(ours) if ours > 0.0 => times(value / ours),
        _ => MISSING.to_string(),
    }
}

/// Every system once: what it is, and what it answered.
pub fn outputs(group: &Group) -> String {
    let rows = group.results.iter().chain(&group.ablations).map(|r| {
        let verdict = Verdict::of(r, group);
        let of_comparison = |of: fn(&Comparison) -> String| or_missing(verdict.comparison().map(of));
        vec![
            verdict.word(),
            r.of.system.label.clone(),
            of_comparison(|c| tiny(c.worst_relative_logit_error)),
            of_comparison(|c| c.limit.to_string()),
            of_comparison(|c| format!("{} of {}", c.same_best, c.rows)),
            of_comparison(|c| c.differing_though_clear.to_string()),
            of_comparison(|c| {
                let steps: Vec<String> = c.greedy_equal_up_to.iter().map(usize::to_string).collect();
                steps.join(", ")
            }),
            cite(r.source),
        ]
    });
    let header = [
        "outputs",
        "system",
        "worst relative logit error",
        "limit",
        TOP1.column,
        "clear disagreements",
        "greedy tokens equal up to",
        "",
    ];
    table(&header, &rows.collect::<Vec<_>>())
}

/// All values that a list of results has for something, ascending.
fn values<'a, T: Ord>(results: impl IntoIterator<Item = &'a ResultFile>, of: impl Fn(&Document) -> Vec<T>) -> Vec<T> {
    let mut all: Vec<T> = results.into_iter().flat_map(|r| of(&r.of)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

pub fn live_lengths<'a>(results: impl IntoIterator<Item = &'a ResultFile>) -> Vec<usize> {
    values(results, |d| d.decode.iter().map(|p| p.live).collect())
}

pub fn prompt_lengths<'a>(results: impl IntoIterator<Item = &'a ResultFile>) -> Vec<usize> {
    values(results, |d| d.prefill.iter().map(|p| p.tokens).collect())
}

pub fn texts<'a>(results: impl IntoIterator<Item = &'a ResultFile>) -> Vec<(usize, usize)> {
    values(results, |d| {
        d.end_to_end.iter().map(|e| (e.prompt, e.new_tokens)).collect()
    })
}

pub fn decode_at(d: &Document, live: usize) -> Option<&Decode> {
    d.decode.iter().find(|p| p.live == live)
}

pub fn prefill_of(d: &Document, tokens: usize) -> Option<&Prefill> {
    d.prefill.iter().find(|p| p.tokens == tokens)
}

pub fn text_of(d: &Document, (prompt, new): (usize, usize)) -> Option<&EndToEnd> {
    d.end_to_end.iter().find(|e| (e.prompt, e.new_tokens) == (prompt, new))
}

/// Each live length, each system.
pub fn decode(group: &Group) -> String {
    let ceilings = Ceilings::of(group);
    let mut rows = Vec::new();
    for live in live_lengths(&group.results) {
        let ours = group.ours().and_then(|r| decode_at(&r.of, live)).map(|d| d.ms.median);
        for r in &group.results {
            let Some(d) = decode_at(&r.of, live) else { continue };
            rows.push(vec![
                Verdict::of(r, group).word(),
                live.to_string(),
                r.of.system.label.clone(),
                ms(d.ms.median),
                ms(d.ms.p90),
                ms(d.ms.p99),
                or_missing(d.gpu_ms.map(ms)),
                rate(d.output_tokens_per_s),
                ratio(d.ms.median, ours, is_ours(group, r)),
                or_missing(ceilings.mbu(&r.of, d).map(percent)),
                or_missing(d.capacity.map(|c| c.to_string())),
                unstable(d.stable) + &cite(r.source),
            ]);
        }
    }
    let header = [
        "outputs",
        CONTEXT_LENGTH.column,
        "system",
        TPOT.column,
        "p90",
        "p99",
        GPU_TIME.column,
        OUTPUT_RATE.column,
        "relative to Lapidary",
        MBU.column,
        CAPACITY.column,
        "",
    ];
    let shares = rows.iter().any(|row| row[9] != MISSING);
    with_note(table(&header, &rows), shares, &ceilings.bandwidth_note())
}

/// A sentence below a table that has shares to speak of.
fn with_note(table: String, shares: bool, note: &str) -> String {
    match shares {
        true => format!("{table}\n{note}\n"),
        false => table,
    }
}

fn is_ours(group: &Group, r: &ResultFile) -> bool {
    group.ours().is_some_and(|ours| ours.source == r.source)
}

/// Each prompt length, each system.
pub fn prefill(group: &Group) -> String {
    let ceilings = Ceilings::of(group);
    let mut rows = Vec::new();
    for tokens in prompt_lengths(&group.results) {
        let ours = group
            .ours()
            .and_then(|r| prefill_of(&r.of, tokens))
            .map(|p| p.ms.median);
        for r in &group.results {
            let Some(p) = prefill_of(&r.of, tokens) else { continue };
            rows.push(vec![
                Verdict::of(r, group).word(),
                tokens.to_string(),
                r.of.system.label.clone(),
                ms(p.ms.median),
                ms(p.ms.p90),
                ms(p.ms.p99),
                rate(p.prefill_tokens_per_s),
                ratio(p.ms.median, ours, is_ours(group, r)),
                or_missing(ceilings.mfu(&r.of, p).map(percent)),
                unstable(p.stable) + &cite(r.source),
            ]);
        }
    }
    let header = [
        "outputs",
        PREFILL.column,
        "system",
        TTFT.column,
        "p90",
        "p99",
        PREFILL_RATE.column,
        "relative to Lapidary",
        MFU.column,
        "",
    ];
    let shares = rows.iter().any(|row| row[8] != MISSING);
    with_note(table(&header, &rows), shares, &ceilings.peak_note())
}

/// Each text, each system.
pub fn end_to_end(group: &Group) -> String {
    let mut rows = Vec::new();
    for text in texts(&group.results) {
        let ours = group
            .ours()
            .and_then(|r| text_of(&r.of, text))
            .map(|e| e.latency_ms.median);
        for r in &group.results {
            let Some(e) = text_of(&r.of, text) else { continue };
            rows.push(vec![
                Verdict::of(r, group).word(),
                format!("{} + {}", e.prompt, e.new_tokens),
                r.of.system.label.clone(),
                ms(e.ttft_ms.median),
                ms(e.tpot_ms.median),
                ms(e.itl_ms.median),
                ms(e.latency_ms.median),
                rate(e.output_tokens_per_s),
                ratio(e.latency_ms.median, ours, is_ours(group, r)),
                unstable(e.stable) + &cite(r.source),
            ]);
        }
    }
    let header = [
        "outputs",
        "prompt + output",
        "system",
        "TTFT ms",
        "TPOT ms",
        "ITL ms",
        LATENCY.column,
        OUTPUT_RATE.column,
        "relative to Lapidary",
        "",
    ];
    table(&header, &rows)
}

/// What ran where, once a result.
pub fn machines(group: &Group) -> String {
    let all = group.reference.iter().chain(&group.results).chain(&group.ablations);
    let rows = all.map(|r| {
        let d = &r.of;
        let versions: Vec<String> = d
            .versions
            .iter()
            .filter_map(|(name, version)| Some(format!("{name} {}", version.as_ref()?)))
            .collect();
        let driver = d.machine.gpu.as_ref().and_then(|gpu| gpu.driver.clone());
        vec![
            d.system.label.clone(),
            d.date.split('T').next().unwrap_or(&d.date).to_string(),
            d.commit.chars().take(12).collect::<String>() + if d.commit.ends_with("+changes") { "+" } else { "" },
            or_missing(driver),
            or_missing(
                d.machine
                    .copy_bandwidth_bytes_per_s
                    .map(|b| format!("{}/s", bytes(b as u64))),
            ),
            or_missing(d.machine.peak_flops.as_ref().map(|p| {
                let how = p.source.split(':').next().unwrap_or_default();
                format!("{}, {how}", flops(p.flops))
            })),
            versions.join(", "),
            cite(r.source),
        ]
    });
    let header = [
        "run",
        "date",
        "commit",
        "driver",
        COPY_BANDWIDTH.column,
        "peak",
        "versions",
        "",
    ];
    let mut out = table(&header, &rows.collect::<Vec<_>>());
    let measured = group.results.iter().chain(&group.ablations);
    let mut peaks: Vec<&str> = measured
        .filter_map(|r| Some(r.of.machine.peak_flops.as_ref()?.source.as_str()))
        .collect();
    peaks.sort_unstable();
    peaks.dedup();
    if !peaks.is_empty() {
        out += &format!("\nThe peak is {}.\n", peaks.join("; "));
    }
    out
}
