#!/usr/bin/env python3
"""Chats on the gateway's page in a real browser, as a person does, and looks where the worker runs; says in JSON what was
answered.

    chat.py URL MODEL SCREENSHOT

Fails with a sentence when something is not as it should be: a model that cannot be chosen, a stream that does not
end, an error in the console, a request to anybody else, a content policy that is broken or lets anything in.
"""

import json
import sys

from page import Wrong, choose, expect, last_answer, opened, send, wait_for_end

PROMPT = "Who are you? <b onmouseover=alert(1)>Say it in a few words.</b>"


def main(url, model, screenshot):
    with opened(url) as page:
        choose(page, model)
        answer = ask(page, model)
        page.screenshot(path=screenshot)
        stop_midway(page)
        see_where_it_runs(page, model)
    return answer


def ask(page, model):
    """Sends a message, waits for the end of the stream, and gives the answer as the page shows it."""
    sent = send(page, PROMPT)
    expect(sent["model"] == model and sent.get("stream"), f"the page asked {sent['model']}, stream {sent.get('stream')}")
    wait_for_end(page)
    said = page.inner_text(".chat article.user")
    expect("<b onmouseover" in said, f"the log does not show the message as it was typed: {said!r}")
    answer = last_answer(page)
    expect("tokens/s" in answer, f"no answer is shown: {answer!r}")
    return answer


STOP_AT_ONCE = """() => {
    const stop = document.querySelector(".chat [data-act=stop]");
    const press = () => { if (!stop.hidden && !stop.disabled) { window.pressed = true; stop.click(); } };
    new MutationObserver(press).observe(stop, { attributes: true });
}"""


def stop_midway(page):
    """A person who has read enough stops the answer, and may go on at once. The test's person is quick: an answer of a
    small model may be over in a moment."""
    page.evaluate(STOP_AT_ONCE)
    page.fill(".chat .composer textarea", "Tell me a long story.")
    page.press(".chat .composer textarea", "Enter")
    page.wait_for_function("window.pressed")
    wait_for_end(page)
    page.fill(".chat .composer textarea", "And then?")


def see_where_it_runs(page, model):
    page.click("text=Live")
    pool = page.wait_for_selector(f"section:has(> .workers):has-text('{model}')")
    shown = pool.inner_text()
    expect("Pool " in shown and "on node " in shown, f"where the worker runs is not told: {shown!r}")


if __name__ == "__main__":
    try:
        print(json.dumps({"answer": main(*sys.argv[1:4])}))
    except Wrong as wrong:
        sys.exit(f"chat page: {wrong}")
