"""Trainer processes on the cards of one machine; see ranks.sh.

    ranks.py BINARIES WORK
"""
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 120
BINARIES, WORK = Path(sys.argv[1]), Path(sys.argv[2])
CARDS = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job(folder, model, steps, precision, global_batch, micro_batch, length):
    recipe = {
        "method": "Full", "globalBatch": global_batch, "microBatch": micro_batch, "length": {"steps": steps},
        "learningRate": 1e-4, "schedule": "Cosine", "warmupRatio": 0.1, "weightDecay": 0.0, "gradientClip": 1.0,
        "maxLength": length, "seed": 1, "precision": precision}
    return {
        "namespace": "bench", "name": "bench", "uid": "bench", "model": {"from": f"file://{model}"},
        "dataset": [{"from": f"file://{folder}/data.json", "weight": 1.0}], "recipe": recipe,
        "checkpoint": {"to": f"file://{folder}/bucket", "intervalSeconds": 3600, "keep": 1}}


class Run:
    def __init__(self, name, model, ranks, steps, precision="Fp32", global_batch=8, micro_batch=2, length=128, words=12):
        self.folder, self.ranks, self.born, self.rest = WORK / name, [], 0, ""
        self.folder.mkdir()
        turns = lambda number: [{"from": "human", "value": f"Tell me about {number}."},
                                {"from": "gpt", "value": f"{number} comes after {number - 1}. " * words}]
        data = [{"id": str(number), "conversations": turns(number)} for number in range(1, 65)]
        (self.folder / "data.json").write_text(json.dumps(data))
        (self.folder / "token").write_text("bench\n")
        settings = job(self.folder, model, steps, precision, global_batch, micro_batch, length)
        (self.folder / "job.json").write_text(json.dumps(settings))
        events = open(self.folder / "events.jsonl", "w")
        self.coordinator = subprocess.Popen(
            [BINARIES / "coordinator", "--job", self.folder / "job.json", "--ca", self.folder / "ca.crt", "--max", str(max(ranks, 2))],
            stdout=events, env={**os.environ, "LD_LIBRARY_PATH": os.environ["LIBRARIES"]})
        self.events = open(self.folder / "events.jsonl")
        self.port = self.until(lambda line: "port" in line)["port"]
        for _ in range(ranks):
            self.start()

    def start(self):
        name = f"rank-{self.born}"
        environment = {
            **os.environ, "LD_LIBRARY_PATH": os.environ["LIBRARIES"], "CUDA_VISIBLE_DEVICES": str(self.born % CARDS),
            "VICUNA_DEVICE": "cuda", "VICUNA_THREADS": "6", "RUST_LOG": "info"}
        command = [
            BINARIES / "vicuna-trainer", f"--coordinator=https://127.0.0.1:{self.port}", f"--ca={self.folder}/ca.crt",
            f"--token-file={self.folder}/token", f"--scratch={self.folder}/{name}", f"--listen=127.0.0.1:{free_port()}",
            f"--metrics=127.0.0.1:{free_port()}", f"--pod-name={name}", f"--pod-uid={name}", f"--node-name={name}",
            "--pod-ip=127.0.0.1"]
        log = open(self.folder / f"{name}.log", "w")
        self.ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        self.born += 1

    def until(self, wanted):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.rest += self.events.readline()
            if not self.rest.endswith("\n"):
                time.sleep(0.002)
                continue
            line, self.rest = json.loads(self.rest), ""
            if wanted(line):
                return line
        for log in sorted(self.folder.glob("rank-*.log")):
            print(log.name, log.read_text()[-1500:], sep="\n")
        raise SystemExit(f"{self.folder.name}: waited {PATIENCE_S} s; {(self.folder / 'events.jsonl').read_text()[-2000:]}")

    def step(self, least):
        return self.until(lambda line: line.get("step", 0) >= least)

    def formed(self, ranks):
        return self.until(lambda line: line.get("formed") == ranks)

    def end(self):
        for rank in self.ranks:
            rank.wait(PATIENCE_S)
        self.coordinator.kill()
        self.coordinator.wait()
        files = sorted((self.folder / "bucket").rglob("result/**/*.safetensors"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else "none"
        lines = [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]
        lost = sum(line.get("lost", 0) for line in lines)
        recovered = [line["recoveredAfterMs"] for line in lines if "recoveredAfterMs" in line]
        return digest, lost, recovered, [line for line in lines if "step" in line]


def exactness(precision):
    alone = Run(f"alone-{precision}", WORK / "tiny", 1, 400, precision)
    undisturbed, *_ = alone.end()
    run = Run(f"disturbed-{precision}", WORK / "tiny", 2, 400, precision)
    run.step(30)
    run.ranks.pop(0).kill()
    run.start()
    run.formed(2)
    run.step(120)
    run.ranks.pop(0).send_signal(signal.SIGTERM)
    run.start()
    run.formed(2)
    digest, lost, recovered, _ = run.end()
    print(f"{precision}: two ranks on {CARDS} card(s), one killed, one joined, one left with notice, one joined: weights "
          f"{'equal' if digest == undisturbed else 'DIFFER'} ({digest[:12]}), {lost} steps lost, recoveries {recovered} ms", flush=True)
    return digest == undisturbed


def speed(model, ranks):
    run = Run(f"speed-{ranks}", model, ranks, 6, "Bf16", global_batch=16, micro_batch=4, length=2048, words=400)
    *_, steps = run.end()
    seconds = [later["at"] - former["at"] for former, later in zip(steps[2:], steps[3:])]
    per_step = sorted(seconds)[len(seconds) // 2] if seconds else float("nan")
    told = [json.loads(line) for line in (run.folder / "rank-0.log").read_text().splitlines() if line.startswith("{")]
    tokens = [line.get("tokens") or line.get("fields", {}).get("tokens") for line in told]
    tokens = [count for count in tokens if count]
    rate = f", {tokens[-1] / per_step:.0f} tokens/s" if tokens else ""
    print(f"1.1B, bf16, 16 sequences a step, {ranks} rank(s): {per_step:.2f} s a step{rate}", flush=True)
    shutil.rmtree(run.folder)


def model_of_1b(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (WORK / "tiny" / name).exists():
            shutil.copy(WORK / "tiny" / name, folder / name)


good = all([exactness("Fp32"), exactness("Bf16")])
try:
    model_of_1b(WORK / "1b")
    for count in sorted({1, CARDS}):
        speed(WORK / "1b", count)
except ImportError as error:
    print(f"no speeds: {error}")
sys.exit(0 if good else 1)
