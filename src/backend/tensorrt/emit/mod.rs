//! Writes a [`Network`] into TensorRT's network definition, layer by layer, and checks each layer.
//!
//! `layers` has one arm per layer kind, `shapes` the extents that depend on `tokens`, `constants` weights and small tables;
//! `constant_folding` prevents folding. This file owns the order, the names, and the comparison of the types that TensorRT infers
//! with those that the network declares.

mod constant_folding;
mod constants;
mod layers;
mod shapes;

use std::collections::HashMap;

use trtx::DataType;
use trtx::network::NetworkDefinition;

use super::builder::Refits;
use super::error::{EngineBuildError, LayerContext};
use super::library::Version;
use super::log_capture::LogCapture;
use crate::dim::Dim;
use crate::network::{Layer, LayerKind, Network, Tensor, TensorId, Tokens, WeightId};
use crate::tensor::{self, DType};

pub(super) use shapes::at_tokens;

/// Adds every input, layer and output of `network` to `definition`. `weights` holds the bytes of the weights that become
/// constants; they and the network must outlive the build, because TensorRT keeps pointers to their bytes.
pub(super) fn emit<'b>(
    network: &'b Network,
    definition: &mut NetworkDefinition<'b>,
    weights: &'b [Option<tensor::Tensor>],
    refits: Refits,
    capture: &LogCapture,
    version: Version,
) -> Result<(), EngineBuildError> {
    let mut emitter = Emitter {
        network,
        definition,
        weights,
        refits,
        handles: vec![None; network.tensors.len()],
        bound: HashMap::new(),
        tokens: None,
    };
    let faulty = |layer: LayerContext, fault: EmitError| match fault {
        EmitError::TensorRt(error) => EngineBuildError::Layer {
            version,
            layer: layer.into(),
            message: capture.take_errors().unwrap_or_else(|| error.to_string()),
        },
        EmitError::Malformed(reason) => EngineBuildError::Malformed {
            network: network.name.clone(),
            layer: layer.name,
            reason,
        },
    };
    // Some calls of the binding report success while TensorRT only logs that it refused, so the log is checked each
    // time.
    let heard = |layer: &LayerContext| match capture.take_errors() {
        Some(message) => Err(EngineBuildError::Layer {
            version,
            layer: layer.clone().into(),
            message,
        }),
        None => Ok(()),
    };

    for id in &network.inputs {
        let context = io_context(network, "Input", *id);
        emitter.input(*id).map_err(|fault| faulty(context.clone(), fault))?;
        heard(&context)?;
    }
    for layer in &network.layers {
        let context = || layer_context(network, layer);
        let output = emitter.layer(layer).map_err(|fault| faulty(context(), fault))?;
        let [id] = layer.outputs[..] else {
            let reason = format!("it has {} outputs, every layer has one", layer.outputs.len());
            return Err(faulty(context(), EmitError::Malformed(reason)));
        };
        let declared = network.tensors.get(id.0 as usize).ok_or_else(|| {
            let reason = format!("its output is tensor {} of {}", id.0, network.tensors.len());
            faulty(context(), EmitError::Malformed(reason))
        })?;
        let inferred = Inferred::of(emitter.definition, &output);
        if let Some(message) = capture.take_errors() {
            return Err(EngineBuildError::Layer {
                version,
                layer: context().into(),
                message,
            });
        }
        if let Some(inferred) = inferred.filter(|inferred| !inferred.agrees_with(declared, &network.profile.tokens)) {
            return Err(EngineBuildError::Inference {
                layer: context().into(),
                tensor: declared.name.clone(),
                inferred: inferred.to_string(),
                declared: typed_shape(declared.dtype, &declared.shape),
            });
        }
        emitter.handles[id.0 as usize] = Some(output);
    }
    for id in &network.outputs {
        let context = io_context(network, "Output", *id);
        let handle = emitter.handle(*id).map_err(|fault| faulty(context.clone(), fault))?;
        emitter.definition.mark_output(&handle);
        heard(&context)?;
    }
    Ok(())
}

