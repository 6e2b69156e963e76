//! One sequence on one device: its tokens, its cache, and the cache's current capacity.
//!
//! The cache grows like a `Vec`: a session starts in the smallest of the package's capacities that holds its prompt and
//! moves to the next when full, so the cost of a step depends on the context length, not on the largest capacity.

use std::fmt;
use std::time::{Duration, Instant};

use super::device::{Chunk, Device, DeviceError, best};
use super::embeddings::Embeddings;
use super::instruments::Instruments;
use crate::help::{Fault, Help};

/// Why tokens cannot be fed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No token was given.
    #[error("the prompt is empty: there is nothing to predict from")]
    Empty,
    /// A token outside the model's vocabulary.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocabulary} (ids 0 to {})", vocabulary - 1)]
    OutsideVocabulary {
        /// The token.
        id: u32,
        /// Its position, from 0.
        position: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Token ids for a model that takes embeddings and has no table of them.
    #[error("the model takes embeddings, and the package has no table that gives them for tokens")]
    NoTable,
    /// Embeddings for a model that takes token ids.
    #[error("the model takes token ids, not embeddings")]
    TakesTokens,
    /// Embeddings after tokens.
    #[error("embeddings must be fed before any token, but {tokens} tokens were fed")]
    EmbeddingsAfterTokens {
        /// Number of them.
        tokens: usize,
    },
    /// The number of values is not a multiple of the row length.
    #[error("{found} elements of embeddings are not a multiple of {width}, the model's elements per token")]
    EmbeddingWidth {
        /// Number of values.
        found: usize,
        /// Values of each token.
        width: usize,
    },
    /// More tokens than the largest cache has slots.
    #[error("{tokens} tokens do not fit the largest cache capacity of this package, {capacity}")]
    Capacity {
        /// All tokens.
        tokens: usize,
        /// Slots of the largest cache.
        capacity: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Help for SessionError {
    fn fault(&self) -> Fault {
        match self {
            SessionError::Device(error) => error.fault(),
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        let help = match self {
            SessionError::Device(error) => return error.help(),
            SessionError::Empty => "give at least one token",
            SessionError::OutsideVocabulary { .. } => "check that the ids are of this model's tokenizer",
            SessionError::NoTable => {
                "convert the model again with --embeddings FILE (embed_tokens.onnx, the checkpoint, or a .npy of \
                 [vocabulary, hidden]); without it a prompt of embeddings gives one token: --max-new-tokens 1"
            }
            SessionError::TakesTokens => "give token ids or text",
            SessionError::EmbeddingsAfterTokens { .. } => "start a new session",
            SessionError::EmbeddingWidth { .. } => "give an array [tokens, hidden] of this model",
            SessionError::Capacity { .. } => "shorten the prompt, or convert the model again with a larger --capacity",
        };
        Some(help.to_string())
    }
}

/// See the module's head.
pub struct Session {
    device: Box<dyn Device>,
    /// Ascending.
    capacities: Vec<usize>,
    vocabulary: usize,
    capacity: usize,
    /// Positions before the first token, which were fed as embeddings.
    embedded: usize,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    /// `None`: the model takes token ids.
    embeddings: Option<Embeddings>,
    /// Logits of the last call.
    rows: Vec<f32>,
    moves: usize,
    moving: Duration,
    /// The longest run that the model computes as a short one, if it computes long ones differently.
    longest_short_run: Option<usize>,
    /// Leading tokens with keys of short runs.
    short: usize,
}

impl Session {
    /// `capacities` must not be empty; order and repetition do not matter. `vocabulary` is the row length of the logits.
    pub fn new(device: Box<dyn Device>, capacities: &[usize], vocabulary: usize) -> Self {
        let mut capacities = capacities.to_vec();
        capacities.sort_unstable();
        capacities.dedup();
        assert!(!capacities.is_empty(), "a package has at least one capacity");
        Session {
            device,
            capacities,
            vocabulary,
            capacity: 0,
            embedded: 0,
            tokens: Vec::new(),
            logits: Vec::new(),
            embeddings: None,
            rows: Vec::new(),
            moves: 0,
            moving: Duration::ZERO,
            longest_short_run: None,
            short: 0,
        }
    }

    /// The same for a model that takes embeddings.
    pub fn with_embeddings(self, embeddings: Option<Embeddings>) -> Self {
        Session { embeddings, ..self }
    }

    /// For a model that computes runs that end after this position differently, as with LongRoPE: [`Session::resume`]
    /// reuses only tokens that were computed like the new run.
    pub fn with_switch(mut self, longest_short_run: Option<usize>) -> Self {
        self.longest_short_run = longest_short_run;
        self
    }

    /// Name of the device.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }
    /// See [`Device::instruments`].
    pub fn instruments(&mut self) -> Option<&mut dyn Instruments> {
        self.device.instruments()
    }
    /// Its embeddings; `None` if the model takes token ids.
    pub fn embeddings(&self) -> Option<&Embeddings> {
        self.embeddings.as_ref()
    }
    /// Number of used positions: embeddings and tokens fed so far.
    pub fn len(&self) -> usize {
        self.embedded + self.tokens.len()
    }
    /// Whether nothing is fed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Every token fed so far; embeddings fed before them are not in it.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
    /// Logits after the last token fed, `[vocabulary]`; empty before the first, and if [`Session::feed_best`] did not
    /// need them.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
    /// Row length of the logits.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }
    /// Slots of the current cache; 0 before the first token.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
    /// Slots of the largest cache that the package allows.
    pub fn largest_capacity(&self) -> usize {
        *self.capacities.last().expect("checked in new")
    }
    /// Tokens that can still be fed.
    pub fn remaining(&self) -> usize {
        self.largest_capacity() - self.len()
    }
    /// Number of moves of the cache to a larger capacity, and their total time.
    pub fn moves(&self) -> (usize, Duration) {
        (self.moves, self.moving)
    }

    /// Forgets all tokens; the cache stays allocated.
    pub fn clear(&mut self) {
        self.embedded = 0;
        self.tokens.clear();
        self.logits.clear();
    }

    /// Forgets all tokens and releases the cache: the next tokens start in the smallest capacity that fits, as in a new
    /// session. Everything loaded stays loaded.
    pub fn restart(&mut self) {
        self.clear();
        self.capacity = 0;
    }

    /// Feeds tokens and computes the logits after the last of them. On an error nothing was fed, unless the device
    /// failed on a later chunk.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], SessionError> {
        self.advance(tokens, false)?;
        debug_assert_eq!(self.logits.len(), self.vocabulary);
        Ok(&self.logits)
    }

    /// As [`Session::feed`], for a greedy choice: the id of the largest logit, the lowest among equals. The logits may
    /// stay on the device. `None` if there is no such id; [`Session::logits`] then has the reason.
    pub fn feed_best(&mut self, tokens: &[u32]) -> Result<Option<u32>, SessionError> {
        self.advance(tokens, true)
    }

    /// As [`Session::feed`], with the logits after every token: they replace the contents of `logits`, `[tokens,
    /// vocabulary]`. The caller must bound the memory for a whole vocabulary per token.
    pub fn feed_all(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), SessionError> {
        logits.clear();
        self.check(tokens)?;
        self.reserve(self.len() + tokens.len())?;
        self.logits.clear();
        let mut rest = tokens;
        while !rest.is_empty() {
            let position = self.len();
            let chunk = match self.embeddings {
                None => self.device.chunk_all(rest.len(), position, self.capacity),
                Some(_) => Chunk {
                    end: position + rest.len(),
                    ..self.device.chunk(1, position, self.capacity)
                },
            };
            debug_assert!(chunk.tokens >= 1 && chunk.tokens <= chunk.rows);
            let (now, later) = rest.split_at(chunk.tokens);
            match &self.embeddings {
                None => self.device.forward_all(chunk, now, position, logits)?,
                Some(embeddings) => {
                    embeddings.rows(now, &mut self.rows);
                    self.device
                        .forward_rows(chunk, &self.rows, position, &mut self.logits)?;
                    logits.append(&mut self.logits);
                }
            }
            self.fed(now, chunk.end);
            rest = later;
        }
        debug_assert_eq!(logits.len(), tokens.len() * self.vocabulary);
        self.logits.extend_from_slice(&logits[logits.len() - self.vocabulary..]);
        Ok(())
    }

    fn advance(&mut self, tokens: &[u32], only_best: bool) -> Result<Option<u32>, SessionError> {
        self.check(tokens)?;
        self.reserve(self.len() + tokens.len())?;
        let mut rest = tokens;
        let mut best = None;
        while !rest.is_empty() {
            let position = self.len();
            let chunk = self.device.chunk(rest.len(), position, self.capacity);
            debug_assert!(chunk.tokens >= 1 && chunk.tokens <= chunk.rows);
            debug_assert!(position + chunk.rows <= self.capacity);
            let (now, later) = rest.split_at(chunk.tokens);
            let done = match only_best {
                _ if self.embeddings.is_some() => self.forward_tokens(chunk, now, position),
                true => self.device.forward_best(chunk, now, position, &mut self.logits),
                false => self
                    .device
                    .forward(chunk, now, position, &mut self.logits)
                    .map(|()| None),
            };
            best = done.inspect_err(|_| self.logits.clear())?;
            self.fed(now, chunk.end);
            rest = later;
        }
        Ok(best)
    }

    /// Feeds a chunk of tokens to a model that takes embeddings, as rows of its table; returns the id of the largest
    /// logit.
    fn forward_tokens(&mut self, chunk: Chunk, tokens: &[u32], position: usize) -> Result<Option<u32>, DeviceError> {
        if let Some(embeddings) = &self.embeddings {
            embeddings.rows(tokens, &mut self.rows);
        }
        self.device
            .forward_rows(chunk, &self.rows, position, &mut self.logits)?;
        Ok(best(&self.logits))
    }

    /// Feeds embeddings, `[tokens, width]`, and computes the logits after the last of them: for a model that takes
    /// embeddings, before any token. On an error nothing was fed, unless the device failed on a later chunk.
    pub fn feed_embeddings(&mut self, rows: &[f32]) -> Result<&[f32], SessionError> {
        self.check_embeddings(rows)?;
        let width = self.embeddings.as_ref().expect("checked").width();
        let mut rest = rows;
        self.reserve(self.len() + rows.len() / width)?;
        while !rest.is_empty() {
            let position = self.len();
            let chunk = self.device.chunk(rest.len() / width, position, self.capacity);
            let (now, later) = rest.split_at(chunk.tokens * width);
            let done = self.device.forward_rows(chunk, now, position, &mut self.logits);
            done.inspect_err(|_| self.logits.clear())?;
            self.embedded += chunk.tokens;
            rest = later;
        }
        Ok(&self.logits)
    }

    /// Whether these embeddings could be fed now; feeds nothing.
    pub fn check_embeddings(&self, rows: &[f32]) -> Result<(), SessionError> {
        let Some(embeddings) = &self.embeddings else {
            return Err(SessionError::TakesTokens);
        };
        let width = embeddings.width();
        if !self.tokens.is_empty() {
            return Err(SessionError::EmbeddingsAfterTokens {
                tokens: self.tokens.len(),
            });
        }
        if rows.is_empty() {
            return Err(SessionError::Empty);
        }
        if !rows.len().is_multiple_of(width) {
            return Err(SessionError::EmbeddingWidth {
                found: rows.len(),
                width,
            });
        }
        let (tokens, capacity) = (self.len() + rows.len() / width, self.largest_capacity());
        match tokens > capacity {
            true => Err(SessionError::Capacity { tokens, capacity }),
            false => Ok(()),
        }
    }

    fn fed(&mut self, tokens: &[u32], end: usize) {
        let is_long = |most: usize| end > most;
        self.short = self.short.min(self.tokens.len());
        self.tokens.extend_from_slice(tokens);
        if !self.longest_short_run.is_some_and(is_long) {
            self.short = self.tokens.len();
        }
    }

    /// How many of the first `shared` tokens have the same keys as in a run of `total` tokens.
    fn kept(&self, shared: usize, total: usize) -> usize {
        match self.longest_short_run {
            Some(most) if total > most && self.short > 0 => 0,
            Some(most) if total <= most => shared.min(self.short),
            _ => shared,
        }
    }

    /// Makes `tokens` the whole sequence and computes the logits after the last of them. The cache of their longest
    /// common prefix with the tokens fed before is kept; returns its length. On an error nothing changed, unless the
    /// device failed.
    pub fn resume(&mut self, tokens: &[u32]) -> Result<usize, SessionError> {
        self.check_at(0, tokens)?;
        if self.embedded > 0 {
            self.clear();
        }
        let pairs = self.tokens.iter().zip(tokens);
        let shared = pairs.take_while(|(old, new)| old == new).count();
        let shared = self.kept(shared, tokens.len());
        if shared == tokens.len() && shared == self.tokens.len() && !self.logits.is_empty() {
            return Ok(shared);
        }
        // Logits are known only after the last token, so at least one is fed. Later slots of the cache are never read.
        let kept = shared.min(tokens.len() - 1);
        self.tokens.truncate(kept);
        self.logits.clear();
        self.feed(&tokens[kept..])?;
        Ok(kept)
    }

    /// Whether these tokens could be fed now; feeds nothing.
    pub fn check(&self, tokens: &[u32]) -> Result<(), SessionError> {
        self.check_at(self.len(), tokens)
    }

    fn check_at(&self, first: usize, tokens: &[u32]) -> Result<(), SessionError> {
        if self.embeddings.as_ref().is_some_and(|e| e.tokens().is_none()) && !tokens.is_empty() {
            return Err(SessionError::NoTable);
        }
        check_tokens(first, tokens, self.vocabulary, self.largest_capacity())
    }

    /// Makes room for `total` tokens in the smallest sufficient capacity.
    fn reserve(&mut self, total: usize) -> Result<(), SessionError> {
        if total <= self.capacity {
            return Ok(());
        }
        let fits = self.capacities.iter().copied().find(|c| *c >= total);
        let capacity = fits.expect("checked before");
        let start = Instant::now();
        let used = self.len();
        self.device.reserve(capacity, used)?;
        if self.capacity > 0 {
            self.moves += 1;
            self.moving += start.elapsed();
        }
        self.capacity = capacity;
        Ok(())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("device", &self.device.name())
            .field("tokens", &self.len())
            .field("capacity", &self.capacity)
            .finish()
    }
}

/// Whether a model with this vocabulary and maximum of slots can be fed these tokens from position `first` on.
pub(crate) fn check_tokens(
    first: usize,
    tokens: &[u32],
    vocabulary: usize,
    capacity: usize,
) -> Result<(), SessionError> {
    if tokens.is_empty() {
        return Err(SessionError::Empty);
    }
    if let Some(at) = tokens.iter().position(|id| *id as usize >= vocabulary) {
        return Err(SessionError::OutsideVocabulary {
            id: tokens[at],
            position: first + at,
            vocabulary,
        });
    }
    let tokens = first + tokens.len();
    match tokens > capacity {
        true => Err(SessionError::Capacity { tokens, capacity }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
