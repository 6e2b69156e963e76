//! One hash over the values of a model, in any file and any dtype, so that benchmarks of different programs are
//! comparable.
//!
//! Tensors are those of a Hugging Face checkpoint ([`super::export`]): its names, its shapes. Each is narrowed first to
//! the smallest of f16, bf16 and f32 that holds all its values exactly, so an fp32 package of fp16 values has the hash
//! of the fp16 one. A (tied) head with the same values as the embedding is left out. Then BLAKE3 over the lines `name
//! \t dtype \t dims joined by commas \t hex(BLAKE3 of the little-endian bytes) \n`, sorted by name.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::export::{self, ExportError, Format};
use super::model::ModelWeights;
use super::norm_parameter::NormParameter;
use crate::graph::Constant;
use crate::help::Help;
use crate::tensor::{DType, Tensor};

/// Weights that have no hash.
#[derive(Debug, thiserror::Error)]
pub enum FingerprintError {
    /// They have no checkpoint names.
    #[error(transparent)]
    Names(#[from] ExportError),
    /// One that cannot be read, or has no numbers.
    #[error("{name:?}: {message}")]
    Tensor {
        /// In a checkpoint.
        name: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Help for FingerprintError {
    fn help(&self) -> Option<String> {
        match self {
            FingerprintError::Names(error) => error.help(),
            FingerprintError::Tensor { .. } => None,
        }
    }
}

/// Threads; each holds one tensor at a time, in fp32 unless it is in half precision.
const MOST_THREADS: usize = 16;

/// The hash, in hexadecimal, of a model's weights, all of which must have a name. Reads every byte, one tensor per
/// thread. `norms` as for [`export::export`].
pub fn fingerprint(model: &ModelWeights, norms: Option<NormParameter>) -> Result<String, FingerprintError> {
    let tensors = match export::tensors(model, norms, Format::HuggingFace) {
        Err(ExportError::NoName { .. }) => export::tensors(model, norms, Format::Gpt2)?,
        other => other?,
    };
    of(tensors)
}

/// The same of tensors under their checkpoint names.
fn of(tensors: Vec<(String, Constant)>) -> Result<String, FingerprintError> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let work = || {
        let mut lines = Vec::new();
        while let Some((name, constant)) = tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
            lines.push((name.clone(), line(name, constant)?));
        }
        Ok(lines)
    };
    let parts: Vec<Result<Vec<(String, String)>, FingerprintError>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(MOST_THREADS)).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|w| w.join().expect("hashing does not panic"))
            .collect()
    });
    let mut lines = Vec::new();
    for part in parts {
        lines.extend(part?);
    }
    lines.sort();
    let embedding = lines.iter().find(|(name, _)| name == "model.embed_tokens.weight");
    let embedding = embedding.map(|(_, line)| line.clone());
    lines.retain(|(name, line)| name != "lm_head.weight" || Some(line) != embedding.as_ref());
    let mut hasher = blake3::Hasher::new();
    for (name, line) in lines {
        hasher.update(format!("{name}\t{line}\n").as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A line without the name.
fn line(name: &str, constant: &Constant) -> Result<String, FingerprintError> {
    let failed = |message: String| FingerprintError::Tensor {
        name: name.to_string(),
        message,
    };
    let tensor = constant.materialize().map_err(|e| failed(e.to_string()))?;
    let (dtype, hash) = narrowed(&tensor).map_err(failed)?;
    let dims: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
    Ok(format!("{dtype}\t{}\t{}", dims.join(","), hash.to_hex()))
}

/// The smallest dtype that represents all numbers exactly, and the hash of the bytes in it.
fn narrowed(tensor: &Tensor) -> Result<(DType, blake3::Hash), String> {
    if tensor.dtype() == DType::F16 {
        let nan = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) & 0x7fff > 0x7c00;
        return match tensor.data().chunks_exact(2).any(nan) {
            true => Err("holds a NaN".into()),
            false => Ok((DType::F16, blake3::hash(tensor.data()))),
        };
    }
    if !tensor.dtype().is_float() {
        return Err(format!("is {}, which no weight is", tensor.dtype()));
    }
    let values = tensor.to_f32();
    if values.iter().any(|v| v.is_nan()) {
        return Err("holds a NaN".into());
    }
    let bits = |v: f32| v.to_bits();
    let (mut halves, mut brains) = (true, true);
    for v in &values {
        halves &= bits(f16::from_f32(*v).to_f32()) == bits(*v);
        brains &= bits(*v) & 0xffff == 0;
    }
    let mut hasher = blake3::Hasher::new();
    let mut hash = |bytes: &[u8]| {
        hasher.update(bytes);
    };
    let dtype = match (halves, brains) {
        (true, _) => DType::F16,
        (false, true) => DType::Bf16,
        (false, false) => DType::F32,
    };
    for part in values.chunks(16 << 10) {
        match dtype {
            DType::F16 => hash(
                &part
                    .iter()
                    .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                    .collect::<Vec<u8>>(),
            ),
            DType::Bf16 => hash(
                &part
                    .iter()
                    .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                    .collect::<Vec<u8>>(),
            ),
            _ => hash(&part.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
        }
    }
    Ok((dtype, hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, shape: &[usize], values: &[f32]) -> Constant {
        Constant::tensor(Tensor::from_f32(shape.to_vec(), values)).cast(dtype)
    }

    fn hash(tensors: &[(&str, Constant)]) -> String {
        of(tensors.iter().map(|(n, c)| (n.to_string(), c.clone())).collect()).unwrap()
    }

    /// The vector of `scripts/baselines/schema.py`, which computes the same in Python.
    #[test]
    fn the_same_as_the_baselines() {
        let a = tensor(DType::F32, &[2, 2], &[1.0, 2.0, 3.0, 0.1]);
        let b = tensor(DType::F16, &[2], &[1.0, -0.0]);
        let expected = "6aa0641c5f73a4028e271715eb5c75a400ca4d325a66edcaa413bb80c13dcd0b";
        assert_eq!(hash(&[("a.weight", a.clone()), ("b.weight", b.clone())]), expected);
        let wide = tensor(DType::F32, &[2], &[1.0, -0.0]);
        assert_eq!(hash(&[("b.weight", wide), ("a.weight", a.clone())]), expected);
        let other = tensor(DType::F32, &[2], &[1.0, 0.0]);
        assert_ne!(
            hash(&[("b.weight", other), ("a.weight", a)]),
            expected,
            "a zero has a sign"
        );
    }

    #[test]
    fn a_tied_head_is_no_tensor_of_its_own() {
        let table = tensor(DType::F16, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let alone = hash(&[("model.embed_tokens.weight", table.clone())]);
        let tied = [
            ("model.embed_tokens.weight", table.clone()),
            ("lm_head.weight", table.clone().cast(DType::F32)),
        ];
        assert_eq!(hash(&tied), alone);
        let own = tensor(DType::F16, &[2, 2], &[1.0, 2.0, 3.0, 5.0]);
        assert_ne!(
            hash(&[("model.embed_tokens.weight", table), ("lm_head.weight", own)]),
            alone
        );
    }

    #[test]
    fn what_fits_bf16_alone_and_what_is_no_number() {
        let large = Tensor::from_f32(vec![1], &[1e38f32]);
        let large = bf16::from_f32(large.to_f32()[0]).to_f32();
        assert_eq!(narrowed(&Tensor::from_f32(vec![1], &[large])).unwrap().0, DType::Bf16);
        for dtype in [DType::F16, DType::F32] {
            assert!(narrowed(&tensor(dtype, &[1], &[f32::NAN]).materialize().unwrap()).is_err());
        }
    }
}
