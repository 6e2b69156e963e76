//! From floats to codes: round to nearest, with the scale of every run of codes searched for the least squared error.
//!
//! A run is a set of values that share a scale: a block, a channel, a tensor. The search tries the scale that just fits
//! the largest magnitude (*absmax*), smaller ones, which clip a few numbers and are finer for the others, and then the
//! least-squares scale of the codes found: `Σ h·w·c / Σ h·c²` for values `w`, codes `c` and weights `h` of the error.
//! The absmax scale is a candidate, so the result is never worse. Scales are compared as they will be stored, rounded
//! to the scales' dtype. They are positive, even if all values are 0: back ends refuse others.
//!
//! The error of a value can be weighted by the importance of its column: how much the values that it multiplies vary
//! ([`crate::quantize`] measures that on a text).
//!
//! Runs are processed in parallel; the result depends only on the values.

use std::fmt;
use std::num::NonZeroUsize;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::dtype::{DType, FloatFormat, Numbers};
use super::element::{FloatElement, with_float};
use super::quantized::{Granularity, QuantizedError};
use super::{Tensor, coded, narrow};

/// The format of a tensor's codes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Format {
    /// An integer of at most 8 bits, or a float of 4 or 8.
    pub codes: DType,
    /// Which codes share a scale.
    pub granularity: Granularity,
    /// Codes have zero points, so that their range need not lie around 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub zero_points: bool,
}

impl fmt::Display for Format {
    /// As [`Quantized`](crate::graph::Quantized) is displayed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.codes, self.granularity)?;
        match self.zero_points {
            true => write!(f, " with zero points"),
            false => Ok(()),
        }
    }
}

impl Format {
    /// Whether values of a shape can have this format with contiguous runs.
    pub fn check(self, shape: &[usize]) -> Result<(), QuantizedError> {
        let (codes, numbers) = (self.codes, self.codes.numbers());
        let known = match numbers {
            Numbers::Signed => codes.bits() <= 8,
            Numbers::Unsigned => codes.bits() <= 8 && self.zero_points,
            Numbers::Float(_) => codes.is_storage_only() && codes != DType::F8E8M0 && !self.zero_points,
            Numbers::Bool | Numbers::Table(_) => false,
        };
        if !known {
            return Err(QuantizedError::Format { format: self });
        }
        self.granularity.scale_shape(shape).map(|_| ())
    }

    /// Whether runs are contiguous in a tensor of this shape.
    pub fn has_contiguous_runs(self, shape: &[usize]) -> bool {
        match self.granularity {
            Granularity::Tensor => true,
            Granularity::Channel { axis } => axis == 0,
            Granularity::Block { axis, .. } => axis + 1 == shape.len(),
        }
    }

    /// Elements of a run.
    fn run(self, shape: &[usize]) -> usize {
        let all: usize = shape.iter().product();
        match self.granularity {
            Granularity::Tensor => all,
            Granularity::Channel { .. } => all / shape[0].max(1),
            Granularity::Block { size, .. } => size,
        }
    }
}

/// The scales, and zero points if the format has them, in the shape of [`Granularity::scale_shape`].
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// In the values' dtype.
    pub scales: Tensor,
    /// In the codes' dtype.
    pub zero_points: Option<Tensor>,
}

/// Values without codes: NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// How many.
    pub count: usize,
}

/// The scales of least squared error. `importance`: one number for each index of the last axis, at least 0, the weight
/// of its squared error; 1 if not given. Panics unless [`Format::check`] accepts the shape, runs are contiguous and
/// values are f32, f16 or bf16.
pub fn scales(values: &Tensor, importance: Option<&[f32]>, format: Format) -> Result<Scales, NotFinite> {
    let columns = values.shape().last().copied().unwrap_or(1);
    assert!(
        importance.is_none_or(|h| h.len() == columns),
        "importance of other columns"
    );
    let runs = Runs::of(values, format);
    let found = runs.map(|start, run| {
        let first = start % columns;
        let weights = importance.map(|h| {
            h.iter()
                .cycle()
                .skip(first)
                .take(run.len())
                .copied()
                .collect::<Vec<f32>>()
        });
        Search {
            code: Code::of(format),
            values: run,
            weights: weights.as_deref(),
            dtype: values.dtype(),
        }
        .best()
    });
    let count = found.iter().map(|found| found.err().map_or(0, |n| n.count)).sum();
    if count > 0 {
        return Err(NotFinite { count });
    }
    let found: Vec<(f32, f32)> = found.into_iter().flatten().collect();
    let shape = format
        .granularity
        .scale_shape(values.shape())
        .expect("checked by the caller");
    let wide: Vec<f64> = found.iter().map(|(scale, _)| f64::from(*scale)).collect();
    let zeros: Vec<i64> = found.iter().map(|(_, zero)| *zero as i64).collect();
    Ok(Scales {
        scales: Tensor::from_f64_as(values.dtype(), shape.clone(), &wide),
        zero_points: format
            .zero_points
            .then(|| Tensor::from_i64_as(format.codes, shape, &zeros)),
    })
}

