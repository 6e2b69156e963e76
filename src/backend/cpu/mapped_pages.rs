//! Releases pages of mapped files that were read once for a conversion.

use std::ops::Range;

/// Advises the system that these bytes are not needed for now, if they are pages of a read-only mapping.
/// They stay readable: what is read again comes from the file again. Bytes of other memory are left alone.
pub fn release(all: &[bytes::Bytes]) {
    #[cfg(target_os = "linux")]
    {
        let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
            return;
        };
        let files: Vec<Range<usize>> = maps.lines().filter_map(read_only_file).collect();
        let page = rustix::param::page_size();
        for bytes in all {
            let start = (bytes.as_ptr() as usize).next_multiple_of(page);
            let end = (bytes.as_ptr() as usize + bytes.len()) / page * page;
            if start < end && files.iter().any(|file| file.start <= start && end <= file.end) {
                let pages = start as *mut std::ffi::c_void;
                // SAFETY: whole pages within one mapping of a file that cannot be written through, which stays mapped while
                // `bytes` is borrowed. The system drops them from memory and reads them from the file when they are next
                // touched: nothing that holds a reference to them sees a difference. Failing does nothing.
                let _ = unsafe { rustix::mm::madvise(pages, end - start, rustix::mm::Advice::LinuxDontNeed) };
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = all;
}

/// The addresses of a line of `/proc/self/maps`, if it is of a file and not writable
/// (<https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html>).
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
fn read_only_file(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?;
    let inode = fields.nth(2)?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let is_file = inode != "0" && fields.next().is_some_and(|path| path.starts_with('/'));
    (is_file && rights.starts_with("r-")).then_some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_are_not_written_through() {
        let line = "7f01a000-7f02b000 r--s 00000000 fe:00 917507    /models/weights.safetensors";
        assert_eq!(read_only_file(line), Some(0x7f01_a000..0x7f02_b000));
        for other in [
            "7f01a000-7f02b000 rw-s 00000000 fe:00 917507    /models/weights.safetensors",
            "55d0a000-55d2b000 r--p 00000000 00:00 0         [heap]",
            "55d0a000-55d2b000 r--p 00000000 00:00 0",
            "nonsense",
        ] {
            assert_eq!(read_only_file(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_released_still_reads_the_same() {
        let path = std::env::temp_dir().join(format!("lapidary-pages-{}", std::process::id()));
        let values: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &values).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        // SAFETY: nothing else changes the file.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let mapped = bytes::Bytes::from_owner(map);
        let own = bytes::Bytes::from(values.clone());
        assert_eq!(mapped, own);
        release(&[
            mapped.clone(),
            mapped.slice(5..70_001),
            own.clone(),
            bytes::Bytes::new(),
        ]);
        assert_eq!(own, values, "memory that is not a file's is left alone");
        assert_eq!(mapped, values);
        std::fs::remove_file(path).unwrap();
    }
}
