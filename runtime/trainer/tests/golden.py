"""The side of Hugging Face transformers and PEFT in the golden tests of trainings, for golden.rs beside this file.

golden.py logits BASE ADAPTER  reads ids as JSON from stdin, prints the logits of every position
golden.py train BASE ADAPTER   reads a recipe and its batches from stdin, starts from the adapter, and prints
                           the losses and the first step's gradients
golden.py answer BASE ADAPTER  reads a question as JSON from stdin, prints the prompt's ids and the 24 that follow greedily

An ADAPTER of "-" is none: what is trained or asked is the whole model.

A base of "Nf4" or "Int8" is quantised here, by the papers' definitions and not by our code.
"""

import json
import sys

import torch
import transformers
from peft import PeftModel

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(weight):
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().max(dim=1, keepdim=True).values
    nearest = (blocks / scales).unsqueeze(-1).sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scales).reshape(weight.shape)


def int8(weight):
    scales = weight.abs().max(dim=1, keepdim=True).values / 127
    return torch.round(weight / scales) * scales


QUANTISED = {"Nf4": nf4, "Int8": int8}


def load(base, adapter="-", held=None, trainable=False):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if held is not None and "_proj" in name:
            weight.data = QUANTISED[held](weight.data)
    if adapter == "-":
        return model
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def logits(base, adapter):
    ids = torch.tensor([json.load(sys.stdin)])
    model = load(base, adapter).eval()
    with torch.no_grad():
        adapted = model(ids).logits[0]
        merged = model.merge_and_unload()(ids).logits[0]
    json.dump({"adapted": adapted.flatten().tolist(), "merged": merged.flatten().tolist()}, sys.stdout)


def loss_sum(model, batch):
    shape = (batch["rows"], batch["length"])
    ids, labels = (torch.tensor(batch[key]).reshape(shape) for key in ("ids", "labels"))
    predicted = model(ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predicted, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


def train(base, adapter):
    run = json.load(sys.stdin)
    model = load(base, adapter, run["base"], trainable=True)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": run["weightDecay"]},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses, gradients = [], None
    for step in run["steps"]:
        optimizer.zero_grad()
        total = 0.0
        for batch in step["batches"]:
            loss = loss_sum(model, batch) / step["tokens"]
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients = gradients or {name: p.grad.flatten().tolist() for name, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), run["clip"])
        for group in optimizer.param_groups:
            group["lr"] = step["learningRate"]
        optimizer.step()
    json.dump({"losses": losses, "gradients": gradients}, sys.stdout)


def answer(base, adapter):
    """What a chat program does: the directory's own tokenizer and template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base if adapter == "-" else adapter)
    messages = [{"role": "user", "content": json.load(sys.stdin)}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = load(base, adapter).eval()
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    json.dump({"prompt": ids[0].tolist(), "reply": out[0, ids.shape[1] :].tolist()}, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"logits": logits, "train": train, "answer": answer}[sys.argv[1]](*sys.argv[2:])
