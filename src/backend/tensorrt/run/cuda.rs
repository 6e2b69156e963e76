//! The CUDA driver's objects, each given back when it is dropped: context, memory, stream, event.
//!
//! Only what a session needs. Everything is of the first GPU and of one thread: TensorRT's engines cannot be sent to
//! another.

use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;
use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::super::driver::{self, Driver};
use super::RunError;

/// The primary context of the first GPU, which TensorRT uses as well.
pub struct Cuda {
    device: sys::CUdevice,
    facts: Driver,
    /// Bytes of all [`Buffer`]s, now and at most.
    buffers: Cell<(u64, u64)>,
}

impl Cuda {
    /// Asks for a driver before anything that would panic without one.
    pub fn open() -> Result<Rc<Self>, RunError> {
        let facts = driver::driver()?;
        // SAFETY: looks for the library file alone.
        if !unsafe { sys::is_culib_present() } {
            return Err(driver::DriverError::NoDriver.into());
        }
        result::init().map_err(failed("cuInit"))?;
        let device = result::device::get(0).map_err(failed("cuDeviceGet"))?;
        // SAFETY: a device of this driver; released in drop.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let buffers = Cell::default();
        let cuda = Cuda { device, facts, buffers };
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        Ok(Rc::new(cuda))
    }

    pub fn facts(&self) -> &Driver {
        &self.facts
    }

    /// Bytes of device memory that are free, and that there are.
    pub fn memory(&self) -> Result<(u64, u64), RunError> {
        let (free, total) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Bytes that buffers hold, and the most that they held at once: caches and working memory are two for the time of a
    /// move, which nobody sees who asks for the free memory before or after.
    pub fn buffers(&self) -> (u64, u64) {
        self.buffers.get()
    }

    fn take(&self, bytes: usize) {
        let (now, most) = self.buffers.get();
        let now = now + bytes as u64;
        self.buffers.set((now, most.max(now)));
    }

    fn give_back(&self, bytes: usize) {
        let (now, most) = self.buffers.get();
        self.buffers.set((now - bytes as u64, most));
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: retained in open; everything made in it holds an Rc of this.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Device memory. Its bytes are whatever was there before, unless cleared.
pub struct Buffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    cuda: Rc<Cuda>,
}

impl Buffer {
    /// `what` names it in the error if there is too little memory.
    pub fn new(cuda: &Rc<Cuda>, bytes: usize, what: &str) -> Result<Self, RunError> {
        // SAFETY: zero bytes are not allowed; freed in drop.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                RunError::Memory {
                    what: what.to_string(),
                    needed: bytes as u64,
                    free: cuda.memory().map_or(0, |(free, _)| free),
                    fits: None,
                }
            } else {
                failed("cuMemAlloc")(error)
            }
        })?;
        cuda.take(bytes);
        Ok(Buffer {
            address,
            bytes,
            cuda: cuda.clone(),
        })
    }

    pub fn address(&self) -> u64 {
        self.address
    }
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn clear(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: the whole of this allocation.
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream.raw) }.map_err(failed("cuMemsetD8Async"))
    }

    /// Copies from ordinary memory and waits.
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), RunError> {
        assert!(at + bytes.len() <= self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: within the allocation.
        unsafe { result::memcpy_htod_sync(self.address + at as u64, bytes) }.map_err(failed("cuMemcpyHtoD"))?;
        // From pageable memory that call ends when the bytes are staged, and our streams do not wait for the default one.
        result::ctx::synchronize().map_err(failed("cuCtxSynchronize"))
    }

    /// Copies to ordinary memory and waits.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), RunError> {
        assert!(at + bytes.len() <= self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: within the allocation.
        unsafe { result::memcpy_dtoh_sync(bytes, self.address + at as u64) }.map_err(failed("cuMemcpyDtoH"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in new. The call waits for work that uses the memory.
        let _ = unsafe { result::free_sync(self.address) };
        self.cuda.give_back(self.bytes);
    }
}

/// Page-locked memory of the host, which the GPU reads and writes without a copy in between. Zeroed.
pub struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    _cuda: Rc<Cuda>,
}

impl Pinned {
    pub fn new(cuda: &Rc<Cuda>, bytes: usize) -> Result<Self, RunError> {
        // SAFETY: freed in drop.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(failed("cuMemHostAlloc"))?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: just allocated with this size.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Pinned {
            pointer,
            bytes,
            _cuda: cuda.clone(),
        })
    }

    /// The caller sees to it that no copy is under way.
    pub fn slice<T: bytemuck::Pod>(&self, at: usize, n: usize) -> &[T] {
        assert!(at.is_multiple_of(align_of::<T>()) && at + n * size_of::<T>() <= self.bytes);
        // SAFETY: within the allocation, aligned (allocations are to pages), initialised.
        unsafe { std::slice::from_raw_parts(self.pointer.add(at).cast(), n) }
    }

    /// The same, to write.
    pub fn slice_mut<T: bytemuck::Pod>(&mut self, at: usize, n: usize) -> &mut [T] {
        assert!(at.is_multiple_of(align_of::<T>()) && at + n * size_of::<T>() <= self.bytes);
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(at).cast(), n) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated in new.
        let _ = unsafe { result::free_host(self.pointer.cast::<c_void>()) };
    }
}

