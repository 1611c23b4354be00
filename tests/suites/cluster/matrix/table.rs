//! What was measured, as Markdown for people and JSON for programs.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;
use vicuna_tests::cluster::repository;

use super::fire::Burnt;
use super::run::Recovery;

/// One round of one row.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    pub row: String,
    /// The weights are those of the undisturbed run.
    pub equal: bool,
    pub lost_steps: u64,
    pub notices: u64,
    pub reclaims: u64,
    pub generations: u64,
    pub application_restarts: u64,
    pub goodput: f64,
    pub recoveries: Vec<Recovery>,
    pub error: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub struct Table {
    pub rows: Vec<Measured>,
    pub fires: Vec<Burnt>,
}

impl Measured {
    pub fn of(row: &str, status: &Value, recoveries: Vec<Recovery>, reference: &str) -> Self {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let disruptions = &status["disruptions"];
        Self {
            row: row.to_owned(),
            equal: status["result"]["digest"] == reference,
            lost_steps: number(&disruptions["lostSteps"]),
            notices: number(&disruptions["notices"]),
            reclaims: number(&disruptions["reclaims"]),
            generations: number(&status["membership"]["generation"]),
            application_restarts: number(&status["restarts"]["application"]),
            goodput: status["goodput"].as_f64().unwrap_or(0.0),
            recoveries,
            error: None,
        }
    }

    /// A round that did not come to its end.
    pub fn nothing(row: &str) -> Self {
        Self { row: row.to_owned(), ..Self::default() }
    }

    pub fn in_words(&self) -> String {
        let seconds: Vec<String> = self.recoveries.iter().map(|recovery| format!("{:.1}", recovery.total)).collect();
        format!(
            "weights {}, {} steps lost, {} reclaims, {} generations, recoveries of [{}] s",
            if self.equal { "equal" } else { "DIFFERENT" },
            self.lost_steps,
            self.reclaims,
            self.generations,
            seconds.join(" ")
        )
    }
}

impl Table {
    pub fn write(&self) -> Result<()> {
        let folder = repository().join("target");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("matrix.json"), serde_json::to_string_pretty(self)?)?;
        Ok(fs::write(folder.join("matrix.md"), self.markdown())?)
    }

    pub fn markdown(&self) -> String {
        let rows = if self.rows.is_empty() { String::new() } else { self.training_table() };
        let fires: String = self.fires.iter().map(Burnt::markdown).collect();
        format!("{rows}\n{fires}")
    }

    fn training_table(&self) -> String {
        let mut by_row: BTreeMap<usize, Vec<&Measured>> = BTreeMap::new();
        for measured in &self.rows {
            let first = self.rows.iter().position(|other| other.row == measured.row).unwrap_or(0);
            by_row.entry(first).or_default().push(measured);
        }
        let lines: String = by_row.values().map(|rounds| line(rounds)).collect();
        format!(
            "| row | runs | weights equal | lost steps | recoveries | seconds, median (most) | to notice | to agree | to move state | first step |\n|---|---|---|---|---|---|---|---|---|---|\n{lines}"
        )
    }
}

fn line(rounds: &[&Measured]) -> String {
    let recoveries: Vec<&Recovery> = rounds.iter().flat_map(|round| &round.recoveries).collect();
    let of = |phase: fn(&Recovery) -> f64| median(recoveries.iter().map(|recovery| phase(recovery)).collect());
    let most = recoveries.iter().map(|recovery| recovery.total).fold(0.0, f64::max);
    let equal = rounds.iter().filter(|round| round.equal).count();
    let lost: Vec<String> = rounds.iter().map(|round| round.lost_steps.to_string()).collect();
    let runs = rounds.len();
    format!(
        "| {} | {runs} | {equal} of {runs} | {} | {} | {:.1} ({most:.1}) | {:.1} | {:.1} | {:.1} | {:.1} |\n",
        rounds[0].row.replace('_', " "),
        lost.join(", "),
        recoveries.len(),
        of(|recovery| recovery.total),
        of(|recovery| recovery.notice),
        of(|recovery| recovery.agree),
        of(|recovery| recovery.state),
        of(|recovery| recovery.step),
    )
}

/// The middle one, the upper of two; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
