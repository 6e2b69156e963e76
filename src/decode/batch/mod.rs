//! Several sequences on one device: they join and leave at any step, and share prefixes.
//!
//! A [`BatchDecoder`] owns the state of a [`Session`](super::Session) for many sequences: tokens, logits, and a cache
//! each that grows through the package's capacities. It drives a [`BatchDevice`]. The caller decides when to feed a
//! chunk of a prompt, when to step, and which tokens are drawn.
//!
//! # Results do not depend on other sequences
//!
//! Every sequence gets the same bits as if it ran alone, whatever was computed before:
//!
//! - A decode step computes each row independently of the others; the device guarantees it.
//! - A prompt is cut only at multiples of [`BatchOptions::chunk`]. Each chunk is a separate call, so its results depend
//!   only on the tokens so far.
//! - A prefix is reused up to a multiple of the chunk, and only if it was computed as whole chunks of a prompt, as the
//!   new sequence would compute it. Generated tokens were fed one by one, which rounds differently; they are fed again
//!   as part of the next prompt.
//! - A cache has the capacity that its sequence needs, and zeros beyond its tokens.
//!
//! A [`Session`](super::Session) cuts at the device's largest chunk. Prompts that are one chunk for both get the same bits
//! from both; longer ones differ by rounding at most.

mod cpu;
mod device;
mod prefix;

pub use cpu::CpuBatchDevice;
pub use device::{BatchDevice, BatchRow, RowOutput};

use std::collections::BTreeMap;

use super::session::{SessionError, check_tokens};
use crate::help::{Fault, Help};
use crate::units;
use prefix::{Cached, Computed, Kept};

/// Limits on sequences and their memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchOptions {
    /// Maximum of concurrent sequences, at least 1.
    pub sequences: usize,
    /// Tokens of a prompt that are fed in one call, from 1 to the device's limit. Other sequences wait for that call
    /// before their next token.
    pub chunk: usize,
    /// Number of caches of finished sequences that are kept for prompts with the same prefix.
    pub kept: usize,
    /// Maximum bytes of all caches; no limit if not given. Kept caches are dropped first.
    pub cache_bytes: Option<usize>,
}

impl Default for BatchOptions {
    fn default() -> Self {
        BatchOptions {
            sequences: 8,
            chunk: 128,
            kept: 8,
            cache_bytes: None,
        }
    }
}

/// A sequence of a batch; unique within one decoder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SequenceId(u64);

/// Why a sequence cannot join or continue. Others are not affected.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Its tokens cannot be fed, or the device failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The maximum of sequences is reached.
    #[error("{sequences} sequences are running, the maximum of this batch")]
    Full {
        /// Their number.
        sequences: usize,
    },
    /// Its cache exceeds the memory that is left for caches.
    #[error(
        "a cache of {capacity} tokens needs {}, but other sequences use {} of the {} for caches",
        units::bytes(*bytes as u64), units::bytes(*taken as u64), units::bytes(*limit as u64)
    )]
    Memory {
        /// Slots that it needs.
        capacity: usize,
        /// Their bytes.
        bytes: usize,
        /// Bytes of other running sequences.
        taken: usize,
        /// [`BatchOptions::cache_bytes`].
        limit: usize,
    },
}

impl Help for BatchError {
    fn fault(&self) -> Fault {
        match self {
            BatchError::Session(error) => error.fault(),
            BatchError::Full { .. } | BatchError::Memory { .. } => Fault::Machine,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            BatchError::Session(error) => error.help(),
            BatchError::Full { .. } => Some("let one leave first".into()),
            BatchError::Memory { .. } => Some("allow more memory for caches, or fewer sequences".into()),
        }
    }
}

/// A token to feed to a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NextToken {
    /// Whose prompt is fed.
    pub sequence: SequenceId,
    /// Its id.
    pub token: u32,
    /// Only the id of the largest logit after it is needed. A device that finds it where the logits are does not copy them.
    pub only_best: bool,
}

/// How far a prompt is fed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Tokens computed by this call.
    pub fed: usize,
    /// Tokens reused from another sequence.
    pub reused: usize,
    /// Tokens still to feed; at 0 the logits are available.
    pub left: usize,
}

/// Current memory of caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheUse {
    /// Bytes of running sequences.
    pub running: usize,
    /// Bytes of caches kept for their prefixes.
    pub kept: usize,
    /// Their number.
    pub kept_count: usize,
}

struct Sequence {
    prompt: Vec<u32>,
    /// Set with the first chunk.
    cached: Option<Cached>,
    reused: usize,
    /// What the model gave after the last token fed; none before the prompt is fed and after a failed step.
    output: Option<RowOutput>,
    /// The contents of its cache are undefined.
    failed: bool,
}

