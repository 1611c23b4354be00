// Where a person writes: Enter sends, Shift+Enter breaks the line, Escape stops.
import { button, h } from "./dom.ts";

export interface Acts {
  send: (text: string) => void;
  stop: () => void;
}

export class Composer {
  readonly text: HTMLTextAreaElement;
  readonly element: HTMLFormElement;
  private readonly sendButton = h("button", { class: "primary", "data-act": "send" }, "Send");
  private readonly stopButton: HTMLButtonElement;
  private busy = false;
  private readonly acts: Acts;

  // `keeps`: the text stays when it is sent.
  constructor(label: string, acts: Acts, keeps = false) {
    this.acts = acts;
    this.text = h("textarea", { rows: 1, placeholder: label, "aria-label": label, required: true });
    this.stopButton = button("Stop", acts.stop, { hidden: true, "data-act": "stop", class: "stop" });
    const hint = h("p", { class: "hint" }, "Enter sends · Shift+Enter breaks the line · Escape stops");
    this.element = h("form", { class: "composer" }, h("div", { class: "box" }, this.text, this.sendButton, this.stopButton), hint);
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(keeps);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.element.requestSubmit();
    });
  }

  private submit(keeps: boolean): void {
    const content = this.text.value.trim();
    if (!content || this.busy) return;
    if (!keeps) this.text.value = "";
    this.acts.send(content);
  }

  setBusy(busy: boolean): void {
    this.busy = busy;
    const hadFocus = [this.sendButton, this.stopButton].includes(document.activeElement as HTMLButtonElement);
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
    // Not from somebody who has gone on to something else.
    if (hadFocus) this.text.focus();
  }

  setEnabled(enabled: boolean): void {
    this.sendButton.disabled = !enabled;
  }
}
