"""Starts a gateway with a mock worker and Open WebUI before it, and uses its API as its page does: open_webui.py PROGRAMS.

Fails where an answer is not what the worker says.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

GATEWAY, WORKERS, METRICS, WEBUI = 18480, 18481, 18482, 18483
MODEL = "bench/mock"
WORDS = 16
WAIT_S = 180


def main(programs):
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trust = start_trust(stack, programs)
        run(stack, [programs / "vicuna-gateway", "--listen", f"127.0.0.1:{GATEWAY}", "--workers-listen", f"127.0.0.1:{WORKERS}",
                    "--metrics", f"127.0.0.1:{METRICS}", "--tls-cert", trust["certificate"], "--tls-key", trust["key"],
                    "--trust-dir", trust["folder"]])
        wait(lambda: listens(WORKERS), "the gateway listens")
        worker = start_worker(stack, programs, trust, 0)
        run(stack, [sys.executable, "-m", "uvicorn", "open_webui.main:app", "--host", "127.0.0.1", "--port", str(WEBUI)],
            cwd=folder, env=settings(folder))
        wait(lambda: call("GET", "/health"), "Open WebUI answers")
        token = json.loads(call("POST", "/api/v1/auths/signin", {"email": "", "password": ""}))["token"]
        wait(lambda: MODEL in models(token), "the model is listed")
        check(chat(token, stream=True))
        worker.kill()
        start_worker(stack, programs, trust, 1)
        check(chat(token, stream=False))
        print(f"Open WebUI lists {MODEL} and chats with it")


def settings(folder):
    return os.environ | {
        "FROM_INIT_PY": "true", "DATA_DIR": folder, "WEBUI_SECRET_KEY": "test", "WEBUI_AUTH": "False",
        "OPENAI_API_BASE_URL": f"http://127.0.0.1:{GATEWAY}/v1", "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "False",
        "OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "true",
        # These would load models of its own.
        "RAG_EMBEDDING_ENGINE": "openai", "AUDIO_STT_ENGINE": "openai",
    }


def start_trust(stack, programs):
    keeper = run(stack, [programs / "examples/mock-trust"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return json.loads(keeper.stdout.readline())


def start_worker(stack, programs, trust, number):
    return run(stack, [programs / "examples/mock-worker", "--gateway", f"https://127.0.0.1:{WORKERS}", "--ca", trust["ca"],
                       "--name", f"mock-{number}", "--token-file", trust["tokens"][number], "--tokens", str(WORDS),
                       "--interval-ms", "20"])


def run(stack, command, **options):
    process = subprocess.Popen([str(word) for word in command], **options)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def wait(is_so, what):
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if is_so():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            sys.exit(f"not within {WAIT_S} s: {what}")
        time.sleep(0.5)


def listens(port):
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def call(method, path, body=None, token=""):
    request = urllib.request.Request(f"http://127.0.0.1:{WEBUI}{path}", method=method)
    request.add_header("authorization", f"Bearer {token}")
    if body is not None:
        request.add_header("content-type", "application/json")
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def models(token):
    return [model["id"] for model in json.loads(call("GET", "/api/models", token=token))["data"]]


def chat(token, stream):
    body = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
    told = call("POST", "/api/chat/completions", body, token).decode()
    if not stream:
        return json.loads(told)["choices"][0]["message"]["content"]
    events = [line[6:] for line in told.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    deltas = [event["choices"][0]["delta"] for event in map(json.loads, events) if event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def check(answer):
    if answer.split() != ["word"] * WORDS:
        sys.exit(f"the answer is {answer!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
