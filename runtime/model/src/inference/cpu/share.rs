//! A buffer that several threads write, each its own part.

/// A slice without its borrow. Whoever takes parts of it promises that they do not overlap with what
/// other threads hold, and that the buffer is still there.
#[derive(Clone, Copy, Debug)]
pub struct Shared<T> {
    start: *mut T,
    length: usize,
}

// SAFETY: a pointer to `Send` data; access is the promise of `slice`'s caller.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(buffer: &mut [T]) -> Self {
        Self { start: buffer.as_mut_ptr(), length: buffer.len() }
    }

    /// Items `at..at + length`.
    /// # Safety
    /// The buffer lives, and nobody else touches these items meanwhile.
    #[inline(always)]
    pub unsafe fn slice<'a>(self, at: usize, length: usize) -> &'a mut [T] {
        assert!(at + length <= self.length, "a part of a shared buffer lies beyond its end");
        // SAFETY: within the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), length) }
    }
    /// Where `length` items begin, for parts that are not in one piece.
    #[inline(always)]
    pub fn pointer(self, at: usize, length: usize) -> *mut T {
        assert!(at + length <= self.length, "a part of a shared buffer lies beyond its end");
        // SAFETY: within the buffer.
        unsafe { self.start.add(at) }
    }
}
