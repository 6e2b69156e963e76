//! Writes safetensors (<https://huggingface.co/docs/safetensors>): eight bytes of header length, a JSON header, then
//! the tensors without gaps.
//!
//! The format allows no gaps, so alignment is a matter of order: the header is padded to a whole page and tensors come
//! with the sizes that keep alignment first. In a file whose tensors are all multiples of 64 bytes, as almost all are,
//! every tensor begins at a 64-byte boundary.
//!
//! Header and order depend on sizes only, which are known before any byte is computed. Identical tensors are stored once:
//! the second becomes a record that points to the first, and since safetensors forbids two names for one range, only the
//! first is in the header. The header is therefore written last, into space reserved for the longest it could be.
//!
//! A quantized weight is stored as its parts, `NAME.codes`, `NAME.scales` and `NAME.zero_points`; the metadata describe
//! the weight (see [`super::metadata`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use bytes::Bytes;

use super::checks::BadNumbers;
use super::metadata;
use crate::graph::{Constant, ConstantError};
use crate::help::Help;
use crate::tensor::quantized::{Granularity, QuantizedError};
use crate::tensor::{DType, Tensor};

/// Tensor data begins at a multiple of this.
const PAGE: usize = 4096;

/// The location and contents of a tensor in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name of the tensor.
    pub name: String,
    /// Element type of the tensor's elements.
    pub dtype: DType,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// From the beginning of the file, header included: what ONNX external data and a map of the file need.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// BLAKE3 of the bytes, in hexadecimal; empty if they are absent.
    pub blake3: String,
    /// The tensor stored at this location, if it is another one with the same bytes.
    pub same_as: Option<String>,
}

/// A stored weight: one tensor, or the parts of a quantized one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredWeight {
    /// One tensor with the weight's dtype and shape.
    Plain(StoredTensor),
    /// Codes, scales and zero points.
    Quantized(StoredParts),
}

/// The parts of a quantized weight, each a tensor of the file; scales may be quantized themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredParts {
    /// Which codes share a scale.
    pub granularity: Granularity,
    /// In the weight's shape.
    pub codes: StoredTensor,
    /// In the shape that the granularity defines.
    pub scales: Box<StoredWeight>,
    /// In the scales' shape.
    pub zero_points: Option<StoredTensor>,
}

impl StoredWeight {
    /// The tensors of the file, in the order of codes, scales, zero points.
    pub fn tensors(&self) -> Vec<&StoredTensor> {
        match self {
            StoredWeight::Plain(tensor) => vec![tensor],
            StoredWeight::Quantized(parts) => {
                let mut tensors = vec![&parts.codes];
                tensors.extend(parts.scales.tensors());
                tensors.extend(&parts.zero_points);
                tensors
            }
        }
    }

    /// Bytes of all of its tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors().iter().map(|tensor| tensor.bytes).sum()
    }

    /// The hash of its contents: for a plain weight, BLAKE3 of its bytes; for a quantized one, BLAKE3 of a line for the
    /// granularity and one per part, `dtype \0 shape \0 hash \n`: over the codes in ONNX's order, the scales (which may
    /// be quantized themselves) and the zero points, regardless of names and locations. Empty if the bytes are absent.
    pub fn blake3(&self) -> String {
        let parts = match self {
            StoredWeight::Plain(tensor) => return tensor.blake3.clone(),
            StoredWeight::Quantized(parts) => parts,
        };
        if self.tensors().iter().any(|tensor| tensor.blake3.is_empty()) {
            return String::new();
        }
        let line = |tensor: &StoredTensor, hash: &str| format!("{}\0{:?}\0{hash}\n", tensor.dtype, tensor.shape);
        let scales = parts.scales.tensors()[0];
        let mut text = format!("{}\n", parts.granularity);
        text += &line(&parts.codes, &parts.codes.blake3);
        text += &line(scales, &parts.scales.blake3());
        if let Some(zero_points) = &parts.zero_points {
            text += &line(zero_points, &zero_points.blake3);
        }
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }
}

/// Inspects a computed weight before it is written: its name, its derivation, the tensor. An error stops the writing.
/// For a quantized weight it is called with codes, scales and zero points, each with the weight's name.
pub type Inspect<'a> = &'a mut (dyn FnMut(&str, &Constant, &Tensor) -> Result<(), WriteError> + Send);

