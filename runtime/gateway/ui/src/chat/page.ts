// Conversations with one model at a time, in branches.
import type { Ask } from "../api/answer.ts";
import { follow, watchModels } from "../api/models.ts";
import { Answering } from "../answering.ts";
import { Composer } from "../composer.ts";
import { button, copy, download, h, replace, setText, telling } from "../dom.ts";
import { read, write } from "../kept.ts";
import { Parameters, type Settings, sampling } from "../parameters.ts";
import { curl, python } from "./code.ts";
import { type Conversation, type Turn, add, messages, path, title, upTo } from "./conversation.ts";
import { read as readFile, write as writeFile } from "./exchange.ts";
import { Message } from "./message.ts";
import { Store, newId } from "./store.ts";

const SETTINGS = "vicuna-settings";
const ENDPOINT = "/v1/chat/completions";

interface Running {
  conversation: Conversation;
  turn: Turn;
  answering: Answering;
}

export class ChatPage {
  private readonly store = new Store();
  private conversation = this.store.fresh();
  private running: Running | null = null;
  private readonly select = h("select", { "aria-label": "Model" });
  private readonly parameters = new Parameters(read<Settings>(SETTINGS, {}), () => write(SETTINGS, this.parameters.get()));
  private readonly log = h("section", { class: "log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: 0 });
  private readonly list = h("ul", { class: "conversations" });
  private readonly status = h("p", { class: "status", role: "status" });
  private readonly composer = new Composer("Write a message", {
    send: (text) => this.say(text),
    stop: () => this.running?.answering.stop(),
  });
  readonly element: HTMLElement;

  constructor() {
    follow(this.select, 0);
    watchModels((models, problem) => {
      this.composer.setEnabled(models.length > 0);
      if (problem || !this.running) setText(this.status, problem);
    });
    const column = h("div", { class: "column" }, this.toolbar(), this.parameters.element, this.log, this.status, this.composer.element);
    this.element = h("div", { class: "chat" }, this.sidebar(), column);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.answering.stop();
    });
    this.draw();
  }

  shown(): void {
    this.composer.text.focus();
  }

  private sidebar(): HTMLElement {
    const file = h("input", { type: "file", accept: ".json,.jsonl", hidden: true, onchange: () => void this.bringIn(file) });
    const all = () => download("conversations.json", "application/json", writeFile(this.store.conversations.filter(({ turns }) => turns.length)));
    return h(
      "nav",
      { class: "sidebar", "aria-label": "Conversations" },
      button("New chat", () => this.open(this.store.fresh()), { class: "primary wide", "data-act": "new" }),
      this.list,
      h("div", { class: "row" }, button("Import", () => file.click()), button("Export all", all), file),
    );
  }

  private toolbar(): HTMLElement {
    const one = () => download("conversation.json", "application/json", writeFile([this.conversation]));
    const code = (text: (origin: string, ask: Ask) => string) => () => copy(text(location.origin, this.ask(path(this.conversation))));
    return h(
      "div",
      { class: "toolbar" },
      h("label", { class: "field" }, h("span", {}, "Model"), this.select),
      h("span", { class: "space" }),
      telling("Copy as curl", "Copied", code(curl)),
      telling("Copy as Python", "Copied", code(python)),
      button("Export", one),
    );
  }

  private open(conversation: Conversation): void {
    this.conversation = conversation;
    this.draw();
    this.log.scrollTop = this.log.scrollHeight;
    this.composer.text.focus();
  }

  private say(content: string): void {
    const parent = path(this.conversation).at(-1)?.id ?? null;
    this.put({ id: newId(), parent, role: "user", content });
  }

  // A question, whether new or edited, is followed by an answer.
  private put(question: Turn): void {
    if (this.running) return;
    add(this.conversation, question);
    this.answer(question);
  }

  private ask(turns: Turn[]): Ask {
    const settings = this.parameters.get();
    return { model: this.select.value, messages: messages(turns, settings.system ?? ""), ...sampling(settings) };
  }

  private answer(question: Turn): void {
    if (this.running) return;
    const { conversation } = this;
    const ask = this.ask(upTo(conversation, question));
    const turn: Turn = { id: newId(), parent: question.id, role: "assistant", content: "", model: ask.model ?? "" };
    const answering = Answering.of(ask, () => this.followEnd());
    add(conversation, turn);
    this.running = { conversation, turn, answering };
    this.composer.setBusy(true);
    setText(this.status, "Asking …");
    this.draw();
    this.log.scrollTop = this.log.scrollHeight;
    void answering.run(ENDPOINT, ask).then((problem) => this.ended(problem));
  }

  private ended(problem: string): void {
    if (!this.running) return;
    const { conversation, turn, answering } = this.running;
    Object.assign(turn, { content: answering.content, summary: answering.summary, marked: answering.marked });
    this.running = null;
    this.store.touched(conversation);
    this.composer.setBusy(false);
    const room = this.store.full ? " This browser has no room to keep all conversations: export what you need." : "";
    setText(this.status, (problem && problem !== "stopped" ? problem : "The answer has ended.") + room);
    this.draw();
  }

  // Somebody who has scrolled up to read is left there.
  private followEnd(): void {
    if (this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 120) this.log.scrollTop = this.log.scrollHeight;
  }

  private draw(): void {
    const turns = path(this.conversation);
    const shown = turns.map((turn) => this.message(turn));
    if (!shown.length) shown.push(h("div", { class: "empty" }, h("h2", {}, "What shall we talk about?"), h("p", {}, "Conversations stay in this browser.")));
    replace(this.log, ...shown);
    this.drawList();
  }

  private message(turn: Turn): HTMLElement {
    const answering = this.running?.turn === turn ? this.running.answering : null;
    const idle = !this.running;
    return new Message(this.conversation, turn, answering?.element ?? null, idle, {
      choose: () => {
        this.store.touched(this.conversation);
        this.draw();
      },
      edit: (content) => this.put({ ...turn, id: newId(), content }),
      again: () => {
        const question = this.conversation.turns.find(({ id }) => id === turn.parent);
        if (question) this.answer(question);
      },
    }).element;
  }

  private drawList(): void {
    const items = this.store.conversations.filter((conversation) => conversation.turns.length || conversation === this.conversation);
    replace(this.list, ...items.map((conversation) => this.item(conversation)));
  }

  private item(conversation: Conversation): HTMLElement {
    const name = title(conversation);
    const current = conversation === this.conversation;
    const forget = () => {
      if (this.running?.conversation === conversation) this.running.answering.stop();
      this.store.remove(conversation);
      if (current) this.open(this.store.fresh());
      else this.drawList();
    };
    return h(
      "li",
      {},
      button(name, () => this.open(conversation), { class: "name", "aria-current": current ? "true" : null }),
      button("×", forget, { class: "quiet", "aria-label": `Delete ${name}`, title: "Delete" }),
    );
  }

  private async bringIn(file: HTMLInputElement): Promise<void> {
    const chosen = file.files?.[0];
    if (!chosen) return;
    try {
      const conversations = readFile(await chosen.text(), newId, Date.now());
      this.store.add(conversations);
      this.open(conversations[0] ?? this.store.fresh());
      setText(this.status, conversations.length === 1 ? "One conversation imported." : `${conversations.length} conversations imported.`);
    } catch (error) {
      setText(this.status, (error as Error).message);
    }
    file.value = "";
  }
}
