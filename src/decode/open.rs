//! Selects the device that runs a package: the GPU, the CPU, or the first of them that can.

use std::path::Path;

use super::batch::{BatchDecoder, BatchDevice, BatchOptions, CpuBatchDevice};
use super::cpu::CpuDevice;
#[cfg(feature = "engines")]
use super::cuda::{CudaBatchDevice, CudaDevice, CudaOptions, OpenError};
use super::{Device, DeviceError, Embeddings, Session, SessionError};
use crate::backend::tensorrt::LibraryError;
#[cfg(feature = "engines")]
use crate::backend::tensorrt::run::RunError;
#[cfg(feature = "engines")]
use crate::backend::tensorrt::{FLAVOUR, Library};
use crate::graph::Graph;
use crate::help::{Fault, Help};
use crate::package::{Package, PackageError, RefitError};
use crate::weights::lora::Adapter;

/// Where a package runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum DeviceChoice {
    /// The GPU if there is one and the package has engines for it, else the CPU
    #[default]
    Auto,
    /// The CPU, whatever the package has engines for
    Cpu,
    /// The GPU, or an error that says why not
    Cuda,
}

/// Options of a session.
#[derive(Clone, Copy)]
pub struct SessionOptions<'a> {
    /// Where to run.
    pub device: DeviceChoice,
    /// Threads of the CPU executor; one per core if not given.
    pub threads: Option<usize>,
    /// The TensorRT library; searched for if not given.
    pub tensorrt_lib: Option<&'a Path>,
    /// Tokens of the prompt: engines for it are loaded in advance.
    pub prompt: usize,
    /// Maximum tokens of the whole text: engines for it are loaded in advance.
    pub total: usize,
    /// The only cache folder for kernels compiled at first load. For measurements.
    pub kernels: Option<&'a Path>,
    /// Launch engines layer by layer instead of as CUDA graphs. For measurements.
    pub no_graphs: bool,
    /// Called with the reason if [`DeviceChoice::Auto`] does not use an existing GPU.
    pub note: &'a dyn Fn(&str),
}

impl Default for SessionOptions<'_> {
    fn default() -> Self {
        SessionOptions {
            device: DeviceChoice::default(),
            threads: None,
            tensorrt_lib: None,
            prompt: 1,
            total: 1,
            kernels: None,
            no_graphs: false,
            note: &|_| (),
        }
    }
}

