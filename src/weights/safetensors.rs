//! Writes safetensors (<https://huggingface.co/docs/safetensors>): eight bytes of header length, a JSON header, then the
//! tensors without holes.
//!
//! The format allows no gaps, so alignment is a matter of order: the header is padded to a whole page and tensors come
//! with the sizes that keep alignment first. In a file whose tensors are all multiples of 64 bytes, as almost all are,
//! every tensor begins on a 64-byte border.
//!
//! Header and order depend on sizes only, which are known before any byte is computed. Identical tensors are stored once:
//! the second becomes a record that points to the first, and since safetensors forbids two names for one range, only the
//! first is in the header. The header is therefore written last, into space reserved for the longest it could be.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use bytes::Bytes;

use super::checks::BadNumbers;
use crate::graph::{Constant, ConstantError};
use crate::help::Help;
use crate::tensor::{DType, Tensor};

/// Tensor data begins at a multiple of this.
const PAGE: usize = 4096;

/// Where a tensor lies in the file and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// From the beginning of the file, header included: what ONNX external data and a map of the file need.
    pub offset: u64,
    pub bytes: u64,
    /// BLAKE3 of the bytes, in hexadecimal.
    pub blake3: String,
    /// The tensor with the same bytes that is stored in this place, if it is another one.
    pub same_as: Option<String>,
}

/// Looks at a weight that was computed, before it is written: its name, how it was computed, the tensor. An error ends the
/// writing.
pub type Inspect<'a> = &'a mut (dyn FnMut(&str, &Constant, &Tensor) -> Result<(), WriteError> + Send);

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the weight {name:?} cannot be computed: {source}")]
    Constant { name: String, source: ConstantError },
    #[error("the weight {name:?}: {source}")]
    Numbers { name: String, source: BadNumbers },
}

impl Help for WriteError {
    fn help(&self) -> Option<String> {
        match self {
            WriteError::Io { .. } => None,
            WriteError::Constant { source, .. } => source.help(),
            WriteError::Numbers { .. } => {
                Some("take them anyway with --allow-nonfinite or --allow-overflow".to_string())
            }
        }
    }
}

/// The format's name of a dtype.
pub fn safetensors_dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "BOOL",
        DType::U8 => "U8",
        DType::I8 => "I8",
        DType::I32 => "I32",
        DType::I64 => "I64",
        DType::F16 => "F16",
        DType::Bf16 => "BF16",
        DType::F32 => "F32",
        DType::F64 => "F64",
    }
}

/// Places for tensors that are not there yet, in the order given: what a graph that points to them needs. They have no hash.
pub fn placements(tensors: &[(String, Constant)]) -> Vec<StoredTensor> {
    let mut end = PAGE as u64;
    let mut next = |constant: &Constant| {
        let (offset, bytes) = (end, constant.byte_len() as u64);
        end += bytes;
        StoredTensor {
            offset,
            bytes,
            blake3: String::new(),
            same_as: None,
        }
    };
    tensors.iter().map(|(_, constant)| next(constant)).collect()
}

/// One tensor on its way to the file.
struct Ready {
    index: usize,
    data: Bytes,
    hash: blake3::Hash,
}

/// Writes `tensors` (unique names) to a new file at `path`. `inspect` sees each before it is written, `progress` is told
/// the bytes done so far. Gives one record a tensor, in the order given.
///
/// Tensors are computed and hashed on a second thread, at most two ahead of the one being written.
pub fn write(
    path: &Path,
    tensors: &[(String, Constant)],
    metadata: &BTreeMap<String, String>,
    inspect: Inspect<'_>,
    mut progress: impl FnMut(u64),
) -> Result<Vec<StoredTensor>, WriteError> {
    let failed = |source| WriteError::Io {
        path: path.to_path_buf(),
        source,
    };
    // Largest power of two that divides the size, up to a page: what follows keeps that alignment.
    let alignment = |c: &Constant| (c.byte_len() | PAGE).trailing_zeros();
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(alignment(&tensors[*i].1)));

    let total: u64 = tensors.iter().map(|(_, c)| c.byte_len() as u64).sum();
    let longest = header(tensors, order.iter().map(|i| (*i, total, total)), metadata);
    let data_start = (8 + longest.len()).next_multiple_of(PAGE) as u64;

    let file = File::create_new(path).map_err(failed)?;
    let mut file = BufWriter::new(file);
    file.seek(SeekFrom::Start(data_start)).map_err(failed)?;

    let mut stored: Vec<Option<StoredTensor>> = vec![None; tensors.len()];
    let mut seen: HashMap<(blake3::Hash, usize), usize> = HashMap::new();
    let mut written: Vec<(usize, u64, u64)> = Vec::new();
    let mut end = data_start;
    let mut done = 0;
    std::thread::scope(|scope| {
        // One tensor waits while the next is computed and another is written.
        let (sender, receiver) = mpsc::sync_channel::<Result<Ready, WriteError>>(1);
        let order = &order;
        scope.spawn(move || {
            for index in order.iter().copied() {
                let (name, constant) = &tensors[index];
                let computed = constant.materialize().map_err(|source| WriteError::Constant {
                    name: name.clone(),
                    source,
                });
                let ready = computed.and_then(|tensor| {
                    inspect(name, constant, &tensor)?;
                    Ok(Ready {
                        index,
                        hash: blake3::hash(tensor.data()),
                        data: tensor.data().clone(),
                    })
                });
                let last = ready.is_err();
                // The writer hangs up when it fails; there is nobody left to tell.
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
            stored[index] = Some(StoredTensor {
                offset,
                bytes,
                blake3: hash.to_hex().to_string(),
                same_as: (first != index).then(|| tensors[first].0.clone()),
            });
            done += bytes;
            progress(done);
        }
        Ok(())
    })?;

    let mut header = header(tensors, written.into_iter(), metadata);
    header.resize(data_start as usize - 8, b' ');
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
    // A file of no tensors still has its header only; otherwise the length is that of the data.
    file.set_len(end).map_err(failed)?;
    Ok(stored.into_iter().map(|s| s.expect("every tensor was sent")).collect())
}

fn header(
    tensors: &[(String, Constant)],
    ranges: impl Iterator<Item = (usize, u64, u64)>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    for (index, start, end) in ranges {
        let (name, constant) = &tensors[index];
        let entry = serde_json::json!({
            "dtype": safetensors_dtype(constant.dtype()),
            "shape": constant.shape(),
            "data_offsets": [start, end],
        });
        map.insert(name.clone(), entry);
    }
    serde_json::to_vec(&map).expect("strings and numbers serialise")
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
