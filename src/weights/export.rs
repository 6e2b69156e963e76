//! Weights of a model as a checkpoint of another program: `model.safetensors` under Hugging Face's names, or
//! TensorRT-LLM's `config.json` and `rank0.safetensors`. It has all weights, or nothing is written.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::checkpoint::{Convention, GPT_J, GPT2, HUGGING_FACE_OUTPUT_NORMS, LLAMA, TENSORRT_LLM, has_gate};
use super::form::Form;
use super::inverse::{Irreversible, undone};
use super::model::{ModelWeight, ModelWeights, holds_the_same};
use super::modules::is_norm_factor;
use super::norm_parameter::NormParameter;
use super::recipe::Recipe;
use super::{WriteError, tensorrt_llm, write};
use crate::graph::{Constant, Graph};
use crate::help::Help;
use crate::passes::Architecture;

/// The format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Llama and similar models, also Gemma and OLMo 2.
    HuggingFace,
    /// Hugging Face's GPT-2.
    Gpt2,
    /// One rank for TensorRT-LLM, with its `config.json`.
    TensorRtLlm,
}

/// A checkpoint that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The tensors cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Weights or modules without a name in the convention.
    #[error("{convention} has no name for {}", names.join(", "))]
    NoName {
        /// Its name.
        convention: &'static str,
        /// Modules, or weights without a module.
        names: Vec<String>,
    },
    /// A weight that holds a module in a form that cannot be inverted.
    #[error("{weight:?} cannot be written as {}: {why}", modules.join(", "))]
    Irreversible {
        /// In the package.
        weight: String,
        /// Its modules.
        modules: Vec<String>,
        /// Why.
        why: Irreversible,
    },
    /// Two weights are the same module but have different values.
    #[error("{} are all {module} and have different values", weights.join(", "))]
    Ambiguous {
        /// The module.
        module: String,
        /// In the package.
        weights: Vec<String>,
    },
    /// Norms of a model whose checkpoints may store their factor minus 1.
    #[error("whether a checkpoint of this model holds a norm's factor or the factor minus 1 is not known")]
    UnknownNorms,
    /// Quantized weights, for a format with a different quantization.
    #[error("{name:?} is quantized ({form}), and a checkpoint for TensorRT-LLM is written of floats alone")]
    Quantized {
        /// Name of the weight.
        name: String,
        /// Its form.
        form: Form,
    },
    /// Computations of the graph that the format's models lack.
    #[error("TensorRT-LLM has no model for this graph: {}", reasons.join("; "))]
    NoArchitecture {
        /// All reasons.
        reasons: Vec<String>,
    },
    /// No weight of the graph has a known module.
    #[error("the modules of this model are not known, so they cannot be named")]
    NoModules,
}

impl Help for ExportError {
    fn help(&self) -> Option<String> {
        match self {
            ExportError::Write(error) => error.help(),
            ExportError::NoName { .. } => Some(
                "refit the package once from the checkpoint that it was made from: names of weights are learned from \
                 their numbers"
                    .to_string(),
            ),
            ExportError::Quantized { .. } => {
                Some("export the package of the model that is not quantized, and quantize it there".to_string())
            }
            ExportError::UnknownNorms => Some(
                "convert with the model's config.json beside the export, or refit once from a checkpoint with one"
                    .to_string(),
            ),
            _ => None,
        }
    }
}

/// Writes a checkpoint into `folder`, which is created if necessary and must not contain files with the same names.
/// `norms`: how Hugging Face's checkpoints of this model store norms, if known. Returns the number of tensors.
pub fn export(
    model: &ModelWeights,
    graph: &Graph,
    architecture: &Architecture,
    norms: Option<NormParameter>,
    format: Format,
    folder: &Path,
) -> Result<usize, ExportError> {
    if format == Format::TensorRtLlm
        && let Some((weight, form)) = model.iter().find_map(|w| Some((w, Form::of(&w.constant)?)))
    {
        let name = weight.name.clone();
        return Err(ExportError::Quantized { name, form });
    }
    let modules = modules(model, format, norms)?;
    let tensors = named(&modules, format)?;
    let config = match format {
        Format::TensorRtLlm => {
            let config = tensorrt_llm::config(graph, architecture, &modules.0);
            Some(config.map_err(|reasons| ExportError::NoArchitecture { reasons })?)
        }
        Format::HuggingFace | Format::Gpt2 => None,
    };
    fs::create_dir_all(folder).map_err(|source| ExportError::Io {
        path: folder.to_path_buf(),
        source,
    })?;
    let file = match format {
        Format::TensorRtLlm => "rank0.safetensors",
        Format::HuggingFace | Format::Gpt2 => "model.safetensors",
    };
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write(&folder.join(file), &tensors, &metadata, &mut |_, _, _| Ok(()), |_| {})?;
    if let Some(config) = config {
        let path = folder.join("config.json");
        let mut text = serde_json::to_string_pretty(&config).expect("plain data");
        text.push('\n');
        fs::write(&path, text).map_err(|source| ExportError::Io { path, source })?;
    }
    Ok(tensors.len())
}

/// A format's names for the modules of a model.
fn convention(format: Format, modules: &HashMap<String, Constant>) -> &'static Convention {
    let output_norm = |name: &String| name.ends_with("output_norm.weight");
    match format {
        Format::HuggingFace if modules.keys().any(output_norm) => &HUGGING_FACE_OUTPUT_NORMS,
        Format::HuggingFace if is_gpt_j(modules) => &GPT_J,
        Format::HuggingFace => &LLAMA,
        Format::Gpt2 => &GPT2,
        Format::TensorRtLlm => &TENSORRT_LLM,
    }
}

