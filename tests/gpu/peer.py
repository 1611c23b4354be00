"""Hugging Face transformers on LLaMA-7B's shape, bf16, random weights: what the benches of this folder stand beside.

    peer.py decode PROMPT STEPS ROWS...     ms a step, eager with a growing cache, and compiled with a static one
    peer.py train LENGTH MICRO_BATCHES ROWS tokens/s of forward, recomputation and backward, eager and compiled
"""
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)


def model(length):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=length, tie_word_embeddings=False, rms_norm_eps=1e-5)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = LlamaForCausalLM(config)
    return made


def seconds(work):
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def decode(prompt, steps, rows):
    from transformers import DynamicCache, StaticCache

    made = model(4096).eval()
    compiled = torch.compile(made.forward, mode="reduce-overhead", fullgraph=True)
    for count in rows:
        ids = torch.randint(0, 32000, (count, prompt), device="cuda")
        for name, forward in [("eager", made.forward), ("static, compiled", compiled)]:
            static = name != "eager"
            cache = StaticCache(config=made.config, max_cache_len=prompt + steps + 32) if static else DynamicCache()
            made.forward(input_ids=ids, past_key_values=cache, use_cache=True,
                         cache_position=torch.arange(prompt, device="cuda"))
            token, at = ids[:, -1:].clone(), prompt

            def run(number):
                nonlocal token, at
                for _ in range(number):
                    out = forward(input_ids=token, past_key_values=cache, use_cache=True,
                                  cache_position=torch.tensor([at], device="cuda"))
                    token, at = out.logits[:, -1:].argmax(-1).clone(), at + 1

            run(8)
            took = seconds(lambda: run(steps))
            print(f"  transformers {name}: {count} sequences, {took / steps * 1e3:.2f} ms a step", flush=True)


def train(length, micro_batches, rows):
    made = model(length).train()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.config.use_cache = False
    batches = torch.randint(0, 32000, (micro_batches, rows, length), device="cuda")

    def step():
        for ids in batches:
            made(input_ids=ids, labels=ids).loss.backward()
        made.zero_grad(set_to_none=False)

    for name in ["eager", "compiled"]:
        if name == "compiled":
            made.compile()
        step()
        took = min(seconds(step) for _ in range(2))
        print(f"  transformers {name}: {micro_batches * rows * length / took:.0f} tokens/s", flush=True)


arguments = [int(value) for value in sys.argv[2:]]
if sys.argv[1] == "decode":
    decode(arguments[0], arguments[1], arguments[2:])
else:
    train(*arguments)
