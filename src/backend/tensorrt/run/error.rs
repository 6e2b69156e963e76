//! Errors between a plan on disk and a token, with help.

use std::path::PathBuf;

use super::super::cuda::driver::DriverError;
use super::super::error::LibraryError;
use super::super::flavour::FLAVOUR;
use super::super::probe::OLDEST_CUDA;
use crate::help::Help;

/// Errors of loading and running engines. [`Help`] has the advice.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No library, or no suitable one.
    #[error(transparent)]
    Library(#[from] LibraryError),

    /// No driver or no GPU.
    #[error(transparent)]
    Driver(#[from] DriverError),

    /// The driver is older than the library needs.
    #[error("the NVIDIA driver {driver} runs CUDA up to {cuda}, {} needs {}.0 at least", FLAVOUR.product, OLDEST_CUDA)]
    DriverTooOld {
        /// The driver's version.
        driver: String,
        /// The newest CUDA version that it supports.
        cuda: String,
    },

    /// TensorRT does not support this GPU.
    #[error("{} {version} does not run on {gpu}: {reason}", FLAVOUR.product)]
    Gpu {
        /// The library's version.
        version: super::super::Version,
        /// The GPU's name.
        gpu: String,
        /// Why not.
        reason: String,
    },

    /// Too little memory on the GPU.
    #[error(
        "{what}: {} of GPU memory are needed and {} are free", gigabytes(*needed), gigabytes(*free)
    )]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The largest cache capacity that would fit.
        fits: Option<usize>,
    },

    /// The plan is not for this machine, or is not a plan.
    #[error("the engine {} cannot be loaded: {objection}", path.display())]
    Plan {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        objection: Objection,
    },

    /// The file of a plan cannot be read.
    #[error("the engine {} cannot be read: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// TensorRT failed while loading the engine.
    #[error("the engine {engine} failed to load ({} of GPU memory were free): {message}", gigabytes(*free))]
    Load {
        /// The engine's profile.
        engine: String,
        /// The library's messages, one error per line.
        message: String,
        /// Bytes free.
        free: u64,
    },

    /// A stripped engine without all of its weights would compute with zeros.
    #[error("the engine {engine} lacks {} of its weights ({})", names.len(), several(names))]
    Weights {
        /// The engine's profile.
        engine: String,
        /// The missing weights.
        names: Vec<String>,
    },

    /// Engine and network disagree: the package was edited, or there is a bug.
    #[error("the engine {engine} and the package disagree: {reason}")]
    Mismatch {
        /// The engine's profile.
        engine: String,
        /// What is wrong.
        reason: String,
    },

    /// TensorRT failed in a run, or a run was refused.
    #[error("the engine {engine} failed while running: {message}")]
    Execute {
        /// The engine's profile.
        engine: String,
        /// The library's messages, one error per line.
        message: String,
    },

    /// The GPU is too old for Lapidary's kernels.
    #[error("the decode kernels of this package need SM {}.{}, and {gpu} has SM {}.{}", needed.0, needed.1, found.0, found.1)]
    OldGpu {
        /// The GPU's name.
        gpu: String,
        /// Its compute capability.
        found: (u32, u32),
        /// The required compute capability.
        needed: (u32, u32),
    },

    /// A kernel needs more shared memory than the GPU has.
    #[error("no kernel for the layer {layer:?} fits the {} KiB of shared memory that a block has on this GPU", available >> 10)]
    SharedMemory {
        /// The network's layer.
        layer: String,
        /// Bytes.
        available: usize,
    },

    /// A kernel is missing in this program: another version wrote the package, or there is a bug.
    #[error("this version has no kernel {name}")]
    NoKernel {
        /// The variant.
        name: String,
    },

    /// The driver failed.
    #[error("{call} failed: {name} ({message})")]
    Cuda {
        /// The function of the driver.
        call: &'static str,
        /// The error's name.
        name: String,
        /// What it means.
        message: String,
    },
}

/// TensorRT's objections to a plan, and the fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objection {
    /// The fault.
    pub kind: ObjectionKind,
    /// All reasons, as text.
    pub reason: String,
}

/// What must change before the plan loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectionKind {
    /// The plan: for another version or GPU, or damaged. It must be built again.
    Plan,
    /// The driver is older than the plan's builder.
    Driver,
    /// The GPU's memory is less than the plan's weights.
    Memory,
    /// CUDA itself fails.
    Cuda,
}

impl std::fmt::Display for Objection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

const ON_THE_CPU: &str = "run on the CPU with `--device cpu`";

