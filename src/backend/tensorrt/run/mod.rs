//! Engines that run: plans from disk to results in device memory.
//!
//! Takes plans that `build` made; gives [`Engine`]s over a [`Runtime`], whose inputs and outputs are bound by device
//! address. `cuda` holds the driver's objects, `refit` puts weights into engines that were built without, `kernels` keeps
//! what TensorRT compiled when it first loaded a plan, `execute` runs one network once. Which engines there are and what
//! is fed to them is `decode`'s business.
//!
//! # Order of death
//!
//! A context dies before its engine, an engine before the runtime, the runtime before its logger, and all of them before
//! the CUDA context. An [`Engine`] holds the runtime, a runtime the CUDA context, and fields are declared in that order;
//! so whatever is dropped half way gives its memory back.

mod argmax;
pub mod cuda;
mod error;
mod execute;
mod graph;
mod kernels;
mod refit;
pub mod trial;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use trtx::{DynamicShapesKernelSpecializationStrategy, ExecutionContextAllocationStrategy};

pub use argmax::Argmax;
pub use cuda::{Buffer, Cuda, Event, Pinned, Stream};
pub use error::RunError;
pub use execute::execute;

use super::capture::Capture;
use super::library::{Library, Version};
use super::probe;
use crate::network::{Network, WeightMode};
use crate::tensor::DType;
use graph::Graph;

/// TensorRT's runtime on the first GPU.
pub struct Runtime {
    inner: RefCell<trtx::Runtime<'static>>,
    // Behind the runtime, which points to it.
    _logger: Box<trtx::Logger>,
    capture: Capture,
    cuda: Rc<Cuda>,
    version: Version,
}

impl Runtime {
    /// Refuses machines on which TensorRT would fail later and less clearly.
    pub fn new(library: &Library) -> Result<Rc<Self>, RunError> {
        let cuda = Cuda::open()?;
        let (driver, version) = (cuda.facts(), library.version());
        let major = driver
            .cuda_version
            .split('.')
            .next()
            .and_then(|n| n.parse::<u32>().ok());
        if major.is_some_and(|major| major < 12) {
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
        let capture = Capture::default();
        let start = |message: trtx::Error| RunError::Load {
            engine: "TensorRT itself".into(),
            message: capture.take_errors().unwrap_or_else(|| message.to_string()),
            free: cuda.memory().map_or(0, |(free, _)| free),
        };
        let logger = Box::new(trtx::Logger::new(capture.clone()).map_err(start)?);
        // SAFETY: the box outlives the runtime: it is the next field of the same struct, and its place does not move.
        let forever: &'static trtx::Logger = unsafe { &*std::ptr::from_ref(&*logger) };
        let inner = RefCell::new(trtx::Runtime::new(forever).map_err(start)?);
        Ok(Rc::new(Runtime {
            inner,
            _logger: logger,
            capture,
            cuda,
            version,
        }))
    }

    pub fn cuda(&self) -> &Rc<Cuda> {
        &self.cuda
    }
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

    /// TensorRT's verdict on a plan's header. It calls every plan invalid on GPUs that are not on its list, though some
    /// run there (`probe::runs_on`), so that alone is no reason before the plan was tried.
    fn check(&self, plan: &[u8], tried: bool) -> Result<(), String> {
        use trtx::EngineInvalidityDiagnostics as Why;
        let runtime = self.inner.borrow();
        let (validity, why) = runtime.engine_validity(plan).map_err(|e| e.to_string())?;
        let valid = !matches!(validity, trtx::EngineValidity::kINVALID);
        if valid || !tried && why == Why::UNSUPPORTED_CC {
            return Ok(());
        }
        let facts = self.cuda.facts();
        let gpu = &facts.gpus[0];
        let (major, minor) = gpu.compute_capability;
        let reasons = [
            (
                Why::VERSION_MISMATCH,
                format!("another version than {} built it", self.version),
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
            true => Err("TensorRT calls it invalid".to_string()),
            false => Err(found.join(", and ")),
        }
    }
}

/// How an engine is made ready.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Launch the network as one CUDA graph from its second run on. Worth it where shapes and addresses stay.
    pub graphs: bool,
    /// Where compiled kernels are kept; `None` keeps none.
    pub kernels: Option<&'a Path>,
}

/// An input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    pub name: String,
    pub dtype: DType,
    /// -1 where it depends on the call.
    pub shape: Vec<i64>,
    pub is_input: bool,
}

impl Port {
    /// With `tokens` in place of what depends on the call.
    pub fn bytes(&self, tokens: usize) -> usize {
        let dim = |d: &i64| usize::try_from(*d).unwrap_or(tokens);
        self.shape.iter().map(dim).product::<usize>() * self.dtype.size()
    }
}

