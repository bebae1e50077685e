//! How the C library's allocator behaves under network load.

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

#[cfg(test)]
mod tests {
    #[test]
    fn the_allocator_goes_on_working() {
        super::keep_freed();
        for size in [1 << 10, 1 << 20, 8 << 20] {
            assert_eq!(vec![7u8; size].iter().filter(|b| **b == 7).count(), size);
        }
    }
}
