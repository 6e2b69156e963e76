//! The rules of a whole [`Network`]. `builder` checks them when it finishes, `package` when it reads a network, the back
//! ends before they trust one.
//!
//! [`verify`] holds for any network, [`verify_interface`] for one that a decoder session can run.

use std::collections::HashSet;

use crate::dim::{Dim, Sym};
use crate::tensor::DType;

use super::builder::LayerError;
use super::infer::infer;
use super::{LayerKind, Logits, Network, Tensor, TensorId, Tokens};

/// The first broken rule of a network: a bug of the code that made the network.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Layer(#[from] Box<LayerError>),
    #[error("layer {layer:?} reads or writes tensor number {id}, but the network has {count}")]
    NoTensor { layer: String, id: u32, count: usize },
    #[error("layer {layer:?} reads {tensor:?} before anything computes it")]
    Order { layer: String, tensor: String },
    #[error("layer {layer:?} computes {tensor:?}, which is an input or was computed before")]
    Twice { layer: String, tensor: String },
    #[error("layer {layer:?} must have one output, not {count}")]
    Outputs { layer: String, count: usize },
    #[error("{what} {name:?} occurs twice")]
    Name { what: &'static str, name: String },
    #[error("layer {layer:?} says {tensor:?} is {stated}, but its rule gives {inferred}")]
    Stated {
        layer: String,
        tensor: String,
        stated: String,
        inferred: String,
    },
    #[error("{tensor:?} has the shape {shape:?}, which the profile {profile} does not allow: {why}")]
    Symbol {
        tensor: String,
        shape: Vec<Dim>,
        profile: String,
        why: &'static str,
    },
    #[error("the output {0:?} is computed by no layer")]
    Output(String),
    #[error("the network has no output")]
    NoOutput,
    #[error("the weight {0:?} is read by no layer")]
    UnusedWeight(String),
    #[error(
        "layer {layer:?} updates the cache {cache:?} into {output:?}: the first must be a network input, the second a network output, each once"
    )]
    Cache {
        layer: String,
        cache: String,
        output: String,
    },
    #[error("layer {layer:?} writes the cache {cache:?} into itself: an update must be another tensor than its cache")]
    SelfUpdate { layer: String, cache: String },
    #[error("the profile asks for {min} to {max} tokens (opt {opt}) over {capacity} slots and {batch} sequences")]
    Profile {
        min: usize,
        opt: usize,
        max: usize,
        capacity: usize,
        batch: usize,
    },
    #[error("the interface needs {wanted}, but the network has {found}")]
    Interface { wanted: String, found: String },
}

/// The rules of any network: static single assignment in order of execution, unique names, every layer's own rule, dims
/// that the profile allows, caches updated from an input into an output, every weight read.
pub fn verify(network: &Network) -> Result<(), VerifyError> {
    verify_profile(network)?;
    verify_names(network)?;
    let count = network.tensors.len();
    let mut defined = vec![false; count];
    for id in &network.inputs {
        defined[id.0 as usize] = true;
    }
    for layer in &network.layers {
        for id in layer.inputs.iter().chain(&layer.outputs) {
            if id.0 as usize >= count {
                let (layer, id) = (layer.name.clone(), id.0);
                return Err(VerifyError::NoTensor { layer, id, count });
            }
        }
        let name = |id: &TensorId| network.tensor(*id).name.clone();
        if let Some(early) = layer.inputs.iter().find(|id| !defined[id.0 as usize]) {
            let (layer, tensor) = (layer.name.clone(), name(early));
            return Err(VerifyError::Order { layer, tensor });
        }
        let [output] = layer.outputs[..] else {
            let (layer, count) = (layer.name.clone(), layer.outputs.len());
            return Err(VerifyError::Outputs { layer, count });
        };
        if std::mem::replace(&mut defined[output.0 as usize], true) {
            let (layer, tensor) = (layer.name.clone(), name(&output));
            return Err(VerifyError::Twice { layer, tensor });
        }
        let inputs: Vec<&Tensor> = layer.inputs.iter().map(|id| network.tensor(*id)).collect();
        let stated = network.tensor(output);
        let inferred = infer(&layer.kind, &inputs, &network.weights, Some(stated.dtype)).map_err(|fault| {
            Box::new(LayerError {
                layer: layer.name.clone(),
                kind: layer.kind.name(),
                inputs: inputs.into_iter().cloned().collect(),
                fault,
            })
        })?;
        if (stated.dtype, &stated.shape) != (inferred.0, &inferred.1) {
            return Err(VerifyError::Stated {
                layer: layer.name.clone(),
                tensor: stated.name.clone(),
                stated: format!("{}{:?}", stated.dtype, stated.shape),
                inferred: format!("{}{:?}", inferred.0, inferred.1),
            });
        }
    }
    if network.outputs.is_empty() {
        return Err(VerifyError::NoOutput);
    }
    if let Some(output) = network.outputs.iter().find(|id| !defined[id.0 as usize]) {
        return Err(VerifyError::Output(network.tensor(*output).name.clone()));
    }
    verify_caches(network)?;
    verify_weights(network)
}

