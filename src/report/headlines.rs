//! Headlines: Lapidary compared with each other system, and where Lapidary is slower.

use super::benchmarks::{Verdict, decode_at, prefill_of, text_of};
use super::input::{Group, ResultFile};
use super::markdown::{cite, ms, or_missing, table, times};
use crate::bench::result::Document;
use crate::terms;

/// One thing that is measured of a system.
#[derive(Clone, Copy)]
enum Measure {
    /// Live tokens.
    Token(usize),
    /// Tokens of the prompt.
    Prompt(usize),
    /// Tokens of the prompt, and new ones.
    Text(usize, usize),
}

impl Measure {
    /// All of a system.
    fn all(of: &Document) -> Vec<Measure> {
        let tokens = of.decode.iter().map(|d| Measure::Token(d.live));
        let prompts = of.prefill.iter().map(|p| Measure::Prompt(p.tokens));
        let texts = of.end_to_end.iter().map(|e| Measure::Text(e.prompt, e.new_tokens));
        tokens.chain(prompts).chain(texts).collect()
    }

    fn what(self) -> String {
        match self {
            Measure::Token(live) => terms::token_at(live),
            Measure::Prompt(tokens) => terms::first_token_of(tokens),
            Measure::Text(prompt, new) => format!("latency ms, {prompt} + {new} tokens"),
        }
    }

    /// Milliseconds, and whether they held still.
    fn of(self, d: &Document) -> Option<(f64, bool)> {
        match self {
            Measure::Token(live) => decode_at(d, live).map(|d| (d.ms.median, d.stable)),
            Measure::Prompt(tokens) => prefill_of(d, tokens).map(|p| (p.ms.median, p.stable)),
            Measure::Text(prompt, new) => text_of(d, (prompt, new)).map(|e| (e.latency_ms.median, e.stable)),
        }
    }

    /// The same, with the times of `base` that they are.
    fn beside(self, d: &Document, base: &Document) -> Option<(f64, bool, f64)> {
        let (mine, _) = self.of(base)?;
        let (took, stable) = self.of(d)?;
        Some((took, stable, took / mine))
    }
}

/// The group's other systems.
fn others(group: &Group) -> impl Iterator<Item = &ResultFile> {
    group.results.iter().filter(|r| r.of.system.name != "lapidary")
}

/// What there is against comparing a system's times: its answers are not the reference's, or were not compared.
fn objection(r: &ResultFile, group: &Group) -> Option<String> {
    let verdict = Verdict::of(r, group);
    match verdict.comparison() {
        Some(found) if found.equal => None,
        _ => Some(verdict.word()),
    }
}

/// A column for each thing measured, a row for each system: milliseconds, and how many times ours they are where both answer
/// as the reference does. Nothing without another system.
pub fn headlines(group: &Group) -> String {
    let Some(ours) = group.ours() else {
        return String::new();
    };
    let measures = Measure::all(&ours.of);
    let row = |r: &ResultFile| -> Vec<String> {
        let (is_ours, against) = (r.source == ours.source, objection(r, group));
        let comparable = !is_ours && against.is_none() && objection(ours, group).is_none();
        let label = match is_ours {
            true => format!("**{}**", r.of.system.label),
            false => r.of.system.label.clone(),
        };
        let label = label + &against.map_or(String::new(), |word| format!(" (outputs: {word})"));
        let cells = measures.iter().map(|m| {
            let (took, stable, factor) = m.beside(&r.of, &ours.of)?;
            let mut notes = Vec::new();
            notes.extend(comparable.then(|| times(factor)));
            notes.extend((!stable).then(|| "unstable".to_string()));
            Some(match notes.is_empty() {
                true => ms(took),
                false => format!("{} ({})", ms(took), notes.join(", ")),
            })
        });
        let cells = cells.map(or_missing);
        std::iter::once(label).chain(cells).chain([cite(r.source)]).collect()
    };
    let rows: Vec<Vec<String>> = std::iter::once(ours).chain(others(group)).map(row).collect();
    if rows.len() == 1 {
        return String::new();
    }
    let what: Vec<String> = measures.iter().map(|m| m.what()).collect();
    let header = std::iter::once("system (factor: relative to Lapidary)")
        .chain(what.iter().map(String::as_str))
        .chain([""]);
    table(&header.collect::<Vec<_>>(), &rows)
}

/// What others did in less time, a line for each.
pub fn slower(group: &Group) -> Vec<String> {
    let Some(ours) = group.ours() else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    for m in Measure::all(&ours.of) {
        let slower: Vec<String> = others(group)
            .filter_map(|r| {
                let (took, stable, factor) = m.beside(&r.of, &ours.of).filter(|(.., factor)| *factor < 1.0)?;
                let mut doubt = String::from(if stable { "" } else { ", unstable" });
                if let Some(word) = objection(r, group) {
                    doubt += &format!(", outputs: {word}");
                }
                let (label, factor) = (&r.of.system.label, times(1.0 / factor));
                Some(format!(
                    "{factor} the time of {label} ({} ms{doubt}){}",
                    ms(took),
                    cite(r.source)
                ))
            })
            .collect();
        if let (Some((mine, _)), false) = (m.of(&ours.of), slower.is_empty()) {
            lines.push(format!(
                "{}: {} ms{}, {}",
                m.what(),
                ms(mine),
                cite(ours.source),
                slower.join(", ")
            ));
        }
    }
    lines
}
