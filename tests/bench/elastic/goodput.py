"""Goodput of a training whose nodes come and go as on a public spot trace: ours, and torchrun's elastic DDP that starts again from
its newest checkpoint at each change.

    goodput.py BINARIES WORK TRACE [--minutes M] [--speed S] [--nodes N] [--notice S] [--model tiny|smollm2]

The trace (lines `MS,add|remove,NODE`) is scaled: M minutes of it run S times as fast, and its most nodes are N processes here. Who
goes gets a SIGTERM so many seconds before it is killed. Goodput is the share of the time in which new steps were made at no less than
a third of the pace usual for that number of ranks: what is made again after a loss, and what a gap between two new steps is longer
than three usual ones, is none.
"""
import argparse
import os
import signal
import statistics
import threading
import time
from pathlib import Path

from peers import GLOBAL_BATCH, SHAPES, Ours, Peer, end_all, kill


def changes(trace, minutes, speed, nodes):
    """(seconds from the start, nodes there are from then on), first the nodes at the start."""
    alive, counts = 0, []
    for line in trace.read_text().split():
        at_ms, what, _ = line.split(",")
        alive += 1 if what == "add" else -1
        if counts and counts[-1][0] == int(at_ms):
            counts.pop()
        counts.append((int(at_ms), alive))
    most = max(count for _, count in counts)
    scaled = []
    for at_ms, count in counts:
        wanted = max(1, round(count * nodes / most))
        if at_ms <= minutes * 60_000 and (not scaled or scaled[-1][1] != wanted):
            scaled.append((at_ms / 1000 / speed, wanted))
    return scaled


def replay(fleet, plan, seconds, notice_s):
    """Follows the plan until its end; gives the wall-clock times of start and end."""
    count = plan[0][1]
    for _ in range(count):
        fleet.add()
    fleet.wait_for(count)
    started = time.time()
    for at, wanted in plan[1:]:
        goes_at = started + at
        time.sleep(max(0, goes_at - (notice_s if wanted < count else 0) - time.time()))
        going = [fleet.leaver() for _ in range(count - wanted)]
        for process in going if notice_s else []:
            os.kill(process.pid, signal.SIGTERM)
        if going:
            # Meanwhile nothing else changes: the next change of the trace may be nearer than the notice is long.
            threading.Timer(max(0, goes_at - time.time()), lambda gone=going: [kill(process) for process in gone]).start()
        for _ in range(wanted - count):
            fleet.add()
        count = wanted
    time.sleep(max(0, started + seconds - time.time()))
    return started, time.time()


def gaps(steps, started, ended):
    """Of each new step: seconds since the one before it, and how many ranks made it."""
    newest, last, found = -1, started, []
    for at, step, world in steps:
        if step <= newest or at > ended:
            continue
        newest = step
        if at >= started:
            found.append((at - last, world))
            last = at
    return [*found, (ended - last, found[-1][1])]


def judge(name, found, speed, changed):
    usual = {world: statistics.median(gap for gap, of in found if of == world) for world in {of for _, of in found}}
    total = sum(gap for gap, _ in found)
    stalled = sum(max(0.0, gap - 3 * usual[world]) for gap, world in found)
    print(f"{name}: goodput {100 * (1 - stalled / total):.2f} % of {total:.0f} s; {stalled / max(1, changed):.2f} s a change, which at the "
          f"trace's own speed is {100 * (1 - stalled / (total * speed)):.2f} %; {len(found)} steps, longest gap "
          f"{max(gap for gap, _ in found):.1f} s", flush=True)
    return stalled


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binaries", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--speed", type=float, default=12)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--notice", type=float, default=5)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    options = parser.parse_args()
    plan = changes(options.trace, options.minutes, options.speed, options.nodes)
    seconds = options.minutes * 60 / options.speed
    print(f"{options.trace.stem}: {options.minutes:.0f} min at {options.speed:.0f} times the speed, {len(plan) - 1} changes between "
          f"{min(count for _, count in plan)} and {max(count for _, count in plan)} ranks, {options.notice:.0f} s of notice; "
          f"{options.model}, {GLOBAL_BATCH} sequences a step")
    found = {}
    try:
        for name, make in [
            ("ours", lambda work: Ours(options.binaries, work, os.environ["BENCH_MODEL"], options.nodes, int(options.notice))),
            ("torchrun", lambda work: Peer(work, options.model, options.nodes)),
        ]:
            work = options.work / name
            work.mkdir(parents=True)
            fleet = make(work)
            started, ended = replay(fleet, plan, seconds, options.notice)
            end_all()
            found[name] = judge(name, gaps(fleet.steps(), started, ended), options.speed, len(plan) - 1)
        print(f"  seconds lost, torchrun's to ours: {found['torchrun'] / max(found['ours'], 1e-3):.0f}")
    finally:
        end_all()


main()
