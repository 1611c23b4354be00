// Markdown as elements, never as HTML: what a model says becomes text nodes only, so that nothing in
// it can run, load or pretend to be the page. It knows what models write: headings, lists, quotes, code,
// tables, rules, emphasis and links.
import { copy, h, telling } from "./dom.ts";

type Block = { element: Node; next: number } | null;

const INLINE =
  /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|~~(.+?)~~|\*([^\s*](?:.*?[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

function inline(text: string): (Node | string)[] {
  const nodes: (Node | string)[] = [];
  let rest = text;
  for (let match; (match = INLINE.exec(rest)); rest = rest.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    nodes.push(styled(match));
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function styled([, , code, stars, lines, struck, emphasis, label, url]: RegExpExecArray): Node {
  if (code !== undefined) return h("code", {}, code);
  const strong = stars ?? lines;
  if (strong) return h("strong", {}, ...inline(strong));
  if (struck) return h("s", {}, ...inline(struck));
  if (emphasis) return h("em", {}, ...inline(emphasis));
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow", title: url }, label);
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;

// Quotes and lists in each other, at most: what is deeper stays text.
const DEEPEST = 8;

// The elements of a whole text.
export function render(text: string, depth = 0): DocumentFragment {
  const lines = text.split("\n");
  const out = document.createDocumentFragment();
  for (let at = 0; at < lines.length; ) {
    const block = parse(lines, at, depth);
    if (block) out.append(block.element);
    at = block ? block.next : at + 1;
  }
  return out;
}

function parse(lines: string[], at: number, depth: number): Block {
  for (const kind of [code, heading, rule, list, quote, table, paragraph]) {
    const block = kind(lines, at, depth);
    if (block) return block;
  }
  return null;
}

const lineAt = (lines: string[], at: number): string => lines[at] ?? "";

function code(lines: string[], at: number): Block {
  const [, fence, language] = FENCE.exec(lineAt(lines, at)) ?? [];
  if (!fence) return null;
  let end = at + 1;
  while (end < lines.length && !lineAt(lines, end).trim().startsWith(fence)) end++;
  const text = lines.slice(at + 1, end).join("\n");
  const caption = h("figcaption", {}, language || "code", telling("Copy", "Copied", () => copy(text)));
  // A region that scrolls can be reached with the keyboard.
  const pre = h("pre", { tabindex: 0, role: "region", "aria-label": "Code" }, h("code", {}, text));
  return { element: h("figure", {}, caption, pre), next: end + 1 };
}

function heading(lines: string[], at: number): Block {
  const [, marks, text] = HEADING.exec(lineAt(lines, at)) ?? [];
  if (!marks) return null;
  // Below the page's own headings.
  const name = `h${Math.min(marks.length + 2, 6)}` as "h3" | "h4" | "h5" | "h6";
  return { element: h(name, {}, ...inline(text ?? "")), next: at + 1 };
}

function rule(lines: string[], at: number): Block {
  return RULE.test(lineAt(lines, at)) ? { element: h("hr"), next: at + 1 } : null;
}

function list(lines: string[], at: number, depth: number): Block {
  const first = ITEM.exec(lineAt(lines, at));
  if (!first) return null;
  const [, indent = "", mark = ""] = first;
  const ordered = /\d/.test(mark);
  const element = ordered ? h("ol", { start: parseInt(mark, 10) }) : h("ul");
  let item: HTMLElement | null = null;
  for (; at < lines.length; at++) {
    const line = lineAt(lines, at);
    const [, deeper = "", other = "", text = ""] = ITEM.exec(line) ?? [];
    if (other && deeper.length > indent.length + 1 && item && depth < DEEPEST) {
      const nested: Block = list(lines, at, depth + 1);
      if (!nested) break;
      item.append(nested.element);
      at = nested.next - 1;
    } else if (other && (deeper.length < indent.length || /\d/.test(other) !== ordered)) break;
    else if (other) element.append((item = h("li", {}, ...inline(text))));
    else if (/^\s+\S/.test(line) && !FENCE.test(line)) item?.append(" ", ...inline(line.trim()));
    else if (line.trim() || !ITEM.test(lineAt(lines, at + 1))) break;
  }
  return { element, next: at };
}

function quote(lines: string[], at: number, depth: number): Block {
  if (!lineAt(lines, at).startsWith(">") || depth >= DEEPEST) return null;
  let end = at;
  while (lineAt(lines, end).startsWith(">")) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(/^> ?/, ""));
  return { element: h("blockquote", {}, render(inner.join("\n"), depth + 1)), next: end };
}

const DIVIDES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
const cells = (line: string): string[] =>
  line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines: string[], at: number): Block {
  if (!lineAt(lines, at).includes("|") || !DIVIDES.test(lineAt(lines, at + 1))) return null;
  const row = (name: "th" | "td", line: string) => h("tr", {}, ...cells(line).map((cell) => h(name, {}, ...inline(cell))));
  const body = h("tbody");
  let end = at + 2;
  for (; lineAt(lines, end).includes("|"); end++) body.append(row("td", lineAt(lines, end)));
  const whole = h("table", {}, h("thead", {}, row("th", lineAt(lines, at))), body);
  return { element: h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" }, whole), next: end };
}

function paragraph(lines: string[], at: number): Block {
  if (!lineAt(lines, at).trim()) return null;
  let end = at + 1;
  const ends = (line: string) =>
    !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || line.startsWith(">");
  while (end < lines.length && !ends(lineAt(lines, end))) end++;
  const element = h("p");
  lines.slice(at, end).forEach((line, index) => element.append(...(index ? [h("br")] : []), ...inline(line)));
  return { element, next: end };
}
