//! Quantizes floating-point weights: `convert --quantize`.
//!
//! [`quantize()`] takes a canonical graph and a [`Quantization`], and replaces the constants of linear layers, and the
//! token embedding if requested, by quantized ones. Nothing is computed here: codes and scales are computed when the
//! package is written, one weight at a time ([`Constant::quantized_as`](crate::graph::Constant::quantized_as)), and the
//! recipe of each records how, so that a refit from a floating-point checkpoint repeats it. This module decides what
//! stays in floating point ([`matrices`]); [`crate::tensor::quantize`] rounds values.
//!
//! With a [`Text`], the model reads it first ([`statistics`]), channels are scaled where only rounding is affected
//! ([`sites`], [`scaling`]), and the errors of columns are weighted by their inputs. Such weights belong together:
//! their recipes record that they were calibrated, and do not apply to other values.

mod error;
pub mod matrices;
pub mod scaling;
pub mod sites;
pub mod statistics;

use std::collections::{HashMap, HashSet};

pub use error::{QuantizeError, TextError};
pub use matrices::{Matrix, matrices};
pub use statistics::Text;

use crate::graph::{Constant, Graph, ValueId};
use crate::lower;
use crate::package::manifest::{CalibrationRecord, QuantizationRecord};
use crate::target::Quantization;
use crate::tensor::Tensor;

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
    /// The weight of each column's error of a matrix.
    importance: HashMap<ValueId, Constant>,
    /// Sites whose channels were scaled.
    scaled: usize,
}

/// Measures the inputs of all matrices to be quantized, and scales channels of the graph where that helps.
fn calibrate(
    graph: &mut Graph,
    quantization: &Quantization,
    chosen: &Chosen,
    calibration: &Calibration<'_>,
) -> Result<Calibrated, QuantizeError> {
    /// Approximate share of the time.
    const MEASURING: f32 = 0.7;
    let quantized: HashSet<ValueId> = chosen.quantized.iter().map(|matrix| matrix.value).collect();
    let mut sites = sites::sites(graph);
    sites.retain(|site| site.weights.iter().any(|weight| quantized.contains(weight)));
    let inputs: Vec<ValueId> = sites.iter().map(|site| site.input).collect();
    let measured = statistics::measure(graph, &inputs, calibration.text, calibration.longest, |share| {
        (calibration.progress)(share * MEASURING);
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
        (calibration.progress)(MEASURING + (1.0 - MEASURING) * (i + 1) as f32 / sites.len() as f32);
    }
    let constant = |values: Vec<f32>| Constant::tensor(Tensor::from_f32(vec![values.len()], &values));
    found.importance = importance
        .into_iter()
        .map(|(weight, h)| (weight, constant(h)))
        .collect();
    Ok(found)
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
