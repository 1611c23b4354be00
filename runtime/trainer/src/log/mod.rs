//! What became of every step, in the bucket: JSON lines, and event files for TensorBoard.
//!
//! Every rank hears every step, and so keeps the lines that may not be in the bucket yet; one rank, the generation's
//! scribe, writes them in parts: before each checkpoint, so that no manifest is ahead of its log, when it takes the
//! task over, and at the end. It looks first how far the parts reach. So each step is in the log once, whoever was
//! lost: a newcomer lacks no line, since it is given what others keep when it joins.

pub mod events;
pub mod inherit;
pub mod plot;
pub mod record;
pub mod scribe;

use crate::evaluation::Evaluation;
use crate::step::StepReport;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Lines that are kept for a store out of reach, at most; then the oldest go.
const MOST: usize = 1 << 16;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// The last step applied.
    pub step: u64,
    /// Unix time in seconds.
    pub time: f64,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum What {
    Step(Step),
    Evaluation(HeldOutLoss),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    pub epoch: f64,
    /// Mean per trained token; null when the step trained none, or when it is not finite.
    pub loss: Option<f64>,
    pub learning_rate: f64,
    pub gradient_norm: Option<f64>,
    pub tokens: u64,
    pub seconds: f64,
    pub communication_seconds: f64,
    pub generation: u64,
    pub ranks: usize,
    /// Pods that were in the generation before and are not in this one, at its first step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldOutLoss {
    pub evaluation_loss: Option<f64>,
    pub evaluation_seconds: f64,
}

impl Line {
    /// Of the step.
    pub fn loss(&self) -> Option<f64> {
        match &self.what {
            What::Step(step) => step.loss,
            What::Evaluation(_) => None,
        }
    }

    pub fn held_out_loss(&self) -> Option<f64> {
        match &self.what {
            What::Step(_) => None,
            What::Evaluation(evaluation) => evaluation.evaluation_loss,
        }
    }

    /// Pods that left before the step.
    pub fn left(&self) -> &[String] {
        match &self.what {
            What::Step(step) => &step.left,
            What::Evaluation(_) => &[],
        }
    }
}

/// How far lines reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    pub step: u64,
    /// The step of the last evaluation.
    pub evaluation: u64,
}

impl Reach {
    pub fn of(lines: &[Line]) -> Self {
        lines.iter().fold(Self::default(), |reach, line| match line.what {
            What::Step(_) => Self { step: reach.step.max(line.step), ..reach },
            What::Evaluation(_) => Self { evaluation: reach.evaluation.max(line.step), ..reach },
        })
    }

    pub fn covers(self, line: &Line) -> bool {
        match line.what {
            What::Step(_) => line.step <= self.step,
            What::Evaluation(_) => line.step <= self.evaluation,
        }
    }

    pub fn max(self, other: Self) -> Self {
        Self { step: self.step.max(other.step), evaluation: self.evaluation.max(other.evaluation) }
    }
}

/// The lines that a rank keeps.
#[derive(Debug, Default)]
pub struct Log {
    lines: Vec<Line>,
    /// How many of them were there when a part was last due.
    marked: usize,
    reach: Reach,
    generation: u64,
    members: Vec<String>,
    left: Vec<String>,
    joined: Vec<String>,
}

impl Log {
    /// Takes note of who is in the generation.
    pub fn enter(&mut self, generation: u64, members: Vec<String>) {
        let missing = |from: &[String], of: &[String]| -> Vec<String> {
            of.iter().filter(|name| !from.contains(name)).cloned().collect()
        };
        if !self.members.is_empty() {
            self.left = missing(&members, &self.members);
            self.joined = missing(&self.members, &members);
        }
        (self.generation, self.members) = (generation, members);
    }

    /// Goes back to this step: what came after it is made again.
    pub fn rewind(&mut self, step: u64) {
        self.lines.retain(|line| line.step <= step);
        self.marked = self.marked.min(self.lines.len());
        self.reach = Reach { step: self.reach.step.min(step), evaluation: self.reach.evaluation.min(step) };
    }

