//! One turn of a scheduler: chunks of new prompts, a token for each complete one, one step of all sequences.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::metrics::{ENDS, Metrics, end_of};
use super::request::{Event, Finished, RequestError, Sink};
use super::scheduler::Waiting;
use crate::decode::batch::{BatchDecoder, BatchError, NextToken, SequenceId};
use crate::decode::{FinishReason, GenerateError, Transcript};
use crate::sample::{Chain, Constraint};
use crate::text::Tokenizer;

/// The state of a sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its prompt is being fed.
    Feeding,
    /// A token is drawn in each turn.
    Drawing,
}

/// A request that has a sequence.
struct Running<'t> {
    id: SequenceId,
    state: State,
    chain: Chain,
    constraint: Option<Box<dyn Constraint>>,
    /// Logits masked by the constraint.
    limited: Vec<f32>,
    transcript: Transcript<'t>,
    events: Sink,
    cancelled: Arc<AtomicBool>,
    deadline: Option<Instant>,
    prompt: usize,
    reused: usize,
    submitted: Instant,
    /// When its first chunk was fed.
    began: Option<Instant>,
    /// When its first and its last token were drawn.
    first: Option<Instant>,
    last: Option<Instant>,
}

/// The data for drawing a token. The decoder is bound to its device's thread; this is not.
struct Given<'d> {
    /// Empty where the device found the best token.
    logits: &'d [f32],
    best: Option<u32>,
    history: &'d [u32],
    /// Tokens that the sequence can still be fed.
    remaining: usize,
}

impl<'d> Given<'d> {
    fn of(decoder: &'d BatchDecoder, id: SequenceId) -> Self {
        Given {
            logits: decoder.logits(id),
            best: decoder.best(id),
            history: decoder.tokens(id),
            remaining: decoder.remaining(id),
        }
    }
}

/// The token drawn, and the reason if it is the last.
type Drawn = Result<(u32, Option<FinishReason>), RequestError>;

/// From this many logits on, several threads draw for the sequences; for fewer, waking them takes longer.
const SHARED: usize = 1 << 18;

/// How a running request ends.
type End = Result<FinishReason, RequestError>;

/// The decoder and everything that runs on it.
pub(super) struct Turn<'t> {
    decoder: BatchDecoder,
    tokenizer: Option<&'t Tokenizer>,
    metrics: &'t Metrics,
    chunks: usize,
    /// In order of arrival.
    running: Vec<Running<'t>>,
}

impl<'t> Turn<'t> {
    pub fn new(
        decoder: BatchDecoder,
        tokenizer: Option<&'t Tokenizer>,
        metrics: &'t Metrics,
        chunks_a_step: usize,
    ) -> Self {
        Turn {
            decoder,
            tokenizer,
            metrics,
            chunks: chunks_a_step.max(1),
            running: Vec::new(),
        }
    }

    /// No running requests.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Number of running requests.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Number of requests that can be admitted.
    pub fn places(&self) -> usize {
        self.decoder.options().sequences - self.decoder.len()
    }

    /// Ends a request that never ran.
    pub fn refuse(&mut self, mut waiting: Waiting, error: RequestError) {
        self.count_end(&Err(&error), waiting.submitted.elapsed());
        (waiting.request.events)(Event::Failed(error));
    }

    /// Assigns a sequence to a request.
    pub fn admit(&mut self, waiting: Waiting) {
        let Waiting {
            mut request,
            chain,
            submitted,
            cancelled,
        } = waiting;
        let prompt = request.prompt.len();
        match self.decoder.join(request.prompt) {
            Err(error) => {
                let error = error.into();
                self.count_end(&Err(&error), submitted.elapsed());
                (request.events)(Event::Failed(error));
            }
            Ok(id) => self.running.push(Running {
                id,
                state: State::Feeding,
                chain,
                constraint: request.constraint,
                limited: Vec::new(),
                transcript: Transcript::new(self.tokenizer, request.limits),
                events: request.events,
                cancelled,
                deadline: request.deadline,
                prompt,
                reused: 0,
                submitted,
                began: None,
                first: None,
                last: None,
            }),
        }
    }

