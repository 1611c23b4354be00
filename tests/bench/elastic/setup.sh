# Sourced by the benches beside torchrun: what both need, the binaries of this tree in $binaries and an empty $work.
source tests/tools/env.sh
tests/tools/transformers.sh > /dev/null
cargo build --release --locked --workspace --bins --examples
binaries="$CARGO_TARGET_DIR/release" work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [[ " $* " == *" smollm2 "* ]]; then
    tests/tools/model.sh > /dev/null
    BENCH_MODEL="$(find "$VICUNA_CACHE/smollm2-135m" -name '*.gguf' | head -1)"
else
    BENCH_MODEL="$work/model"
    "$binaries/vicuna-tiny-model" --out "$BENCH_MODEL" > /dev/null
fi
export BENCH_MODEL PYTHONPATH="$VICUNA_CACHE/transformers-5.24.0"
