//! bitsandbytes, in 4 bits (`nf4`, `fp4`) and 8.
//!
//! Formats: bitsandbytes' `QuantState.as_dict(packed=True)`, `quantize_4bit`, `dequantize_blockwise` and `Linear8bitLt`.
//!
//! - 4 bits: `weight`, u8 `[n/2, 1]`, of the flat `[out, in]`, the first of two codes in the high half;
//!   `weight.absmax`, one scale per `blocksize` codes, f32, or u8 with `weight.nested_absmax` and
//!   `weight.nested_quant_map` (double quantization: `map[code] · nested_absmax[i / nested_blocksize] +
//!   nested_offset`); `weight.quant_map`, the 16 numbers; `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), JSON as
//!   bytes.
//! - 8 bits: `weight`, i8 `[out, in]`, and `SCB`, the largest magnitude of each row, of which a code is a 127th.

use serde_json::{Map, Value};

use super::{Assembled, Tensors, layers, only_known, put, shaped, taken};
use crate::graph::Constant;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

const FIELDS: [&str; 16] = [
    "quant_method",
    "_load_in_4bit",
    "_load_in_8bit",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_blocksize",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "modules_to_not_convert",
    "target_modules",
];

/// Reads a bitsandbytes checkpoint.
pub fn read(config: &Map<String, Value>, tensors: &mut Tensors) -> Result<Assembled, String> {
    only_known(config, &FIELDS)?;
    let storage = config
        .get("bnb_4bit_quant_storage")
        .and_then(Value::as_str)
        .unwrap_or("uint8");
    if storage != "uint8" {
        return Err(format!(
            "quantization_config: bnb_4bit_quant_storage {storage:?} is not read; uint8 is"
        ));
    }
    for layer in layers(tensors, ".weight.absmax") {
        read_4bit(tensors, &layer)?;
    }
    for layer in layers(tensors, ".SCB") {
        read_8bit(tensors, &layer)?;
    }
    Ok(Assembled {
        method: "bitsandbytes".to_string(),
        ..Assembled::default()
    })
}

fn read_8bit(tensors: &mut Tensors, layer: &str) -> Result<(), String> {
    let codes = taken(tensors, layer, ".weight")?;
    let largest = taken(tensors, layer, ".SCB")?;
    // The layout of rows on a GPU; 0 (rows) in stored files.
    if let Some(format) = tensors.remove(&format!("{layer}.weight_format"))
        && format
            .materialize()
            .is_ok_and(|tensor| tensor.to_i64().iter().any(|v| *v != 0))
    {
        return Err(format!("{layer}: weight_format is another one than rows"));
    }
    let [out, _] = codes.shape()[..] else {
        return Err(format!(
            "{layer}: weight has the shape {:?}, which is not a matrix",
            codes.shape()
        ));
    };
    if codes.dtype() != DType::I8 {
        return Err(format!(
            "{layer}: weight is {}, and has an SCB; i8 is read",
            codes.dtype()
        ));
    }
    shaped(&largest, layer, "SCB", &[out])?;
    let largest = largest
        .materialize()
        .map_err(|e| format!("{layer}: SCB: {e}"))?
        .to_f32();
    let scales: Vec<f32> = largest.iter().map(|v| v / 127.0).collect();
    let scales = Constant::tensor(Tensor::from_f32(vec![out], &scales));
    let channel = Granularity::Channel { axis: 0 };
    put(tensors, layer, Constant::quantized(codes, scales, None, channel))?;
    Ok(())
}

/// The contents of `quant_state`.
struct State {
    dtype: DType,
    block: usize,
    shape: [usize; 2],
    nested_block: usize,
    nested_offset: f64,
}

fn read_4bit(tensors: &mut Tensors, layer: &str) -> Result<(), String> {
    let state = state(tensors, layer)?;
    let codes = taken(tensors, layer, ".weight")?;
    let map = taken(tensors, layer, ".weight.quant_map")?;
    let absmax = taken(tensors, layer, ".weight.absmax")?;
    let [out, depth] = state.shape;
    let count = out * depth;
    if state.block == 0 || !depth.is_multiple_of(state.block) {
        return Err(format!(
            "{layer}: blocks of {} do not divide its {depth} inputs",
            state.block
        ));
    }
    if codes.dtype() != DType::U8 || codes.len() != count.div_ceil(2) || !count.is_multiple_of(2) {
        return Err(format!(
            "{layer}: weight is {codes:?}, and {count} codes take {} bytes",
            count.div_ceil(2)
        ));
    }
    check_map(&map, state.dtype, layer)?;
    let blocks = count / state.block;
    if absmax.len() != blocks {
        return Err(format!(
            "{layer}: absmax has {} numbers, and there are {blocks} blocks",
            absmax.len()
        ));
    }
    let of_blocks = vec![out, depth / state.block];
    let scales = match absmax.dtype() {
        DType::U8 => nested(tensors, layer, &absmax, &state)?.reshaped(of_blocks),
        dtype if dtype.is_float() => absmax.reshaped(of_blocks),
        other => return Err(format!("{layer}: absmax is {other}")),
    };
    let (dtype, bytes) = (
        state.dtype,
        codes.materialize().map_err(|e| format!("{layer}: weight: {e}"))?,
    );
    let codes =
        Tensor::new(dtype, vec![out, depth], bytes.data().clone()).map_err(|e| format!("{layer}: weight: {e}"))?;
    let codes = Constant::tensor(codes).halves_swapped();
    let granularity = Granularity::Block {
        axis: 1,
        size: state.block,
    };
    put(tensors, layer, Constant::quantized(codes, scales, None, granularity))?;
    Ok(())
}

