//! Features of TensorRT-RTX only.

use std::sync::Arc;

use trtx::EngineInvalidityDiagnostics as Why;

use crate::backend::tensorrt::cuda::driver::Driver;
use crate::backend::tensorrt::library::Version;
use crate::backend::tensorrt::run::{Objection, ObjectionKind};

/// TensorRT's check of a plan's header. It reports every plan as invalid on GPUs that are not on its list, though some
/// run there (`probe::runs_on`), so it is not a reason before the plan was `tried`.
pub(in super::super) fn judge(
    runtime: &trtx::Runtime<'_>,
    plan: &[u8],
    tried: bool,
    version: Version,
    facts: &Driver,
) -> Result<(), Objection> {
    let verdict = runtime.engine_validity(plan);
    // The binding refuses data shorter than a header.
    let (validity, why) = verdict.map_err(|e| Objection {
        kind: ObjectionKind::Plan,
        reason: format!("the file is damaged: {e}"),
    })?;
    let valid = !matches!(validity, trtx::EngineValidity::kINVALID);
    if valid || !tried && why == Why::UNSUPPORTED_CC {
        return Ok(());
    }
    Err(Objection {
        kind: kind(why),
        reason: reason(why, version, facts),
    })
}

/// The machine's problems come first: another plan would not solve them.
fn kind(why: Why) -> ObjectionKind {
    let faults = [
        (Why::CUDA_ERROR, ObjectionKind::Cuda),
        (Why::MALFORMED_ENGINE, ObjectionKind::Plan),
        (Why::VERSION_MISMATCH, ObjectionKind::Plan),
        (Why::OLD_CUDA_DRIVER, ObjectionKind::Driver),
        (Why::INSUFFICIENT_GPU_MEMORY, ObjectionKind::Memory),
    ];
    let first = faults.into_iter().find(|(flag, _)| why.contains(*flag));
    first.map_or(ObjectionKind::Plan, |(_, kind)| kind)
}

/// In words.
fn reason(why: Why, version: Version, facts: &Driver) -> String {
    let gpu = &facts.gpus[0];
    let (major, minor) = gpu.compute_capability;
    let reasons = [
        (
            Why::VERSION_MISMATCH,
            format!("another version than {version} built it"),
        ),
        (
            Why::UNSUPPORTED_CC,
            format!("it is not for {}, SM {major}.{minor}", gpu.name),
        ),
        (
            Why::OLD_CUDA_DRIVER,
            format!(
                "the driver, of CUDA {}, is older than the builder's",
                facts.cuda_version
            ),
        ),
        (
            Why::OLD_CUDA_RUNTIME,
            "its CUDA is newer than this library's".to_string(),
        ),
        (
            Why::INSUFFICIENT_GPU_MEMORY,
            "its weights do not fit the GPU's memory".to_string(),
        ),
        (Why::MALFORMED_ENGINE, "the file is damaged".to_string()),
        (Why::CUDA_ERROR, "the CUDA installation is broken".to_string()),
    ];
    let found: Vec<String> = reasons
        .into_iter()
        .filter(|(flag, _)| why.contains(*flag))
        .map(|(_, text)| text)
        .collect();
    match found.is_empty() {
        true => "TensorRT calls it invalid".to_string(),
        false => found.join(", and "),
    }
}

/// What every context needs besides its memory.
pub(in super::super) fn configure(config: &mut trtx::RuntimeConfig<'_>) {
    use trtx::DynamicShapesKernelSpecializationStrategy::kEAGER;
    config.set_dynamic_shapes_kernel_specialization_strategy(kEAGER);
}

/// Kernels that TensorRT compiled when it loaded plans.
pub(in super::super) struct KernelStore(Arc<trtx::RuntimeCache>);

impl KernelStore {
    /// An empty one. `None`: this TensorRT compiles nothing.
    pub fn new(config: &trtx::RuntimeConfig<'_>) -> Result<Option<Self>, trtx::Error> {
        Ok(Some(KernelStore(Arc::new(config.create_runtime_cache()?))))
    }

    /// Loads bytes from [`KernelStore::bytes`]; returns whether TensorRT accepts them.
    pub fn fill(&self, bytes: &[u8]) -> bool {
        self.0.deserialize(bytes).is_ok()
    }

    /// Contexts of this configuration use kernels from here, and add theirs.
    pub fn give_to(&self, config: &mut trtx::RuntimeConfig<'_>) -> Result<(), trtx::Error> {
        config.set_runtime_cache(self.0.clone())
    }

    pub fn bytes(&self) -> Option<impl AsRef<[u8]> + '_> {
        self.0.serialize().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::Library;
    use crate::backend::tensorrt::cuda::driver::Gpu;
    use crate::backend::tensorrt::log_capture::LogCapture;

    fn facts() -> Driver {
        Driver {
            cuda_version: "12.4".into(),
            driver_version: Some("550.54".into()),
            gpus: vec![Gpu {
                name: "NVIDIA L4".into(),
                compute_capability: (8, 9),
                memory_bytes: 1 << 34,
            }],
        }
    }

    #[test]
    fn every_reason_is_told_in_words() {
        let (version, facts) = (Version::from_encoded(10601), facts());
        use ObjectionKind::{Cuda, Driver, Memory, Plan};
        for (why, of, words) in [
            (Why::VERSION_MISMATCH, Plan, "another version than 1.6.1 built it"),
            (Why::UNSUPPORTED_CC, Plan, "it is not for NVIDIA L4, SM 8.9"),
            (
                Why::OLD_CUDA_DRIVER,
                Driver,
                "the driver, of CUDA 12.4, is older than the builder's",
            ),
            (Why::OLD_CUDA_RUNTIME, Plan, "its CUDA is newer than this library's"),
            (
                Why::INSUFFICIENT_GPU_MEMORY,
                Memory,
                "its weights do not fit the GPU's memory",
            ),
            (Why::MALFORMED_ENGINE, Plan, "the file is damaged"),
            (Why::CUDA_ERROR, Cuda, "the CUDA installation is broken"),
            (Why::empty(), Plan, "TensorRT calls it invalid"),
        ] {
            assert_eq!((kind(why), reason(why, version, &facts).as_str()), (of, words));
        }
        let both = reason(Why::VERSION_MISMATCH | Why::UNSUPPORTED_CC, version, &facts);
        assert_eq!(
            both,
            "another version than 1.6.1 built it, and it is not for NVIDIA L4, SM 8.9"
        );
    }

    /// TensorRT checks a plan's header before it looks for a GPU, so this needs none.
    #[test]
    fn a_damaged_plan_is_called_so() {
        Library::load(None).unwrap_or_else(|e| panic!("{e}"));
        let logger = trtx::Logger::new(LogCapture::default()).unwrap();
        let runtime = trtx::Runtime::new(&logger).unwrap();
        let version = Version::from_encoded(10601);
        let judged = |plan: &[u8]| judge(&runtime, plan, false, version, &facts()).unwrap_err();
        assert_eq!(judged(&[7; 4096]).reason, "the file is damaged");
        let short = judged(b"ptrt");
        assert!(short.reason.starts_with("the file is damaged: "));
        assert_eq!(short.kind, ObjectionKind::Plan);
    }
}
