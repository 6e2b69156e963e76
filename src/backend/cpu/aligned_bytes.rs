//! Memory for activations and caches: zeroed and aligned for vector loads.

use std::alloc::Layout;
use std::ptr::NonNull;

use memmap2::MmapMut;

/// Bytes aligned for any vector load, zeroed. Large allocations are separate pages: untouched pages take no memory, and
/// all are returned to the system when freed.
pub struct AlignedBytes {
    address: NonNull<u8>,
    bytes: usize,
    /// The mapping, if the bytes are pages; otherwise they belong to the allocator.
    pages: Option<MmapMut>,
}

// SAFETY: it owns its bytes like a `Vec<u8>`, and is tied to no thread.
unsafe impl Send for AlignedBytes {}
// SAFETY: through a shared reference its bytes are only read (`address` gives a raw pointer, whose use is unsafe).
unsafe impl Sync for AlignedBytes {}

const ALIGNMENT: usize = 64;

/// From this size on, memory is mapped as separate pages. The allocator would zero aligned bytes by writing them.
const PAGES: usize = 128 << 10;

impl AlignedBytes {
    /// This many zero bytes. Aborts if there is not enough memory.
    pub fn zeroed(bytes: usize) -> AlignedBytes {
        if bytes >= PAGES
            && let Ok(mut pages) = MmapMut::map_anon(bytes)
            && let Some(address) = NonNull::new(pages.as_mut_ptr())
        {
            return AlignedBytes {
                address,
                bytes,
                pages: Some(pages),
            };
        }
        let layout = Self::layout(bytes);
        // SAFETY: the layout's size is at least `ALIGNMENT`, not 0.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        let address = NonNull::new(address).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        AlignedBytes {
            address,
            bytes,
            pages: None,
        }
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
        // SAFETY: at least `bytes` bytes, all initialized since they were zeroed, and nothing writes them
        // while self is borrowed: a program's run, which writes through `address`, borrows it mutably.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
    /// The bytes, mutable.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.pages.is_none() {
            // SAFETY: allocated in `zeroed` with this very layout, and freed once.
            unsafe { std::alloc::dealloc(self.address.as_ptr(), Self::layout(self.bytes)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_bytes_are_zero_and_aligned() {
        for bytes in [0, 1, 100, PAGES - 1, PAGES, PAGES + 1, 1 << 22] {
            let mut made = AlignedBytes::zeroed(bytes);
            assert_eq!((made.len(), made.as_bytes().len()), (bytes, bytes));
            assert_eq!(made.address() as usize % ALIGNMENT, 0);
            assert!(made.as_bytes().iter().all(|b| *b == 0));
            if let Some(last) = made.as_bytes_mut().last_mut() {
                *last = 7;
            }
            assert_eq!(
                made.as_bytes().iter().map(|b| usize::from(*b)).sum::<usize>(),
                7 * bytes.min(1)
            );
        }
    }

    /// Only the first page is written: the others are not in memory.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_not_touched_is_not_there() {
        let mut made = AlignedBytes::zeroed(64 << 20);
        made.as_bytes_mut()[0] = 1;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let address = made.address() as usize;
        let mut inside = false;
        let mut resident = None;
        for line in maps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                inside = (start..end).contains(&address);
            }
            if inside && let Some(rest) = line.strip_prefix("Rss:") {
                resident = rest.trim().trim_end_matches(" kB").parse::<usize>().ok();
            }
        }
        // Other tests' memory may be in the same range of addresses, and huge pages are 2 MiB.
        assert!(resident.unwrap() < 32 << 10, "{resident:?} KiB");
    }
}
