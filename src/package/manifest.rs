//! `manifest.json`: everything that is known about a package without running it.
//!
//! Plain data, read and written with serde. Field names are part of the package format: an incompatible change
//! raises [`FORMAT_VERSION`]. Unknown fields are ignored, so older readers accept newer minor additions.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::interface::Signature;
use crate::network::{Profile, WeightMode};
use crate::passes::{Activations, Architecture};
use crate::target::{Prefill, Quantization, Refit, Target};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;
use crate::tune::Tuning;
use crate::weights::form::Form;
use crate::weights::norm_parameter::NormParameter;
use crate::weights::recipe::Recipe;
use crate::weights::{StoredParts, StoredTensor, StoredWeight};

/// Raised when a package can no longer be read by the previous version of this code.
pub const FORMAT_VERSION: u32 = 1;

/// Everything about a package except the bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer. Always the first thing read.
    pub format_version: u32,
    /// Version of Lapidary that wrote the package.
    pub lapidary_version: String,
    /// The export.
    pub source: ExportFile,
    /// Sizes of the model.
    pub architecture: Architecture,
    /// Element type of weights and caches.
    pub dtype: DType,
    /// Targets of the conversion.
    pub targets: Vec<Target>,
    /// How weights enter its engines.
    pub weight_mode: WeightMode,
    /// Which weights of its engines can be replaced.
    pub refit: Refit,
    /// Inputs and outputs of the graph. In packages of versions without this field they follow from the names in the
    /// graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Signature>,
    /// Slots a cache can have, ascending.
    pub capacities: Vec<usize>,
    /// How prompts are cut for its engines.
    pub prefill: Prefill,
    /// The canonical graph.
    pub graph: StoredFile,
    /// BLAKE3 of the canonical graph's text, with every operator, name and shape but no weights: packages with the same
    /// hash can exchange weights.
    pub architecture_hash: String,
    /// The weights of the model.
    pub weights: WeightFile,
    /// Tables that a pass computed, such as rotary angles. They belong to the architecture, and stay when weights are
    /// removed.
    pub constants: Option<WeightFile>,
    /// How checkpoints of this model store norms, if known from a configuration or a refit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norms: Option<NormParameter>,
    /// How many positions masks that are inputs of the export let a query attend to, by their names; 0 for all. The package
    /// computes its own masks: this is for runs of the export.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub mask_windows: BTreeMap<String, usize>,
    /// Which activations are rounded to codes, as in the export, and which are not.
    #[serde(default, skip_serializing_if = "Activations::is_empty")]
    pub activations: Activations,
    /// What `convert --quantize` did. Weights that were already quantized in the export are not included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationRecord>,
    /// Empty if the package only runs on the CPU.
    pub engines: Vec<EngineEntry>,
    /// What `convert --tune` measured to choose the engines' lowerings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
    /// `None`: the package handles only token ids.
    pub tokenizer: Option<TokenizerFiles>,
    /// Tokens that end a text.
    pub eos_token_ids: BTreeSet<u32>,
    /// Report of each pass, in order.
    pub passes: Vec<PassRecord>,
}

/// How weights in floating point were quantized. Each weight's entry has the result: the parts in `quantized`, the
/// format in `recipe`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizationRecord {
    /// As requested, with defaults filled in.
    pub format: Quantization,
    /// Weights that were quantized.
    pub weights: usize,
    /// Matrices that stayed in floating point, by the graph's names.
    pub kept: Vec<String>,
    /// The calibration on a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
}

/// A text on which activations were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// Its file, without the folder.
    pub text: String,
    /// BLAKE3 of that file.
    pub blake3: String,
    /// Tokens of it that were read.
    pub tokens: usize,
    /// Places where channels were scaled: norms, and matrices before matrices.
    pub scaled: usize,
}

/// The export a package was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportFile {
    /// File name, without its folder.
    pub file: String,
    /// BLAKE3 of that file. External data is not in it; every weight has its own hash.
    pub blake3: String,
    /// Size of that file.
    pub bytes: u64,
    /// The exporter, as far as the graph shows.
    pub exporter: String,
    /// Name and version in the file.
    pub producer: String,
    /// Domain (`ai.onnx` for the default) and version.
    pub opsets: Vec<(String, i64)>,
}

/// A file of the package, by its path inside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Path inside the package, with `/` between its parts.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of the contents, in hexadecimal.
    pub blake3: String,
}

