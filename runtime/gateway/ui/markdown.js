// Markdown as elements, never as HTML: what a model says becomes text nodes only, so that nothing in
// it can run, load or pretend to be the page. It knows what models write: headings, lists, quotes, code,
// tables, emphasis and links.
const make = (name, ...children) => {
  const element = document.createElement(name);
  element.append(...children);
  return element;
};

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|\*([^\s*](?:.*?[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

function inline(text) {
  const nodes = [];
  let rest = text;
  for (let match; (match = INLINE.exec(rest)); rest = rest.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    const [, , code, strong, strong2, emphasis, label, url] = match;
    if (code !== undefined) nodes.push(make("code", code));
    else if (strong ?? strong2) nodes.push(make("strong", ...inline(strong ?? strong2)));
    else if (emphasis) nodes.push(make("em", ...inline(emphasis)));
    else nodes.push(link(label, url));
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function link(label, url) {
  const anchor = make("a", label);
  Object.assign(anchor, { href: url, target: "_blank", rel: "noopener noreferrer nofollow", title: url });
  return anchor;
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;

// Quotes and lists in each other, at most: what is deeper stays text.
const DEEPEST = 8;

// The elements of a whole text.
export function render(text, depth = 0) {
  const lines = text.split("\n");
  const out = document.createDocumentFragment();
  for (let at = 0; at < lines.length; ) {
    const block = parse(lines, at, depth);
    if (block) out.append(block.element);
    at = block ? block.next : at + 1;
  }
  return out;
}

function parse(lines, at, depth) {
  for (const kind of [code, heading, list, quote, table, paragraph]) {
    const block = kind(lines, at, depth);
    if (block) return block;
  }
  return null;
}

function code(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(open[1])) end++;
  const text = lines.slice(at + 1, end).join("\n");
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.className = "copy";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  });
  const figure = make("figure", make("figcaption", open[2] || "code", copy), make("pre", make("code", text)));
  return { element: figure, next: end + 1 };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  // Below the page's own headings.
  return found && { element: make(`h${Math.min(found[1].length + 2, 6)}`, ...inline(found[2])), next: at + 1 };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]);
  const element = make(ordered ? "ol" : "ul");
  if (ordered) element.start = parseInt(first[2], 10);
  let item = null;
  for (; at < lines.length; at++) {
    const found = ITEM.exec(lines[at]);
    if (found && found[1].length > first[1].length + 1 && item && depth < DEEPEST) {
      const nested = list(lines, at, depth + 1);
      item.append(nested.element);
      at = nested.next - 1;
    } else if (found && found[1].length < first[1].length) break;
    else if (found && /\d/.test(found[2]) !== ordered) break;
    else if (found) element.append((item = make("li", ...inline(found[3]))));
    else if (/^\s+\S/.test(lines[at]) && !FENCE.test(lines[at])) item.append(" ", ...inline(lines[at].trim()));
    else if (lines[at].trim() || !ITEM.test(lines[at + 1] ?? "")) break;
  }
  return { element, next: at };
}

function quote(lines, at, depth) {
  if (!lines[at].startsWith(">") || depth >= DEEPEST) return null;
  let end = at;
  while (end < lines.length && lines[end].startsWith(">")) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(/^> ?/, ""));
  return { element: make("blockquote", render(inner.join("\n"), depth + 1)), next: end };
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines, at) {
  const divides = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
  if (!lines[at].includes("|") || !divides.test(lines[at + 1] ?? "")) return null;
  const row = (name, line) => make("tr", ...cells(line).map((cell) => make(name, ...inline(cell))));
  const body = make("tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) body.append(row("td", lines[end]));
  return { element: make("table", make("thead", row("th", lines[at])), body), next: end };
}

function paragraph(lines, at) {
  if (!lines[at].trim()) return null;
  let end = at + 1;
  const ends = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || line.startsWith(">");
  while (end < lines.length && !ends(lines[end])) end++;
  const element = make("p");
  lines.slice(at, end).forEach((line, index) => element.append(...(index ? [make("br")] : []), ...inline(line)));
  return { element, next: end };
}
