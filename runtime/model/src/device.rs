//! Where tensors live: the CPU, or a CUDA device whose libraries are opened at run time, so that
//! one binary serves both.

use crate::ModelError;
use std::ffi::CStr;
use tch::Device;

const CUDA_LIBRARY: &CStr = c"libtorch_cuda.so";

/// Opens `name` ("cpu" or "cuda"), or what VICUNA_DEVICE names, or the CPU, and sets the number of
/// threads from VICUNA_THREADS (default 1: then sums are added in one order on every machine).
///
/// Must be the process's first use of torch: CUDA registers itself when its library is opened.
pub fn open(name: Option<&str>) -> Result<Device, ModelError> {
    let from_environment = std::env::var("VICUNA_DEVICE").ok();
    let device = match name.or(from_environment.as_deref()).unwrap_or("cpu") {
        "cpu" | "" => Device::Cpu,
        "cuda" => open_cuda()?,
        other => return Err(ModelError::UnknownDevice(other.to_owned())),
    };
    tch::set_num_threads(threads(std::env::var("VICUNA_THREADS").ok().as_deref())?);
    Ok(device)
}

/// [`open`], and on a GPU only kernels that give the same bits each time: for training.
pub fn open_exact(name: Option<&str>) -> Result<Device, ModelError> {
    let device = open(name)?;
    if device.is_cuda() {
        crate::cuda::be_deterministic(true)?;
    }
    Ok(device)
}

/// Gives up what [`open_exact`] promised, for speed.
pub fn be_fast(device: Device) -> Result<(), ModelError> {
    if device.is_cuda() { crate::cuda::be_deterministic(false) } else { Ok(()) }
}

/// Bytes of memory of the GPU that [`open`] opened: those that nobody uses, and all.
pub fn memory_bytes() -> Result<(u64, u64), ModelError> {
    crate::cuda::device_memory_bytes()
}

fn threads(value: Option<&str>) -> Result<i32, ModelError> {
    let value = value.unwrap_or("1");
    match value.parse() {
        Ok(threads @ 1..=1024) => Ok(threads),
        _ => Err(ModelError::Threads(value.to_owned())),
    }
}

fn open_cuda() -> Result<Device, ModelError> {
    // SAFETY: the name is a C string; the library's initialisers are torch's own.
    let handle = unsafe { libc::dlopen(CUDA_LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        return Err(ModelError::NoCuda(format!(
            "{}; put torch/lib and nvidia/*/lib on LD_LIBRARY_PATH",
            last_loader_error()
        )));
    }
    if !tch::Cuda::is_available() {
        return Err(ModelError::NoCuda("torch's CUDA library is there, but it finds no GPU".to_owned()));
    }
    Ok(Device::Cuda(0))
}

pub(crate) fn last_loader_error() -> String {
    // SAFETY: dlerror returns null or a C string that lives until the next call on this thread.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the loader gives no reason".to_owned();
    }
    // SAFETY: not null, see above.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_devices_and_thread_counts_are_refused() {
        assert!(matches!(open(Some("tpu")), Err(ModelError::UnknownDevice(_))));
        assert!(matches!(threads(Some("0")), Err(ModelError::Threads(_))));
        assert!(matches!(threads(Some("many")), Err(ModelError::Threads(_))));
        assert_eq!(threads(None).unwrap(), 1);
    }
}