/// Weights that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the weights.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The bytes are absent.
    #[error("the weight {name:?} cannot be computed: {source}")]
    Constant {
        /// Name of the weight.
        name: String,
        /// Why.
        source: ConstantError,
    },
    /// It has values that no model can use.
    #[error("the weight {name:?}: {source}")]
    Numbers {
        /// Name of the weight.
        name: String,
        /// Which.
        source: BadNumbers,
    },
    /// A weight has the name that a part of a quantized one would get.
    #[error("two tensors would be called {name:?}, one of them a part of a quantized weight; rename the other")]
    NameTaken {
        /// Name of both.
        name: String,
    },
    /// It is quantized, and scales or zero points are invalid.
    #[error("the quantized weight {name:?}: {source}")]
    Quantized {
        /// Name of the weight.
        name: String,
        /// What is wrong.
        source: QuantizedError,
    },
}

impl Help for WriteError {
    fn help(&self) -> Option<String> {
        match self {
            WriteError::Io { .. } | WriteError::NameTaken { .. } => None,
            WriteError::Constant { source, .. } => source.help(),
            WriteError::Quantized { .. } => Some("export the model again, or quantize it again".to_string()),
            WriteError::Numbers { .. } => {
                Some("take them anyway with --allow-nonfinite or --allow-overflow".to_string())
            }
        }
    }
}

/// A tensor of the file: a plain weight, or a part of a quantized one.
struct Piece<'a> {
    name: String,
    constant: &'a Constant,
    /// The weight it belongs to, among those given.
    weight: usize,
    /// Whether it is the first of its weight.
    first: bool,
}

/// Every tensor of the file, in the weights' order and within one in that of [`StoredWeight::tensors`].
fn pieces(weights: &[(String, Constant)]) -> Vec<Piece<'_>> {
    let mut pieces = Vec::with_capacity(weights.len());
    for (weight, (name, constant)) in weights.iter().enumerate() {
        for (i, (name, constant)) in constant.stored_parts(name).into_iter().enumerate() {
            pieces.push(Piece {
                name,
                constant,
                weight,
                first: i == 0,
            });
        }
    }
    pieces
}

/// The records of weights from those of their tensors, which come in the order of [`pieces`].
fn records(weights: &[(String, Constant)], mut tensors: impl Iterator<Item = StoredTensor>) -> Vec<StoredWeight> {
    fn record(constant: &Constant, next: &mut dyn FnMut() -> StoredTensor) -> StoredWeight {
        match constant.as_quantized() {
            None => StoredWeight::Plain(next()),
            Some(parts) => StoredWeight::Quantized(StoredParts {
                granularity: parts.granularity,
                codes: next(),
                scales: Box::new(record(parts.scales, next)),
                zero_points: parts.zero_points.map(|_| next()),
            }),
        }
    }
    let mut next = || tensors.next().expect("a record for every tensor");
    weights
        .iter()
        .map(|(_, constant)| record(constant, &mut next))
        .collect()
}

/// [`StoredWeight::blake3`] of a weight that is not stored; reads all of it.
pub fn content_hash(constant: &Constant) -> Result<String, ConstantError> {
    let weights = [(String::new(), constant.clone())];
    let mut tensors = Vec::new();
    for piece in pieces(&weights) {
        let hash = blake3::hash(piece.constant.materialize()?.data());
        tensors.push(StoredTensor {
            blake3: hash.to_hex().to_string(),
            ..piece.stored(0, 0, None)
        });
    }
    Ok(records(&weights, tensors.into_iter())[0].blake3())
}

/// Locations for weights that do not exist yet, in the given order, for a graph that refers to them. They have no hash.
pub fn placements(weights: &[(String, Constant)]) -> Vec<StoredWeight> {
    let mut end = PAGE as u64;
    let next = |piece: Piece<'_>| {
        let bytes = piece.constant.byte_len() as u64;
        end += bytes;
        piece.stored(end - bytes, bytes, None)
    };
    let placed: Vec<StoredTensor> = pieces(weights).into_iter().map(next).collect();
    records(weights, placed.into_iter())
}

/// One tensor to be written.
struct Ready {
    index: usize,
    data: Bytes,
    hash: blake3::Hash,
}

