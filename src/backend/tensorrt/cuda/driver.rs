//! Whether there is a CUDA driver, and which GPUs it has: seven plain C functions of `libcuda.so.1`.
//!
//! `cudarc` panics without a driver and needs a context for any query; these functions need neither.

use serde::Serialize;

/// A working CUDA driver.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Driver {
    /// The newest CUDA version that the driver supports, such as `13.0`.
    pub cuda_version: String,
    /// The driver's version, such as `580.159.04`, if the kernel module states it.
    pub driver_version: Option<String>,
    /// At least one.
    pub gpus: Vec<Gpu>,
}

impl Driver {
    /// Whether it runs programs built for this major version of CUDA.
    pub fn runs_cuda(&self, major: u32) -> bool {
        let newest = self.cuda_version.split('.').next().and_then(|n| n.parse::<u32>().ok());
        newest.is_none_or(|newest| newest >= major)
    }
}

/// A GPU of the driver.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Gpu {
    /// Such as `NVIDIA L4`.
    pub name: String,
    /// Compute capability: `(9, 0)` is SM 9.0.
    pub compute_capability: (u32, u32),
    /// Total memory, free or not.
    pub memory_bytes: u64,
}

/// Why no GPU can be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DriverError {
    /// Its library is not found, or is a stub.
    #[error("there is no NVIDIA driver here (libcuda.so.1 is not found)")]
    NoDriver,
    /// A call failed.
    #[error("the NVIDIA driver has no usable GPU (CUDA error {code} from {call})")]
    Unusable {
        /// The function of the driver.
        call: &'static str,
        /// The driver's error.
        code: i32,
    },
    /// It works but has no GPU.
    #[error("the NVIDIA driver reports no GPU")]
    NoGpu,
}

/// Queries the driver. Loads it and, if there are GPUs, initializes CUDA, which takes about 100 ms.
pub(in super::super) fn driver() -> Result<Driver, DriverError> {
    imp::driver()
}

#[cfg(not(feature = "engines"))]
mod imp {
    use super::*;

    pub fn driver() -> Result<Driver, DriverError> {
        Err(DriverError::NoDriver)
    }
}

#[cfg(feature = "engines")]
mod imp {
    use std::ffi::{CStr, c_char, c_int};
    use std::path::Path;

    use super::*;

    const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
    const COMPUTE_CAPABILITY_MINOR: c_int = 76;
    const NO_DEVICE: c_int = 100;

    type Get1<T> = unsafe extern "C" fn(*mut T) -> c_int;
    type GetOf<T> = unsafe extern "C" fn(*mut T, c_int) -> c_int;

    pub fn driver() -> Result<Driver, DriverError> {
        of(Path::new(if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" }))
    }

    /// The driver of this library.
    fn of(library: &Path) -> Result<Driver, DriverError> {
        // SAFETY: the driver's own library, whose constructors every CUDA program runs.
        let library = unsafe { libloading::Library::new(library) }.map_err(|_| DriverError::NoDriver)?;
        // SAFETY: the signatures are those of cuda.h, stable since CUDA 4, and the library outlives the symbols. Every
        // out-pointer is to a local of the right type; the name's buffer is one byte longer than what the driver is
        // given, and zeroed, so it ends in a zero.
        unsafe {
            let init: libloading::Symbol<unsafe extern "C" fn(u32) -> c_int> = symbol(&library, b"cuInit\0")?;
            check("cuInit", init(0))?;
            let version: libloading::Symbol<Get1<c_int>> = symbol(&library, b"cuDriverGetVersion\0")?;
            let count: libloading::Symbol<Get1<c_int>> = symbol(&library, b"cuDeviceGetCount\0")?;
            let device: libloading::Symbol<GetOf<c_int>> = symbol(&library, b"cuDeviceGet\0")?;
            let memory: libloading::Symbol<GetOf<usize>> = symbol(&library, b"cuDeviceTotalMem_v2\0")?;
            let attribute: libloading::Symbol<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int> =
                symbol(&library, b"cuDeviceGetAttribute\0")?;
            let device_name: libloading::Symbol<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int> =
                symbol(&library, b"cuDeviceGetName\0")?;

            let mut encoded = 0;
            check("cuDriverGetVersion", version(&mut encoded))?;
            let mut gpu_count = 0;
            check("cuDeviceGetCount", count(&mut gpu_count))?;
            let mut gpus = Vec::new();
            for ordinal in 0..gpu_count {
                let (mut handle, mut bytes, mut major, mut minor) = (0, 0usize, 0, 0);
                let mut name = [0 as c_char; 256];
                check("cuDeviceGet", device(&mut handle, ordinal))?;
                check("cuDeviceTotalMem", memory(&mut bytes, handle))?;
                check(
                    "cuDeviceGetAttribute",
                    attribute(&mut major, COMPUTE_CAPABILITY_MAJOR, handle),
                )?;
                check(
                    "cuDeviceGetAttribute",
                    attribute(&mut minor, COMPUTE_CAPABILITY_MINOR, handle),
                )?;
                check("cuDeviceGetName", device_name(name.as_mut_ptr(), 255, handle))?;
                gpus.push(Gpu {
                    name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
                    compute_capability: (major.unsigned_abs(), minor.unsigned_abs()),
                    memory_bytes: bytes as u64,
                });
            }
            if gpus.is_empty() {
                return Err(DriverError::NoGpu);
            }
            Ok(Driver {
                cuda_version: format!("{}.{}", encoded / 1000, encoded % 1000 / 10),
                driver_version: kernel_module_version(),
                gpus,
            })
        }
    }

    /// # Safety
    /// `T` is the type of that function.
    unsafe fn symbol<'l, T>(
        library: &'l libloading::Library,
        name: &'static [u8],
    ) -> Result<libloading::Symbol<'l, T>, DriverError> {
        // A libcuda without these is a stub that toolkits ship for linking. SAFETY: this function's own contract.
        unsafe { library.get(name) }.map_err(|_| DriverError::NoDriver)
    }

