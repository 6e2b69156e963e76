//! The primary context of the first GPU.

use std::cell::Cell;
use std::rc::Rc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::driver::{self, Driver};
use crate::backend::tensorrt::run::RunError;

/// The primary context of the first GPU, which TensorRT uses as well. It is current in the thread that opened it and
/// stays there.
pub struct Cuda {
    device: sys::CUdevice,
    facts: Driver,
    /// Bytes of all [`Buffer`]s, now and at their peak.
    buffers: Cell<(u64, u64)>,
}

impl Cuda {
    /// Checks for a driver before anything that would panic without one.
    pub fn open() -> Result<Rc<Self>, RunError> {
        let facts = driver::driver()?;
        // SAFETY: looks for the library and loads it, which `driver` above has done as well.
        if !unsafe { sys::is_culib_present() } {
            return Err(driver::DriverError::NoDriver.into());
        }
        result::init().map_err(failed("cuInit"))?;
        let device = result::device::get(0).map_err(failed("cuDeviceGet"))?;
        // SAFETY: a device of this driver, which was initialized; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let buffers = Cell::default();
        let cuda = Cuda { device, facts, buffers };
        // SAFETY: just retained, and kept until `cuda` is dropped.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        Ok(Rc::new(cuda))
    }

    /// The driver and its GPUs.
    pub fn facts(&self) -> &Driver {
        &self.facts
    }

    /// Free and total bytes of device memory.
    pub fn memory(&self) -> Result<(u64, u64), RunError> {
        let (free, total) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// An attribute of the GPU.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32, RunError> {
        // SAFETY: a device of this driver, which was initialized.
        unsafe { result::device::get_attribute(self.device, attribute) }.map_err(failed("cuDeviceGetAttribute"))
    }

    /// Waits until everything queued on the GPU by this process is done.
    pub fn synchronize(&self) -> Result<(), RunError> {
        result::ctx::synchronize().map_err(failed("cuCtxSynchronize"))
    }

    /// Bytes of buffers, now and at their peak: during a move, caches and scratch memory exist twice, which the free
    /// memory before and after does not show.
    pub fn buffers(&self) -> (u64, u64) {
        self.buffers.get()
    }

    pub(super) fn take(&self, bytes: usize) {
        let (now, most) = self.buffers.get();
        let now = now + bytes as u64;
        self.buffers.set((now, most.max(now)));
    }

    pub(super) fn give_back(&self, bytes: usize) {
        let (now, most) = self.buffers.get();
        self.buffers.set((now - bytes as u64, most));
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: retained in `open` and released once, after everything made in it: that holds an `Rc` of this.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// The driver's error of a call.
pub(in super::super) fn failed(call: &'static str) -> impl Fn(DriverError) -> RunError {
    move |error| {
        let words = |found: Result<&std::ffi::CStr, DriverError>| {
            found.map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
        };
        RunError::Cuda {
            call,
            name: words(error.error_name()),
            message: words(error.error_string()),
        }
    }
}
