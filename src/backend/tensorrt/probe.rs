//! What TensorRT can do on this machine, as data for `lapidary doctor`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::cuda::driver::{self, Driver};
use super::error::LibraryError;
use super::flavour::{FLAVOUR, Flavour};
use super::library::{Library, LibrarySource, Version};
use crate::help::Help;

/// The CUDA version that both TensorRTs need, or a later one.
pub(super) const OLDEST_CUDA: u32 = 12;

/// Facts about the machine, and their consequences. Serializes to the object that `doctor --json` prints.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ProbeReport {
    /// Whether this binary has the TensorRT back end.
    pub compiled: bool,
    /// Which TensorRT it is for: `TensorRT-RTX` or `TensorRT`.
    pub product: &'static str,
    /// The library in use.
    pub library: Option<LibraryFacts>,
    /// Why there is no usable library, with advice.
    pub library_problem: Option<String>,
    /// The CUDA driver and its GPUs.
    pub driver: Option<Driver>,
    /// Why there is no usable driver.
    pub driver_problem: Option<String>,
    /// Engines with bound or embedded weights.
    pub build: Ability,
    /// Engines with refittable or stripped weights.
    pub build_refittable: Ability,
    /// Whether TensorRT could load and run an engine on the first GPU.
    pub run: Ability,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LibraryFacts {
    pub path: PathBuf,
    pub version: String,
    pub source: LibrarySource,
}

/// An ability of this machine, or why it is missing and what to do.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Ability {
    /// Whether it works.
    pub possible: bool,
    /// The reason, or a note.
    pub note: Option<String>,
}

impl Ability {
    fn yes() -> Self {
        Ability {
            possible: true,
            note: None,
        }
    }
    fn no(note: impl Into<String>) -> Self {
        Ability {
            possible: false,
            note: Some(note.into()),
        }
    }
    fn yes_but(note: impl Into<String>) -> Self {
        Ability {
            possible: true,
            note: Some(note.into()),
        }
    }
}

/// Examines the machine. `explicit` is `--tensorrt-lib`. Loads the library and the driver but starts neither.
pub fn probe(explicit: Option<&Path>) -> ProbeReport {
    let library = Library::load(explicit);
    let driver = driver::driver();
    let with_help = |error: &LibraryError| match error.help() {
        Some(help) => format!("{error}; {help}"),
        None => error.to_string(),
    };

    let build = match (&library, &driver) {
        (Err(error), _) => Ability::no(with_help(error)),
        (Ok(_), Err(error)) if !FLAVOUR.builds_without_gpu => Ability::no(error.to_string()),
        (Ok(_), _) => Ability::yes(),
    };
    let build_refittable = match (&library, &driver) {
        (Err(error), _) => Ability::no(with_help(error)),
        (Ok(_), Err(error)) => Ability::no(format!(
            "{error}; bound weights (`--weights bind`) need none and can be exchanged as well"
        )),
        (Ok(_), Ok(_)) => Ability::yes(),
    };
    let run = match (&library, &driver) {
        (Err(error), _) => Ability::no(with_help(error)),
        (Ok(_), Err(error)) => Ability::no(format!("{error}; the CPU executor runs every package")),
        (Ok(_), Ok(driver)) if !driver.runs_cuda(OLDEST_CUDA) => Ability::no(format!(
            "the NVIDIA driver runs CUDA up to {}, {} needs {OLDEST_CUDA}.0 at least; update the driver",
            driver.cuda_version, FLAVOUR.product
        )),
        (Ok(library), Ok(driver)) => runs_on(library.version(), driver.gpus[0].compute_capability),
    };
    ProbeReport {
        compiled: cfg!(feature = "engines"),
        product: FLAVOUR.product,
        library_problem: library.as_ref().err().map(with_help),
        library: library.ok().map(|library| LibraryFacts {
            path: library.path().to_path_buf(),
            version: library.version().to_string(),
            source: library.source(),
        }),
        driver_problem: driver.as_ref().err().map(ToString::to_string),
        driver: driver.ok(),
        build,
        build_refittable,
        run,
    }
}

/// Whether a library of this version runs on a GPU of this compute capability.
pub(super) fn runs_on(version: Version, compute_capability: (u32, u32)) -> Ability {
    runs_on_with(&FLAVOUR, version, compute_capability)
}

/// By the list in the library's headers, if there is one, and by tests on other GPUs.
fn runs_on_with(flavour: &Flavour, version: Version, compute_capability: (u32, u32)) -> Ability {
    let ((major, minor), product) = (compute_capability, flavour.product);
    if compute_capability < flavour.oldest_gpu {
        let (oldest, minor_of_oldest) = flavour.oldest_gpu;
        return Ability::no(format!(
            "SM {major}.{minor} is older than SM {oldest}.{minor_of_oldest}, the oldest that {product} supports"
        ));
    }
    let Some(listed) = flavour.listed_gpus else {
        return Ability::yes();
    };
    if listed.contains(&compute_capability) {
        return Ability::yes();
    }
    let gpu = format!("SM {major}.{minor} is not on {product}'s list");
    // Measured on an H200: 1.4 to 1.6 run, 1.7 refuses to deserialize.
    match (major, version.minor) {
        (9, ..=6) => Ability::yes_but(format!("{gpu}, but version {version} runs on Hopper")),
        (9, _) => Ability::no(format!(
            "{gpu} and version {version} refuses it; install tensorrt-rtx-cu12-libs==1.6.1.120"
        )),
        _ => Ability::no(gpu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::flavour::{ENTERPRISE, RTX};

    #[test]
    fn gpus_on_the_list_and_off_it() {
        let on = |encoded, gpu| runs_on_with(&RTX, Version::from_encoded(encoded), gpu);
        assert_eq!(on(10601, (8, 9)), Ability::yes());
        assert!(on(10601, (9, 0)).note.is_some_and(|n| n.contains("Hopper")));
        let refused = on(10701, (9, 0));
        assert!(!refused.possible);
        assert!(
            refused
                .note
                .is_some_and(|n| n.contains("tensorrt-rtx-cu12-libs==1.6.1.120"))
        );
        // Unknown, and older than the oldest.
        assert_eq!(on(10601, (10, 0)), Ability::no("SM 10.0 is not on TensorRT-RTX's list"));
        assert_eq!(
            on(10601, (6, 1)),
            Ability::no("SM 6.1 is older than SM 7.5, the oldest that TensorRT-RTX supports")
        );
        let full = |gpu| runs_on_with(&ENTERPRISE, Version::from_encoded(110_400), gpu);
        assert_eq!(full((9, 0)), Ability::yes());
        assert!(!full((7, 0)).possible);
    }
}
