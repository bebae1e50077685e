//! Memory of the process: how the C library's allocator behaves under network load, which pages of programs stay mapped, and
//! what freed memory still holds.
//!
//! Called by the proxy at its start and once it is ready, and by servers for their allocator; it knows nothing of what the
//! memory holds.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;

thread_local! {
    static WIPES: Cell<bool> = const { Cell::new(false) };
}

/// From now on this thread overwrites what it frees, if the program's allocator is [`Wiping`].
pub fn wipe_freed() {
    WIPES.set(true);
}

/// An allocator that overwrites memory before it is freed. Keys pass through many buffers on their way (of TLS, HTTP/2,
/// protobuf, PEM) that belong to libraries which do not know what they hold; types that wipe themselves do not reach those.
///
/// A proxy wipes on the threads of its agent ([`wipe_freed`]), where keys arrive, and not on those that move bytes of others.
#[derive(Debug)]
pub struct Wiping<A> {
    inner: A,
    always: bool,
}

impl<A> Wiping<A> {
    /// Wipes on threads that have called [`wipe_freed`].
    pub const fn where_asked(inner: A) -> Self {
        Wiping { inner, always: false }
    }

    /// Wipes on all threads.
    pub const fn always(inner: A) -> Self {
        Wiping { inner, always: true }
    }

    fn wipes(&self) -> bool {
        self.always || WIPES.get()
    }
}

/// Overwrites memory that is about to be freed.
///
/// # Safety
/// `start` must be valid for writes of `length` bytes.
unsafe fn wipe(start: *mut u8, length: usize) {
    // SAFETY: by this function's contract.
    unsafe { start.write_bytes(0, length) };
    // A compiler may leave out writes that nobody reads; this one might read them for all that it knows.
    std::hint::black_box(start);
}

// SAFETY: every block comes from and goes to the inner allocator with the layout that the caller gives; in between, only
// bytes of blocks that the caller gives up are written to.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Wiping<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of the inner function, which is the same.
        unsafe { self.inner.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if self.wipes() {
            // SAFETY: the caller gives up a block of this size.
            unsafe { wipe(block, layout.size()) };
        }
        // SAFETY: as above.
        unsafe { self.inner.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !self.wipes() {
            // SAFETY: as above.
            return unsafe { self.inner.realloc(block, layout, size) };
        }
        // The inner allocator would free the former block as it is.
        // SAFETY: the caller promises a size that is not zero and does not overflow with this alignment.
        let new = unsafe {
            self.inner
                .alloc(Layout::from_size_align_unchecked(size, layout.align()))
        };
        if !new.is_null() {
            // SAFETY: both blocks have at least this many bytes, and they are different ones.
            unsafe { new.copy_from_nonoverlapping(block, layout.size().min(size)) };
            // SAFETY: the former block is given up by the caller once this function succeeds.
            unsafe { self.dealloc(block, layout) };
        }
        new
    }
}

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
    use std::alloc::{GlobalAlloc, Layout, System};

    use super::{Code, Wiping};

    /// Frees into an allocator that shows what it gets.
    struct Shows;

    thread_local! {
        static FREED: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    // SAFETY: the system's allocator does the work; blocks are read while they are still the caller's to give.
    unsafe impl GlobalAlloc for Shows {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // SAFETY: the caller keeps the contract of the inner function, which is the same.
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            // SAFETY: the block has this size and was initialised by the test.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            FREED.with_borrow_mut(|freed| freed.extend_from_slice(bytes));
            // SAFETY: as above.
            unsafe { System.dealloc(block, layout) }
        }
    }

    fn freed_by(allocator: &Wiping<Shows>) -> Vec<u8> {
        let layout = Layout::from_size_align(32, 8).unwrap();
        FREED.take();
        // SAFETY: one block, written in full, grown once, and freed with the layout that it has then.
        unsafe {
            let block = allocator.alloc(layout);
            block.write_bytes(7, 32);
            let block = allocator.realloc(block, layout, 64);
            assert_eq!(std::slice::from_raw_parts(block, 32), [7; 32]);
            block.write_bytes(7, 64);
            allocator.dealloc(block, Layout::from_size_align(64, 8).unwrap());
        }
        FREED.take()
    }

    #[test]
    fn freed_memory_is_empty_where_it_is_asked_for() {
        assert_eq!(freed_by(&Wiping::always(Shows)), vec![0; 96]);
        let on_request = Wiping::where_asked(Shows);
        assert_eq!(freed_by(&on_request), vec![7; 96]);
        super::wipe_freed();
        assert_eq!(freed_by(&on_request), vec![0; 96]);
    }

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
