#!/usr/bin/env python3
"""Uses one of the gateway's pages in a real browser as a person does, with workers that a test plays:

    pages.py chat|compare|arena|live|key URL FOLDER

Screenshots go into FOLDER. The models are team/alpha, team/beta and team/cold, which has no worker at first; a question
with the word `move`, `drain`, `read` or `long` has its worker die, drain, read a long prompt, or write much.
Fails with a sentence when something is not as it should be.
"""

import json
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from page import Wrong, choose, expect, last_answer, opened, send, wait_for_end

ALPHA, BETA, COLD = "team/alpha", "team/beta", "team/cold"


def chat(url, shoot):
    with opened(url) as page:
        choose(page, ALPHA)
        answers_with_markdown(page, shoot)
        branches(page, shoot)
        stops(page)
        tells_what_goes_on(page, shoot)
        survives_a_lost_worker(page, shoot)
        copies(page)
        keeps_exports_and_imports(page)
        shoot(page, "chat-dark", dark=True)
        page.set_viewport_size({"width": 420, "height": 800})
        shoot(page, "chat-narrow")


def answers_with_markdown(page, shoot):
    page.click("text=Parameters")
    page.fill(".chat [name=temperature]", "0.5")
    page.fill(".chat [name=system]", "Be brief.")
    page.press(".chat [name=system]", "Tab")
    expect("(2 set)" in page.inner_text(".chat .parameters summary"), "what is set is not told")
    page.click(".chat .parameters summary")
    sent = send(page, "Which <i>bird</i> is this?")
    expect(sent["temperature"] == 0.5 and sent["messages"][0] == {"role": "system", "content": "Be brief."}, f"asked: {sent}")
    wait_for_end(page)
    expect("<i>bird</i>" in page.inner_text(".chat article.user"), "a question is not shown as it was typed")
    expect(page.locator(".chat .assistant pre code").count() == 1, "code is not shown as code")
    expect(page.locator(".chat .assistant table").count() == 1, "a table is not shown as one")
    expect(page.locator(".chat .assistant script, .chat .assistant img").count() == 0, "an answer has become a part of the page")
    line = page.inner_text(".chat .assistant .phases")
    expect(("first token after" in line or "reading the prompt" in line) and "tokens/s" in line, f"the phases are not told: {line!r}")
    shoot(page, "chat")