    pub fn stepped(&mut self, report: &StepReport, epoch: f64) {
        let what = What::Step(Step {
            epoch,
            loss: finite(report.loss),
            learning_rate: report.learning_rate,
            gradient_norm: finite(report.norm),
            tokens: report.tokens,
            seconds: report.duration.as_secs_f64(),
            communication_seconds: report.communication.as_secs_f64(),
            generation: self.generation,
            ranks: self.members.len(),
            left: std::mem::take(&mut self.left),
            joined: std::mem::take(&mut self.joined),
        });
        self.push(Line { step: report.step, time: now(), what });
    }

    pub fn evaluated(&mut self, evaluation: &Evaluation) {
        let what = What::Evaluation(HeldOutLoss {
            evaluation_loss: finite(evaluation.loss),
            evaluation_seconds: evaluation.duration.as_secs_f64(),
        });
        self.push(Line { step: evaluation.step, time: now(), what });
    }

    /// What was made again is not told again.
    fn push(&mut self, line: Line) {
        if self.reach.covers(&line) {
            return;
        }
        self.reach = self.reach.max(Reach::of(std::slice::from_ref(&line)));
        self.lines.push(line);
        if self.lines.len() > MOST {
            self.lines.remove(0);
            self.marked = self.marked.saturating_sub(1);
        }
    }

    /// Takes over what another rank kept.
    pub fn inherit(&mut self, lines: Vec<Line>) {
        lines.into_iter().for_each(|line| self.push(line));
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// A part is due, of all lines. The scribe knows what is `written`; others keep what was new since the last part
    /// was due until the next one is.
    pub fn part_is_due(&mut self, written: Option<Reach>) {
        match written {
            Some(reach) => self.lines.retain(|line| !reach.covers(line)),
            None => drop(self.lines.drain(..self.marked)),
        }
        self.marked = self.lines.len();
    }
}

fn finite(value: f64) -> Option<f64> {
    Some(value).filter(|value| value.is_finite())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn step(step: u64, loss: f64, ranks: usize, left: &[&str]) -> Line {
        let what = What::Step(Step {
            epoch: 0.5,
            loss: finite(loss),
            learning_rate: 1e-3,
            gradient_norm: Some(1.0),
            tokens: 100,
            seconds: 2.0,
            communication_seconds: 0.5,
            generation: 1,
            ranks,
            left: left.iter().map(|name| (*name).to_owned()).collect(),
            joined: Vec::new(),
        });
        Line { step, time: 1.5e9 + step as f64, what }
    }

    pub(crate) fn evaluation(step: u64, loss: f64) -> Line {
        let what = What::Evaluation(HeldOutLoss { evaluation_loss: Some(loss), evaluation_seconds: 1.0 });
        Line { step, time: 1.5e9, what }
    }

    #[test]
    fn a_line_comes_back_from_its_json() {
        for line in [step(3, f64::NAN, 2, &["a"]), evaluation(3, 1.5)] {
            let text = serde_json::to_string(&line).unwrap();
            assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line, "{text}");
        }
    }

    #[test]
    fn steps_and_evaluations_made_again_are_told_once() {
        let mut log = Log::default();
        for line in [step(1, 2.0, 1, &[]), evaluation(1, 2.0), evaluation(1, 2.0), step(2, 1.0, 1, &[])] {
            log.push(line);
        }
        assert_eq!(log.lines().len(), 3);
    }

    #[test]
    fn a_rank_that_does_not_write_keeps_lines_until_the_part_after_next() {
        let mut log = Log::default();
        log.push(step(1, 2.0, 1, &[]));
        log.part_is_due(None);
        log.push(step(2, 2.0, 1, &[]));
        assert_eq!(log.lines().len(), 2);
        log.part_is_due(None);
        assert_eq!(log.lines().iter().map(|line| line.step).collect::<Vec<_>>(), [2]);
        log.part_is_due(Some(Reach { step: 2, evaluation: 0 }));
        assert!(log.lines().is_empty());
    }

    #[test]
    fn who_left_and_who_joined_is_said_at_the_first_step_after() {
        let mut log = Log::default();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        log.enter(1, names(&["a", "b"]));
        assert!(log.left.is_empty() && log.joined.is_empty());
        log.enter(2, names(&["b", "c"]));
        assert_eq!((log.left, log.joined), (names(&["a"]), names(&["c"])));
    }
}
