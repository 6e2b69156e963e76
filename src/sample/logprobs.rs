//! Log-probabilities of the model's own distribution: the log-softmax of the raw logits, in f64.

use std::cmp::Ordering;

/// The distribution of one step, queried for some ids.
pub struct Logprobs<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> Logprobs<'a> {
    /// `logits` is `[vocabulary]`. NaN counts as impossible.
    pub fn new(logits: &'a [f32]) -> Self {
        let finite = || logits.iter().copied().filter(|l| !l.is_nan()).map(f64::from);
        let max = finite().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + finite().map(|l| (l - max).exp()).sum::<f64>().ln();
        Logprobs { logits, log_sum }
    }

    /// Natural log of the probability of `id`.
    pub fn of(&self, id: u32) -> f64 {
        f64::from(self.logits[id as usize]) - self.log_sum
    }

    /// The `n` most probable ids with their log-probabilities, in descending order; the lower id first among equals.
    pub fn top(&self, n: usize) -> Vec<(u32, f64)> {
        let n = n.min(self.logits.len());
        if n == 0 {
            return Vec::new();
        }
        let by_logit = |a: &u32, b: &u32| -> Ordering {
            let (x, y) = (self.logits[*a as usize], self.logits[*b as usize]);
            let nan_last = x.is_nan().cmp(&y.is_nan());
            nan_last
                .then(y.partial_cmp(&x).unwrap_or(Ordering::Equal))
                .then(a.cmp(b))
        };
        let mut ids: Vec<u32> = (0..self.logits.len() as u32).collect();
        if n < ids.len() {
            ids.select_nth_unstable_by(n - 1, by_logit);
            ids.truncate(n);
        }
        ids.sort_unstable_by(by_logit);
        ids.into_iter().map(|id| (id, self.of(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalized_and_sorted() {
        let logits = [1000.0, 1000.0 + 2f32.ln(), f32::NAN, 1000.0];
        let logprobs = Logprobs::new(&logits);
        assert!((logprobs.of(0).exp() - 0.25).abs() < 1e-4);
        let ids: Vec<u32> = logprobs.top(3).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, [1, 0, 3]);
        assert_eq!(logprobs.top(99).len(), 4);
        assert!(logprobs.top(0).is_empty());
    }
}