/// See the module's head.
pub struct BatchDecoder {
    device: Box<dyn BatchDevice>,
    options: BatchOptions,
    /// Ascending.
    capacities: Vec<usize>,
    vocabulary: usize,
    longest_short_run: Option<usize>,
    sequences: BTreeMap<SequenceId, Sequence>,
    kept: Kept,
    next: u64,
    /// Slots so far that have no cache.
    free: Vec<usize>,
    slots: usize,
}

impl BatchDecoder {
    /// `capacities` must not be empty; order and repetition do not matter. `vocabulary` is the row length of the logits.
    pub fn new(device: Box<dyn BatchDevice>, capacities: &[usize], vocabulary: usize, options: BatchOptions) -> Self {
        let mut capacities = capacities.to_vec();
        capacities.sort_unstable();
        capacities.dedup();
        assert!(!capacities.is_empty(), "a package has at least one capacity");
        let options = BatchOptions {
            sequences: options.sequences.max(1),
            chunk: options.chunk.clamp(1, device.largest_chunk()),
            ..options
        };
        BatchDecoder {
            device,
            options,
            capacities,
            vocabulary,
            longest_short_run: None,
            sequences: BTreeMap::new(),
            kept: Kept::default(),
            next: 0,
            free: Vec::new(),
            slots: 0,
        }
    }

    /// As [`Session::with_switch`](super::Session::with_switch): prefixes are shared on one side of the switch.
    pub fn with_switch(mut self, longest_short_run: Option<usize>) -> Self {
        self.longest_short_run = longest_short_run;
        self
    }

    /// The device.
    pub fn device(&self) -> &dyn BatchDevice {
        &*self.device
    }
    /// The options, limited to what the device supports.
    pub fn options(&self) -> BatchOptions {
        self.options
    }
    /// Row length of the logits.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }
    /// Slots of the largest cache that the package allows.
    pub fn largest_capacity(&self) -> usize {
        *self.capacities.last().expect("checked in new")
    }
    /// Number of running sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }
    /// Whether no sequence is running.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }
    /// Whether another sequence may join.
    pub fn has_place(&self) -> bool {
        self.sequences.len() < self.options.sequences
    }

    /// Whether a prompt could be fed; feeds nothing.
    pub fn check(&self, prompt: &[u32]) -> Result<(), SessionError> {
        check_tokens(0, prompt, self.vocabulary, self.largest_capacity())
    }

