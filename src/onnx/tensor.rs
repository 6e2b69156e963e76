//! Tensors of a model file: every encoding ONNX has for one, and external data.
//!
//! `raw_data` and external data stay slices of the mapped files. Typed fields (`float_data` and the like) are
//! converted, and so owned. External files are looked for inside the model's folder and nowhere else.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use super::error::ReadErrorKind;
use super::proto::{TensorProto, data_type};
use crate::graph::Constant;
use crate::tensor::{DType, Tensor};

/// Maps a whole file. Clones and slices of the bytes keep the map alive.
pub(super) fn map(path: &Path) -> std::io::Result<Bytes> {
    let file = File::open(path)?;
    // A map of length 0 is an error on some systems.
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // Safety: the bytes change under us only if another process writes to the file meanwhile, which no reader of model
    // files guards against; they are plain numbers, checked where they are used.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::from_owner(map))
}

pub(super) fn dtype_of(code: i32) -> Option<DType> {
    Some(match code {
        data_type::FLOAT => DType::F32,
        data_type::UINT8 => DType::U8,
        data_type::INT8 => DType::I8,
        data_type::INT32 => DType::I32,
        data_type::INT64 => DType::I64,
        data_type::BOOL => DType::Bool,
        data_type::FLOAT16 => DType::F16,
        data_type::DOUBLE => DType::F64,
        data_type::BFLOAT16 => DType::Bf16,
        _ => return None,
    })
}

pub(super) fn code_of(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => data_type::FLOAT,
        DType::U8 => data_type::UINT8,
        DType::I8 => data_type::INT8,
        DType::I32 => data_type::INT32,
        DType::I64 => data_type::INT64,
        DType::Bool => data_type::BOOL,
        DType::F16 => data_type::FLOAT16,
        DType::F64 => data_type::DOUBLE,
        DType::Bf16 => data_type::BFLOAT16,
    }
}

/// ONNX's own name of an element type, for messages.
pub(super) fn code_name(code: i32) -> String {
    const NAMES: [&str; 27] = [
        "undefined",
        "float32",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "int32",
        "int64",
        "string",
        "bool",
        "float16",
        "float64",
        "uint32",
        "uint64",
        "complex64",
        "complex128",
        "bfloat16",
        "float8e4m3fn",
        "float8e4m3fnuz",
        "float8e5m2",
        "float8e5m2fnuz",
        "uint4",
        "int4",
        "float4e2m1",
        "float8e8m0",
        "uint2",
        "int2",
    ];
    match usize::try_from(code).ok().and_then(|i| NAMES.get(i)) {
        Some(name) => (*name).to_string(),
        None => format!("number {code}"),
    }
}

/// The folder of a model, and the external files in it mapped so far.
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

    /// The constant a message describes: in a stripped model, absent where its file is.
    pub(super) fn constant(&self, proto: &TensorProto, name: &str) -> Result<Constant, ReadErrorKind> {
        match self.tensor(proto, name) {
            Err(ReadErrorKind::ExternalOpen { source, .. })
                if self.stripped && source.kind() == std::io::ErrorKind::NotFound =>
            {
                let (dtype, shape) = described(proto, name)?;
                let size = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
                match size {
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
            let size = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
            self.external(proto, name, size.unwrap_or(usize::MAX))?
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
        // The path is harmless as text; a symbolic link on the way may still lead out.
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
    let dtype = dtype_of(code).ok_or_else(|| ReadErrorKind::DType {
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

/// Bytes of a tensor in the typed fields. Small integers and 16-bit floats share `int32_data`, one element each.
fn typed(proto: &TensorProto, dtype: DType) -> Bytes {
    let ints = &proto.int32_data;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => proto.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F64 => proto.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I64 => proto.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I32 => ints.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 | DType::Bf16 => ints.iter().flat_map(|v| (*v as u16).to_le_bytes()).collect(),
        DType::U8 | DType::I8 => ints.iter().map(|v| *v as u8).collect(),
        DType::Bool => ints.iter().map(|v| u8::from(*v != 0)).collect(),
    };
    Bytes::from(bytes)
}
