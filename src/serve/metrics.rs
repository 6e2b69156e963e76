//! Counters of a scheduler, readable at any time from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::decode::FinishReason;

/// A histogram of durations, as in Prometheus.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bounds in seconds, ascending.
    pub bounds: &'static [f64],
    /// For each bound, the durations up to it and above the previous one; the last is for longer ones.
    pub counts: Vec<u64>,
    /// Sum of all durations, in seconds.
    pub sum: f64,
}

impl Histogram {
    /// An empty histogram.
    pub fn new(bounds: &'static [f64]) -> Self {
        Histogram {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// Adds one duration.
    pub fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let at = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[at] += 1;
        self.sum += seconds;
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

const TO_FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
];
const WHOLE: &[f64] = &[
    0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];

/// Reasons for the end of requests, in the order of [`Snapshot::ended`].
pub(super) const ENDS: [&str; 7] = [
    "stop",
    "length",
    "capacity",
    "interrupted",
    "cancelled",
    "deadline",
    "error",
];

/// All metrics at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Waiting requests.
    pub waiting: u64,
    /// Running requests.
    pub running: u64,
    /// Share of all cache slots that running sequences use, 0 to 1.
    pub cache_use: f64,
    /// Bytes of caches of running sequences, and of those kept for prefix reuse.
    pub cache_bytes: [u64; 2],
    /// Prompt tokens fed or reused.
    pub prompt_tokens: u64,
    /// Reused tokens among them, which another request had computed.
    pub reused_tokens: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
    /// Decode steps, each with one token of some sequences.
    pub steps: u64,
    /// Requests refused because the queue was full.
    pub rejected: u64,
    /// Requests ended: by stop, length, capacity, interruption, cancellation, deadline, error.
    pub ended: [u64; ENDS.len()],
    /// From submission to the first token.
    pub to_first_token: Histogram,
    /// From one token of a request to its next.
    pub between_tokens: Histogram,
    /// From submission to the first chunk of the prompt.
    pub queued: Histogram,
    /// From submission to the end.
    pub whole: Histogram,
}

impl Snapshot {
    fn new() -> Self {
        Snapshot {
            waiting: 0,
            running: 0,
            cache_use: 0.0,
            cache_bytes: [0; 2],
            prompt_tokens: 0,
            reused_tokens: 0,
            generated_tokens: 0,
            steps: 0,
            rejected: 0,
            ended: [0; ENDS.len()],
            to_first_token: Histogram::new(TO_FIRST_TOKEN),
            between_tokens: Histogram::new(BETWEEN_TOKENS),
            queued: Histogram::new(TO_FIRST_TOKEN),
            whole: Histogram::new(WHOLE),
        }
    }

    /// Requests that ended for a reason of [`ENDS`].
    pub fn ended_by(&self, reason: &str) -> u64 {
        let at = ENDS.iter().position(|end| *end == reason);
        at.map_or(0, |at| self.ended[at])
    }
}

/// The metrics of a scheduler.
#[derive(Debug)]
pub struct Metrics {
    /// All except those that other threads count.
    counted: Mutex<Snapshot>,
    rejected: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            counted: Mutex::new(Snapshot::new()),
            rejected: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// The current metrics.
    pub fn snapshot(&self) -> Snapshot {
        let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        Snapshot {
            rejected: self.rejected.load(Ordering::Relaxed),
            ..counted.clone()
        }
    }

    pub(super) fn reject(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.counted.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The reasons of [`Snapshot::ended_by`].
pub fn metric_ends() -> &'static [&'static str] {
    &ENDS
}

/// The name of a successful end of a request.
pub(super) fn end_of(reason: FinishReason) -> &'static str {
    reason.name()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_up_to_their_bound() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);
        for seconds in [0.05, 0.1, 0.5, 1.0, 3.0] {
            histogram.observe(Duration::from_secs_f64(seconds));
        }
        assert_eq!((histogram.counts.clone(), histogram.count()), (vec![2, 2, 1], 5));
        assert!((histogram.sum - 4.65).abs() < 1e-9);
    }

    #[test]
    fn every_end_has_a_place() {
        use FinishReason::*;
        for reason in [Stop, Length, Capacity, Interrupted] {
            assert!(ENDS.contains(&end_of(reason)));
        }
    }
}
