//! The measured model, from a package: its sizes, bytes that a token reads, floating-point operations of a prompt.

use super::result::{Build, BuiltEngine, Model, Sizes};
use crate::package::manifest::WeightEntry;
use crate::package::{Package, PackageError};
use crate::tensor::DType;
use crate::weights::fingerprint::{FingerprintError, fingerprint};

/// Facts of the package's model under `name`. Reads every weight once, for the hash.
pub fn model(package: &Package, name: &str) -> Result<Model, PackageError> {
    let manifest = &package.manifest;
    let a = &manifest.architecture;
    let weights = &manifest.weights.tensors;
    let elements = |w: &WeightEntry| w.shape.iter().product::<usize>() as u64;
    // Tensors that are stored once count once.
    let distinct = || weights.iter().filter(|w| w.same_as.is_none());
    let has_head = weights.iter().any(|w| is(w, "head.weight"));
    // A token reads one row of a table, but all rows of the embedding if the head multiplies it.
    let table = |w: &WeightEntry| is(w, "positions.weight") || has_head && is(w, "embedding.weight");
    let read = weights.iter().filter(|w| w.same_as.is_none() || is(w, "head.weight"));
    let row = |w: &WeightEntry| w.bytes / w.shape.first().copied().unwrap_or(1).max(1) as u64;
    // A token reads only its chosen experts.
    let chosen = |w: &WeightEntry, n: u64| match a.experts {
        Some(counts) if modules(w).any(|module| module.contains(".experts.")) => {
            n * counts.top_k as u64 / counts.experts.max(1) as u64
        }
        _ => n,
    };
    let matrices = weights.iter().filter(|w| w.shape.len() == 2 && w.modules.is_some());
    let in_layers = |w: &&WeightEntry| modules(w).all(|module| module.starts_with("layers."));
    Ok(Model {
        name: name.to_string(),
        dtype: dtype(manifest.dtype).to_string(),
        weights_hash: weights_hash(package)?,
        parameters: distinct().map(elements).sum(),
        layers: a.layers,
        hidden: a.hidden.unwrap_or(0),
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        vocabulary: package.vocabulary()?,
        weight_bytes_per_token: read.map(|w| if table(w) { row(w) } else { chosen(w, w.bytes) }).sum(),
        kv_bytes_per_token_slot: a
            .cache_dtype
            .byte_len(a.caches * a.kv_heads * (a.head_dim + a.value_dim)) as u64,
        matrix_parameters: Some(matrices.filter(in_layers).map(|w| chosen(w, elements(w))).sum()).filter(|n| *n > 0),
    })
}

fn modules(weight: &WeightEntry) -> impl Iterator<Item = &str> {
    let leaves = weight.modules.iter().flat_map(|recipe| recipe.leaves());
    leaves.map(|leaf| leaf.name)
}

fn is(weight: &WeightEntry, module: &str) -> bool {
    modules(weight).any(|name| name == module)
}

/// The name in models' files and flags.
pub fn dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "fp16",
        DType::Bf16 => "bf16",
        DType::F32 => "fp32",
        other => other.name(),
    }
}

/// The fingerprint, or if some weight has no checkpoint name, a hash that only packages share, marked as such.
pub fn weights_hash(package: &Package) -> Result<String, PackageError> {
    let manifest = &package.manifest;
    match fingerprint(&package.model_weights()?, manifest.norms) {
        Ok(hash) => return Ok(hash),
        Err(FingerprintError::Names(_) | FingerprintError::Tensor { .. }) => {}
    }
    Ok(format!("package:{}", manifest.weights.set_hash))
}

/// Floating-point operations that the model needs for a prompt, a multiplication and an addition being two: the layers'
/// matrices for every token, the head for the last, and causal attention, whose query at position p meets p + 1 keys
/// and values. (Twice the parameters per token: Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section
/// 2.1.)
pub fn prefill_flop(model: &Model, tokens: usize) -> Option<f64> {
    let tokens = tokens as f64;
    let linear = 2.0 * model.matrix_parameters? as f64 * tokens;
    let head = 2.0 * (model.hidden * model.vocabulary) as f64;
    let attention = 2.0 * (model.layers * model.heads * model.head_dim) as f64 * tokens * (tokens + 1.0);
    Some(linear + head + attention)
}

/// The same for one token with `live` tokens in the cache, itself among them.
pub fn decode_flop(model: &Model, live: usize) -> Option<f64> {
    let linear = 2.0 * model.matrix_parameters? as f64;
    let head = 2.0 * (model.hidden * model.vocabulary) as f64;
    Some(linear + head + 4.0 * (model.layers * model.heads * model.head_dim * live) as f64)
}

/// Bytes that one token reads with `live` tokens in the cache.
pub fn decode_bytes(model: &Model, live: usize) -> f64 {
    model.weight_bytes_per_token as f64 + model.kv_bytes_per_token_slot as f64 * live as f64
}

/// Sizes of the package's parts, from its manifest.
pub fn sizes(package: &Package) -> Sizes {
    let manifest = &package.manifest;
    let weights = match manifest.weights.stripped {
        true => 0,
        false => manifest.weights.bytes,
    };
    Sizes {
        package_bytes: Some(package.bytes()),
        plans_bytes: Some(manifest.engines.iter().map(|e| e.bytes).sum()),
        weights_bytes: Some(weights),
    }
}

/// Build times of the engines; `None` for a package without engines.
pub fn build(package: &Package) -> Option<Build> {
    let engines = package.manifest.engines.iter();
    let engines: Vec<BuiltEngine> = engines
        .map(|e| BuiltEngine {
            profile: e.profile.to_string(),
            bytes: e.bytes,
            // No engine builds in less than a millisecond.
            build_ms: (e.build_ms > 0).then_some(e.build_ms as f64),
        })
        .collect();
    (!engines.is_empty()).then_some(Build { engines })
}
