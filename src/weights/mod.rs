//! Weights: on disk, by name, and from elsewhere.
//!
//! Takes constants whose bytes may not exist yet (see [`crate::graph::Constant`]), quantized ones among them, and gives a
//! safetensors file and a [`StoredWeight`] record for each: its place, and its BLAKE3. At no time are more than a few
//! tensors in memory. For weights that come later:
//!
//! - [`recipe`] says how each weight is made of an export's initializers;
//! - [`modules`] says what each is in the model, whatever it is called, and [`checkpoint`] what others call that;
//! - [`model`] keeps these recipes with the weights of a model, and takes weights apart again; [`norm_parameter`] says what
//!   checkpoints hold of norms;
//! - [`form`] says how each is stored, as floats or as codes of some kind, and keeps that;
//! - `quantized_checkpoint` puts weights together that other programs pack in their own ways;
//! - [`source`] opens an export, a checkpoint or a package; [`matching`] finds every weight in it, by its values where
//!   neither recipe nor module does, and [`lora`] changes them on the way;
//! - [`embeddings`] reads a table of token embeddings for a model that takes embeddings;
//! - [`config`] refuses a checkpoint whose `config.json` describes another model;
//! - [`checks`] refuses values that no model can use, [`export`] writes checkpoints for other programs, and
//!   [`fingerprint`] is one hash over all values.
//!
//! What a package's manifest says of weights is `package`'s.

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

/// The hash of a whole set of weights: BLAKE3 over name, dtype, shape and hash of each, sorted by name. Two packages with
/// the same set hash hold the same numbers under the same names, wherever in the file they lie.
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