/// Computes and checks a tensor.
fn ready(
    weights: &[(String, Constant)],
    pieces: &[Piece<'_>],
    index: usize,
    inspect: &mut (dyn FnMut(&str, &Constant, &Tensor) -> Result<(), WriteError> + Send),
) -> Result<Ready, WriteError> {
    let piece = &pieces[index];
    let (name, weight) = &weights[piece.weight];
    let failed = |source| WriteError::Constant {
        name: name.clone(),
        source,
    };
    // The parts of a quantized weight are checked together, before the first of them is written.
    if let (Some(parts), true) = (weight.as_quantized(), piece.first) {
        parts
            .check_values()
            .map_err(failed)?
            .map_err(|source| WriteError::Quantized {
                name: name.clone(),
                source,
            })?;
    }
    let tensor = piece.constant.materialize().map_err(failed)?;
    inspect(name, piece.constant, &tensor)?;
    Ok(Ready {
        index,
        hash: blake3::hash(tensor.data()),
        data: tensor.data().clone(),
    })
}

/// Writes `weights` (unique names) to a new file at `path`. `inspect` is called with each before it is written,
/// `progress` with the bytes written so far. Returns one record per weight, in the given order.
///
/// Tensors are computed and hashed on a second thread, at most two ahead of the one being written.
pub fn write(
    path: &Path,
    weights: &[(String, Constant)],
    extra: &BTreeMap<String, String>,
    inspect: Inspect<'_>,
    mut progress: impl FnMut(u64),
) -> Result<Vec<StoredWeight>, WriteError> {
    let failed = |source| WriteError::Io {
        path: path.to_path_buf(),
        source,
    };
    let pieces = pieces(weights);
    let mut names = HashSet::new();
    if let Some(twice) = pieces.iter().find(|piece| !names.insert(piece.name.as_str())) {
        return Err(WriteError::NameTaken {
            name: twice.name.clone(),
        });
    }
    // Largest power of two that divides the size, up to a page: what follows keeps that alignment.
    let alignment = |c: &Constant| (c.byte_len() | PAGE).trailing_zeros();
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(alignment(pieces[*i].constant)));

    let total: u64 = pieces.iter().map(|piece| piece.constant.byte_len() as u64).sum();
    // It is not known yet which tensors will share storage: each could need the longest name.
    let longest_name = pieces
        .iter()
        .map(|piece| piece.name.as_str())
        .max_by_key(|name| json_len(name));
    let longest = records(
        weights,
        pieces.iter().map(|piece| piece.stored(total, total, longest_name)),
    );
    let longest = header(
        &pieces,
        order.iter().map(|i| (*i, total, total)),
        weights,
        &longest,
        extra,
    );
    let data_start = (8 + longest.len()).next_multiple_of(PAGE) as u64;

    let file = File::create_new(path).map_err(failed)?;
    let mut file = BufWriter::new(file);
    file.seek(SeekFrom::Start(data_start)).map_err(failed)?;

    let mut stored: Vec<Option<StoredTensor>> = vec![None; pieces.len()];
    let mut seen: HashMap<(blake3::Hash, usize), usize> = HashMap::new();
    let mut written: Vec<(usize, u64, u64)> = Vec::new();
    let mut end = data_start;
    let mut done = 0;
    std::thread::scope(|scope| {
        // One tensor waits while the next is computed and another is written.
        let (sender, receiver) = mpsc::sync_channel::<Result<Ready, WriteError>>(1);
        let (order, pieces) = (&order, &pieces);
        scope.spawn(move || {
            for index in order.iter().copied() {
                let ready = ready(weights, pieces, index, inspect);
                let last = ready.is_err();
                // The writer closes the channel when it fails, and then needs no more.
                if sender.send(ready).is_err() || last {
                    return;
                }
            }
        });
        for ready in receiver {
            let Ready { index, data, hash } = ready?;
            let bytes = data.len() as u64;
            let first = *seen.entry((hash, data.len())).or_insert(index);
            let offset = match &stored[first] {
                Some(same) => same.offset,
                None => {
                    file.write_all(&data).map_err(failed)?;
                    written.push((index, end - data_start, end - data_start + bytes));
                    end += bytes;
                    end - bytes
                }
            };
            let same_as = (first != index).then(|| pieces[first].name.as_str());
            stored[index] = Some(StoredTensor {
                blake3: hash.to_hex().to_string(),
                ..pieces[index].stored(offset, bytes, same_as)
            });
            done += bytes;
            progress(done);
        }
        Ok(())
    })?;
    let stored = stored.into_iter().map(|s| s.expect("every tensor was sent"));
    let records = records(weights, stored);

    let mut header = header(&pieces, written.into_iter(), weights, &records, extra);
    header.resize(data_start as usize - 8, b' ');
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
    // A file of no tensors still has its header only; otherwise the length is that of the data.
    file.set_len(end).map_err(failed)?;
    Ok(records)
}

