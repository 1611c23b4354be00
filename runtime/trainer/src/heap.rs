//! How the C library's heap serves a training: each step frees what the next one takes again.

/// Has the heap keep what is freed instead of giving it back to the kernel, which would hand it out again page by page,
/// zeroed: a tenth to a fifth of a step on a CPU. What lies below the peak is not shared with others then.
///
/// For the process's first thread, before there are others: one heap serves all of them, since only the first one's can
/// hold tensors of any size.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        const TOP_PAD_BYTES: libc::c_int = 64 << 20;
        for (parameter, value) in [
            (libc::M_ARENA_MAX, 1),
            (libc::M_MMAP_MAX, 0),
            (libc::M_TOP_PAD, TOP_PAD_BYTES),
            // Never.
            (libc::M_TRIM_THRESHOLD, -1),
        ] {
            // SAFETY: sets a number of the allocator.
            let is_set = unsafe { libc::mallopt(parameter, value) } == 1;
            if !is_set {
                tracing::debug!(parameter, value, "the heap keeps its setting");
            }
        }
    }
}

/// Gives memory that was freed back to the system, where the C library keeps it for later: after reading a model, or
/// copying one, that is a good part of it.
pub fn give_back_freed() {
    // SAFETY: takes a number, and no lock that this thread holds.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
