//! The result file: one JSON document per system and model. `docs/reference/benchmarks.md` explains every field.
//!
//! `lapidary bench` and the baselines in `scripts/baselines/` write it; `lapidary report` reads it. Units are in the
//! names. Summaries follow from samples of the same document; [`super::check`] checks that.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::compare::Comparison;
use super::summary::Summary;

/// The value of `schema`.
pub const SCHEMA: &str = "lapidary-bench/1";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    pub schema: String,
    pub system: System,
    /// RFC 3339, when it was run.
    pub date: String,
    pub command: String,
    /// Commit of the measuring program, with `+changes` for uncommitted ones; `unknown` if not available.
    pub commit: String,
    /// Why nothing was measured: a system that could not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub machine: Machine,
    /// Versions by name.
    pub versions: BTreeMap<String, Option<String>>,
    pub model: Model,
    pub workload: Workload,
    #[serde(default)]
    pub prefill: Vec<Prefill>,
    #[serde(default)]
    pub decode: Vec<Decode>,
    #[serde(default)]
    pub end_to_end: Vec<EndToEnd>,
    #[serde(default)]
    pub load: Option<Load>,
    #[serde(default)]
    pub build: Option<Build>,
    #[serde(default)]
    pub sizes: Option<Sizes>,
    #[serde(default)]
    pub memory: Option<Memory>,
    #[serde(default)]
    pub outputs: Option<Outputs>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<BTreeMap<String, LayerTimes>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// `lapidary`, `transformers`, `onnxruntime`, `tract`, `tensorrt-onnx-parser`.
    pub name: String,
    pub variant: String,
    /// Short, for tables; unique among the results that are compared.
    pub label: String,
    /// All settings, by free names. `ablation: {group, switch}` marks a run of an ablation.
    #[serde(default)]
    pub settings: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// Threads that can run at once.
    pub cores: usize,
    pub memory_bytes: Option<u64>,
    pub os: String,
    pub gpu: Option<Gpu>,
    /// Bytes read plus bytes written, of a large copy within the memory that the weights are read from.
    pub copy_bandwidth_bytes_per_s: Option<f64>,
    /// The denominator of `mfu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_flops: Option<Peak>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub name: String,
    pub driver: Option<String>,
    pub memory_bytes: Option<u64>,
    pub compute_capability: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Floating-point operations per second in the dtype of the run.
    pub flops: f64,
    /// `stated: …` or `measured: …`.
    pub source: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    pub name: String,
    /// `fp16`, `bf16` or `fp32`: what was run.
    pub dtype: String,
    /// See [`super::weights_hash`].
    pub weights_hash: String,
    pub parameters: u64,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    /// Bytes of weights read for one token: all, except the embedding's other rows unless the head multiplies the
    /// embedding.
    pub weight_bytes_per_token: u64,
    /// `2 * layers * kv_heads * head_dim * bytes of an element`.
    pub kv_bytes_per_token_slot: u64,
    /// Parameters in the matrices of the layers, without embedding and head; for `mfu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matrix_parameters: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    pub batch: usize,
    pub seed: u64,
    /// The prompt of speed measurements, then those of recorded outputs.
    pub prompts: Vec<PromptHash>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptHash {
    pub tokens: usize,
    /// SHA-256 of the ids as little-endian 32-bit numbers, in hexadecimal.
    pub sha256: String,
}

/// A prompt of `tokens` tokens into an empty cache, to the first token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prefill {
    pub tokens: usize,
    pub samples_ms: Vec<f64>,
    pub ms: Summary,
    /// `tokens` over the median.
    pub prefill_tokens_per_s: f64,
    pub mfu: Option<f64>,
    pub stable: bool,
}

/// One token after another, with `live` tokens before the first of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decode {
    pub live: usize,
    /// Slots of the cache, if it is static.
    #[serde(default)]
    pub capacity: Option<usize>,
    /// Wall-clock time of each token.
    pub samples_ms: Vec<f64>,
    pub ms: Summary,
    /// Measured by device events, without the host.
    #[serde(default)]
    pub gpu_ms: Option<f64>,
    /// `batch` over the median.
    pub output_tokens_per_s: f64,
    pub mbu: Option<f64>,
    pub stable: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndToEnd {
    pub prompt: usize,
    pub new_tokens: usize,
    pub runs: Vec<Run>,
    /// Over runs.
    pub ttft_ms: Summary,
    /// Over runs, `sum of itl_samples_ms / (tokens - 1)`.
    pub tpot_ms: Summary,
    /// Over runs, `(latency_ms - ttft_ms) / (tokens - 1)`.
    pub itl_ms: Summary,
    /// Over runs.
    pub latency_ms: Summary,
    /// All tokens of all runs over the sum of their latencies.
    pub output_tokens_per_s: f64,
    /// Stability of the latencies.
    pub stable: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// To the first token.
    pub ttft_ms: f64,
    /// To the end of the run.
    pub latency_ms: f64,
    pub tokens: usize,
    /// Between one token and the next: `tokens - 1` of them.
    pub itl_samples_ms: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// From nothing to a session that accepts tokens, with the system's caches on disk.
    pub load_ms: Option<f64>,
    /// The same without these caches.
    pub first_load_ms: Option<f64>,
    /// Whether all kernels for `load_ms` were in the kernel cache; none if a system has no kernel cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernels_kept: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Build {
    pub engines: Vec<BuiltEngine>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BuiltEngine {
    pub profile: String,
    pub bytes: u64,
    /// None if the plan came from a cache.
    #[serde(default)]
    pub build_ms: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sizes {
    pub package_bytes: Option<u64>,
    pub plans_bytes: Option<u64>,
    pub weights_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Peak resident set of the process, mapped files included.
    pub peak_host_bytes: Option<u64>,
    /// Peak anonymous memory, of samples after loading and after each part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_anonymous_host_bytes: Option<u64>,
    pub device: Option<DeviceMemory>,
}

/// Bytes of device memory by purpose, each at its peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceMemory {
    #[serde(default)]
    pub weights: Option<u64>,
    #[serde(default)]
    pub cache: Option<u64>,
    #[serde(default)]
    pub scratch: Option<u64>,
    /// In use before the model was loaded: the CUDA context and other processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u64>,
    /// Everything in use, including `context` if known.
    pub total: u64,
}

/// The system's answers, which are compared before any speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outputs {
    pub prompts: Vec<Vec<u32>>,
    /// For each prompt.
    pub greedy_tokens: Vec<Vec<u32>>,
    pub logits: Vec<LogitRow>,
    /// A comparison by the writer; readers with the reference make their own.
    #[serde(default)]
    pub reference: Option<Comparison>,
}

/// Raw logits after prompt `prompt` and `step` more tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogitRow {
    pub prompt: usize,
    /// 0: after the prompt; s: after s forced tokens.
    pub step: usize,
    /// Ids with the largest logits, in descending order.
    pub top: Vec<(u32, f64)>,
    /// L2 norm of the whole row.
    #[serde(default)]
    pub norm: Option<f64>,
    /// First minus second.
    #[serde(default)]
    pub margin: Option<f64>,
}

/// Time by TensorRT layer, one run of an engine without CUDA graphs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerTimes {
    /// Tokens in the cache after the run.
    pub live: usize,
    pub total_ms: f64,
    /// `attention`, `matrix products`, `rest`.
    pub groups: BTreeMap<String, f64>,
    pub layers: Vec<(String, f64)>,
}
