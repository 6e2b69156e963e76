//! Engines that run: plans from disk to results in device memory.
//!
//! Input: plans from `build`. Output: [`Program`]s over a [`Runtime`], whose inputs and outputs are bound by device
//! address. The CUDA driver's objects are in the module `cuda`. `loaded_plan` deserializes a plan, `engine` adds a
//! context, `kernels` has the kernels between engines, `program` runs both, `refit` adds weights to stripped plans,
//! `kernel_cache` stores the kernels that TensorRT compiled when it first loaded a plan, `execute` runs one network
//! once, `timing` measures an engine, with synthetic inputs if necessary. `decode` chooses engines and feeds them.
//!
//! # Order of dropping
//!
//! A context is dropped before its engine, an engine before the runtime, the runtime before its logger, and all of them
//! before the CUDA context. An [`Engine`] holds the runtime, a runtime the CUDA context, and fields are declared in
//! that order, so memory is also released if construction fails halfway.

mod argmax;
mod engine;
mod error;
mod execute;
mod kernel_cache;
mod kernels;
mod loaded_plan;
mod program;
mod refit;
pub mod timing;

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

pub use super::cuda::{Buffer, Cuda, Event, Pinned, Rows, Stream};
pub use argmax::Argmax;
pub use engine::Engine;
pub use error::{Objection, ObjectionKind, RunError};
pub use execute::execute;
pub use loaded_plan::LoadedPlan;
pub use program::Program;

use super::cuda::driver::Driver;
use super::flavour;
use super::library::{Library, Version};
use super::log_capture::LogCapture;
use super::probe;
use crate::tensor::DType;
use kernels::Modules;

/// TensorRT's runtime on the first GPU.
pub struct Runtime {
    inner: RefCell<trtx::Runtime<'static>>,
    /// Declared after the runtime, which points to it.
    logger: Rc<trtx::Logger>,
    capture: LogCapture,
    /// Lapidary's kernels, loaded on demand.
    modules: Modules,
    cuda: Rc<Cuda>,
    version: Version,
}

impl Runtime {
    /// Refuses machines on which TensorRT would fail later and less clearly.
    pub fn new(library: &Library) -> Result<Rc<Self>, RunError> {
        let cuda = Cuda::open()?;
        let version = library.version();
        check(cuda.facts(), version)?;
        let capture = LogCapture::default();
        let start = |message: trtx::Error| RunError::Load {
            engine: "TensorRT itself".into(),
            message: capture.take_errors().unwrap_or_else(|| message.to_string()),
            free: cuda.memory().map_or(0, |(free, _)| free),
        };
        let logger = Rc::new(trtx::Logger::new(capture.clone()).map_err(start)?);
        // SAFETY: it is only given to the runtime, which is dropped before it: fields are dropped in order, and the `Rc` in the next
        // field keeps the logger where it is when the struct is moved.
        let forever: &'static trtx::Logger = unsafe { &*Rc::as_ptr(&logger) };
        let inner = RefCell::new(trtx::Runtime::new(forever).map_err(start)?);
        Ok(Rc::new(Runtime {
            inner,
            logger,
            capture,
            modules: Modules::new(&cuda)?,
            cuda,
            version,
        }))
    }

    /// Its CUDA context.
    pub fn cuda(&self) -> &Rc<Cuda> {
        &self.cuda
    }
    /// The version of the library.
    pub fn version(&self) -> Version {
        self.version
    }
    /// The GPU's name.
    pub fn gpu(&self) -> &str {
        &self.cuda.facts().gpus[0].name
    }

    fn own_words(&self, error: &trtx::Error) -> String {
        self.capture.take_errors().unwrap_or_else(|| error.to_string())
    }

    fn load_error(&self, engine: &str, error: &trtx::Error) -> RunError {
        RunError::Load {
            engine: engine.to_string(),
            message: self.own_words(error),
            free: self.cuda.memory().map_or(0, |(free, _)| free),
        }
    }

