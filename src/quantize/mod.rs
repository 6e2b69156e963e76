//! Quantizes floating-point weights: `convert --quantize`.
//!
//! [`quantize()`] takes a canonical graph and a [`Quantization`], and replaces the constants of linear layers, and the
//! token embedding if requested, by quantized ones. Codes and scales are computed when the package is written, one
//! weight at a time ([`Constant::quantized_as`](crate::graph::Constant::quantized_as)), and the recipe of each records how,
//! so that a refit from a floating-point checkpoint repeats it. This module decides what stays in floating point
//! ([`matrices`]); [`crate::tensor::quantize`] rounds values.
//!
//! With a [`Text`], the model reads it first ([`statistics`]), and channels are scaled where only rounding is affected
//! ([`sites`], [`scaling`]). Then second moments of inputs are measured ([`moments`]), and codes are computed that
//! compensate for each other's errors ([`crate::tensor::compensate`]); these stay in memory until the package is written.
//! The errors of other matrices are weighted by their inputs. Such weights belong together: their recipes record that
//! they were calibrated, and do not apply to other values.

mod error;
pub mod matrices;
pub mod moments;
pub mod scaling;
pub mod sites;
pub mod statistics;

use std::collections::{HashMap, HashSet};

pub use error::{QuantizeError, TextError};
pub use matrices::{Matrix, matrices};
pub use statistics::Text;

use crate::graph::{Constant, ConstantError, Graph, ValueId};
use crate::lower;
use crate::package::manifest::{CalibrationRecord, QuantizationRecord};
use crate::target::Quantization;
use crate::tensor::quantized::Granularity;
use crate::tensor::{Tensor, compensate};

/// A calibration text, and the model's limits.
pub struct Calibration<'a> {
    /// The text.
    pub text: &'a Text,
    /// Maximum positions, if limited.
    pub longest: Option<usize>,
    /// Receives progress, 0 to 1.
    pub progress: &'a dyn Fn(f32),
}

/// Quantizes the weights of a canonical graph that do not stay in floating point.
pub fn quantize(
    graph: &mut Graph,
    quantization: &Quantization,
    calibration: Option<&Calibration<'_>>,
) -> Result<QuantizationRecord, QuantizeError> {
    let chosen = choose(graph, quantization)?;
    let calibrated = match calibration {
        Some(calibration) => calibrate(graph, quantization, &chosen, calibration)?,
        None => Calibrated::default(),
    };
    for matrix in &chosen.quantized {
        let constant = graph.constant(matrix.value).expect("a matrix is a constant");
        // Compensated already.
        if constant.as_quantized().is_some() {
            continue;
        }
        let importance = calibrated.importance.get(&matrix.value);
        let made = constant
            .quantized_as(quantization.format(constant.shape()[1]), importance)
            .map_err(|source| QuantizeError::Format {
                weight: matrix.name.clone(),
                source,
            })?;
        graph.set_constant(matrix.value, made);
    }
    let mut record = chosen.record(quantization);
    record.calibration = calibration.map(|calibration| CalibrationRecord {
        text: calibration.text.file.clone(),
        blake3: calibration.text.blake3.clone(),
        tokens: calibration.text.tokens.len(),
        scaled: calibrated.scaled,
    });
    Ok(record)
}

/// The result of a calibration.
#[derive(Default)]
struct Calibrated {
    /// The weight of each column's error of a matrix that is rounded to nearest.
    importance: HashMap<ValueId, Constant>,
    /// Sites whose channels were scaled.
    scaled: usize,
}

