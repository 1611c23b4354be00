#!/usr/bin/env bash
# Speed on a machine with a CUDA GPU, beside Hugging Face transformers in the same run: decoding and training of
# LLaMA-7B's shape in bf16, with random weights. Needs PyTorch's CUDA wheel, transformers and about 60 GB of GPU memory.
#
#   tests/gpu/speed.sh BINARIES    the folder of vicuna-engine-bench and vicuna-step-bench
set -euo pipefail
binaries="$(realpath "$1")" here="$(cd "$(dirname "$0")" && pwd)"
torch="$(python3 -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "lib")')"
site="$(dirname "$(dirname "$torch")")"
libraries="$torch:$(ls -d "$site"/nvidia/*/lib 2> /dev/null | paste -sd:)"
ours() { LD_LIBRARY_PATH="$libraries" VICUNA_DEVICE=cuda "$@"; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
printf '\n== decoding, 256 tokens of context\n'
ours "$binaries/vicuna-engine-bench" --random-7b --precision bf16 --cache 20 --sequences 1,8,32
python3 "$here/peer.py" decode 256 64 1 8 32
for shape in '8 1' '4 4'; do
    read -r micro_batches rows <<< "$shape"
    printf '\n== training, recomputation: %s micro-batches of %s x 2048 tokens\n' "$micro_batches" "$rows"
    echo Exact
    ours "$binaries/vicuna-step-bench" --micro-batches "$micro_batches" --rows "$rows"
    echo 'with any kernels'
    ours "$binaries/vicuna-step-bench" --micro-batches "$micro_batches" --rows "$rows" --fast
    python3 "$here/peer.py" train 2048 "$micro_batches" "$rows"
done