/// Why a layer cannot be added to the definition.
enum EmitError {
    TensorRt(trtx::Error),
    Malformed(String),
}

impl From<trtx::Error> for EmitError {
    fn from(error: trtx::Error) -> Self {
        EmitError::TensorRt(error)
    }
}

type Handle<'b> = trtx::Tensor<'b>;
type Emitted<'b> = Result<Handle<'b>, EmitError>;

struct Emitter<'b, 'd> {
    network: &'b Network,
    definition: &'d mut NetworkDefinition<'b>,
    weights: &'b [Option<tensor::Tensor>],
    refits: Refits,
    /// TensorRT's tensor for each network tensor written so far.
    handles: Vec<Option<Handle<'b>>>,
    /// The input of each bound weight, which several layers may read.
    bound: HashMap<WeightId, Handle<'b>>,
    /// The number of tokens as a shape tensor `[1]` i64, created when first needed.
    tokens: Option<Handle<'b>>,
}

impl<'b> Emitter<'b, '_> {
    fn input(&mut self, id: TensorId) -> Result<(), EmitError> {
        let tensor = self.declared(id)?;
        let handle = self.definition.add_input(
            &tensor.name,
            data_type(tensor.dtype)?,
            &shapes::runtime_dims(&tensor.shape),
        )?;
        for (axis, dim) in tensor.shape.iter().enumerate() {
            if dim.as_const().is_none() {
                // Equal names mean equal extents, which lets TensorRT fold what depends on them.
                handle.set_dimension_name(self.definition, axis as i32, &dim.to_string())?;
            }
        }
        self.handles[id.0 as usize] = Some(handle);
        Ok(())
    }

    /// Adds the layer and returns its output, with the network's name.
    fn layer(&mut self, layer: &'b Layer) -> Emitted<'b> {
        let output = layers::emit(self, layer)?;
        // A bound weight has the weight's name, at load and in the manifest.
        let is_input = output.is_network_input(self.definition);
        if let (false, Some(id)) = (is_input, layer.outputs.first()) {
            let name = &self.declared(*id)?.name;
            output.set_name(self.definition, name)?;
        }
        Ok(output)
    }

    fn declared(&self, id: TensorId) -> Result<&'b Tensor, EmitError> {
        let network = self.network;
        network
            .tensors
            .get(id.0 as usize)
            .ok_or_else(|| EmitError::Malformed(format!("there is no tensor {} among {}", id.0, network.tensors.len())))
    }

    fn handle(&self, id: TensorId) -> Emitted<'b> {
        let tensor = self.declared(id)?;
        self.handles[id.0 as usize].ok_or_else(|| {
            EmitError::Malformed(format!(
                "the tensor {:?} is used before any layer gives it",
                tensor.name
            ))
        })
    }
}

/// What TensorRT reports about a tensor.
struct Inferred {
    data_type: DataType,
    /// -1 if it depends on the call.
    dims: Vec<i64>,
}

impl Inferred {
    /// `None` if the binding cannot tell (rank 8) or TensorRT failed, which its log then reports.
    fn of(definition: &NetworkDefinition<'_>, handle: &Handle<'_>) -> Option<Self> {
        Some(Inferred {
            data_type: handle.data_type(definition),
            dims: handle.dimensions(definition).ok()?,
        })
    }

    fn agrees_with(&self, declared: &Tensor, tokens: &Tokens) -> bool {
        let same_dim = |(inferred, declared): (&i64, &Dim)| match (inferred, declared.as_const()) {
            (inferred, Some(declared)) if *inferred == declared => true,
            // TensorRT does not fold everything it could.
            (-1, _) => matches!(tokens, Tokens::Dynamic { .. }),
            _ => false,
        };
        data_type(declared.dtype).is_ok_and(|declared| declared == self.data_type)
            && self.dims.len() == declared.shape.len()
            && self.dims.iter().zip(&declared.shape).all(same_dim)
    }
}

