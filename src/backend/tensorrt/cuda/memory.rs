//! Device memory, and host memory that the GPU reads and writes directly.
//!
//! Both are safe to use while work is queued. Rust cannot access device memory, so a copy only has to stay inside its
//! buffers, and a buffer only has to be freed after the work that uses it. Rust can access host memory: a [`Pinned`]
//! records the last copy queued from or to it, and waits for it where necessary.

use std::cell::RefCell;
use std::ffi::c_void;
use std::ops::Range;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::context::{Cuda, failed};
use super::stream::{Stream, Ticket};
use crate::backend::tensorrt::run::RunError;

/// Device memory, uninitialized unless cleared.
pub struct Buffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    cuda: Rc<Cuda>,
}

impl Buffer {
    /// `what` names it in the error if there is too little memory.
    pub fn new(cuda: &Rc<Cuda>, bytes: usize, what: &str) -> Result<Self, RunError> {
        // SAFETY: the context is current as long as `cuda` lives, and the size is not 0, which the driver refuses.
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

    /// Its address on the device: a multiple of 256.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues zeroing the whole buffer.
    pub fn clear(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: the whole of this allocation, which is freed after what is queued (`drop`).
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream.handle()) }
            .map_err(failed("cuMemsetD8Async"))
    }

    /// Copies from ordinary memory to the buffer from `at` on, and waits. Panics if that is out of bounds.
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), RunError> {
        let to = self.place(at, bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: `place` has checked that it is within the allocation; the call returns when `bytes` were read.
        unsafe { result::memcpy_htod_sync(to, bytes) }.map_err(failed("cuMemcpyHtoD"))?;
        // From pageable memory that call ends when the bytes are staged, and our streams do not wait for the default one.
        self.cuda.synchronize()
    }

    /// Copies from the buffer from `at` on to ordinary memory, and waits. Panics if that is out of bounds.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), RunError> {
        let from = self.place(at, bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: `place` has checked that it is within the allocation; the call returns when `bytes` are written.
        unsafe { result::memcpy_dtoh_sync(bytes, from) }.map_err(failed("cuMemcpyDtoH"))
    }

    /// The address of `bytes` bytes at `at`. Panics if they are out of bounds.
    pub(super) fn place(&self, at: usize, bytes: usize) -> sys::CUdeviceptr {
        assert_inside(at, bytes, self.bytes);
        self.address + at as u64
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Queued work may use it. Freeing appears to wait as well, but this does not rely on it.
        let _ = self.cuda.synchronize();
        // SAFETY: allocated in `new` and freed once; no queued work is left that could use it, or the context is broken and
        // runs none.
        let _ = unsafe { result::free_sync(self.address) };
        self.cuda.give_back(self.bytes);
    }
}

fn assert_inside(at: usize, bytes: usize, size: usize) {
    let inside = at.checked_add(bytes).is_some_and(|end| end <= size);
    assert!(inside, "{bytes} bytes at {at} are not inside an allocation of {size}");
}

/// Rows of equal distance in device memory, the first at `at`: see [`Stream::copy_rows`].
#[derive(Clone, Copy)]
pub struct Rows<'b> {
    /// The buffer.
    pub buffer: &'b Buffer,
    /// Bytes before the first row.
    pub at: usize,
    /// Bytes from the start of a row to the start of the next.
    pub pitch: usize,
}

impl Rows<'_> {
    /// The address of the first of `rows` rows of `width` bytes, both above 0. Panics if they overlap or are out of
    /// bounds.
    pub(super) fn place(&self, width: usize, rows: usize) -> sys::CUdeviceptr {
        let pitch = self.pitch;
        assert!(
            rows == 1 || width <= pitch,
            "rows of {width} bytes, {pitch} bytes apart"
        );
        let bytes = (rows - 1).checked_mul(pitch).and_then(|n| n.checked_add(width));
        self.buffer.place(self.at, bytes.unwrap_or(usize::MAX))
    }
}