/// A plan that is ready to run, with a context of its own. Its working memory is the caller's ([`Engine::scratch_bytes`]),
/// so that engines that never run at once can share it.
pub struct Engine {
    context: trtx::ExecutionContext<'static>,
    inner: trtx::CudaEngine<'static>,
    kernels: Option<kernels::Kernels>,
    runtime: Rc<Runtime>,
    name: String,
    ports: Vec<Port>,
    scratch_bytes: usize,
    /// The addresses that the context was told.
    bound: HashMap<String, u64>,
    /// What dims that depend on the call are set to.
    tokens: usize,
    launch: Launch,
}

/// How the next run is queued.
enum Launch {
    /// Kernel by kernel, always.
    Kernels,
    /// Kernel by kernel this once, since TensorRT prepares things in its first run that must not be captured.
    First,
    /// Captured, then launched.
    Capture,
    /// Launched again.
    Again(Graph),
}

impl Engine {
    /// Deserialises the plan, refits it where its weights were stripped, and makes a context. `network` is the one that
    /// the plan was built from: the source of stripped weights. `path` is for messages and for the kernels' key.
    pub fn load(
        runtime: &Rc<Runtime>,
        path: &Path,
        plan: &[u8],
        network: &Network,
        options: LoadOptions<'_>,
    ) -> Result<Self, RunError> {
        let name = network.profile.to_string();
        let unusable = |reason: String| RunError::Plan {
            path: path.to_path_buf(),
            reason,
        };
        runtime.capture.take_errors();
        runtime.check(plan, false).map_err(unusable)?;
        let deserialized = runtime.inner.borrow_mut().deserialize_cuda_engine(plan);
        let mut inner = deserialized.map_err(|error| {
            let words = runtime.own_words(&error);
            unusable(match runtime.check(plan, true) {
                Ok(()) => words,
                Err(reason) => format!("{reason} ({words})"),
            })
        })?;
        let failed = |error: trtx::Error| runtime.load_error(&name, &error);
        if network.weights.iter().any(|w| w.mode == WeightMode::Strip) {
            refit::refit(runtime, &mut inner, network, &name)?;
        }

        let mut config = inner.create_runtime_config().map_err(failed)?;
        config.set_execution_context_allocation_strategy(ExecutionContextAllocationStrategy::kUSER_MANAGED);
        config.set_dynamic_shapes_kernel_specialization_strategy(DynamicShapesKernelSpecializationStrategy::kEAGER);
        let mut kept = None;
        if let Some(folder) = options.kernels {
            let cache = Arc::new(config.create_runtime_cache().map_err(failed)?);
            let kernels = kernels::Kernels::open(folder, plan, runtime, cache.clone());
            config.set_runtime_cache(cache).map_err(failed)?;
            kept = Some(kernels);
        }
        // The context keeps its configuration alive.
        let mut context = inner
            .create_execution_context_with_config(Rc::new(config))
            .map_err(failed)?;
        let ports = ports(&inner).map_err(failed)?;
        let is_static = ports.iter().all(|port| port.shape.iter().all(|d| *d >= 0));
        let scratch_bytes = if is_static {
            context.update_device_memory_size_for_shapes()
        } else {
            0
        };
        let mut engine = Engine {
            context,
            inner,
            kernels: kept,
            runtime: runtime.clone(),
            name,
            ports,
            scratch_bytes,
            bound: HashMap::new(),
            tokens: 1,
            launch: if options.graphs { Launch::First } else { Launch::Kernels },
        };
        engine.keep_kernels();
        Ok(engine)
    }

