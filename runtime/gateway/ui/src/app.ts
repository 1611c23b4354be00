// The pages: each is made when it is first looked at, and stays as it is while another one is.
import { keepLooking, lookForModels, watchModels } from "./api/models.ts";
import { ArenaPage } from "./arena/page.ts";
import { ChatPage } from "./chat/page.ts";
import { ComparePage } from "./compare/page.ts";
import { button, h, setText } from "./dom.ts";
import { apiKey, read, setApiKey, write } from "./kept.ts";
import { LivePage } from "./live/page.ts";

interface Page {
  element: HTMLElement;
  shown: () => void;
  hidden?: () => void;
}

const PAGES: { path: string; name: string; make: () => Page }[] = [
  { path: "/", name: "Chat", make: () => new ChatPage() },
  { path: "/compare", name: "Compare", make: () => new ComparePage() },
  { path: "/arena", name: "Arena", make: () => new ArenaPage() },
  { path: "/live", name: "Live", make: () => new LivePage() },
];
const THEMES = ["auto", "light", "dark"] as const;

class App {
  private readonly made = new Map<string, Page>();
  private readonly links = new Map<string, HTMLAnchorElement>();
  private readonly main = h("main", { id: "page", tabindex: -1 });
  private current: Page | null = null;

  start(): void {
    const links = PAGES.map(({ path, name }) => {
      const link = h("a", { href: path, onclick: (event: MouseEvent) => this.follow(event, path) }, name);
      this.links.set(path, link);
      return link;
    });
    const brand = h("span", { class: "brand" }, h("span", { class: "mark", "aria-hidden": "true" }), "Vicuna");
    const skip = h("a", { class: "skip", href: "#page" }, "Go to the page");
    const head = h("header", { class: "top" }, brand, h("nav", { "aria-label": "Pages" }, ...links), h("span", { class: "space" }), keyMenu(), themeButton());
    document.body.append(skip, head, this.main);
    addEventListener("popstate", () => this.show(location.pathname));
    this.show(location.pathname);
    keepLooking();
  }

  private follow(event: MouseEvent, path: string): void {
    // Into a new tab or window, as the browser does it.
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    if (path === location.pathname) return;
    history.pushState(null, "", path);
    this.show(path);
  }

  private show(path: string): void {
    const page = PAGES.find((page) => page.path === path) ?? PAGES[0];
    if (!page) return;
    this.current?.hidden?.();
    for (const made of this.made.values()) made.element.hidden = true;
    let shown = this.made.get(page.path);
    if (!shown) {
      shown = page.make();
      this.made.set(page.path, shown);
      this.main.append(shown.element);
    }
    shown.element.hidden = false;
    document.title = `${page.name} · Vicuna`;
    for (const [path, link] of this.links) {
      if (path === page.path) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    this.current = shown;
    shown.shown();
  }
}

function keyMenu(): HTMLElement {
  const input = h("input", { type: "password", autocomplete: "off", placeholder: "if the gateway asks for one" });
  const summary = h("summary", {}, "Key");
  const problem = h("p", { class: "problem", role: "status" });
  const menu = h("details", { class: "menu" }, summary, h("div", { class: "drop" }, h("label", {}, "API key", input), h("p", { class: "hint" }, "Kept until this tab is closed."), problem));
  input.value = apiKey();
  input.addEventListener("change", () => {
    setApiKey(input.value);
    void lookForModels();
  });
  watchModels((_, words) => {
    const asksForKey = words.includes("API key");
    setText(problem, asksForKey ? words : "");
    summary.classList.toggle("wanted", asksForKey);
    setText(summary, asksForKey ? "Key needed" : apiKey() ? "Key ✓" : "Key");
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    summary.focus();
  });
  return menu;
}

function themeButton(): HTMLElement {
  let theme = read<(typeof THEMES)[number]>("vicuna-theme", "auto");
  const element = button("", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] ?? "auto";
    write("vicuna-theme", theme);
    apply();
  });
  const apply = () => {
    document.documentElement.dataset["theme"] = theme;
    setText(element, { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme] ?? "◐ Auto");
    element.setAttribute("aria-label", `Colours: ${theme}`);
  };
  apply();
  return element;
}

new App().start();
