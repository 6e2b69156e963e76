//! The rules of a whole [`Network`]. `builder` checks them when it finishes, `package` when it reads a network, the back
//! ends before they use one.
//!
//! [`verify`] is for any network, [`verify_interface`](super::verify_interface) for one that a decoder session can run.

use std::collections::HashSet;

use crate::dim::{Dim, Sym};
use crate::interface::InterfaceErrors;

use super::builder::LayerError;
use super::infer::infer;
use super::{LayerKind, Network, Tensor, TensorId, Tokens};

/// The first violated rule of a network: a bug of the code that built the network.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum VerifyError {
    #[error(transparent)]
    Layer(#[from] Box<LayerError>),
    #[error("layer {layer:?} reads or writes tensor number {id}, but the network has {count}")]
    NoTensor { layer: String, id: u32, count: usize },
    #[error("layer {layer:?} reads {tensor:?} before anything computes it")]
    Order { layer: String, tensor: String },
    #[error("layer {layer:?} computes {tensor:?}, which is an input or was computed before")]
    Twice { layer: String, tensor: String },
    #[error("layer {layer:?} has {count} outputs, not {expected}")]
    Outputs {
        layer: String,
        expected: usize,
        count: usize,
    },
    #[error("{what} {name:?} occurs twice")]
    Name { what: &'static str, name: String },
    #[error("layer {layer:?}, tensor {tensor:?}: declared {stated}, inferred {inferred}")]
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
    #[error("layer {layer:?} writes the cache {cache:?} into itself: the updated cache must be a different tensor")]
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
    #[error(
        "the network has no interface that defines its inputs {inputs} and outputs {outputs}; lower a graph with an interface"
    )]
    NoInterface { inputs: String, outputs: String },
    #[error("a session cannot bind the network: {0}")]
    Ports(InterfaceErrors),
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
        let count = layer.outputs.len();
        if count != layer.kind.output_count() {
            let (layer, expected) = (layer.name.clone(), layer.kind.output_count());
            return Err(VerifyError::Outputs { layer, expected, count });
        }
        for output in &layer.outputs {
            if std::mem::replace(&mut defined[output.0 as usize], true) {
                let (layer, tensor) = (layer.name.clone(), name(output));
                return Err(VerifyError::Twice { layer, tensor });
            }
        }
        let inputs: Vec<&Tensor> = layer.inputs.iter().map(|id| network.tensor(*id)).collect();
        let stated: Vec<&Tensor> = layer.outputs.iter().map(|id| network.tensor(*id)).collect();
        let inferred = infer(&layer.kind, &inputs, &network.weights, Some(stated[0].dtype)).map_err(|fault| {
            Box::new(LayerError {
                layer: layer.name.clone(),
                kind: layer.kind.name(),
                inputs: inputs.into_iter().cloned().collect(),
                fault,
            })
        })?;
        for (stated, inferred) in stated.into_iter().zip(inferred) {
            if (stated.dtype, &stated.shape) != (inferred.0, &inferred.1) {
                return Err(VerifyError::Stated {
                    layer: layer.name.clone(),
                    tensor: stated.name.clone(),
                    stated: format!("{}{:?}", stated.dtype, stated.shape),
                    inferred: format!("{}{:?}", inferred.0, inferred.1),
                });
            }
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
    for (layer, cache, output) in network.cache_updates() {
        // Rows of the update are copied over rows of the cache; in one tensor they would overlap.
        if layer.inputs.iter().filter(|input| **input == cache).count() > 1 {
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