/// The nearest codes for scales that [`scales`] returned for the same values and format.
pub fn codes(values: &Tensor, scales: &Scales, format: Format) -> Tensor {
    let factors = scales.scales.to_f32();
    let zeros = scales.zero_points.as_ref().map(Tensor::to_f32);
    let code = Code::of(format);
    let runs = Runs::of(values, format);
    let length = runs.length;
    let found = runs.map(|start, run| {
        let at = start / length;
        let (scale, zero) = (factors[at], zeros.as_ref().map_or(0.0, |z| z[at]));
        run.iter().map(|v| code.bits(*v, scale, zero)).collect::<Vec<u8>>()
    });
    let bytes = coded(format.codes, found.concat());
    Tensor::new(format.codes, values.shape().to_vec(), Bytes::from(bytes)).expect("a code for every value")
}

/// The runs of a tensor.
struct Runs<'a> {
    values: &'a Tensor,
    /// Elements of one.
    length: usize,
}

impl<'a> Runs<'a> {
    fn of(values: &'a Tensor, format: Format) -> Self {
        assert!(
            format.has_contiguous_runs(values.shape()),
            "runs that are not contiguous"
        );
        let length = format.run(values.shape()).max(1);
        Runs { values, length }
    }

    /// The results of `of` for the first index and the values of each run, in order.
    fn map<T: Send>(&self, of: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
        /// Elements per thread.
        const SHARE: usize = 1 << 16;
        let count = self.values.len() / self.length;
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let shares = (self.values.len() / SHARE).clamp(1, threads);
        let part = |share: usize| {
            let mut run = Vec::with_capacity(self.length);
            let range = count * share / shares..count * (share + 1) / shares;
            range
                .map(|at| {
                    self.read(at, &mut run);
                    of(at * self.length, &run)
                })
                .collect::<Vec<T>>()
        };
        if shares == 1 {
            return part(0);
        }
        let part = &part;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..shares).map(|share| scope.spawn(move || part(share))).collect();
            let parts = threads
                .into_iter()
                .map(|thread| thread.join().expect("it does not panic"));
            parts.flatten().collect()
        })
    }

    /// The values of one run.
    fn read(&self, at: usize, run: &mut Vec<f32>) {
        run.clear();
        with_float!(self.values.dtype(), F => {
            let size = size_of::<F>();
            let bytes = &self.values.data()[at * self.length * size..(at + 1) * self.length * size];
            run.extend(bytes.chunks_exact(size).map(|b| F::read(b).to_f32()));
        }, else panic!("{} is not a float type to quantize", self.values.dtype()));
    }
}

/// The arithmetic of a type of codes.
#[derive(Clone, Copy)]
enum Code {
    /// From `low` to `high`; `zeros`: with zero points.
    Int { low: f32, high: f32, zeros: bool },
    /// A narrow float.
    Float { dtype: DType, format: FloatFormat },
}

/// Adding it to a float of magnitude below 2^22 and subtracting it again rounds to the nearest whole number, ties to
/// even. That vectorizes on every machine; `round_ties_even` is a call on some.
const ROUND: f32 = 12_582_912.0;

