"""Ours and torchrun's elastic DDP as processes of this machine: ranks that are started, killed and told to go."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tools"))
from trainers import Log, Ranks, free_port  # noqa: E402

SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=295, tie_word_embeddings=True),
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
}
GLOBAL_BATCH, MICRO_BATCH, LENGTH, SAVE_EVERY = 8, 2, 128, 10
children = []


def spawn(command, log, **environment):
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "VICUNA_THREADS": "1", **environment}
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT if log != subprocess.PIPE else None,
                             env=everything, start_new_session=True)
    children.append(child)
    return child


def kill(child):
    """The process and its children, as when a node goes."""
    with_children = [child.pid, *descendants(child.pid)]
    for pid in with_children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    child.wait()


def descendants(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [below for child in map(int, listed) for below in (child, *descendants(child))]


class Ours:
    """Real trainer processes and the operator's coordinator (examples/coordinator.rs), over TLS."""

    def __init__(self, binaries, work, source, ranks=2, grace_s=5):
        recipe = {"globalBatch": GLOBAL_BATCH, "microBatch": MICRO_BATCH, "length": {"steps": 10**6}, "maxLength": LENGTH}
        self.grace_s = grace_s
        self.ranks = Ranks(work, binaries / "examples/coordinator", binaries / "vicuna-trainer", spawn, source, recipe,
                           every_s=60, most=ranks)
        self.log = self.ranks.log

    def add(self):
        self.ranks.start(VICUNA_GRACE_SECONDS=str(self.grace_s))

    def leaver(self):
        """The process of the rank that goes next, which is the oldest."""
        return self.ranks.running.pop(0)

    def wait_for(self, count):
        formed = self.log.until(lambda line: line.get("formed") == count, f"{count} ranks")
        self.log.until(lambda line: line.get("generation") == formed["generation"] and "step" in line, f"a step of {count}")
        return formed

    def steps(self):
        """When each step was done, its number, and how many ranks made it: by the ranks' own logs, since the coordinator tells of
        a step a second only."""
        events = [json.loads(line) for line in (self.ranks.folder / "events.jsonl").read_text().splitlines()]
        worlds = [(event["at"], event["formed"]) for event in events if "formed" in event]
        first = {}
        for at, step in self.ranks.logged("step", "step"):
            first[step] = min(at, first.get(step, at))
        at_work = lambda at: [world for since, world in worlds if since <= at][-1]
        return sorted((at, int(step), at_work(at)) for step, at in first.items())


class Peer:
    """torchrun's agents, as on one node each. The first keeps the rendezvous and never goes."""

    def __init__(self, work, model, ranks=2):
        self.work, self.most = work, ranks
        settings = {
            "config": {**SHAPES[model], "max_position_embeddings": 512}, "threads": 1, "steps": 10**9, "log": str(work / "log"),
            "checkpoint": str(work / "checkpoint"), "save_every": SAVE_EVERY, "global_batch": GLOBAL_BATCH,
            "micro_batch": MICRO_BATCH, "length": LENGTH}
        (work / "settings.json").write_text(json.dumps(settings))
        self.log, self.rendezvous = Log(work / "log"), free_port()
        self.agents, self.born = [], 0

    def add(self):
        """Timeouts are a fraction of the defaults, to the peer's advantage: those wait 30 s for late nodes and 15 s for dead ones."""
        timing = "last_call_timeout=5,join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3"
        name = f"agent-{self.born}"
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{self.most}", "--nproc-per-node=1",
            "--max-restarts=1000", "--rdzv-id=bench", "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{self.rendezvous}", f"--rdzv-conf=is_host={int(self.born == 0)},{timing}",
            "--monitor-interval=0.1", "--local-addr=127.0.0.1", str(HERE / "torchrun.py"), str(self.work / "settings.json")]
        # A store of its own for each start: in the agents' shared one they may look for each other under different numbers of
        # restarts (one agent counts a failure, the other a change of members), and then never meet again.
        own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        log = open(self.work / f"{name}.log", "a")
        self.agents.append(spawn(command, log, BENCH_AGENT=name, GLOO_SOCKET_IFNAME="lo", LD_LIBRARY_PATH="", **own))
        self.born += 1

    def leaver(self):
        return self.agents.pop(1)

    def steps(self):
        lines = [json.loads(line) for line in (self.work / "log").read_text().splitlines()]
        return [(line["at"], line["step"], line["world"]) for line in lines if "step" in line]

    def wait_for(self, count):
        self.log.until(lambda line: line.get("world") == count and "step" in line, f"a step of {count} ranks")


def end_all():
    while children:
        child = children.pop()
        if child.poll() is None:
            kill(child)
