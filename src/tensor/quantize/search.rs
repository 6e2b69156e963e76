//! The search for the scale and zero point of one run, and the arithmetic of types of codes.

use super::super::dtype::{DType, FloatFormat, Numbers};
use super::super::element::{FloatElement, with_float};
use super::super::narrow;
use super::{Format, NotFinite};

/// The arithmetic of a type of codes.
#[derive(Clone, Copy)]
pub(in crate::tensor) enum Code {
    /// From `low` to `high`; `zeros`: with zero points.
    Int { low: f32, high: f32, zeros: bool },
    /// A narrow float.
    Float { dtype: DType, format: FloatFormat },
}

/// Adding it to a float of magnitude below 2^22 and subtracting it again rounds to the nearest whole number, ties to
/// even. That vectorizes on every machine; `round_ties_even` is a call on some.
const ROUND: f32 = 12_582_912.0;

impl Code {
    pub(in crate::tensor) fn of(format: Format) -> Code {
        let dtype = format.codes;
        match dtype.numbers() {
            Numbers::Float(format) => Code::Float { dtype, format },
            _ => Code::Int {
                low: dtype.int_range().0 as f32,
                high: dtype.int_range().1 as f32,
                zeros: format.zero_points,
            },
        }
    }

    /// The code of a value, as a number.
    #[inline]
    pub(in crate::tensor) fn nearest(self, value: f32, scale: f32, zero: f32) -> f32 {
        match self {
            Code::Int { low, high, .. } => {
                let at = value / scale + zero;
                let at = if at < low { low } else { at };
                let at = if at > high { high } else { at };
                (at + ROUND) - ROUND
            }
            Code::Float { format, .. } => nearest_float(value / scale, format),
        }
    }

    /// The bits of a code that [`Code::nearest`] returned.
    pub(in crate::tensor) fn bits(self, code: f32) -> u8 {
        match self {
            Code::Int { .. } => code as i32 as u8,
            Code::Float { dtype, .. } => narrow::encode(dtype, f64::from(code)),
        }
    }
}

/// The nearest number of a narrow float, ties to even, saturating.
#[inline]
pub(super) fn nearest_float(value: f32, format: FloatFormat) -> f32 {
    let most = format.max() as f32;
    let value = if value > most { most } else { value };
    let value = if value < -most { -most } else { value };
    // The power of two below the value, or that of the subnormal numbers; the distance of neighbors is a fraction of
    // it.
    let smallest = ((1 - format.bias() + 127) as u32) << 23;
    let power = f32::from_bits((value.to_bits() & 0x7f80_0000).max(smallest));
    let unit = power / (1u32 << format.mantissa) as f32;
    let round = unit * ROUND;
    (value + round) - round
}

/// A positive scale in its dtype.
pub(in crate::tensor) fn stored(scale: f32, dtype: DType) -> f32 {
    let smallest = |dtype: DType| match dtype {
        DType::F16 => half::f16::from_bits(1).to_f32(),
        DType::Bf16 => half::bf16::from_bits(1).to_f32(),
        _ => f32::from_bits(1),
    };
    let rounded = with_float!(dtype, F => F::from_f32(scale).to_f32(), else scale);
    rounded.max(smallest(dtype))
}

/// Candidates for an end of the range of values with zero points, each 0.05 of the range shorter than the one before.
const STEPS: usize = 8;

/// The search for the scale of one run.
pub(super) struct Search<'a> {
    pub code: Code,
    /// The values of the run.
    pub values: &'a [f32],
    /// The weight of each error.
    pub weights: Option<&'a [f32]>,
    /// Element type of the scales.
    pub dtype: DType,
}

/// A scale and zero point with their error.
#[derive(Clone, Copy)]
struct Candidate {
    scale: f32,
    zero: f32,
    error: f64,
}

