//! Memory of the process: how the C library's allocator behaves under network load, and which pages of programs stay mapped.
//!
//! Called by the proxy at its start and once it is ready; it knows nothing of what the memory holds.

/// Tells the allocator to keep freed memory for a while. By default glibc hands the top of a heap back at every
/// opportunity and faults it in again with the next buffer; a proxy that moves bulk data spends a third of its time so.
/// To be called once, before there are threads. Without glibc it does nothing.
pub fn keep_freed() {
    #[cfg(target_env = "gnu")]
    {
        // Free memory at the end of a heap that is kept for the next buffer, per heap.
        const KEEP: libc::c_int = 16 << 20;
        // Blocks above this size are mapped and unmapped one by one.
        const MAPPED: libc::c_int = 4 << 20;
        // SAFETY: mallopt takes two integers and changes the allocator's parameters under the allocator's own lock.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        }
    }
}

/// The code of the running program and of its libraries, as it was mapped at the time of [`Code::find`].
///
/// The kernel maps sixteen pages of a file at each fault, so what a start touches here and there becomes nearly the whole
/// program, and stays so: a proxy of 12 MB keeps 10 MB of code mapped of which its work needs a third.
#[derive(Debug)]
pub struct Code {
    ranges: Vec<std::ops::Range<usize>>,
}

impl Code {
    /// Reads the map of the process; to be called before the process gives up its view of `/proc`.
    ///
    /// # Errors
    /// When `/proc/self/maps` cannot be read.
    pub fn find() -> std::io::Result<Code> {
        Ok(Code::parse(&std::fs::read_to_string("/proc/self/maps")?))
    }

    /// Only code of files (`r-xp`) counts: it was never written to, so it can be read from the file again. Data that the
    /// loader has relocated could not.
    fn parse(maps: &str) -> Code {
        let ranges = maps.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (range, permissions, _, _, inode) = (
                fields.next()?,
                fields.next()?,
                fields.next()?,
                fields.next()?,
                fields.next()?,
            );
            let (from, to) = range.split_once('-')?;
            let from = usize::from_str_radix(from, 16).ok()?;
            let to = usize::from_str_radix(to, 16).ok()?;
            (permissions == "r-xp" && inode != "0" && from < to).then_some(from..to)
        });
        Code {
            ranges: ranges.collect(),
        }
    }

    /// Takes the pages out of the process's map. What is used again comes back from the page cache at its next use.
    pub fn give_back(&self) {
        for range in &self.ranges {
            let start = range.start as *mut libc::c_void;
            // SAFETY: the range was a private mapping of a file without write permission, and nothing in this process
            // unmaps or remaps code. MADV_DONTNEED on such a mapping only drops page table entries: the next access,
            // of any thread, maps the same bytes of the same file again. A failure leaves everything as it was.
            let _ = unsafe { libc::madvise(start, range.len(), libc::MADV_DONTNEED) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    fn resident(name: &str) -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn only_code_of_files_is_given_back() {
        let maps = "55c0-55d0 r--p 00000000 fe:00 12 /usr/bin/x\n\
                    55d0-55f0 r-xp 00010000 fe:00 12 /usr/bin/x\n\
                    55f0-5600 rw-p 00030000 fe:00 12 /usr/bin/x\n\
                    7000-7010 r-xp 00000000 00:00 0 [vdso]\n\
                    nonsense\n";
        assert_eq!(Code::parse(maps).ranges, vec![0x55d0..0x55f0; 1]);
    }

    #[test]
    fn code_that_was_given_back_runs_again() {
        let code = Code::find().unwrap();
        let before = resident("RssFile:");
        code.give_back();
        let after = resident("RssFile:");
        assert!(after < before, "{after} kB of {before} kB are still mapped");
        assert_eq!("still here".len(), 10);
    }

    #[test]
    fn the_allocator_goes_on_working() {
        super::keep_freed();
        for size in [1 << 10, 1 << 20, 8 << 20] {
            assert_eq!(vec![7u8; size].iter().filter(|b| **b == 7).count(), size);
        }
    }
}