/// Norms with biases, no learned positions, and no norm before the feed-forward block: it shares the attention's.
pub(super) fn is_gpt_j(modules: &HashMap<String, Constant>) -> bool {
    let has = |name: &str| modules.contains_key(name);
    has("layers.0.attention_norm.bias")
        && has("layers.0.feed_forward.up.weight")
        && !has("layers.0.feed_forward_norm.weight")
        && !has("positions.weight")
}

/// Every tensor of a checkpoint, built from the model's modules, by name.
pub fn tensors(
    model: &ModelWeights,
    norms: Option<NormParameter>,
    format: Format,
) -> Result<Vec<(String, Constant)>, ExportError> {
    named(&modules(model, format, norms)?, format)
}

fn named((modules, learned): &Modules, format: Format) -> Result<Vec<(String, Constant)>, ExportError> {
    let mut tensors = learned.clone();
    let convention = convention(format, modules);
    let mut unnamed = Vec::new();
    for module in modules.keys() {
        let places = convention.places(module, has_gate(modules));
        // A fused tensor only if all its parts exist and there are no separate tensors.
        let place = places
            .iter()
            .find(|p| p.modules.iter().all(|m| modules.contains_key(m)));
        let Some(place) = place else {
            unnamed.push(module.clone());
            continue;
        };
        let parts: Vec<Constant> = place.modules.iter().map(|m| modules[m].clone()).collect();
        let whole = match &parts[..] {
            [one] => one.clone(),
            several => Constant::concat(several, 0),
        };
        let transposed = place.transposed && whole.shape().len() == 2;
        tensors.insert(
            place.names[0].clone(),
            if transposed { whole.transposed(&[1, 0]) } else { whole },
        );
    }
    unnamed.sort();
    match (modules.is_empty(), unnamed.is_empty()) {
        (true, _) => Err(ExportError::NoModules),
        (false, false) => Err(ExportError::NoName {
            convention: convention.name,
            names: unnamed,
        }),
        (false, true) => Ok(tensors.into_iter().collect()),
    }
}

/// The modules of all weights, and tensors that have only a learned name.
type Modules = (HashMap<String, Constant>, BTreeMap<String, Constant>);

fn modules(model: &ModelWeights, format: Format, norms: Option<NormParameter>) -> Result<Modules, ExportError> {
    let mut modules: HashMap<String, Constant> = HashMap::new();
    let mut learned = BTreeMap::new();
    let mut unnamed = Vec::new();
    for weight in model.iter() {
        // Names are learned only from Hugging Face's checkpoints.
        let recipe = match (&weight.modules, &weight.learned) {
            (Some(recipe), _) => recipe,
            (None, Some(recipe)) if format != Format::TensorRtLlm => recipe,
            _ => {
                unnamed.push(weight.name.clone());
                continue;
            }
        };
        for (name, part) in parts(weight, recipe, model, format, norms)? {
            if weight.modules.is_none() {
                learned.insert(name, part);
            } else if let Some(first) = modules.get(&name) {
                if !holds_the_same(first, &part) {
                    let of_module = |w: &&ModelWeight| {
                        let leaves = w.modules.iter().flat_map(|m| m.leaves());
                        leaves.into_iter().any(|leaf| leaf.name == name)
                    };
                    return Err(ExportError::Ambiguous {
                        weights: model.iter().filter(of_module).map(|w| w.name.clone()).collect(),
                        module: name,
                    });
                }
            } else {
                modules.insert(name, part);
            }
        }
    }
    match unnamed.is_empty() {
        true => Ok((modules, learned)),
        false => Err(ExportError::NoName {
            convention: convention(format, &modules).name,
            names: unnamed,
        }),
    }
}

/// The modules of a weight, in the form of checkpoints.
fn parts(
    weight: &ModelWeight,
    recipe: &Recipe,
    model: &ModelWeights,
    format: Format,
    norms: Option<NormParameter>,
) -> Result<Vec<(String, Constant)>, ExportError> {
    let failed = |why| ExportError::Irreversible {
        weight: weight.name.clone(),
        modules: recipe.leaves().iter().map(|leaf| leaf.name.to_string()).collect(),
        why,
    };
    let leaves = recipe.leaves();
    if let [factor] = leaves[..]
        && is_norm_factor(recipe)
        && format != Format::HuggingFace
    {
        // Other programs' models multiply by the factor itself.
        return Ok(vec![(factor.name.to_string(), weight.constant.clone())]);
    }
    let shown = recipe.take_apart(&weight.constant).map_err(failed)?;
    if !is_norm_factor(recipe) || recipe.is_arithmetic() {
        return Ok(shown);
    }
    match norms {
        Some(NormParameter::Factor) => Ok(shown),
        None if !model.scales_embeddings => Ok(shown),
        None => Err(ExportError::UnknownNorms),
        Some(NormParameter::FactorMinusOne) => {
            let minus_one = |(name, factor): (String, Constant)| {
                let held = undone(&factor, |c| c.offset(-1.0), |c| c.offset(1.0)).map_err(failed)?;
                Ok((name, held))
            };
            shown.into_iter().map(minus_one).collect()
        }
    }
}
