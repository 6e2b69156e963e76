//! Metadata for what a safetensors header cannot express: element types that the format does not have, and which
//! tensors are the parts of a quantized weight.
//!
//! Two entries of `__metadata__`, each the text of a JSON object; both are omitted if empty.
//!
//! ```text
//! "lapidary.packed"     {"table": {"dtype": "u4", "shape": [64, 128]}}
//! "lapidary.quantized"  {"up.weight": {"granularity": {"block": {"axis": 1, "size": 32}},
//!                                      "codes":  {"tensor": "up.weight.codes", "dtype": "u4", "shape": [64, 128]},
//!                                      "scales": {"tensor": "up.weight.scales", "dtype": "f32", "shape": [64, 4]}}}
//! ```
//!
//! In the header, a type that the format lacks is `U8`, with the last axis divided by the elements per byte if that
//! divides it, and flat otherwise. `tensor` is the name in the header, which is another weight's if the bytes are the
//! same.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::safetensors::{StoredTensor, StoredWeight};
use crate::graph::Constant;
use crate::tensor::quantized::{Granularity, QuantizedError};
use crate::tensor::{DType, SizeMismatch, Tensor};

const PACKED: &str = "lapidary.packed";
const QUANTIZED: &str = "lapidary.quantized";

/// The actual type and shape of a tensor that is `U8` in the header.
#[derive(Serialize, Deserialize)]
struct Packed {
    dtype: DType,
    shape: Vec<usize>,
}

/// A tensor of the file as a part of a quantized weight.
#[derive(Serialize, Deserialize)]
struct Part {
    tensor: String,
    dtype: DType,
    shape: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
struct Parts {
    granularity: Granularity,
    codes: Part,
    scales: Scales,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zero_points: Option<Part>,
}

/// Scales are a tensor, or quantized themselves.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Scales {
    Plain(Part),
    Quantized(Box<Parts>),
}

/// Dtype and shape of a tensor in the header.
pub(super) fn in_header(dtype: DType, shape: &[usize]) -> (&'static str, Vec<usize>) {
    let elements: usize = shape.iter().product();
    // The format refuses tensors that end within a byte.
    if let Some(name) = dtype
        .safetensors_name()
        .filter(|_| (elements * dtype.bits()).is_multiple_of(8))
    {
        return (name, shape.to_vec());
    }
    let mut bytes = shape.to_vec();
    let per_byte = 8 / dtype.bits();
    match bytes.last_mut() {
        Some(last) if last.is_multiple_of(per_byte) => *last /= per_byte,
        _ => bytes = vec![dtype.byte_len(elements)],
    }
    (DType::U8.safetensors_name().expect("the format has bytes"), bytes)
}

/// The metadata of a file of these weights, with the caller's entries.
pub(super) fn of<'a>(
    weights: impl Iterator<Item = (&'a str, &'a StoredWeight)>,
    extra: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let (mut packed, mut quantized) = (BTreeMap::new(), BTreeMap::new());
    for (name, weight) in weights {
        match weight {
            StoredWeight::Plain(tensor) => {
                if Some(in_header(tensor.dtype, &tensor.shape).0) != tensor.dtype.safetensors_name() {
                    let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
                    packed.insert(name, Packed { dtype, shape });
                }
            }
            StoredWeight::Quantized(_) => {
                if let Scales::Quantized(parts) = described(weight) {
                    quantized.insert(name, parts);
                }
            }
        }
    }
    let mut metadata = extra.clone();
    let text = |value: serde_json::Result<String>| value.expect("plain data serializes");
    if !packed.is_empty() {
        metadata.insert(PACKED.to_string(), text(serde_json::to_string(&packed)));
    }
    if !quantized.is_empty() {
        metadata.insert(QUANTIZED.to_string(), text(serde_json::to_string(&quantized)));
    }
    metadata
}

fn part(tensor: &StoredTensor) -> Part {
    Part {
        tensor: tensor.same_as.as_ref().unwrap_or(&tensor.name).clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
    }
}