/// Length of a JSON string inside JSON text, for names in metadata.
fn json_len(text: &str) -> usize {
    let quoted = |text: &str| serde_json::to_string(text).expect("strings serialize");
    quoted(&quoted(text)).len()
}

impl Piece<'_> {
    /// Its record without the hash.
    fn stored(&self, offset: u64, bytes: u64, same_as: Option<&str>) -> StoredTensor {
        StoredTensor {
            name: self.name.clone(),
            dtype: self.constant.dtype(),
            shape: self.constant.shape().to_vec(),
            offset,
            bytes,
            blake3: String::new(),
            same_as: same_as.map(str::to_string),
        }
    }
}

fn header(
    pieces: &[Piece<'_>],
    ranges: impl Iterator<Item = (usize, u64, u64)>,
    weights: &[(String, Constant)],
    records: &[StoredWeight],
    extra: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    let names = weights.iter().map(|(name, _)| name.as_str());
    let metadata = metadata::of(names.zip(records), extra);
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    for (index, start, end) in ranges {
        let piece = &pieces[index];
        let (dtype, shape) = metadata::in_header(piece.constant.dtype(), piece.constant.shape());
        let entry = serde_json::json!({
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [start, end],
        });
        map.insert(piece.name.clone(), entry);
    }
    serde_json::to_vec(&map).expect("strings and numbers serialize")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn constant(shape: Vec<usize>, first: f32) -> Constant {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| first + i as f32).collect();
        Constant::tensor(Tensor::from_f32(shape, &values))
    }

    #[test]
    fn order_alignment_and_sharing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let tensors = vec![
            ("odd".to_string(), constant(vec![3], 0.5)),
            ("page".to_string(), constant(vec![32, 32], 1.0)),
            ("line".to_string(), constant(vec![16], 2.0)),
            ("again".to_string(), constant(vec![1024], 1.0)),
            ("half".to_string(), constant(vec![16], 2.0).cast(DType::F16)),
        ];
        let mut last = 0;
        let stored = write(&path, &tensors, &BTreeMap::new(), &mut |_, _, _| Ok(()), |done| {
            last = done
        })
        .unwrap();
        assert_eq!(last, 12 + 4096 + 64 + 4096 + 32);
        let file = std::fs::read(&path).unwrap();
        let stored: Vec<&StoredTensor> = stored.iter().flat_map(StoredWeight::tensors).collect();
        for ((name, constant), at) in tensors.iter().zip(&stored) {
            let bytes = &file[at.offset as usize..(at.offset + at.bytes) as usize];
            assert_eq!(bytes, &constant.materialize().unwrap().data()[..], "{name}");
            assert_eq!(at.blake3, blake3::hash(bytes).to_hex().to_string());
        }
        assert_eq!(stored[3].same_as.as_deref(), Some("page"));
        assert_eq!(stored[3].offset, stored[1].offset);
        assert_eq!(stored[1].offset % 4096, 0);
        assert_eq!(stored[2].offset % 64, 0);

        // The rules of the format: sorted ranges cover the buffer without holes or overlaps.
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let entries = header.as_object().unwrap();
        assert_eq!(entries.len(), 4, "again is stored as page");
        let range = |name: &str| -> (u64, u64) {
            let at = &entries[name]["data_offsets"];
            (at[0].as_u64().unwrap(), at[1].as_u64().unwrap())
        };
        let mut ranges: Vec<(u64, u64)> = entries.keys().map(|k| range(k)).collect();
        ranges.sort_unstable();
        let mut end = 0;
        for (from, to) in ranges {
            assert_eq!(from, end);
            end = to;
        }
        assert_eq!(8 + length as u64 + end, file.len() as u64);
        assert_eq!(entries["half"]["dtype"], "F16");
    }

    #[test]
    fn an_absent_weight_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = vec![("lm_head".to_string(), Constant::absent(DType::F16, vec![2]))];
        let error = write(
            &folder.path().join("w"),
            &tensors,
            &BTreeMap::new(),
            &mut |_, _, _| Ok(()),
            |_| {},
        )
        .unwrap_err();
        assert!(error.to_string().contains("lm_head"), "{error}");
    }
}
