//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter changes matrices by a product of two thin ones: `W' = W + scale · B A`, with `A` `[rank, in]` and `B`
//! `[out, rank]`, `scale = alpha / rank`, or `alpha / √rank` if it is rank-stabilized
//! (<https://huggingface.co/docs/peft/package_reference/lora>). A DoRA adapter (<https://arxiv.org/abs/2402.09353>)
//! then gives row `i` of `W'` the length `m_i`. All of it is computed in fp32, one matrix at a time, when the weight is
//! written.
//!
//! `config` reads the configuration and refuses other features, `pattern` handles its regular expressions.

mod config;
mod pattern;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use self::config::{Config, Refusal};
use super::checkpoint::{CONVENTIONS, has_gate};
use super::source::{SourceError, safetensors};
use crate::graph::Constant;

/// The file that describes an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// The file of its matrices.
pub const TENSORS: &str = "adapter_model.safetensors";
/// PEFT's prefix of the base model's names.
const PREFIX: &str = "base_model.model.";

/// An opened adapter.
pub struct Adapter {
    /// By the base model's name of the layer, `model.layers.0.self_attn.q_proj`.
    changes: BTreeMap<String, Change>,
    /// The base model stores these matrices as `[in, out]`.
    fan_in_fan_out: bool,
    requantizes: bool,
}

/// The change of one matrix.
#[derive(Clone)]
pub struct Change {
    /// `[rank, in]`.
    a: Constant,
    /// `[out, rank]`.
    b: Constant,
    scale: f64,
    /// `[out]`: the length of each row of the result.
    magnitude: Option<Constant>,
    /// The matrix to change is `[in, out]`.
    transposed: bool,
}

/// The tensors of a layer, in the order of [`PARTS`].
type Parts = [Option<Constant>; 3];

/// PEFT's names of a layer's tensors, and possible suffixes; `default` is the adapter's name in files not written by
/// `save_pretrained`.
const PARTS: [(&str, &[&str]); 3] = [
    (".lora_A", &[".weight", ".default.weight"]),
    (".lora_B", &[".weight", ".default.weight"]),
    (
        ".lora_magnitude_vector",
        &["", ".weight", ".default", ".default.weight"],
    ),
];

/// Data of VeLoRA's backward pass.
const BACKWARD: &str = ".lora_velora_embed";

impl Adapter {
    /// Opens an adapter's folder.
    pub fn open(folder: &Path) -> Result<Adapter, SourceError> {
        let config = config(&folder.join(CONFIG))?;
        let file = folder.join(TENSORS);
        let invalid = |message: String| SourceError::invalid(&file, message);
        let mut layers: BTreeMap<String, Parts> = BTreeMap::new();
        for (name, constant) in tensors(&file)? {
            let short = name.strip_prefix(PREFIX).unwrap_or(&name);
            if short.contains(BACKWARD) {
                continue;
            }
            let Some((layer, part)) = part(short) else {
                return Err(invalid(format!("{name:?} is not a matrix of a LoRA adapter"))
                    .with_help("merge this adapter with PEFT's merge_and_unload first"));
            };
            if !constant.dtype().is_float() {
                return Err(invalid(format!("{name:?} holds {}, not floats", constant.dtype())));
            }
            if layers.entry(layer.to_string()).or_default()[part]
                .replace(constant)
                .is_some()
            {
                return Err(invalid(format!("{layer:?} has two tensors for {:?}", PARTS[part].0)));
            }
        }
        let mut changes = BTreeMap::new();
        for (layer, parts) in layers {
            let change = change(&layer, parts, &config).map_err(invalid)?;
            changes.insert(layer, change);
        }
        if changes.is_empty() {
            return Err(invalid("holds no tensors".into()));
        }
        Ok(Adapter {
            changes,
            fan_in_fan_out: config.fan_in_fan_out,
            requantizes: false,
        })
    }

    /// Quantized weights that it changes are quantized again in the same format; otherwise they are refused, since the
    /// second rounding is as coarse as the first.
    pub fn requantizing(self, requantizes: bool) -> Adapter {
        Adapter { requantizes, ..self }
    }

    /// See [`Adapter::requantizing`].
    pub fn requantizes(&self) -> bool {
        self.requantizes
    }

    /// Layers it changes.
    pub fn targets(&self) -> Vec<String> {
        self.changes.keys().cloned().collect()
    }

