//! TensorRT engines from a [`Network`].
//!
//! Owns everything that is specific to TensorRT: finding and checking its library, the order in which its objects are
//! dropped, shape tensors for symbolic extents, optimization profiles, refit marks, its error text. No other module
//! depends on these. Input: a network from `lower`. Output: a [`Plan`], the bytes of a serialized engine. With
//! TensorRT-RTX no GPU and no driver are needed, except for weights that can be refitted. `run` loads plans and runs
//! them. A binary is for TensorRT-RTX or for full TensorRT; `flavour` has their differences.
//!
//! ```no_run
//! use lapidary::backend::tensorrt::{self, BuildOptions, Library};
//! # fn network() -> lapidary::network::Network { unimplemented!() }
//! let library = Library::load(None)?;
//! let plan = tensorrt::build(&library, &network(), &BuildOptions::default())?;
//! std::fs::write("engine.plan", &plan)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How a network becomes an engine
//!
//! - Inputs and outputs keep the network's names. A bound weight ([`WeightMode::Bind`]) becomes an input of the weight's
//!   own name, whatever the tensor is called; its bytes are never read. A cache and its update are two names for one
//!   address ([`Network::aliases`]).
//! - Dims that contain the symbol `tokens` are -1, with one optimization profile from [`Tokens::Dynamic`], or two
//!   ([`BuildOptions::decode_profile`]).
//! - Embedded weights are in the plan; TensorRT reads them from the mapped file, and needs about twice their size in
//!   addition while it builds.
//! - After every layer TensorRT's inferred type and shape are compared with the network's, so a wrong lowering fails at
//!   its own layer, by name.
//!
//! With the cargo features `tensorrt-rtx` and `tensorrt` off, everything here still exists and returns
//! [`LibraryError::NotCompiled`].

mod cuda;
mod error;
pub mod flavour;
mod library;
mod observer;
mod probe;

#[cfg(feature = "engines")]
mod builder;
#[cfg(feature = "engines")]
mod emit;
#[cfg(feature = "engines")]
mod log_capture;
#[cfg(feature = "engines")]
pub mod run;

use std::sync::Arc;
use std::time::Duration;

pub use cuda::driver::{Driver, DriverError, Gpu};
pub use error::{EngineBuildError, LayerContext, LibraryError};
pub use flavour::{FLAVOUR, Flavour};
pub use library::{Library, LibrarySource, Version, compute_in_full_precision};
pub use observer::{BuildObserver, BuildProgress};
pub use probe::{Ability, ProbeReport, probe};

use crate::network::Network;
use crate::network::segments::Steps;
#[cfg(doc)]
use crate::network::{Tokens, WeightMode};
use crate::target::Refit;

/// Hash of the sources that turn a network into a plan (`build.rs`), for plan caches.
pub const EMITTER: &str = env!("LAPIDARY_EMITTER");

/// Build options.
#[derive(Clone, Default)]
pub struct BuildOptions {
    /// Which weights can be replaced later.
    pub refit: Refit,
    /// A dynamic network gets an additional first optimization profile of one token, so that one engine decodes and
    /// prefills. Not for refittable engines, for which TensorRT-RTX allows one profile.
    pub decode_profile: bool,
    /// Called with progress; may cancel.
    pub observer: Option<Arc<dyn BuildObserver>>,
}

#[cfg(feature = "engines")]
type PlanMemory = trtx::host_memory::HostMemory<'static>;
#[cfg(not(feature = "engines"))]
type PlanMemory = Vec<u8>;

/// A serialized engine, in memory that TensorRT allocated: writing it to a file makes no second copy.
pub struct Plan {
    memory: PlanMemory,
    elapsed: Duration,
    warnings: Vec<String>,
}

impl Plan {
    /// The serialized engine.
    pub fn bytes(&self) -> &[u8] {
        self.memory.as_ref()
    }
    /// Wall-clock time of the build.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }
    /// TensorRT's warnings.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl AsRef<[u8]> for Plan {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Plan({} bytes in {:.2?})", self.bytes().len(), self.elapsed)
    }
}

/// Builds the engine of a network. Blocks; takes from 20 ms for a few layers to tens of seconds.
///
/// With TensorRT-RTX needs no GPU unless a weight is [`WeightMode::Strip`] or `options.refit` is set while a weight is
/// embedded. Several threads may build at once.
pub fn build(library: &Library, network: &Network, options: &BuildOptions) -> Result<Plan, EngineBuildError> {
    #[cfg(feature = "engines")]
    return builder::build(library, network, options);
    #[cfg(not(feature = "engines"))]
    {
        // A Library cannot exist without the feature: only `load` creates one.
        let _ = (library, network, options);
        Err(LibraryError::NotCompiled.into())
    }
}

/// Builds the engines of a network: one engine, or with Lapidary's own layers one per distinct segment between them, in
/// the order of [`Steps::plans`]. Empty if kernels compute everything.
pub fn build_all(library: &Library, network: &Network, options: &BuildOptions) -> Result<Vec<Plan>, EngineBuildError> {
    if !network.has_kernel_layers() {
        return Ok(vec![build(library, network, options)?]);
    }
    let steps = Steps::of(network);
    let plans = steps.plans().into_iter();
    plans.map(|part| build(library, part, options)).collect()
}
