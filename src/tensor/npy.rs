//! NumPy's `.npy` files: one array with its element type and shape.
//!
//! The format is `numpy.lib.format`, versions 1 to 3
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>). Floats in row-major order are read;
//! everything else is refused by name.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{DType, Tensor};
use crate::help::Help;

/// A file that is not an array of floats.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct NpyError {
    /// The file.
    pub path: PathBuf,
    /// The problem.
    pub reason: String,
}

impl Help for NpyError {
    fn help(&self) -> Option<String> {
        Some("write it with numpy.save, as float32 or float16 in C order".to_string())
    }
}

/// Reads an array of floats: f16, f32 or f64, little-endian, in row-major order.
pub fn read(path: &Path) -> Result<Tensor, NpyError> {
    let refuse = |reason: String| NpyError {
        path: path.to_path_buf(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
    parse(&bytes).map_err(refuse)
}

fn parse(bytes: &[u8]) -> Result<Tensor, String> {
    let Some(rest) = bytes.strip_prefix(b"\x93NUMPY") else {
        return Err("is not a .npy file".into());
    };
    let short = || "is cut off in its header".to_string();
    let version = *rest.first().ok_or_else(short)?;
    let sized = rest.get(2..).ok_or_else(short)?;
    let (length, body) = match version {
        1 => {
            let (length, body) = sized.split_first_chunk::<2>().ok_or_else(short)?;
            (usize::from(u16::from_le_bytes(*length)), body)
        }
        2 | 3 => {
            let (length, body) = sized.split_first_chunk::<4>().ok_or_else(short)?;
            (u32::from_le_bytes(*length) as usize, body)
        }
        other => return Err(format!("has version {other} of the format; versions 1 to 3 are read")),
    };
    let header = body.get(..length).ok_or_else(short)?;
    let data = &body[length..];
    let header = std::str::from_utf8(header).map_err(|_| "has a header that is not text".to_string())?;
    let field = |name: &str| -> Result<&str, String> {
        let at = [format!("'{name}':"), format!("\"{name}\":")]
            .iter()
            .find_map(|key| Some(header.find(key)? + key.len()));
        let rest = at.map(|at| header[at..].trim_start());
        rest.ok_or_else(|| format!("has no {name:?} in its header"))
    };
    let quoted = |text: &'_ str| -> String { text.chars().skip(1).take_while(|c| !matches!(c, '\'' | '"')).collect() };
    let descr = quoted(field("descr")?);
    let dtype = match descr.as_str() {
        "<f2" | "|f2" => DType::F16,
        "<f4" => DType::F32,
        "<f8" => DType::F64,
        other => {
            return Err(format!(
                "holds elements of the type {other:?}, and floats (<f4, <f2, <f8) are read"
            ));
        }
    };
    if !field("fortran_order")?.starts_with("False") {
        return Err("is in Fortran order, and C order is read".into());
    }
    let list = field("shape")?;
    let list = list.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    let (list, _) = list.ok_or("has no shape in its header")?;
    let dims = list.split(',').map(str::trim).filter(|dim| !dim.is_empty());
    let shape: Vec<usize> = dims
        .map(|dim| dim.parse().map_err(|_| format!("has the shape ({list})")))
        .collect::<Result<_, _>>()?;
    let expected = dtype.byte_len_of(&shape);
    if expected != Some(data.len()) {
        return Err(format!(
            "has {} bytes of elements, and its shape {shape:?} of {dtype} needs {}",
            data.len(),
            expected.map_or_else(|| "more than memory can hold".to_string(), |n| n.to_string())
        ));
    }
    Tensor::new(dtype, shape, Bytes::copy_from_slice(data)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `numpy.save` writes it.
    fn file(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    const HEADER: &str = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          \n";

    #[test]
    fn arrays_of_floats_are_read() {
        let data: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        for version in [1, 2, 3] {
            let tensor = parse(&file(version, HEADER, &data)).unwrap();
            assert_eq!(
                (tensor.shape(), tensor.to_f32()),
                (&[2, 3][..], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
            );
        }
        let half = HEADER.replace("<f4", "<f2").replace("(2, 3)", "(1,)");
        let tensor = parse(&file(1, &half, &[0x00, 0x3c])).unwrap();
        assert_eq!((tensor.dtype(), tensor.to_f32()), (DType::F16, vec![1.0]));
    }

    #[test]
    fn what_is_no_array_of_floats_is_named() {
        let data = [0u8; 24];
        for (bytes, expected) in [
            (b"text".to_vec(), "is not a .npy file"),
            (file(1, HEADER, &data)[..20].to_vec(), "cut off"),
            (file(9, HEADER, &data), "version 9"),
            (file(1, &HEADER.replace("<f4", "<i8"), &data), "\"<i8\""),
            (file(1, &HEADER.replace("<f4", ">f4"), &data), "\">f4\""),
            (file(1, &HEADER.replace("False", "True"), &data), "Fortran order"),
            (
                file(1, &HEADER.replace("(2, 3)", "(2, 4)"), &data),
                "has 24 bytes of elements",
            ),
            (
                file(1, &HEADER.replace("(2, 3)", "(18446744073709551615, 9)"), &data),
                "more than memory can hold",
            ),
            (file(1, &HEADER.replace("'shape'", "'size'"), &data), "no \"shape\""),
        ] {
            let error = parse(&bytes).unwrap_err();
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        }
    }
}
