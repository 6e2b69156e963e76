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

use super::dtype::{DType, Numbers};
use super::element::{FloatElement, with_float};
use super::quantized::{Granularity, QuantizedError};
use super::{Tensor, coded};

mod search;

use search::Search;
pub(super) use search::{Code, stored};

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

impl Scales {
    /// From the scale and zero point of each run of `values`.
    pub(super) fn of(found: impl Iterator<Item = (f32, f32)>, values: &Tensor, format: Format) -> Self {
        let shape = format
            .granularity
            .scale_shape(values.shape())
            .expect("checked by the caller");
        let (scales, zeros): (Vec<f64>, Vec<i64>) = found.map(|(scale, zero)| (f64::from(scale), zero as i64)).unzip();
        Scales {
            scales: Tensor::from_f64_as(values.dtype(), shape.clone(), &scales),
            zero_points: format
                .zero_points
                .then(|| Tensor::from_i64_as(format.codes, shape, &zeros)),
        }
    }
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
        best_scale(format, run, weights.as_deref(), values.dtype())
    });
    let count = found.iter().map(|found| found.err().map_or(0, |n| n.count)).sum();
    if count > 0 {
        return Err(NotFinite { count });
    }
    Ok(Scales::of(found.into_iter().flatten(), values, format))
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
        run.iter()
            .map(|v| code.bits(code.nearest(*v, scale, zero)))
            .collect::<Vec<u8>>()
    });
    packed(found.concat(), values, format)
}

/// A tensor of the codes of all `values`, one byte each.
pub(super) fn packed(codes: Vec<u8>, values: &Tensor, format: Format) -> Tensor {
    let bytes = coded(format.codes, codes);
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

/// Scale and zero point of least error of one run alone; `dtype` is that of the scales.
pub(super) fn best_scale(
    format: Format,
    values: &[f32],
    weights: Option<&[f32]>,
    dtype: DType,
) -> Result<(f32, f32), NotFinite> {
    Search {
        code: Code::of(format),
        values,
        weights,
        dtype,
    }
    .best()
}

#[cfg(test)]
pub(super) mod tests;
