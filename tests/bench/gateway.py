"""Runs every gateway, one at a time, and the load generator against it. See gateway.sh.

Everything shares this machine's cores: gateway, backend and load. So the figures are of this machine, and the ratios
are what counts."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

programs, cache, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
PEERS = sys.argv[4:] or ["vllm-router", "LiteLLM", "nginx"]
examples = programs / "examples"
out = pathlib.Path("target/bench")
out.mkdir(parents=True, exist_ok=True)
MODEL = "bench/mock"
CONNECTIONS, RATES, IDLE, SLOTS = 64, (1000, 4000, 16_000), 10_000, 4096
BACKEND, GATEWAY, WORKERS, METRICS = 18000, 18080, 18443, 18090
# Behind every gateway alike.
BACKENDS = min(4, max(1, os.cpu_count() // 4))
nginx = next((cache / "nginx").rglob("sbin/nginx"))


def start(name, arguments, **environment):
    log = open(out / f"{name}.log", "w")
    return subprocess.Popen([str(a) for a in arguments], stdin=subprocess.PIPE, stdout=log, stderr=log,
                            env={**os.environ, **environment}, start_new_session=True)


def stop(process):
    """With all that it has started; the group is this process's own."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def listens(port, timeout=300):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"nobody listens on {port}: see the logs in {out}")


