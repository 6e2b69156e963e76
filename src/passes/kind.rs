//! The kind of a model that is not a decoder with a cache of keys and values, for the message that refuses it.
//!
//! Input: an export as it was read, with the known roles of its inputs. Returns its [`ModelKind`] if models of that
//! kind cannot be converted, whatever their operators. Inputs and outputs are identified by shape and use; only inputs
//! from an encoder are identified by name.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::roles::{self, InputRole};
use crate::dim::Dim;
use crate::graph::op::Op;
use crate::graph::{Graph, ValueId, infer};
use crate::tensor::DType;

/// A kind of model that cannot be converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// The decoder of an encoder–decoder model.
    EncoderDecoder {
        /// Inputs that come from the encoder.
        inputs: Vec<String>,
    },
    /// Some or all layers have a state of fixed size.
    States {
        /// Inputs with states, with their shapes and readers.
        states: Vec<String>,
        /// Whether other layers are attention with a cache.
        hybrid: bool,
    },
    /// It returns logits of a vocabulary for every token, and takes no past keys and values.
    NoCache,
    /// It returns hidden states of every token.
    HiddenStates {
        /// The output.
        output: String,
    },
    /// It returns one row per sequence: a class, a score, an embedding of the text.
    OneRow {
        /// The output.
        output: String,
    },
    /// It takes neither token ids nor embeddings.
    NoTokens {
        /// Its inputs.
        inputs: Vec<String>,
    },
}

impl ModelKind {
    /// For scripts.
    pub fn name(&self) -> &'static str {
        match self {
            ModelKind::EncoderDecoder { .. } => "encoder_decoder",
            ModelKind::States { hybrid: true, .. } => "hybrid",
            ModelKind::States { hybrid: false, .. } => "state_space",
            ModelKind::NoCache => "no_cache",
            ModelKind::HiddenStates { .. } => "encoder",
            ModelKind::OneRow { .. } => "classifier_or_embedding",
            ModelKind::NoTokens { .. } => "no_tokens",
        }
    }

    /// What to use or export instead.
    pub fn help(&self) -> String {
        const EXPORT: &str = "`optimum-cli export onnx --model MODEL --task text-generation-with-past OUT`, `python -m \
                              onnxruntime_genai.models.builder -m MODEL -o OUT -p fp16 -e cpu`, or torch.onnx.export with \
                              past_key_values among inputs and outputs (docs/guides/exporting.md)";
        match self {
            ModelKind::EncoderDecoder { .. } => {
                "run it in ONNX Runtime, as with optimum's ORTModelForSeq2SeqLM; decoder-only models are converted, \
                such as Llama, Qwen3, Gemma 3 or GPT-2"
                    .to_string()
            }
            ModelKind::States { .. } => {
                "run it in ONNX Runtime (onnxruntime-genai) or transformers; models with only attention layers are \
                converted, such as Llama, Qwen3, Gemma 3 or Granite 3"
                    .to_string()
            }
            ModelKind::NoCache => format!("export it with its cache (a task ending in -with-past): {EXPORT}"),
            ModelKind::HiddenStates { .. } | ModelKind::OneRow { .. } => format!(
                "run it in ONNX Runtime; if its checkpoint is of a model that generates text, export that: {EXPORT}"
            ),
            ModelKind::NoTokens { .. } => format!("give the export of the decoder: {EXPORT}"),
        }
    }
}

/// A sentence without its period.
impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelKind::EncoderDecoder { inputs } => write!(
                f,
                "this is the decoder of an encoder-decoder model: the inputs {} come from an encoder, and only \
                decoder-only models are converted",
                some(inputs)
            ),
            ModelKind::States { states, hybrid: true } => write!(
                f,
                "this is a hybrid of attention and of layers with states of fixed size, convolutions or linear attention: {}; \
                 sessions keep keys and values of each token, but no such states",
                some(states)
            ),
            ModelKind::States { states, hybrid: false } => write!(
                f,
                "this is a model of states of fixed size, as Mamba or RWKV: {}; sessions keep keys and values of each token, \
                 but no such states",
                some(states)
            ),
            ModelKind::NoCache => write!(
                f,
                "this is a language model exported without its cache, or one that has none, as a masked language model: the model \
                 takes no past keys and values"
            ),
            ModelKind::HiddenStates { output } => write!(
                f,
                "this is an encoder or an embedding model: the model takes no past keys and values, and its output {output} \
                 holds hidden states, not logits of a vocabulary"
            ),
            ModelKind::OneRow { output } => write!(
                f,
                "this is a classification or embedding model: the model takes no past keys and values, and its output \
                 {output} holds one row for each sequence"
            ),
            ModelKind::NoTokens { inputs } => write!(
                f,
                "this is not a text decoder but, for example, an encoder of images or sound: it takes neither token ids nor embeddings, \
                 but {}",
                some(inputs)
            ),
        }
    }
}

