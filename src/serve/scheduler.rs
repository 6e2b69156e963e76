//! The thread that owns a decoder: requests arrive through a bounded queue, and one [`Turn`] follows another.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use super::metrics::Metrics;
use super::request::{Request, RequestError, Ticket};
use super::turn::Turn;
use crate::decode::batch::BatchDecoder;
use crate::decode::{SessionError, check_tokens};
use crate::help::{Fault, Help};
use crate::sample::Chain;
use crate::text::Tokenizer;

/// Limits of a scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchedulerOptions {
    /// Maximum waiting requests, besides those that start at once.
    pub queue: usize,
    /// Prompt chunks between two decode steps, at least 1.
    pub chunks_a_step: usize,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        SchedulerOptions {
            queue: 64,
            chunks_a_step: 1,
        }
    }
}

/// Properties of a scheduler's decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its device.
    pub device: String,
    /// Its engine.
    pub engine: String,
    /// Size of the model's vocabulary.
    pub vocabulary: usize,
    /// Tokens of the longest sequence, including its prompt.
    pub capacity: usize,
    /// Concurrent sequences.
    pub sequences: usize,
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Its prompt can never be fed.
    #[error(transparent)]
    Prompt(#[from] SessionError),
    /// Its settings are invalid, or its stop strings need a tokenizer that the package does not have.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Stop strings without a tokenizer.
    #[error("stop strings need a tokenizer, and the package has none")]
    NoTokenizer,
    /// The queue is full.
    #[error("the queue is full: {waiting} requests are waiting")]
    Full {
        /// Number of waiting requests.
        waiting: usize,
    },
    /// It accepts no more requests.
    #[error("the server is stopping")]
    Stopping,
}

impl Help for SubmitError {
    fn fault(&self) -> Fault {
        match self {
            SubmitError::Prompt(error) => error.fault(),
            SubmitError::Request(error) => error.fault(),
            SubmitError::NoTokenizer => Fault::Input,
            SubmitError::Full { .. } | SubmitError::Stopping => Fault::Machine,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            SubmitError::Prompt(error) => error.help(),
            SubmitError::Request(error) => error.help(),
            SubmitError::NoTokenizer => Some("convert again with --tokenizer FILE_OR_DIR".into()),
            SubmitError::Full { .. } => Some("try again in a moment".into()),
            SubmitError::Stopping => None,
        }
    }
}

/// A request in the queue.
pub(super) struct Waiting {
    pub request: Request,
    pub chain: Chain,
    pub submitted: Instant,
    pub cancelled: Arc<AtomicBool>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// Accepted requests are finished, and no more are accepted.
    Draining,
    /// Accepted requests are stopped.
    Stopping,
    /// The thread has ended.
    Over,
}

struct Queue {
    waiting: VecDeque<Waiting>,
    /// Running requests at the thread's last update.
    running: usize,
    phase: Phase,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    metrics: Metrics,
    options: SchedulerOptions,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        let mut queue = self.lock();
        queue.phase = queue.phase.max(phase);
        self.changed.notify_all();
    }
}

