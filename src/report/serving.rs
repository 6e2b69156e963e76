//! Throughput and latency of the server's scheduler against the number of concurrent clients.

use super::input::{Input, Sourced};
use super::markdown::{MISSING, cite, ms, rate, table, times};
use crate::bench::serving::Serving;
use crate::terms::{ITL, OUTPUT_RATE, TTFT};

/// `prompts of 128 tokens, 64 generated, NVIDIA H200`
pub fn title(s: &Serving) -> String {
    format!(
        "prompts of {} tokens, {} generated, {}",
        s.prompt_tokens, s.new_tokens, s.device
    )
}

/// The package's name, or the file's if several packages have the same name.
pub fn name(input: &Input, s: &Sourced<Serving>) -> String {
    let same = input.serving.iter().filter(|other| other.of.package == s.of.package);
    match same.count() {
        1 => s.of.package.clone(),
        _ => {
            let stem = input.path(s.source).file_stem().unwrap_or_default();
            stem.to_string_lossy().into_owned()
        }
    }
}

/// Factor over the tokens per second of one client, or of the first level if one client was not measured.
pub fn scale(s: &Serving, tokens_per_s: f64) -> f64 {
    let first = &s.levels[0];
    tokens_per_s / (first.tokens_per_s / first.clients as f64)
}

/// A row for each result and number of clients.
pub fn serving(input: &Input) -> String {
    let rows = input
        .serving
        .iter()
        .flat_map(|s| s.of.levels.iter().map(move |level| (s, level)));
    let rows = rows.map(|(s, level)| {
        let itl = |of: fn(&crate::bench::Summary) -> f64| {
            level.itl_ms.as_ref().map_or(MISSING.to_string(), |itl| ms(of(itl)))
        };
        vec![
            name(input, s),
            level.clients.to_string(),
            rate(level.tokens_per_s),
            times(scale(&s.of, level.tokens_per_s)),
            format!("{:.1}", level.tokens_per_step),
            ms(level.ttft_ms.p50),
            ms(level.ttft_ms.p99),
            itl(|itl| itl.p50),
            itl(|itl| itl.p99),
            cite(s.source),
        ]
    });
    let header = [
        "package",
        "clients",
        OUTPUT_RATE.column,
        "of one client",
        "tokens/step",
        &format!("{} p50", TTFT.column),
        "p99",
        &format!("{} p50", ITL.column),
        "p99",
        "",
    ];
    table(&header, &rows.collect::<Vec<_>>())
}

/// A sentence for all results with the same requests on the same device.
pub fn titles(input: &Input) -> String {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for s in &input.serving {
        let day = s.of.date.split('T').next().unwrap_or(&s.of.date);
        let title = format!("{} ({}, {day})", title(&s.of), s.of.engine);
        let name = name(input, s) + &cite(s.source);
        match found.iter_mut().find(|(known, _)| *known == title) {
            Some((_, names)) => names.push(name),
            None => found.push((title, vec![name])),
        }
    }
    let sentence = |(title, names): &(String, Vec<String>)| format!("{}: {title}.", names.join(", "));
    found.iter().map(sentence).collect::<Vec<_>>().join(" ")
}
