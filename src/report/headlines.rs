//! The first page: one table with a column for each peer, and where Lapidary is slower.

use std::collections::HashSet;

use super::benchmarks::day;
use super::input::{Group, Input, ResultFile, format};
use super::markdown::{cite, ms, times};
use super::matrix::{Cell, matrix};
use super::measure::{Measure, Time, objection};

/// Systems in the order of their columns: name in results, name in tables.
const SYSTEMS: [(&str, &str); 7] = [
    ("lapidary", "Lapidary"),
    ("onnxruntime-genai", "ONNX Runtime GenAI"),
    ("transformers", "transformers"),
    ("tensorrt-onnx-parser", "TensorRT's ONNX parser"),
    ("onnxruntime", "ONNX Runtime"),
    ("llama.cpp", "llama.cpp"),
    ("tract", "tract"),
];

/// A system's name in tables.
pub fn system(name: &str) -> &str {
    let known = SYSTEMS.iter().find(|(system, _)| *system == name);
    known.map_or(name, |(_, shown)| shown)
}

/// All systems of the groups, in the order of their columns.
pub fn systems<'a>(groups: &[&'a Group]) -> Vec<&'a str> {
    let mut names: Vec<&str> = groups
        .iter()
        .flat_map(|g| &g.results)
        .map(|r| r.of.system.name.as_str())
        .collect();
    let place = |name: &str| {
        SYSTEMS
            .iter()
            .position(|(known, _)| *known == name)
            .unwrap_or(SYSTEMS.len())
    };
    names.sort_by_key(|name| (place(name), *name));
    names.dedup();
    names
}

/// The groups for the first page: all with a result of Lapidary. GPUs first, largest model first, and the session with
/// peers first for each model.
pub fn leading(input: &Input) -> Vec<&Group> {
    let all = input.peers.iter().chain(&input.groups);
    let mut all: Vec<&Group> = all.filter(|g| g.ours().is_some()).collect();
    all.sort_by_key(|g| (!g.on_gpu, std::cmp::Reverse(g.parameters()), !g.peers));
    all
}

/// Groups with another system, except those whose systems are all in a session with peers.
fn compared(input: &Input) -> Vec<&Group> {
    let all = leading(input).into_iter();
    let is_covered = |g: &Group| {
        let session = input
            .peers
            .iter()
            .find(|peers| (&peers.model, &peers.device) == (&g.model, &g.device));
        let named = session.map(|session| systems(&[session]));
        named.is_some_and(|named| systems(&[g]).iter().all(|name| named.contains(name)))
    };
    all.filter(|g| systems(&[*g]).len() > 1 && (g.peers || !is_covered(g)))
        .collect()
}

/// A column for each system in its fastest mode, a row for each model and measurement. Empty if no model has a peer.
pub fn headlines(input: &Input) -> String {
    let groups = compared(input);
    let names = systems(&groups);
    let heads: Vec<String> = names.iter().map(|name| format!("{} ms", system(name))).collect();
    let mut rows = Vec::new();
    for group in &groups {
        for (of, ours) in formats(group) {
            for m in chosen(ours, group) {
                let cells: Vec<Cell> = names.iter().map(|name| fastest(group, &of, name, m)).collect();
                let mut model = format!("{} {of}, {}", group.model, group.device);
                // Measured on another day than the session with peers.
                if !group.peers
                    && groups
                        .iter()
                        .any(|g| g.peers && (&g.model, &g.device) == (&group.model, &group.device))
                {
                    model += &format!(", {}", day(&ours.of));
                }
                rows.push((vec![model, m.what()], cells));
            }
        }
    }
    matrix(&["model", "measurement"], &heads, rows)
}

/// Formats of Lapidary's weights, with the first result of each.
pub fn formats(group: &Group) -> Vec<(String, &ResultFile)> {
    let mut found: Vec<(String, &ResultFile)> = Vec::new();
    for r in group.results.iter().filter(|r| r.of.system.name == "lapidary") {
        let of = format_in(group, r);
        if !found.iter().any(|(known, _)| *known == of) {
            found.push((of, r));
        }
    }
    // The dtype of the arithmetic comes first.
    found.sort_by_key(|(of, _)| *of != group.dtype);
    found
}

/// A group that is not a session with peers has one format: its dtype.
pub fn format_in(group: &Group, r: &ResultFile) -> String {
    match group.peers {
        true => format(&r.of),
        false => group.dtype.clone(),
    }
}

/// A medium prompt length; the first page has the longest up to this.
const PROMPT: usize = 512;

