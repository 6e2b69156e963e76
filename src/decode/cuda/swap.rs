//! Replaces the weights of loaded engines, for a server that switches between fine-tuned models.
//!
//! Bound weights are bytes at addresses that every engine has, so they are overwritten and no engine changes. Stripped
//! engines are refitted in place. Engines that contain their weights cannot change; they are refused, like everything
//! that would make an engine's results differ from the other package's.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{CudaDevice, DeviceError};
use crate::backend::tensorrt::run::RunError;
use crate::help::{Fault, Help};
use crate::network::{Profile, WeightMode};
use crate::package::manifest::{EngineEntry, Manifest};
use crate::package::{Package, PackageError};

/// The device's weights, from the manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    architecture: String,
    weights: String,
}

impl Identity {
    pub fn of(manifest: &Manifest) -> Self {
        Identity {
            architecture: manifest.architecture_hash.clone(),
            weights: manifest.weights.set_hash.clone(),
        }
    }
}

/// Report of a swap, with times.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Swapped {
    /// Bytes of bound weights that went to the device.
    pub bytes: u64,
    /// Bound weights to the device.
    #[serde(serialize_with = "seconds")]
    pub bound: Duration,
    /// Plans that TensorRT refitted.
    pub refitted: usize,
    /// Refitting.
    #[serde(serialize_with = "seconds")]
    pub refit: Duration,
    /// New contexts for refitted plans.
    #[serde(serialize_with = "seconds")]
    pub contexts: Duration,
}

fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// Why the weights on the device are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The other package has another canonical graph.
    #[error("{}: another architecture than that of the engines in use", package.display())]
    Architecture {
        /// The folder of the other package.
        package: PathBuf,
    },
    /// An engine with embedded weights.
    #[error("{}: the engine {profile} contains its weights, so they cannot be changed", package.display())]
    Embedded {
        /// The folder of the other package.
        package: PathBuf,
        /// Profile of the engine.
        profile: Profile,
    },
    /// An engine stripped for an identical refit.
    #[error(
        "{}: the engine {profile} can be refitted with the weights it was built with and no others", package.display()
    )]
    Identical {
        /// The folder of the other package.
        package: PathBuf,
        /// Profile of the engine.
        profile: Profile,
    },
    /// The other package cannot be read.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The GPU failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Help for SwapError {
    fn fault(&self) -> Fault {
        match self {
            SwapError::Device(error) => error.fault(),
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            SwapError::Architecture { .. } => Some("open it as a separate package".to_string()),
            SwapError::Embedded { .. } => Some("convert with --weights bind, or strip and --refit general".to_string()),
            SwapError::Identical { .. } => Some("convert with --weights bind, or --refit general".to_string()),
            SwapError::Package(error) => error.help(),
            SwapError::Device(error) => error.help(),
        }
    }
}

/// Whether engines that run with `ours` can run with `theirs`.
fn check<'e>(
    ours: &Identity,
    theirs: &Identity,
    engines: impl IntoIterator<Item = &'e EngineEntry>,
    package: &Path,
) -> Result<(), SwapError> {
    let package = package.to_path_buf();
    if ours.architecture != theirs.architecture {
        return Err(SwapError::Architecture { package });
    }
    if ours.weights == theirs.weights {
        return Ok(());
    }
    for engine in engines {
        let profile = engine.profile;
        if engine.takes_only_its_own_weights() {
            return Err(SwapError::Identical { package, profile });
        }
        if engine.weight_mode == WeightMode::Embed {
            return Err(SwapError::Embedded { package, profile });
        }
    }
    Ok(())
}

impl CudaDevice {
    /// Switches to the weights of another package of the same architecture; this one's engines stay, loaded or not. The
    /// contents of the cache were computed with the old weights: start a new sequence. If the GPU fails halfway,
    /// everything is unloaded, and loaded again with the old weights on the next use.
    pub fn swap(&mut self, package: &Package) -> Result<Swapped, SwapError> {
        let theirs = Identity::of(&package.manifest);
        let engines = self.slots.iter().map(|slot| &slot.entry);
        check(&self.identity, &theirs, engines, &package.folder)?;
        let graph = package.graph()?;
        let ours = std::mem::replace(&mut self.graph, graph);
        match self.replace_weights() {
            Ok(done) => {
                self.identity = theirs;
                Ok(done)
            }
            Err(error) => {
                self.graph = ours;
                self.unload();
                self.weights = None;
                Err(error.into())
            }
        }
    }

