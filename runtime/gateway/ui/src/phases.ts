// What an answer has gone through, so that nobody takes a slow model for a stuck one: pure, for the line
// below each answer.
import type { AnswerEvent, Usage } from "./api/answer.ts";

export type PhaseName = "held" | "loading" | "prefill" | "writing";

export interface Phase {
  name: PhaseName;
  since: number;
  detail: string;
}

// Times are in milliseconds, of one clock.
export interface Course {
  phases: Phase[];
  tokens: number;
  usage: Usage | null;
  resumes: number;
  ended: number | null;
}

const LABELS: Record<PhaseName, string> = {
  held: "held",
  loading: "loading the model",
  prefill: "reading the prompt",
  writing: "writing",
};

export const begin = (now: number, loaded: boolean): Course => ({
  phases: [{ name: loaded ? "held" : "loading", since: now, detail: "" }],
  tokens: 0,
  usage: null,
  resumes: 0,
  ended: null,
});

// Tells what is worth a mark in the answer: that its worker or the connection was lost.
export function take(course: Course, event: AnswerEvent, now: number): string {
  switch (event.kind) {
    case "opened":
      if (course.tokens === 0) enter(course, "prefill", now);
      return "";
    case "text":
      course.tokens = Math.max(course.tokens, event.tokens);
      enter(course, "writing", now);
      return "";
    case "usage":
      course.usage = event.usage;
      course.tokens = event.usage.completion_tokens;
      course.resumes = event.resumes;
      return "";
    case "comment":
      return comment(course, event.comment, now);
  }
}

function comment(course: Course, text: string, now: number): string {
  if (text.startsWith("resumed")) {
    course.resumes += 1;
    return `worker lost; ${text}`;
  }
  if (text.startsWith("connection")) return text;
  if (course.tokens > 0) return "";
  if (text.startsWith("waiting")) {
    enter(course, /load(ed|ing)/.test(text) ? "loading" : "held", now);
    last(course).detail = /\d+ %/.exec(text)?.[0] ?? "";
  }
  const read = /^reading the prompt, (.*) tokens/.exec(text);
  if (read || text.startsWith("generating")) enter(course, "prefill", now);
  if (read?.[1]) last(course).detail = read[1];
  return "";
}

const last = (course: Course): Phase => course.phases.at(-1) as Phase;

function enter(course: Course, name: PhaseName, now: number): void {
  if (last(course).name !== name) course.phases.push({ name, since: now, detail: "" });
}

const seconds = (ms: number): string => (ms < 9950 ? (ms / 1000).toFixed(1) : Math.round(ms / 1000).toString()) + " s";

// The gateway keeps an answer's beginning back for up to a second, so that an error has a status of its own; what
// comes then at once with the first token does not tell waiting from reading.
const AT_ONCE_MS = 50;

// The words of the line, one a phase; the last is the one that it is in.
export function words(course: Course, now: number): string[] {
  const end = course.ended ?? now;
  const [held, prefill, writing] = course.phases;
  if (held?.name === "held" && prefill && writing?.name === "writing" && writing.since - prefill.since < AT_ONCE_MS) {
    return [`first token after ${seconds(writing.since - held.since)}`, speed(course, end)];
  }
  return course.phases.map((phase, index) => {
    const took = (course.phases[index + 1]?.since ?? end) - phase.since;
    if (phase.name === "writing") return speed(course, end);
    const detail = phase.detail && index === course.phases.length - 1 ? ` ${phase.detail}` : "";
    return `${LABELS[phase.name]}${detail} ${seconds(took)}`;
  });
}

const speed = (course: Course, end: number): string =>
  `${course.tokens} ${course.tokens === 1 ? "token" : "tokens"}, ${rate(course, end).toFixed(1)} tokens/s`;

// The first token comes with the prompt; so n tokens take the time of n - 1.
function rate(course: Course, end: number): number {
  const since = course.phases.find(({ name }) => name === "writing")?.since ?? end;
  return end > since ? (Math.max(course.tokens - 1, 0) * 1000) / (end - since) : 0;
}
