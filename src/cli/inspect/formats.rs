//! How the weights of an export are quantized, for `lapidary inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::cli::bytes;
use crate::graph::{Constant, Graph, Op, Quantized};

/// The weights of one format.
#[derive(Serialize)]
pub(super) struct Format {
    /// For example `i4 in blocks of 32 on axis 0 with zero points`.
    format: String,
    /// Element type of the codes.
    codes: String,
    /// Bits of one code.
    bits: usize,
    /// Element type of the scales.
    scales: String,
    /// Whether there are zero points.
    zero_points: bool,
    /// Number of weights.
    weights: usize,
    /// Bytes of codes, scales and zero points.
    bytes: u64,
    /// Bits per weight, including scales and zero points.
    bits_per_weight: f64,
}

/// Formats, and weights that stay in floating point.
#[derive(Serialize)]
pub(super) struct Formats {
    /// Most bytes first.
    formats: Vec<Format>,
    /// Bytes of floating-point matrices that linear layers or lookups read, and how many there are.
    floating_bytes: u64,
    floating_weights: usize,
}

/// The formats of a graph; `None` if nothing in it is quantized.
pub(super) fn formats(graph: &Graph) -> Option<Formats> {
    let mut found: BTreeMap<String, (Format, usize)> = BTreeMap::new();
    let (mut floating_bytes, mut floating_weights) = (0, 0);
    let uses = graph.uses();
    for id in graph.value_ids().filter(|id| uses.contains_key(id)) {
        let Some(constant) = graph.constant(id) else { continue };
        match constant.as_quantized() {
            Some(parts) => add(&mut found, constant, parts),
            None if constant.dtype().is_float() && constant.shape().len() == 2 => {
                let operand = uses[&id].iter().any(|(node, _)| {
                    let op = &graph.node(*node).op;
                    matches!(
                        op,
                        Op::MatMul | Op::Gemm { .. } | Op::Gather { .. } | Op::Transpose { .. }
                    )
                });
                if operand {
                    floating_bytes += constant.byte_len() as u64;
                    floating_weights += 1;
                }
            }
            None => {}
        }
    }
    let mut formats: Vec<Format> = found
        .into_values()
        .map(|(format, elements)| Format {
            bits_per_weight: format.bytes as f64 * 8.0 / elements.max(1) as f64,
            ..format
        })
        .collect();
    formats.sort_by_key(|format| std::cmp::Reverse(format.bytes));
    (!formats.is_empty()).then_some(Formats {
        formats,
        floating_bytes,
        floating_weights,
    })
}

fn add(found: &mut BTreeMap<String, (Format, usize)>, constant: &Constant, parts: Quantized<'_>) {
    let text = parts.to_string();
    let (format, elements) = found.entry(text.clone()).or_insert_with(|| {
        let format = Format {
            format: text,
            codes: parts.codes.dtype().to_string(),
            bits: parts.codes.dtype().bits(),
            scales: parts.scales.dtype().to_string(),
            zero_points: parts.zero_points.is_some(),
            weights: 0,
            bytes: 0,
            bits_per_weight: 0.0,
        };
        (format, 0)
    });
    format.weights += 1;
    format.bytes += constant.stored_byte_len() as u64;
    *elements += constant.len();
}

impl Formats {
    /// Lines of a summary: one per format, and one for weights that are not quantized.
    pub fn lines(&self) -> Vec<String> {
        let line = |format: &Format| {
            let mut text = String::new();
            let plural = if format.weights == 1 { "" } else { "s" };
            write!(
                text,
                "{} weight{plural} {}, scales {}: {}, {:.2} bits per weight",
                format.weights,
                format.format,
                format.scales,
                bytes(format.bytes),
                format.bits_per_weight
            )
            .expect("writing to a string");
            text
        };
        let mut lines: Vec<String> = self.formats.iter().map(line).collect();
        if self.floating_weights > 0 {
            lines.push(format!(
                "{} matrices in floating point: {}",
                self.floating_weights,
                bytes(self.floating_bytes)
            ));
        }
        lines
    }
}
