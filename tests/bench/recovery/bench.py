"""How long it takes from `kill -9` of one of two ranks to the next finished step: ours, and torchrun's elastic DDP.

    bench.py BINARIES WORK [--model tiny|smollm2] [--kills N]

Both run on this machine, a thread a rank, with the same model's shape, the same global batch, and a new process in the
killed one's place; for ours also how long the training stands still while that process joins. Ours are real trainer processes and the operator's coordinator (examples/coordinator.rs), over TLS. The
peer has two agents, as on two nodes. In its first part one of two ranks is killed, and the agents start both anew; in the second
the rank's agent is killed too, as when a node goes, and the other one has to find out and go on alone.
"""
import argparse
import json
import os
import signal
import statistics
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
    def __init__(self, binaries, work, source):
        recipe = {"globalBatch": GLOBAL_BATCH, "microBatch": MICRO_BATCH, "length": {"steps": 10**6}, "maxLength": LENGTH}
        self.ranks = Ranks(work, binaries / "examples/coordinator", binaries / "vicuna-trainer", spawn, source, recipe,
                           every_s=60)
        self.log, self.joins = self.ranks.log, []
        self.ranks.start(), self.ranks.start()
        self.wait_for_two()

    def wait_for_two(self):
        formed = self.log.until(lambda line: line.get("formed") == 2, "two ranks")
        self.log.until(lambda line: line.get("generation") == formed["generation"] and "step" in line, "a step of two")
        time.sleep(1)
        if formed["generation"] > 1:
            self.joins.append(self.pause(formed))

    def pause(self, formed):
        """Of a join: seconds from the last step without the newcomer to the first one's beginning, by phase. By the ranks' own
        logs, since the coordinator tells of a step a second only."""
        steps = self.ranks.logged("step", "seconds")
        ready = max(at for at, generation in self.ranks.logged("ready", "generation") if generation == formed["generation"])
        last = max(at for at, _ in steps if at < formed["at"])
        begun = min(at - seconds for at, seconds in steps if at > ready)
        return {"agree": formed["at"] - last, "move": ready - formed["at"], "go": begun - ready, "all": begun - last}

    def measure(self):
        victim = self.ranks.running.pop(0)
        killed_at = time.time()
        kill(victim)
        recovered = self.log.until(lambda line: "recoveredAfterMs" in line and line["at"] > killed_at, "a recovery")
        self.ranks.start()
        self.wait_for_two()
        return recovered["at"] - killed_at


class Peer:
    def __init__(self, work, model):
        self.work = work
        self.settings = {
            "config": {**SHAPES[model], "max_position_embeddings": 512}, "threads": 1, "steps": 10**9, "log": str(work / "log"),
            "checkpoint": str(work / "checkpoint"), "save_every": SAVE_EVERY, "global_batch": GLOBAL_BATCH,
            "micro_batch": MICRO_BATCH, "length": LENGTH}
        (work / "settings.json").write_text(json.dumps(self.settings))
        self.log, self.rendezvous = Log(work / "log"), free_port()
        self.agents = {name: self.agent(name) for name in ("host", "other")}
        self.victim_pid = None
        self.wait_for_two()

    def agent(self, name):
        """Timeouts are a fraction of the defaults, to the peer's advantage: those wait 30 s for late nodes and 15 s for dead ones."""
        timing = "last_call_timeout=5,join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1000",
            "--rdzv-id=bench", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.rendezvous}",
            f"--rdzv-conf=is_host={int(name == 'host')},{timing}", "--monitor-interval=0.1", "--local-addr=127.0.0.1",
            str(HERE / "torchrun.py"), str(self.work / "settings.json")]
        log = open(self.work / f"{name}.log", "a")
        # A store of its own for each start: in the agents' shared one they may look for each other under different numbers of
        # restarts (one agent counts a failure, the other a change of members), and then never meet again.
        own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return spawn(command, log, BENCH_AGENT=name, GLOO_SOCKET_IFNAME="lo", LD_LIBRARY_PATH="", **own)

    def until(self, wanted, what):
        def noted(line):
            if "started" in line and line["agent"] == "other":
                self.victim_pid = line["started"]
            return wanted(line)

        return self.log.until(noted, what)

    def wait_for_two(self):
        self.until(lambda line: line.get("world") == 2 and "step" in line, "a step of two ranks")
        # Beyond a checkpoint, so that there is one to start again from.
        self.until(lambda line: line.get("step", 0) % SAVE_EVERY == 1, "a checkpoint")

    def measure(self, with_agent):
        killed_at = time.time()
        if with_agent:
            kill(self.agents["other"])
        else:
            os.kill(self.victim_pid, signal.SIGKILL)
        # A step that was under way when the other rank died may still be reported: a new process has to start first.
        again = self.until(lambda line: "started" in line and line["at"] > killed_at, "a process in its place")
        step = self.until(lambda line: "step" in line and line["at"] > again["at"], "a step after the kill")
        if with_agent:
            self.agents["other"] = self.agent("other")
        self.wait_for_two()
        return step["at"] - killed_at


def report(name, seconds, what="kills"):
    median = statistics.median(seconds)
    print(f"{name}: median {median:.2f} s of {len(seconds)} {what} ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binaries", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    folders = [options.work / name for name in ("ours", "peer")]
    for folder in folders:
        folder.mkdir(parents=True)
    source = os.environ["BENCH_MODEL"]
    try:
        print(f"{options.model}, two ranks with a thread each, {GLOBAL_BATCH} sequences a step; from kill -9 to the next step")
        ours = Ours(options.binaries, folders[0], source)
        own = [ours.measure() for _ in range(options.kills)]
        report("ours, rank killed", own)
        for phase in ours.joins[0]:
            report(f"ours, newcomer joins: {phase}", [join[phase] for join in ours.joins], "joins")
        end_all()
        peer = Peer(folders[1], options.model)
        for name, with_agent in [("torchrun, rank killed", False), ("torchrun, rank and agent killed", True)]:
            theirs = [peer.measure(with_agent) for _ in range(options.kills)]
            report(name, theirs)
            print(f"  ratio of the medians: {statistics.median(theirs) / statistics.median(own):.1f}", flush=True)
    finally:
        end_all()


def end_all():
    while children:
        child = children.pop()
        if child.poll() is None:
            kill(child)


main()