/// A queue of work.
pub struct Stream {
    raw: sys::CUstream,
    _cuda: Rc<Cuda>,
}

impl Stream {
    pub fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        Ok(Stream {
            raw,
            _cuda: cuda.clone(),
        })
    }

    pub(super) fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }
    pub(super) fn handle(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything queued is done.
    pub fn wait(&self) -> Result<(), RunError> {
        // SAFETY: lives as long as self.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("cuStreamSynchronize"))
    }

    /// Queues a copy of `bytes` from the front of `from` to the front of `to`.
    pub fn upload(&self, from: &Pinned, to: &Buffer, bytes: usize) -> Result<(), RunError> {
        assert!(bytes <= to.bytes);
        // SAFETY: both are large enough; the caller waits before either goes.
        unsafe { result::memcpy_htod_async(to.address, from.slice::<u8>(0, bytes), self.raw) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Queues a copy of `bytes` of pinned memory at `from_at` to `to_at` in device memory.
    pub fn upload_at(&self, from: &[u8], to: &Buffer, at: usize) -> Result<(), RunError> {
        assert!(at + from.len() <= to.bytes);
        // SAFETY: within the allocation; the caller waits before either goes.
        unsafe { result::memcpy_htod_async(to.address + at as u64, from, self.raw) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Queues a copy of `bytes` from the front of `from` to the front of `to`.
    pub fn download(&self, from: &Buffer, to: &mut Pinned, bytes: usize) -> Result<(), RunError> {
        assert!(bytes <= from.bytes);
        // SAFETY: both are large enough; the caller waits before either goes.
        unsafe { result::memcpy_dtoh_async(to.slice_mut::<u8>(0, bytes), from.address, self.raw) }
            .map_err(failed("cuMemcpyDtoHAsync"))
    }

    /// Queues a copy of `bytes` from the front of `from` to the front of `to`, on the device.
    pub fn copy(&self, from: &Buffer, to: &Buffer, bytes: usize) -> Result<(), RunError> {
        assert!(bytes <= from.bytes && bytes <= to.bytes);
        // SAFETY: both are large enough; the caller waits before either goes.
        unsafe { result::memcpy_dtod_async(to.address, from.address, bytes, self.raw) }
            .map_err(failed("cuMemcpyDtoDAsync"))
    }

    /// Queues one copy of `rows` rows of `width` bytes between device memories with different distances between rows.
    pub fn copy_rows(
        &self,
        (from, from_pitch): (u64, usize),
        (to, to_pitch): (u64, usize),
        width: usize,
        rows: usize,
    ) -> Result<(), RunError> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        // SAFETY: all fields are numbers or pointers that may be null; the addresses are the caller's live buffers.
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from,
            srcPitch: from_pitch,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to,
            dstPitch: to_pitch,
            WidthInBytes: width,
            Height: rows,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        // SAFETY: as above.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.raw).result() }.map_err(failed("cuMemcpy2DAsync"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in new.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A mark in a stream.
pub struct Event {
    raw: sys::CUevent,
    _cuda: Rc<Cuda>,
}

impl Event {
    pub fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"))?;
        Ok(Event {
            raw,
            _cuda: cuda.clone(),
        })
    }

    pub fn record(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: both live.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(failed("cuEventRecord"))
    }

    pub fn wait(&self) -> Result<(), RunError> {
        // SAFETY: lives as long as self.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("cuEventSynchronize"))
    }

    /// From `earlier` to this, both recorded and reached.
    pub fn since(&self, earlier: &Event) -> Result<Duration, RunError> {
        // SAFETY: both live.
        let ms = unsafe { result::event::elapsed(earlier.raw, self.raw) }.map_err(failed("cuEventElapsedTime"))?;
        Ok(Duration::from_secs_f64(f64::from(ms) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in new.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// The driver's error of a call.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> RunError {
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