    /// Ends all running requests, because the server stops.
    pub fn stop_all(&mut self) {
        while !self.running.is_empty() {
            self.end(0, Err(RequestError::Stopping));
        }
    }

    /// Runs one turn.
    pub fn take(&mut self) {
        self.drop_cancelled();
        self.feed();
        let tokens = self.draw();
        self.step(&tokens);
        self.note();
    }

    fn drop_cancelled(&mut self) {
        let now = Instant::now();
        for at in (0..self.running.len()).rev() {
            let one = &self.running[at];
            let generated = one.transcript.tokens().len();
            if one.cancelled.load(Ordering::Relaxed) {
                self.end(at, Err(RequestError::Cancelled { generated }));
            } else if one.deadline.is_some_and(|deadline| deadline <= now) {
                self.end(at, Err(RequestError::Deadline { generated }));
            }
        }
    }

    /// Feeds some chunks of the oldest prompts.
    fn feed(&mut self) {
        for _ in 0..self.chunks {
            let Some(at) = self.running.iter().position(|one| one.state == State::Feeding) else {
                return;
            };
            let one = &mut self.running[at];
            match self.decoder.prefill(one.id) {
                // Other requests will release memory; later ones wait for this one.
                Err(BatchError::Memory { taken, .. }) if taken > 0 => return,
                Err(error) => self.end(at, Err(error.into())),
                Ok(progress) => {
                    one.began.get_or_insert_with(Instant::now);
                    one.reused = progress.reused;
                    if progress.left == 0 {
                        one.state = State::Drawing;
                        let (prompt, reused) = (one.prompt as u64, one.reused as u64);
                        self.metrics.count(|now| {
                            now.prompt_tokens += prompt;
                            now.reused_tokens += reused;
                        });
                        if one.transcript.limits().max_new_tokens == 0 {
                            self.end(at, Ok(FinishReason::Length));
                        }
                    }
                }
            }
        }
    }

    /// Draws a token for each sequence that has logits, and ends those that are done. Returns the tokens to feed.
    fn draw(&mut self) -> Vec<NextToken> {
        let (decoder, metrics) = (&self.decoder, self.metrics);
        let running = self.running.iter_mut().enumerate();
        let drawing = running.filter(|(_, one)| one.state == State::Drawing);
        let drawing: Vec<(usize, &mut Running<'_>, Given<'_>)> = drawing
            .map(|(at, one)| {
                let given = Given::of(decoder, one.id);
                (at, one, given)
            })
            .collect();
        let logits: usize = drawing.iter().map(|(.., given)| given.logits.len()).sum();
        let draw = |(at, one, given): (usize, &mut Running<'_>, Given<'_>)| (at, one.draw(given, metrics));
        let drawn: Vec<(usize, Drawn)> = match drawing.len() > 1 && logits >= SHARED {
            true => drawing.into_par_iter().map(draw).collect(),
            false => drawing.into_iter().map(draw).collect(),
        };
        let mut tokens = Vec::with_capacity(drawn.len());
        let mut ended: Vec<(usize, End)> = Vec::new();
        for (at, drawn) in drawn {
            match drawn {
                Ok((token, None)) => tokens.push(NextToken {
                    sequence: self.running[at].id,
                    token,
                    only_best: self.running[at].needs_only_best(),
                }),
                Ok((_, Some(end))) => ended.push((at, Ok(end))),
                Err(error) => ended.push((at, Err(error))),
            }
        }
        for (at, end) in ended.into_iter().rev() {
            self.end(at, end);
        }
        tokens
    }

    fn step(&mut self, tokens: &[NextToken]) {
        if tokens.is_empty() {
            return;
        }
        let results = self.decoder.advance(tokens);
        self.metrics.count(|now| now.steps += 1);
        for (next, result) in tokens.iter().zip(results) {
            if let Err(error) = result {
                let at = self.running.iter().position(|one| one.id == next.sequence);
                self.end(at.expect("it was fed a token"), Err(error.into()));
            }
        }
    }

