"""Runs trainers in turn, several rounds, and keeps the best of each: the others were disturbed. See training.sh.

    training.py PROGRAMS CACHE THREADS ROUNDS
    training.py transformers THREADS PRECISION eager|compiled    one round of transformers alone, in a process of its own"""
import json
import pathlib
import re
import sys
import time

from programs import cpu, told

ROWS, LENGTH, LAYERS, TURN = 4, 256, 30, 32
PRECISIONS = ["fp32", "bf16"]


def ours(programs, threads, precision, kept):
    arguments = [programs / "vicuna-step-bench", "--smollm2", "--rows", ROWS, "--length", LENGTH, "--micro-batches", 1, "--replies",
                 "--whole-layers", kept, "--steps", 3] + (["--fp32"] if precision == "fp32" else [])
    text = told(arguments, VICUNA_DEVICE="cpu", VICUNA_THREADS=threads)
    if "have the same bits" not in text:
        raise SystemExit(f"our steps differ:\n{text}")
    return max(float(number) for number in re.findall(r"^step \d+: ([0-9.]+) tokens/s", text, re.M))


def transformers(threads, precision, how):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True)).train()
    model.config.use_cache = False
    if how == "compiled":
        model.compile()
    ids = torch.randint(0, 32000, (ROWS, LENGTH))
    labels = ids.where(torch.arange(LENGTH) // TURN % 2 == 0, -100)
    best = 0.0
    for number in range(4):
        started = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        model.zero_grad(set_to_none=False)
        if number:
            best = max(best, ROWS * LENGTH / (time.perf_counter() - started))
    print(json.dumps(best))


def main():
    programs, cache, (threads, rounds) = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:5]
    python = next(cache.glob("transformers-*"))

    def peer(how):
        return lambda precision: json.loads(told(
            [sys.executable, __file__, "transformers", threads, precision, how], PYTHONPATH=str(python),
            LD_LIBRARY_PATH="", OMP_NUM_THREADS=threads))

    trainers = {
        "ours, layers kept": lambda precision: ours(programs, threads, precision, LAYERS),
        "ours, layers run again": lambda precision: ours(programs, threads, precision, 0),
        "transformers, eager": peer("eager"),
        "transformers, compiled": peer("compiled"),
    }
    best = {name: dict.fromkeys(PRECISIONS, 0.0) for name in trainers}
    for number in range(int(rounds)):
        for precision in PRECISIONS:
            for name, run in trainers.items():
                found = run(precision)
                print(f"  round {number + 1}, {precision}, {name}: {found:.0f}", file=sys.stderr, flush=True)
                best[name][precision] = max(best[name][precision], found)
    print(f"\n| SmolLM2-135M's shape, {ROWS} x {LENGTH} tokens, {threads} threads, {cpu()}: tokens/s | "
          f"{' | '.join(PRECISIONS)} |\n|---|---|---|")
    for name, rates in best.items():
        print(f"| {name} | {' | '.join(f'{rates[precision]:.0f}' for precision in PRECISIONS)} |")
    ratios = []
    for precision in PRECISIONS:
        mine, theirs = (max(rates[precision] for name, rates in best.items() if name.startswith("ours") == own)
                        for own in (True, False))
        ratios.append(f"{mine / theirs:.2f}")
    print(f"| our better one to the better of transformers' | {' | '.join(ratios)} |")
    out = pathlib.Path("target/bench")
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").write_text(json.dumps(best, indent=1))


if sys.argv[1] == "transformers":
    transformers(int(sys.argv[2]), sys.argv[3], sys.argv[4])
else:
    main()
