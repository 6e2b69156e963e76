//! compressed-tensors, the format of llm-compressor.
//!
//! Formats: compressed-tensors' `compressors/quantized_compressors` and `pack_to_int32`.
//!
//! - `pack-quantized`: `weight_packed`, i32 `[out, ⌈in·b/32⌉]`, codes plus 2^(b-1), the first in the lowest bits; `weight_shape`;
//!   `weight_scale` `[out, groups]`, `[out, 1]` or one; `weight_zero_point`, packed along axis 0 in the same way, or i8.
//! - `int-quantized`, `float-quantized`, `naive-quantized`: `weight`, i8 or f8e4m3fn, `weight_scale`, `weight_zero_point`.
//!
//! Activations that are quantized at run time are part of the package's graph, not of its weights.

use serde_json::{Map, Value};

use super::words::{Order, code_type, unpacked};
use super::{Assembled, Tensors, integer, layers, only_known, put, shaped, taken};
use crate::graph::Constant;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

const FIELDS: [&str; 10] = [
    "quant_method",
    "config_groups",
    "format",
    "ignore",
    "quantization_status",
    "global_compression_ratio",
    "version",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
];

const OF_GROUPS: [&str; 5] = [
    "weights",
    "input_activations",
    "output_activations",
    "targets",
    "format",
];

const OF_WEIGHTS: [&str; 13] = [
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
    "is_mse",
];

const FORMATS: [&str; 4] = ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"];

/// Reads a compressed-tensors checkpoint.
pub fn read(config: &Map<String, Value>, tensors: &mut Tensors) -> Result<Assembled, String> {
    check(config)?;
    for layer in layers(tensors, ".weight_packed") {
        read_packed(tensors, &layer)?;
    }
    for layer in layers(tensors, ".weight_scale") {
        read_plain(tensors, &layer)?;
    }
    Ok(Assembled {
        method: "compressed-tensors".to_string(),
        ..Assembled::default()
    })
}

fn check(config: &Map<String, Value>) -> Result<(), String> {
    only_known(config, &FIELDS)?;
    let problem = |what: &str, value: &Value| Err(format!("quantization_config: {what} is {value}, which is not read"));
    let is_empty = |value: &Value| value.is_null() || value.as_object().is_some_and(Map::is_empty);
    for name in ["kv_cache_scheme", "transform_config"] {
        match config.get(name) {
            Some(value) if !is_empty(value) => return problem(name, value),
            _ => {}
        }
    }
    if let Some(sparsity) = config.get("sparsity_config").filter(|value| !is_empty(value))
        && sparsity.get("format").and_then(Value::as_str) != Some("dense")
    {
        return problem("sparsity_config", sparsity);
    }
    if let Some(status) = config.get("quantization_status")
        && status.as_str() != Some("compressed")
    {
        return problem("quantization_status", status);
    }
    let format = |fields: &Map<String, Value>, at: &str| match fields.get("format") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(format)) if FORMATS.contains(&format.as_str()) => Ok(()),
        // Groups of several formats.
        Some(Value::String(format)) if format == "mixed-precision" && at.is_empty() => Ok(()),
        Some(other) => problem(&format!("{at}format"), other),
    };
    format(config, "")?;
    let groups = config.get("config_groups").and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let at = format!("config_groups.{name}.");
        let Some(group) = group.as_object() else {
            return problem(&at, group);
        };
        only_known(group, &OF_GROUPS)?;
        format(group, &at)?;
        if let Some(activations) = group.get("input_activations").filter(|value| !value.is_null())
            && activations.get("dynamic") != Some(&Value::Bool(true))
        {
            // Their scales are tensors of the checkpoint; a package has its own.
            return problem(&format!("{at}input_activations"), activations);
        }
        if let Some(activations) = group.get("output_activations").filter(|value| !value.is_null()) {
            return problem(&format!("{at}output_activations"), activations);
        }
        if let Some(weights) = group.get("weights").and_then(Value::as_object) {
            only_known(weights, &OF_WEIGHTS)?;
            let strategy = weights.get("strategy").and_then(Value::as_str).unwrap_or("tensor");
            if !["tensor", "channel", "group"].contains(&strategy) {
                return problem(&format!("{at}weights.strategy"), &weights["strategy"]);
            }
            let bits = integer(weights, "num_bits")?;
            if code_type(bits).is_none() {
                return problem(&format!("{at}weights.num_bits"), &weights["num_bits"]);
            }
        }
    }
    Ok(())
}