    /// TensorRT's check of a plan's header, if it has one; `tried`: deserializing it has failed.
    fn check(&self, plan: &[u8], tried: bool) -> Result<(), Objection> {
        flavour::judge(&self.inner.borrow(), plan, tried, self.version, self.cuda.facts())
    }
}

/// Refuses a driver that is too old, and a GPU that the library does not support.
fn check(driver: &Driver, version: Version) -> Result<(), RunError> {
    if !driver.runs_cuda(probe::OLDEST_CUDA) {
        return Err(RunError::DriverTooOld {
            driver: driver.driver_version.clone().unwrap_or_else(|| "here".into()),
            cuda: driver.cuda_version.clone(),
        });
    }
    let gpu = &driver.gpus[0];
    let ability = probe::runs_on(version, gpu.compute_capability);
    if !ability.possible {
        let reason = ability.note.unwrap_or_default();
        let gpu = gpu.name.clone();
        return Err(RunError::Gpu { version, gpu, reason });
    }
    Ok(())
}

/// How an engine is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Launch the network as one CUDA graph from its second run on. Worthwhile if shapes and addresses stay the same.
    pub graphs: bool,
    /// Folder of the kernel cache; `None` for no cache.
    pub kernels: Option<&'a Path>,
    /// Where the caches of a network's sequences are.
    pub caches: Caches,
}

/// How the caches of a network with attention kernels are bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Caches {
    /// Tensors `[batch, kv_heads, capacity, head_dim]`, as in the network.
    #[default]
    Tensors,
    /// Each sequence has its own caches, with any number of slots. The binding under the name of a cache is an array
    /// with a [`CachePlace`] per sequence. The network's attention layers must all be kernels.
    Tables,
}

/// Where one cache of one sequence is, `[kv_heads, capacity, head_dim]`. Kernels read it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct CachePlace {
    /// In device memory.
    pub address: u64,
    /// Number of slots. If 0, the sequence's rows are not written, and its address is not used.
    pub capacity: u64,
}

/// An input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// Its name in the network; a bound weight has the weight's name.
    pub name: String,
    /// TensorRT's type.
    pub dtype: DType,
    /// -1 where it depends on the call.
    pub shape: Vec<i64>,
    /// Whether it is an input.
    pub is_input: bool,
}

impl Port {
    /// Its size with `tokens` in place of dims that depend on the call.
    pub fn bytes(&self, tokens: usize) -> usize {
        let dim = |d: &i64| usize::try_from(*d).unwrap_or(tokens);
        self.dtype.byte_len(self.shape.iter().map(dim).product())
    }
}

/// Implemented by profilers: see [`Engine::profile`].
pub mod layer_times {
    pub use trtx::interfaces::ReportLayerTime;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::{FLAVOUR, Gpu};
    use crate::help::Help;

    fn driver(cuda: &str, name: &str, compute_capability: (u32, u32)) -> Driver {
        Driver {
            cuda_version: cuda.into(),
            driver_version: Some("470.82.01".into()),
            gpus: vec![Gpu {
                name: name.into(),
                compute_capability,
                memory_bytes: 1 << 34,
            }],
        }
    }

    #[test]
    fn machines_that_cannot_run_engines() {
        let version = FLAVOUR.headers;
        let fine = driver("12.4", "NVIDIA L4", (8, 9));
        assert!(check(&fine, version).is_ok());
        let error = check(&driver("11.4", "NVIDIA L4", (8, 9)), version).unwrap_err();
        assert!(matches!(error, RunError::DriverTooOld { .. }));
        let text = error.to_string();
        for part in ["470.82.01", "CUDA up to 11.4", "12.0 at least", FLAVOUR.product] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(error.help().unwrap().starts_with("update the driver"));
        // Both are named: the GPU and the library.
        let error = check(&driver("12.4", "Tesla P40", (6, 1)), version).unwrap_err();
        assert!(matches!(error, RunError::Gpu { .. }));
        let text = error.to_string();
        let library = format!("{} {version} does not run on Tesla P40", FLAVOUR.product);
        for part in [library.as_str(), "SM 6.1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(error.help().unwrap(), "run on the CPU with `--device cpu`");
    }
}
