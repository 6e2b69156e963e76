//! Measurements of a system, and their form in a table cell.

use super::benchmarks::Verdict;
use super::input::{Group, ResultFile};
use super::markdown::{ms, times};
use crate::bench::result::{Decode, Document, EndToEnd, Prefill};
use crate::terms;

/// One measurement of a system.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Measure {
    /// Time per output token, by context length.
    Token(usize),
    /// Time to first token, by tokens of the prompt.
    Prompt(usize),
    /// Latency, by tokens of the prompt and of the text.
    Text(usize, usize),
}

impl Measure {
    /// All measurements of a system.
    pub fn all(of: &Document) -> Vec<Measure> {
        let tokens = of.decode.iter().map(|d| Measure::Token(d.live));
        let prompts = of.prefill.iter().map(|p| Measure::Prompt(p.tokens));
        let texts = of.end_to_end.iter().map(|e| Measure::Text(e.prompt, e.new_tokens));
        tokens.chain(prompts).chain(texts).collect()
    }

    /// All measurements of any result, in order.
    pub fn union<'a>(results: impl IntoIterator<Item = &'a ResultFile>) -> Vec<Measure> {
        let mut all: Vec<Measure> = results.into_iter().flat_map(|r| Measure::all(&r.of)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// With its unit: `ms/token at context 300`.
    pub fn what(self) -> String {
        match self {
            Measure::Token(live) => terms::token_at(live),
            Measure::Prompt(tokens) => terms::first_token_of(tokens),
            Measure::Text(prompt, new) => format!("{}, {prompt} + {new} tokens", terms::LATENCY.column),
        }
    }

    /// Milliseconds (the median), and whether they are stable.
    pub fn of(self, d: &Document) -> Option<(f64, bool)> {
        match self {
            Measure::Token(live) => decode_at(d, live).map(|d| (d.ms.median, d.stable)),
            Measure::Prompt(tokens) => prefill_of(d, tokens).map(|p| (p.ms.median, p.stable)),
            Measure::Text(prompt, new) => text_of(d, (prompt, new)).map(|e| (e.latency_ms.median, e.stable)),
        }
    }
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

/// A system's time, compared with Lapidary's.
pub struct Time {
    pub ms: f64,
    pub stable: bool,
    /// Factor over Lapidary's, if Lapidary measured the same and the answers of both are comparable.
    pub factor: Option<f64>,
    /// Why there is no factor even though Lapidary measured the same.
    pub objection: Option<String>,
}

impl Time {
    pub fn of(m: Measure, r: &ResultFile, group: &Group) -> Option<Time> {
        let (ms, stable) = m.of(&r.of)?;
        let ours = group.ours_beside(r).filter(|ours| ours.source != r.source);
        let both = ours.and_then(|ours| Some((ours, m.of(&ours.of)?.0)));
        // A session with peers has its own row of answers, and answers with quantized weights differ by design.
        let against = match group.peers {
            true => None,
            false => both.and_then(|(ours, _)| objection(r, group).or_else(|| objection(ours, group))),
        };
        Some(Time {
            ms,
            stable,
            factor: both.filter(|_| against.is_none()).map(|(_, base)| ms / base),
            objection: against,
        })
    }

    /// `2.283 (1.90 ×, unstable)`
    pub fn cell(&self) -> String {
        let mut notes: Vec<String> = self.factor.map(times).into_iter().collect();
        notes.extend(self.objection.as_ref().map(|word| format!("outputs: {word}")));
        notes.extend((!self.stable).then(|| "unstable".to_string()));
        match notes.is_empty() {
            true => ms(self.ms),
            false => format!("{} ({})", ms(self.ms), notes.join(", ")),
        }
    }
}

/// Why a system's times are not comparable: its answers differ from the reference's, or were not compared.
pub fn objection(r: &ResultFile, group: &Group) -> Option<String> {
    let verdict = Verdict::of(r, group);
    match verdict.comparison() {
        Some(found) if found.equal => None,
        _ => Some(verdict.word()),
    }
}
