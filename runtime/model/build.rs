//! Builds what is in C++: `src/autograd/autograd.cpp` into the program, and `src/cuda/graph.cpp` into a library of its
//! own, which is carried in the program and opened at run time behind torch's CUDA libraries: the program itself needs
//! none of them.

use std::path::{Path, PathBuf};
use std::{env, process};

const AUTOGRAD: &str = "src/autograd/autograd.cpp";
const GUARDED: &str = "src/guarded.h";
const GRAPH: &str = "src/cuda/graph.cpp";

fn main() {
    for variable in ["LIBTORCH", "VICUNA_CUDA_INCLUDE"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for source in [AUTOGRAD, GRAPH, GUARDED] {
        println!("cargo::rerun-if-changed={source}");
    }
    let torch = folder("LIBTORCH", "libtorch").join("include");
    build_autograd(&torch);
    build_graph(&torch);
}

fn build_autograd(torch: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        // The first two change no result; without the first, comparisons keep loops from becoming vectors. Bits of
        // numbers are looked at as integers.
        .flags(["-fno-trapping-math", "-fno-math-errno", "-fno-strict-aliasing"])
        .warnings(false)
        .includes([torch, &torch.join("torch/csrc/api/include")])
        .file(AUTOGRAD)
        .compile("vicuna_autograd");
}

fn build_graph(torch: &Path) {
    let cuda = folder("VICUNA_CUDA_INCLUDE", "the CUDA runtime's headers");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("libvicuna_cuda.so");
    let compiler = cc::Build::new().cpp(true).opt_level(2).get_compiler();
    let status = compiler
        .to_command()
        .args(["-shared", "-fPIC", "-std=c++17", "-s"])
        .args([include(torch), include(&cuda)])
        .args([Path::new(GRAPH), Path::new("-o"), &out])
        .status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("{GRAPH} could not be compiled against {} and {}", torch.display(), cuda.display());
        process::exit(1);
    }
}

fn include(folder: &Path) -> String {
    format!("-I{}", folder.display())
}

fn folder(variable: &str, what: &str) -> PathBuf {
    env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| {
        eprintln!(
            "{variable} must name the folder of {what}: source tests/tools/env.sh, which sets it, after make tools"
        );
        process::exit(1);
    })
}