def load(port, *flags, seconds=seconds, connections=CONNECTIONS, warm_up=2):
    arguments = [examples / "load", "--url", f"http://127.0.0.1:{port}", "--model", MODEL, "--seconds", seconds,
                 "--connections", connections, "--warm-up", warm_up, *flags]
    done = subprocess.run([str(a) for a in arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def answers(port, timeout=90):
    """Waits for the first answer: a port may be open before there is a backend behind it."""
    deadline = time.monotonic() + timeout
    while True:
        seen = load(port, seconds=0.2, connections=1, warm_up=0)
        if seen["requests"] and not seen["errors"]:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"no answer on {port}: {seen['first_error']}; see the logs in {out}")
        time.sleep(0.5)


def ours(trust, workers=BACKENDS, **more):
    gateway = [programs / "vicuna-gateway", "--listen", f"127.0.0.1:{GATEWAY}",
               "--workers-listen", f"127.0.0.1:{WORKERS}", "--metrics", f"127.0.0.1:{METRICS}",
               "--tls-cert", trust["certificate"], "--tls-key", trust["key"], "--trust-dir", trust["folder"],
               "--max-in-flight", 2 * IDLE, "--max-queue", 2 * IDLE]
    worker = [examples / "mock-worker", "--gateway", f"https://127.0.0.1:{WORKERS}", "--ca", trust["ca"],
              "--slots", SLOTS]
    for name, value in more.items():
        worker += [f"--{name.replace('_', '-')}", value]
    processes = [start("gateway", gateway, RUST_LOG="warn")]
    listens(WORKERS)
    return processes + [start(f"mock-worker-{number}", [*worker, "--token-file", token])
                        for number, token in enumerate(trust["tokens"][:workers])]


def vllm_router():
    folder = cache / "vllm-router-0.1.17"
    return [start("vllm-router", [
        sys.executable, folder / "bin/vllm-router", "--host", "127.0.0.1", "--port", GATEWAY, "--policy", "round_robin",
        "--worker-urls", *[f"http://127.0.0.1:{BACKEND + number}" for number in range(BACKENDS)], "--prometheus-port", METRICS, "--log-level", "error",
    ], PYTHONPATH=str(folder))]


def litellm():
    folder = cache / "litellm-1.110.2"
    config = out / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": {
        "model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{BACKEND + number}/v1", "api_key": "none"}}
        for number in range(BACKENDS)]}))
    code = "from litellm.proxy.proxy_cli import run_server; run_server()"
    workers = ["--num_workers", os.cpu_count()]
    return [start("litellm", [sys.executable, "-c", code, "--config", config, "--host", "127.0.0.1", "--port", GATEWAY,
                              *workers],
                  PYTHONPATH=str(folder), LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_LOG="ERROR",
                  LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true")]


def nginx_proxy():
    folder = (out / "nginx").resolve()
    folder.mkdir(exist_ok=True)
    config = folder / "nginx.conf"
    servers = " ".join(f"server 127.0.0.1:{BACKEND + number};" for number in range(BACKENDS))
    config.write_text(f"""
daemon off; worker_processes auto; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 1000000000;
  upstream backend {{ {servers} keepalive 128; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{GATEWAY}; location / {{
    proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}""")
    return [start("nginx", [nginx, "-c", config, "-e", folder / "error.log"])]


def measure(port, server):
    answers(port)
    return {
        "at_rates": [costed(server, port, "--rate", rate) for rate in RATES],
        "whole": costed(server, port),
        "streams": costed(server, port, "--stream"),
    }


def costed(server, port, *flags):
    """With the processor time that the server took for it, which says more than rates do where others share the cores."""
    before = processor_seconds(server.pid)
    seen = load(port, *flags)
    seconds = processor_seconds(server.pid) - before
    return seen | {"cpu_seconds_per_1000": round(1000 * seconds / max(1, seen["answered"]), 4)}


def processor_seconds(session):
    """Of a program and all that it has started."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def usage(pid):
    resident = next(int(line.split()[1]) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("VmRSS"))
    return processor_seconds(pid), resident / 1024


def idle(trust):
    """Streams that have said one word and then nothing more."""
    processes = ours(trust, workers=-(-IDLE // SLOTS), interval_ms=3_600_000)
    try:
        listens(GATEWAY)
        time.sleep(2)
        _, empty = usage(processes[0].pid)
        holding = subprocess.Popen(
            [str(examples / "load"), "--url", f"http://127.0.0.1:{GATEWAY}", "--model", MODEL, "--stream", "--hold",
             str(IDLE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        opened = json.loads(holding.stdout.readline())
        before, _ = usage(processes[0].pid)
        time.sleep(20)
        after, full = usage(processes[0].pid)
        holding.stdin.close()
        holding.wait()
        return {"streams": IDLE, "opened_in_seconds": opened["seconds"], "empty_mib": empty, "full_mib": full,
                "kib_a_stream": (full - empty) * 1024 / IDLE, "cores": (after - before) / 20}
    finally:
        for process in reversed(processes):
            stop(process)


def run(name, make):
    processes = make()
    try:
        listens(GATEWAY)
        found = measure(GATEWAY, processes[0])
    finally:
        for process in reversed(processes):
            stop(process)
    print(f"  {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def table(direct, found):
    ours = found["vicuna-gateway"]
    cost = lambda seen: " / ".join(f"{seen[part]['cpu_seconds_per_1000']:.3f}" for part in ("whole", "streams"))
    ratio = lambda mine, theirs: f"{mine / theirs:.2f}" if theirs else "-"
    print(f"\n| {CONNECTIONS} connections, {os.cpu_count()} cores for all | requests/s | ours to it | streams of 16 words/s "
          "| ours to it | CPU s per 1,000 whole / streams | errors |\n|---|---|---|---|---|---|---|")
    print(f"| backend alone | {direct['whole']['per_second']:.0f} | | {direct['streams']['per_second']:.0f} | "
          f"| {cost(direct)} | |")
    for name, seen in found.items():
        whole, streams = seen["whole"]["per_second"], seen["streams"]["per_second"]
        errors = sum(part["errors"] for part in (*seen["at_rates"], seen["whole"], seen["streams"]))
        print(f"| {name} | {whole:.0f} | {ratio(ours['whole']['per_second'], whole)} | {streams:.0f} "
              f"({seen['streams']['chunks']:.0f} chunks) | {ratio(ours['streams']['per_second'], streams)} | {cost(seen)} "
              f"| {errors} |")
    rates(direct, found)


def rates(direct, found):
    print(f"\n| added p50 / p99, ms, at | {' | '.join(f'{rate}/s' for rate in RATES)} |\n|---|{'---|' * len(RATES)}")
    print(f"| (backend alone) | {' | '.join('({p50_ms:.2f} / {p99_ms:.2f})'.format(**base) for base in direct['at_rates'])} |")
    added = {name: [late(*pair) for pair in zip(RATES, direct["at_rates"], seen["at_rates"])]
             for name, seen in found.items()}
    for name, lates in added.items():
        print(f"| {name} | {' | '.join('saturated' if late is None else '{:.2f} / {:.2f}'.format(*late) for late in lates)} |")
    ours, peer = added["vicuna-gateway"][0], added.get("vllm-router", [None])[0]
    if ours and peer:
        print(f"\nadded p99 at {RATES[0]}/s, ours to vllm-router's: {ours[1] / peer[1]:.2f}")


def late(rate, base, seen):
    """What is added to the median and to the 99th percentile; none where not all were answered in time."""
    if seen["per_second"] > 0.98 * rate:
        return tuple(seen[part] - base[part] for part in ("p50_ms", "p99_ms"))
    return None


def main():
    keeper = subprocess.Popen([str(examples / "mock-trust")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    trust = json.loads(keeper.stdout.readline())
    backends = [start(f"mock-backend-{number}", [examples / "mock-backend", "--listen", f"127.0.0.1:{BACKEND + number}"])
                for number in range(BACKENDS)]
    try:
        for number in range(BACKENDS):
            listens(BACKEND + number)
        direct = measure(BACKEND, backends[0])
        makers = {"vllm-router": vllm_router, "LiteLLM": litellm, "nginx": nginx_proxy}
        found = {"vicuna-gateway": run("vicuna-gateway", lambda: ours(trust))}
        found |= {name: run(name, makers[name]) for name in PEERS}
        table(direct, found)
        held = idle(trust)
        print("\n{streams} idle streams: {kib_a_stream:.1f} KiB each ({empty_mib:.0f} -> {full_mib:.0f} MiB), {cores:.3f} "
              "cores, opened in {opened_in_seconds:.1f} s".format(**held))
        (out / "gateway.json").write_text(json.dumps({"direct": direct, **found, "idle": held}, indent=1))
    finally:
        for backend in backends:
            stop(backend)
        keeper.stdin.close()
        keeper.wait()


main()
