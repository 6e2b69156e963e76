//! Quantized Hugging Face checkpoints: AWQ, GPTQ, compressed-tensors and bitsandbytes.
//!
//! Takes the tensors of a checkpoint and the `quantization_config` of its `config.json`, and replaces each layer's
//! packed tensors by one weight `NAME.weight`, `[out, in]`, of codes, scales and zero points with the semantics of
//! ONNX's `DequantizeLinear`. Codes are unpacked when a weight is written; only scales and zero points, which are
//! small, are read earlier if needed. Everything else about the checkpoint, such as its names, is as in an unquantized
//! one.
//!
//! An unknown field of the configuration is refused unless it is null, false or empty, and so is an unknown method,
//! packing or number of bits: codes in a wrong order are valid numbers too. Each file names the sources of its format.

mod bitsandbytes;
mod compressed_tensors;
mod gptq;
mod words;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::config::CONFIG;
use super::source::SourceError;
use crate::graph::Constant;
use crate::tensor::quantized::QuantizedError;

/// Files of older versions of AutoGPTQ and AutoAWQ with what is now in `config.json`, with their method.
const OLDER: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// Suffixes of names that only quantized checkpoints have.
const MARKS: [&str; 6] = [
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    ".SCB",
];

/// A checkpoint's tensors, after conversion.
#[derive(Debug, Default)]
pub struct Assembled {
    /// Display name: `GPTQ`.
    pub method: String,
    /// Weights with reordered columns, with the input of each column: see [`gptq`].
    pub orders: HashMap<String, Vec<i64>>,
}

/// The tensors of a checkpoint by name, removed as they are processed.
type Tensors = BTreeMap<String, Constant>;

/// Assembles quantized weights. `None`: nothing is quantized. `path`: the checkpoint, a file or a folder.
pub fn assemble(path: &Path, tensors: &mut Tensors) -> Result<Option<Assembled>, SourceError> {
    let folder = match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(path),
    };
    let config = configuration(folder)?;
    let mark = |name: &&String| MARKS.iter().any(|mark| name.ends_with(mark));
    let Some(config) = config else {
        return match tensors.keys().find(mark) {
            None => Ok(None),
            Some(name) => Err(SourceError::invalid(
                path,
                format!("holds quantized weights ({name:?}), and no quantization_config says how"),
            )
            .with_help("put the model's config.json beside it")),
        };
    };
    // Some keep the configuration when they write the model without its quantization.
    if tensors.keys().find(mark).is_none() {
        return Ok(None);
    }
    let refused = |message: String| {
        SourceError::invalid(path, message).with_help(
            "AWQ (gemm), GPTQ (2, 4 and 8 bits), compressed-tensors (pack-quantized, int-quantized, float-quantized, \
             naive-quantized) and bitsandbytes (nf4, fp4, int8) are read; quantize the model in one of these",
        )
    };
    let method = config.get("quant_method").and_then(Value::as_str);
    let assembled = match method {
        Some("awq") => gptq::awq(&config, tensors),
        Some("gptq") => gptq::gptq(&config, tensors),
        Some("compressed-tensors") => compressed_tensors::read(&config, tensors),
        Some("bitsandbytes") => bitsandbytes::read(&config, tensors),
        Some(other) => Err(format!("quantization_config: quant_method {other:?} is not read")),
        None => Err("quantization_config: it has no quant_method".to_string()),
    };
    let assembled = assembled.map_err(refused)?;
    match tensors.keys().find(mark) {
        None => Ok(Some(assembled)),
        Some(name) => Err(refused(format!(
            "{name:?} is not part of a layer that {} makes",
            assembled.method
        ))),
    }
}

/// The quantization configuration.
fn configuration(folder: &Path) -> Result<Option<Map<String, Value>>, SourceError> {
    let read = |name: &str| -> Result<Option<Map<String, Value>>, SourceError> {
        let path = folder.join(name);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(|source| SourceError::Io {
            path: path.clone(),
            source,
        })?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Some(fields)),
            // The comparison of configurations refuses it, with the position.
            _ => Ok(None),
        }
    };
    if let Some(fields) = read(CONFIG)? {
        let nested = ["text_config", "llm_config"]
            .into_iter()
            .find_map(|name| fields.get(name)?.as_object());
        let found = [Some(&fields), nested].into_iter().flatten();
        let found = found.filter_map(|fields| fields.get("quantization_config").or(fields.get("compression_config")));
        if let Some(Value::Object(config)) = found.into_iter().find(|value| !value.is_null()) {
            return Ok(Some(config.clone()));
        }
    }
    for (name, method) in OLDER {
        if let Some(mut config) = read(name)? {
            config.entry("quant_method").or_insert_with(|| method.into());
            return Ok(Some(config));
        }
    }
    Ok(None)
}

/// Refuses other fields, unless they are null, false or empty.
fn only_known(config: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    let says_nothing = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    };
    let unknown = config
        .iter()
        .find(|(name, value)| !known.contains(&name.as_str()) && !says_nothing(value));
    match unknown {
        None => Ok(()),
        Some((name, value)) => Err(format!(
            "quantization_config: {name} is {value}, and what it means is not known"
        )),
    }
}

/// A whole number of the configuration.
fn integer(config: &Map<String, Value>, name: &str) -> Result<i64, String> {
    let value = config.get(name).unwrap_or(&Value::Null);
    value
        .as_i64()
        .ok_or_else(|| format!("quantization_config: {name} is {value}, not a whole number"))
}

/// Layers that have a tensor of this name, without it.
fn layers(tensors: &Tensors, part: &str) -> Vec<String> {
    let found = tensors.keys().filter_map(|name| name.strip_suffix(part));
    found.map(str::to_string).collect()
}

/// Removes and returns a tensor of a layer.
fn taken(tensors: &mut Tensors, layer: &str, part: &str) -> Result<Constant, String> {
    let name = format!("{layer}{part}");
    tensors
        .remove(&name)
        .ok_or_else(|| format!("{layer}: {name:?} is missing, or of a type that is not read"))
}

/// Refuses a tensor with another shape.
fn shaped(constant: &Constant, layer: &str, part: &str, shape: &[usize]) -> Result<(), String> {
    match constant.shape() == shape {
        true => Ok(()),
        false => Err(format!(
            "{layer}: {part} has the shape {:?}, and must have {shape:?}",
            constant.shape()
        )),
    }
}

/// A layer's weight under its usual name.
fn put(tensors: &mut Tensors, layer: &str, weight: Result<Constant, QuantizedError>) -> Result<String, String> {
    let name = format!("{layer}.weight");
    let weight = weight.map_err(|error| format!("{layer}: {error}"))?;
    if tensors.insert(name.clone(), weight.with_origin(&name)).is_some() {
        return Err(format!("{layer}: it is present both quantized and as {name:?}"));
    }
    Ok(name)
}
