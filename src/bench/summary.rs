//! Summary of a list of samples: mean, median, spread, percentiles, stability.

use serde::{Deserialize, Serialize};

/// A summary of samples in one unit, which is named by the field.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub count: usize,
    pub mean: f64,
    pub median: f64,
    /// Standard deviation of the sample: divided by `count - 1`; 0 for a single one.
    pub stddev: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub min: f64,
    pub max: f64,
}

/// First and last quarter may differ by this factor.
pub const STABLE_WITHIN: f64 = 1.05;

impl Summary {
    /// `None` without samples, or if one is not a finite number.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        if samples.is_empty() || samples.iter().any(|s| !s.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let mean = mean(samples);
        let squares: f64 = samples.iter().map(|s| (s - mean) * (s - mean)).sum();
        let stddev = match samples.len() {
            1 => 0.0,
            n => (squares / (n - 1) as f64).sqrt(),
        };
        let median = percentile(&sorted, 50.0);
        Some(Summary {
            count: samples.len(),
            mean,
            median,
            stddev,
            p50: median,
            p90: percentile(&sorted, 90.0),
            p99: percentile(&sorted, 99.0),
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        })
    }

    /// Its numbers by name, in the order of the fields, without the count.
    pub fn numbers(&self) -> [(&'static str, f64); 8] {
        [
            ("mean", self.mean),
            ("median", self.median),
            ("stddev", self.stddev),
            ("p50", self.p50),
            ("p90", self.p90),
            ("p99", self.p99),
            ("min", self.min),
            ("max", self.max),
        ]
    }
}

/// Linear interpolation between the two closest ranks, numpy's default (method 7 of Hyndman and Fan, "Sample Quantiles in
/// Statistical Packages", 1996). `sorted` must not be empty; `percent` is 0 to 100.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = percent / 100.0 * (sorted.len() - 1) as f64;
    let below = rank.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * (rank - below as f64)
}

/// Whether the means of the first and the last quarter of the samples agree within 5 %. Fewer than four samples are
/// never stable.
pub fn stable(samples: &[f64]) -> bool {
    let quarter = samples.len() / 4;
    if quarter == 0 {
        return false;
    }
    let (first, last) = (mean(&samples[..quarter]), mean(&samples[samples.len() - quarter..]));
    let (low, high) = (first.min(last), first.max(last));
    high <= low * STABLE_WITHIN
}

fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `numpy.percentile([3, 1, 2, 10], [50, 90, 99])`, `numpy.std(…, ddof=1)`.
    #[test]
    fn by_hand() {
        let s = Summary::of(&[3.0, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!((s.count, s.mean, s.median, s.p50), (4, 4.0, 2.5, 2.5));
        assert_eq!((s.min, s.max), (1.0, 10.0));
        assert!((s.p90 - 7.9).abs() < 1e-12 && (s.p99 - 9.79).abs() < 1e-12);
        // Squares of -1, -3, -2, 6: 50 over 3.
        assert!((s.stddev - (50.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn one_and_none() {
        let one = Summary::of(&[2.0]).unwrap();
        assert_eq!((one.count, one.stddev, one.p99, one.min), (1, 0.0, 2.0, 2.0));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn quarters() {
        assert!(stable(&[1.0, 9.0, 9.0, 1.05]));
        assert!(!stable(&[1.0, 1.0, 1.0, 1.06]));
        assert!(!stable(&[1.06, 1.0, 1.0, 1.0]));
        assert!(stable(&[1.0, 1.1, 5.0, 5.0, 5.0, 5.0, 1.0, 1.1, 1.05][..8]));
        assert!(!stable(&[1.0, 1.0, 1.0]), "too few to tell");
    }
}