impl Help for RunError {
    fn help(&self) -> Option<String> {
        let or_on_the_cpu = |what: &str| format!("{what}, or {ON_THE_CPU}");
        Some(match self {
            RunError::Library(error) => return error.help(),
            RunError::Driver(_) | RunError::Gpu { .. } => ON_THE_CPU.to_string(),
            RunError::DriverTooOld { .. } => or_on_the_cpu("update the driver"),
            RunError::Memory { fits: Some(fits), .. } => format!("a cache of {fits} tokens would fit"),
            RunError::Memory { fits: None, .. } => or_on_the_cpu("free memory on the GPU"),
            RunError::Plan { objection, .. } => match objection.kind {
                ObjectionKind::Plan => "convert the model again with this version".to_string(),
                ObjectionKind::Driver => or_on_the_cpu("update the driver"),
                ObjectionKind::Memory => or_on_the_cpu("free memory on the GPU"),
                ObjectionKind::Cuda => or_on_the_cpu("see whether `nvidia-smi` and `lapidary doctor` find the GPU"),
            },
            RunError::Read { .. } => "copy the package again, or convert the model again".to_string(),
            RunError::Load { message, .. } if message.to_lowercase().replace(' ', "").contains("outofmemory") => {
                or_on_the_cpu("free memory on the GPU")
            }
            RunError::Load { .. } => or_on_the_cpu("convert the model again with this version"),
            RunError::Weights { .. } => "give the package its weights with `lapidary refit`".to_string(),
            RunError::Mismatch { .. } => "convert the model again".to_string(),
            RunError::OldGpu { .. } | RunError::SharedMemory { .. } => {
                or_on_the_cpu("convert the model with --kernels off")
            }
            RunError::NoKernel { .. } => "convert the model again with this version".to_string(),
            RunError::Execute { .. } => format!("{ON_THE_CPU}, and please report this with the model's export"),
            RunError::Cuda { .. } => or_on_the_cpu("see whether `nvidia-smi` and `lapidary doctor` find the GPU"),
        })
    }
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

fn several(names: &[String]) -> String {
    match names {
        [first, second, third, _, ..] => format!("{first}, {second}, {third} …"),
        few => few.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_errors_say_what_would_fit() {
        let error = RunError::Memory {
            what: "a cache of 131072 tokens".into(),
            needed: 17_179_869_184,
            free: 900_000_000,
            fits: Some(4096),
        };
        assert_eq!(
            error.to_string(),
            "a cache of 131072 tokens: 17.2 GB of GPU memory are needed and 900.0 MB are free"
        );
        assert_eq!(error.help().unwrap(), "a cache of 4096 tokens would fit");
        let error = RunError::Memory {
            what: "the model's weights".into(),
            needed: 16_060_000_000,
            free: 8_500_000_000,
            fits: None,
        };
        assert_eq!(
            error.to_string(),
            "the model's weights: 16.1 GB of GPU memory are needed and 8.5 GB are free"
        );
        assert_eq!(
            error.help().unwrap(),
            "free memory on the GPU, or run on the CPU with `--device cpu`"
        );
    }

    #[test]
    fn missing_weights_are_named() {
        let names: Vec<String> = (0..5).map(|i| format!("w{i}")).collect();
        let engine = "b1-t1-c256".to_string();
        let error = RunError::Weights { engine, names };
        let text = error.to_string();
        assert!(text.contains("lacks 5 of its weights (w0, w1, w2 …)"), "{text}");
        assert!(error.help().unwrap().contains("lapidary refit"), "{error:?}");
    }

    #[test]
    fn a_plan_of_no_use_is_named_with_what_to_do() {
        let plan = |kind| RunError::Plan {
            path: PathBuf::from("pkg/engines/b1-t1-c256-tensorrt-rtx.plan"),
            objection: Objection {
                kind,
                reason: "another version than 1.6.1 built it".to_string(),
            },
        };
        assert_eq!(
            plan(ObjectionKind::Plan).to_string(),
            "the engine pkg/engines/b1-t1-c256-tensorrt-rtx.plan cannot be loaded: another version than 1.6.1 built it"
        );
        for (kind, help) in [
            (ObjectionKind::Plan, "convert the model again with this version"),
            (
                ObjectionKind::Driver,
                "update the driver, or run on the CPU with `--device cpu`",
            ),
            (
                ObjectionKind::Memory,
                "free memory on the GPU, or run on the CPU with `--device cpu`",
            ),
        ] {
            assert_eq!(plan(kind).help().unwrap(), help);
        }
    }

    #[test]
    fn memory_that_tensorrt_lacked_is_no_fault_of_the_plan() {
        let load = |message: &str| RunError::Load {
            engine: "b1-t1-c256".into(),
            message: message.into(),
            free: 1 << 20,
        };
        let help = load("Error Code 2: OutOfMemory (Requested size was 536870912 bytes.)").help();
        assert!(help.unwrap().starts_with("free memory"));
        assert!(load("Error Code 1: Myelin").help().unwrap().starts_with("convert"));
    }
}