/// A safetensors file of the package, and its contents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightFile {
    /// Path inside the package.
    pub file: String,
    /// Size; for a stripped package, of the removed weights.
    pub bytes: u64,
    /// See [`crate::weights::set_hash`]. In a stripped package, for the weights it had; empty if it never had any.
    pub set_hash: String,
    /// The file is absent: a stripped package.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stripped: bool,
    /// Source of the values, if not the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refit: Option<RefitRecord>,
    /// Every constant of the graph that is stored in this file, in the graph's order.
    pub tensors: Vec<WeightEntry>,
}

/// What a package was refitted with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefitRecord {
    /// Name of the file or folder, without its parent folders.
    pub source: String,
    /// Display name: `Hugging Face, Llama-like`.
    pub kind: String,
    /// The adapter's folder.
    pub lora: Option<String>,
}

/// A weight, or a table that a pass computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightEntry {
    /// Its name in the canonical graph and in every network lowered from it.
    pub name: String,
    /// Its name in the export or in the source of a refit; `null` if it was computed.
    pub source_name: Option<String>,
    /// Recipe over initializers of the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Recipe>,
    /// Recipe over modules of the model (see [`crate::weights::modules`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<Recipe>,
    /// Recipe over tensors of a checkpoint, learned from a checkpoint with the same values. Stored if there are no
    /// modules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Recipe>,
    /// Element type of its values.
    pub dtype: DType,
    /// Shape of its values.
    pub shape: Vec<usize>,
    /// BLAKE3 of its bytes; for a quantized weight, see [`crate::weights::StoredWeight::blake3`].
    pub blake3: String,
    /// Offset in the weights file; for a quantized weight, of its codes.
    pub offset: u64,
    /// Size in bytes; for a quantized weight, of codes, scales and zero points.
    pub bytes: u64,
    /// The parts of a quantized weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantized: Option<QuantizedEntry>,
    /// The tensor stored at this location, if it is another one with the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
    /// Profiles of the engines that read it.
    #[serde(default)]
    pub engines: Vec<String>,
}

/// The parts of a quantized weight; see [`crate::tensor::quantized`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizedEntry {
    /// Which codes share a scale.
    pub granularity: Granularity,
    /// In the weight's shape.
    pub codes: PartEntry,
    /// In the weight's dtype.
    pub scales: ScalesEntry,
    /// In the codes' dtype.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_points: Option<PartEntry>,
}

/// Scales are a tensor, or quantized themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ScalesEntry {
    /// Plain scales.
    Plain(PartEntry),
    /// Codes with their own scales.
    Quantized(Box<QuantizedEntry>),
}

/// A tensor of a weights file that is a part of a quantized weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartEntry {
    /// Its name in the graph's file, and in the weights file unless `same_as` is present.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// BLAKE3 of its bytes.
    pub blake3: String,
    /// Offset in the weights file.
    pub offset: u64,
    /// Number of bytes, packed.
    pub bytes: u64,
    /// The tensor stored at this location, if it is another one with the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
}

impl QuantizedEntry {
    /// Every tensor of the file that belongs to it.
    pub fn parts(&self) -> Vec<&PartEntry> {
        let mut parts = vec![&self.codes];
        match &self.scales {
            ScalesEntry::Plain(part) => parts.push(part),
            ScalesEntry::Quantized(scales) => parts.extend(scales.parts()),
        }
        parts.extend(&self.zero_points);
        parts
    }

    /// The required form of weights from other sources.
    pub fn form(&self) -> Form {
        Form {
            codes: self.codes.dtype,
            granularity: self.granularity,
            scales: match &self.scales {
                ScalesEntry::Plain(_) => None,
                ScalesEntry::Quantized(scales) => Some(Box::new(scales.form())),
            },
            zero_points: self.zero_points.is_some(),
        }
    }

    fn of(parts: StoredParts) -> QuantizedEntry {
        QuantizedEntry {
            granularity: parts.granularity,
            codes: PartEntry::of(parts.codes),
            scales: match *parts.scales {
                StoredWeight::Plain(tensor) => ScalesEntry::Plain(PartEntry::of(tensor)),
                StoredWeight::Quantized(parts) => ScalesEntry::Quantized(Box::new(QuantizedEntry::of(parts))),
            },
            zero_points: parts.zero_points.map(PartEntry::of),
        }
    }
}

impl std::fmt::Display for QuantizedEntry {
    /// `u4 in blocks of 32 on axis 1 with zero points`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.form().fmt(f)
    }
}

impl PartEntry {
    fn of(tensor: StoredTensor) -> PartEntry {
        PartEntry {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            blake3: tensor.blake3,
            offset: tensor.offset,
            bytes: tensor.bytes,
            same_as: tensor.same_as,
        }
    }
}

