//! Quantized weights in networks of an engine: codes, scales and zero points as separate weights, named as in a file
//! (`NAME.codes`, `NAME.scales`, `NAME.zero_points`), and layers that dequantize them or multiply with them.
//!
//! [`QuantizedForm`] lists the forms; a value is always `(code - zero point) * scale`. Formats that no layers can read
//! stay a single weight of floats ([`widened_formats`]): codes of nf4, fp4, f4e2m1 and f8e5m2, scales that are
//! quantized themselves, rows of packed codes that do not fill their bytes, and constants that TensorRT fails on
//! (docs/explanation/tensorrt-notes.md).
//!
//! `parts` adds the constants, `values` dequantizes them, `products` multiplies.
//!
//! # Codes of less than a byte as values
//!
//! No arithmetic of TensorRT takes i4, but an i8 input can be gathered, reshaped and cast. So packed codes enter as
//! their bytes, and layers unpack them in floating point, exactly. For two's complement codes of b bits in a byte `s`,
//! the last is `floor(s / 2^(8-b))`; the first is `s - 2^b * floor((s + 2^(b-1)) / 2^b)`, and the rest is `floor(s /
//! 2^b)`.

mod parts;
mod products;
mod values;

use std::collections::BTreeMap;

use super::context::{Lowered, Lowering};
use super::fuse::SEPARATOR;
use super::{LowerOptions, QuantizedForm};
use crate::graph::{Constant, Graph};
use crate::network::{TensorId, Tokens};
use crate::tensor::quantized::Granularity;
use parts::{Parts, columns, parts};

/// A quantized weight whose parts are in the network.
#[derive(Clone, Debug)]
pub(super) struct QuantizedWeight {
    parts: Parts<TensorId>,
    /// Shape of the values.
    shape: Vec<usize>,
    /// Whether products read the Dequantize layer itself.
    before_products: bool,
}

/// Whether weights can be concatenated: a row keeps its scales.
pub(super) fn stacks(constant: &Constant) -> bool {
    constant.as_quantized().is_none_or(|parts| {
        matches!(
            parts.granularity,
            Granularity::Channel { axis: 0 } | Granularity::Block { axis: 1, .. }
        )
    })
}

/// Quantized weights that enter networks of an engine as floats, since no layers can read their codes: the number per
/// format.
pub fn widened_formats(graph: &Graph, options: &LowerOptions) -> BTreeMap<String, usize> {
    let mut formats = BTreeMap::new();
    for weight in super::weights(graph) {
        if let Some(quantized) = weight.constant.as_quantized()
            && parts(
                &weight.constant,
                options.quantized,
                options.weight_mode,
                weight.is_table,
            )
            .is_none()
        {
            *formats.entry(quantized.to_string()).or_insert(0) += 1;
        }
    }
    formats
}

impl Lowering<'_> {
    /// Weights, concatenated if there are several, as a tensor of their values. Layers that multiply with it or gather
    /// from it may read its codes instead.
    pub(super) fn weights(&mut self, weights: &[(String, Constant)], is_table: bool) -> Lowered {
        let mode = self.options.weight_mode;
        let named = |part: &str| {
            let names: Vec<String> = weights.iter().map(|(name, _)| format!("{name}{part}")).collect();
            names.join(&SEPARATOR.to_string())
        };
        let stacked = |parts: &[Constant]| match parts {
            [only] => only.clone(),
            several => Constant::concat(several, 0),
        };
        let constants: Vec<Constant> = weights.iter().map(|(_, constant)| constant.clone()).collect();
        // Concatenated weights are equally deep.
        let form = self.quantized_form(&constants[0]);
        let all = constants.iter().map(|constant| parts(constant, form, mode, is_table));
        let Some(all) = all.collect::<Option<Vec<_>>>() else {
            return Ok(self.b.weight(&named(""), stacked(&constants), mode)?);
        };
        let mut shape = constants[0].shape().to_vec();
        shape[0] = constants.iter().map(|constant| constant.shape()[0]).sum();
        let parts = columns(all)
            .map(|part, constants| self.b.weight(&named(&format!(".{part}")), stacked(&constants), mode))?;
        let weight = QuantizedWeight {
            parts,
            shape,
            before_products: form == QuantizedForm::Dequantize,
        };
        let values = self.values_of_codes(&named(""), &weight)?;
        self.quantized.insert(values, weight);
        Ok(values)
    }

    fn quantized_form(&self, constant: &Constant) -> QuantizedForm {
        let options = self.options;
        let one_row = self.profile.tokens == Tokens::Static(1) && self.profile.batch == 1;
        let form = match options.prefill_quantized {
            Some(form) if !one_row => form,
            _ => options.quantized,
        };
        // Dequantized values that no sum reads would be written and read again.
        let depth = constant.shape().last().copied().unwrap_or(1);
        let deep = options.reduce_depth.is_some_and(|limit| depth > limit);
        match form {
            QuantizedForm::Elementwise if one_row && deep => QuantizedForm::Dequantize,
            form => form,
        }
    }
}