/// A group's measurements on the first page: the shortest context and a prompt, and for a session with peers the
/// longest context too. Contexts are those with results from the most systems.
fn chosen(ours: &ResultFile, group: &Group) -> Vec<Measure> {
    let all = Measure::union([ours]);
    let tokens = all.iter().copied().filter(|m| matches!(m, Measure::Token(_)));
    let measured = |m: Measure| {
        let those = group.results.iter().filter(|r| Time::of(m, r, group).is_some());
        those.map(|r| &r.of.system.name).collect::<HashSet<_>>().len()
    };
    let tokens: Vec<(usize, Measure)> = tokens.map(|m| (measured(m), m)).collect();
    let most = tokens.iter().map(|(systems, _)| *systems).max();
    let tokens: Vec<Measure> = tokens
        .into_iter()
        .filter_map(|(systems, m)| (Some(systems) == most).then_some(m))
        .collect();
    let prompts: Vec<Measure> = all
        .iter()
        .copied()
        .filter(|m| matches!(m, Measure::Prompt(_)))
        .collect();
    let fitting = prompts
        .iter()
        .rev()
        .find(|m| matches!(m, Measure::Prompt(n) if *n <= PROMPT));
    let mut chosen: Vec<Measure> = tokens.first().into_iter().copied().collect();
    chosen.extend(tokens.last().filter(|_| group.peers));
    chosen.extend(fitting.or(prompts.first()));
    chosen.dedup();
    chosen
}

/// The fastest result of a system: among those whose answers equal the reference's if any, else among all.
fn fastest(group: &Group, of: &str, name: &str, m: Measure) -> Cell {
    let ours = group.ours().map(|r| r.source);
    let candidates = group
        .results
        .iter()
        .filter(|r| r.of.system.name == name && format_in(group, r) == of);
    // Other runs of Lapidary show the effect of a setting.
    let candidates = candidates.filter(|r| name != "lapidary" || group.peers || Some(r.source) == ours);
    let timed = candidates.filter_map(|r| Some((r, Time::of(m, r, group)?)));
    let (r, time) = timed.min_by(|(_, a), (_, b)| {
        let key = |t: &Time| (t.objection.is_some(), t.ms);
        let ((a_bad, a), (b_bad, b)) = (key(a), key(b));
        a_bad.cmp(&b_bad).then(a.total_cmp(&b))
    })?;
    let text = match name {
        "lapidary" => format!("**{}**{}", ms(time.ms), if time.stable { "" } else { " (unstable)" }),
        _ => time.cell(),
    };
    Some((text, vec![r.source]))
}

/// A sentence: where Lapidary is the fastest.
pub fn verdict(input: &Input) -> String {
    let (mut rows, mut fastest) = (0, 0);
    let (mut least, mut most) = (f64::INFINITY, 0.0f64);
    let groups = compared(input);
    if groups.is_empty() {
        return "No file has results of another system.".to_string();
    }
    for group in groups {
        for (of, ours) in formats(group) {
            for m in chosen(ours, group) {
                let others = group.results.iter().filter(|r| r.of.system.name != "lapidary");
                let like = others.filter(|r| format_in(group, r) == of);
                let factors = like.filter_map(|r| Time::of(m, r, group)?.factor);
                let Some(factor) = factors.min_by(f64::total_cmp) else {
                    continue;
                };
                rows += 1;
                fastest += usize::from(factor >= 1.0);
                (least, most) = (least.min(factor), most.max(factor));
            }
        }
    }
    match rows {
        0 => "No row could be compared: no other system gave the same answers.".to_string(),
        1 => format!("The fastest peer takes {} the time of Lapidary.", times(least)),
        _ => format!(
            "Lapidary is the fastest in {fastest} of {rows} rows; the fastest peer takes {} to {} its time.",
            times(least),
            times(most)
        ),
    }
}

/// Measurements in which others are faster, one line each.
pub fn slower(group: &Group) -> Vec<String> {
    let mut lines = Vec::new();
    for (of, ours) in formats(group) {
        for m in Measure::union([ours]) {
            let others = group.results.iter().filter(|r| r.of.system.name != "lapidary");
            let slower: Vec<String> = others
                .filter(|r| format_in(group, r) == of)
                .filter_map(|r| {
                    let (mine, _) = m.of(&ours.of)?;
                    let (took, stable) = m.of(&r.of).filter(|(took, _)| *took < mine)?;
                    let mut doubt = String::from(if stable { "" } else { ", unstable" });
                    // Quantized weights differ from the reference's.
                    if let Some(word) = objection(r, group).filter(|_| !group.peers || of == group.dtype) {
                        doubt += &format!(", outputs: {word}");
                    }
                    let (label, factor) = (&r.of.system.label, times(mine / took));
                    Some(format!(
                        "{factor} the time of {label} ({} ms{doubt}){}",
                        ms(took),
                        cite(r.source)
                    ))
                })
                .collect();
            if let (Some((mine, _)), false) = (m.of(&ours.of), slower.is_empty()) {
                let format = if group.peers { format!("{of}, ") } else { String::new() };
                let (what, mine) = (m.what(), ms(mine));
                lines.push(format!(
                    "{format}{what}: {mine} ms{}, {}",
                    cite(ours.source),
                    slower.join(", ")
                ));
            }
        }
    }
    lines
}
