//! Tensors of a model file: every encoding ONNX has for one, and external data.
//!
//! [`DType`] lists the element types. `raw_data` and external data stay slices of the mapped files. Typed fields (such as
//! `float_data`) are converted to owned memory. External files must lie inside the model's folder.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use super::error::ReadErrorKind;
use super::proto::TensorProto;
use crate::graph::Constant;
use crate::tensor::{DType, Tensor};

/// Maps a whole file. Clones and slices of the bytes keep the map alive.
pub(super) fn map(path: &Path) -> std::io::Result<Bytes> {
    let file = File::open(path)?;
    // A map of length 0 is an error on some systems.
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // Safety: the bytes can change only if another process writes to the file at the same time, which no reader of
    // model files guards against; they are plain numbers, checked where they are used.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::from_owner(map))
}

/// ONNX's own name of an element type, for messages.
pub(super) fn code_name(code: i32) -> String {
    // Types that Lapidary does not have.
    const OTHERS: [(i32, &str); 10] = [
        (0, "undefined"),
        (4, "uint16"),
        (5, "int16"),
        (8, "string"),
        (12, "uint32"),
        (13, "uint64"),
        (14, "complex64"),
        (15, "complex128"),
        (18, "float8e4m3fnuz"),
        (20, "float8e5m2fnuz"),
    ];
    let other = || OTHERS.iter().find(|(other, _)| *other == code).map(|(_, name)| *name);
    let name = DType::of_onnx_code(code).map(DType::onnx_name).or_else(other);
    name.map_or_else(|| format!("number {code}"), str::to_string)
}

/// The folder of a model, and its external files mapped so far.
pub(super) struct Folder {
    path: PathBuf,
    /// External files may be missing.
    stripped: bool,
    maps: RefCell<HashMap<String, (PathBuf, Bytes)>>,
}

impl Folder {
    pub(super) fn of(model: &Path, stripped: bool) -> Self {
        let parent = model.parent().filter(|p| !p.as_os_str().is_empty());
        Folder {
            path: parent.unwrap_or(Path::new(".")).to_path_buf(),
            stripped,
            maps: RefCell::default(),
        }
    }

    /// The constant a message describes: in a stripped model, absent if its file is missing.
    pub(super) fn constant(&self, proto: &TensorProto, name: &str) -> Result<Constant, ReadErrorKind> {
        match self.tensor(proto, name) {
            Err(ReadErrorKind::ExternalOpen { source, .. })
                if self.stripped && source.kind() == std::io::ErrorKind::NotFound =>
            {
                let (dtype, shape) = described(proto, name)?;
                match dtype.byte_len_of(&shape) {
                    Some(_) => Ok(Constant::absent(dtype, shape)),
                    None => Err(ReadErrorKind::Tensor {
                        tensor: name.to_string(),
                        reason: format!("{shape:?} is larger than any memory"),
                    }),
                }
            }
            tensor => tensor.map(Constant::tensor),
        }
    }

    /// The tensor a message describes. `name` is for error messages.
    pub(super) fn tensor(&self, proto: &TensorProto, name: &str) -> Result<Tensor, ReadErrorKind> {
        let (dtype, shape) = described(proto, name)?;
        let data = if proto.data_location == Some(1) {
            self.external(proto, name, dtype.byte_len_of(&shape).unwrap_or(usize::MAX))?
        } else if let Some(raw) = &proto.raw_data {
            raw.clone()
        } else {
            typed(proto, dtype)
        };
        Tensor::new(dtype, shape, data).map_err(|source| ReadErrorKind::TensorSize {
            tensor: name.to_string(),
            source,
        })
    }

    /// The bytes of an external tensor that needs `size` of them.
    fn external(&self, proto: &TensorProto, name: &str, size: usize) -> Result<Bytes, ReadErrorKind> {
        let entry = |key: &str| {
            let found = proto.external_data.iter().find(|e| e.key.as_deref() == Some(key));
            found.and_then(|e| e.value.as_deref())
        };
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => text.trim().parse::<u64>().map(Some).map_err(|_| ReadErrorKind::Tensor {
                tensor: name.to_string(),
                reason: format!("its external data has the {key} {text:?}, which is not a number"),
            }),
        };
        let location = entry("location").unwrap_or_default();
        let start = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(size as u64);
        let (file, bytes) = self.open(location, name)?;
        let end = u128::from(start) + u128::from(length);
        if end > bytes.len() as u128 {
            return Err(ReadErrorKind::ExternalShort {
                tensor: name.to_string(),
                file,
                start,
                end,
                found: bytes.len() as u64,
            });
        }
        Ok(bytes.slice(start as usize..end as usize))
    }

    fn open(&self, location: &str, tensor: &str) -> Result<(PathBuf, Bytes), ReadErrorKind> {
        if let Some(opened) = self.maps.borrow().get(location) {
            return Ok(opened.clone());
        }
        let opened = self.open_checked(location, tensor)?;
        self.maps.borrow_mut().insert(location.to_string(), opened.clone());
        Ok(opened)
    }

    fn open_checked(&self, location: &str, tensor: &str) -> Result<(PathBuf, Bytes), ReadErrorKind> {
        let refuse = |reason, help| ReadErrorKind::ExternalLocation {
            tensor: tensor.to_string(),
            location: location.to_string(),
            reason,
            help,
        };
        let relative = Path::new(location);
        if location.is_empty() {
            return Err(refuse("it names no file", None));
        }
        if relative.is_absolute() || location.starts_with(['/', '\\']) {
            return Err(refuse(
                "an absolute path is refused",
                Some("export the model again; the path must be relative to the model's folder"),
            ));
        }
        let inside = |c: Component| matches!(c, Component::Normal(_) | Component::CurDir);
        if !relative.components().all(inside) {
            return Err(refuse("a path that leaves the model's folder is refused", None));
        }
        let file = self.path.join(relative);
        let cannot_open = |source| ReadErrorKind::ExternalOpen {
            tensor: tensor.to_string(),
            file: file.clone(),
            source,
        };
        // The path itself stays inside; a symbolic link in it may still lead out.
        let folder = self.path.canonicalize().map_err(cannot_open)?;
        let real = file.canonicalize().map_err(cannot_open)?;
        if !real.starts_with(&folder) {
            return Err(refuse(
                "it is a symbolic link out of the model's folder, which is refused",
                Some("put the file itself there"),
            ));
        }
        let bytes = map(&real).map_err(cannot_open)?;
        Ok((file, bytes))
    }
}

