//! A generation as JSON for scripts: one document at its end, or one line for each event.
//!
//! Events: `prompt` (once, before anything is computed), `token` (each, with the text that it completes), `text`
//! (the text that was held back until the end, if any), `done` (once; the document without steps).

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::decode::{Generation, Piece, Session, Step};

/// Milliseconds. `ttft_ms` counts from the first prompt token fed, `tpot_ms` is the mean of all tokens but the first,
/// `sampling_ms` is the mean time of the sampler chain per token.
#[derive(Serialize)]
struct Timing {
    #[serde(skip_serializing_if = "Option::is_none")]
    load_ms: Option<f64>,
    ttft_ms: f64,
    tpot_ms: f64,
    tokens_per_s: f64,
    sampling_ms: f64,
}

impl Timing {
    fn new(generation: &Generation, load: Option<Duration>) -> Self {
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let tpot = generation.timing.tpot();
        let draws = generation.tokens.len().max(1) as u32;
        Timing {
            load_ms: load.map(ms),
            ttft_ms: ms(generation.timing.ttft),
            tpot_ms: tpot.map(ms).unwrap_or(0.0),
            tokens_per_s: tpot.map_or(0.0, |t| (1e3 / t.as_secs_f64()).round() / 1e3),
            sampling_ms: ms(generation.timing.sampling / draws),
        }
    }
}

/// The result at the end.
#[derive(Serialize)]
pub struct Summary<'a> {
    text: &'a str,
    finish_reason: &'static str,
    /// Prompt tokens that were already cached.
    cached_tokens: usize,
    device: String,
    engine: String,
    seed: u64,
    timing: Timing,
}

impl<'a> Summary<'a> {
    pub fn new(generation: &'a Generation, session: &Session, seed: u64, load: Option<Duration>) -> Self {
        Summary {
            text: &generation.text,
            finish_reason: generation.finish_reason.name(),
            cached_tokens: generation.reused,
            device: session.device().name().to_string(),
            engine: session.device().engine(),
            seed,
            timing: Timing::new(generation, load),
        }
    }
}

/// `generate --json`.
#[derive(Serialize)]
pub struct Document<'a> {
    pub prompt_ids: &'a [u32],
    pub tokens: &'a [u32],
    #[serde(serialize_with = "steps")]
    pub steps: &'a [Step],
    #[serde(flatten)]
    pub summary: Summary<'a>,
}

#[derive(Serialize)]
struct StepDocument<'a> {
    token: u32,
    logprob: f64,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    top_logprobs: &'a [(u32, f64)],
}

impl<'a> From<&'a Step> for StepDocument<'a> {
    fn from(step: &'a Step) -> Self {
        StepDocument {
            token: step.token,
            logprob: step.logprob,
            top_logprobs: &step.top_logprobs,
        }
    }
}

fn steps<S: serde::Serializer>(steps: &&[Step], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(steps.iter().map(StepDocument::from))
}

/// A line of `--json-lines`.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event<'a> {
    Prompt {
        prompt_ids: &'a [u32],
        seed: u64,
    },
    Token {
        token: u32,
        text: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprob: Option<f64>,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        top_logprobs: &'a [(u32, f64)],
    },
    Text {
        text: &'a str,
    },
    Done {
        tokens: &'a [u32],
        #[serde(flatten)]
        summary: Summary<'a>,
    },
}

impl<'a> From<Piece<'a>> for Event<'a> {
    fn from(piece: Piece<'a>) -> Self {
        match piece.token {
            None => Event::Text { text: piece.text },
            Some(token) => Event::Token {
                token,
                text: piece.text,
                logprob: piece.step.map(|s| s.logprob),
                top_logprobs: piece.step.map_or(&[], |s| &s.top_logprobs),
            },
        }
    }
}

impl Event<'_> {
    /// Writes it as one line and flushes.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        writeln!(out)?;
        out.flush()
    }
}

/// A summary line for users, after the text.
pub fn summary_line(prompt: usize, generation: &Generation) -> String {
    let t = &generation.timing;
    let rate = t.tpot().map(|tpot| {
        let seconds = tpot.as_secs_f64();
        format!(" at {:.1} ms/token ({:.1} tokens/s)", seconds * 1e3, 1.0 / seconds)
    });
    let cached = match generation.reused {
        0 => String::new(),
        n => format!(" ({n} cached)"),
    };
    format!(
        "{prompt} prompt tokens{cached}, time to first token {:.0} ms; {} tokens{}; finish reason: {}",
        t.ttft.as_secs_f64() * 1e3,
        generation.tokens.len(),
        rate.unwrap_or_default(),
        generation.finish_reason.name()
    )
}