fn state(tensors: &mut Tensors, layer: &str) -> Result<State, String> {
    let prefix = format!("{layer}.weight.quant_state.");
    let names: Vec<String> = tensors
        .keys()
        .filter(|name| name.starts_with(&prefix))
        .cloned()
        .collect();
    let [name] = &names[..] else {
        return Err(format!("{layer}: it has {} tensors {prefix}…, not one", names.len()));
    };
    let of_type = name[prefix.len()..].strip_prefix("bitsandbytes__").unwrap_or_default();
    let dtype = match of_type {
        "nf4" | "fp4" => of_type.parse().map_err(|_| format!("{layer}: {of_type} is not read"))?,
        _ => return Err(format!("{layer}: {name:?} is not read; nf4 and fp4 are")),
    };
    let of_type = of_type.to_string();
    let bytes = tensors.remove(name).expect("just found");
    let bytes = bytes.materialize().map_err(|e| format!("{layer}: quant_state: {e}"))?;
    let fields: Map<String, Value> =
        serde_json::from_slice(bytes.data()).map_err(|e| format!("{layer}: quant_state is no JSON: {e}"))?;
    let known = [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ];
    only_known(&fields, &known)
        .map_err(|_| format!("{layer}: quant_state has fields that are not known: {fields:?}"))?;
    if fields
        .get("quant_type")
        .and_then(Value::as_str)
        .is_some_and(|stated| stated != of_type)
    {
        return Err(format!(
            "{layer}: quant_state says {} and is called {of_type}",
            fields["quant_type"]
        ));
    }
    let number = |name: &str| {
        fields
            .get(name)
            .and_then(Value::as_u64)
            .and_then(|n| usize::try_from(n).ok())
    };
    let shape = fields.get("shape").and_then(Value::as_array);
    let shape: Option<Vec<usize>> = shape.and_then(|extents| {
        let extent = |value: &Value| usize::try_from(value.as_u64()?).ok();
        extents.iter().map(extent).collect()
    });
    let shape = shape.and_then(|shape| <[usize; 2]>::try_from(shape).ok());
    let shape = shape.filter(|[out, depth]| out.checked_mul(*depth).is_some());
    let (Some(block), Some(shape)) = (number("blocksize"), shape) else {
        return Err(format!(
            "{layer}: quant_state has no blocksize, or no shape of a matrix: {fields:?}"
        ));
    };
    Ok(State {
        dtype,
        block,
        shape,
        nested_block: number("nested_blocksize").unwrap_or(0),
        nested_offset: fields.get("nested_offset").and_then(Value::as_f64).unwrap_or(0.0),
    })
}

/// The numbers must be those of the type: other tables would mean other weights.
fn check_map(map: &Constant, dtype: DType, layer: &str) -> Result<(), String> {
    shaped(map, layer, "quant_map", &[16])?;
    let stored = map
        .materialize()
        .map_err(|e| format!("{layer}: quant_map: {e}"))?
        .to_f32();
    let codes: Vec<u8> = (0..8).map(|i| (2 * i) | (2 * i + 1) << 4).collect();
    let ours = Tensor::new(dtype, vec![16], codes.into())
        .expect("sixteen codes of 4 bits")
        .to_f32();
    match stored
        .iter()
        .zip(&ours)
        .position(|(a, b)| (a - b).abs() > 1e-6 || a.is_nan())
    {
        None => Ok(()),
        Some(code) => Err(format!(
            "{layer}: quant_map has {} for code {code}, where {dtype} has {}",
            stored[code], ours[code]
        )),
    }
}

/// Dequantizes scales that are quantized themselves.
fn nested(tensors: &mut Tensors, layer: &str, absmax: &Constant, state: &State) -> Result<Constant, String> {
    let largest = taken(tensors, layer, ".weight.nested_absmax")?;
    let map = taken(tensors, layer, ".weight.nested_quant_map")?;
    shaped(&map, layer, "nested_quant_map", &[256])?;
    let blocks = match state.nested_block {
        0 => return Err(format!("{layer}: quant_state has no nested_blocksize")),
        size => absmax.len().div_ceil(size),
    };
    shaped(&largest, layer, "nested_absmax", &[blocks])?;
    let (size, offset) = (state.nested_block, state.nested_offset as f32);
    let inputs = vec![absmax.clone(), largest, map];
    let shape = vec![absmax.len()];
    Ok(Constant::decoded(
        "double quantization",
        inputs,
        DType::F32,
        shape.clone(),
        move |inputs| {
            let (largest, map) = (inputs[1].to_f32(), inputs[2].to_f32());
            let codes = inputs[0].data().iter().enumerate();
            let scales: Vec<f32> = codes
                .map(|(i, code)| map[usize::from(*code)] * largest[i / size] + offset)
                .collect();
            Tensor::from_f32(shape.clone(), &scales).data().clone()
        },
    ))
}