    /// Updates the gauges.
    fn note(&mut self) {
        let used = self.decoder.cache_use();
        let fed: usize = self.running.iter().map(|one| self.decoder.tokens(one.id).len()).sum();
        let slots = self.decoder.options().sequences * self.decoder.largest_capacity();
        let running = self.running.len() as u64;
        self.metrics.count(|now| {
            now.running = running;
            now.cache_use = fed as f64 / slots as f64;
            now.cache_bytes = [used.running as u64, used.kept as u64];
        });
    }

    /// Removes a request and reports the reason.
    fn end(&mut self, at: usize, end: End) {
        let mut one = self.running.remove(at);
        self.decoder.leave(one.id);
        let end = end.and_then(|reason| one.finish(reason));
        let total = one.submitted.elapsed();
        self.count_end(&end.as_ref().copied(), total);
        let since = |then: Option<Instant>| then.map_or(total, |then| then - one.submitted);
        (one.events)(match end {
            Err(error) => Event::Failed(error),
            Ok(reason) => Event::Finished(Finished {
                reason,
                prompt: one.prompt,
                reused: one.reused,
                generated: one.transcript.tokens().len(),
                queued: since(one.began),
                ttft: since(one.first),
                total,
            }),
        });
    }

    fn count_end(&self, end: &Result<FinishReason, &RequestError>, total: Duration) {
        let name = match end {
            Ok(reason) => end_of(*reason),
            Err(RequestError::Cancelled { .. }) => "cancelled",
            Err(RequestError::Deadline { .. }) => "deadline",
            Err(_) => "error",
        };
        let at = ENDS.iter().position(|end| *end == name).expect("ENDS has all of them");
        self.metrics.count(|now| {
            now.ended[at] += 1;
            now.whole.observe(total);
        });
    }
}

impl Running<'_> {
    /// The next token follows from the largest logit, and no other logit is reported.
    fn needs_only_best(&self) -> bool {
        self.chain.is_argmax() && self.constraint.is_none() && self.transcript.limits().logprobs.is_none()
    }

    /// Draws the next token and reports it, with the reason if it is the last.
    fn draw(&mut self, given: Given<'_>, metrics: &Metrics) -> Drawn {
        let Given {
            logits,
            best,
            history,
            remaining,
        } = given;
        let allowed = match &mut self.constraint {
            None => logits,
            Some(constraint) => {
                self.limited.clear();
                self.limited.extend_from_slice(logits);
                constraint.limit(&mut self.limited)?;
                &self.limited
            }
        };
        let drawn = match best {
            Some(best) => Ok(best),
            None => self.chain.sample(allowed, history),
        };
        let token = drawn.map_err(|source| GenerateError::Draw {
            step: self.transcript.tokens().len() + 1,
            position: history.len(),
            source,
        })?;
        let now = Instant::now();
        let before = self.last.replace(now);
        let first = *self.first.get_or_insert(now);
        let (queued, ttft) = (self.began.unwrap_or(now) - self.submitted, first - self.submitted);
        metrics.count(|counts| {
            counts.generated_tokens += 1;
            match before {
                Some(before) => counts.between_tokens.observe(now - before),
                None => {
                    counts.queued.observe(queued);
                    counts.to_first_token.observe(ttft);
                }
            }
        });
        let is_complete = match &mut self.constraint {
            None => false,
            Some(constraint) => constraint.accept(token)?,
        };
        let added = self.transcript.push(token, logits).map_err(GenerateError::from)?;
        let piece = Event::Piece {
            token: Some(token),
            step: self.transcript.steps().last().cloned(),
            text: added.text,
        };
        if !(self.events)(piece) {
            let generated = self.transcript.tokens().len();
            return Err(RequestError::Cancelled { generated });
        }
        let is_full = remaining == 0;
        let end = match is_complete {
            true => Some(FinishReason::Stop),
            false => added.end.or(is_full.then_some(FinishReason::Capacity)),
        };
        Ok((token, end))
    }

    /// Reports held-back text, which may complete a stop string.
    fn finish(&mut self, reason: FinishReason) -> Result<FinishReason, RequestError> {
        let added = self.transcript.finish().map_err(GenerateError::from)?;
        if !added.text.is_empty() {
            (self.events)(Event::Piece {
                token: None,
                step: None,
                text: added.text,
            });
        }
        Ok(added.end.unwrap_or(reason))
    }
}