/// Why no session could be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionOpenError {
    /// The package is damaged, or was stripped of its weights.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// This Lapidary was compiled without TensorRT.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The package does not run on this GPU.
    #[cfg(feature = "engines")]
    #[error(transparent)]
    Cuda(#[from] OpenError),
    /// The device failed during initialization.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model takes only embeddings, and the package has none for its tokens.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The adapter does not fit the package, or changes quantized weights.
    #[error(transparent)]
    Adapter(#[from] Box<RefitError>),
    /// An adapter for a package that is to run on a GPU.
    #[error("adapters are served on the CPU only, so far")]
    AdapterOnGpu,
}

impl SessionOpenError {
    /// Whether this machine or package simply has no GPU or library to run on.
    fn is_absence(&self) -> bool {
        match self {
            SessionOpenError::Library(error) => matches!(error, LibraryError::NotCompiled),
            #[cfg(feature = "engines")]
            SessionOpenError::Cuda(error) => error.is_absence(),
            _ => false,
        }
    }

    /// Why an existing GPU is not used. A machine without one needs no message.
    fn surprise(&self) -> Option<String> {
        match self {
            #[cfg(feature = "engines")]
            SessionOpenError::Cuda(error @ OpenError::Run(RunError::Gpu { .. })) => Some(error.to_string()),
            _ => None,
        }
    }
}

impl Help for SessionOpenError {
    fn fault(&self) -> Fault {
        match self {
            SessionOpenError::Package(error) => error.fault(),
            SessionOpenError::Library(error) => error.fault(),
            #[cfg(feature = "engines")]
            SessionOpenError::Cuda(error) => error.fault(),
            SessionOpenError::Device(error) => error.fault(),
            SessionOpenError::Session(error) => error.fault(),
            SessionOpenError::Adapter(error) => error.fault(),
            SessionOpenError::AdapterOnGpu => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            SessionOpenError::Package(error) => error.help(),
            SessionOpenError::Library(error) => error.help(),
            #[cfg(feature = "engines")]
            SessionOpenError::Cuda(error) => error.help(),
            SessionOpenError::Device(error) => error.help(),
            SessionOpenError::Session(error) => error.help(),
            SessionOpenError::Adapter(error) => error.help(),
            SessionOpenError::AdapterOnGpu => {
                Some("use --device cpu, or make a package of it with `lapidary refit PKG --from PKG --lora DIR`".into())
            }
        }
    }
}

impl Session {
    /// A session of a package on the requested device.
    pub fn open(package: &Package, options: &SessionOptions<'_>) -> Result<Session, SessionOpenError> {
        choose(
            package,
            options,
            || on_cpu(package, options.threads),
            || on_gpu(package, options),
        )
    }
}

/// Opens a package on the requested device. With an automatic choice, a GPU that cannot run it is skipped.
fn choose<T>(
    package: &Package,
    options: &SessionOptions<'_>,
    cpu: impl FnOnce() -> Result<T, SessionOpenError>,
    gpu: impl FnOnce() -> Result<T, SessionOpenError>,
) -> Result<T, SessionOpenError> {
    match options.device {
        DeviceChoice::Cpu => cpu(),
        DeviceChoice::Cuda => gpu(),
        DeviceChoice::Auto if package.manifest.engines.is_empty() => cpu(),
        DeviceChoice::Auto => match gpu() {
            Err(refusal) if refusal.is_absence() => {
                if let Some(why) = refusal.surprise() {
                    (options.note)(&why);
                }
                cpu()
            }
            opened => opened,
        },
    }
}

impl BatchDecoder {
    /// Several sequences of a package at a time, on the requested device. On the GPU, without
    /// [`BatchOptions::cache_bytes`], caches may use nine tenths of the memory that is free once everything else is
    /// loaded.
    pub fn open(
        package: &Package,
        options: &SessionOptions<'_>,
        batch: BatchOptions,
    ) -> Result<BatchDecoder, SessionOpenError> {
        choose(
            package,
            options,
            || several_on_cpu(package, package.graph()?, options.threads, batch),
            || several_on_gpu(package, options, batch),
        )
    }

    /// On the CPU with an adapter merged into the weights that it changes ([`Package::adapted`]). Unchanged weights are
    /// shared with the package's other decoders.
    pub fn open_adapted(
        package: &Package,
        adapter: &Adapter,
        options: &SessionOptions<'_>,
        batch: BatchOptions,
    ) -> Result<BatchDecoder, SessionOpenError> {
        if options.device == DeviceChoice::Cuda {
            return Err(SessionOpenError::AdapterOnGpu);
        }
        if options.device == DeviceChoice::Auto && !package.manifest.engines.is_empty() {
            (options.note)("adapters are served there only, so far");
        }
        let adapted = package.adapted(adapter).map_err(Box::new)?;
        several_on_cpu(package, adapted.graph, options.threads, batch)
    }
}

#[cfg(feature = "engines")]
fn several_on_gpu(
    package: &Package,
    options: &SessionOptions<'_>,
    batch: BatchOptions,
) -> Result<BatchDecoder, SessionOpenError> {
    let (library, cuda) = library_and_options(package, options)?;
    let embeddings = match package.takes_embeddings() {
        true => table(package, &package.graph()?)?,
        false => None,
    };
    let device = CudaBatchDevice::open(package, &library, cuda, batch.chunk, embeddings)?;
    let free = device.free_memory()?;
    let batch = BatchOptions {
        cache_bytes: batch.cache_bytes.or(Some((free / 10 * 9) as usize)),
        ..batch
    };
    decoder(Box::new(device), package, batch)
}

#[cfg(not(feature = "engines"))]
fn several_on_gpu(_: &Package, _: &SessionOptions<'_>, _: BatchOptions) -> Result<BatchDecoder, SessionOpenError> {
    Err(LibraryError::NotCompiled.into())
}

fn decoder(
    device: Box<dyn BatchDevice>,
    package: &Package,
    batch: BatchOptions,
) -> Result<BatchDecoder, SessionOpenError> {
    let decoder = BatchDecoder::new(device, &package.manifest.capacities, package.vocabulary()?, batch);
    Ok(decoder.with_switch(switch(package)))
}

/// The embedding table of a model that takes embeddings, needed to feed tokens.
fn table(package: &Package, graph: &Graph) -> Result<Option<Embeddings>, SessionOpenError> {
    let embeddings = embeddings(package, graph)?;
    match &embeddings {
        Some(table) if table.tokens().is_none() => Err(SessionError::NoTable.into()),
        _ => Ok(embeddings),
    }
}

/// Several sequences of a package with this graph.
fn several_on_cpu(
    package: &Package,
    graph: Graph,
    threads: Option<usize>,
    batch: BatchOptions,
) -> Result<BatchDecoder, SessionOpenError> {
    let embeddings = table(package, &graph)?;
    let device = CpuBatchDevice::new(graph, package.vocabulary()?, threads, embeddings);
    decoder(Box::new(device), package, batch)
}

fn session(device: Box<dyn Device>, package: &Package, vocabulary: usize) -> Session {
    Session::new(device, &package.manifest.capacities, vocabulary).with_switch(switch(package))
}

/// See [`Session::with_switch`].
fn switch(package: &Package) -> Option<usize> {
    let rotary = package.manifest.architecture.rotary.as_ref();
    rotary.and_then(|rotary| rotary.longest_short_run)
}

fn embeddings(package: &Package, graph: &Graph) -> Result<Option<Embeddings>, PackageError> {
    Embeddings::of(graph).map_err(|error| PackageError::Manifest {
        path: package.folder.clone(),
        message: format!("its table of embeddings cannot be read: {error}"),
    })
}

fn on_cpu(package: &Package, threads: Option<usize>) -> Result<Session, SessionOpenError> {
    let graph = package.graph()?;
    let vocabulary = package.vocabulary()?;
    let embeddings = embeddings(package, &graph)?;
    let device = CpuDevice::new(graph, vocabulary, threads);
    Ok(session(Box::new(device), package, vocabulary).with_embeddings(embeddings))
}

#[cfg(feature = "engines")]
fn on_gpu(package: &Package, options: &SessionOptions<'_>) -> Result<Session, SessionOpenError> {
    let (library, cuda) = library_and_options(package, options)?;
    let mut device = CudaDevice::open(package, &library, cuda)?;
    device.prepare(options.prompt, options.total)?;
    let vocabulary = package.vocabulary()?;
    let embeddings = match package.takes_embeddings() {
        true => embeddings(package, &package.graph()?)?,
        false => None,
    };
    Ok(session(Box::new(device), package, vocabulary).with_embeddings(embeddings))
}

#[cfg(feature = "engines")]
fn library_and_options(package: &Package, options: &SessionOptions<'_>) -> Result<(Library, CudaOptions), OpenError> {
    // Checked before a library is required that would be of no use.
    let mut engines = package.manifest.engines.iter();
    if !engines.any(|entry| entry.target == FLAVOUR.target) {
        return Err(OpenError::NoEngines {
            package: package.folder.clone(),
        });
    }
    let library = Library::load(options.tensorrt_lib).map_err(|e| OpenError::Run(e.into()))?;
    let mut cuda = CudaOptions::of(package);
    cuda.graphs &= !options.no_graphs;
    if let Some(kernels) = options.kernels {
        cuda.kernels = Some(kernels.to_path_buf());
    }
    Ok((library, cuda))
}

#[cfg(not(feature = "engines"))]
fn on_gpu(_: &Package, _: &SessionOptions<'_>) -> Result<Session, SessionOpenError> {
    Err(LibraryError::NotCompiled.into())
}