impl std::fmt::Display for Inferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{:?}", self.data_type, self.dims)
    }
}

fn data_type(dtype: DType) -> Result<DataType, EmitError> {
    Ok(match dtype {
        DType::Bool => DataType::kBOOL,
        DType::U8 => DataType::kUINT8,
        DType::I8 => DataType::kINT8,
        DType::I32 => DataType::kINT32,
        DType::I64 => DataType::kINT64,
        DType::I4 => DataType::kINT4,
        DType::F8E4M3Fn => DataType::kFP8,
        DType::F16 => DataType::kHALF,
        DType::Bf16 => DataType::kBF16,
        DType::F32 => DataType::kFLOAT,
        other => {
            return Err(EmitError::Malformed(format!("TensorRT computes with no {other}")));
        }
    })
}

fn layer_context(network: &Network, layer: &Layer) -> LayerContext {
    let kind = layer.kind.name();
    let operation = match &layer.kind {
        LayerKind::Elementwise(op) => format!("{kind} {op:?}"),
        LayerKind::Unary(op) => format!("{kind} {op:?}"),
        LayerKind::Activation(op) => format!("{kind} {op:?}"),
        _ => kind.to_string(),
    };
    let mut inputs = described(network, &layer.inputs);
    if let LayerKind::Weight(id) = &layer.kind
        && let Some(weight) = network.weights.get(id.0 as usize)
    {
        inputs.push(format!("weight {:?}: {:?}", weight.name, weight.constant));
    }
    LayerContext {
        name: layer.name.clone(),
        kind: operation,
        inputs,
        outputs: described(network, &layer.outputs),
    }
}

fn io_context(network: &Network, kind: &str, id: TensorId) -> LayerContext {
    let name = network.tensors.get(id.0 as usize).map(|tensor| tensor.name.clone());
    LayerContext {
        name: name.unwrap_or_default(),
        kind: kind.to_string(),
        inputs: Vec::new(),
        outputs: described(network, &[id]),
    }
}

fn described(network: &Network, ids: &[TensorId]) -> Vec<String> {
    ids.iter()
        .map(|id| match network.tensors.get(id.0 as usize) {
            Some(tensor) => format!("{}: {}", tensor.name, typed_shape(tensor.dtype, &tensor.shape)),
            None => format!("tensor {}", id.0),
        })
        .collect()
}

/// `f16[1, tokens, 64]`.
fn typed_shape(dtype: DType, shape: &[Dim]) -> String {
    format!("{dtype}{shape:?}")
}

/// A description of the layer that TensorRT's message names, appended to Lapidary's message; empty if it names none.
pub(super) fn hint(network: &Network, message: &str) -> String {
    let named = network.layers.iter().filter(|layer| names(message, &layer.name));
    // Between `attn` and `attn/scale`, the longer one is meant.
    match named.max_by_key(|layer| layer.name.len()) {
        Some(layer) => format!("\nin layer {}", layer_context(network, layer)),
        None => String::new(),
    }
}

/// Whether the text contains the name as a whole word, not as a part of a longer name.
fn names(text: &str, name: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '/');
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let mut after = text[at + name.len()..].chars();
            // A period ends a sentence unless the name continues after it.
            let goes_on = match after.next() {
                Some('.') => after.next().is_some_and(in_name),
                next => next.is_some_and(in_name),
            };
            !before.is_some_and(in_name) && !goes_on
        })
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_layer_is_named_only_by_its_whole_name() {
        assert!(names("Error (tail: out of bounds slice)", "tail"));
        assert!(names(
            "cannot compute node layers.0.q_proj. In validate",
            "layers.0.q_proj"
        ));
        assert!(!names("layers.0.q_proj/scale: no", "layers.0.q_proj"));
        assert!(!names("it is assumed", "sum"));
        assert!(!names("anything", ""));
    }
}