/// See the module's head. Dropping it stops all requests.
pub struct Scheduler {
    shared: Arc<Shared>,
    facts: Facts,
    has_tokenizer: bool,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the thread, which opens the decoder with `open` and owns it.
    pub fn start<E: Send + 'static>(
        open: impl FnOnce() -> Result<BatchDecoder, E> + Send + 'static,
        tokenizer: Option<Arc<Tokenizer>>,
        options: SchedulerOptions,
    ) -> Result<Scheduler, E> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                waiting: VecDeque::new(),
                running: 0,
                phase: Phase::Open,
            }),
            changed: Condvar::new(),
            metrics: Metrics::default(),
            options,
        });
        let has_tokenizer = tokenizer.is_some();
        let (opened, facts) = mpsc::sync_channel(1);
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("lapidary-scheduler".into());
        let work = move || {
            // Also if a panic ends the thread: later requests are refused.
            let _over = Over(of_thread.clone());
            match open() {
                Err(error) => drop(opened.send(Err(error))),
                Ok(decoder) => {
                    let facts = Facts {
                        device: decoder.device().name().to_string(),
                        engine: decoder.device().engine(),
                        vocabulary: decoder.vocabulary(),
                        capacity: decoder.largest_capacity(),
                        sequences: decoder.options().sequences,
                    };
                    drop(opened.send(Ok(facts)));
                    serve(&of_thread, decoder, tokenizer.as_deref());
                }
            }
        };
        let thread = thread.spawn(work).expect("the system has a thread to give");
        let facts = facts.recv().expect("the thread says how opening went, or panics")?;
        Ok(Scheduler {
            shared,
            facts,
            has_tokenizer,
            thread: Some(thread),
        })
    }

    /// Properties of its decoder.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Requests that it takes when it has none: those that run and those that wait.
    pub fn most_requests(&self) -> usize {
        self.shared.options.queue.saturating_add(self.facts.sequences)
    }

    /// Its metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Accepts a request, which then waits for its turn. One that cannot run is refused at once.
    pub fn submit(&self, request: Request) -> Result<Ticket, SubmitError> {
        self.check(&request)?;
        let chain = Chain::new(&request.sampling).map_err(RequestError::from)?;
        let mut queue = self.shared.lock();
        if queue.phase > Phase::Open {
            return Err(SubmitError::Stopping);
        }
        // Requests that start in the next turn do not count as waiting.
        let places = self.facts.sequences.saturating_sub(queue.running);
        let waiting = queue.waiting.len();
        if waiting >= self.shared.options.queue.saturating_add(places) {
            drop(queue);
            self.shared.metrics.reject();
            return Err(SubmitError::Full { waiting });
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        queue.waiting.push_back(Waiting {
            request,
            chain,
            submitted: Instant::now(),
            cancelled: cancelled.clone(),
        });
        self.shared.metrics.count(|now| now.waiting += 1);
        self.shared.changed.notify_all();
        Ok(Ticket(cancelled))
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        check_tokens(0, &request.prompt, self.facts.vocabulary, self.facts.capacity)?;
        match request.limits.stop.is_empty() || self.has_tokenizer {
            true => Ok(()),
            false => Err(SubmitError::NoTokenizer),
        }
    }

    /// Accepts no more requests; accepted ones are finished.
    pub fn drain(&self) {
        self.shared.enter(Phase::Draining);
    }

    /// Accepts no more requests and stops accepted ones.
    pub fn stop(&self) {
        self.shared.enter(Phase::Stopping);
    }

    /// Whether the thread has ended: when all work is done after [`Scheduler::drain`], or after [`Scheduler::stop`], or
    /// if the device panicked.
    pub fn is_over(&self) -> bool {
        self.shared.lock().phase == Phase::Over
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // The requests that it ended have seen a panic.
            let _ = thread.join();
        }
    }
}

/// Marks the end of the thread in every case.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.phase = Phase::Over;
        // Their receivers see the end.
        queue.waiting.clear();
    }
}

/// The thread's loop: runs until it must stop, or drains and nothing is left.
fn serve(shared: &Shared, decoder: BatchDecoder, tokenizer: Option<&Tokenizer>) {
    let mut turn = Turn::new(decoder, tokenizer, &shared.metrics, shared.options.chunks_a_step);
    loop {
        let mut newcomers = Vec::new();
        let mut gone = Vec::new();
        let stops = {
            let mut queue = shared.lock();
            while queue.waiting.is_empty() && turn.is_idle() && queue.phase == Phase::Open {
                queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let stops = queue.phase >= Phase::Stopping;
            let now = Instant::now();
            let mut left = VecDeque::new();
            for one in std::mem::take(&mut queue.waiting) {
                let is_late = one.request.deadline.is_some_and(|deadline| deadline <= now);
                match () {
                    () if one.cancelled.load(Ordering::Relaxed) => {
                        gone.push((one, RequestError::Cancelled { generated: 0 }));
                    }
                    () if stops => gone.push((one, RequestError::Stopping)),
                    () if is_late => gone.push((one, RequestError::Deadline { generated: 0 })),
                    () if newcomers.len() < turn.places() => newcomers.push(one),
                    () => left.push_back(one),
                }
            }
            queue.waiting = left;
            queue.running = turn.running() + newcomers.len();
            let waiting = queue.waiting.len() as u64;
            shared.metrics.count(|now| now.waiting = waiting);
            if newcomers.is_empty() && gone.is_empty() && turn.is_idle() && queue.phase >= Phase::Draining {
                return;
            }
            stops
        };
        for (one, error) in gone {
            turn.refuse(one, error);
        }
        for one in newcomers {
            turn.admit(one);
        }
        if stops {
            turn.stop_all();
        }
        turn.take();
    }
}
