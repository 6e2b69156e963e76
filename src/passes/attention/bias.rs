//! Biases of scores that are not masks: ALiBi (<https://arxiv.org/abs/2108.12409>), a slope per head times the
//! distance.
//!
//! Adding a constant to a whole row does not change its softmax. So the bias only needs to grow by `slope * distance`
//! between the slots of a row: exporters count the distance from the first slot, from the token, or from the end.

use crate::tensor::DType;

/// Maximum deviation of a bias from its slope if the export computes it in a half type: the error of a score is the
/// same.
const LARGEST_ROUNDING: f32 = 0.01;

/// Added to scores: `[batch, heads, tokens, slots]`.
pub(super) struct Bias {
    heads: usize,
    /// Batch, tokens, slots.
    sizes: [usize; 3],
    values: Vec<f32>,
    /// The coarsest type of its terms.
    dtype: DType,
}

impl Bias {
    /// Returns the number for a head and `[batch, token, slot]`.
    pub fn new(heads: usize, sizes: [usize; 3], at: impl Fn(usize, [usize; 3]) -> f32) -> Bias {
        let [batch, tokens, slots] = sizes;
        let mut values = Vec::with_capacity(batch * heads * tokens * slots);
        for b in 0..batch {
            for h in 0..heads {
                for t in 0..tokens {
                    values.extend((0..slots).map(|s| at(h, [b, t, s])));
                }
            }
        }
        Bias {
            heads,
            sizes,
            values,
            dtype: DType::F32,
        }
    }

    /// The same, if the export computes it in this type.
    pub fn in_type(mut self, dtype: DType) -> Bias {
        if dtype.is_half() {
            self.dtype = dtype;
        }
        self
    }

    /// The sum with another term of this type.
    pub fn plus(mut self, other: Bias, dtype: DType) -> Result<Bias, String> {
        if self.heads != other.heads {
            let both = [self.heads, other.heads];
            return Err(format!("adds biases of {both:?} heads to its scores"));
        }
        for (value, more) in self.values.iter_mut().zip(&other.values) {
            *value += more;
        }
        Ok(self.in_type(dtype))
    }

    fn row(&self, b: usize, h: usize, t: usize) -> &[f32] {
        let [_, tokens, slots] = self.sizes;
        &self.values[((b * self.heads + h) * tokens + t) * slots..][..slots]
    }

    /// Whether each head's bias grows approximately by these slopes: the tolerance is far below the effect of a table
    /// that ends or an origin that moves.
    pub fn is_about(&self, open: &[bool], slopes: &[f32]) -> bool {
        let found = self.slopes(open);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * b.abs();
        found.len() == slopes.len() && found.iter().zip(slopes).all(near)
    }

    /// The slope of each head, from the last row; `open` marks the slots that are attended to.
    pub fn slopes(&self, open: &[bool]) -> Vec<f32> {
        let [_, tokens, slots] = self.sizes;
        let open = &open[(tokens - 1) * slots..tokens * slots];
        let (first, last) = (open.iter().position(|o| *o), open.iter().rposition(|o| *o));
        let (Some(first), Some(last)) = (first, last) else {
            return vec![0.0; self.heads];
        };
        let slope = |h: usize| {
            let row = self.row(0, h, tokens - 1);
            let rise = f64::from(row[last]) - f64::from(row[first]);
            simplest(
                rise / (last - first).max(1) as f64,
                row[first].abs().max(row[last].abs()),
                last - first,
            )
        };
        (0..self.heads).map(slope).collect()
    }
}

/// The number with the fewest bits within the rounding error of a bias of this size. Slopes are powers of two or of its
/// roots, computed in fp32; a quotient of differences has a small error.
fn simplest(slope: f64, magnitude: f32, distance: usize) -> f32 {
    let slack = f64::from(magnitude) * f64::from(f32::EPSILON) / distance.max(1) as f64;
    let bits = slope as f32;
    for kept in 0..=23u32 {
        let unit = 1u32 << (23 - kept);
        let rounded = f32::from_bits((bits.to_bits() + unit / 2) & !(unit - 1));
        if (f64::from(rounded) - slope).abs() <= slack {
            return rounded;
        }
    }
    bits
}

