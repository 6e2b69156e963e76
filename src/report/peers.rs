//! Sessions that compare Lapidary with its peers, a column for each system; and quantized forms on the CPU.

use super::benchmarks::{Verdict, commit, day, versions};
use super::headlines::{format_in, formats, system, systems};
use super::input::{Group, Input, ResultFile, Sourced};
use super::markdown::{MISSING, cite, ms, table, times, tiny};
use super::matrix::{Cell, matrix};
use super::measure::{Measure, Time};
use crate::bench::compare::compare;
use crate::bench::side_by_side::{Row, SideBySide};

/// A column: its name and its results.
struct Column<'a> {
    head: String,
    name: &'a str,
    variant: Option<&'a str>,
}

/// One column per system, or per mode if a system was measured in several.
fn columns<'a>(groups: &[&'a Group]) -> Vec<Column<'a>> {
    let mut columns = Vec::new();
    for name in systems(groups) {
        let of = |g: &'a Group| g.results.iter().filter(move |r| r.of.system.name == name);
        let several = groups.iter().any(|g| {
            formats(g)
                .iter()
                .any(|(f, _)| of(g).filter(|r| format_in(g, r) == *f).count() > 1)
        });
        if !several {
            columns.push(Column {
                head: system(name).to_string(),
                name,
                variant: None,
            });
            continue;
        }
        let mut variants: Vec<&str> = groups
            .iter()
            .flat_map(|g| of(g))
            .map(|r| r.of.system.variant.as_str())
            .collect();
        variants.sort_unstable();
        variants.dedup();
        columns.extend(variants.into_iter().map(|variant| Column {
            head: format!("{}, {variant}", system(name)),
            name,
            variant: Some(variant),
        }));
    }
    columns
}

fn result<'a>(group: &'a Group, column: &Column<'_>, of: &str) -> Option<&'a ResultFile> {
    let named = |r: &&ResultFile| r.of.system.name == column.name && format_in(group, r) == of;
    let mut found = group.results.iter().filter(named);
    found.find(|r| column.variant.is_none_or(|variant| r.of.system.variant == variant))
}

/// All sessions of one machine: rows of answers, then of times, for each model and format.
fn session(groups: &[&Group]) -> String {
    let columns = columns(groups);
    let heads: Vec<String> = columns.iter().map(|c| format!("{} ms", c.head)).collect();
    let mut rows = Vec::new();
    for group in groups {
        for (of, ours) in formats(group) {
            let model = format!("{} {of}", group.model);
            let answer = |c: &Column<'_>| -> Cell {
                let r = result(group, c, &of)?;
                Some((answers(r, group, of != group.dtype), vec![r.source]))
            };
            rows.push((
                vec![model.clone(), "answers".to_string()],
                columns.iter().map(answer).collect(),
            ));
            for m in Measure::union([ours]) {
                let cell = |c: &Column<'_>| -> Cell {
                    let r = result(group, c, &of)?;
                    Some((Time::of(m, r, group)?.cell(), vec![r.source]))
                };
                rows.push((vec![model.clone(), m.what()], columns.iter().map(cell).collect()));
            }
        }
    }
    matrix(&["model", "measurement"], &heads, rows)
}

/// The verdict. Quantized weights differ from the reference's, so for them: top-1 agreement, and the distance of the
/// logits from Lapidary's, which may have the same codes.
fn answers(r: &ResultFile, group: &Group, quantized: bool) -> String {
    let verdict = Verdict::of(r, group);
    if !quantized {
        return verdict.word();
    }
    let mut found = match verdict.comparison() {
        Some(found) => format!("top-1 {} of {}", found.same_best, found.rows),
        None => verdict.word(),
    };
    let ours = group.ours_beside(r).filter(|ours| ours.source != r.source);
    if let Some(Ok(beside)) = ours.map(|ours| compare(&r.of, &ours.of)) {
        let error = tiny(beside.worst_relative_logit_error);
        found += &format!(
            "; of Lapidary's: {error}, top-1 {} of {}",
            beside.same_best, beside.rows
        );
    }
    found
}

