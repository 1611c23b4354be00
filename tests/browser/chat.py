#!/usr/bin/env python3
"""Chats on the gateway's page in a real browser, as a person does; says in JSON what was seen.

    chat.py URL MODEL SCREENSHOT

Fails with a sentence when something is not as it should be: a model that cannot be chosen, a stream that does not
end, an error in the console, a request to anybody else, a content policy that is broken or lets anything in.
"""

import json
import sys
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PROMPT = "Who are you? <b onmouseover=alert(1)>Say it in a few words.</b>"
WAIT_MS = 60_000


class Wrong(Exception):
    """What was seen is not what should be."""


def main(url, model, screenshot):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.set_default_timeout(WAIT_MS)
        complaints, strangers = watch(page, url)
        check_policy(page.goto(url))
        choose(page, model)
        answer = ask(page, model)
        page.screenshot(path=screenshot)
        stop_midway(page)
        if complaints or strangers:
            raise Wrong(f"the console shows {complaints}; requests elsewhere: {strangers}")
        browser.close()
    return answer


def watch(page, url):
    """Collects errors of the page, broken policies among them, and requests that leave the gateway."""
    complaints, strangers = [], []
    page.on("console", lambda told: complaints.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
    own = urlsplit(url).netloc

    def look(request):
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != own:
            strangers.append(request.url)

    page.on("request", look)
    return complaints, strangers


def check_policy(response):
    if not response.ok:
        raise Wrong(f"the page answers {response.status}")
    policy = response.headers.get("content-security-policy", "")
    if "default-src 'none'" not in policy or "unsafe" in policy:
        raise Wrong(f"the content policy is not strict: {policy!r}")


def choose(page, model):
    page.wait_for_selector(f'#model option[value="{model}"]', state="attached")
    page.select_option("#model", model)


def ask(page, model):
    """Sends a message, waits for the end of the stream, and gives the answer as the page shows it."""
    before = len(page.inner_text("#chat"))
    page.fill("#text", PROMPT)
    with page.expect_event("requestfinished", completes, timeout=WAIT_MS) as finished:
        page.click("#send")
    sent = json.loads(finished.value.post_data)
    if sent["model"] != model or not sent.get("stream"):
        raise Wrong(f"the page asked {sent['model']}, stream {sent.get('stream')}")
    wait_until(page, can_stop=False)
    shown = page.inner_text("#chat")
    if "Say it in a few words." not in shown or "<b onmouseover" not in shown:
        raise Wrong(f"the log does not show the message as it was typed: {shown!r}")
    if len(shown) <= before + len(PROMPT) + 10:
        raise Wrong(f"no answer is shown: {shown!r}")
    return shown[before:]


def completes(request):
    return request.url.endswith("/v1/chat/completions")


def wait_until(page, can_stop):
    """Stop is offered while an answer comes, and only then."""
    offered = "(() => { const stop = document.getElementById('stop'); return !stop.hidden && !stop.disabled })()"
    page.wait_for_function(offered if can_stop else f"!{offered}")


STOP_AT_ONCE = """() => {
    const stop = document.getElementById("stop");
    const press = () => { if (!stop.hidden && !stop.disabled) { window.pressed = true; stop.click(); } };
    new MutationObserver(press).observe(stop, { attributes: true });
}"""


def stop_midway(page):
    """A person who has read enough stops the answer, and may go on at once. The test's person is quick: an answer of a
    small model may be over in a moment."""
    page.evaluate(STOP_AT_ONCE)
    page.fill("#text", "Tell me a long story.")
    page.press("#text", "Enter")
    page.wait_for_function("window.pressed")
    wait_until(page, can_stop=False)
    page.fill("#text", "And then?")


if __name__ == "__main__":
    try:
        print(json.dumps({"answer": main(*sys.argv[1:4])}))
    except Wrong as wrong:
        sys.exit(f"chat page: {wrong}")
