"""How long it takes from `kill -9` of one of two ranks to the next finished step: ours, and torchrun's elastic DDP.

    recovery.py BINARIES WORK [--model tiny|smollm2] [--kills N]

Both run on this machine, a thread a rank, with the same model's shape, the same global batch, and a new process in the
killed one's place; for ours also how long the training stands still while that process joins. The peer has two agents, as on two nodes. In its first part one of two ranks is killed, and the agents start
both anew; in the second the rank's agent is killed too, as when a node goes, and the other one has to find out and go on alone.
"""
import argparse
import os
import signal
import statistics
import time
from pathlib import Path

from peers import GLOBAL_BATCH, SAVE_EVERY, SHAPES, Ours, Peer, end_all, kill


class OursKilled(Ours):
    def __init__(self, *what):
        super().__init__(*what)
        self.joins = []

    def wait_for_two(self):
        formed = self.wait_for(2)
        time.sleep(1)
        if formed["generation"] > 1:
            self.joins.append(self.pause(formed))

    def pause(self, formed):
        """Of a join: seconds from the last step without the newcomer to the first one's beginning, by phase."""
        steps = self.ranks.logged("step", "seconds")
        ready = max(at for at, generation in self.ranks.logged("ready", "generation") if generation == formed["generation"])
        last = max(at for at, _ in steps if at < formed["at"])
        begun = min(at - seconds for at, seconds in steps if at > ready)
        return {"agree": formed["at"] - last, "move": ready - formed["at"], "go": begun - ready, "all": begun - last}

    def start(self):
        self.add(), self.add()
        self.wait_for_two()

    def measure(self):
        killed_at = time.time()
        kill(self.leaver())
        recovered = self.log.until(lambda line: "recoveredAfterMs" in line and line["at"] > killed_at, "a recovery")
        self.add()
        self.wait_for_two()
        return recovered["at"] - killed_at


class PeerKilled(Peer):
    victim_pid = None

    def start(self):
        self.add(), self.add()
        self.wait_for_two()

    def until(self, wanted, what):
        def noted(line):
            if "started" in line and line["agent"] != "agent-0":
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
            kill(self.leaver())
        else:
            os.kill(self.victim_pid, signal.SIGKILL)
        # A step that was under way when the other rank died may still be reported: a new process has to start first.
        again = self.until(lambda line: "started" in line and line["at"] > killed_at, "a process in its place")
        step = self.until(lambda line: "step" in line and line["at"] > again["at"], "a step after the kill")
        if with_agent:
            self.add()
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
        ours = OursKilled(options.binaries, folders[0], source)
        ours.start()
        own = [ours.measure() for _ in range(options.kills)]
        report("ours, rank killed", own)
        for phase in ours.joins[0]:
            report(f"ours, newcomer joins: {phase}", [join[phase] for join in ours.joins], "joins")
        end_all()
        peer = PeerKilled(folders[1], options.model)
        peer.start()
        for name, with_agent in [("torchrun, rank killed", False), ("torchrun, rank and agent killed", True)]:
            theirs = [peer.measure(with_agent) for _ in range(options.kills)]
            report(name, theirs)
            print(f"  ratio of the medians: {statistics.median(theirs) / statistics.median(own):.1f}", flush=True)
    finally:
        end_all()


main()
