//! From bytes to protobuf messages, and a diagnosis of bytes that are not a model.

use bytes::Bytes;
use prost::Message;

use crate::onnx::error::ReadErrorKind;
use crate::onnx::proto::ModelProto;

pub(super) fn decode(bytes: Bytes) -> Result<ModelProto, ReadErrorKind> {
    if bytes.is_empty() {
        return Err(ReadErrorKind::Empty);
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(ReadErrorKind::LfsPointer);
    }
    if let Some(needed) = promised_length(&bytes) {
        return Err(ReadErrorKind::Truncated {
            needed,
            found: bytes.len() as u64,
        });
    }
    let model = ModelProto::decode(bytes).map_err(|error| ReadErrorKind::NotOnnx {
        reason: error.to_string(),
    })?;
    if model.graph.is_none() {
        return Err(ReadErrorKind::NotOnnx {
            reason: "it holds no graph".to_string(),
        });
    }
    Ok(model)
}

/// If the top-level fields are those of a model and the last one reaches beyond the end: the expected number of bytes.
/// Distinguished from garbage because the remedy differs.
fn promised_length(bytes: &[u8]) -> Option<u64> {
    let mut rest = bytes;
    let varint = |rest: &mut &[u8]| prost::encoding::decode_varint(rest).ok();
    while !rest.is_empty() {
        let at = (bytes.len() - rest.len()) as u64;
        let Some(key) = varint(&mut rest) else {
            // Truncated within a key; without a valid field before it this is garbage.
            return (at > 0).then_some(bytes.len() as u64 + 1);
        };
        match (key >> 3, key & 7) {
            // Every writer puts ir_version first; a file that starts differently is left to the decoder.
            (1 | 5, 0) => {
                varint(&mut rest)?;
            }
            (2 | 3 | 4 | 6 | 7 | 8 | 14 | 20 | 25 | 26, 2) => {
                let length = varint(&mut rest)?;
                if length > rest.len() as u64 {
                    let start = (bytes.len() - rest.len()) as u64;
                    // A graph that claims more than 2^40 bytes is garbage, not cut off.
                    return (at > 0 && length < 1 << 40).then(|| start + length);
                }
                rest = &rest[length as usize..];
            }
            _ => return None,
        }
    }
    None
}
