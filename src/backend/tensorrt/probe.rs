//! What TensorRT can do on this machine, as data for `lapidary doctor`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::driver::{self, Driver};
use super::library::{Library, Source, Version};

/// The facts, and what follows from them. Serialises to the object that `doctor --json` prints.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// Whether this binary has the TensorRT back end at all.
    pub compiled: bool,
    pub library: Option<LibraryFacts>,
    /// Why there is no library to use, with what to do.
    pub library_problem: Option<String>,
    pub driver: Option<Driver>,
    pub driver_problem: Option<String>,
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
    pub source: Source,
}

/// Something that works here, or why not and what to do about it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Ability {
    pub possible: bool,
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

/// Looks at the machine. `explicit` is `--tensorrt-lib`. Loads the library and the driver but starts neither.
pub fn probe(explicit: Option<&Path>) -> Report {
    let library = Library::load(explicit);
    let driver = driver::driver();
    let problem_of = |error: &dyn std::fmt::Display| error.to_string();

    let build = match &library {
        Ok(_) => Ability::yes(),
        Err(error) => Ability::no(error.to_string()),
    };
    let build_refittable = match (&library, &driver) {
        (Err(error), _) => Ability::no(error.to_string()),
        (Ok(_), Err(error)) => Ability::no(format!(
            "{error}; bound weights (`--weights bind`) need none and can be exchanged as well"
        )),
        (Ok(_), Ok(_)) => Ability::yes(),
    };
    let run = match (&library, &driver) {
        (Err(error), _) => Ability::no(error.to_string()),
        (Ok(_), Err(error)) => Ability::no(format!("{error}; the CPU executor runs every package")),
        (Ok(library), Ok(driver)) => runs_on(library.version(), driver.gpus[0].compute_capability),
    };
    Report {
        compiled: cfg!(feature = "tensorrt-rtx"),
        library_problem: library.as_ref().err().map(|e| problem_of(e)),
        library: library.ok().map(|library| LibraryFacts {
            path: library.path().to_path_buf(),
            version: library.version().to_string(),
            source: library.source(),
        }),
        driver_problem: driver.as_ref().err().map(|e| problem_of(e)),
        driver: driver.ok(),
        build,
        build_refittable,
        run,
    }
}

/// GPUs on TensorRT-RTX's list (the `ComputeCapability` enum of its headers), and what was measured of the others.
pub(super) fn runs_on(version: Version, (major, minor): (u32, u32)) -> Ability {
    const LISTED: [(u32, u32); 6] = [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)];
    if LISTED.contains(&(major, minor)) {
        return Ability::yes();
    }
    let gpu = format!("SM {major}.{minor} is not on TensorRT-RTX's list");
    // Measured on an H200: 1.4 to 1.6 run, 1.7 refuses to deserialise.
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

    #[test]
    fn hopper_runs_up_to_1_6() {
        let v = Version::from_encoded;
        assert!(runs_on(v(10601), (8, 9)).possible);
        assert!(runs_on(v(10601), (9, 0)).note.is_some_and(|n| n.contains("Hopper")));
        assert!(!runs_on(v(10701), (9, 0)).possible);
        assert!(!runs_on(v(10601), (6, 1)).possible);
    }
}
