"""Logits of Hugging Face transformers, for the Rust test beside this file.

logits.py make DIR             writes a tiny random LLaMA as transformers saves it
logits.py logits DIR           reads ids as JSON from stdin, prints the logits of every position
logits.py answer DIR QUESTION  prints what the model answers greedily, as JSON with the prompt's ids
"""

import json
import sys

import torch
import transformers


def make(directory):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=50_000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


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
    {"make": make, "logits": logits, "answer": answer}[sys.argv[1]](*sys.argv[2:])
