//! Second moments as a triangular factor.

use rayon::prelude::*;

/// Added to each diagonal element, as a share of it: channels that are correlated in one text are less so in others. Of 0.05, 0.1, 0.2
/// and 0.4, 0.2 gave the smallest KL divergence (docs/explanation/quantized-weights.md).
const OWN_DAMPING: f64 = 0.2;
/// Added to each diagonal element, as a share of their mean: a channel that is almost always 0 in one text is not in others.
const MEAN_DAMPING: f64 = 5e-4;

/// The second moments of a span's channels as a triangular factor.
pub struct Factor {
    /// Number of channels.
    pub(super) width: usize,
    /// `R` in row-major order, `[width, width]`; 0 below the diagonal.
    pub(super) upper: Vec<f32>,
    /// The sum of squares of each of its rows: the diagonal of `H`.
    pub(super) squares: Vec<f32>,
}

impl Factor {
    /// Factors `moments`, `[width, width]`, symmetric and positive semidefinite; only the upper triangle is read. Means over `tokens`
    /// tokens, or sums: only ratios matter. The fewer tokens for each channel, the less their correlations count. `None` if a
    /// value is not finite.
    pub fn of(moments: &[f32], width: usize, tokens: usize) -> Option<Factor> {
        assert_eq!(moments.len(), width * width, "moments of other channels");
        let mean = (0..width).map(|i| f64::from(moments[i * width + i])).sum::<f64>() / width.max(1) as f64;
        if !mean.is_finite() {
            return None;
        }
        // Inputs that are always 0 leave no weights: every error counts the same.
        let mean = if mean > 0.0 { mean } else { 1.0 };
        let mut upper: Vec<f64> = moments.iter().map(|m| f64::from(*m)).collect();
        let own = OWN_DAMPING + width as f64 / tokens.max(1) as f64;
        for i in 0..width {
            let value = &mut upper[i * width + i];
            *value += own * *value + MEAN_DAMPING * mean;
        }
        let squares = (0..width).map(|i| upper[i * width + i] as f32).collect();
        factorize(&mut upper, width)?;
        Some(Factor {
            width,
            upper: upper.into_iter().map(|r| r as f32).collect(),
            squares,
        })
    }
}

/// Replaces `H` by the upper triangular `R` of `H = R Rᵀ`, from the last column to the first; `None` if `H` is not positive definite.
fn factorize(matrix: &mut [f64], n: usize) -> Option<()> {
    /// Columns per block of the algorithm.
    const PANEL: usize = 32;
    let mut end = n;
    while end > 0 {
        let start = end.saturating_sub(PANEL);
        // The panel's own triangle, then the rows above it.
        for k in (start..end).rev() {
            let pivot = matrix[k * n + k] - (k + 1..end).map(|j| matrix[k * n + j].powi(2)).sum::<f64>();
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            let pivot = pivot.sqrt();
            matrix[k * n + k] = pivot;
            let (above, rest) = matrix.split_at_mut(k * n);
            let own = &rest[k + 1..end];
            above.par_chunks_mut(n).with_min_len(64).for_each(|row| {
                let sum: f64 = row[k + 1..end].iter().zip(own).map(|(a, b)| a * b).sum();
                row[k] = (row[k] - sum) / pivot;
            });
        }
        // Subtracts the panel's R Rᵀ from the rows above it.
        let (left, _) = matrix.split_at_mut(start * n);
        let panel: Vec<f64> = left.chunks(n).flat_map(|row| row[start..end].to_vec()).collect();
        let width = end - start;
        left.par_chunks_mut(n).enumerate().with_min_len(8).for_each(|(i, row)| {
            let own = &panel[i * width..(i + 1) * width];
            for (value, other) in row[i..start].iter_mut().zip(panel[i * width..].chunks(width)) {
                *value -= own.iter().zip(other).map(|(a, b)| a * b).sum::<f64>();
            }
        });
        end = start;
    }
    for i in 1..n {
        matrix[i * n..i * n + i].fill(0.0);
    }
    Some(())
}