/// Where a weight was stored, from its entry.
pub(super) struct Place {
    pub blake3: String,
    pub offset: u64,
    pub bytes: u64,
    pub same_as: Option<String>,
    pub quantized: Option<QuantizedEntry>,
}

impl Place {
    pub fn of(stored: StoredWeight) -> Place {
        let (blake3, bytes) = (stored.blake3(), stored.bytes());
        match stored {
            StoredWeight::Plain(tensor) => Place {
                blake3,
                bytes,
                offset: tensor.offset,
                same_as: tensor.same_as,
                quantized: None,
            },
            StoredWeight::Quantized(parts) => Place {
                blake3,
                bytes,
                offset: parts.codes.offset,
                same_as: None,
                quantized: Some(QuantizedEntry::of(parts)),
            },
        }
    }
}

/// A TensorRT plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineEntry {
    /// Path of the plan inside the package.
    pub file: String,
    /// Size of the plan.
    pub bytes: u64,
    /// BLAKE3 of the plan.
    pub blake3: String,
    /// If the network has Lapidary's own layers: the sizes of the plans of the segments between them, which are
    /// concatenated in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plans: Option<Vec<u64>>,
    /// What it runs on.
    pub target: Target,
    /// What it runs.
    pub profile: Profile,
    /// The profile it was lowered for, if it runs other profiles as well; those have separate entries with the same
    /// file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built_as: Option<Profile>,
    /// Which of the plan's optimization profiles this is.
    #[serde(default, skip_serializing_if = "is_first")]
    pub optimization_profile: usize,
    /// How weights enter it.
    pub weight_mode: WeightMode,
    /// Which of its weights can be replaced.
    pub refit: Refit,
    /// The choices of its lowering, which determine its weights.
    #[serde(default)]
    pub lowering: crate::lower::LowerOptions,
    /// The weight set that it was built with, if it must get the same one at load
    /// ([`EngineEntry::takes_only_its_own_weights`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built_with: Option<String>,
    /// Version of the library that built it, for example `1.6.1`.
    pub tensorrt_version: String,
    /// Wall-clock time; 0 for a plan from an engine cache.
    pub build_ms: u64,
}

fn is_first(profile: &usize) -> bool {
    *profile == 0
}

impl EngineEntry {
    /// The plans in the bytes of its file; `None` if they are not as long as the entry says.
    pub fn plans_of<'b>(&self, file: &'b [u8]) -> Option<Vec<&'b [u8]>> {
        let Some(sizes) = &self.plans else {
            return Some(vec![file]);
        };
        let mut rest = file;
        let mut plans = Vec::with_capacity(sizes.len());
        for size in sizes {
            let (plan, next) = rest.split_at_checked(usize::try_from(*size).ok()?)?;
            plans.push(plan);
            rest = next;
        }
        rest.is_empty().then_some(plans)
    }

    /// The profile that its network is lowered for.
    pub fn lowered_for(&self) -> &Profile {
        self.built_as.as_ref().unwrap_or(&self.profile)
    }

    /// Whether it was stripped for an identical refit: TensorRT optimized it for its values, but accepts others at load
    /// without an error.
    pub fn takes_only_its_own_weights(&self) -> bool {
        self.weight_mode == WeightMode::Strip && self.refit != Refit::General
    }

    /// Whether it may run with this weight set. Older packages do not record it.
    pub fn takes(&self, set_hash: &str) -> bool {
        !self.takes_only_its_own_weights() || self.built_with.as_deref().is_none_or(|own| own == set_hash)
    }
}

/// The model's own tokenizer, as its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenizerFiles {
    /// `tokenizer.json` first.
    pub files: Vec<StoredFile>,
    /// Whether it has a chat template.
    pub chat_template: bool,
}

/// One pass of the pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassRecord {
    /// Name of the pass.
    pub name: String,
    /// Number of rewrites.
    pub rewrites: usize,
    /// Nodes of the graph before the pass.
    pub nodes_before: usize,
    /// Nodes of the graph after the pass.
    pub nodes_after: usize,
}

impl WeightEntry {
    /// The ranges of the weights file that hold it, with the hash of each.
    pub(super) fn ranges(&self) -> Vec<(u64, u64, &str)> {
        match &self.quantized {
            None => vec![(self.offset, self.bytes, &self.blake3)],
            Some(quantized) => {
                let parts = quantized.parts().into_iter();
                parts
                    .map(|part| (part.offset, part.bytes, part.blake3.as_str()))
                    .collect()
            }
        }
    }

    /// Its input to [`crate::weights::set_hash`].
    pub(crate) fn line(&self) -> (&str, DType, &[usize], &str) {
        (&self.name, self.dtype, &self.shape, &self.blake3)
    }
}