impl Code {
    fn of(format: Format) -> Code {
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
    fn nearest(self, value: f32, scale: f32, zero: f32) -> f32 {
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

    /// The bits of the code of a value.
    fn bits(self, value: f32, scale: f32, zero: f32) -> u8 {
        let code = self.nearest(value, scale, zero);
        match self {
            Code::Int { .. } => code as i32 as u8,
            Code::Float { dtype, .. } => narrow::encode(dtype, f64::from(code)),
        }
    }
}

/// The nearest number of a narrow float, ties to even, saturating.
#[inline]
fn nearest_float(value: f32, format: FloatFormat) -> f32 {
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

/// The search for the scale of one run.
struct Search<'a> {
    code: Code,
    values: &'a [f32],
    weights: Option<&'a [f32]>,
    /// Element type of the scales.
    dtype: DType,
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
    fn best(&self) -> Result<(f32, f32), NotFinite> {
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
                // Both ends of the range shrink, separately if there are few codes.
                let few = last - first <= 15.0;
                let steps = |n: u8| (0..n).map(|k| 1.0 - 0.05 * f32::from(k));
                for below in steps(8) {
                    for above in steps(8).filter(|above| few || *above == below) {
                        let (low, high) = (low * below, high * above);
                        let exact = (high - low) / (last - first);
                        let scale = self.stored(exact);
                        // With the scale as stored, or as computed: which is better depends on the values.
                        for of in [scale, exact] {
                            let zero = ((first - low / of).clamp(first, last) + ROUND) - ROUND;
                            self.consider(&mut best, scale, zero);
                        }
                    }
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

    fn consider(&self, best: &mut Option<Candidate>, scale: f32, zero: f32) {
        let error = self.error(scale, zero);
        // NaN, where a scale is too large for its dtype, is never less.
        if best.is_none_or(|best| error < best.error) {
            *best = Some(Candidate { scale, zero, error });
        }
    }

    /// A positive scale in its dtype.
    fn stored(&self, scale: f32) -> f32 {
        let smallest = |dtype: DType| match dtype {
            DType::F16 => half::f16::from_bits(1).to_f32(),
            DType::Bf16 => half::bf16::from_bits(1).to_f32(),
            _ => f32::from_bits(1),
        };
        let rounded = with_float!(self.dtype, F => F::from_f32(scale).to_f32(), else scale);
        rounded.max(smallest(self.dtype))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::quantized::{check_values, dequantize};

    /// Random numbers, more of them near 0, with an occasional large one.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count)
            .map(|i| next() + next() + next() * if i % 61 == 0 { 4.0 } else { 1.0 })
            .collect()
    }

    fn format(codes: DType, granularity: Granularity, zero_points: bool) -> Format {
        Format {
            codes,
            granularity,
            zero_points,
        }
    }

    /// Every format of the command line and a few besides.
    fn formats() -> Vec<Format> {
        let mut all = Vec::new();
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel { axis: 0 },
            Granularity::Block { axis: 1, size: 32 },
        ] {
            for (codes, zeros) in [
                (DType::I4, false),
                (DType::U4, true),
                (DType::I8, false),
                (DType::U8, true),
                (DType::I8, true),
                (DType::I2, false),
                (DType::F8E4M3Fn, false),
                (DType::F8E5M2, false),
                (DType::F4E2M1, false),
            ] {
                all.push(format(codes, granularity, zeros));
            }
        }
        all
    }

    fn values_of(values: &Tensor, scales: &Scales, format: Format) -> Vec<f32> {
        let codes = codes(values, scales, format);
        let zeros = scales.zero_points.as_ref();
        assert_eq!(check_values(&codes, &scales.scales, zeros, format.granularity), Ok(()));
        // In f32, so that rounding of the values does not affect the comparison.
        let wide = Tensor::from_f32(scales.scales.shape().to_vec(), &scales.scales.to_f32());
        dequantize(&codes, &wide, zeros, format.granularity).to_f32()
    }

    fn error(values: &[f32], found: &[f32], importance: &[f32]) -> f64 {
        let terms = values.iter().zip(found).zip(importance.iter().cycle());
        terms.map(|((v, f), h)| f64::from(*h) * f64::from(v - f).powi(2)).sum()
    }

    /// The absmax scales, computed independently.
    fn absmax(values: &Tensor, format: Format) -> Scales {
        let numbers = values.to_f32();
        let (mut scales, mut zeros) = (Vec::new(), Vec::new());
        for run in numbers.chunks(format.run(values.shape())) {
            let low = run.iter().copied().fold(0f32, f32::min);
            let high = run.iter().copied().fold(0f32, f32::max);
            let most = f64::from(high.max(-low));
            if format.codes.is_float_format() {
                scales.push(most / format.codes.max());
                continue;
            }
            let (first, last) = format.codes.int_range();
            if !format.zero_points {
                scales.push(most / last as f64);
                continue;
            }
            let scale = f64::from(high - low) / (last - first) as f64;
            scales.push(scale);
            zeros.push((first as f64 - f64::from(low) / scale).round_ties_even() as i64);
        }
        let shape = format.granularity.scale_shape(values.shape()).unwrap();
        Scales {
            scales: Tensor::from_f64_as(values.dtype(), shape.clone(), &scales),
            zero_points: format
                .zero_points
                .then(|| Tensor::from_i64_as(format.codes, shape, &zeros)),
        }
    }

    #[test]
    fn by_hand() {
        // 8 / 8: the lowest code is used, and every value is exact.
        let values = Tensor::from_f32(vec![1, 4], &[-8.0, 7.0, 1.0, 0.0]);
        let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 4 }, false);
        let found = scales(&values, None, int4).unwrap();
        assert_eq!(found.scales.to_f32(), [1.0]);
        assert_eq!(codes(&values, &found, int4).to_i64(), [-8, 7, 1, 0]);
        // From 1 to 16 in fifteen steps needs a zero point, which is below all of them: 0 is included, too.
        let values = Tensor::from_f32(vec![1, 4], &[0.0, 3.0, 30.0, -15.0]);
        let found = scales(&values, None, format(DType::U4, Granularity::Tensor, true)).unwrap();
        assert_eq!(found.scales.to_f32(), [3.0]);
        assert_eq!(found.zero_points.unwrap().to_i64(), [5]);
        // Zeros have a positive scale and the code of 0.
        let zeros = Tensor::from_f32(vec![2, 2], &[0.0; 4]);
        for format in formats()
            .into_iter()
            .filter(|f| !matches!(f.granularity, Granularity::Block { .. }))
        {
            let found = scales(&zeros, None, format).unwrap();
            assert!(found.scales.to_f32().iter().all(|s| *s == 1.0));
            assert_eq!(values_of(&zeros, &found, format), [0.0; 4]);
        }
    }

    #[test]
    fn no_format_is_worse_than_absmax_and_each_error_has_its_bound() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let wide: Vec<f64> = numbers(24 * 96, 5).into_iter().map(f64::from).collect();
            let values = Tensor::from_f64_as(dtype, vec![24, 96], &wide);
            let given = values.to_f32();
            let importance: Vec<f32> = numbers(96, 9).iter().map(|v| v * v).collect();
            for format in formats() {
                let plain = absmax(&values, format);
                for weights in [None, Some(&importance[..])] {
                    let found = scales(&values, weights, format).unwrap();
                    let weights = weights.unwrap_or(&[1.0]);
                    let ours = error(&given, &values_of(&values, &found, format), weights);
                    let theirs = error(&given, &values_of(&values, &plain, format), weights);
                    // Sums of f32 lose a few digits.
                    assert!(ours <= theirs * (1.0 + 1e-5), "{dtype} {format}: {ours} > {theirs}");
                    let run = format.run(values.shape()) as f64;
                    // A run's error is at most that of absmax: half a step for each of its values.
                    let is_int = !format.codes.is_float_format();
                    if is_int && weights.len() == 1 && dtype == DType::F32 {
                        let bound: f64 = plain.scales.to_f64().iter().map(|s| run * (s / 2.0).powi(2)).sum();
                        // With a rounded zero point, the ends of the range are up to half a step outside.
                        let bound = if format.zero_points { bound * 4.0 } else { bound };
                        assert!(ours <= bound, "{format}: {ours} > {bound}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_lies_on_the_grid_is_kept() {
        for format in formats().into_iter().filter(|f| f.codes.bits() > 2) {
            let Granularity::Block { size, .. } = format.granularity else {
                continue;
            };
            let (first, last) = match format.codes.is_float_format() {
                true => (-format.codes.max(), format.codes.max()),
                false => (format.codes.int_range().0 as f64, format.codes.int_range().1 as f64),
            };
            let zero = if format.zero_points { first + 2.0 } else { 0.0 };
            // Both ends of the range, and zero, with a scale of 0.375.
            let mut grid = vec![0.0; size];
            (grid[0], grid[size - 1]) = ((first - zero) * 0.375, (last - zero) * 0.375);
            let values = Tensor::from_f64_as(DType::F32, vec![1, size], &grid);
            let found = scales(&values, None, format).unwrap();
            let back = values_of(&values, &found, format);
            assert_eq!(back, values.to_f32(), "{format}");
        }
    }

    #[test]
    fn narrow_floats_are_rounded_as_they_are_encoded() {
        for dtype in [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1] {
            let Numbers::Float(format) = dtype.numbers() else {
                unreachable!("a float")
            };
            let mut values: Vec<f32> = (0..=255u8)
                .map(|code| narrow::decode(dtype, code))
                .filter(|v| v.is_finite())
                .collect();
            values.sort_by(f32::total_cmp);
            let between: Vec<f32> = values.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
            values.extend(between);
            values.extend(numbers(4000, 3).iter().map(|v| v * format.max() as f32 / 3.0));
            values.extend(numbers(4000, 4).iter().map(|v| v * 0.01));
            values.extend([1e30, -1e30, 1e-30, 0.0]);
            for value in values {
                let expected = narrow::decode(dtype, narrow::encode(dtype, f64::from(value)));
                assert_eq!(nearest_float(value, format), expected, "{dtype} {value}");
            }
        }
    }

    #[test]
    fn an_important_column_is_kept_better() {
        let values = Tensor::from_f32(vec![8, 32], &numbers(256, 21));
        let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 32 }, false);
        let mut importance = vec![1e-3; 32];
        importance[7] = 1.0;
        let at_column = |weights: Option<&[f32]>| {
            let found = scales(&values, weights, int4).unwrap();
            let back = values_of(&values, &found, int4);
            let given = values.to_f32();
            (0..8)
                .map(|row| (back[row * 32 + 7] - given[row * 32 + 7]).powi(2))
                .sum::<f32>()
        };
        assert!(at_column(Some(&importance)) < at_column(None) / 4.0);
    }

    /// With many threads, with one, and repeated.
    #[test]
    fn the_same_values_give_the_same_bytes() {
        let values = Tensor::from_f32(vec![1024, 256], &numbers(1 << 18, 2));
        let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 32 }, false);
        let found = scales(&values, None, int4).unwrap();
        let slice = Tensor::from_f32(vec![1, 256], &values.to_f32()[256 * 1023..]);
        let last = scales(&slice, None, int4).unwrap();
        assert_eq!(found.scales.to_f32()[8 * 1023..], last.scales.to_f32());
        assert_eq!(scales(&values, None, int4).unwrap(), found);
        assert_eq!(codes(&values, &found, int4), codes(&values, &found, int4));
    }