    /// Adds a sequence with this prompt. Computes nothing yet.
    pub fn join(&mut self, prompt: Vec<u32>) -> Result<SequenceId, BatchError> {
        self.check(&prompt)?;
        if !self.has_place() {
            let sequences = self.sequences.len();
            return Err(BatchError::Full { sequences });
        }
        let id = SequenceId(self.next);
        self.next += 1;
        let sequence = Sequence {
            prompt,
            cached: None,
            reused: 0,
            output: None,
            failed: false,
        };
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Feeds the next chunk of a sequence's prompt; the first call looks for a prefix that others have computed. If
    /// that call finds no memory for a cache ([`BatchError::Memory`]), it can be repeated; after any other error the
    /// sequence can only leave. Panics if the prompt is already fed or the sequence has left.
    pub fn prefill(&mut self, id: SequenceId) -> Result<Progress, BatchError> {
        let sequence = self.get(id);
        assert!(sequence.output.is_none(), "the prompt is fed");
        if sequence.cached.is_none() {
            self.begin(id)?;
        }
        let chunk = self.options.chunk;
        let sequence = self.sequences.get_mut(&id).expect("looked at above");
        let cached = sequence.cached.as_mut().expect("begun");
        let (position, end) = (cached.tokens.len(), sequence.prompt.len());
        let next = ((position / chunk + 1) * chunk).min(end);
        let tokens = &sequence.prompt[position..next];
        let mut logits = Vec::new();
        let done = self.device.prefill(cached.slot, tokens, position, end, &mut logits);
        if let Err(error) = done {
            sequence.failed = true;
            return Err(SessionError::from(error).into());
        }
        cached.tokens.extend_from_slice(tokens);
        if next.is_multiple_of(chunk) {
            cached.exact = next;
        }
        if next == end {
            sequence.output = Some(RowOutput::Logits(logits));
        }
        Ok(Progress {
            fed: next - position,
            reused: sequence.reused,
            left: end - next,
        })
    }

    /// Makes the sequence's cache, with the longest prefix that another one has.
    fn begin(&mut self, id: SequenceId) -> Result<(), BatchError> {
        let prompt = self.get(id).prompt.clone();
        let capacity = self.fitting(prompt.len());
        let computed = Computed {
            is_long: self.longest_short_run.is_some_and(|most| prompt.len() > most),
            capacity: if self.device.prompt_depends_on_capacity() {
                capacity
            } else {
                0
            },
        };
        // Logits are known after the last token only, so at least one is fed.
        let reusable = &prompt[..prompt.len() - 1];
        let running = self.sequences.values().filter(|s| !s.failed);
        let running = running.filter_map(|s| s.cached.as_ref());
        let sources = running.chain(self.kept.iter());
        let common = |cached: &Cached| cached.common(reusable, computed, self.options.chunk);
        let best = sources.map(|c| (common(c), c.slot)).filter(|(n, _)| *n > 0).max();
        let source = best.map(|(_, slot)| slot);
        self.make_room(capacity, 0, source)?;
        // If there was no room for both, the source was dropped.
        let prefix = best.filter(|(_, slot)| !self.free.contains(slot));
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots += 1;
            self.slots - 1
        });
        let opened = self
            .device
            .open(slot, capacity, prefix.map(|(used, from)| (from, used)));
        if let Err(error) = opened {
            self.free.push(slot);
            return Err(SessionError::from(error).into());
        }
        let shared = prefix.map_or(0, |(shared, _)| shared);
        if let Some((_, from)) = prefix
            && self.kept.used(from, shared)
        {
            // The new sequence has all of it.
            self.close(from);
        }
        let sequence = self.sequences.get_mut(&id).expect("looked at above");
        sequence.reused = shared;
        sequence.cached = Some(Cached {
            slot,
            capacity,
            tokens: prompt[..shared].to_vec(),
            exact: shared,
            computed,
        });
        Ok(())
    }

    /// Feeds one token to each of these sequences, whose prompts must be fed, computes the logits after each, and
    /// returns the result of each. A sequence whose step failed can only leave. Panics if one is given twice or has
    /// left.
    pub fn step(&mut self, tokens: &[(SequenceId, u32)]) -> Vec<Result<(), BatchError>> {
        let tokens = tokens.iter().map(|(sequence, token)| NextToken {
            sequence: *sequence,
            token: *token,
            only_best: false,
        });
        self.advance(&tokens.collect::<Vec<_>>())
    }

    /// As [`BatchDecoder::step`], for callers of whom some need no logits.
    pub fn advance(&mut self, tokens: &[NextToken]) -> Vec<Result<(), BatchError>> {
        let mut results: Vec<Result<(), BatchError>> = Vec::with_capacity(tokens.len());
        let mut going: Vec<(usize, NextToken)> = Vec::with_capacity(tokens.len());
        for (i, next) in tokens.iter().enumerate() {
            let id = next.sequence;
            assert!(
                !tokens[..i].iter().any(|other| other.sequence == id),
                "one token per sequence"
            );
            let ready = self.make_ready(id, next.token);
            match &ready {
                Ok(()) => going.push((i, *next)),
                // A failed growth leaves the cache unchanged.
                Err(_) => self.sequences.get_mut(&id).expect("looked at").output = None,
            }
            results.push(ready);
        }
        for some in going.chunks(self.device.most_rows().max(1)) {
            let mut outputs: Vec<RowOutput> = Vec::with_capacity(some.len());
            for (_, next) in some {
                let sequence = self.sequences.get_mut(&next.sequence).expect("ready");
                outputs.push(sequence.output.take().expect("ready"));
            }
            let rows = some.iter().zip(&mut outputs).map(|((_, next), output)| {
                let cached = self.sequences[&next.sequence].cached.as_ref().expect("ready");
                BatchRow {
                    slot: cached.slot,
                    token: next.token,
                    position: cached.tokens.len(),
                    only_best: next.only_best,
                    output,
                }
            });
            let mut rows: Vec<BatchRow<'_>> = rows.collect();
            let done = self.device.decode(&mut rows);
            for (((i, next), done), output) in some.iter().zip(done).zip(outputs) {
                let sequence = self.sequences.get_mut(&next.sequence).expect("ready");
                match done {
                    Ok(()) => {
                        sequence.cached.as_mut().expect("ready").tokens.push(next.token);
                        sequence.output = Some(output);
                    }
                    Err(error) => {
                        sequence.failed = true;
                        results[*i] = Err(SessionError::from(error).into());
                    }
                }
            }
        }
        results
    }

    /// Checks a token and makes room for it.
    fn make_ready(&mut self, id: SequenceId, token: u32) -> Result<(), BatchError> {
        let sequence = self.get(id);
        assert!(sequence.output.is_some(), "the prompt is not fed, or a step failed");
        let cached = sequence.cached.as_ref().expect("the prompt is fed");
        let (slot, used, old) = (cached.slot, cached.tokens.len(), cached.capacity);
        check_tokens(used, &[token], self.vocabulary, self.largest_capacity())?;
        if used < old {
            return Ok(());
        }
        let capacity = self.fitting(used + 1);
        self.make_room(capacity, old, None)?;
        self.device.resize(slot, capacity, used).map_err(SessionError::from)?;
        let sequence = self.sequences.get_mut(&id).expect("looked at above");
        sequence.cached.as_mut().expect("the prompt is fed").capacity = capacity;
        Ok(())
    }

    /// Removes a sequence. Its cache is kept for prompts with the same prefix while there is room.
    pub fn leave(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else {
            return;
        };
        let Some(mut cached) = sequence.cached else {
            return;
        };
        if sequence.failed || cached.exact == 0 || self.options.kept == 0 {
            return self.close(cached.slot);
        }
        cached.tokens.truncate(cached.exact);
        let capacity = self.fitting(cached.exact);
        if capacity < cached.capacity && self.device.resize(cached.slot, capacity, cached.exact).is_ok() {
            cached.capacity = capacity;
        }
        for slot in self.kept.add(cached, self.options.kept) {
            self.close(slot);
        }
    }

    /// Drops all caches that are kept for their prefixes.
    pub fn forget_kept(&mut self) {
        while let Some(slot) = self.kept.remove_oldest(None) {
            self.close(slot);
        }
    }

    /// Every token of a sequence that was fed so far.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        self.get(id).cached.as_ref().map_or(&[], |cached| &cached.tokens)
    }

    /// Logits after a sequence's last token, `[vocabulary]`; empty before its prompt is fed, and where they stayed on the
    /// device.
    pub fn logits(&self, id: SequenceId) -> &[f32] {
        self.get(id).output.as_ref().map_or(&[], RowOutput::logits)
    }

    /// The id of the largest logit after a sequence's last token, if the device found it ([`NextToken::only_best`]); else the
    /// logits are here.
    pub fn best(&self, id: SequenceId) -> Option<u32> {
        match self.get(id).output {
            Some(RowOutput::Best(best)) => Some(best),
            _ => None,
        }
    }

    /// Number of tokens that a sequence can still be fed after its prompt.
    pub fn remaining(&self, id: SequenceId) -> usize {
        let sequence = self.get(id);
        let fed = sequence.cached.as_ref().map_or(0, |cached| cached.tokens.len());
        self.largest_capacity() - fed.max(sequence.prompt.len())
    }

    /// Memory of the caches.
    pub fn cache_use(&mut self) -> CacheUse {
        let running: Vec<usize> = self
            .sequences
            .values()
            .filter_map(|s| s.cached.as_ref())
            .map(|c| c.capacity)
            .collect();
        let kept: Vec<usize> = self.kept.iter().map(|c| c.capacity).collect();
        CacheUse {
            running: running.into_iter().map(|capacity| self.bytes(capacity)).sum(),
            kept_count: kept.len(),
            kept: kept.into_iter().map(|capacity| self.bytes(capacity)).sum(),
        }
    }

    fn get(&self, id: SequenceId) -> &Sequence {
        self.sequences.get(&id).expect("a sequence that has not left")
    }

    /// The smallest capacity for this many tokens, which were checked.
    fn fitting(&self, tokens: usize) -> usize {
        let fits = self.capacities.iter().copied().find(|c| *c >= tokens);
        fits.expect("checked before")
    }

    fn bytes(&mut self, capacity: usize) -> usize {
        // A device that does not know its memory fails when it makes the cache, with a reason.
        self.device.cache_bytes(capacity).unwrap_or(0)
    }

    /// Makes room for a cache of `capacity` that replaces one of `instead`: drops the oldest kept caches, `source`
    /// last.
    fn make_room(&mut self, capacity: usize, instead: usize, source: Option<usize>) -> Result<(), BatchError> {
        let Some(limit) = self.options.cache_bytes else {
            return Ok(());
        };
        let bytes = self.bytes(capacity);
        loop {
            let used = self.cache_use();
            let instead = if instead > 0 { self.bytes(instead) } else { 0 };
            let taken = used.running - instead;
            if taken + used.kept + bytes <= limit {
                return Ok(());
            }
            let oldest = self
                .kept
                .remove_oldest(source)
                .or_else(|| self.kept.remove_oldest(None));
            match oldest {
                Some(slot) => self.close(slot),
                None => {
                    return Err(BatchError::Memory {
                        capacity,
                        bytes,
                        taken,
                        limit,
                    });
                }
            }
        }
    }

    fn close(&mut self, slot: usize) {
        self.device.close(slot);
        self.free.push(slot);
    }
}
