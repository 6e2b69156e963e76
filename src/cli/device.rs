//! Where a package runs: the choice of `--device`, and the session it opens.

use std::path::{Path, PathBuf};

use super::Failure;
use crate::decode::Session;
use crate::decode::cpu::CpuDevice;
use crate::package::Package;

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Device {
    /// The GPU if there is one and the package has engines for it, else the CPU
    Auto,
    Cpu,
    Cuda,
}

/// The flags that say where a package runs.
#[derive(clap::Args, Clone, Debug)]
pub struct Place {
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Threads of the CPU executor [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// The TensorRT library to run engines with
    #[arg(long, value_name = "PATH")]
    tensorrt_lib: Option<PathBuf>,
}

impl Place {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}

/// What a session is opened for.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "engines"), expect(dead_code, reason = "the CPU needs less to know"))]
pub struct Wish<'a> {
    pub place: &'a Place,
    /// Tokens of the prompt, and of the whole text at most: engines for these are loaded ahead.
    pub prompt: usize,
    pub total: usize,
    /// What only measurements ask for.
    pub unusual: Unusual<'a>,
}

/// Ways to run that no user wants, but that show what the usual ones are worth.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(
    not(feature = "engines"),
    allow(dead_code, reason = "only engines can run in other ways")
)]
pub struct Unusual<'a> {
    /// Kernels compiled at first load are looked for, and kept, in this folder alone.
    pub kernels: Option<&'a Path>,
    /// Launch engines layer by layer.
    pub no_graphs: bool,
}

/// A session on the device asked for.
pub fn open(package: &Package, wish: Wish<'_>) -> Result<Session, Failure> {
    match wish.place.device {
        Device::Cpu => open_cpu(package, wish.place.threads()),
        Device::Cuda => open_cuda(package, wish).map_err(Failure::from),
        Device::Auto if package.manifest.engines.is_empty() => open_cpu(package, wish.place.threads()),
        Device::Auto => match open_cuda(package, wish) {
            Ok(session) => Ok(session),
            Err(refusal) if refusal.is_absence() => {
                if let Some(why) = refusal.surprise() {
                    eprintln!("note: running on the CPU: {why}");
                }
                open_cpu(package, wish.place.threads())
            }
            Err(refusal) => Err(refusal.into()),
        },
    }
}

/// A session on the CPU for a package.
pub fn open_cpu(package: &Package, threads: Option<usize>) -> Result<Session, Failure> {
    let graph = package.graph()?;
    let vocabulary = package.vocabulary()?;
    let device = CpuDevice::new(graph, vocabulary, threads);
    Ok(Session::new(Box::new(device), &package.manifest.capacities, vocabulary))
}

#[cfg(feature = "engines")]
use cuda::open_cuda;

#[cfg(feature = "engines")]
mod cuda {
    use super::*;
    use crate::backend::tensorrt::Library;
    use crate::backend::tensorrt::run::RunError;
    use crate::decode::DeviceError;
    use crate::decode::cuda::{CudaDevice, CudaOptions, OpenError};

    pub enum Refusal {
        Open(OpenError),
        Device(DeviceError),
    }

    impl Refusal {
        pub fn is_absence(&self) -> bool {
            matches!(self, Refusal::Open(error) if error.is_absence())
        }

        /// Why the GPU that is here is not used. A machine that has none is no surprise.
        pub fn surprise(&self) -> Option<String> {
            match self {
                Refusal::Open(error @ OpenError::Run(RunError::Gpu { .. })) => Some(error.to_string()),
                _ => None,
            }
        }
    }

    impl From<Refusal> for Failure {
        fn from(refusal: Refusal) -> Self {
            match refusal {
                Refusal::Open(OpenError::Graph(error)) => error.into(),
                Refusal::Open(OpenError::Package(error)) => error.into(),
                Refusal::Open(error) => Failure::helped(&error, error.help()),
                Refusal::Device(error) => error.into(),
            }
        }
    }

    pub fn open_cuda(package: &Package, wish: Wish<'_>) -> Result<Session, Refusal> {
        let library =
            Library::load(wish.place.tensorrt_lib.as_deref()).map_err(|e| Refusal::Open(RunError::from(e).into()))?;
        let mut options = CudaOptions::of(package);
        options.graphs &= !wish.unusual.no_graphs;
        if let Some(kernels) = wish.unusual.kernels {
            options.kernels = Some(kernels.to_path_buf());
        }
        let device = CudaDevice::open(package, &library, options);
        let mut device = device.map_err(Refusal::Open)?;
        device.prepare(wish.prompt, wish.total).map_err(Refusal::Device)?;
        let vocabulary = package.vocabulary().map_err(|e| Refusal::Open(e.into()))?;
        Ok(Session::new(Box::new(device), &package.manifest.capacities, vocabulary))
    }
}

#[cfg(not(feature = "engines"))]
struct Refusal;

#[cfg(not(feature = "engines"))]
impl Refusal {
    fn is_absence(&self) -> bool {
        true
    }

    fn surprise(&self) -> Option<String> {
        None
    }
}

#[cfg(not(feature = "engines"))]
impl From<Refusal> for Failure {
    fn from(_: Refusal) -> Self {
        Failure::from(crate::backend::tensorrt::LibraryError::NotCompiled)
    }
}

#[cfg(not(feature = "engines"))]
fn open_cuda(_: &Package, _: Wish<'_>) -> Result<Session, Refusal> {
    Err(Refusal)
}
