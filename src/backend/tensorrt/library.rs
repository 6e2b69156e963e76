//! Finds the TensorRT library and checks its version before anything else uses it.
//!
//! The binding calls a C++ interface by virtual-table offset: against a library older than its headers that is
//! undefined behavior (TensorRT-RTX 1.5: a segmentation fault). So the library is opened here first, its version is
//! queried through a plain C function, and only then is it passed to the binding.

use std::fmt;
use std::path::{Path, PathBuf};

use super::cuda::driver;
use super::error::LibraryError;
use super::flavour::{FLAVOUR, Flavour};

/// A version as `getInferLibVersion` encodes it: `major * 10000 + minor * 100 + patch`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize, serde::Deserialize)]
pub struct Version {
    /// The binding supports one major version.
    pub major: u32,
    /// Later versions include earlier ones.
    pub minor: u32,
    /// Fixes.
    pub patch: u32,
}

impl Version {
    /// From what `getInferLibVersion` returns.
    pub fn from_encoded(encoded: i32) -> Self {
        let encoded = encoded.unsigned_abs();
        Version {
            major: encoded / 10_000,
            minor: encoded / 100 % 100,
            patch: encoded % 100,
        }
    }

    /// Whether the binding may call a library of this version. RTX (1.x) and full TensorRT (10, 11 …) have different
    /// major versions, so they cannot be confused.
    pub fn is_supported_by(self, flavour: &Flavour) -> bool {
        self >= flavour.headers && self.major == flavour.headers.major
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// How a library was found, in the order of the search.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LibrarySource {
    /// `--tensorrt-lib`.
    Flag,
    /// `TENSORRT_RTX_LIB`, or `TENSORRT_LIB` for full TensorRT.
    Environment,
    /// The Python package `tensorrt_rtx_libs`, which the `tensorrt-rtx-cu12-libs` and `-cu13-libs` wheels install, or
    /// `tensorrt_libs`.
    PythonPackage,
    /// The dynamic loader's search path.
    Loader,
}

impl fmt::Display for LibrarySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LibrarySource::Flag => "--tensorrt-lib",
            LibrarySource::Environment => FLAVOUR.variable,
            LibrarySource::PythonPackage => return write!(f, "the Python package {}", FLAVOUR.python_package),
            LibrarySource::Loader => "the loader's path",
        })
    }
}

/// A variable that CUDA's libraries read when they are loaded. TensorRT-RTX 1.6.1 computes fp32 products in TF32
/// (errors of 1e-3) regardless of the builder's flag, but obeys this variable: "0" means fp32.
const TF32: &str = "NVIDIA_TF32_OVERRIDE";

/// Makes TensorRT compute fp32 products in fp32, by an environment variable that it reads when its library is loaded.
/// An existing value is kept. A program calls this first, or is started with `NVIDIA_TF32_OVERRIDE=0`; without either,
/// [`Plan::warnings`](super::Plan::warnings) says that products may be TF32.
///
/// # Safety
/// No other thread may be running: it could read the environment meanwhile, in C code without a lock.
pub unsafe fn compute_in_full_precision() {
    if std::env::var_os(TF32).is_none() {
        // SAFETY: this function's own contract.
        unsafe { std::env::set_var(TF32, "0") };
    }
}

/// Whether fp32 products may be TF32.
#[cfg(feature = "engines")]
pub(super) fn may_use_tf32() -> bool {
    std::env::var_os(TF32).is_none_or(|value| value != "0")
}

/// A TensorRT library of a suitable version, loaded for the lifetime of the process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Library {
    path: PathBuf,
    source: LibrarySource,
    version: Version,
}

impl Library {
    /// Finds, checks and loads the library: `explicit` (the flag `--tensorrt-lib`), then the environment variable, then an
    /// installed Python package, then the loader's path; names are those of [`FLAVOUR`].
    ///
    /// A path given by flag or environment is used or refused, never skipped. A process loads one library: requesting
    /// the same one again is free, requesting another is an error.
    pub fn load(explicit: Option<&Path>) -> Result<Library, LibraryError> {
        imp::load(explicit)
    }

