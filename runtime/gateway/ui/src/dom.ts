// Elements as expressions. Text stays text: nothing here reads HTML.
type Attribute = string | number | boolean | null | undefined | ((event: never) => void);
export type Child = Node | string | number | null | undefined | false;

// Functions are listeners ("onclick"), true is a bare attribute, and what is false or absent is left out.
export function h<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Record<string, Attribute> = {},
  ...children: Child[]
): HTMLElementTagNameMap[Name] {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) set(element, key, value);
  element.append(...shown(children));
  return element;
}

function set(element: Element, key: string, value: Attribute): void {
  if (typeof value === "function") element.addEventListener(key.slice(2), value as EventListener);
  else if (value === true) element.setAttribute(key, "");
  else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, String(value));
}

const shown = (children: Child[]): (Node | string)[] =>
  children.filter((child) => child !== null && child !== undefined && child !== false).map((child) =>
    child instanceof Node ? child : String(child),
  );

export function replace(element: Element, ...children: Child[]): void {
  element.replaceChildren(...shown(children));
}

// Writes only what differs: a screen reader would read the same words again.
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

export function button(label: string, act: () => void, attributes: Record<string, Attribute> = {}): HTMLButtonElement {
  return h("button", { type: "button", onclick: act, ...attributes }, label);
}

// A button that does something and says so in its own words for a moment.
export function telling(label: string, told: string, act: () => Promise<void> | void): HTMLButtonElement {
  const element = button(label, async () => {
    try {
      await act();
      element.textContent = told;
    } catch (error) {
      element.textContent = error instanceof Error ? error.message : String(error);
    }
    setTimeout(() => (element.textContent = label), 1500);
  });
  return element;
}

export function download(name: string, type: string, text: string): void {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

// The clipboard's own interface is there on HTTPS and localhost only; the older way works everywhere.
export async function copy(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("Not copied");
}

// SVG has a namespace of its own.
export function svg(name: string, attributes: Record<string, string | number>, ...children: Node[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}