    /// The change of a module such as `layers.0.attention.query.weight`, if there is one, with the layer's name.
    /// Modules that share a layer get their rows of it; `rows` has the number of rows of each.
    pub fn change(&self, module: &str, rows: &HashMap<String, usize>) -> Option<(String, Change)> {
        let places = CONVENTIONS.iter().flat_map(|c| c.places(module, has_gate(rows)));
        places.into_iter().find_map(|place| {
            let layer = place.names.iter().find_map(|name| {
                let layer = name.strip_suffix(".weight")?;
                self.changes.contains_key(layer).then(|| layer.to_string())
            })?;
            let change = self.changes[&layer].clone();
            let b = place.part(module, change.b, rows)?;
            let magnitude = match change.magnitude {
                Some(whole) => Some(place.part(module, whole, rows)?),
                None => None,
            };
            Some((layer, Change { b, magnitude, ..change }))
        })
    }

    /// Whether it states that the base model stores its matrices as `[in, out]`.
    pub fn is_for_in_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The change of a checkpoint's tensor in its stored orientation, if there is one, with the layer's name.
    pub fn change_of(&self, tensor: &str) -> Option<(String, Change)> {
        let layer = tensor.strip_suffix(".weight")?;
        let (layer, change) = self.changes.get_key_value(layer)?;
        let change = Change {
            transposed: self.fan_in_fan_out,
            ..change.clone()
        };
        Some((layer.clone(), change))
    }
}

fn config(path: &Path) -> Result<Config, SourceError> {
    let text = fs::read_to_string(path).map_err(|source| SourceError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    let fields: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| SourceError::invalid(path, format!("is not a valid PEFT configuration: {e}")))?;
    let refused = |Refusal { message, help }| SourceError::invalid(path, message).with_help(help);
    Config::read(&fields).map_err(refused)
}

/// All tensors of the file. A tensor with an unsupported dtype would be lost, so it is refused.
fn tensors(path: &Path) -> Result<BTreeMap<String, Constant>, SourceError> {
    let tensors = safetensors(path)?;
    let names = names(path).map_err(|source| SourceError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    match names.iter().find(|name| !tensors.contains_key(*name)) {
        Some(lost) => Err(SourceError::invalid(
            path,
            format!("{lost:?} is of a dtype that is not supported"),
        )),
        None => Ok(tensors),
    }
}

/// The names in the header of a file that was read before.
fn names(path: &Path) -> std::io::Result<Vec<String>> {
    let mut file = fs::File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
    let header: Map<String, Value> = serde_json::from_slice(&header)?;
    Ok(header
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name != "__metadata__")
        .collect())
}

/// The layer of a tensor, and its index in [`PARTS`].
fn part(name: &str) -> Option<(&str, usize)> {
    PARTS.iter().enumerate().find_map(|(part, (marker, ends))| {
        let (layer, end) = name.rsplit_once(marker)?;
        ends.contains(&end).then_some((layer, part))
    })
}

fn change(layer: &str, parts: Parts, config: &Config) -> Result<Change, String> {
    let [Some(a), Some(b), magnitude] = parts else {
        return Err(format!("{layer:?} has only one of lora_A and lora_B"));
    };
    let rank = config.rank(layer);
    let fits = matches!((a.shape(), b.shape()), ([ra, _], [_, rb]) if *ra == rank && *rb == rank);
    if !fits {
        return Err(format!(
            "{layer:?} has lora_A {:?} and lora_B {:?}, which do not have the rank {rank} of the configuration",
            a.shape(),
            b.shape()
        ));
    }
    match (&magnitude, config.dora) {
        (None, true) => {
            return Err(format!(
                "{layer:?} has no lora_magnitude_vector, which a DoRA adapter has"
            ));
        }
        (Some(_), false) => {
            return Err(format!(
                "{layer:?} has a lora_magnitude_vector, but the configuration does not say \"use_dora\": true"
            ));
        }
        (Some(m), true) if m.shape() != [b.shape()[0]] => {
            return Err(format!(
                "{layer:?} has lora_magnitude_vector {:?}, which must be [{}] as lora_B has rows",
                m.shape(),
                b.shape()[0]
            ));
        }
        _ => {}
    }
    Ok(Change {
        a,
        b,
        scale: config.scale(layer),
        magnitude,
        transposed: false,
    })
}

impl Change {
    /// The matrix with the change, in fp32. Panics unless it has [`Change::shape`].
    pub fn merged(&self, weight: &Constant) -> Constant {
        let turned = |constant: &Constant| match self.transposed {
            true => constant.transposed(&[1, 0]),
            false => constant.clone(),
        };
        let sum = turned(weight).plus_product(&self.b, &self.a, self.scale);
        turned(&match &self.magnitude {
            Some(lengths) => sum.with_row_lengths(lengths),
            None => sum,
        })
    }

    /// Shape of the matrix that it changes.
    pub fn shape(&self) -> [usize; 2] {
        let (out, width) = (self.b.shape()[0], self.a.shape()[1]);
        match self.transposed {
            true => [width, out],
            false => [out, width],
        }
    }
}
