"""One rank of the peer: DDP on gloo under `torchrun`, with a checkpoint to start again from, as its documentation advises.

    torchrun ... torchrun.py SETTINGS.json

Says in LOG, a JSON line each, that it has started (with its process id) and, as rank 0, which steps are done.
"""
import contextlib
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

settings = json.load(open(sys.argv[1]))
log = open(settings["log"], "a", buffering=1)


def say(**what):
    log.write(json.dumps({"at": time.time(), "agent": os.environ["BENCH_AGENT"], **what}) + "\n")


torch.manual_seed(0)
torch.set_num_threads(settings["threads"])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
say(started=os.getpid(), rank=rank, world=world)
model = LlamaForCausalLM(LlamaConfig(**settings["config"])).train()
model.config.use_cache = False
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
step = 0
if os.path.exists(settings["checkpoint"]):
    saved = torch.load(settings["checkpoint"], weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
wrapped = DistributedDataParallel(model)
micro_batches = settings["global_batch"] // settings["micro_batch"]
mine = range(rank, micro_batches, world)
while step < settings["steps"]:
    step += 1
    optimizer.zero_grad()
    for place, index in enumerate(mine):
        generator = torch.Generator().manual_seed(step * micro_batches + index)
        shape = (settings["micro_batch"], settings["length"])
        ids = torch.randint(0, settings["config"]["vocab_size"], shape, generator=generator)
        last = place + 1 == len(mine)
        with contextlib.nullcontext() if last else wrapped.no_sync():
            (wrapped(input_ids=ids, labels=ids).loss / len(mine)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if rank == 0:
        say(step=step, world=world)
        if step % settings["save_every"] == 0:
            scratch = settings["checkpoint"] + ".new"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, scratch)
            os.replace(scratch, settings["checkpoint"])
