//! CUDA graphs, the size of a device, and torch's switch for deterministic kernels. Both are in torch's C++ only; a small
//! library of ours (`graph.cpp`), carried in the program, reaches them.

mod library;

use crate::ModelError;
use library::{Graph as RawGraph, Library};
use std::ptr;

/// Has torch choose kernels that give the same bits each time, or any. The first before the first CUDA computation.
pub fn be_deterministic(exact: bool) -> Result<(), ModelError> {
    let library = Library::open()?;
    // SAFETY: takes a number by value.
    library::check(unsafe { (library.deterministic)(exact) })
}

/// Bytes of the current device: those that nobody uses, and all.
pub fn device_memory_bytes() -> Result<(u64, u64), ModelError> {
    let library = Library::open()?;
    let (mut unused, mut total) = (0, 0);
    // SAFETY: both are places for numbers.
    library::check(unsafe { (library.device_memory)(&mut unused, &mut total) })?;
    Ok((unused as u64, total as u64))
}

/// Where graphs are captured: a stream and a pool of memory that they share. They are replayed one
/// after another.
#[derive(Debug)]
pub struct Capture {
    library: &'static Library,
    raw: *mut library::Capture,
}

// SAFETY: nothing in it belongs to a thread; `&mut self` keeps uses apart.
unsafe impl Send for Capture {}

/// Work for the GPU, recorded once, with all its memory; launched as one.
#[derive(Debug)]
pub struct Graph {
    library: &'static Library,
    raw: *mut RawGraph,
}

// SAFETY: as for Capture.
unsafe impl Send for Graph {}

impl Capture {
    pub fn new() -> Result<Self, ModelError> {
        let library = Library::open()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a place for the pointer.
        library::check(unsafe { (library.capture_new)(&mut raw) })?;
        Ok(Self { library, raw })
    }

    /// Records `work`, which is done once beforehand, so that libraries set themselves up. What it returns is
    /// memory of the graph, written by each replay. It must neither wait for the GPU nor read from
    /// it.
    pub fn record<T>(&mut self, work: impl Fn() -> Result<T, ModelError>) -> Result<(Graph, T), ModelError> {
        let _elsewhere = Elsewhere::enter(self)?;
        work()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `self.raw` lives; `raw` is a place for the pointer.
        let begun = library::check(unsafe { (self.library.graph_begin)(self.raw, &mut raw) });
        let graph = Graph { library: self.library, raw };
        begun?;
        let result = work();
        // SAFETY: `graph.raw` is being captured.
        library::check(unsafe { (self.library.graph_end)(graph.raw) })?;
        Ok((graph, result?))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // SAFETY: it is not used again; graphs do not refer to it.
        unsafe { (self.library.capture_free)(self.raw) }
    }
}

/// While it lives the thread works on the stream of captures.
struct Elsewhere<'a>(&'a Capture);

impl<'a> Elsewhere<'a> {
    fn enter(capture: &'a Capture) -> Result<Self, ModelError> {
        // SAFETY: `capture.raw` lives.
        library::check(unsafe { (capture.library.capture_enter)(capture.raw) })?;
        Ok(Self(capture))
    }
}

impl Drop for Elsewhere<'_> {
    fn drop(&mut self) {
        // SAFETY: `raw` lives.
        if let Err(error) = library::check(unsafe { (self.0.library.capture_leave)(self.0.raw) }) {
            tracing::error!(%error, "cannot leave the capture's stream");
        }
    }
}

impl Graph {
    /// Does the recorded work on the present stream, behind what is there.
    pub fn replay(&self) -> Result<(), ModelError> {
        // SAFETY: `raw` is a captured graph.
        library::check(unsafe { (self.library.graph_replay)(self.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: null is allowed; it is not used again.
        unsafe { (self.library.graph_free)(self.raw) }
    }
}
