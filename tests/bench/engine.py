"""Runs the engines in turn, several rounds, and keeps the best of each: the others were disturbed. See engine.sh.

    engine.py PROGRAMS CACHE THREADS ROUNDS STEPS
    engine.py transformers THREADS STEPS      one round of transformers alone, in a process of its own"""
import json
import pathlib
import re
import sys
import time

from programs import cpu, told

PROMPT = 256
SHAPES = ["prompt", "1 sequence", "8 sequences"]


def ours(programs, model, threads, precision, steps):
    text = told([programs / "vicuna-engine-bench", "--model", model, "--precision", precision, "--threads", threads,
                 "--prompt", PROMPT, "--steps", steps, "--runs", 1], VICUNA_DEVICE="cpu", RUST_LOG="error")
    return [float(number) for number in re.findall(r"([0-9.]+) tokens/s", text)]


def llama_cpp(folder, model, threads, steps):
    prompt = json.loads(told([folder / "llama-bench", "-m", model, "-t", threads, "-p", PROMPT, "-n", 0, "-r", 2,
                              "-o", "json"]))[0]["samples_ts"]
    lines = told([folder / "llama-batched-bench", "-m", model, "-t", threads, "-tb", threads, "-c", 4096, "-npp", PROMPT,
                  "-ntg", steps, "-npl", "1,8"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines() if line.startswith("|")]
    return [max(prompt)] + [float(row[7]) for row in rows if row[0] == str(PROMPT)]


def transformers(threads, steps):
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True)).eval()
    found = []
    with torch.inference_mode():
        ids = torch.randint(0, 49152, (1, PROMPT))
        model(input_ids=ids, logits_to_keep=1)
        started = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1)
        found.append(PROMPT / (time.perf_counter() - started))
        for count in [1, 8]:
            cache = DynamicCache()
            model(input_ids=ids.expand(count, -1), past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = ids[:, :1].expand(count, -1)
            started = time.perf_counter()
            for _ in range(steps):
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
            found.append(count * steps / (time.perf_counter() - started))
    print(json.dumps(found))


def main():
    programs, cache, (threads, rounds, steps) = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:6]
    model = next((cache / "smollm2-135m").glob("*.gguf"))
    peers = next(cache.glob("llama-cpp-*"))
    python = next(cache.glob("transformers-*"))
    engines = {
        "ours, Q4_1 of the file": lambda: ours(programs, model, threads, "file", steps),
        "ours, bf16": lambda: ours(programs, model, threads, "bf16", steps),
        "llama.cpp, Q4_1": lambda: llama_cpp(peers, model, threads, steps),
        "transformers, bf16": lambda: json.loads(told(
            [sys.executable, __file__, "transformers", threads, steps], PYTHONPATH=str(python), LD_LIBRARY_PATH="",
            OMP_NUM_THREADS=threads)),
    }
    best = {name: [0.0] * len(SHAPES) for name in engines}
    for number in range(int(rounds)):
        for name, run in engines.items():
            found = run()
            print(f"  round {number + 1}, {name}: {found}", file=sys.stderr, flush=True)
            best[name] = [max(pair) for pair in zip(best[name], found, strict=True)]
    print(f"\n| SmolLM2-135M, {threads} threads, {cpu()}: tokens/s | {' | '.join(SHAPES)} |\n|---|---|---|---|")
    for name, rates in best.items():
        print(f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} |")
    mine, *theirs = [[max(best[name][index] for name in best if name.startswith("ours") == own)
                      for index in range(len(SHAPES))] for own in (True, False)]
    print(f"| our better one to the better peer | {' | '.join(f'{a / b:.2f}' for a, b in zip(mine, theirs[0]))} |")
    out = pathlib.Path("target/bench")
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine.json").write_text(json.dumps(best, indent=1))


if sys.argv[1] == "transformers":
    transformers(int(sys.argv[2]), int(sys.argv[3]))
else:
    main()
