//! Memory for activations and caches: zeroed and aligned for vector loads.

use std::alloc::Layout;
use std::ptr::NonNull;

/// Bytes aligned for any vector load, zeroed. Pages that are never touched cost no memory.
pub struct AlignedBytes {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its bytes like a `Vec<u8>`, and is tied to no thread.
unsafe impl Send for AlignedBytes {}
// SAFETY: through a shared reference its bytes are only read (`address` gives a raw pointer, whose use is unsafe).
unsafe impl Sync for AlignedBytes {}

const ALIGNMENT: usize = 64;

impl AlignedBytes {
    /// This many bytes, all 0. Aborts if the system has not enough.
    pub fn zeroed(bytes: usize) -> AlignedBytes {
        let layout = Self::layout(bytes);
        // SAFETY: the layout's size is at least `ALIGNMENT`, not 0.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        let address = NonNull::new(address).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        AlignedBytes { address, bytes }
    }
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).expect("a size that memory can have")
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }
    /// Where the bytes are.
    pub(super) fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: allocated with at least `bytes` bytes, all initialized since they were zeroed, and nothing writes them
        // while self is borrowed: a program's run, which writes through `address`, borrows it mutably.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
    /// The bytes, to write.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, and freed once.
        unsafe { std::alloc::dealloc(self.address.as_ptr(), Self::layout(self.bytes)) }
    }
}
