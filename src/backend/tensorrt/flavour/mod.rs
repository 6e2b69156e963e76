//! TensorRT-RTX or full ("enterprise") TensorRT: all differences.
//!
//! They share an API and nearly all semantics, but the binding is compiled against one set of headers, so a binary is
//! for one of them: the cargo feature `tensorrt-rtx` makes it RTX, `tensorrt` full TensorRT, and if both are on (cargo
//! merges features), `tensorrt` wins. Everything else in the crate asks [`FLAVOUR`] or calls the functions here.
//!
//! | | TensorRT-RTX | full TensorRT |
//! |---|---|---|
//! | library | `libtensorrt_rtx.so.1`, headers 1.6 | `libnvinfer.so.11`, headers 11.4 |
//! | builds without a GPU | yes, unless weights are stripped or refittable | never: it times kernels |
//! | a plan runs on | every GPU of the library's list | the kind of GPU that it was built on |
//! | kernels compiled at first load | yes, kept in a runtime cache | no, they are in the plan |
//! | reports errors in a plan's header | `getEngineValidity` | no; deserializing reports them |
//!
//! Both agree in these points: networks are strongly typed without a flag, TF32 is a builder flag that is on by
//! default, refit and strip flags have the same names, and Lapidary captures CUDA graphs itself.
//! `docs/explanation/tensorrt-notes.md` lists the parts of full TensorRT that were never run.

use super::error::LibraryError;
use super::library::Version;
use crate::target::Target;

#[cfg(feature = "tensorrt")]
mod enterprise;
#[cfg(all(feature = "engines", not(feature = "tensorrt")))]
mod rtx;

#[cfg(feature = "tensorrt")]
pub(super) use enterprise::{KernelStore, configure, judge};
#[cfg(all(feature = "engines", not(feature = "tensorrt")))]
pub(super) use rtx::{KernelStore, configure, judge};

/// Properties of a TensorRT before its library is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flavour {
    /// The name of its engines in specs and manifests.
    pub target: Target,
    /// Its display name.
    pub product: &'static str,
    /// The cargo feature, which is also the `--target` of its engines.
    pub feature: &'static str,
    /// Names of the library's file, most likely first: as shipped in packages, and as requested from the loader.
    pub libraries: &'static [&'static str],
    /// The environment variable that gives the library's path.
    pub variable: &'static str,
    /// The Python package that holds the library.
    pub python_package: &'static str,
    /// How to get one, for messages.
    pub install: &'static str,
    /// The headers this is compiled against. The API is append-only, so newer libraries of the same major version work.
    pub headers: Version,
    /// Whether engines can be built on a machine without a GPU.
    pub builds_without_gpu: bool,
    /// What to do if engines cannot be built without a GPU.
    pub without_gpu: &'static str,
    /// Compute capabilities that the headers list; `None`: they list none, and everything from the oldest on is
    /// accepted.
    pub listed_gpus: Option<&'static [(u32, u32)]>,
    /// The oldest GPUs that it runs on.
    pub oldest_gpu: (u32, u32),
}

/// TensorRT-RTX.
pub const RTX: Flavour = Flavour {
    target: Target::TensorrtRtx,
    product: "TensorRT-RTX",
    feature: "tensorrt-rtx",
    libraries: if cfg!(windows) {
        &["tensorrt_rtx_1_6.dll"]
    } else {
        &["libtensorrt_rtx.so.1"]
    },
    variable: "TENSORRT_RTX_LIB",
    python_package: "tensorrt_rtx_libs",
    install: "`pip install tensorrt-rtx-cu12-libs==1.6.1.120`",
    headers: Version {
        major: 1,
        minor: 6,
        patch: 0,
    },
    builds_without_gpu: true,
    without_gpu: "take `--weights bind` (engines without weights that build anywhere) or `--weights embed` with \
                  `--refit none`",
    // The `ComputeCapability` enum of its headers.
    listed_gpus: Some(&[(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]),
    oldest_gpu: (7, 5),
};

/// Full TensorRT.
pub const ENTERPRISE: Flavour = Flavour {
    target: Target::Tensorrt,
    product: "TensorRT",
    feature: "tensorrt",
    libraries: if cfg!(windows) {
        &["nvinfer_11.dll", "nvinfer.dll"]
    } else {
        &["libnvinfer.so.11", "libnvinfer.so"]
    },
    variable: "TENSORRT_LIB",
    python_package: "tensorrt_libs",
    install: "TensorRT 11.4 from https://developer.nvidia.com/tensorrt",
    headers: Version {
        major: 11,
        minor: 4,
        patch: 0,
    },
    builds_without_gpu: false,
    without_gpu: "take `--target tensorrt-rtx` with a lapidary compiled for it, which builds anywhere",
    listed_gpus: None,
    // NVIDIA's support matrix: from Turing on.
    oldest_gpu: (7, 5),
};

impl Flavour {
    /// The TensorRT of a target; `None` for the CPU.
    pub fn of(target: Target) -> Option<&'static Flavour> {
        match target {
            Target::Cpu => None,
            Target::TensorrtRtx => Some(&RTX),
            Target::Tensorrt => Some(&ENTERPRISE),
        }
    }

    /// Refuses a target that this binary was not compiled for.
    pub fn check(&'static self) -> Result<(), LibraryError> {
        if cfg!(not(feature = "engines")) {
            return Err(LibraryError::NotCompiled);
        }
        match self.target == FLAVOUR.target {
            true => Ok(()),
            false => Err(LibraryError::OtherFlavour { asked: self }),
        }
    }
}

/// The TensorRT that this binary was compiled for; without either feature, the default one.
pub const FLAVOUR: Flavour = if cfg!(feature = "tensorrt") { ENTERPRISE } else { RTX };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_takes_its_own_library_and_never_the_others() {
        let supported = |flavour: Flavour, encoded| Version::from_encoded(encoded).is_supported_by(&flavour);
        for (encoded, rtx, enterprise) in [
            (10601, true, false),
            (10701, true, false),
            (10500, false, false), // older than the headers
            (20_000, false, false),
            (100_300, false, false), // TensorRT 10.3
            (110_200, false, false), // older than the headers
            (110_400, false, true),
            (110_501, false, true),
            (120_000, false, false),
        ] {
            let version = Version::from_encoded(encoded);
            assert_eq!(supported(RTX, encoded), rtx, "{version}");
            assert_eq!(supported(ENTERPRISE, encoded), enterprise, "{version}");
        }
    }

    #[test]
    fn the_features_decide() {
        let compiled = if cfg!(feature = "tensorrt") {
            Target::Tensorrt
        } else {
            Target::TensorrtRtx
        };
        assert_eq!(FLAVOUR.target, compiled);
    }
}