/// Compares with the definition: in each row, `bias(s) - bias(s') = slope * (s - s')` for all slots that are attended
/// to.
pub(super) fn check(bias: &Option<Bias>, open: &[bool], slots: usize, slopes: &[f32]) -> Result<(), String> {
    let Some(bias) = bias else {
        // Every row with one slot has the same bias.
        let several = open
            .chunks(slots.max(1))
            .any(|row| row.iter().filter(|o| **o).count() > 1);
        return match several && slopes.iter().any(|slope| *slope != 0.0) {
            true => Err("it adds a bias to its scores at some lengths only".into()),
            false => Ok(()),
        };
    };
    let [batch, tokens, slots] = bias.sizes;
    let relative = match bias.dtype {
        DType::F16 => 1e-3,
        DType::Bf16 => 8e-3,
        _ => 4.0 * f32::EPSILON,
    };
    for b in 0..batch {
        for t in 0..tokens {
            let open = &open[(b * tokens + t) * slots..][..slots];
            let Some(first) = open.iter().position(|o| *o) else {
                continue;
            };
            for h in 0..bias.heads {
                let row = bias.row(b, h, t);
                let slope = slopes.get(h).copied().unwrap_or(0.0);
                for s in (first..slots).filter(|s| open[*s]) {
                    let expected = f64::from(slope) * (s - first) as f64;
                    let seen = f64::from(row[s]) - f64::from(row[first]);
                    let error = (seen - expected).abs() as f32;
                    let rounding = relative * row[s].abs().max(row[first].abs()).max(1.0);
                    if error > rounding {
                        return Err(format!(
                            "it adds {} to the score of slot {first} in head {h}, and {} to that of slot {s}: only a bias that grows \
                             by {slope} from slot to slot, as in ALiBi, is understood",
                            row[first], row[s]
                        ));
                    }
                    if error > LARGEST_ROUNDING && bias.dtype.is_half() {
                        return Err(format!(
                            "its bias (ALiBi) is rounded to {}: at slot {s} it is off by {error}, which the scores would show; \
                             export the model in fp32",
                            bias.dtype
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(row: impl Fn(usize, usize) -> f32, heads: usize, slots: usize) -> Bias {
        Bias::new(heads, [1, 2, slots], |h, [_, _, s]| row(h, s))
    }

    #[test]
    fn slopes_are_found_from_any_origin() {
        let slopes = [0.5f32, 0.00390625, 0.70710677];
        for origin in [0.0f32, -7.0, -4096.0] {
            let bias = of(|h, s| slopes[h] * (s as f32 + origin), 3, 4000);
            let open = vec![true; 2 * 4000];
            let found = bias.slopes(&open);
            for (found, slope) in found.iter().zip(slopes) {
                assert!((found - slope).abs() <= 1e-6 * slope, "{found} for {slope}");
            }
            check(&Some(bias), &open, 4000, &found).unwrap();
        }
    }

    #[test]
    fn what_is_no_slope_is_refused() {
        let open = vec![true; 2 * 100];
        let bent = of(|_, s| if s < 50 { s as f32 } else { 50.0 }, 1, 100);
        let slopes = bent.slopes(&open);
        check(&Some(bent), &open, 100, &slopes).unwrap_err();
        check(&None, &open, 100, &[0.5]).unwrap_err();
        check(&None, &open, 100, &[]).unwrap();
        // A half type at 300 * 0.7, where adjacent numbers differ by an eighth.
        let rounded = |x: f32| half::f16::from_f32(x).to_f32();
        let coarse = of(|_, s| rounded(0.7 * s as f32), 1, 300);
        let open = vec![true; 2 * 300];
        let coarse = coarse.in_type(DType::F16);
        let error = check(&Some(coarse), &open, 300, &[0.7]).unwrap_err();
        assert!(error.contains("rounded to f16"), "{error}");
    }
}
