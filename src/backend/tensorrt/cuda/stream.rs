//! CUDA streams and events.

use std::cell::Cell;
use std::ffi::c_void;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use cudarc::driver::{result, sys};

use super::context::{Cuda, failed};
use super::memory::{Buffer, Pinned, Rows};
use crate::backend::tensorrt::run::RunError;

/// A queue of work.
pub struct Stream {
    queue: Rc<Queue>,
}

/// The driver's stream, alive as long as anything may wait for it.
struct Queue {
    raw: sys::CUstream,
    /// Numbers of copies from and to pinned memory: queued so far, and known to be done.
    queued: Cell<u64>,
    done: Cell<u64>,
    /// Queued work is currently recorded, not run.
    capturing: Cell<bool>,
    _cuda: Rc<Cuda>,
}

impl Queue {
    fn wait(&self) -> Result<(), RunError> {
        let queued = self.queued.get();
        // SAFETY: the stream lives as long as self.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("cuStreamSynchronize"))?;
        self.done.set(queued);
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: made in `Stream::new` and destroyed once. The driver lets queued work finish.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A queued copy from or to pinned memory.
pub(super) struct Ticket {
    queue: Rc<Queue>,
    number: u64,
}

impl Ticket {
    /// Waits for the copy; costs nothing if the stream was synchronized since.
    pub(super) fn wait(&self) -> Result<(), RunError> {
        match self.queue.done.get() >= self.number {
            true => Ok(()),
            false => self.queue.wait(),
        }
    }

    pub(super) fn same_stream(&self, other: &Ticket) -> bool {
        Rc::ptr_eq(&self.queue, &other.queue)
    }
}

impl Stream {
    /// An empty stream, which does not wait for the default stream.
    pub fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        Ok(Stream {
            queue: Rc::new(Queue {
                raw,
                queued: Cell::new(0),
                done: Cell::new(0),
                capturing: Cell::new(false),
                _cuda: cuda.clone(),
            }),
        })
    }

    pub(in super::super) fn raw(&self) -> *mut c_void {
        self.queue.raw.cast()
    }
    pub(in super::super) fn handle(&self) -> sys::CUstream {
        self.queue.raw
    }

    /// During a capture, copies from and to pinned memory are refused: it would be unknown when they run.
    pub(super) fn set_capturing(&self, capturing: bool) {
        self.queue.capturing.set(capturing);
    }

    /// Waits until everything queued is done.
    pub fn wait(&self) -> Result<(), RunError> {
        self.queue.wait()
    }

    /// The ticket of the copy about to be queued.
    fn ticket(&self) -> Ticket {
        assert!(
            !self.queue.capturing.get(),
            "copies of pinned memory cannot be captured: their memory could change under a later launch"
        );
        let number = self.queue.queued.get() + 1;
        self.queue.queued.set(number);
        let queue = self.queue.clone();
        Ticket { queue, number }
    }

    /// Queues a copy of a range of pinned memory to `at` in device memory. Writing to the pinned memory later waits for
    /// it. Panics if either is out of bounds.
    pub fn upload(&self, from: &Pinned, range: Range<usize>, to: &Buffer, at: usize) -> Result<(), RunError> {
        let (source, target) = (from.part(&range), to.place(at, range.len()));
        // Also if it fails: the driver may have begun.
        from.is_read_by(self.ticket());
        // SAFETY: both are inside. `from` now waits for this copy before it lets it be written and before it is
        // freed; `to` is freed after what is queued.
        unsafe { sys::cuMemcpyHtoDAsync_v2(target, source.cast(), range.len(), self.queue.raw).result() }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Queues a copy of a range of device memory to `at` in pinned memory. Reading the pinned memory later waits for it.
    /// Panics if either is not inside.
    pub fn download(&self, from: &Buffer, range: Range<usize>, to: &mut Pinned, at: usize) -> Result<(), RunError> {
        assert!(range.start <= range.end, "{range:?}");
        let (source, bytes) = (from.place(range.start, range.len()), range.len());
        let target = to.part(&(at..at.saturating_add(bytes)));
        to.is_written_by(self.ticket());
        // SAFETY: both are inside. `to` now waits for this copy before it lets it be read or written and before it is
        // freed; `from` is freed after what is queued.
        unsafe { sys::cuMemcpyDtoHAsync_v2(target.cast(), source, bytes, self.queue.raw).result() }
            .map_err(failed("cuMemcpyDtoHAsync"))
    }

    /// Queues a copy of `bytes` from the front of `from` to the front of `to`, on the device. Panics if one has fewer.
    pub fn copy(&self, from: &Buffer, to: &Buffer, bytes: usize) -> Result<(), RunError> {
        let (source, target) = (from.place(0, bytes), to.place(0, bytes));
        // SAFETY: both are inside, and freed after what is queued.
        unsafe { result::memcpy_dtod_async(target, source, bytes, self.queue.raw) }.map_err(failed("cuMemcpyDtoDAsync"))
    }

    /// Queues one copy of `rows` rows of `width` bytes between device buffers with different row pitches. Source and
    /// target must not overlap. Panics if a row is out of bounds, or longer than the pitch.
    pub fn copy_rows(&self, from: Rows<'_>, to: Rows<'_>, width: usize, rows: usize) -> Result<(), RunError> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from.place(width, rows),
            srcPitch: from.pitch,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to.place(width, rows),
            dstPitch: to.pitch,
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
        // SAFETY: every row of both is inside its buffer (`Rows::place`), and buffers are freed after what is queued. The
        // driver reads the description before it returns.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.queue.raw).result() }.map_err(failed("cuMemcpy2DAsync"))
    }
}

/// A mark in a stream.
pub struct Event {
    raw: sys::CUevent,
    _cuda: Rc<Cuda>,
}

impl Event {
    /// Not yet recorded.
    pub fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"))?;
        Ok(Event {
            raw,
            _cuda: cuda.clone(),
        })
    }

    /// Records it after the queued work.
    pub fn record(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: the event is self's and the stream is borrowed: both are alive.
        unsafe { result::event::record(self.raw, stream.handle()) }.map_err(failed("cuEventRecord"))
    }

    /// Waits until it is reached.
    pub fn wait(&self) -> Result<(), RunError> {
        // SAFETY: the event lives as long as self.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("cuEventSynchronize"))
    }

    /// The time from `earlier` to this event, both recorded and reached.
    pub fn since(&self, earlier: &Event) -> Result<Duration, RunError> {
        // SAFETY: both events are borrowed, so alive; what is not reached is an error of the driver.
        let ms = unsafe { result::event::elapsed(earlier.raw, self.raw) }.map_err(failed("cuEventElapsedTime"))?;
        Ok(Duration::from_secs_f64(f64::from(ms) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed once; the driver lets a record that is queued go through.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}
