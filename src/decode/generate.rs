//! The generation loop: prefill, then one token after another until something ends it.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::session::{Session, SessionError};
use super::transcript::Transcript;
use crate::help::{Fault, Help};
use crate::sample::{BadLogits, Chain};
use crate::text::{Tokenizer, TokenizerError};

/// Conditions to stop, besides a full cache.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Maximum tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens that end the text; empty to ignore them.
    pub eos_ids: BTreeSet<u32>,
    /// Strings that end the text; they need a tokenizer. They may contain special tokens.
    pub stop: Vec<String>,
    /// Record a [`Step`] per token, with this many of the most probable tokens.
    pub logprobs: Option<usize>,
}

/// Why a generation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
    /// The largest cache is full.
    Capacity,
    /// The receiver of the pieces stopped it.
    Interrupted,
}

impl FinishReason {
    /// Its name in lower case, for events and results.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Capacity => "capacity",
            FinishReason::Interrupted => "interrupted",
        }
    }
}

/// One generated token. Log-probabilities are natural logarithms, of the model's own distribution before any sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its id.
    pub token: u32,
    /// Log-probability of this token.
    pub logprob: f64,
    /// Ids of the most probable tokens with their log-probabilities, the largest first.
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
    /// The part of these times in the sampler chain.
    pub sampling: Duration,
}

impl Timing {
    /// Mean time of one token after the first; `None` if there was none.
    pub fn tpot(&self) -> Option<Duration> {
        (self.decoded > 0).then(|| self.decode / self.decoded as u32)
    }
}

/// Result of a generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Prompt tokens that were already in the session's cache.
    pub reused: usize,
    /// Generated tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Their text without special tokens, up to a stop string. Empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One per token, if requested.
    pub steps: Vec<Step>,
    /// How long it took.
    pub timing: Timing,
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Feeding tokens failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The tokenizer cannot encode or decode.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The sampler chain found no token to draw.
    #[error("step {step}, the token at position {position}: {source}")]
    Draw {
        /// Generated tokens, from 1.
        step: usize,
        /// All tokens, from 0.
        position: usize,
        /// What is wrong with the logits.
        source: BadLogits,
    },
    /// The receiver of the pieces failed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl Help for GenerateError {
    fn fault(&self) -> Fault {
        match self {
            GenerateError::Session(error) => error.fault(),
            GenerateError::Tokenizer(error) => error.fault(),
            GenerateError::Draw { source, .. } => source.fault(),
            GenerateError::Output(_) => Fault::Machine,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            GenerateError::Session(error) => error.help(),
            GenerateError::Tokenizer(error) => error.help(),
            GenerateError::Draw { source, .. } => source.help(),
            GenerateError::Output(_) => None,
        }
    }
}

/// A streamed event: a token, and the text that it completes.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// If log-probabilities were requested.
    pub step: Option<&'a Step>,
    /// Often one word; empty inside a character, inside what may be a stop string, and without a tokenizer.
    pub text: &'a str,
}

/// The prompt of a generation.
#[derive(Clone, Copy, Debug)]
pub enum Prompt<'a> {
    /// Token ids, which become the session's whole sequence.
    Tokens(&'a [u32]),
    /// Embeddings, `[tokens, hidden]`, for a model that takes them: the session's earlier contents are dropped.
    Embeddings(&'a [f32]),
}

/// As [`stream`], for text only: `on_text` gets each piece as soon as it is final, never empty.
pub fn generate(
    session: &mut Session,
    tokenizer: Option<&Tokenizer>,
    prompt: &[u32],
    chain: &mut Chain,
    limits: &Limits,
    mut on_text: impl FnMut(&str) -> io::Result<()>,
) -> Result<Generation, GenerateError> {
    stream(session, tokenizer, prompt, chain, limits, |piece| {
        if !piece.text.is_empty() {
            on_text(piece.text)?;
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Makes the prompt the session's whole sequence (see [`Session::resume`]), and draws tokens until an end token, a stop
/// string, the limit, a full cache, or a `Break` from `on_piece`. An error from `on_piece` ends the run.
pub fn stream(
    session: &mut Session,
    tokenizer: Option<&Tokenizer>,
    prompt: &[u32],
    chain: &mut Chain,
    limits: &Limits,
    on_piece: impl FnMut(Piece<'_>) -> io::Result<ControlFlow<()>>,
) -> Result<Generation, GenerateError> {
    stream_prompt(session, tokenizer, Prompt::Tokens(prompt), chain, limits, on_piece)
}

/// As [`stream`], for any prompt.
pub fn stream_prompt(
    session: &mut Session,
    tokenizer: Option<&Tokenizer>,
    prompt: Prompt<'_>,
    chain: &mut Chain,
    limits: &Limits,
    mut on_piece: impl FnMut(Piece<'_>) -> io::Result<ControlFlow<()>>,
) -> Result<Generation, GenerateError> {
    let mut transcript = Transcript::new(tokenizer, limits.clone());
    let (mut reused, mut timing) = (0, Timing::default());
    let start = Instant::now();
    match prompt {
        Prompt::Tokens(tokens) => reused = session.resume(tokens)?,
        Prompt::Embeddings(rows) => {
            // Every token except the last is fed; tokens that cannot be are refused before the first draw.
            let no_table = session.embeddings().is_some_and(|e| e.tokens().is_none());
            if no_table && limits.max_new_tokens > 1 {
                return Err(SessionError::NoTable.into());
            }
            session.clear();
            session.feed_embeddings(rows)?;
        }
    }
    let mut first = start;
    let on_device = chain.is_argmax() && limits.logprobs.is_none();
    let mut drawn = None;
    let mut finish_reason = FinishReason::Length;
    while transcript.tokens().len() < limits.max_new_tokens {
        let token = match drawn {
            Some(token) => token,
            None => draw(session, chain, &mut timing, transcript.tokens().len())?,
        };
        if transcript.tokens().is_empty() {
            first = Instant::now();
            timing.ttft = first - start;
        } else {
            timing.decode = first.elapsed();
            timing.decoded += 1;
        }
        let added = transcript.push(token, session.logits())?;
        let flow = on_piece(Piece {
            token: Some(token),
            step: transcript.steps().last(),
            text: &added.text,
        })?;
        if added.end == Some(FinishReason::Stop) {
            finish_reason = FinishReason::Stop;
            break;
        }
        if flow.is_break() {
            finish_reason = FinishReason::Interrupted;
            break;
        }
        if added.end.is_some() {
            break;
        }
        if session.remaining() == 0 {
            finish_reason = FinishReason::Capacity;
            break;
        }
        if on_device {
            drawn = session.feed_best(&[token])?;
        } else {
            session.feed(&[token])?;
        }
    }
    let held_back = transcript.finish()?;
    finish_reason = held_back.end.unwrap_or(finish_reason);
    if !held_back.text.is_empty() {
        let _ = on_piece(Piece {
            token: None,
            step: None,
            text: &held_back.text,
        })?;
    }
    let (tokens, text, steps) = transcript.into_parts();
    Ok(Generation {
        reused,
        tokens,
        text,
        finish_reason,
        steps,
        timing,
    })
}

fn draw(session: &Session, chain: &mut Chain, timing: &mut Timing, drawn: usize) -> Result<u32, GenerateError> {
    let start = Instant::now();
    let token = chain.sample(session.logits(), session.tokens());
    timing.sampling += start.elapsed();
    token.map_err(|source| GenerateError::Draw {
        step: drawn + 1,
        position: session.len(),
        source,
    })
}
