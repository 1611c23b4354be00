"""Trainer processes on the cards of one machine; see ranks.sh.

    ranks.py BINARIES WORK
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from trainers import PATIENCE_S, Ranks  # noqa: E402

BINARIES, WORK = Path(sys.argv[1]), Path(sys.argv[2])
CARDS = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines())


def spawn(command, log, **environment):
    everything = {**os.environ, "LD_LIBRARY_PATH": os.environ["LIBRARIES"], **environment}
    return subprocess.Popen(command, stdout=log, stderr=log, env=everything)


class Run:
    """So many ranks, a card each in turn."""

    def __init__(self, name, model, ranks, steps, precision, global_batch=8, micro_batch=2, length=128, words=12):
        recipe = {
            "globalBatch": global_batch, "microBatch": micro_batch, "length": {"steps": steps}, "schedule": "Cosine",
            "warmupRatio": 0.1, "maxLength": length, "precision": precision}
        self.ranks = Ranks(WORK / name, BINARIES / "coordinator", BINARIES / "vicuna-trainer", spawn, model, recipe,
                           words=words, most=max(ranks, 2))
        self.folder, self.running = self.ranks.folder, self.ranks.running
        for _ in range(ranks):
            self.start()

    def start(self):
        card = str(self.ranks.born % CARDS)
        self.ranks.start(CUDA_VISIBLE_DEVICES=card, VICUNA_DEVICE="cuda", VICUNA_THREADS="6", RUST_LOG="info")

    def step(self, least):
        return self.ranks.log.until(lambda line: line.get("step", 0) >= least, f"step {least}")

    def formed(self, count):
        return self.ranks.log.until(lambda line: line.get("formed") == count, f"{count} ranks")

    def end(self):
        for rank in self.running:
            rank.wait(PATIENCE_S)
        self.ranks.coordinator.kill()
        self.ranks.coordinator.wait()
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
    run.running.pop(0).kill()
    run.start()
    run.formed(2)
    run.step(120)
    run.running.pop(0).send_signal(signal.SIGTERM)
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
    print(f"1.1B, bf16, 16 sequences a step, {ranks} rank(s): {per_step:.2f} s a step", flush=True)
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
