//! The flags: Dynamo's own, and those of `lapidary serve` for the device and the scheduler.

use std::path::PathBuf;

use clap::Parser;
use dynamo_backend_common::{CommonArgs, DisaggregationMode, DynamoError, WorkerConfig};
use lapidary::decode::DeviceChoice;
use lapidary::decode::batch::BatchOptions;

use crate::engine::Options;
use crate::errors::invalid;

/// Serves a Lapidary package to the frontends of a Dynamo deployment.
#[derive(Parser, Debug)]
#[command(name = "lapidary-dynamo", version)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    pub package: PathBuf,
    /// Model name in requests [default: the name of its folder]
    #[arg(long, value_name = "NAME", env = "DYN_SERVED_MODEL_NAME")]
    pub served_model_name: Option<String>,
    /// Where to run
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    pub device: String,
    /// Threads of the CPU executor [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// The TensorRT library to run engines with
    #[arg(long, value_name = "PATH")]
    pub tensorrt_lib: Option<PathBuf>,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_sequences: u32,
    /// Maximum of queued requests; further ones are refused, so that the frontend chooses another worker
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: u32,
    /// Tokens of a prompt that are computed between two decode steps of other requests
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub prefill_chunk: u32,
    /// Caches of finished requests that are kept for prompts with the same prefix [default: as many as sequences]
    #[arg(long, value_name = "N")]
    pub kept_prefixes: Option<u32>,
    /// Bytes for all caches; kept ones are dropped first [default: no limit]
    #[arg(long, value_name = "BYTES")]
    pub cache_memory: Option<usize>,
    /// Dynamo's own flags.
    #[command(flatten)]
    pub common: CommonArgs,
}

impl Args {
    /// The settings of the engine and of Dynamo's runtime.
    pub fn read(self) -> Result<(Options, WorkerConfig), DynamoError> {
        let common = self.common;
        if !matches!(common.disaggregation_mode, DisaggregationMode::Aggregated) {
            return Err(invalid(
                "--disaggregation-mode: a Lapidary worker computes prompts and tokens of a request itself (agg)",
            ));
        }
        if common.route_to_encoder {
            return Err(invalid("--route-to-encoder: a Lapidary package takes only text"));
        }
        if common
            .endpoint_types
            .split(',')
            .any(|kind| !matches!(kind.trim(), "chat" | "completions"))
        {
            return Err(invalid(format!(
                "--endpoint-types {}: a Lapidary worker has chat and completions",
                common.endpoint_types
            )));
        }
        let whole = self.package.canonicalize().unwrap_or_else(|_| self.package.clone());
        let folder = whole.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = self
            .served_model_name
            .or(folder)
            .unwrap_or_else(|| "lapidary".to_string());
        let config = WorkerConfig {
            namespace: common.namespace,
            component: common.component,
            endpoint: common.endpoint,
            endpoint_types: common.endpoint_types,
            custom_jinja_template: common.custom_jinja_template,
            tool_call_parser: common.dyn_tool_call_parser,
            reasoning_parser: common.dyn_reasoning_parser,
            exclude_tools_when_tool_choice_none: common.exclude_tools_when_tool_choice_none,
            enable_rl: common.enable_rl,
            // The frontend reads the tokenizer and the template from it.
            model_name: whole.join("tokenizer").to_string_lossy().into_owned(),
            served_model_name: Some(name.clone()),
            metrics_labels: vec![("model".to_string(), name.clone())],
            runtime: common.runtime,
            ..WorkerConfig::default()
        };
        let sequences = self.max_sequences as usize;
        let options = Options {
            package: whole,
            name,
            device: match &self.device[..] {
                "cpu" => DeviceChoice::Cpu,
                "cuda" => DeviceChoice::Cuda,
                _ => DeviceChoice::Auto,
            },
            threads: self.threads.map(usize::from),
            tensorrt_lib: self.tensorrt_lib,
            queue: self.queue as usize,
            batch: BatchOptions {
                sequences,
                chunk: self.prefill_chunk as usize,
                kept: self.kept_prefixes.map_or(sequences, |n| n as usize),
                cache_bytes: self.cache_memory,
            },
        };
        Ok((options, config))
    }
}
