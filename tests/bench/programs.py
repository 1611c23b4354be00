"""What the benches that run several programs in turn share."""
import os
import pathlib
import re
import subprocess


def told(arguments, **environment):
    """What a program writes to its output; the bench ends with its last words if it fails."""
    done = subprocess.run([str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    return done.stdout


def cpu():
    """The processor's name, for a table's head."""
    return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()).group(1)
