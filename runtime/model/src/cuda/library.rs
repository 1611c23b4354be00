//! Opens the library that `build.rs` made of `graph.cpp`, from memory.

use crate::ModelError;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

static BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libvicuna_cuda.so"));

/// Of graph.cpp.
#[repr(C)]
pub struct Capture {
    _opaque: [u8; 0],
}

/// `at::cuda::CUDAGraph`.
#[repr(C)]
pub struct Graph {
    _opaque: [u8; 0],
}

/// Null, or a C string that lives until the thread's next failure.
pub type Failure = *const c_char;

/// Functions of graph.cpp.
#[derive(Debug)]
pub struct Library {
    pub capture_new: unsafe extern "C" fn(*mut *mut Capture) -> Failure,
    pub capture_free: unsafe extern "C" fn(*mut Capture),
    pub capture_enter: unsafe extern "C" fn(*mut Capture) -> Failure,
    pub capture_leave: unsafe extern "C" fn(*mut Capture) -> Failure,
    pub graph_begin: unsafe extern "C" fn(*mut Capture, *mut *mut Graph) -> Failure,
    pub graph_end: unsafe extern "C" fn(*mut Graph) -> Failure,
    pub graph_replay: unsafe extern "C" fn(*mut Graph) -> Failure,
    pub graph_free: unsafe extern "C" fn(*mut Graph),
    pub deterministic: unsafe extern "C" fn(bool) -> Failure,
    pub device_memory: unsafe extern "C" fn(*mut usize, *mut usize) -> Failure,
}

impl Library {
    /// Torch's CUDA libraries must be open.
    pub fn open() -> Result<&'static Self, ModelError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(load).as_ref().map_err(|reason| ModelError::NoCuda(reason.clone()))
    }
}

fn load() -> Result<Library, String> {
    let mut file = in_memory().map_err(|error| format!("no memory file for libvicuna_cuda.so: {error}"))?;
    file.write_all(BYTES).map_err(|error| format!("cannot write libvicuna_cuda.so: {error}"))?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|error| error.to_string())?;
    // SAFETY: the path is a C string; the library has no initialisers of its own.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(format!("libvicuna_cuda.so does not fit this torch: {}", crate::device::last_loader_error()));
    }
    // SAFETY: names and types are those of graph.cpp.
    unsafe {
        Ok(Library {
            capture_new: function(handle, c"vicuna_capture_new")?,
            capture_free: function(handle, c"vicuna_capture_free")?,
            capture_enter: function(handle, c"vicuna_capture_enter")?,
            capture_leave: function(handle, c"vicuna_capture_leave")?,
            graph_begin: function(handle, c"vicuna_graph_begin")?,
            graph_end: function(handle, c"vicuna_graph_end")?,
            graph_replay: function(handle, c"vicuna_graph_replay")?,
            graph_free: function(handle, c"vicuna_graph_free")?,
            deterministic: function(handle, c"vicuna_deterministic")?,
            device_memory: function(handle, c"vicuna_device_memory")?,
        })
    }
}

fn in_memory() -> std::io::Result<File> {
    // SAFETY: the name is a C string.
    let descriptor = unsafe { libc::memfd_create(c"vicuna_cuda".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: it is open and nobody else's.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// # Safety
/// `F` must be the function's type.
unsafe fn function<F: Copy>(handle: *mut c_void, name: &CStr) -> Result<F, String> {
    // SAFETY: `handle` is an open library, the name a C string.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if found.is_null() {
        return Err(format!("libvicuna_cuda.so has no {name:?}"));
    }
    // SAFETY: function pointers are of the size of pointers; the type is the caller's word.
    Ok(unsafe { std::mem::transmute_copy(&found) })
}

/// Errors of graph.cpp.
pub fn check(failure: Failure) -> Result<(), ModelError> {
    if failure.is_null() {
        return Ok(());
    }
    // SAFETY: not null, see Failure.
    let message = unsafe { CStr::from_ptr(failure) }.to_string_lossy();
    Err(ModelError::Cuda(message.lines().next().unwrap_or_default().to_owned()))
}
