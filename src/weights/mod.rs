//! Weights: on disk, by name, and from other sources.
//!
//! Input: constants whose bytes may not exist yet (see [`crate::graph::Constant`]), including quantized ones. Output: a
//! safetensors file and a [`StoredWeight`] record for each, with its location and its BLAKE3. At most a few tensors are
//! in memory at a time. For weights that come later:
//!
//! - [`recipe`] describes how each weight is computed from an export's initializers;
//! - [`modules`] gives the role of each in the model, whatever its name, and [`checkpoint`] the names in checkpoints;
//! - [`model`] stores these recipes with the weights of a model, and inverts them; [`norm_parameter`] determines how
//!   checkpoints store norms;
//! - [`form`] is the stored form of each, floats or codes of some kind;
//! - `quantized_checkpoint` reads weights that other programs pack in their own formats;
//! - [`source`] opens an export, a checkpoint or a package; [`matching`] finds every weight in it, by its values if
//!   neither recipe nor module does, and [`lora`] merges adapters;
//! - [`embeddings`] reads a table of token embeddings for a model that takes embeddings;
//! - [`config`] refuses a checkpoint whose `config.json` describes another model;
//! - [`checks`] refuses values that no model can use, [`export`] writes checkpoints for other programs, and
//!   [`fingerprint`] is one hash over all values.
//!
//! The weights' entries in a package's manifest belong to `package`.

pub mod checkpoint;
pub mod checks;
pub mod config;
mod contents;
pub mod embeddings;
pub mod export;
pub mod fingerprint;
pub mod form;
pub mod inverse;
pub mod lora;
mod matcher;
pub mod matching;
mod metadata;
pub mod model;
pub mod modules;
pub mod norm_parameter;
mod quantized_checkpoint;
pub mod recipe;
mod rotary;
mod safetensors;
pub mod source;
mod tensorrt_llm;

pub(crate) use safetensors::placements;
pub use safetensors::{Inspect, StoredParts, StoredTensor, StoredWeight, WriteError, content_hash, write};

use crate::tensor::DType;

/// The hash of a whole set of weights: BLAKE3 over name, dtype, shape and hash of each, sorted by name. Two packages
/// with the same set hash have the same values under the same names, wherever they are in the file.
pub fn set_hash<'a>(weights: impl IntoIterator<Item = (&'a str, DType, &'a [usize], &'a str)>) -> String {
    let mut lines: Vec<String> = weights
        .into_iter()
        .map(|(name, dtype, shape, hash)| format!("{name}\0{dtype}\0{shape:?}\0{hash}\n"))
        .collect();
    lines.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for line in lines {
        hasher.update(line.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_hash_depends_on_contents_and_not_on_order() {
        let a = ("a", DType::F16, &[2usize, 3][..], "00");
        let b = ("b", DType::F16, &[6usize][..], "01");
        assert_eq!(set_hash([a, b]), set_hash([b, a]));
        assert_ne!(set_hash([a, b]), set_hash([a, ("b", DType::Bf16, &[6][..], "01")]));
        assert_ne!(set_hash([a, b]), set_hash([a, ("b", DType::F16, &[3, 2][..], "01")]));
    }
}