fn some(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let more = names.len().saturating_sub(SHOWN);
    let mut text = names[..names.len() - more].join(", ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    text
}

/// The kind of an export whose inputs have these roles; `None` if it may be a decoder with a cache.
pub fn of(graph: &Graph, of: &HashMap<ValueId, InputRole>) -> Option<ModelKind> {
    let read: Vec<ValueId> = graph
        .inputs
        .iter()
        .copied()
        .filter(|id| of.get(id) != Some(&InputRole::Unread))
        .collect();
    let name = |id: &ValueId| graph.value(*id).name.clone();
    let with = |role: InputRole| -> Vec<ValueId> {
        let inputs = read.iter().copied();
        inputs.filter(|id| of.get(id) == Some(&role)).collect()
    };
    let caches = with(InputRole::Cache);
    let uses = graph.uses();
    // Keys and values that are read but never appended to, while others are.
    let grows = |id: &ValueId| roles::grows(graph, *id, &uses);
    let free = |id: &ValueId| {
        graph
            .shape(*id)
            .is_some_and(|s| s.len() == 4 && s[2].as_const().is_none())
    };
    let growing = caches.iter().any(|id| grows(id) && free(id));
    let foreign = |id: &ValueId| {
        let of_encoder = graph.value(*id).name.to_lowercase().contains("encoder_")
            || graph.value(*id).name.to_lowercase().contains(".encoder.");
        of_encoder || (growing && caches.contains(id) && free(id) && !grows(id))
    };
    let inputs: Vec<String> = read.iter().filter(|id| foreign(id)).map(name).collect();
    if !inputs.is_empty() {
        return Some(ModelKind::EncoderDecoder { inputs });
    }
    let fixed = |id: &ValueId| {
        let shape = graph.shape(*id).map(Vec::as_slice).unwrap_or_default();
        shape.len() > 1 && shape[1..].iter().all(|dim| dim.as_const().is_some())
    };
    let stateful = graph.node_ids().any(|id| {
        let name = graph.node(id).op.name();
        ["Conv", "Scan", "Loop", "LinearAttention", "Mamba", "Rwkv", "Ssm"]
            .iter()
            .any(|part| name.contains(part))
    });
    let states: Vec<String> = caches
        .iter()
        .filter(|id| fixed(id) && (growing || stateful))
        .map(|id| described(graph, *id))
        .collect();
    if !states.is_empty() {
        return Some(ModelKind::States {
            states,
            hybrid: growing,
        });
    }
    let tokens = [with(InputRole::InputIds), with(InputRole::Embeddings)].concat();
    // Images have as many axes as a cache.
    let any_grows = caches.iter().any(grows);
    if !caches.is_empty() && (any_grows || !tokens.is_empty()) {
        return None;
    }
    if tokens.is_empty() {
        let floats = read
            .iter()
            .filter(|id| graph.value(**id).dtype.is_some_and(DType::is_float));
        let inputs: Vec<String> = floats.map(|id| described(graph, *id)).collect();
        return (!inputs.is_empty()).then_some(ModelKind::NoTokens { inputs });
    }
    Some(without_cache(graph, tokens[0]))
}

/// By the first float output: logits have more elements than an embedding.
fn without_cache(graph: &Graph, tokens: ValueId) -> ModelKind {
    let mut typed = graph.clone();
    let _ = infer(&mut typed);
    let floats = |id: &&ValueId| typed.value(**id).dtype.is_none_or(DType::is_float);
    let Some(output) = typed.outputs.iter().find(floats) else {
        return ModelKind::NoCache;
    };
    let Some(shape) = typed.shape(*output) else {
        return ModelKind::NoCache;
    };
    let text = described(&typed, *output);
    let uses = typed.uses();
    let readers = uses.get(&tokens).into_iter().flatten();
    let tables = readers.filter_map(|(node, _)| match typed.node(*node) {
        node if matches!(node.op, Op::Gather { .. }) => typed.shape(node.input(0)?)?.last()?.as_const(),
        _ => None,
    });
    let hidden = tables.max();
    match (shape.len(), shape.last().and_then(Dim::as_const)) {
        (0..=2, _) => ModelKind::OneRow { output: text },
        (_, width @ Some(_)) if width == hidden => ModelKind::HiddenStates { output: text },
        _ => ModelKind::NoCache,
    }
}

/// `past_key_values.0.conv_state [batch, 128, 3]`
fn described(graph: &Graph, id: ValueId) -> String {
    let value = graph.value(id);
    match &value.shape {
        Some(shape) => {
            let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
            format!("{} [{}]", value.name, dims.join(", "))
        }
        None => value.name.clone(),
    }
}

/// Values computed from the results of unknown operators.
pub fn behind_unknown(graph: &Graph) -> HashSet<ValueId> {
    let mut behind: HashSet<ValueId> = HashSet::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if matches!(node.op, Op::Unknown { .. }) || node.inputs.iter().flatten().any(|v| behind.contains(v)) {
            behind.extend(node.outputs.iter().flatten());
        }
    }
    behind
}
