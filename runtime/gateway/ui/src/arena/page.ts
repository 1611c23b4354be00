// Two models without their names. The gateway draws them and tells who they were once there is a vote.
import type { Message } from "../api/answer.ts";
import { request, requestJson } from "../api/request.ts";
import { Answering } from "../answering.ts";
import { Composer } from "../composer.ts";
import { button, download, h, replace, setText } from "../dom.ts";
import { read, write } from "../kept.ts";

const SIDES = ["a", "b"] as const;
const VOTES = [
  { winner: "a", label: "A is better" },
  { winner: "b", label: "B is better" },
  { winner: "tie", label: "Tie" },
  { winner: "both-bad", label: "Both are bad" },
] as const;
const STORE_CONVERSATION = "vicuna-arena-store";
const BATTLES = "/api/v1/arena/battles";

interface Outcome {
  model_a: string;
  model_b: string;
  stored_in: "file" | "memory";
}

// One of the two, and what was said to it.
class Corner {
  readonly messages: Message[] = [];
  readonly log: HTMLElement;
  readonly name: HTMLElement;
  readonly element: HTMLElement;
  answering: Answering | null = null;
  private readonly side: (typeof SIDES)[number];

  constructor(side: (typeof SIDES)[number]) {
    this.side = side;
    const label = `Model ${side.toUpperCase()}`;
    this.name = h("h2", { class: "unknown" }, label);
    this.log = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": label });
    this.element = h("section", { class: "lane" }, h("header", {}, this.name), this.log);
  }

  // Tells whether there is an answer.
  async ask(battle: string, prompt: string): Promise<boolean> {
    this.messages.push({ role: "user", content: prompt });
    this.answering = new Answering(() => (this.log.scrollTop = this.log.scrollHeight), true, true);
    this.log.append(h("article", { class: "user" }, h("div", { class: "text said" }, prompt)), this.answering.element);
    const problem = await this.answering.run(`${BATTLES}/${battle}/${this.side}`, { messages: this.messages });
    const { content } = this.answering;
    this.answering = null;
    if (content) this.messages.push({ role: "assistant", content });
    // Without an answer the question can be asked again.
    else this.messages.pop();
    return content !== "" && (problem === "" || problem === "stopped");
  }

  reveal(model: string, won: boolean): void {
    this.name.classList.remove("unknown");
    replace(this.name, model, won ? h("span", { class: "badge good" }, "your choice") : null);
  }
}

export class ArenaPage {
  private corners: Corner[] = [];
  private battle = "";
  private turns = 0;
  private readonly row = h("div", { class: "lanes" });
  private readonly status = h("p", { class: "status", role: "status" });
  private readonly votes = h("div", { class: "votes", role: "group", "aria-label": "Your vote" });
  private readonly store = h("input", { type: "checkbox", onchange: () => write(STORE_CONVERSATION, this.store.checked) });
  private readonly composer = new Composer("Ask both of them", {
    send: (text) => void this.ask(text),
    stop: () => this.corners.forEach(({ answering }) => answering?.stop()),
  });
  readonly element: HTMLElement;

  constructor() {
    this.store.checked = read<boolean>(STORE_CONVERSATION, false);
    for (const { winner, label } of VOTES) {
      this.votes.append(button(label, () => void this.vote(winner), { "data-vote": winner, disabled: true }));
    }
    const toolbar = h(
      "div",
      { class: "toolbar" },
      h("h1", {}, "Arena"),
      h("span", { class: "space" }),
      h("label", { class: "check" }, this.store, "Store the conversation with my vote"),
      button("Votes as JSON lines", () => void this.takeVotes()),
      button("New pair", () => this.fresh(), { "data-act": "new" }),
    );
    this.element = h("div", { class: "arena" }, toolbar, this.row, this.votes, this.status, this.composer.element);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.corners.forEach(({ answering }) => answering?.stop());
    });
    this.fresh();
  }

  shown(): void {
    this.composer.text.focus();
  }

  private fresh(): void {
    this.corners.forEach(({ answering }) => answering?.stop());
    this.corners = SIDES.map((side) => new Corner(side));
    this.battle = "";
    this.turns = 0;
    replace(this.row, ...this.corners.map(({ element }) => element));
    this.allowVote(false);
    this.composer.setEnabled(true);
    setText(this.status, "Two models answer; who they are is told after your vote.");
    if (this.element?.isConnected) this.composer.text.focus();
  }

  private allowVote(yes: boolean): void {
    for (const element of this.votes.querySelectorAll("button")) element.disabled = !yes;
  }

  private async ask(prompt: string): Promise<void> {
    const { corners } = this;
    this.composer.setBusy(true);
    this.allowVote(false);
    setText(this.status, "Asking both …");
    try {
      this.battle ||= (await requestJson<{ battle: string }>(BATTLES, {})).battle;
      const answered = await Promise.all(corners.map((corner) => corner.ask(this.battle, prompt)));
      // A new pair may have been asked for meanwhile.
      if (corners === this.corners) this.answered(answered.every(Boolean));
    } catch (error) {
      setText(this.status, (error as Error).message);
    }
    this.composer.setBusy(false);
  }

  private answered(both: boolean): void {
    if (both) this.turns += 1;
    this.allowVote(both && this.turns > 0);
    setText(this.status, both ? "Which one is better? Vote, or ask on." : "Not both have answered; ask again, or begin with a new pair.");
  }

  private async vote(winner: (typeof VOTES)[number]["winner"]): Promise<void> {
    this.allowVote(false);
    const [a, b] = this.corners.map(({ messages }) => messages);
    const conversations = this.store.checked ? { conversation_a: a, conversation_b: b } : {};
    try {
      const outcome = await requestJson<Outcome>(`${BATTLES}/${this.battle}/vote`, { winner, turns: this.turns, ...conversations });
      this.corners[0]?.reveal(outcome.model_a, winner === "a");
      this.corners[1]?.reveal(outcome.model_b, winner === "b");
      this.composer.setEnabled(false);
      const where = outcome.stored_in === "file" ? "" : " This gateway keeps votes in memory only, until it restarts.";
      setText(this.status, `Thank you: your vote is counted.${where}`);
    } catch (error) {
      this.allowVote(true);
      setText(this.status, (error as Error).message);
    }
  }

  private async takeVotes(): Promise<void> {
    try {
      const text = await (await request("/api/v1/arena/votes")).text();
      download("votes.jsonl", "application/x-ndjson", text);
      setText(this.status, text ? "The votes are downloaded." : "There is no vote yet.");
    } catch (error) {
      setText(this.status, (error as Error).message);
    }
  }
}
