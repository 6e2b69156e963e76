//! Quality and size: perplexity and divergence by format, one table per text.
//!
//! Results are in one table if they scored the same tokens in the same windows. Times come from bench results of the
//! same weights.

use super::input::{Input, ResultFile, Sourced};
use super::markdown::{MISSING, cite, cite_all, ms, percent, table};
use crate::bench::quality::result::Perplexity;
use crate::terms::{KL, PERPLEXITY, TOP1, TPOT};
use crate::units::bytes;

/// Results for one text with the same windows.
pub struct Text<'i> {
    pub results: Vec<&'i Sourced<Perplexity>>,
}

/// The tables, in the order of their first files.
pub fn texts(input: &Input) -> Vec<Text<'_>> {
    let mut texts: Vec<Text<'_>> = Vec::new();
    for result in &input.quality {
        let same = |text: &&mut Text<'_>| comparable(&text.results[0].of, &result.of);
        match texts.iter_mut().find(same) {
            Some(text) => text.results.push(result),
            None => texts.push(Text { results: vec![result] }),
        }
    }
    for text in &mut texts {
        // Most bytes first: the source of the others.
        text.results
            .sort_by_key(|r| (std::cmp::Reverse(r.of.model.weight_bytes), r.of.model.name.clone()));
    }
    texts
}

/// Whether both scored the same tokens with the same context.
fn comparable(a: &Perplexity, b: &Perplexity) -> bool {
    let cut = |d: &Perplexity| {
        (
            d.text.blake3.clone(),
            d.tokens,
            d.scored,
            d.prefix.clone(),
            d.window,
            d.stride,
        )
    };
    cut(a) == cut(b)
}

impl Text<'_> {
    pub fn title(&self) -> String {
        let d = &self.results[0].of;
        let begin = match d.prefix.len() {
            0 => "nothing put before them".to_string(),
            1 => "each after a first token".to_string(),
            n => format!("each after {n} first tokens"),
        };
        let marks = cite_all(self.results.iter().map(|r| r.source));
        format!(
            "{}, {} tokens scored, in windows of {} every {}, {begin}.{marks}",
            d.text.file, d.scored, d.window, d.stride
        )
    }

    pub fn table(&self, input: &Input) -> String {
        let rows = self.results.iter().map(|r| {
            let d = &r.of;
            let (divergence, best) = match &d.against {
                None => (MISSING.to_string(), MISSING.to_string()),
                Some(other) => (
                    format!("{:.5} ± {:.5} of {}", other.kl.mean, other.kl.error, other.model.name),
                    percent(other.same_best),
                ),
            };
            let (time, timed) = match decode(input, d) {
                None => (MISSING.to_string(), String::new()),
                Some((result, ms_a_token, live)) => (format!("{} (after {live})", ms(ms_a_token)), cite(result.source)),
            };
            vec![
                d.model.name.clone(),
                d.model.format.clone(),
                bytes(d.model.weight_bytes),
                format!("{:.3} ± {:.3}", d.surprise.perplexity, d.surprise.perplexity_error),
                divergence,
                best,
                time,
                cite(r.source) + &timed,
            ]
        });
        let header = [
            "model",
            "format",
            "weights",
            PERPLEXITY.column,
            KL.column,
            TOP1.column,
            TPOT.column,
            "",
        ];
        table(&header, &rows.collect::<Vec<_>>())
    }
}

/// Lapidary's bench result for these weights, with the time per output token at the smallest measured context.
fn decode<'i>(input: &'i Input, d: &Perplexity) -> Option<(&'i ResultFile, f64, usize)> {
    let results = input.groups.iter().flat_map(|group| &group.results);
    // One hash for all precisions of the same weights.
    let same = |r: &&ResultFile| r.of.model.weights_hash == d.model.weights_hash && r.of.model.dtype == d.model.dtype;
    let ours = results.filter(|r| r.of.system.name == "lapidary").filter(same);
    let timed = ours.filter_map(|r| {
        let shortest = r.of.decode.iter().min_by_key(|decode| decode.live)?;
        Some((r, shortest.ms.median, shortest.live))
    });
    // The same weights may have been measured on several machines and by several settings.
    timed.min_by(|a, b| a.1.total_cmp(&b.1))
}

/// Missing data of the tables.
pub fn missing(input: &Input) -> Vec<String> {
    if input.quality.is_empty() {
        return vec![
            "no result of `lapidary perplexity` was given: what formats do to a model's answers is not shown".into(),
        ];
    }
    let mut out = Vec::new();
    for text in texts(input) {
        if text.results.iter().all(|r| r.of.against.is_none()) && text.results.len() > 1 {
            let file = &text.results[0].of.text.file;
            out.push(format!(
                "{file}: no result compares with another model (`--against`), so no divergence is shown"
            ));
        }
        for r in text.results.iter().filter(|r| decode(input, &r.of).is_none()) {
            let name = &r.of.model.name;
            out.push(format!(
                "{name}: no bench result of the same weights, so the time per output token is not shown{}",
                cite(r.source)
            ));
        }
    }
    out
}