fn described(weight: &StoredWeight) -> Scales {
    match weight {
        StoredWeight::Plain(tensor) => Scales::Plain(part(tensor)),
        StoredWeight::Quantized(parts) => Scales::Quantized(Box::new(Parts {
            granularity: parts.granularity,
            codes: part(&parts.codes),
            scales: described(&parts.scales),
            zero_points: parts.zero_points.as_ref().map(part),
        })),
    }
}

/// Metadata that do not match the file.
#[derive(Debug, thiserror::Error)]
pub(super) enum MetadataError {
    #[error("its metadata {key:?} cannot be read: {source}")]
    Json {
        key: &'static str,
        source: serde_json::Error,
    },
    #[error("its metadata refer to the tensor {tensor:?}, a part of {weight:?}, which is missing")]
    Missing { weight: String, tensor: String },
    #[error("{tensor:?}, a part of {weight:?}: {source}")]
    Size {
        weight: String,
        tensor: String,
        source: SizeMismatch,
    },
    #[error("the quantized weight {weight:?}: {source}")]
    Parts { weight: String, source: QuantizedError },
}

/// Applies metadata: packed tensors get their types, and parts become quantized weights. `tensors` holds those of the
/// header, by its names.
pub(super) fn apply(
    metadata: &HashMap<String, String>,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Constant>, MetadataError> {
    let packed: BTreeMap<String, Packed> = parsed(metadata, PACKED)?;
    let quantized: BTreeMap<String, Parts> = parsed(metadata, QUANTIZED)?;
    let mut made = BTreeMap::new();
    let mut taken = Vec::new();
    for (weight, parts) in &quantized {
        let constant = rebuilt(weight, parts, tensors, &mut taken)?;
        made.insert(weight.clone(), constant.with_origin(weight));
    }
    for (name, described) in packed {
        let part = Part {
            tensor: name.clone(),
            dtype: described.dtype,
            shape: described.shape,
        };
        let tensor = found(&name, &part, tensors)?;
        tensors.insert(name, tensor);
    }
    for name in taken {
        tensors.remove(&name);
    }
    Ok(made)
}

fn parsed<T: serde::de::DeserializeOwned>(
    metadata: &HashMap<String, String>,
    key: &'static str,
) -> Result<BTreeMap<String, T>, MetadataError> {
    let Some(text) = metadata.get(key) else {
        return Ok(BTreeMap::new());
    };
    serde_json::from_str(text).map_err(|source| MetadataError::Json { key, source })
}

/// The bytes of a tensor with the type from the metadata.
fn found(weight: &str, part: &Part, tensors: &BTreeMap<String, Tensor>) -> Result<Tensor, MetadataError> {
    let (weight, tensor) = (weight.to_string(), part.tensor.clone());
    let Some(stored) = tensors.get(&tensor) else {
        return Err(MetadataError::Missing { weight, tensor });
    };
    let data: Bytes = stored.data().clone();
    Tensor::new(part.dtype, part.shape.clone(), data).map_err(|source| MetadataError::Size { weight, tensor, source })
}

fn rebuilt(
    weight: &str,
    parts: &Parts,
    tensors: &BTreeMap<String, Tensor>,
    taken: &mut Vec<String>,
) -> Result<Constant, MetadataError> {
    let mut constant = |part: &Part| -> Result<Constant, MetadataError> {
        let constant = Constant::tensor(found(weight, part, tensors)?).with_origin(&part.tensor);
        // A plain weight with the same bytes stays unchanged.
        if part.tensor.starts_with(&format!("{weight}.")) {
            taken.push(part.tensor.clone());
        }
        Ok(constant)
    };
    let codes = constant(&parts.codes)?;
    let zero_points = parts.zero_points.as_ref().map(&mut constant).transpose()?;
    let scales = match &parts.scales {
        Scales::Plain(part) => constant(part)?,
        Scales::Quantized(parts) => rebuilt(weight, parts, tensors, taken)?,
    };
    Constant::quantized(codes, scales, zero_points, parts.granularity).map_err(|source| MetadataError::Parts {
        weight: weight.to_string(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_the_format_lacks_are_bytes() {
        assert_eq!(in_header(DType::F32, &[2, 3]), ("F32", vec![2, 3]));
        assert_eq!(in_header(DType::I4, &[2, 4]), ("U8", vec![2, 2]));
        assert_eq!(in_header(DType::I4, &[3, 3]), ("U8", vec![5]));
        assert_eq!(in_header(DType::U2, &[3, 4]), ("U8", vec![3, 1]));
        assert_eq!(in_header(DType::U2, &[]), ("U8", vec![1]));
        assert_eq!(in_header(DType::F4E2M1, &[3, 4]), ("F4", vec![3, 4]));
        assert_eq!(in_header(DType::F4E2M1, &[3, 3]), ("U8", vec![5]));
        assert_eq!(in_header(DType::F8E4M3Fn, &[3]), ("F8_E4M3", vec![3]));
    }

    /// The result of `apply` for metadata over a `w.codes` of four bytes and a `w.scales` of one f32 per row.
    fn refused(key: &str, text: &str) -> String {
        let codes = Tensor::from_i64_as(DType::U8, vec![4, 1], &[1, 2, 3, 4]);
        let scales = Tensor::from_f32(vec![4], &[1.0; 4]);
        let mut tensors = BTreeMap::from([("w.codes".to_string(), codes), ("w.scales".to_string(), scales)]);
        let metadata = HashMap::from([(key.to_string(), text.to_string())]);
        apply(&metadata, &mut tensors).unwrap_err().to_string()
    }

    #[test]
    fn metadata_that_do_not_fit_are_named() {
        let message = refused(PACKED, "{");
        assert!(
            message.starts_with("its metadata \"lapidary.packed\" cannot be read"),
            "{message}"
        );
        assert_eq!(
            refused(PACKED, r#"{"x": {"dtype": "u4", "shape": [8]}}"#),
            "its metadata refer to the tensor \"x\", a part of \"x\", which is missing"
        );
        assert_eq!(
            refused(PACKED, r#"{"w.codes": {"dtype": "u4", "shape": [4, 4]}}"#),
            "\"w.codes\", a part of \"w.codes\": u4 [4, 4] needs 8 bytes, found 4"
        );
        let quantized = |granularity: &str, codes: &str, scales: &str| {
            let parts = format!(
                r#"{{"w": {{"granularity": {granularity},
                    "codes": {{"tensor": "w.codes", {codes}}},
                    "scales": {{"tensor": "w.scales", {scales}}}}}}}"#
            );
            refused(QUANTIZED, &parts)
        };
        let scales = r#""dtype": "f32", "shape": [4]"#;
        assert_eq!(
            quantized(
                r#"{"channel": {"axis": 1}}"#,
                r#""dtype": "u4", "shape": [4, 2]"#,
                scales
            ),
            "the quantized weight \"w\": the scales have the shape [4]; codes of shape [4, 2] per channel of axis 1 need [2]"
        );
        assert_eq!(
            quantized(
                r#"{"block": {"axis": 1, "size": 0}}"#,
                r#""dtype": "u4", "shape": [4, 2]"#,
                scales
            ),
            "the quantized weight \"w\": blocks of 0 do not divide axis 1 of codes of shape [4, 2]"
        );
        assert_eq!(
            quantized(
                r#"{"channel": {"axis": 0}}"#,
                r#""dtype": "u4", "shape": [4, 4]"#,
                scales
            ),
            "\"w.codes\", a part of \"w\": u4 [4, 4] needs 8 bytes, found 4"
        );
        let unknown = quantized(
            r#"{"channel": {"axis": 0}}"#,
            r#""dtype": "f8e4m3", "shape": [4]"#,
            scales,
        );
        assert!(unknown.contains("is not an element type"), "{unknown}");
    }
}