    /// The profile it was built for.
    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }
    pub fn port(&self, name: &str) -> Option<&Port> {
        self.ports.iter().find(|port| port.name == name)
    }
    /// Tokens that a dynamic engine is set to; 1 for a static one.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
    /// Working memory that a run needs, for the shapes set.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Writes what TensorRT compiled since the last call, if anything, for the next process.
    pub fn keep_kernels(&mut self) {
        if let Some(kernels) = &mut self.kernels {
            kernels.keep();
        }
    }

    /// Sets every dim that depends on the call to `tokens`, and learns the working memory that takes.
    pub fn set_tokens(&mut self, tokens: usize) -> Result<(), RunError> {
        for port in self
            .ports
            .iter()
            .filter(|p| p.is_input && p.shape.iter().any(|d| *d < 0))
        {
            let dims: Vec<i64> = port
                .shape
                .iter()
                .map(|d| if *d < 0 { tokens as i64 } else { *d })
                .collect();
            let dims = trtx::trtx_sys::Dims64::from_slice(&dims);
            let set = self.context.set_input_shape(&port.name, &dims);
            set.map_err(|error| self.runtime.load_error(&self.name, &error))?;
        }
        self.tokens = tokens;
        self.recapture();
        self.scratch_bytes = self.context.update_device_memory_size_for_shapes();
        Ok(())
    }

    /// What is bound changed: a captured graph holds what was before.
    fn recapture(&mut self) {
        if let Launch::Again(_) = self.launch {
            self.launch = Launch::Capture;
        }
    }

    fn tell(&mut self, name: &str, address: u64) -> Result<(), RunError> {
        // SAFETY: the promise of `bind`.
        let bound = unsafe { self.context.set_tensor_address(name, address as *mut std::ffi::c_void) };
        bound.map_err(|error| RunError::Mismatch {
            engine: self.name.clone(),
            reason: format!("{name}: {}", self.runtime.own_words(&error)),
        })
    }

    /// # Safety
    /// The buffer must live until the last run ended, and must not be used by another run at the same time.
    pub unsafe fn set_scratch(&mut self, scratch: &Buffer) {
        self.recapture();
        let address = scratch.address() as *mut std::ffi::c_void;
        // SAFETY: the caller's promise.
        unsafe { self.context.set_device_memory_v2(address, scratch.bytes() as i64) };
    }

    /// Binds inputs and outputs to device memory.
    ///
    /// # Safety
    /// The memory must hold the tensors (see [`Port::bytes`]) and live until the last run ended.
    pub unsafe fn bind<'n>(&mut self, ports: impl IntoIterator<Item = (&'n str, u64)>) -> Result<(), RunError> {
        for (name, address) in ports {
            if self.bound.insert(name.to_string(), address) != Some(address) {
                self.recapture();
                self.tell(name, address)?;
            }
        }
        Ok(())
    }

    /// Queues one run.
    pub fn enqueue(&mut self, stream: &Stream) -> Result<(), RunError> {
        match &self.launch {
            Launch::Again(graph) => return graph.launch(stream),
            Launch::Kernels => return self.enqueue_kernels(stream),
            Launch::First => {
                self.launch = Launch::Capture;
                return self.enqueue_kernels(stream);
            }
            Launch::Capture => {}
        }
        let cuda = self.runtime.cuda.clone();
        match Graph::capture(&cuda, stream, || self.enqueue_kernels(stream)) {
            Ok(graph) => {
                graph.launch(stream)?;
                self.launch = Launch::Again(graph);
                Ok(())
            }
            // TensorRT may have layers that cannot be captured: slower, but no error.
            Err(_) => {
                self.runtime.capture.take_errors();
                self.launch = Launch::Kernels;
                self.enqueue_kernels(stream)
            }
        }
    }

    /// Whether runs are launched as one CUDA graph by now.
    pub fn is_captured(&self) -> bool {
        matches!(self.launch, Launch::Again(_))
    }

    fn enqueue_kernels(&mut self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: the stream lives; addresses are live by the promise of `bind`.
        let queued = unsafe { self.context.enqueue_v3(stream.raw()) };
        queued.map_err(|error| RunError::Execute {
            engine: self.name.clone(),
            message: self.runtime.own_words(&error),
        })
    }

    /// Reports the time of each of TensorRT's layers after every run. CUDA graphs must be off; once for an engine.
    pub fn profile(&mut self, report: Box<dyn trtx::interfaces::ReportLayerTime>) -> Result<(), RunError> {
        let set = self.context.set_profiler(report);
        set.map_err(|error| self.runtime.load_error(&self.name, &error))
    }

    /// TensorRT's own description of its layers, as JSON.
    pub fn inspect(&self) -> Result<String, RunError> {
        let read = || -> Result<String, trtx::Error> {
            let inspector = self.inner.create_engine_inspector()?;
            inspector.engine_information(trtx::LayerInformationFormat::kJSON)
        };
        read().map_err(|error| self.runtime.load_error(&self.name, &error))
    }
}

fn ports(engine: &trtx::CudaEngine<'_>) -> Result<Vec<Port>, trtx::Error> {
    let mut ports = Vec::new();
    for i in 0..engine.nb_io_tensors()? {
        let name = engine.io_tensor_name(i)?;
        ports.push(Port {
            dtype: dtype(engine.tensor_data_type(&name)?)?,
            shape: engine.tensor_shape(&name)?,
            is_input: matches!(engine.tensor_io_mode(&name)?, trtx::TensorIOMode::kINPUT),
            name,
        });
    }
    Ok(ports)
}

fn dtype(data_type: trtx::DataType) -> Result<DType, trtx::Error> {
    use trtx::DataType as T;
    Ok(match data_type {
        T::kBOOL => DType::Bool,
        T::kUINT8 => DType::U8,
        T::kINT8 => DType::I8,
        T::kINT32 => DType::I32,
        T::kINT64 => DType::I64,
        T::kHALF => DType::F16,
        T::kBF16 => DType::Bf16,
        T::kFLOAT => DType::F32,
        other => {
            return Err(trtx::Error::InvalidArgument(format!(
                "an input or output of type {other:?}"
            )));
        }
    })
}

/// What a profiler implements: see [`Engine::profile`].
pub mod layer_times {
    pub use trtx::interfaces::ReportLayerTime;
}