/// Measures the inputs of all matrices to be quantized, scales channels of the graph where that helps, and quantizes the
/// matrices whose codes can compensate for each other's errors.
fn calibrate(
    graph: &mut Graph,
    quantization: &Quantization,
    chosen: &Chosen,
    calibration: &Calibration<'_>,
) -> Result<Calibrated, QuantizeError> {
    // Approximate shares of the time: for statistics by channel, and at the end of scaling.
    const MEASURED: f32 = 0.2;
    const SCALED: f32 = 0.3;
    let quantized: HashSet<ValueId> = chosen.quantized.iter().map(|matrix| matrix.value).collect();
    let mut sites = sites::sites(graph);
    sites.retain(|site| site.weights.iter().any(|weight| quantized.contains(weight)));
    let inputs: Vec<ValueId> = sites.iter().map(|site| site.input).collect();
    let measured = statistics::measure(graph, &inputs, calibration.text, calibration.longest, |share| {
        (calibration.progress)(share * MEASURED);
    })?;
    let mut found = Calibrated::default();
    // A matrix of several sites sums their errors.
    let mut importance: HashMap<ValueId, Vec<f32>> = HashMap::new();
    for (i, site) in sites.iter().enumerate() {
        let channels = &measured[&site.input];
        let factors = match site.fold {
            Some(_) => scaling::best(
                graph,
                site,
                channels,
                &quantized,
                quantization.format(channels.square.len()),
            )?,
            None => None,
        };
        for weight in site.weights.iter().filter(|weight| quantized.contains(weight)) {
            let of_site = scaling::importance(channels, factors.as_deref());
            match importance.get_mut(weight) {
                Some(sum) => sum.iter_mut().zip(of_site).for_each(|(sum, h)| *sum += h),
                None => drop(importance.insert(*weight, of_site)),
            }
        }
        if let Some(factors) = factors {
            sites::scale(graph, site, &factors);
            found.scaled += 1;
        }
        (calibration.progress)(MEASURED + (SCALED - MEASURED) * (i + 1) as f32 / sites.len() as f32);
    }
    compensate_matrices(graph, quantization, chosen, &sites, calibration, |share| {
        (calibration.progress)(SCALED + (1.0 - SCALED) * share);
    })?;
    let constant = |values: Vec<f32>| Constant::tensor(Tensor::from_f32(vec![values.len()], &values));
    found.importance = importance
        .into_iter()
        .map(|(weight, h)| (weight, constant(h)))
        .collect();
    Ok(found)
}

/// Quantizes matrices with compensation. A matrix that several inputs reach, or whose rows are gathered as well, is left for
/// rounding to nearest. Second moments are those of the model in floating point.
fn compensate_matrices(
    graph: &mut Graph,
    quantization: &Quantization,
    chosen: &Chosen,
    sites: &[sites::Site],
    calibration: &Calibration<'_>,
    progress: impl Fn(f32),
) -> Result<(), QuantizeError> {
    /// Approximate share of a batch's time.
    const MEASURED: f32 = 0.7;
    let wanted = wanted(graph, quantization, chosen, sites)?;
    let batches = moments::batches(&wanted);
    let floats = graph.clone();
    for (i, batch) in batches.iter().enumerate() {
        let share = |share: f32| progress((i as f32 + share) / batches.len() as f32);
        let tokens = &calibration.text.tokens;
        let sums = moments::measure(&floats, batch, tokens, calibration.longest, |done| {
            share(done * MEASURED)
        })?;
        for (done, ((site, _), sums)) in batch.iter().zip(sums).enumerate() {
            let factors = sums.factors().ok_or_else(|| QuantizeError::Measure {
                reason: format!(
                    "values of {:?} are not finite, or their squares exceed fp32",
                    graph.value(site.input).name
                ),
            })?;
            for weight in &site.weights {
                let made = compensated(graph, *weight, &factors, quantization)?;
                graph.set_constant(*weight, made);
            }
            share(MEASURED + (1.0 - MEASURED) * (done + 1) as f32 / batch.len() as f32);
        }
    }
    Ok(())
}

