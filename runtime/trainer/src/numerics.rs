//! The numerics class: what decides the last bits besides the job. Ranks of one class compute the
//! same micro-batch to the same bits.

use crate::batch::{LENGTH_STEP, SHAPE_RULE};
use std::fs::File;
use std::sync::LazyLock;
use tch::Device;
use vicuna_checkpoint::ManifestRef;
use vicuna_protocol::numerics::difference;

/// The libtorch that tch 0.24 binds to.
const TORCH: &str = "2.11.0";
/// Letters of the program's digest.
const PROGRAM_LETTERS: usize = 16;

/// A digest of this very program. The order in which our kernels, the tree and the optimizer add is in its code, and no
/// version number is sure to change when that does. It refuses no upgrade: a training's image is pinned from its first pod
/// on, and who gives that image up lets other classes in.
static PROGRAM: LazyLock<String> = LazyLock::new(|| {
    let digest = File::open("/proc/self/exe").and_then(|program| {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(program).map(|hasher| hasher.finalize().to_hex().to_string())
    });
    match digest {
        Ok(digest) => digest.chars().take(PROGRAM_LETTERS).collect(),
        // A system without /proc: the version is better than nothing.
        Err(_) => env!("CARGO_PKG_VERSION").to_owned(),
    }
});

/// Of this process on `device` with `threads` threads, in words that can be compared one by one.
pub fn class(device: Device, threads: i32) -> String {
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
        "program={}; torch={TORCH}; arch={}; isa={}; threads={threads}; device={device}; shapes={SHAPE_RULE}/{LENGTH_STEP}",
        *PROGRAM,
        std::env::consts::ARCH,
        isa().join("+"),
    )
}

/// Whether weights stay exact when a process of class `own` goes on from a checkpoint. `Err`: why not, and what to do. A
/// checkpoint of an earlier release does not say its class and is taken.
pub fn check(own: &str, base: &ManifestRef) -> Result<(), String> {
    let theirs = &base.numerics_class;
    if theirs.is_empty() || theirs == own {
        return Ok(());
    }
    Err(format!(
        "the checkpoint {} is of another numerics class ({}): go on with the same program on hardware of the same kind, or train anew into another folder, with recipe.reproducibility Fast if the last bits do not matter",
        base.key,
        difference(own, theirs)
    ))
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
    fn threads_and_program_belong_to_the_class() {
        let one = class(Device::Cpu, 1);
        assert_eq!(one, class(Device::Cpu, 1));
        assert_eq!(difference(&class(Device::Cpu, 2), &one), "threads is 2 instead of 1");
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let digest = blake3::hash(&own).to_hex();
        assert!(one.starts_with(&format!("program={};", &digest[..PROGRAM_LETTERS])), "{one}");
    }

    #[test]
    fn a_checkpoint_of_another_class_is_refused_with_what_differs_and_one_that_says_none_is_taken() {
        let base = |class: &str| ManifestRef {
            step: 2,
            generation: 1,
            key: "manifests/2-1.json".to_owned(),
            digest: String::new(),
            numerics_class: class.to_owned(),
        };
        let own = "isa=avx2; threads=1";
        assert_eq!(check(own, &base(own)), Ok(()));
        assert_eq!(check(own, &base("")), Ok(()));
        let refused = check(own, &base("isa=avx2+avx512f; threads=1")).unwrap_err();
        for words in ["manifests/2-1.json", "isa is avx2 instead of avx2+avx512f", "same kind", "Fast"] {
            assert!(refused.contains(words), "{refused}");
        }
    }
}
