//! The generation loop: prefill, then one token after another until something ends it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::session::{Session, SessionError};
use super::text::{Detokenizer, StopMatcher};
use super::tokenizer::{Tokenizer, TokenizerError};
use crate::sample::logprobs::Logprobs;
use crate::sample::{BadLogits, Chain};

/// When to end, besides a full cache.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub max_new_tokens: usize,
    /// Tokens that end the text; empty to ignore them.
    pub eos_ids: BTreeSet<u32>,
    /// Strings that end the text; they need a tokenizer.
    pub stop: Vec<String>,
    /// Record a [`Step`] a token, with this many of the most probable tokens.
    pub logprobs: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
    /// The largest cache is full.
    Capacity,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Capacity => "capacity",
        }
    }
}

/// One generated token. Log-probabilities are natural, of the model's own distribution before any sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub token: u32,
    pub logprob: f64,
    pub top_logprobs: Vec<(u32, f64)>,
}

/// Wall-clock times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// From the first prompt token fed to the first token drawn.
    pub ttft: Duration,
    /// From the first token drawn to the last.
    pub decode: Duration,
    /// Tokens drawn after the first.
    pub decoded: usize,
}

impl Timing {
    /// Mean time of one token after the first; `None` if there was none.
    pub fn tpot(&self) -> Option<Duration> {
        (self.decoded > 0).then(|| self.decode / self.decoded as u32)
    }
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Generated tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Their text without special tokens, up to a stop string. Empty without a tokenizer.
    pub text: String,
    pub finish_reason: FinishReason,
    /// One a token, if they were asked for.
    pub steps: Vec<Step>,
    pub timing: Timing,
}

#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// `step` counts generated tokens from 1, `position` all tokens from 0.
    #[error("step {step}, the token at position {position}: {source}")]
    Draw {
        step: usize,
        position: usize,
        source: BadLogits,
    },
    #[error("the output was closed: {0}")]
    Output(#[from] std::io::Error),
}

/// Feeds the prompt and draws tokens until an end token, a stop string, the limit or a full cache. `on_text` gets text
/// as it becomes certain, never empty; an error from it ends the run.
pub fn generate(
    session: &mut Session,
    tokenizer: Option<&Tokenizer>,
    prompt: &[u32],
    chain: &mut Chain,
    limits: &Limits,
    mut on_text: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Generation, GenerateError> {
    let mut detokenizer = tokenizer.map(Detokenizer::new);
    let mut stops = StopMatcher::new(limits.stop.iter().cloned());
    let mut out = Generation {
        tokens: Vec::new(),
        text: String::new(),
        finish_reason: FinishReason::Length,
        steps: Vec::new(),
        timing: Timing::default(),
    };
    let mut show = |out: &mut Generation, text: &str| -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        out.text.push_str(text);
        on_text(text)
    };

    let start = Instant::now();
    session.feed(prompt)?;
    let mut first = start;
    let mut stopped_by_string = false;
    while out.tokens.len() < limits.max_new_tokens {
        let token = chain
            .sample(session.logits(), session.tokens())
            .map_err(|source| GenerateError::Draw {
                step: out.tokens.len() + 1,
                position: session.tokens().len(),
                source,
            })?;
        if out.tokens.is_empty() {
            first = Instant::now();
            out.timing.ttft = first - start;
        } else {
            out.timing.decode = first.elapsed();
            out.timing.decoded += 1;
        }
        out.tokens.push(token);
        if let Some(n) = limits.logprobs {
            let logprobs = Logprobs::new(session.logits());
            out.steps.push(Step {
                token,
                logprob: logprobs.of(token),
                top_logprobs: logprobs.top(n),
            });
        }

        if limits.eos_ids.contains(&token) {
            out.finish_reason = FinishReason::Stop;
            break;
        }
        if let Some(detokenizer) = &mut detokenizer {
            let shown = stops.push(&detokenizer.push(token)?);
            show(&mut out, &shown.text)?;
            if shown.stopped {
                (out.finish_reason, stopped_by_string) = (FinishReason::Stop, true);
                break;
            }
        }
        if out.tokens.len() == limits.max_new_tokens {
            break;
        }
        if session.room() == 0 {
            out.finish_reason = FinishReason::Capacity;
            break;
        }
        session.feed(&[token])?;
    }
    if let Some(detokenizer) = &mut detokenizer
        && !stopped_by_string
    {
        // The last bytes may complete a stop string too.
        let shown = stops.push(&detokenizer.finish()?);
        show(&mut out, &shown.text)?;
        if shown.stopped {
            out.finish_reason = FinishReason::Stop;
        } else {
            show(&mut out, &stops.finish())?;
        }
    }
    Ok(out)
}