/// Page-locked memory of the host, which the GPU reads and writes without a copy in between. Zeroed.
pub struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    /// The last queued copy from here, and the last to here.
    read: RefCell<Option<Ticket>>,
    written: RefCell<Option<Ticket>>,
    _cuda: Rc<Cuda>,
}

impl Pinned {
    /// This many bytes.
    pub fn new(cuda: &Rc<Cuda>, bytes: usize) -> Result<Self, RunError> {
        // SAFETY: the context is current as long as `cuda` lives, and the size is not 0, which the driver refuses.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(failed("cuMemHostAlloc"))?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: just allocated with this size.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Pinned {
            pointer,
            bytes,
            read: RefCell::default(),
            written: RefCell::default(),
            _cuda: cuda.clone(),
        })
    }

    /// `n` elements from byte `at` on, once no copy to this memory is in progress. Panics if they are out of bounds or
    /// `at` is not aligned.
    pub fn slice<T: bytemuck::Pod>(&self, at: usize, n: usize) -> Result<&[T], RunError> {
        let pointer = self.elements::<T>(at, n);
        settle(&self.written)?;
        // SAFETY: within the allocation, aligned and initialized (`elements`). The GPU writes nothing here now, and cannot
        // be made to while self is borrowed: `Stream::download` borrows it mutably.
        Ok(unsafe { std::slice::from_raw_parts(pointer, n) })
    }

    /// The same, mutable: once no copy from or to this memory is in progress.
    pub fn slice_mut<T: bytemuck::Pod>(&mut self, at: usize, n: usize) -> Result<&mut [T], RunError> {
        let pointer = self.elements::<T>(at, n);
        settle(&self.written)?;
        settle(&self.read)?;
        // SAFETY: as in `slice`; nor does the GPU read here, since `Stream::upload` borrows self too.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, n) })
    }

    /// The address of `n` elements. Any bytes are valid elements of a `Pod`, and all were initialized in `new`.
    fn elements<T: bytemuck::Pod>(&self, at: usize, n: usize) -> *mut T {
        // Allocations are aligned to pages.
        assert!(
            at.is_multiple_of(align_of::<T>()),
            "byte {at} is not aligned for its elements"
        );
        assert_inside(at, n.saturating_mul(size_of::<T>()), self.bytes);
        self.pointer.wrapping_add(at).cast()
    }

    /// The bytes of a range, as the source or target of a copy. Panics if they are out of bounds.
    pub(super) fn part(&self, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end, "{range:?}");
        assert_inside(range.start, range.len(), self.bytes);
        self.pointer.wrapping_add(range.start)
    }

    /// Records a queued copy from here.
    pub(super) fn is_read_by(&self, ticket: Ticket) {
        replace(&self.read, ticket);
    }

    /// Records a queued copy to here.
    pub(super) fn is_written_by(&mut self, ticket: Ticket) {
        replace(&self.written, ticket);
    }
}

/// In one stream, the copy of the later ticket ends after the earlier one; with two streams both must be awaited.
fn replace(pending: &RefCell<Option<Ticket>>, ticket: Ticket) {
    let mut pending = pending.borrow_mut();
    if let Some(earlier) = pending.as_ref().filter(|earlier| !earlier.same_stream(&ticket)) {
        // A stream that cannot be awaited runs nothing any more: its context is broken, and so is this one's.
        let _ = earlier.wait();
    }
    *pending = Some(ticket);
}

/// Waits for the copy, if one is in progress.
fn settle(pending: &RefCell<Option<Ticket>>) -> Result<(), RunError> {
    let waited = pending.borrow().as_ref().map(Ticket::wait);
    waited.transpose()?;
    *pending.borrow_mut() = None;
    Ok(())
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if settle(&self.read).is_err() || settle(&self.written).is_err() {
            // Leaked, because the GPU may still write to it.
            return;
        }
        // SAFETY: allocated in `new`, freed once, and no copy uses it.
        let _ = unsafe { result::free_host(self.pointer.cast::<c_void>()) };
    }
}
