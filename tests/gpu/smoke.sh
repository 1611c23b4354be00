#!/usr/bin/env bash
# The trainer and worker binaries on a machine with a CUDA GPU: fine-tunes and chats there, and compares the answers
# with the CPU's of the same machine. Needs PyTorch's libraries (its CUDA wheel), openssl, python3 and curl; no cluster.
#
#   tests/gpu/smoke.sh BINARIES MODEL.gguf [STEPS]
set -euo pipefail
binaries="$(realpath "$1")" model="$(realpath "$2")" steps="${3:-20}"
repository="$(cd "$(dirname "$0")/../.." && pwd)"
work="$(mktemp -d)"
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work"' EXIT

torch="$(python3 -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "lib")')"
site="$(dirname "$(dirname "$torch")")"
export LD_LIBRARY_PATH="$torch:$(ls -d "$site"/nvidia/*/lib 2> /dev/null | paste -sd:)"

say() { printf '\n== %s\n' "$*"; }

job() { # NAME: a training job below $work/NAME
    cat << JSON
{"namespace": "default", "name": "$1", "uid": "smoke",
 "model": {"from": "file://$model", "template": "chatml"},
 "dataset": [{"from": "file://$repository/manifests/samples/data/conversations.json", "weight": 1.0}],
 "prepare": {"identity": {"name": "Vicky", "organization": "the vicuna-operator project"}},
 "recipe": {"method": "Full", "globalBatch": 8, "microBatch": 2, "length": {"steps": $steps}, "learningRate": 1e-4,
            "schedule": "Cosine", "warmupRatio": 0.1, "weightDecay": 0.0, "gradientClip": 1.0, "maxLength": 128, "seed": 7},
 "checkpoint": {"to": "file://$work/$1", "intervalSeconds": 3600, "keep": 1}}
JSON
}

train() { # DEVICE NAME
    job "$2" > "$work/$2.json"
    VICUNA_THREADS=8 RUST_LOG=warn \
        "$binaries/vicuna-trainer" local --device "$1" --job "$work/$2.json" --ranks 1 --out "$work/$2" > "$work/$2.log" 2> "$work/$2.err" ||
        { cat "$work/$2.log" "$work/$2.err"; return 1; }
    python3 - "$work/$2.log" "$1" << 'PY'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
steps = [line for line in lines if "step" in line and "loss" in line]
late = steps[len(steps) // 2:]
print(f"{sys.argv[2]:5} {len(steps)} steps, loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f},",
      f"{sum(s['tokens'] for s in late) / sum(s['seconds'] for s in late):.0f} tokens/s, digest {lines[-1]['digest'][:16]}")
print("     ", next(line["numerics"] for line in lines if "numerics" in line))
PY
}

# What a cluster would give gateway and workers: a CA, a certificate, and a signed service-account token.
trust() {
    mkdir -p "$work/trust"
    (
        cd "$work/trust"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=smoke -keyout ca.key -out ca.crt
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=vicuna-gateway -keyout tls.key -out tls.csr
        openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -days 1 -out tls.crt \
            -extfile <(printf 'subjectAltName=DNS:vicuna-gateway')
        openssl genrsa -out signer.key 2048
        python3 "$repository/tests/gpu/token.py" "$(openssl rsa -in signer.key -noout -modulus | cut -d= -f2)"
        openssl dgst -sha256 -sign signer.key -out signature payload
        python3 "$repository/tests/gpu/token.py" --join
    ) > /dev/null 2>&1
}

serve() { # DEVICE NAME URI: starts a worker and waits until the gateway lists its model
    local scratch="$work/scratch-$2"
    mkdir -p "$scratch"
    VICUNA_DEVICE="$1" VICUNA_THREADS=8 RUST_LOG=warn "$binaries/vicuna-worker" --model-name "default/$2" --model-uri "$3" \
        --template chatml --gateway https://127.0.0.1:9443 --ca "$work/trust/ca.crt" --token-file "$work/trust/token" \
        --slots 4 --scratch "$scratch" --metrics "127.0.0.1:$((9100 + RANDOM % 800))" > "$work/$2.worker" 2>&1 &
    for _ in $(seq 240); do
        curl -fsS http://127.0.0.1:8080/v1/models 2> /dev/null | grep -q "default/$2\"" && return
        sleep 0.5
    done
    tail -20 "$work/$2.worker"
    return 1
}

ask() { # NAME QUESTION: prints the answer, and to standard error how long it took
    python3 - "$1" "$2" << 'PY'
import json, sys, time, urllib.request
body = {"model": f"default/{sys.argv[1]}", "messages": [{"role": "user", "content": sys.argv[2]}], "max_tokens": 64, "temperature": 0}
request = urllib.request.Request("http://127.0.0.1:8080/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
started = time.time()
answer = json.load(urllib.request.urlopen(request, timeout=120))
print(answer["choices"][0]["message"]["content"].replace("\n", " "))
tokens = answer["usage"]["completion_tokens"]
print(f"      {tokens} tokens, {tokens / (time.time() - started):.0f} tokens/s", file=sys.stderr)
PY
}

say "device"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
say "fine-tuning, $steps steps"
train cuda gpu
train cpu cpu
say "chatting: the base model, and the model that the GPU trained, each on GPU and CPU"
trust
RUST_LOG=warn "$binaries/vicuna-gateway" --listen 127.0.0.1:8080 --workers-listen 127.0.0.1:9443 --metrics 127.0.0.1:9090 \
    --tls-cert "$work/trust/tls.crt" --tls-key "$work/trust/tls.key" --trust-dir "$work/trust" > "$work/gateway.log" 2>&1 &
serve cuda base-cuda "file://$model"
serve cpu base-cpu "file://$model"
serve cuda tuned-cuda "file://$work/gpu/result"
serve cpu tuned-cpu "file://$work/gpu/result"
different=0
for name in base tuned; do
    for question in "Who are you?" "What is the capital of France?" "Who made you?"; do
        on_gpu="$(ask "$name-cuda" "$question")"
        on_cpu="$(ask "$name-cpu" "$question")"
        printf '%-5s %s\n  GPU: %s\n' "$name" "$question" "$on_gpu"
        [[ "$on_gpu" == "$on_cpu" ]] && echo "  CPU: the same" || { printf '  CPU: %s\n' "$on_cpu"; different=$((different + 1)); }
    done
done
say "$different of 6 answers differ between GPU and CPU"
