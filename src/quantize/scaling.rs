//! Activation-aware scaling (AWQ, <https://arxiv.org/abs/2306.00978>): channels with large inputs are quantized
//! more finely than others.
//!
//! At each [site](super::sites) the factors are `s = mean|x| ^ alpha` for one alpha of a grid, normalized so that the
//! largest and the smallest are equally far from 1. The alpha minimizes the expected error of the products, `Σ_j
//! mean(x_j²) / s_j² · Σ_i (W·s − Q(W·s))_ij²`: rounding errors of different columns are independent of each other, so
//! their mixed terms vanish on average. No scaling, alpha 0, is on the grid. Rows of large matrices are sampled.

use std::collections::HashSet;

use crate::graph::{ConstantError, Graph, ValueId};
use crate::tensor::element::{FloatElement, with_float};
use crate::tensor::quantize::{self, Format, NotFinite};
use crate::tensor::quantized::dequantize;
use crate::tensor::{DType, Tensor};

use super::error::QuantizeError;
use super::sites::Site;
use super::statistics::Channels;

/// Steps of alpha from 0 to 1.
const STEPS: u8 = 10;
/// Rows of a matrix for the search of alpha.
const ROWS: usize = 256;
/// Factors are between the inverse of this and this: larger ones would lose precision in fp16.
const LARGEST: f32 = 64.0;

/// Factors of one alpha, each positive.
pub fn factors(channels: &Channels, alpha: f32) -> Vec<f32> {
    let mean = channels.magnitude.iter().sum::<f32>() / channels.magnitude.len().max(1) as f32;
    if mean <= 0.0 || !mean.is_finite() {
        return vec![1.0; channels.magnitude.len()];
    }
    // A channel that is always 0 counts like a very small one.
    let raw = channels.magnitude.iter().map(|m| (m / mean).max(1e-4).powf(alpha));
    let raw: Vec<f32> = raw.collect();
    let most = raw.iter().copied().fold(0f32, f32::max);
    let least = raw.iter().copied().fold(f32::INFINITY, f32::min);
    let middle = (most * least).sqrt();
    raw.iter().map(|s| (s / middle).clamp(1.0 / LARGEST, LARGEST)).collect()
}

/// How much the squared error of each column of a matrix counts, after its channels were divided by factors. No column
/// has weight 0: a text does not show everything.
pub fn importance(channels: &Channels, factors: Option<&[f32]>) -> Vec<f32> {
    let floor = channels.square.iter().sum::<f32>() / channels.square.len().max(1) as f32 * 1e-4;
    let floor = if floor > 0.0 && floor.is_finite() { floor } else { 1.0 };
    let plain = channels.square.iter().map(|square| square.max(floor));
    match factors {
        Some(factors) => plain.zip(factors).map(|(h, s)| h / (s * s)).collect(),
        None => plain.collect(),
    }
}

/// The best factors of a site; `None` if no scaling is best. `quantized`: matrices that get codes.
pub fn best(
    graph: &Graph,
    site: &Site,
    channels: &Channels,
    quantized: &HashSet<ValueId>,
    format: Format,
) -> Result<Option<Vec<f32>>, QuantizeError> {
    let failed = |weight: ValueId| {
        move |source: ConstantError| QuantizeError::Constant {
            weight: graph.value(weight).name.clone(),
            source,
        }
    };
    let mut samples = Vec::new();
    for weight in site.weights.iter().filter(|weight| quantized.contains(weight)) {
        let constant = graph.constant(*weight).expect("a weight");
        samples.push((*weight, sample(&constant.materialize().map_err(failed(*weight))?)));
    }
    let (mut best, mut least) = (None, f64::INFINITY);
    for step in 0..=STEPS {
        let alpha = f32::from(step) / f32::from(STEPS);
        let factors = factors(channels, alpha);
        let importance = importance(channels, Some(&factors));
        let mut error = 0.0;
        for (weight, sample) in &samples {
            let name = graph.value(*weight).name.clone();
            error += expected_error(sample, &factors, &importance, format).map_err(|bad| QuantizeError::Constant {
                weight: name.clone(),
                source: ConstantError::NotFinite {
                    count: bad.count,
                    len: sample.len(),
                    name,
                },
            })?;
        }
        // A small improvement is not worth another norm.
        if error < least * 0.999 {
            (best, least) = ((step > 0).then_some(factors), error);
        }
    }
    Ok(best)
}

