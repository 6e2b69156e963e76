//! Tables with a column per model, for groups on one machine.

use super::input::{Group, Input, ResultFile, SourceId};
use super::markdown::{MISSING, cite_all, table};

/// Text of a cell, and its source files.
pub type Cell = Option<(String, Vec<SourceId>)>;

/// Groups of each machine, GPUs first; the largest model first.
pub fn by_machine(input: &Input) -> Vec<Vec<&Group>> {
    let mut machines: Vec<Vec<&Group>> = Vec::new();
    for group in &input.groups {
        match machines.iter_mut().find(|m| m[0].device == group.device) {
            Some(machine) => machine.push(group),
            None => machines.push(vec![group]),
        }
    }
    for machine in &mut machines {
        machine.sort_by_key(|g| std::cmp::Reverse(g.parameters()));
    }
    machines.sort_by_key(|m| !m[0].on_gpu);
    machines
}

/// `llama-8b fp16`, for the head of a column.
pub fn heads(groups: &[&Group]) -> Vec<String> {
    groups.iter().map(|g| format!("{} {}", g.model, g.dtype)).collect()
}

/// Labels of all results, Lapidary's first.
pub fn labels<'a>(groups: &[&'a Group]) -> Vec<&'a str> {
    let mut labels: Vec<(bool, &str)> = groups
        .iter()
        .flat_map(|g| &g.results)
        .map(|r| (r.of.system.name != "lapidary", r.of.system.label.as_str()))
        .collect();
    labels.sort_unstable();
    labels.dedup();
    labels.into_iter().map(|(_, label)| label).collect()
}

/// The result with this label.
pub fn labeled<'a>(group: &'a Group, label: &str) -> Option<&'a ResultFile> {
    group.results.iter().find(|r| r.of.system.label == label)
}

/// A table with the columns `first` and `heads`, and footnotes in the last. Empty rows and columns are left out.
pub fn matrix(first: &[&str], heads: &[String], rows: Vec<(Vec<String>, Vec<Cell>)>) -> String {
    let rows: Vec<_> = rows
        .into_iter()
        .filter(|(_, cells)| cells.iter().any(Option::is_some))
        .collect();
    let filled: Vec<usize> = (0..heads.len())
        .filter(|c| rows.iter().any(|(_, cells)| cells[*c].is_some()))
        .collect();
    let lines: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(keys, cells)| {
            let sources = cells.iter().flatten().flat_map(|(_, sources)| sources.iter().copied());
            let cited = cite_all(sources);
            let text = |c: &usize| cells[*c].as_ref().map_or(MISSING.to_string(), |(text, _)| text.clone());
            keys.into_iter().chain(filled.iter().map(text)).chain([cited]).collect()
        })
        .collect();
    let header = first.iter().copied();
    let header = header.chain(filled.iter().map(|c| heads[*c].as_str())).chain([""]);
    table(&header.collect::<Vec<_>>(), &lines)
}
