"""Real trainer processes without a cluster, for what runs them on one machine: a job, the operator's coordinator
(operator/examples/coordinator.rs) and its events, and ranks that dial it over TLS."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import datetime

PATIENCE_S = 180


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Log:
    """JSON lines of a file that others write to."""

    def __init__(self, path):
        path.touch()
        self.file, self.rest = open(path), ""

    def until(self, wanted, what):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.rest += self.file.readline()
            if not self.rest.endswith("\n"):
                time.sleep(0.002)
                continue
            line, self.rest = json.loads(self.rest), ""
            if wanted(line):
                return line
        sys.exit(f"waited {PATIENCE_S} s for {what}: see {self.file.name}")


class Ranks:
    """One training below `folder`. `spawn` starts a process: command, file for its output, environment."""

    def __init__(self, folder, coordinator, trainer, spawn, model, recipe, words=12, every_s=3600, most=2):
        self.folder, self.trainer, self.spawn, self.running, self.born = folder, trainer, spawn, [], 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data.json").write_text(json.dumps(conversations(words)))
        (folder / "token").write_text("bench\n")
        (folder / "job.json").write_text(json.dumps(job(folder, model, recipe, every_s)))
        events = folder / "events.jsonl"
        command = [coordinator, "--job", folder / "job.json", "--ca", folder / "ca.crt", "--max", str(most)]
        self.coordinator = spawn(command, open(events, "w"))
        self.log = Log(events)
        self.port = self.log.until(lambda line: "port" in line, "the coordinator")["port"]

    def start(self, **environment):
        name = f"rank-{self.born}"
        command = [
            self.trainer, f"--coordinator=https://127.0.0.1:{self.port}", f"--ca={self.folder}/ca.crt",
            f"--token-file={self.folder}/token", f"--scratch={self.folder}/{name}", f"--listen=127.0.0.1:{free_port()}",
            f"--metrics=127.0.0.1:{free_port()}", f"--pod-name={name}", f"--pod-uid={name}", f"--node-name={name}",
            "--pod-ip=127.0.0.1"]
        self.running.append(self.spawn(command, open(self.folder / f"{name}.log", "w"), **environment))
        self.born += 1

    def logged(self, message, field):
        """When ranks logged this message, in Unix seconds, and one of its numbers."""
        pattern = re.compile(rf"^(\S+) .*: {message} .*\b{field}=([0-9.e-]+)")
        lines = [line for log in self.folder.glob("rank-*.log") for line in log.read_text().splitlines()]
        found = [pattern.match(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines]
        return [(datetime.fromisoformat(it[1]).timestamp(), float(it[2])) for it in found if it]


def job(folder, model, recipe, every_s):
    recipe = {
        "method": "Full", "learningRate": 1e-4, "schedule": "Constant", "warmupRatio": 0.0, "weightDecay": 0.0,
        "gradientClip": 1.0, "seed": 1, **recipe}
    return {
        "namespace": "bench", "name": "bench", "uid": "bench", "model": {"from": f"file://{model}"},
        "dataset": [{"from": f"file://{folder}/data.json", "weight": 1.0}], "recipe": recipe,
        "checkpoint": {"to": f"file://{folder}/bucket", "intervalSeconds": every_s, "keep": 2}}


def conversations(words):
    turns = lambda number: [{"from": "human", "value": f"Tell me about {number}."},
                            {"from": "gpt", "value": f"{number} comes after {number - 1}. " * words}]
    return [{"id": str(number), "conversations": turns(number)} for number in range(1, 65)]