/// Rows sampled across a matrix, in fp32.
fn sample(matrix: &Tensor) -> Tensor {
    let (rows, columns) = (matrix.shape()[0], matrix.shape()[1]);
    let count = rows.min(ROWS);
    let mut values = Vec::with_capacity(count * columns);
    for i in 0..count {
        let row = i * rows / count;
        with_float!(matrix.dtype(), F => {
            let size = columns * size_of::<F>();
            let bytes = &matrix.data()[row * size..(row + 1) * size];
            values.extend(bytes.chunks_exact(size_of::<F>()).map(|b| F::read(b).to_f32()));
        }, else unreachable!("matrices are f32, f16 or bf16"));
    }
    Tensor::from_f32(vec![count, columns], &values)
}

/// The weighted squared error of rows whose columns are multiplied by factors, then quantized.
fn expected_error(rows: &Tensor, factors: &[f32], importance: &[f32], format: Format) -> Result<f64, NotFinite> {
    debug_assert_eq!(rows.dtype(), DType::F32);
    let columns = factors.len();
    let scaled: Vec<f32> = rows
        .to_f32()
        .iter()
        .zip(factors.iter().cycle())
        .map(|(w, s)| w * s)
        .collect();
    let tensor = Tensor::from_f32(rows.shape().to_vec(), &scaled);
    let scales = quantize::scales(&tensor, Some(importance), format)?;
    let codes = quantize::codes(&tensor, &scales, format);
    let found = dequantize(&codes, &scales.scales, scales.zero_points.as_ref(), format.granularity).to_f32();
    let mut sums = vec![0f64; columns];
    for (row, found) in scaled.chunks_exact(columns).zip(found.chunks_exact(columns)) {
        for ((sum, value), found) in sums.iter_mut().zip(row).zip(found) {
            *sum += f64::from(value - found).powi(2);
        }
    }
    Ok(sums.iter().zip(importance).map(|(sum, h)| sum * f64::from(*h)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channels(magnitude: &[f32]) -> Channels {
        Channels {
            magnitude: magnitude.to_vec(),
            square: magnitude.iter().map(|m| m * m * 1.5).collect(),
        }
    }

    #[test]
    fn factors_follow_magnitudes_and_lie_around_one() {
        let of = |alpha| factors(&channels(&[0.25, 1.0, 4.0, 1.0]), alpha);
        assert_eq!(of(0.0), [1.0; 4]);
        assert_eq!(of(0.5), [0.5, 1.0, 2.0, 1.0]);
        let full = of(1.0);
        assert!(
            (full[0] * full[2] - 1.0).abs() < 1e-6 && (full[2] / full[1] - 4.0).abs() < 1e-5,
            "{full:?}"
        );
        // Empty channels are bounded.
        let wild = factors(&channels(&[0.0, 1e9, 1.0]), 1.0);
        assert!(wild.iter().all(|s| (1.0 / LARGEST..=LARGEST).contains(s)), "{wild:?}");
        assert_eq!(factors(&channels(&[0.0, 0.0]), 0.7), [1.0, 1.0]);
        assert!(importance(&channels(&[0.0, 0.0]), None).iter().all(|h| *h > 0.0));
    }

    #[test]
    fn rows_are_taken_from_all_over() {
        let values: Vec<f32> = (0..1000 * 2).map(|i| i as f32).collect();
        for dtype in [DType::F32, DType::Bf16] {
            let wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let matrix = Tensor::from_f64_as(dtype, vec![1000, 2], &wide);
            let sample = sample(&matrix);
            assert_eq!((sample.shape(), sample.dtype()), (&[ROWS, 2][..], DType::F32));
            let last = sample.to_f32()[2 * (ROWS - 1)];
            assert!((1980.0..2000.0).contains(&last), "{last}");
        }
    }
}
