// A request as code to run elsewhere. The key is never part of it. Pure.
import type { Ask } from "../api/answer.ts";

const quoted = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(origin: string, ask: Ask): string {
  const body = JSON.stringify({ ...ask, stream: true }, null, 2);
  return [
    `curl -N ${quoted(`${origin}/v1/chat/completions`)} \\`,
    `  -H "Authorization: Bearer $OPENAI_API_KEY" \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  -d ${quoted(body)}`,
    "",
  ].join("\n");
}

// Options that OpenAI's client does not name go into its extra_body.
const EXTRA = new Set(["min_p", "top_k", "repetition_penalty"]);

export function python(origin: string, ask: Ask): string {
  const entries = Object.entries(ask).filter(([, value]) => value !== undefined);
  const named = entries.filter(([name]) => !EXTRA.has(name)).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  const extra = Object.fromEntries(entries.filter(([name]) => EXTRA.has(name)));
  const body = Object.keys(extra).length ? [`    extra_body=${literal(extra, 1)},`] : [];
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`, 0)}, api_key=os.environ.get("OPENAI_API_KEY", "none"))`,
    "stream = client.chat.completions.create(",
    ...named,
    ...body,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
    "print()",
    "",
  ].join("\n");
}

// JSON's texts and numbers are Python's, too.
function literal(value: unknown, depth: number): string {
  const inner = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (Array.isArray(value)) return `[\n${value.map((item) => `${inner}${literal(item, depth + 1)},\n`).join("")}${end}]`;
  if (typeof value === "object" && value !== null) {
    const fields = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
    return `{${fields.join(", ")}}`;
  }
  return JSON.stringify(value);
}
