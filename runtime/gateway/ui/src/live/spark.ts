// A small curve of the last values, drawn, with words for those who do not see it.
import { svg } from "../dom.ts";

const KEPT = 60;
const WIDTH = 120;
const HEIGHT = 28;

export class Spark {
  private readonly values: number[] = [];
  private readonly line = svg("polyline", { class: "line", points: "" });
  private readonly area = svg("polygon", { class: "area", points: "" });
  readonly element = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    this.area,
    this.line,
  );

  push(value: number): void {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    const points = this.points();
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", [...points, `${WIDTH},${HEIGHT}`, `${WIDTH - (this.values.length - 1) * (WIDTH / (KEPT - 1))},${HEIGHT}`].join(" "));
  }

  // The newest at the right end.
  private points(): string[] {
    const highest = Math.max(...this.values, 1e-9);
    const step = WIDTH / (KEPT - 1);
    const first = WIDTH - (this.values.length - 1) * step;
    return this.values.map((value, index) => {
      const y = HEIGHT - 1.5 - (value / highest) * (HEIGHT - 4);
      return `${(first + index * step).toFixed(1)},${y.toFixed(1)}`;
    });
  }
}