fn read_packed(tensors: &mut Tensors, layer: &str) -> Result<(), String> {
    let words = taken(tensors, layer, ".weight_packed")?;
    let shape = taken(tensors, layer, ".weight_shape")?;
    let scales = taken(tensors, layer, ".weight_scale")?;
    if tensors.contains_key(&format!("{layer}.weight_g_idx")) {
        return Err(format!(
            "{layer}: weight_g_idx: groups that are not runs of inputs (actorder group) are not read"
        ));
    }
    let shape = shape.materialize().map_err(|e| e.to_string())?.to_i64();
    let extents = shape
        .iter()
        .map(|n| usize::try_from(*n).ok())
        .collect::<Option<Vec<_>>>();
    let Some([out, depth]) = extents.as_deref().and_then(|e| <[usize; 2]>::try_from(e).ok()) else {
        return Err(format!("{layer}: weight_shape is {shape:?}"));
    };
    // Only one of the supported widths gives this many words.
    let packed = words.shape().get(1).copied().unwrap_or(0);
    let bits = [2, 4, 8].into_iter().find(|bits| depth.div_ceil(32 / bits) == packed);
    let dtype = bits.and_then(|bits| code_type(bits as i64)).ok_or_else(|| {
        let found = words.shape();
        format!("{layer}: weight_packed has the shape {found:?}, and weight_shape {shape:?}, which 2, 4 or 8 bits do not make")
    })?;
    let codes = unpacked(&words, dtype, 1, Order::Rising, [out, depth])
        .map_err(|why| format!("{layer}: weight_packed {why}"))?;
    let (scales, granularity) = granularity(&scales, layer, out, depth)?;
    let zeros = match tensors.remove(&format!("{layer}.weight_zero_point")) {
        None => None,
        Some(zeros) => Some(packed_zeros(&zeros, dtype, layer, out, &scales)?),
    };
    // Symmetric codes are those of the unsigned type around the middle of its range.
    let zeros = zeros.unwrap_or_else(|| {
        let middle = 1i64 << (dtype.bits() - 1);
        let count = scales.len();
        Tensor::from_i64_as(dtype, scales.shape().to_vec(), &vec![middle; count])
    });
    put(
        tensors,
        layer,
        Constant::quantized(codes, scales, Some(zeros.into()), granularity),
    )?;
    Ok(())
}

/// Zero points in the form of the packed codes, plus half their range: packed along axis 0, or plain i8.
fn packed_zeros(zeros: &Constant, dtype: DType, layer: &str, out: usize, scales: &Constant) -> Result<Tensor, String> {
    let name = "weight_zero_point";
    let failed = |error: &dyn std::fmt::Display| format!("{layer}: {name} {error}");
    let count = scales.len() / out.max(1);
    let values = match zeros.dtype() {
        DType::I32 => {
            let codes = unpacked(zeros, dtype, 0, Order::Rising, [out, count]).map_err(|why| failed(&why))?;
            codes.materialize().map_err(|e| failed(&e))?.to_i64()
        }
        DType::I8 => {
            if zeros.len() != scales.len() {
                return Err(failed(&format!(
                    "has the shape {:?}, and the scales {:?}",
                    zeros.shape(),
                    scales.shape()
                )));
            }
            let middle = 1i64 << (dtype.bits() - 1);
            let values = zeros.materialize().map_err(|e| failed(&e))?.to_i64();
            values.into_iter().map(|value| value + middle).collect()
        }
        other => return Err(failed(&format!("is {other}"))),
    };
    let (low, high) = dtype.int_range();
    if let Some(at) = values.iter().position(|value| !(low..=high).contains(value)) {
        return Err(failed(&format!(
            "has {} at {at}, which {} bits do not hold",
            values[at],
            dtype.bits()
        )));
    }
    Ok(Tensor::from_i64_as(dtype, scales.shape().to_vec(), &values))
}

/// Codes with their own type, if a layer has scales.
fn read_plain(tensors: &mut Tensors, layer: &str) -> Result<(), String> {
    let codes = taken(tensors, layer, ".weight")?;
    let scales = taken(tensors, layer, ".weight_scale")?;
    if ![DType::I8, DType::F8E4M3Fn].contains(&codes.dtype()) {
        return Err(format!(
            "{layer}: weight is {}, with a weight_scale; i8 and f8e4m3fn are read",
            codes.dtype()
        ));
    }
    let [out, depth] = codes.shape()[..] else {
        return Err(format!(
            "{layer}: weight has the shape {:?}, which is not a matrix",
            codes.shape()
        ));
    };
    let (scales, granularity) = granularity(&scales, layer, out, depth)?;
    let zeros = match tensors.remove(&format!("{layer}.weight_zero_point")) {
        None => None,
        Some(zeros) if zeros.len() != scales.len() => {
            shaped(&zeros, layer, "weight_zero_point", scales.shape())?;
            None
        }
        Some(zeros) => {
            let tensor = zeros
                .materialize()
                .map_err(|e| format!("{layer}: weight_zero_point: {e}"))?;
            match (codes.dtype(), tensor.dtype()) {
                // Symmetric layers have zeros.
                _ if tensor.to_f32().iter().all(|v| *v == 0.0) => None,
                (DType::I8, DType::I8) => Some(zeros.reshaped(scales.shape().to_vec())),
                (codes, zeros) => return Err(format!("{layer}: weight_zero_point is {zeros}, of codes of {codes}")),
            }
        }
    };
    put(tensors, layer, Constant::quantized(codes, scales, zeros, granularity))?;
    Ok(())
}

/// The granularity by the shape of scales: one, one per output, or one per group of inputs.
fn granularity(scales: &Constant, layer: &str, out: usize, depth: usize) -> Result<(Constant, Granularity), String> {
    match scales.shape() {
        [] | [1] => Ok((scales.reshaped(Vec::new()), Granularity::Tensor)),
        [1, 1] if out > 1 => Ok((scales.reshaped(Vec::new()), Granularity::Tensor)),
        [rows] | [rows, 1] if *rows == out => Ok((scales.reshaped(vec![out]), Granularity::Channel { axis: 0 })),
        [rows, groups] if *rows == out && *groups > 0 && depth.is_multiple_of(*groups) => {
            let size = depth / groups;
            Ok((scales.clone(), Granularity::Block { axis: 1, size }))
        }
        other => Err(format!(
            "{layer}: weight_scale has the shape {other:?}, of a weight [{out}, {depth}]: neither one, nor one for each output \
             or run of inputs"
        )),
    }
}
