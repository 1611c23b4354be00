"""Gradio's chat interface over the gateway, unchanged, driven over Gradio's own API: gradio_chat.py BASE_URL MODEL.

Its second question loses its worker on the way.
"""

import os
import sys

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio  # noqa: E402
from gradio_client import Client  # noqa: E402

WHOLE = "w0 w1 w2 w3 "
# What Gradio calls the function behind the page.
STREAM = "/open_api_stream"


def main(base_url, model):
    interface = gradio.load_chat(base_url, model=model, token="sk-team")
    _, url, _ = interface.launch(prevent_thread_lock=True, server_name="127.0.0.1", share=False, quiet=True, show_error=True)
    for question in ["Hi", "move"]:
        # Through its API the second question of a client fails in Gradio itself, which cannot read its own history there.
        job = Client(url, verbose=False).submit({"text": question, "files": []}, api_name=STREAM)
        answer = job.result(timeout=60)
        assert answer.strip() == WHOLE.strip(), f"{question}: {answer!r}"
        parts = job.outputs()
        assert all(WHOLE.startswith(part.strip()) for part in parts), parts
        assert len(parts) > 1 or question == "Hi", "an answer that stands still halfway is not shown halfway"
    interface.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