    fn check(call: &'static str, code: c_int) -> Result<(), DriverError> {
        match code {
            0 => Ok(()),
            NO_DEVICE => Err(DriverError::NoGpu),
            code => Err(DriverError::Unusable { call, code }),
        }
    }

    /// `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue …`: the first word that is a dotted number.
    fn kernel_module_version() -> Option<String> {
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        let dotted = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        text.split_whitespace().find(dotted).map(str::to_string)
    }

    #[cfg(test)]
    mod tests {
        use std::path::PathBuf;
        use std::process::Command;

        use super::*;

        /// A library with the driver's functions, with the answers of the test.
        fn stand_in(folder: &Path, init: i32, gpus: i32) -> PathBuf {
            let (path, source) = (folder.join("libcuda.so"), folder.join("stand_in.c"));
            let text = format!(
                "int cuInit(unsigned f) {{ return {init}; }}
                 int cuDriverGetVersion(int* v) {{ *v = 11040; return 0; }}
                 int cuDeviceGetCount(int* n) {{ *n = {gpus}; return 0; }}
                 int cuDeviceGet(int* d, int i) {{ *d = i; return 0; }}
                 int cuDeviceTotalMem_v2(unsigned long* b, int d) {{ *b = 1ul << 34; return 0; }}
                 int cuDeviceGetAttribute(int* v, int a, int d) {{ *v = a == 75 ? 8 : 9; return 0; }}
                 int cuDeviceGetName(char* s, int n, int d) {{ *s++ = 'L'; *s++ = '4'; *s = 0; return 0; }}"
            );
            std::fs::write(&source, text).unwrap();
            let mut compiler = Command::new("cc");
            compiler.args(["-shared", "-fPIC", "-o"]).args([&path, &source]);
            assert!(compiler.status().expect("rustc links with it too").success());
            path
        }

        #[test]
        fn what_a_driver_can_answer() {
            let folder = tempfile::tempdir().unwrap();
            let asked = |init, gpus| of(&stand_in(folder.path(), init, gpus));
            let found = asked(0, 2).unwrap();
            assert_eq!((found.cuda_version.as_str(), found.gpus.len()), ("11.4", 2));
            assert_eq!(
                found.gpus[1],
                Gpu {
                    name: "L4".into(),
                    compute_capability: (8, 9),
                    memory_bytes: 1 << 34
                }
            );
        }

        #[test]
        fn no_driver_no_gpu_and_a_driver_that_fails() {
            let folder = tempfile::tempdir().unwrap();
            assert_eq!(of(&folder.path().join("libcuda.so.1")), Err(DriverError::NoDriver));
            let other = tempfile::tempdir().unwrap();
            assert_eq!(of(&stand_in(other.path(), 0, 0)), Err(DriverError::NoGpu));
            // CUDA_ERROR_NO_DEVICE, and an error of the driver's own.
            let other = tempfile::tempdir().unwrap();
            assert_eq!(of(&stand_in(other.path(), 100, 1)), Err(DriverError::NoGpu));
            let other = tempfile::tempdir().unwrap();
            let error = of(&stand_in(other.path(), 803, 1)).unwrap_err();
            let (call, code) = ("cuInit", 803);
            assert_eq!(error, DriverError::Unusable { call, code });
            assert!(error.to_string().contains("CUDA error 803 from cuInit"), "{error}");
        }
    }
}
