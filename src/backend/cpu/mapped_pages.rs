//! Releases memory that is no longer needed: pages of mapped files (weights, in a conversion; this executable's code and constants,
//! most of which read and compile models), and free pages of the heap.

use std::ops::Range;

/// Advises the system that these bytes are not needed for now, if they are pages of a read-only mapping. They stay
/// readable: later reads load them from the file again. Other memory is not changed.
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

/// Advises the system that this executable's code and constants are not needed for now: most of them read and compile models, and the
/// rest is reloaded from the file when it is next touched. Does nothing under a debugger, whose breakpoints are in the code.
pub fn release_code() {
    #[cfg(target_os = "linux")]
    {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let status = read("/proc/self/status");
        let is_traced = status.lines().any(|line| {
            let tracer = line.strip_prefix("TracerPid:");
            tracer.is_some_and(|tracer| tracer.trim() != "0")
        });
        if is_traced {
            return;
        }
        for range in unmodified(&read("/proc/self/smaps"), release_code as fn() as usize) {
            let pages = range.start as *mut std::ffi::c_void;
            // SAFETY: a mapping of the executable's file that cannot be written and has no pages of its own, so that every page is as
            // the file has it (the file of a running executable cannot be written). The system reads it from there when it is
            // next touched. Failing does nothing.
            let _ = unsafe { rustix::mm::madvise(pages, range.len(), rustix::mm::Advice::LinuxDontNeed) };
        }
    }
}

/// The mappings in the text of `/proc/self/smaps` that are of the file that is executed at `own`, cannot be written, and have only
/// pages of that file. Addresses that the loader has relocated are on pages of their own ("Anonymous").
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
fn unmodified(smaps: &str, own: usize) -> Vec<Range<usize>> {
    struct Mapping<'a> {
        range: Range<usize>,
        /// Device and inode.
        file: Option<(&'a str, &'a str)>,
        is_unmodified: bool,
    }
    fn file(line: &str) -> Option<(&str, &str)> {
        let mut fields = line.split_ascii_whitespace().skip(3);
        fields.next().zip(fields.next())
    }
    let mut mappings: Vec<Mapping<'_>> = Vec::new();
    let mut executed = None;
    let mut inside = false;
    for line in smaps.lines() {
        // Details of a mapping have a name and a colon, a mapping begins with its addresses.
        if let Some((name, value)) = line.split_once(':').filter(|(name, _)| !name.contains('-')) {
            if inside && name == "Anonymous" && value.trim() == "0 kB" {
                mappings.last_mut().expect("one is open").is_unmodified = true;
            }
            continue;
        }
        if executable_file(line).is_some_and(|range| range.contains(&own)) {
            executed = file(line);
        }
        let range = read_only_file(line);
        inside = range.is_some();
        mappings.extend(range.map(|range| Mapping {
            range,
            file: file(line),
            is_unmodified: false,
        }));
    }
    mappings.retain(|mapping| mapping.is_unmodified && mapping.file.is_some() && mapping.file == executed);
    mappings.into_iter().map(|mapping| mapping.range).collect()
}

/// Returns free pages of the heap to the system: reading and compiling a model leaves many. Only glibc keeps them.
pub fn release_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            /// Keeps `pad` free bytes at the heap's end; returns 1 if memory was released.
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: as glibc declares it (malloc.h); it may be called at any time and from any thread.
        let _ = unsafe { malloc_trim(0) };
    }
}

/// The addresses of a line of `/proc/self/maps`, if it is code of a file and cannot be written.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
fn executable_file(line: &str) -> Option<Range<usize>> {
    let rights = line.split_ascii_whitespace().nth(1)?;
    read_only_file(line).filter(|_| rights == "r-xp")
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
    fn only_code_that_cannot_be_written() {
        let line = "55d0a000-55d2b000 r-xp 0090a000 fe:00 917507    /usr/bin/lapidary";
        assert_eq!(executable_file(line), Some(0x55d0_a000..0x55d2_b000));
        for other in [
            "55d0a000-55d2b000 r--p 0090a000 fe:00 917507    /usr/bin/lapidary",
            "55d0a000-55d2b000 rwxp 0090a000 fe:00 917507    /usr/bin/lapidary",
            "7ffd0000-7ffd2000 r-xp 00000000 00:00 0         [vdso]",
        ] {
            assert_eq!(executable_file(other), None, "{other}");
        }
    }

    #[test]
    fn only_mappings_of_the_executable_without_own_pages() {
        let smaps = "\
55d0a000-55d0c000 r--p 00000000 fe:00 917507                    /usr/bin/lapidary
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
55d0c000-55d2b000 r-xp 00002000 fe:00 917507                    /usr/bin/lapidary
Anonymous:             0 kB
55d2b000-55d2d000 r--p 00021000 fe:00 917507                    /usr/bin/lapidary
Anonymous:             8 kB
55d2d000-55d2e000 rw-p 00023000 fe:00 917507                    /usr/bin/lapidary
Anonymous:             0 kB
7f01a000-7f02b000 r--s 00000000 fe:00 917508                    /models/weights.safetensors
Anonymous:             0 kB
7f02b000-7f02c000 r-xp 00000000 fe:01 917507                    /usr/lib/other:1.so
Anonymous:             0 kB
7ffd0000-7ffd2000 r-xp 00000000 00:00 0                         [vdso]
Anonymous:             0 kB
";
        let own = unmodified(smaps, 0x55d0_d000);
        assert_eq!(own, [0x55d0_a000..0x55d0_c000, 0x55d0_c000..0x55d2_b000]);
        let library = 0x7f02_b000..0x7f02_c000;
        assert_eq!(unmodified(smaps, library.start + 16), vec![library]);
        assert!(unmodified(smaps, 0x55d2_d000).is_empty());
    }

    /// Resident pages of the code of this program, in KiB.
    #[cfg(target_os = "linux")]
    fn resident_code() -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = release_code as fn() as usize;
        let mut inside = false;
        let mut resident = 0;
        for line in maps.lines() {
            match line.strip_prefix("Rss:") {
                Some(rest) if inside => resident += rest.trim().trim_end_matches(" kB").parse::<usize>().unwrap(),
                Some(_) => {}
                None if line.contains('-') && line.contains(" r") => {
                    inside = executable_file(line).is_some_and(|range| range.contains(&own));
                }
                None => {}
            }
        }
        resident
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn code_that_is_released_comes_back() {
        // Executes code everywhere.
        let text = format!("{:?} {:e} {}", std::env::vars().collect::<Vec<_>>(), 1.5e300, f64::MAX);
        let (before, words) = (resident_code(), text.split_whitespace().count());
        release_code();
        assert!(resident_code() < before, "{before} KiB");
        assert_eq!(text.split_whitespace().count(), words);
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
