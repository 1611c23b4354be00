//! What the demo measured: a table for the reader, `target/demo/report.json` for everybody else.

use std::fs;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};
use vicuna_tests::cluster::repository;

#[derive(Debug)]
pub struct Report {
    started: Instant,
    phase_started: Instant,
    phase: Option<&'static str>,
    durations: Map<String, Value>,
    values: Map<String, Value>,
}

impl Report {
    pub fn start() -> Self {
        let now = Instant::now();
        Self { started: now, phase_started: now, phase: None, durations: Map::new(), values: Map::new() }
    }

    /// Ends the phase before and begins one.
    pub fn phase(&mut self, name: &'static str, what: &str) {
        self.end_phase();
        self.phase = Some(name);
        println!("\n\u{25b8} [{:>5.0} s] {what}", self.started.elapsed().as_secs_f64());
    }

    fn end_phase(&mut self) {
        if let Some(name) = self.phase.take() {
            self.durations.insert(name.to_owned(), json!(round(self.phase_started.elapsed().as_secs_f64())));
        }
        self.phase_started = Instant::now();
    }

    /// Notes a value under a key in the design's words.
    pub fn note(&mut self, key: &str, value: impl Into<Value>) {
        self.values.insert(key.to_owned(), value.into());
    }

    /// A line of what happens, with the time since the start.
    pub fn say(&self, line: &str) {
        println!("  {:>5.0} s  {line}", self.started.elapsed().as_secs_f64());
    }

    /// Prints the table and writes the file.
    pub fn finish(mut self) -> Result<()> {
        self.end_phase();
        self.note("durations_seconds", self.durations.clone());
        self.note("total_seconds", round(self.started.elapsed().as_secs_f64()));
        println!("\n\u{25b8} Summary");
        self.values.iter().for_each(|(key, value)| print_rows(key, value));
        let folder = repository().join("target/demo");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("report.json"), serde_json::to_string_pretty(&self.values)?)?;
        println!("\n  written to target/demo/report.json");
        Ok(())
    }
}

fn print_rows(key: &str, value: &Value) {
    match value {
        Value::Object(inner) => inner.iter().for_each(|(name, value)| print_rows(&format!("{key}.{name}"), value)),
        Value::String(text) => println!("  {key:<44} {text}"),
        other => println!("  {key:<44} {other}"),
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}