fn verify_profile(network: &Network) -> Result<(), VerifyError> {
    let profile = network.profile;
    let (min, opt, max) = match profile.tokens {
        Tokens::Static(n) => (n, n, n),
        Tokens::Dynamic { min, opt, max } => (min, opt, max),
    };
    let (capacity, batch) = (profile.capacity, profile.batch);
    if !(batch >= 1 && 1 <= min && min <= opt && opt <= max && max <= capacity) {
        return Err(VerifyError::Profile {
            min,
            opt,
            max,
            capacity,
            batch,
        });
    }
    let tokens = Sym::tokens();
    for tensor in &network.tensors {
        let refuse = |why| VerifyError::Symbol {
            tensor: tensor.name.clone(),
            shape: tensor.shape.clone(),
            profile: profile.to_string(),
            why,
        };
        for dim in &tensor.shape {
            match dim.as_const() {
                Some(n) if n >= 1 => {}
                Some(_) => return Err(refuse("a dim must be at least 1")),
                None if matches!(profile.tokens, Tokens::Static(_)) => {
                    return Err(refuse("every dim must be a number"));
                }
                None if dim.symbols().iter().any(|s| *s != tokens) => {
                    return Err(refuse("the only symbol may be `tokens`"));
                }
                None => {}
            }
        }
    }
    Ok(())
}

