"""Logits of Hugging Face transformers, for the Rust test beside this file.

logits.py make DIR FAMILY      writes a tiny random model as transformers saves it
logits.py train DIR            reads a recipe as JSON from stdin, prints losses and the first gradients
logits.py logits DIR           reads ids as JSON from stdin, prints the logits of every position
logits.py answer DIR QUESTION  prints what the model answers greedily, as JSON with the prompt's ids
"""

import json
import sys

import torch
import transformers


SHAPE = dict(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
    tie_word_embeddings=False,
)

# What each model has that the others lack.
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rope_theta=50_000.0),
    "llama-linear": lambda: transformers.LlamaConfig(**SHAPE, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3": lambda: transformers.LlamaConfig(
        **SHAPE,
        rope_theta=50_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": lambda: transformers.Qwen2Config(**{**SHAPE, "tie_word_embeddings": True}),
    "qwen2-yarn": lambda: transformers.Qwen2Config(
        **{**SHAPE, "max_position_embeddings": 32},
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, head_dim=12, sliding_window=20),
}


def make(directory, family):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(directory)


def train(directory):
    """A curve of losses and the first step's gradients: AdamW, clipped, weight decay on matrices."""
    recipe = json.load(sys.stdin)
    model = load(directory).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe["weightDecay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe["learningRate"], betas=(0.9, 0.999), eps=1e-8, foreach=False)
    losses, gradients = [], {}
    for ids, labels in recipe["batches"]:
        optimizer.zero_grad()
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = {name: p.grad.flatten().tolist() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
    json.dump({"losses": losses, "gradients": gradients}, sys.stdout)


def load(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def logits(directory):
    ids = json.load(sys.stdin)
    with torch.no_grad():
        out = load(directory)(torch.tensor([ids])).logits[0]
    json.dump([float(value) for value in out.flatten()], sys.stdout)


def answer(directory, question):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = load(directory).generate(ids, max_new_tokens=24, do_sample=False)
    reply = out[0, ids.shape[1] :]
    json.dump(
        {"prompt": ids[0].tolist(), "reply": reply.tolist(), "text": tokenizer.decode(reply, skip_special_tokens=True)},
        sys.stdout,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "train": train, "logits": logits, "answer": answer}[sys.argv[1]](*sys.argv[2:])
