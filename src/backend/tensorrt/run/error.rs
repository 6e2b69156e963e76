//! What can go wrong between a plan on disk and a token, and what to do about it.

use std::path::PathBuf;

use super::super::driver::DriverError;
use super::super::error::LibraryError;
use super::super::flavour::FLAVOUR;
use super::super::probe::OLDEST_CUDA;

/// Errors of loading and running engines. The part after the last `; ` of a message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Library(#[from] LibraryError),

    #[error("{0}; run on the CPU with `--device cpu`")]
    Driver(#[from] DriverError),

    #[error(
        "the NVIDIA driver {driver} runs CUDA up to {cuda}, {} needs {}.0 at least; update the driver, or run on the CPU \
         with `--device cpu`",
        FLAVOUR.product,
        OLDEST_CUDA
    )]
    DriverTooOld { driver: String, cuda: String },

    /// TensorRT does not run on this kind of GPU.
    #[error("{} {version} does not run on {gpu}: {reason}; run on the CPU with `--device cpu`", FLAVOUR.product)]
    Gpu {
        version: super::super::Version,
        gpu: String,
        reason: String,
    },

    #[error(
        "{what}: {} of GPU memory are needed and {} are free; {}",
        gigabytes(*needed),
        gigabytes(*free),
        fitting(*fits)
    )]
    Memory {
        what: String,
        needed: u64,
        free: u64,
        /// The largest cache capacity that there would be room for.
        fits: Option<usize>,
    },

    /// The plan itself is of no use here.
    #[error("the engine {} cannot be loaded: {reason}; convert the model again with this version", path.display())]
    Plan { path: PathBuf, reason: String },

    #[error("the engine {} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },

    /// TensorRT failed while it made the engine ready.
    #[error("the engine {engine} failed to load ({} of GPU memory were free): {message}", gigabytes(*free))]
    Load { engine: String, message: String, free: u64 },

    /// A stripped engine without all of its weights would compute with zeros.
    #[error(
        "the engine {engine} lacks {} of its weights ({}); give the package its weights with `lapidary refit`",
        names.len(),
        several(names)
    )]
    Weights { engine: String, names: Vec<String> },

    /// Engine and network disagree: the package was changed by hand, or a bug.
    #[error("the engine {engine} and the package disagree: {reason}; convert the model again")]
    Mismatch { engine: String, reason: String },

    #[error("the engine {engine} failed while running: {message}")]
    Execute { engine: String, message: String },

    #[error("{call} failed: {name} ({message})")]
    Cuda {
        call: &'static str,
        name: String,
        message: String,
    },
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

fn fitting(capacity: Option<usize>) -> String {
    match capacity {
        Some(capacity) => format!("a cache of {capacity} tokens would fit"),
        None => "free memory on the GPU, or run on the CPU with `--device cpu`".to_string(),
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
            "a cache of 131072 tokens: 17.2 GB of GPU memory are needed and 900.0 MB are free; a cache of 4096 tokens \
             would fit"
        );
        let error = RunError::Memory {
            what: "the model's weights".into(),
            needed: 16_060_000_000,
            free: 8_500_000_000,
            fits: None,
        };
        assert_eq!(
            error.to_string(),
            "the model's weights: 16.1 GB of GPU memory are needed and 8.5 GB are free; free memory on the GPU, or run on \
             the CPU with `--device cpu`"
        );
    }

    #[test]
    fn missing_weights_are_named() {
        let names: Vec<String> = (0..5).map(|i| format!("w{i}")).collect();
        let engine = "b1-t1-c256".to_string();
        let text = RunError::Weights { engine, names }.to_string();
        assert!(text.contains("lacks 5 of its weights (w0, w1, w2 …)"), "{text}");
        assert!(text.contains("lapidary refit"), "{text}");
    }

    #[test]
    fn a_plan_of_no_use_is_named_with_what_to_do() {
        let path = PathBuf::from("pkg/engines/b1-t1-c256-tensorrt-rtx.plan");
        let reason = "another version than 1.6.1 built it".to_string();
        assert_eq!(
            RunError::Plan { path, reason }.to_string(),
            "the engine pkg/engines/b1-t1-c256-tensorrt-rtx.plan cannot be loaded: another version than 1.6.1 built it; \
             convert the model again with this version"
        );
    }
}
