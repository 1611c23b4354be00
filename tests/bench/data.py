"""What vicuna-data takes for a file of a given size, which is made from a seed: see data.sh."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time

SEED = 20
# Of words as long as English ones, so that the tokenizer has work of the usual kind.
SYLLABLES = "ba be bi bo da de di do fa fe fi ga ge go ha he hi ho ka ki la le li lo ma me mi mo na ne no pa pe ra re ri ro sa se si so ta te ti to va ve wa we".split()


def words(chance):
    return ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(20_000)]


def conversation(chance, vocabulary, number):
    """Of ShareGPT's kind: a few pairs, replies longer than questions, some as HTML, some with a counter, some unclean."""
    turns = []
    for _ in range(chance.randint(1, 6)):
        turns.append({"from": "human", "value": " ".join(chance.choices(vocabulary, k=chance.randint(5, 40)))})
        reply = " ".join(chance.choices(vocabulary, k=chance.randint(20, 300)))
        kind = chance.random()
        if kind < 0.2:
            reply = f'<div class="markdown"><p>{reply}</p><pre><code>{reply[:60]}</code></pre></div>'
        elif kind < 0.25:
            reply = f"1 / 2\n\n{reply}"
        turns.append({"from": "gpt", "value": reply})
    defect = chance.random()
    if defect < 0.01:
        turns.append({"from": "human"})
    elif defect < 0.03:
        turns.append({"from": "human", "value": "And then?"})
    return {"id": f"c{number}", "conversations": turns}


def write(path, bytes_wanted):
    chance = random.Random(SEED)
    vocabulary = words(chance)
    with open(path, "w") as file:
        written = number = 0
        while written < bytes_wanted:
            written += file.write(json.dumps(conversation(chance, vocabulary, number)) + "\n")
            number += 1
    return number


def measured(command):
    """Seconds, peak MB and the first line of what it says."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return time.monotonic() - started, usage.ru_maxrss / 1000, said


def main(program, tokenizer, megabytes):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        data = os.path.join(folder, "dirty.jsonl")
        count = write(data, int(megabytes) * 1_000_000)
        print(f"{os.path.getsize(data) / 1e6:.0f} MB, {count} conversations")
        encoding = ["--tokenizer", tokenizer, "--template", "vicuna_v1.1", "--clean"]
        for name, command in {
            "clean": ["clean", data, "--out", os.path.join(folder, "clean.jsonl")],
            "prepare": ["stats", data, *encoding],
            "prepare, packed": ["stats", data, *encoding, "--packing"],
        }.items():
            seconds, peak, said = measured([program, *command])
            encoded = [line for line in said.splitlines() if line.startswith("encoded")]
            print(f"{name}: {seconds:.0f} s, peak {peak:.0f} MB; {said.splitlines()[0]} {' '.join(encoded)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