/// A sentence about the runs and their dates.
fn runs(groups: &[&Group]) -> String {
    let mut runs: Vec<String> = Vec::new();
    for r in groups.iter().flat_map(|g| &g.results) {
        let versions = versions(&r.of).join(", ");
        let run = format!("{} ({}, {}, {versions})", r.of.system.label, day(&r.of), commit(&r.of));
        if !runs.contains(&run) {
            runs.push(run);
        }
    }
    format!("Runs: {}.", runs.join("; "))
}

/// A title and a table for each machine.
pub fn sessions(input: &Input) -> Vec<(String, String)> {
    let mut machines: Vec<Vec<&Group>> = Vec::new();
    for group in &input.peers {
        match machines.iter_mut().find(|m| m[0].device == group.device) {
            Some(machine) => machine.push(group),
            None => machines.push(vec![group]),
        }
    }
    machines
        .into_iter()
        .map(|mut groups| {
            groups.sort_by_key(|g| std::cmp::Reverse(g.parameters()));
            let table = session(&groups);
            let table = if table.is_empty() {
                table
            } else {
                format!("{table}\n{}\n", runs(&groups))
            };
            (groups[0].device.clone(), table)
        })
        .filter(|(_, table)| !table.is_empty())
        .collect()
}

/// Quantized forms: a row for each form and number of threads, a column for each system. `of` returns a cell.
fn forms(results: &[Sourced<SideBySide>], of: impl Fn(&Row, Option<&Row>) -> String) -> String {
    let mut names: Vec<&str> = results
        .iter()
        .flat_map(|r| {
            r.of.forms
                .values()
                .flat_map(|systems| systems.keys().map(String::as_str))
        })
        .collect();
    names.sort_by_key(|name| (*name != "lapidary", *name));
    names.dedup();
    let mut rows = Vec::new();
    for r in results {
        for (form, systems) in &r.of.forms {
            let ours = systems.get("lapidary");
            let cells = names.iter().map(|name| {
                let row = systems.get(*name);
                row.map_or(MISSING.to_string(), |row| of(row, ours.filter(|_| *name != "lapidary")))
            });
            let key = [r.of.model.clone(), form.clone(), r.of.threads.to_string()];
            rows.push(key.into_iter().chain(cells).chain([cite(r.source)]).collect());
        }
    }
    let shown = names.iter().map(|name| match name.split_once(' ') {
        Some((first, rest)) => format!("{} {rest}", system(first)),
        None => system(name).to_string(),
    });
    let header: Vec<String> = ["model", "form", "threads"]
        .map(String::from)
        .into_iter()
        .chain(shown)
        .collect();
    let header: Vec<&str> = header.iter().map(String::as_str).chain([""]).collect();
    table(&header, &rows)
}

fn beside(value: f64, ours: Option<f64>) -> String {
    match ours {
        Some(ours) => format!("{} ({})", ms(value), times(value / ours)),
        None => ms(value),
    }
}

/// Time per output token of quantized forms on the CPU.
pub fn quantized_tokens(input: &Input) -> String {
    forms(&input.side_by_side, |row, ours| {
        beside(row.tpot_ms, ours.map(|o| o.tpot_ms))
    })
}

/// Their time to first token.
pub fn quantized_prompts(input: &Input) -> String {
    forms(&input.side_by_side, |row, ours| {
        beside(row.ttft_ms, ours.map(|o| o.ttft_ms))
    })
}

/// Their peak memory, and how many tokens equal Lapidary's.
pub fn quantized_memory(input: &Input) -> String {
    forms(&input.side_by_side, |row, ours| {
        let memory = format!("{:.0} MB", row.peak_memory_mb);
        match ours {
            Some(_) => format!("{memory}, {} tokens equal", row.tokens_equal_to_lapidary),
            None => memory,
        }
    })
}

/// `prompts of 128 tokens, 64 generated, on AMD EPYC`, for each distinct one.
pub fn quantized_title(input: &Input) -> String {
    let mut titles: Vec<String> = input
        .side_by_side
        .iter()
        .map(|r| {
            format!(
                "prompt of {} tokens, {} generated, on {}",
                r.of.prompt, r.of.new, r.of.cpu
            )
        })
        .collect();
    titles.dedup();
    titles.join("; ")
}