    #[test]
    fn extreme_values_have_finite_scales() {
        let int4 = format(DType::I4, Granularity::Tensor, false);
        for (dtype, value) in [
            (DType::F32, f64::from(f32::MAX)),
            (DType::F32, f64::from(f32::from_bits(1))),
            (DType::F16, 65504.0),
            (DType::F16, 6e-8),
            (DType::Bf16, 1e-40),
        ] {
            let values = Tensor::from_f64_as(dtype, vec![1, 2], &[value, -value / 2.0]);
            let found = scales(&values, None, int4).unwrap();
            let scale = found.scales.to_f32()[0];
            assert!(scale.is_finite() && scale > 0.0, "{dtype} {value:e}: {scale:e}");
        }
        let values = Tensor::from_f32(vec![2, 2], &[1.0, f32::NAN, f32::INFINITY, 0.0]);
        assert_eq!(scales(&values, None, int4), Err(NotFinite { count: 2 }));
    }

    #[test]
    fn formats_that_do_not_exist() {
        let message = |f: Format| f.check(&[4, 6]).unwrap_err().to_string();
        let tensor = Granularity::Tensor;
        assert_eq!(
            message(format(DType::U4, tensor, false)),
            "nothing can be quantized to u4 per tensor: unsigned codes need zero points, and float codes have none"
        );
        assert!(format(DType::F8E4M3Fn, tensor, true).check(&[4, 6]).is_err());
        assert!(format(DType::F16, tensor, false).check(&[4, 6]).is_err());
        let blocks = Granularity::Block { axis: 1, size: 4 };
        assert_eq!(
            message(format(DType::I4, blocks, false)),
            "blocks of 4 do not divide axis 1 of codes of shape [4, 6]"
        );
    }
}