def branches(page, shoot):
    """Another answer, and another question, each beside the first; one goes back and forth between them."""
    first = last_answer(page)
    page.click(".chat [data-act=again] >> nth=-1")
    wait_for_end(page)
    expect("2 of 2" in last_answer(page), "a second answer is no branch")
    page.click(".chat .user [data-act=edit]")
    page.fill(".chat .edit textarea", "Which fish is this?")
    page.click(".chat .edit .primary")
    wait_for_end(page)
    expect("Which fish" in page.inner_text(".chat article.user"), "the edited question is not shown")
    shoot(page, "chat-branches")
    page.click(".chat .user [aria-label='Previous branch']")
    expect("bird" in page.inner_text(".chat article.user"), "the first question is lost")
    page.click(".chat .assistant [aria-label='Previous branch']")
    shown = last_answer(page)
    expect("1 of 2" in shown and shown.split("\n")[1] == first.split("\n")[1], f"the first answer is lost: {shown!r}")
    sent = send(page, "And its colour?")
    expect([message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"], f"asked: {sent}")
    expect("bird" in sent["messages"][1]["content"], "a branch that is not shown was sent")
    wait_for_end(page)


def stops(page):
    send(page, "Tell me a long story.")
    page.wait_for_selector(".chat [aria-busy] .text p")
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect("stopped" in last_answer(page), "a stopped answer does not say so")


def tells_what_goes_on(page, shoot):
    """A model without a worker is loaded; a long prompt is read."""
    page.click("[data-act=new]")
    choose(page, COLD)
    send(page, "Please read this.")
    page.wait_for_selector(".chat [aria-busy] .phases .now:has-text('loading the model')")
    shoot(page, "chat-loading")
    page.wait_for_selector(".chat [aria-busy] .phases .now:has-text('512 of 2048')")
    wait_for_end(page)
    line = page.inner_text(".chat .assistant .phases")
    expect(all(phase in line for phase in ["loading the model", "reading the prompt", "tokens/s"]), f"phases: {line!r}")
    choose(page, ALPHA)


def survives_a_lost_worker(page, shoot):
    send(page, "Now move.")
    wait_for_end(page)
    shown = last_answer(page)
    expect("↻ worker lost; resumed on alpha-" in shown and "1 resume" in shown, f"a resume is not marked: {shown!r}")
    # The mark stands for the stream that moved; what it says is whole.
    expect(shown.count("That is all.") == 1, f"the answer is not whole: {shown!r}")
    shoot(page, "chat-resumed")


def copies(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = {}
    for language in ["curl", "Python"]:
        page.click(f"text=Copy as {language}")
        page.wait_for_selector("text=Copied")
        copied[language] = page.evaluate("navigator.clipboard.readText()")
        page.wait_for_selector("text=Copied", state="detached")
    expect(copied["curl"].startswith("curl ") and '"temperature": 0.5' in copied["curl"], copied["curl"])
    compile(copied["Python"], "copied", "exec")
    expect("temperature=0.5" in copied["Python"], copied["Python"])


def keeps_exports_and_imports(page):
    with page.expect_download() as taken:
        page.click("text=Export all")
    file = json.loads(Path(taken.value.path()).read_text())
    expect(len(file["conversations"]) == 2, f"{len(file['conversations'])} conversations are exported")
    page.reload()
    names = page.locator(".conversations .name")
    before = names.count()
    page.set_input_files(".sidebar input[type=file]", taken.value.path())
    page.wait_for_selector("text=2 conversations imported.")
    expect(names.count() >= before + 1, "what was imported is not listed")
    expect("move" in page.inner_text(".chat article.user >> nth=-1"), "an imported conversation is not shown")
    expect("1 resume" in last_answer(page), "how an answer went is not kept")
    page.set_input_files(".sidebar input[type=file]", {"name": "x.json", "mimeType": "application/json", "buffer": b"nothing"})
    page.wait_for_selector("text=Line 1 of the file is no conversation.")


def compare(url, shoot):
    shared = "#model=team%2Falpha&model=team%2Fbeta&temperature=0.25&system=Be+brief.&prompt=Which+bird%3F"
    with opened(url + "compare" + shared, width=1280) as page:
        lanes = page.locator(".lane")
        expect(lanes.count() == 2, f"{lanes.count()} models are compared")
        expect(page.input_value(".compare textarea[placeholder='Ask all of them']") == "Which bird?", "the shared prompt is not there")
        asked = []
        page.on("request", lambda request: asked.append(json.loads(request.post_data)) if request.post_data else None)
        page.wait_for_selector(".compare [data-act=send]:not([disabled])")
        expect(not asked, "a link asks before anybody has agreed")
        page.click(".compare [data-act=send]")
        wait_for_end(page, ".compare")
        expect(sorted(ask["model"] for ask in asked) == [ALPHA, BETA], f"asked: {asked}")
        expect(all(ask["temperature"] == 0.25 and ask["messages"][0]["content"] == "Be brief." for ask in asked), f"asked: {asked}")
        expect(page.locator(".lane .text table").count() == 2, "not both answers are shown")
        shoot(page, "compare")
        page.fill(".compare textarea[placeholder='Ask all of them']", "Which fish & chips?")
        page.click(".compare [data-act=add]")
        expect(lanes.count() == 3, "a third model cannot be added")
        page.click(".compare [data-act=send]")
        wait_for_end(page, ".compare")
        parts = parse_qs(urlsplit(page.url).fragment)
        expect(parts["prompt"] == ["Which fish & chips?"] and len(parts["model"]) == 3, f"the address is {page.url}")
        shoot(page, "compare-dark", dark=True)


def arena(url, shoot):
    with opened(url + "arena", width=1280) as page:
        heard = []
        page.on("response", lambda response: heard.append(response) if "/arena/" in response.url else None)
        votes = page.locator(".votes button")
        expect(votes.first.is_disabled(), "one can vote before there is an answer")
        send(page, "Which bird?", ".arena")
        wait_for_end(page, ".arena")
        page.wait_for_selector(".votes button:not([disabled])")
        before = page.content()
        send(page, "And which fish?", ".arena")
        wait_for_end(page, ".arena")
        page.wait_for_selector(".votes button:not([disabled])")
        shoot(page, "arena")
        told = "".join(response.text() + str(response.headers) for response in heard)
        for shown in [before, page.content(), told]:
            expect(not any(name in shown for name in ["team/", "alpha-", "beta-"]), "a name is there before the vote")
        page.click("[data-vote=a]")
        page.wait_for_selector(".badge:has-text('your choice')")
        names = [name.split("\n")[0] for name in page.locator(".lane h2").all_inner_texts()]
        expect(sorted(names) == [ALPHA, BETA], f"the names are {names}")
        expect("in memory only" in page.inner_text(".arena .status"), "it is not told that votes are lost")
        shoot(page, "arena-voted", dark=True)
        with page.expect_download() as taken:
            page.click("text=Votes as JSON lines")
        vote = json.loads(Path(taken.value.path()).read_text())
        expect(vote["winner"] == "model_a" and vote["turn"] == 2 and vote["model_a"] == names[0], f"the vote is {vote}")
        expect("conversation_a" not in vote, "a conversation is stored that nobody wanted stored")
        page.click(".arena [data-act=new]")
        expect(page.locator(".lane h2.unknown").count() == 2, "a new pair has names")


def live(url, shoot):
    with opened(url + "live", width=1280) as page:
        page.wait_for_selector("[data-worker=alpha-0]")
        where = lambda worker: page.inner_text(f"section:has(> ul > [data-worker={worker}])")
        expect(all(word in where("alpha-0") for word in ["Pool cheap", "spot", "node spot-1", ALPHA, "ready"]), f"shown as {where('alpha-0')!r}")
        expect("on-demand" in where("alpha-1"), "what a node is is not shown")
        expect("external" in where("beta-0"), "an external worker is not shown as one")
        expect("none, loads when asked" in page.inner_text("tr:has-text('team/cold')"), "a model without workers is not shown")
        # Another page of the same browser asks, and this one shows what comes of it.
        asking = "(content) => fetch('/v1/chat/completions', { method: 'POST', body: JSON.stringify({ model: 'team/alpha', stream: true, messages: [{ role: 'user', content }] }) }).then((answer) => answer.text())"
        page.evaluate(f"void ({asking})('Tell me a long story, and drain.')")
        page.wait_for_selector(".worker .badge.draining")
        page.wait_for_selector(".happenings .draining")
        shoot(page, "live")
        page.wait_for_selector(".happenings .gone")
        page.wait_for_selector(".worker .badge.gone")
        page.evaluate(f"({asking})('Now move.')")
        page.wait_for_selector(".happenings .resumed")
        page.wait_for_selector(".spark .line[points*=' ']", state="attached")
        shoot(page, "live-dark", dark=True)
        page.click("text=Chat")
        page.wait_for_selector(".chat .composer textarea:focus")
        page.go_back()
        page.wait_for_selector(".live:not([hidden])")


def key(url, shoot):
    """A gateway that asks for keys: sk-team opens the models, and is forgotten with the tab."""
    with opened(url, fine="status of 401") as page:
        page.wait_for_selector(".menu summary.wanted")
        expect(page.locator(".chat select option").count() == 0, "models are shown to strangers")
        page.click(".menu summary")
        page.fill(".menu input", "sk-wrong")
        page.press(".menu input", "Enter")
        page.wait_for_selector(".menu .problem:has-text('not known here')")
        shoot(page, "key")
        page.fill(".menu input", "sk-team")
        page.press(".menu input", "Enter")
        page.wait_for_selector(".menu summary:has-text('Key ✓'):not(.wanted)")
        page.keyboard.press("Escape")
        choose(page, ALPHA)
        send(page, "Which bird?")
        wait_for_end(page)
        page.click("text=Live")
        page.wait_for_selector("[data-worker=alpha-0]")
        expect("sk-team" not in page.evaluate("JSON.stringify(localStorage)"), "the key is kept for good")


def main(name, url, folder):
    def shoot(page, shot, dark=False):
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.screenshot(path=f"{folder}/{shot}.png")
        page.emulate_media(color_scheme="light")

    Path(folder).mkdir(parents=True, exist_ok=True)
    {"chat": chat, "compare": compare, "arena": arena, "live": live, "key": key}[name](url, shoot)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except Wrong as wrong:
        sys.exit(f"{sys.argv[1]} page: {wrong}")