fn described(proto: &TensorProto, name: &str) -> Result<(DType, Vec<usize>), ReadErrorKind> {
    let code = proto.data_type.unwrap_or(0);
    let dtype = DType::of_onnx_code(code).ok_or_else(|| ReadErrorKind::DType {
        tensor: name.to_string(),
        dtype: code_name(code),
    })?;
    let shape = proto
        .dims
        .iter()
        .map(|d| usize::try_from(*d))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| ReadErrorKind::Tensor {
            tensor: name.to_string(),
            reason: format!("has the negative dimensions {:?}", proto.dims),
        })?;
    Ok((dtype, shape))
}

/// Bytes of a tensor in the typed fields. Types of at most 32 bits other than f32 are in `int32_data`: one element
/// each, or for packed types the elements of one byte each (`int32_data` in
/// <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>).
fn typed(proto: &TensorProto, dtype: DType) -> Bytes {
    let ints = &proto.int32_data;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => proto.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F64 => proto.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I64 => proto.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Bool => ints.iter().map(|v| u8::from(*v != 0)).collect(),
        _ => {
            let bytes = dtype.bits().div_ceil(8);
            ints.iter()
                .flat_map(|v| v.to_le_bytes().into_iter().take(bytes))
                .collect()
        }
    };
    Bytes::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proto(code: i32, dims: &[i64]) -> TensorProto {
        TensorProto {
            dims: dims.to_vec(),
            data_type: Some(code),
            ..TensorProto::default()
        }
    }

    fn read(proto: &TensorProto) -> Result<Tensor, ReadErrorKind> {
        Folder::of(Path::new("m.onnx"), false).tensor(proto, "w")
    }

    #[test]
    fn packed_and_narrow_tensors_in_both_encodings() {
        for (code, dtype, bytes, values) in [
            (21, DType::U4, &[0x21u8, 0x0f][..], vec![1.0, 2.0, 15.0]),
            (22, DType::I4, &[0x21, 0x0f], vec![1.0, 2.0, -1.0]),
            (25, DType::U2, &[0b11_10_01], vec![1.0, 2.0, 3.0]),
            (26, DType::I2, &[0b11_10_01], vec![1.0, -2.0, -1.0]),
            (17, DType::F8E4M3Fn, &[0x38, 0xb8, 0x7e], vec![1.0, -1.0, 448.0]),
            (19, DType::F8E5M2, &[0x3c, 0xbc, 0x7b], vec![1.0, -1.0, 57344.0]),
            (23, DType::F4E2M1, &[0x72, 0x0f], vec![1.0, 6.0, -6.0]),
            (24, DType::F8E8M0, &[127, 128, 126], vec![1.0, 2.0, 0.5]),
        ] {
            let mut raw = proto(code, &[3]);
            raw.raw_data = Some(Bytes::copy_from_slice(bytes));
            let mut typed = proto(code, &[3]);
            typed.int32_data = bytes.iter().map(|b| i32::from(*b)).collect();
            for tensor in [read(&raw).unwrap(), read(&typed).unwrap()] {
                assert_eq!((tensor.dtype(), tensor.to_f64()), (dtype, values.clone()));
            }
            raw.dims = vec![2, 1000];
            let message = read(&raw).unwrap_err().to_string();
            assert!(
                message.contains("tensor \"w\"") && message.contains(dtype.name()),
                "{message}"
            );
        }
    }

    #[test]
    fn types_that_are_not_read_are_named() {
        for (code, name) in [
            (18, "float8e4m3fnuz"),
            (20, "float8e5m2fnuz"),
            (14, "complex64"),
            (99, "number 99"),
        ] {
            let message = read(&proto(code, &[3])).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("float8e4m3fn,"), "{message}");
        }
    }
}
