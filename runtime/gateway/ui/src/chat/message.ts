// One turn of a conversation, with what can be done about it.
import { ended } from "../answering.ts";
import { button, copy, h, replace, telling } from "../dom.ts";
import { type Conversation, type Turn, choose, following } from "./conversation.ts";

export interface Acts {
  // Another branch has been chosen.
  choose: () => void;
  edit: (content: string) => void;
  again: () => void;
}

export class Message {
  readonly element: HTMLElement;
  private readonly body: HTMLElement;
  private readonly conversation: Conversation;
  private readonly turn: Turn;
  private readonly acts: Acts;

  // `answer`: the answer as it comes; `idle`: nothing is on its way, so that branches may be added.
  constructor(conversation: Conversation, turn: Turn, answer: HTMLElement | null, idle: boolean, acts: Acts) {
    this.conversation = conversation;
    this.turn = turn;
    this.acts = acts;
    const who = turn.role === "user" ? "You" : turn.model || "Assistant";
    this.body = h("div", { class: "body" }, answer ?? this.said());
    const actions = h("div", { class: "actions" }, this.branches(idle), ...(answer ? [] : this.buttons(idle)));
    this.element = h("article", { class: turn.role, "data-turn": turn.id }, h("h2", {}, who), this.body, actions);
  }

  private said(): HTMLElement {
    const { role, content, summary, marked } = this.turn;
    return role === "user" ? h("div", { class: "text said" }, content) : ended(content, summary ?? [], marked ?? []);
  }

  private buttons(idle: boolean): (HTMLElement | false)[] {
    const own = this.turn.role === "user";
    return [
      telling("Copy", "Copied", () => copy(this.turn.content)),
      idle && own && button("Edit", () => this.edit(), { "data-act": "edit" }),
      idle && !own && button("Again", this.acts.again, { "data-act": "again", title: "Another answer, beside this one" }),
    ];
  }

  private branches(idle: boolean): HTMLElement | null {
    const all = following(this.conversation, this.turn.parent);
    if (all.length < 2) return null;
    const at = all.indexOf(this.turn);
    const step = (by: number, label: string, sign: string) => {
      const other = all[at + by];
      return button(sign, () => this.go(other), { "aria-label": label, disabled: !idle || !other });
    };
    const place = h("span", {}, `${at + 1} of ${all.length}`);
    return h("span", { class: "branches", role: "group", "aria-label": "Branches" }, step(-1, "Previous branch", "‹"), place, step(1, "Next branch", "›"));
  }

  private go(turn: Turn | undefined): void {
    if (!turn) return;
    choose(this.conversation, turn);
    this.acts.choose();
  }

  private edit(): void {
    const text = h("textarea", { "aria-label": "Message", rows: 3 });
    text.value = this.turn.content;
    const leave = () => replace(this.body, this.said());
    const save = (event: Event) => {
      event.preventDefault();
      const content = text.value.trim();
      if (content) this.acts.edit(content);
    };
    const form = h("form", { class: "edit", onsubmit: save }, text, h("div", { class: "row" }, h("button", { class: "primary" }, "Send"), button("Cancel", leave)));
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      leave();
    });
    replace(this.body, form);
    text.focus();
  }
}
