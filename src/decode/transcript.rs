//! The output of drawn tokens: text, log-probabilities, and the finish reason.

use super::generate::{FinishReason, Limits, Step};
use crate::sample::logprobs::Logprobs;
use crate::text::{TextStream, Tokenizer, TokenizerError};

/// The tokens drawn so far for one prompt.
pub struct Transcript<'t> {
    limits: Limits,
    stream: Option<TextStream<'t>>,
    tokens: Vec<u32>,
    text: String,
    steps: Vec<Step>,
    stopped_by_string: bool,
}

/// The result of one token.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Added {
    /// Often one word; empty inside a character, inside what may be a stop string, and without a tokenizer.
    pub text: String,
    /// Set if no further token is to be drawn.
    pub end: Option<FinishReason>,
}

impl<'t> Transcript<'t> {
    /// Nothing drawn yet. Stop strings need a tokenizer.
    pub fn new(tokenizer: Option<&'t Tokenizer>, limits: Limits) -> Self {
        Transcript {
            stream: tokenizer.map(|tokenizer| TextStream::new(tokenizer, limits.stop.iter().cloned())),
            limits,
            tokens: Vec::new(),
            text: String::new(),
            steps: Vec::new(),
            stopped_by_string: false,
        }
    }

    /// Conditions to stop.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
    /// Every token, including an end token.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
    /// The final text, up to a stop string.
    pub fn text(&self) -> &str {
        &self.text
    }
    /// One per token, if log-probabilities were requested.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Adds a token that was drawn from these logits, `[vocabulary]`, which may be empty if no log-probabilities were
    /// requested.
    pub fn push(&mut self, token: u32, logits: &[f32]) -> Result<Added, TokenizerError> {
        self.tokens.push(token);
        if let Some(n) = self.limits.logprobs {
            let logprobs = Logprobs::new(logits);
            self.steps.push(Step {
                token,
                logprob: logprobs.of(token),
                top_logprobs: logprobs.top(n),
            });
        }
        let ended = self.limits.eos_ids.contains(&token);
        let mut added = Added::default();
        if let (Some(stream), false) = (&mut self.stream, ended) {
            let shown = stream.push(token)?;
            self.stopped_by_string = shown.stopped;
            added.text = shown.text;
        }
        self.text.push_str(&added.text);
        added.end = match ended || self.stopped_by_string {
            true => Some(FinishReason::Stop),
            false => (self.tokens.len() >= self.limits.max_new_tokens).then_some(FinishReason::Length),
        };
        Ok(added)
    }

    /// Text that was held back and is final now that no token follows. It may complete a stop string.
    pub fn finish(&mut self) -> Result<Added, TokenizerError> {
        let mut added = Added::default();
        if let (Some(stream), false) = (&mut self.stream, self.stopped_by_string) {
            let shown = stream.finish()?;
            added.end = shown.stopped.then_some(FinishReason::Stop);
            added.text = shown.text;
        }
        self.text.push_str(&added.text);
        Ok(added)
    }

    /// Tokens, text and steps.
    pub fn into_parts(self) -> (Vec<u32>, String, Vec<Step>) {
        (self.tokens, self.text, self.steps)
    }
}