    /// The file, or the bare name that the loader resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// How it was found.
    pub fn source(&self) -> LibrarySource {
        self.source
    }
    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What a plan built here is valid for, to distinguish cached plans: this version, and with full TensorRT this
    /// machine's GPU.
    pub fn fits(&self) -> String {
        let version = format!("{} {}", FLAVOUR.product, self.version);
        match driver::driver() {
            Ok(facts) if !FLAVOUR.builds_without_gpu => {
                let gpu = &facts.gpus[0];
                let (major, minor) = gpu.compute_capability;
                format!("{version} on {}, SM {major}.{minor}", gpu.name)
            }
            _ => version,
        }
    }
}

#[cfg(not(feature = "engines"))]
mod imp {
    use super::*;

    pub fn load(_explicit: Option<&Path>) -> Result<Library, LibraryError> {
        Err(LibraryError::NotCompiled)
    }
}

#[cfg(feature = "engines")]
mod imp {
    use std::process::{Command, Stdio};
    use std::sync::Mutex;

    use super::*;

    static LOADED: Mutex<Option<Library>> = Mutex::new(None);

    pub fn load(explicit: Option<&Path>) -> Result<Library, LibraryError> {
        // A panic while loading leaves no partial state: the slot is written last.
        let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Once loaded, the search is not repeated: it may start a Python interpreter.
        if explicit.is_none()
            && let Some(library) = &*loaded
        {
            return Ok(library.clone());
        }
        let (path, source) = find(explicit)?;
        if let Some(library) = loaded.as_ref().filter(|library| same_file(&library.path, &path)) {
            return Ok(library.clone());
        }
        // Problems of the file are reported first, even if another library is already in use.
        let (version, opened) = open(&path)?;
        if !version.is_supported_by(&FLAVOUR) {
            return Err(LibraryError::Version { path, version });
        }
        if let Some(library) = &*loaded {
            return Err(LibraryError::AnotherLoaded {
                loaded: library.path.clone(),
                asked: path,
            });
        }
        trtx::dynamically_load_tensorrt(Some(&path)).map_err(|error| LibraryError::NotALibrary {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        drop(opened); // the binding holds it now, so it was mapped once
        let path = match source {
            LibrarySource::Loader => mapped_path().unwrap_or(path),
            _ => path,
        };
        let library = Library { path, source, version };
        *loaded = Some(library.clone());
        Ok(library)
    }

    fn find(explicit: Option<&Path>) -> Result<(PathBuf, LibrarySource), LibraryError> {
        let given = explicit
            .map(|path| (path.to_path_buf(), LibrarySource::Flag))
            .or_else(|| {
                // An empty variable counts as unset.
                let value = std::env::var_os(FLAVOUR.variable).filter(|value| !value.is_empty())?;
                Some((PathBuf::from(value), LibrarySource::Environment))
            });
        if let Some((path, by)) = given {
            // For a bare file name the loader searches its own path, and would miss the intended file.
            let path = std::path::absolute(&path).unwrap_or(path);
            return if path.is_dir() {
                // A folder may be an SDK root; use the library in it.
                let found = library_in(&path).or_else(|| library_in(&path.join("lib")));
                found.map(|p| (p, by)).ok_or(LibraryError::NotInFolder { path, by })
            } else if path.exists() {
                Ok((path, by))
            } else {
                Err(LibraryError::Missing { path, by })
            };
        }
        if let Some(path) = python_package() {
            return Ok((path, LibrarySource::PythonPackage));
        }
        // Only the loader can search its path.
        let known = |name: &&&str| mapped(Path::new(name)).is_ok();
        let name = FLAVOUR.libraries.iter().find(known).ok_or(LibraryError::NotFound)?;
        Ok((PathBuf::from(name), LibrarySource::Loader))
    }

    /// The library in a folder.
    fn library_in(folder: &Path) -> Option<PathBuf> {
        FLAVOUR
            .libraries
            .iter()
            .map(|name| folder.join(name))
            .find(|path| path.is_file())
    }

    /// The library inside its Python package: of the environment that this program is installed in (`pip install` puts
    /// it into `bin` beside `lib`), of the active virtual or conda environment, else of the `python3` on the path,
    /// which is run because only it knows its package folders.
    fn python_package() -> Option<PathBuf> {
        let own = std::env::current_exe().and_then(|path| path.canonicalize()).ok();
        let own = own.and_then(|path| path.parent()?.parent().map(Path::to_path_buf));
        let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
        let active = active.filter(|root| !root.is_empty()).map(PathBuf::from);
        if let Some(library) = own.into_iter().chain(active).find_map(|root| in_environment(&root)) {
            return Some(library);
        }
        // Without the empty entry, a folder of that name in the working directory does not count as the package.
        let script = "import sys\nsys.path = [p for p in sys.path if p]\nimport importlib.util as u\n\
                      s = u.find_spec(sys.argv[1])\n\
                      print(*(s.submodule_search_locations if s else []), sep='\\n')";
        let output = Command::new("python3")
            .args(["-c", script, FLAVOUR.python_package])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.lines().find_map(|line| library_in(Path::new(line)))
    }

    /// The library in the Python package of an environment, below its root folder.
    fn in_environment(root: &Path) -> Option<PathBuf> {
        let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
        let mut folders =
            versions.flat_map(|entry| ["site-packages", "dist-packages"].map(|name| entry.path().join(name)));
        folders.find_map(|folder| library_in(&folder.join(FLAVOUR.python_package)))
    }

    /// Maps the library and queries its version, without a call into its C++.
    fn open(path: &Path) -> Result<(Version, libloading::Library), LibraryError> {
        let library = mapped(path).map_err(|error| LibraryError::NotALibrary {
            path: path.to_path_buf(),
            reason: reason_of(&error),
        })?;
        let not_tensorrt = |symbol| LibraryError::NotTensorRt {
            path: path.to_path_buf(),
            symbol,
        };
        // SAFETY: `extern "C" int32_t getInferLibVersion() noexcept` in every version of NvInferRuntimeBase.h.
        let version = unsafe { library.get::<unsafe extern "C" fn() -> i32>(b"getInferLibVersion\0") };
        let version = version.map_err(|_| not_tensorrt("getInferLibVersion"))?;
        // SAFETY: as above; it takes nothing and reads a constant.
        let version = Version::from_encoded(unsafe { version() });
        // The dispatch and lean runtimes know their version too, but cannot build.
        // SAFETY: only looked up, as an address that is not used.
        unsafe { library.get::<*const ()>(b"createInferBuilder_INTERNAL\0") }
            .map_err(|_| not_tensorrt("createInferBuilder_INTERNAL"))?;
        Ok((version, library))
    }

    fn mapped(path: &Path) -> Result<libloading::Library, libloading::Error> {
        // SAFETY: runs the library's constructors, which is what the user asks for by naming it.
        unsafe { libloading::Library::new(path) }
    }

    /// The loader's message without libloading's wrapping.
    fn reason_of(error: &libloading::Error) -> String {
        std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
    }

    fn same_file(left: &Path, right: &Path) -> bool {
        left == right || matches!((left.canonicalize(), right.canonicalize()), (Ok(l), Ok(r)) if l == r)
    }

    /// Where the loader found the library, from the process's memory map.
    fn mapped_path() -> Option<PathBuf> {
        let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
        let path = maps
            .lines()
            .filter_map(|line| line.split_once('/'))
            .map(|(_, path)| path)
            .find(|path| {
                let file = path.rsplit('/').next().unwrap_or_default();
                FLAVOUR.libraries.iter().any(|name| file.starts_with(name))
            })?;
        Some(PathBuf::from(format!("/{path}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_like_the_packages() {
        assert_eq!(Version::from_encoded(10601).to_string(), "1.6.1");
        assert_eq!(Version::from_encoded(110_400).to_string(), "11.4.0");
    }
}