fn verify_names(network: &Network) -> Result<(), VerifyError> {
    let lists: [(&'static str, Vec<&str>); 3] = [
        ("the tensor", network.tensors.iter().map(|t| t.name.as_str()).collect()),
        ("the layer", network.layers.iter().map(|l| l.name.as_str()).collect()),
        ("the weight", network.weights.iter().map(|w| w.name.as_str()).collect()),
    ];
    for (what, names) in lists {
        let mut seen = HashSet::with_capacity(names.len());
        if let Some(name) = names.into_iter().find(|n| !seen.insert(*n)) {
            let name = name.to_string();
            return Err(VerifyError::Name { what, name });
        }
    }
    Ok(())
}

fn verify_caches(network: &Network) -> Result<(), VerifyError> {
    let mut seen = HashSet::new();
    for layer in &network.layers {
        if !matches!(layer.kind, LayerKind::KvCacheUpdate) {
            continue;
        }
        let (cache, update, output) = (layer.inputs[0], layer.inputs[1], layer.outputs[0]);
        // Rows of the update are copied over rows of the cache; of one tensor they would overlap.
        if update == cache {
            return Err(VerifyError::SelfUpdate {
                layer: layer.name.clone(),
                cache: network.tensor(cache).name.clone(),
            });
        }
        let inside = network.inputs.contains(&cache) && network.outputs.contains(&output);
        if !inside || !seen.insert(cache) {
            return Err(VerifyError::Cache {
                layer: layer.name.clone(),
                cache: network.tensor(cache).name.clone(),
                output: network.tensor(output).name.clone(),
            });
        }
    }
    Ok(())
}

fn verify_weights(network: &Network) -> Result<(), VerifyError> {
    let mut read = vec![false; network.weights.len()];
    let reads: HashSet<TensorId> = network.layers.iter().flat_map(|l| l.inputs.iter().copied()).collect();
    for layer in &network.layers {
        if let LayerKind::Weight(id) = layer.kind {
            read[id.0 as usize] |= reads.contains(&layer.outputs[0]);
        }
    }
    match read.iter().position(|read| !read) {
        None => Ok(()),
        Some(i) => Err(VerifyError::UnusedWeight(network.weights[i].name.clone())),
    }
}

/// The table at the head of [`network`](super): names, dtypes and shapes of what a session binds. Assumes [`verify`].
pub fn verify_interface(network: &Network) -> Result<(), VerifyError> {
    let profile = network.profile;
    let batch = Dim::from(profile.batch);
    let tokens = match profile.tokens {
        Tokens::Static(n) => Dim::from(n),
        Tokens::Dynamic { .. } => Dim::sym(Sym::tokens()),
    };
    let describe = |tensor: &Tensor| format!("{:?} {}{:?}", tensor.name, tensor.dtype, tensor.shape);
    let missing = |wanted: String, ids: &[TensorId]| {
        let names = ids.iter().map(|id| describe(network.tensor(*id)));
        let found = names.collect::<Vec<_>>().join(", ");
        VerifyError::Interface { wanted, found }
    };
    let need = |ids: &[TensorId], name: &str, dtype: DType, shape: &[Dim]| {
        let found = ids.iter().map(|id| network.tensor(*id)).find(|t| t.name == name);
        match found {
            Some(tensor) if tensor.dtype == dtype && tensor.shape == shape => Ok(()),
            _ => Err(missing(format!("{name:?} {dtype}{shape:?}"), ids)),
        }
    };
    let row = [batch.clone(), tokens.clone()];
    need(&network.inputs, "input_ids", DType::I32, &row)?;
    need(&network.inputs, "position_ids", DType::I32, &row)?;
    need(&network.inputs, "write_indices", DType::I32, &row[..1])?;
    let mut inputs = 3;
    if profile.logits == Logits::Rows {
        need(&network.inputs, "logit_rows", DType::I32, &row[..1])?;
        inputs += 1;
    }
    let Some(logits) = network.outputs.first().map(|id| network.tensor(*id)) else {
        return Err(VerifyError::NoOutput);
    };
    let rows = match profile.logits {
        Logits::All => tokens,
        Logits::Rows => Dim::from(1usize),
    };
    let vocabulary = logits.shape.last().cloned().unwrap_or_default();
    need(
        &network.outputs[..1],
        "logits",
        DType::F32,
        &[batch.clone(), rows, vocabulary],
    )?;

    let caches = network.inputs.len().saturating_sub(inputs);
    if caches % 2 != 0 || network.outputs.len() != caches + 1 {
        let wanted = format!("a key and a value cache for each layer and {} outputs", caches + 1);
        let found = format!("{caches} caches and {} outputs", network.outputs.len());
        return Err(VerifyError::Interface { wanted, found });
    }
    for i in 0..caches / 2 {
        for part in ["key", "value"] {
            let name = format!("{part}_cache.{i}");
            let Some(cache) = network.find(&name).filter(|id| network.inputs.contains(id)) else {
                return Err(missing(format!("the input {name:?}"), &network.inputs));
            };
            let cache = network.tensor(cache);
            let [b, _, slots, _] = &cache.shape[..] else {
                return Err(missing(format!("{name:?} of rank 4"), &network.inputs));
            };
            if *b != batch || *slots != Dim::from(profile.capacity) || !cache.dtype.is_float() {
                let wanted = format!("{name:?} float[{batch}, kv_heads, {}, head_dim]", profile.capacity);
                return Err(missing(wanted, &network.inputs));
            }
            need(&network.outputs, &format!("updated_{name}"), cache.dtype, &cache.shape)?;
        }
    }
    Ok(())
}