    /// Writes the weights of `self.graph` over those of the previous graph.
    fn replace_weights(&mut self) -> Result<Swapped, DeviceError> {
        let mut done = Swapped::default();
        // No running work may read them.
        self.stream.wait().map_err(|error| self.failed(error))?;
        if let Some(weights) = &self.weights {
            let start = Instant::now();
            let networks = self.networks_by_lowering()?;
            let filled = weights.fill(self.runtime.cuda(), &self.stream, &networks);
            filled.map_err(|error| self.failed(error))?;
            done.bytes = weights.bytes() as u64;
            done.bound = start.elapsed();
        }
        let mut refitted = HashSet::new();
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            let Some(loaded) = &slot.loaded else { continue };
            if slot.entry.weight_mode == WeightMode::Bind {
                continue;
            }
            // Networks without bound weights run as one engine.
            let Some(engine) = loaded.program.engine() else {
                continue;
            };
            let (plan, network) = (engine.plan().clone(), self.lowered(slot)?);
            let start = Instant::now();
            if refitted.insert(slot.entry.file.clone()) {
                let result: Result<(), RunError> = plan.refit(&network);
                result.map_err(|error| self.failed(error))?;
            }
            done.refit += start.elapsed();
            // A captured graph, or the context itself, may keep the addresses of the old weights.
            let start = Instant::now();
            let loaded = self.context(at, &plan, &network)?;
            self.slots[at].loaded = Some(loaded);
            done.contexts += start.elapsed();
        }
        done.refitted = refitted.len();
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::FLAVOUR;
    use crate::target::Refit;

    fn engine(weight_mode: WeightMode, refit: Refit) -> EngineEntry {
        EngineEntry {
            file: String::new(),
            bytes: 0,
            blake3: String::new(),
            plans: None,
            target: FLAVOUR.target,
            profile: Profile::decode(16),
            built_as: None,
            optimization_profile: 0,
            weight_mode,
            refit,
            lowering: crate::lower::LowerOptions::default(),
            built_with: None,
            tensorrt_version: String::new(),
            build_ms: 0,
        }
    }

    fn identity(architecture: &str, weights: &str) -> Identity {
        Identity {
            architecture: architecture.to_string(),
            weights: weights.to_string(),
        }
    }

    /// The checks of loading for an engine of the device's own package.
    #[test]
    fn engines_that_take_only_their_own_weights_know_which() {
        let built_with = |own: Option<&str>, refit| EngineEntry {
            built_with: own.map(str::to_string),
            ..engine(WeightMode::Strip, refit)
        };
        assert!(built_with(Some("1"), Refit::Identical).takes("1"));
        assert!(!built_with(Some("1"), Refit::Identical).takes("2"));
        assert!(!built_with(Some("1"), Refit::None).takes("2"));
        assert!(built_with(Some("1"), Refit::General).takes("2"));
        // A package of an older version.
        assert!(built_with(None, Refit::Identical).takes("2"));
    }

    #[test]
    fn only_engines_that_can_take_other_weights_get_them() {
        let of = |theirs: &Identity, mode, refit| {
            let engines = [engine(WeightMode::Bind, Refit::None), engine(mode, refit)];
            check(&identity("a", "1"), theirs, &engines, Path::new("other"))
        };
        let (same, tune, other) = (identity("a", "1"), identity("a", "2"), identity("b", "2"));
        use WeightMode::{Bind, Embed, Strip};
        for (mode, refit) in [(Bind, Refit::None), (Bind, Refit::Identical), (Strip, Refit::General)] {
            assert!(of(&tune, mode, refit).is_ok(), "{mode:?} {refit:?}");
            assert!(matches!(of(&other, mode, refit), Err(SwapError::Architecture { .. })));
        }
        for (mode, refit) in [
            (Strip, Refit::None),
            (Strip, Refit::Identical),
            (Embed, Refit::None),
            (Embed, Refit::General),
        ] {
            assert!(of(&same, mode, refit).is_ok(), "the same weights fit everything");
            let error = of(&tune, mode, refit).unwrap_err();
            let message = error.to_string();
            assert!(message.starts_with("other: the engine b1-t1-c16"), "{message}");
            assert!(
                error.help().unwrap().starts_with("convert with --weights bind"),
                "{error:?}"
            );
            assert_eq!(matches!(error, SwapError::Identical { .. }), mode == Strip);
        }
    }
}
