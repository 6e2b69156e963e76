//! The flags that select a device, and opening a session with them.

use std::path::PathBuf;

use super::Failure;
use crate::decode::{DeviceChoice, Session, SessionOptions};
use crate::package::Package;

/// The flags that select a device.
#[derive(clap::Args, Clone, Debug)]
pub struct Place {
    /// Device; auto: the GPU if engines can run there, else the CPU
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Threads of the CPU executor [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// TensorRT library [default: TENSORRT_RTX_LIB, else an installed Python package, else the loader's path]
    #[arg(long, value_name = "PATH")]
    tensorrt_lib: Option<PathBuf>,
}

impl Place {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// Options of a session whose prompt has this many tokens and whose whole text has at most `total`.
    pub fn options(&self, prompt: usize, total: usize) -> SessionOptions<'_> {
        SessionOptions {
            device: self.device,
            threads: self.threads(),
            tensorrt_lib: self.tensorrt_lib.as_deref(),
            prompt,
            total,
            note: &|why| super::note(format_args!("running on the CPU: {why}")),
            ..SessionOptions::default()
        }
    }

    pub fn open(&self, package: &Package, prompt: usize, total: usize) -> Result<Session, Failure> {
        Ok(Session::open(package, &self.options(prompt, total))?)
    }
}