/// The sites with matrices to compensate, with only these matrices, and the spans of their channels.
fn wanted(
    graph: &Graph,
    quantization: &Quantization,
    chosen: &Chosen,
    sites: &[sites::Site],
) -> Result<Vec<moments::Wanted>, QuantizeError> {
    let suits = |weight: &ValueId| {
        let matrix = chosen.quantized.iter().find(|matrix| matrix.value == *weight);
        matrix.is_some_and(|matrix| !matrix.is_embedding)
            && sites.iter().filter(|site| site.weights.contains(weight)).count() == 1
    };
    let mut wanted = Vec::new();
    for site in sites {
        let weights: Vec<ValueId> = site.weights.iter().copied().filter(suits).collect();
        if weights.is_empty() {
            continue;
        }
        let width = statistics::width(graph, site.input)?;
        let block = match quantization.format(width).granularity {
            Granularity::Block { size, .. } => size,
            _ => width,
        };
        let site = sites::Site {
            weights,
            ..site.clone()
        };
        wanted.push((site, compensate::spans(width, block)));
    }
    Ok(wanted)
}

/// A matrix with codes that compensate for each other's errors.
fn compensated(
    graph: &Graph,
    weight: ValueId,
    factors: &[compensate::Factor],
    quantization: &Quantization,
) -> Result<Constant, QuantizeError> {
    let constant = graph.constant(weight).expect("a matrix is a constant");
    let name = || graph.value(weight).name.clone();
    let failed = |source: ConstantError| QuantizeError::Constant { weight: name(), source };
    let values = constant.materialize().map_err(failed)?;
    let format = quantization.format(constant.shape()[1]);
    let (codes, scales) = compensate::compensate(&values, factors, format).map_err(|bad| {
        failed(ConstantError::NotFinite {
            name: constant.origin().unwrap_or("unnamed").to_string(),
            count: bad.count,
            len: values.len(),
        })
    })?;
    let made = constant.with_codes(format, codes, scales);
    made.map_err(|source| QuantizeError::Format { weight: name(), source })
}

/// Matrices to quantize, and those that stay.
struct Chosen {
    quantized: Vec<Matrix>,
    kept: Vec<Matrix>,
}

impl Chosen {
    fn record(&self, quantization: &Quantization) -> QuantizationRecord {
        QuantizationRecord {
            format: quantization.clone(),
            weights: self.quantized.len(),
            kept: self.kept.iter().map(|matrix| matrix.name.clone()).collect(),
            calibration: None,
        }
    }
}

/// Selects the matrices to quantize, and checks that all can be.
fn choose(graph: &Graph, quantization: &Quantization) -> Result<Chosen, QuantizeError> {
    for (_, weight) in lower::stored_weights(graph) {
        if let Some(parts) = weight.constant.as_quantized() {
            return Err(QuantizeError::Quantized {
                weight: weight.constant.origin().unwrap_or(&weight.name).to_string(),
                form: parts.to_string(),
            });
        }
    }
    let all = matrices(graph);
    let defaults = [Quantization::HEAD, Quantization::EMBEDDINGS];
    let names = |matrix: &&Matrix, pattern: &str| matrix.is_called(pattern);
    for pattern in quantization
        .keep
        .iter()
        .filter(|pattern| !defaults.contains(&pattern.as_str()))
    {
        if !all.iter().any(|matrix| names(&matrix, pattern)) {
            return Err(QuantizeError::NoSuchWeight {
                pattern: pattern.clone(),
                known: all.iter().map(|matrix| matrix.names()[0].clone()).collect(),
            });
        }
    }
    let stays = |matrix: &Matrix| matrix.is_fixed || quantization.keep.iter().any(|p| matrix.is_called(p));
    let (kept, quantized): (Vec<Matrix>, Vec<Matrix>) = all.into_iter().partition(stays);
    if quantized.is_empty() {
        return Err(QuantizeError::Nothing {
            kept: kept.into_iter().map(|matrix| matrix.name).collect(),
        });
    }
    for matrix in &quantized {
        let constant = graph.constant(matrix.value).expect("a matrix is a constant");
        quantization
            .format(constant.shape()[1])
            .check(constant.shape())
            .map_err(|source| QuantizeError::Format {
                weight: constant.origin().unwrap_or(&matrix.name).to_string(),
                source,
            })?;
    }
    Ok(Chosen { quantized, kept })
}
