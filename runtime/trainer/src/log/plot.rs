//! The loss as a drawing (SVG), with the steps at which ranks left marked. Readable on light and on dark ground.

use super::Line;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Points of a curve, at most; more could not be told apart.
const MOST_POINTS: usize = 800;
const STYLE: &str = "svg{color:#1f2328;background:#fff}\
     text{font:12px sans-serif;fill:currentColor}\
     .axis{stroke:currentColor;stroke-width:1;opacity:.4}\
     .train{fill:none;stroke:#1f6feb;stroke-width:1.5}\
     .held-out{fill:#bf5700;stroke:none}\
     .left{stroke:#cf222e;stroke-width:1;stroke-dasharray:4 3}\
     @media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}\
     .train{stroke:#6cb6ff}.held-out{fill:#ffa657}.left{stroke:#ff7b72}}";

/// Where numbers are on the paper.
struct Scale {
    last_step: f64,
    low: f64,
    high: f64,
}

impl Scale {
    fn new(steps: impl Iterator<Item = u64>, losses: impl Iterator<Item = f64> + Clone) -> Self {
        let low = losses.clone().fold(f64::INFINITY, f64::min);
        let high = losses.fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        // A constant has a place, too.
        let room = ((high - low) * 0.05).max(1e-6);
        Self { last_step: steps.max().unwrap_or(1).max(1) as f64, low: low - room, high: high + room }
    }

    fn x(&self, step: u64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * step as f64 / self.last_step
    }

    fn y(&self, loss: f64) -> f64 {
        TOP + (HEIGHT - TOP - BOTTOM) * (self.high - loss) / (self.high - self.low)
    }
}

/// Draws the log of a run called `title`.
pub fn svg(title: &str, lines: &[Line]) -> String {
    let (trained, held_out) = (curve(lines, Line::loss), curve(lines, Line::held_out_loss));
    let losses = trained.iter().chain(&held_out).map(|(_, loss)| *loss);
    let scale = Scale::new(lines.iter().map(|line| line.step), losses);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><style>{STYLE}</style>\
         <title>Loss of {0}</title><text x=\"{LEFT}\" y=\"22\">Loss of {0}: line, training; dots, held out; dashed, ranks left</text>",
        escaped(title)
    );
    axes(&mut out, &scale);
    departures(&mut out, &scale, lines);
    let points: Vec<String> =
        thinned(&trained).map(|(step, loss)| format!("{:.1},{:.1}", scale.x(step), scale.y(loss))).collect();
    // Writing into a string cannot fail.
    let _ = write!(out, "<polyline class=\"train\" points=\"{}\"/>", points.join(" "));
    for (step, loss) in thinned(&held_out) {
        let (x, y) = (scale.x(step), scale.y(loss));
        let _ = write!(out, "<circle class=\"held-out\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
    }
    out.push_str("</svg>\n");
    out
}

fn curve(lines: &[Line], value: impl Fn(&Line) -> Option<f64>) -> Vec<(u64, f64)> {
    lines.iter().filter_map(|line| Some((line.step, value(line)?))).collect()
}

/// The last point stays.
fn thinned(points: &[(u64, f64)]) -> impl Iterator<Item = (u64, f64)> {
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    points.iter().rev().step_by(every).rev().copied()
}

fn axes(out: &mut String, scale: &Scale) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let _ = write!(out, "<path class=\"axis\" fill=\"none\" d=\"M{LEFT},{TOP}V{bottom}H{right}\"/>");
    for part in 0..=4 {
        let share = f64::from(part) / 4.0;
        let loss = scale.low + (scale.high - scale.low) * share;
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{loss:.3}</text>",
            LEFT - 6.0,
            scale.y(loss) + 4.0
        );
        let step = (scale.last_step * share).round() as u64;
        let (x, y) = (scale.x(step), bottom + 18.0);
        let _ = write!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{step}</text>");
    }
    let (x, y) = (f64::midpoint(LEFT, right), HEIGHT - 10.0);
    let _ = write!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">step</text>");
}

fn departures(out: &mut String, scale: &Scale, lines: &[Line]) {
    for line in lines.iter().filter(|line| !line.left().is_empty()) {
        let (x, bottom) = (scale.x(line.step), HEIGHT - BOTTOM);
        let who = escaped(&line.left().join(", "));
        let _ = write!(
            out,
            "<line class=\"left\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"><title>{who} left before step {}</title></line>",
            line.step
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{evaluation, step};
    use super::*;

    #[test]
    fn losses_are_drawn_and_reclaims_marked() {
        let lines = [step(1, 3.0, 2, &[]), step(2, 2.0, 1, &["t-<0>"]), evaluation(2, 2.5), step(3, f64::NAN, 1, &[])];
        let drawing = svg("a & b", &lines);
        assert!(drawing.contains("Loss of a &amp; b"));
        assert_eq!(drawing.matches("class=\"left\"").count(), 1);
        assert!(drawing.contains("t-&lt;0&gt; left before step 2"));
        assert_eq!(drawing.matches("<circle").count(), 1);
        let points = drawing.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let heights: Vec<f64> = points.split(' ').map(|at| at.split(',').nth(1).unwrap().parse().unwrap()).collect();
        assert!(heights.len() == 2 && heights[0] < heights[1], "a smaller loss is further down: {heights:?}");
    }

    #[test]
    fn long_and_empty_logs_are_drawn() {
        let many: Vec<Line> = (1..=5000).map(|at| step(at, 1.0 / at as f64, 1, &[])).collect();
        let drawing = svg("t", &many);
        assert!(drawing.len() < 40_000, "{}", drawing.len());
        assert!(svg("t", &[]).ends_with("</svg>\n"));
    }
}