impl Search<'_> {
    /// Scale and zero point of least error.
    pub fn best(&self) -> Result<(f32, f32), NotFinite> {
        let (mut low, mut high) = (0f32, 0f32);
        let mut finite = true;
        for value in self.values {
            low = low.min(*value);
            high = high.max(*value);
            finite &= value.is_finite();
        }
        if !finite {
            let count = self.values.iter().filter(|v| !v.is_finite()).count();
            return Err(NotFinite { count });
        }
        if low == 0.0 && high == 0.0 {
            let zero = match self.code {
                Code::Int { low, high, .. } => 0f32.clamp(low, high),
                Code::Float { .. } => 0.0,
            };
            return Ok((1.0, zero));
        }
        let most = high.max(-low);
        let mut best = None;
        match self.code {
            Code::Int {
                low: first,
                high: last,
                zeros: true,
            } => {
                // Both ends of the range shrink.
                let ends = |below: usize, above: usize| {
                    let shrunk = |end: f32, steps: usize| end * (1.0 - 0.05 * steps as f32);
                    (shrunk(low, below), shrunk(high, above))
                };
                let equal =
                    (0..STEPS).filter(|steps| self.consider_range(&mut best, ends(*steps, *steps), [first, last]));
                let at = equal.last().unwrap_or(0);
                if last - first <= 15.0 {
                    self.descend(&mut best, at, ends, [first, last]);
                }
            }
            Code::Int { high: last, .. } => {
                // The magnitude of the lowest code exceeds the highest by 1: half of that is another candidate.
                let steps = (0..17u8).map(|k| last * (1.0 + 0.04 * f32::from(k)));
                for divisor in steps.chain([last + 0.5, last + 1.0]) {
                    self.consider(&mut best, self.stored(most / divisor), 0.0);
                }
            }
            Code::Float { format, .. } => {
                // Powers of two change only the range, so candidates are fractions of an octave.
                for k in -2..8i8 {
                    let factor = 2f32.powf(f32::from(k) / 8.0);
                    self.consider(&mut best, self.stored(most / format.max() as f32 * factor), 0.0);
                }
            }
        }
        let mut best = best.expect("there are candidates");
        for _ in 0..4 {
            let Some(scale) = self.refitted(best) else { break };
            let error = self.error(scale, best.zero);
            if error >= best.error {
                break;
            }
            best = Candidate { scale, error, ..best };
        }
        Ok((best.scale, best.zero))
    }

    /// Considers a range of values over codes from `first` to `last`, with the zero point of its scale as stored and as computed: which
    /// is better depends on the values, and most are equal. Whether it is the best so far.
    fn consider_range(&self, best: &mut Option<Candidate>, (low, high): (f32, f32), [first, last]: [f32; 2]) -> bool {
        let exact = (high - low) / (last - first);
        let scale = self.stored(exact);
        let zero = |of: f32| ((first - low / of).clamp(first, last) + ROUND) - ROUND;
        let (of_stored, of_exact) = (zero(scale), zero(exact));
        let first = self.consider(best, scale, of_stored);
        let second = of_exact != of_stored && self.consider(best, scale, of_exact);
        first || second
    }

    /// Shrinks the ends of the range by different numbers of steps: moves to the best neighbor until none is better. Begins where both
    /// are shrunk by `at` steps; all equal numbers have been considered.
    fn descend(
        &self,
        best: &mut Option<Candidate>,
        at: usize,
        ends: impl Fn(usize, usize) -> (f32, f32),
        codes: [f32; 2],
    ) {
        let mut seen = [[false; STEPS]; STEPS];
        (0..STEPS).for_each(|steps| seen[steps][steps] = true);
        let mut at = (at, at);
        loop {
            let center = at;
            let around = |i: usize| i.saturating_sub(1)..=(i + 1).min(STEPS - 1);
            for (below, above) in around(center.0).flat_map(|below| around(center.1).map(move |above| (below, above))) {
                let unseen = !std::mem::replace(&mut seen[below][above], true);
                if unseen && self.consider_range(best, ends(below, above), codes) {
                    at = (below, above);
                }
            }
            if at == center {
                return;
            }
        }
    }

    /// Whether the candidate is the best so far.
    fn consider(&self, best: &mut Option<Candidate>, scale: f32, zero: f32) -> bool {
        let error = self.error(scale, zero);
        // NaN, where a scale is too large for its dtype, is never less.
        let better = best.is_none_or(|best| error < best.error);
        if better {
            *best = Some(Candidate { scale, zero, error });
        }
        better
    }

    fn stored(&self, scale: f32) -> f32 {
        stored(scale, self.dtype)
    }

    /// The least-squares scale of the codes of a candidate.
    fn refitted(&self, of: Candidate) -> Option<f32> {
        let (mut above, mut below) = (0f64, 0f64);
        for (i, value) in self.values.iter().enumerate() {
            let weight = f64::from(self.weights.map_or(1.0, |h| h[i]));
            let code = f64::from(self.code.nearest(*value, of.scale, of.zero) - of.zero);
            above += weight * f64::from(*value) * code;
            below += weight * code * code;
        }
        let scale = (above / below) as f32;
        (scale.is_finite() && scale > 0.0).then(|| self.stored(scale))
    }

    /// The weighted sum of squared errors.
    fn error(&self, scale: f32, zero: f32) -> f64 {
        const LANES: usize = 8;
        // Sums of a few dozen terms in f32, summed in f64: precise for long rows, fast for short ones.
        const SPAN: usize = 64;
        let mut total = 0f64;
        for (i, values) in self.values.chunks(SPAN).enumerate() {
            let weights = self.weights.map(|h| &h[i * SPAN..i * SPAN + values.len()]);
            let mut sums = [0f32; LANES];
            let (whole, rest) = values.as_chunks::<LANES>();
            let term = |value: f32| {
                let error = value - (self.code.nearest(value, scale, zero) - zero) * scale;
                error * error
            };
            match weights {
                None => {
                    for values in whole {
                        for (sum, value) in sums.iter_mut().zip(values) {
                            *sum += term(*value);
                        }
                    }
                    total += rest.iter().map(|v| f64::from(term(*v))).sum::<f64>();
                }
                Some(weights) => {
                    let (w, r) = weights.as_chunks::<LANES>();
                    for (values, weights) in whole.iter().zip(w) {
                        for ((sum, value), weight) in sums.iter_mut().zip(values).zip(weights) {
                            *sum += term(*value) * weight;
                        }
                    }
                    let terms = rest.iter().zip(r).map(|(v, w)| f64::from(term(*v) * w));
                    total += terms.sum::<f64>();
                }
            }
            total += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>();
        }
        total
    }
}
