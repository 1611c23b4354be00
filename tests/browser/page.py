"""What all scripts here share: a browser, and an eye on what a page must never do."""

import json
from contextlib import contextmanager
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
WAIT_MS = 60_000


class Wrong(Exception):
    """What was seen is not what should be."""


@contextmanager
def opened(url, width=1200, height=800, fine=None):
    """The page at `url` in a browser of its own. Fails at the end where the console shows an error, or something was
    asked of anybody but the gateway, or its content policy lets anything in. `fine`: words of errors that belong there."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT_MS)
        complaints, strangers = watch(page, url)
        check_policy(page.goto(url))
        yield page
        complaints = [words for words in complaints if fine is None or fine not in words]
        if complaints or strangers:
            raise Wrong(f"the console shows {complaints}; requests elsewhere: {strangers}")
        browser.close()


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


def expect(so, otherwise):
    if not so:
        raise Wrong(otherwise)


# Chat

ASKS = "/v1/chat/completions"


def choose(page, model):
    page.wait_for_selector(f'.chat .toolbar option[value="{model}"]', state="attached")
    page.select_option(".chat .toolbar select", model)


def send(page, text, scope=".chat"):
    """Sends a message; gives what the page asks the gateway for."""
    page.fill(f"{scope} .composer textarea", text)
    with page.expect_request(lambda request: request.url.endswith(ASKS) or "/battles/" in request.url) as asked:
        page.press(f"{scope} .composer textarea", "Enter")
    return json.loads(asked.value.post_data)


def wait_for_end(page, scope=".chat"):
    """Stop is offered while an answer comes, and only then."""
    page.wait_for_selector(f"{scope} [data-act=stop]", state="hidden")
    page.wait_for_function(f"!document.querySelector('{scope} [aria-busy]')")


def last_answer(page):
    return page.inner_text(".chat article.assistant >> nth=-1")
