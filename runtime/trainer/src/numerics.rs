//! The numerics class: what decides the last bits besides the job. Ranks of one class compute the
//! same micro-batch to the same bits.

use crate::batch::{LENGTH_STEP, SHAPE_RULE};
use tch::Device;

/// The libtorch that tch 0.24 binds to.
const TORCH: &str = "2.11.0";

/// Hex digest of [`description`].
pub fn class(device: Device) -> String {
    blake3::hash(description(device).as_bytes()).to_hex().to_string()
}

/// What the class is made of, for logs.
pub fn description(device: Device) -> String {
    let threads = tch::get_num_threads();
    let device = match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!(
            "cuda:{} cudart={} cudnn={}",
            gpu_name(index),
            tch::utils::version_cudart(),
            tch::utils::version_cudnn()
        ),
        other => format!("{other:?}"),
    };
    format!(
        "program={} torch={TORCH} arch={} isa={} threads={threads} device={device} shapes={SHAPE_RULE}/{LENGTH_STEP}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        isa().join("+"),
    )
}

/// Instruction sets that torch's, oneDNN's and our own kernels are chosen by.
#[cfg(target_arch = "x86_64")]
fn isa() -> Vec<&'static str> {
    let sets = [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ("avx512cd", std::is_x86_feature_detected!("avx512cd")),
        ("avx512dq", std::is_x86_feature_detected!("avx512dq")),
        ("avx512vl", std::is_x86_feature_detected!("avx512vl")),
        ("bmi2", std::is_x86_feature_detected!("bmi2")),
        ("f16c", std::is_x86_feature_detected!("f16c")),
        ("lzcnt", std::is_x86_feature_detected!("lzcnt")),
        ("movbe", std::is_x86_feature_detected!("movbe")),
        ("avx512vnni", std::is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
    ];
    sets.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn isa() -> Vec<&'static str> {
    vec!["baseline"]
}

/// The driver's name of the GPU; the memory size tells partitions of one model apart.
fn gpu_name(index: usize) -> String {
    let output = std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
        .args(["-i", &index.to_string()])
        .output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unnamed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_belong_to_the_class() {
        tch::set_num_threads(1);
        let one = class(Device::Cpu);
        assert_eq!(one, class(Device::Cpu));
        assert!(description(Device::Cpu).contains("threads=1 "));
    }
}
