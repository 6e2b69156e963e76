//! LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter changes matrices by a product of two thin ones: `W' = W + scale · B A`, with `A` `[rank, in]` and `B`
//! `[out, rank]`, `scale = alpha / rank`, or `alpha / √rank` where it is rank-stabilised
//! (<https://huggingface.co/docs/peft/package_reference/lora>). The sum is made in fp32, one matrix at a time, when the
//! weight is written.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::checkpoint::{CONVENTIONS, has_gate};
use super::source::{SourceError, safetensors};
use crate::graph::Constant;

/// The file that describes an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// The file of its matrices.
pub const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of the base model's own names.
const PREFIX: &str = "base_model.model.";

/// An opened adapter.
pub struct Adapter {
    /// By the base model's name of the layer, `model.layers.0.self_attn.q_proj`.
    changes: BTreeMap<String, Change>,
}

/// The change of one matrix.
#[derive(Clone)]
pub struct Change {
    /// `[rank, in]`.
    a: Constant,
    /// `[out, rank]`.
    b: Constant,
    scale: f64,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Adapter {
    /// Opens an adapter's folder.
    pub fn open(folder: &Path) -> Result<Adapter, SourceError> {
        let path = folder.join(CONFIG);
        let io = |source| SourceError::Io {
            path: path.clone(),
            source,
        };
        let invalid = |message: String| SourceError::invalid(&path, message);
        let text = fs::read_to_string(&path).map_err(io)?;
        let config: Config =
            serde_json::from_str(&text).map_err(|e| invalid(format!("is not a valid PEFT configuration: {e}")))?;
        if let Some(kind) = config.peft_type.as_deref().filter(|kind| *kind != "LORA") {
            return Err(invalid(format!("is an adapter of type {kind}")).with_help("only LORA can be merged"));
        }
        if config.use_dora {
            return Err(invalid("is a DoRA adapter, which also rescales the weights".into())
                .with_help("merge it with PEFT's merge_and_unload first"));
        }
        if config.r == 0 {
            return Err(invalid("has rank 0".into()));
        }
        let file = folder.join(TENSORS);
        let tensors = safetensors(&file)?;
        let invalid = |message: String| SourceError::invalid(&file, message);
        let mut halves: BTreeMap<String, [Option<Constant>; 2]> = BTreeMap::new();
        for (name, constant) in tensors {
            let short = name.strip_prefix(PREFIX).unwrap_or(&name);
            let half = [".lora_A.", ".lora_B."].iter().position(|h| short.contains(h));
            let (Some(half), true) = (half, short.ends_with(".weight")) else {
                return Err(invalid(format!("{name:?} is not a matrix of a LoRA adapter"))
                    .with_help("merge this adapter with PEFT's merge_and_unload first"));
            };
            let layer = short.split(".lora_").next().expect("split gives one");
            halves.entry(layer.to_string()).or_default()[half] = Some(constant);
        }
        let mut changes = BTreeMap::new();
        for (layer, pair) in halves {
            let [Some(a), Some(b)] = pair else {
                return Err(invalid(format!("{layer:?} has only one of lora_A and lora_B")));
            };
            let (rank, alpha) = config.of(&layer);
            let fits = matches!((a.shape(), b.shape()), ([ra, _], [_, rb]) if *ra == rank && *rb == rank);
            if !fits {
                return Err(invalid(format!(
                    "{layer:?} has lora_A {:?} and lora_B {:?}, which do not have the rank {rank} of the configuration",
                    a.shape(),
                    b.shape()
                )));
            }
            let scale = match config.use_rslora {
                true => alpha / (rank as f64).sqrt(),
                false => alpha / rank as f64,
            };
            changes.insert(layer, Change { a, b, scale });
        }
        if changes.is_empty() {
            return Err(invalid("holds no tensors".into()));
        }
        Ok(Adapter { changes })
    }

    /// Layers it changes.
    pub fn targets(&self) -> Vec<String> {
        self.changes.keys().cloned().collect()
    }

    /// The change of a module such as `layers.0.attention.query.weight`, if there is one, with the layer's name.
    /// Modules that share a layer get their rows of it; `rows` says how many each has.
    pub fn change(&self, module: &str, rows: &HashMap<String, usize>) -> Option<(String, Change)> {
        let places = CONVENTIONS.iter().flat_map(|c| c.places(module, has_gate(rows)));
        places.into_iter().find_map(|place| {
            let layer = place.names.iter().find_map(|name| {
                let layer = name.strip_suffix(".weight")?;
                self.changes.contains_key(layer).then(|| layer.to_string())
            })?;
            let change = self.changes[&layer].clone();
            let b = place.part(module, change.b, rows)?;
            Some((layer, Change { b, ..change }))
        })
    }

    /// The change of a checkpoint's tensor, if there is one, with the layer's name.
    pub fn change_of(&self, tensor: &str) -> Option<(String, Change)> {
        let layer = tensor.strip_suffix(".weight")?;
        let (layer, change) = self.changes.get_key_value(layer)?;
        Some((layer.clone(), change.clone()))
    }
}

impl Config {
    /// Rank and alpha of a layer: those of the first pattern that its name ends in, or the adapter's own.
    fn of(&self, layer: &str) -> (usize, f64) {
        let ends = |pattern: &str| {
            let pattern = pattern
                .trim_start_matches('^')
                .trim_end_matches('$')
                .replace("\\.", ".");
            layer == pattern || layer.ends_with(&format!(".{pattern}"))
        };
        let rank = self
            .rank_pattern
            .iter()
            .find(|(p, _)| ends(p))
            .map_or(self.r, |(_, r)| *r);
        let alpha = self.alpha_pattern.iter().find(|(p, _)| ends(p));
        (rank, alpha.map_or(self.lora_alpha, |(_, a)| *a))
    }
}

impl Change {
    /// The matrix `[out, in]` with the change, in fp32.
    pub fn merged(&self, weight: &Constant) -> Constant {
        weight.plus_product(&self.b, &self.a, self.scale)
    }

    /// Of the matrix it changes.
    pub fn shape(&self) -> [usize; 2] {
        [self.b.shape()[0], self.a.shape()[1]]
    }
}
