//! The fault matrix: each row is one thing that befalls a training or a serving on a real cluster, run as often as
//! `MATRIX_ROUNDS` says (1), and measured. The table is printed, and kept as `target/matrix.md` and `target/matrix.json`.

mod fire;
mod rows;
mod run;
mod table;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use vicuna_tests::product::SYSTEM_NAMESPACE;

use crate::fixture::{Fixture, SOON};
use fire::{FIRES, Fire};
use rows::{Loss, ROWS, Row};
use run::Run;
use table::{Measured, Table};

const NODES: [&str; 4] = ["spot-1", "spot-2", "onprem-1", "system-1"];
/// Operator and gateways are kept off the nodes that faults befall.
const APART: [&str; 2] =
    ["operator.nodeSelector.vicuna\\.dev/capacity=system", "gateway.nodeSelector.vicuna\\.dev/capacity=system"];

/// What befalls a training, or a serving.
#[derive(Clone, Copy)]
enum Entry {
    Training(&'static Row),
    Serving(&'static Fire),
}

impl Entry {
    fn name(self) -> &'static str {
        match self {
            Self::Training(row) => row.name,
            Self::Serving(fire) => fire.name,
        }
    }
}

/// All rows, or those whose names have one of the words, in the order of the words.
fn chosen(words: &[String]) -> Vec<Entry> {
    let all: Vec<Entry> = ROWS.iter().map(Entry::Training).chain(FIRES.iter().map(Entry::Serving)).collect();
    if words.is_empty() {
        return all;
    }
    words.iter().flat_map(|word| all.iter().filter(|entry| entry.name().contains(word.as_str()))).copied().collect()
}

/// Runs the chosen rows; gives how many there were and how many failed.
pub fn main(words: &[String]) -> (usize, usize) {
    let entries = chosen(words);
    println!("\nrunning {} rows", entries.len());
    let matrix = match Fixture::up_on(&NODES, &APART) {
        Ok(fixture) => Matrix { fixture, references: RefCell::default(), table: RefCell::default() },
        Err(error) => {
            println!("the cluster did not come up: {error:#}");
            Fixture::remove();
            return (entries.len(), entries.len());
        }
    };
    let failed = entries.iter().filter(|entry| !matrix.stands(**entry)).count();
    println!("\n{}", matrix.table.borrow().markdown());
    matrix.fixture.down(failed > 0);
    (entries.len(), failed)
}

struct Matrix {
    fixture: Fixture,
    /// Digest of the undisturbed run's weights, by steps.
    references: RefCell<BTreeMap<u64, String>>,
    table: RefCell<Table>,
}

impl Matrix {
    fn stands(&self, entry: Entry) -> bool {
        match entry {
            Entry::Training(row) => self.survives(row),
            Entry::Serving(fire) => self.withstands(fire),
        }
    }

    fn survives(&self, row: &Row) -> bool {
        (0..rounds()).map(|round| self.round(row, round)).fold(true, |all, one| all & one)
    }

    fn round(&self, row: &Row, round: usize) -> bool {
        let started = Instant::now();
        let measured = guarded(|| self.measure(row, round));
        self.restore();
        // What was measured is kept also where it is not as it should be.
        let (measured, judged) = match measured {
            Ok(measured) => (measured.clone(), judge(row, &measured)),
            Err(error) => (Measured::nothing(row.name), Err(error)),
        };
        let fine = self.verdict(row.name, started, judged.as_ref().err());
        self.keep(Measured { error: judged.err().map(|error| format!("{error:#}")), ..measured });
        fine
    }

    fn measure(&self, row: &Row, round: usize) -> Result<Measured> {
        let reference = self.reference(row.shape.steps)?;
        let run = Run::start(&self.fixture, &format!("{}-{round}", row.name.replace('_', "-")), row.shape)?;
        let disturbed = (row.fault)(&run);
        let done = disturbed.and_then(|()| run.finish());
        let status = done.with_context(|| format!("events: {:#?}", run.notes("Stopping")))?;
        let measured = Measured::of(row.name, &status, run.recoveries()?, &reference);
        println!("  {}", measured.in_words());
        self.fixture.delete("vicunatraining", &run.name)?;
        Ok(measured)
    }

    /// The digest of a run of so many steps that one rank makes in peace.
    fn reference(&self, steps: u64) -> Result<String> {
        if let Some(digest) = self.references.borrow().get(&steps) {
            return Ok(digest.clone());
        }
        let name = format!("undisturbed-{steps}");
        let run = Run::start(&self.fixture, &name, rows::undisturbed(steps))?;
        let digest = run.finish()?["result"]["digest"].as_str().context("no digest of the result")?.to_owned();
        self.fixture.delete("vicunatraining", &name)?;
        self.references.borrow_mut().insert(steps, digest.clone());
        Ok(digest)
    }

    fn withstands(&self, fire: &Fire) -> bool {
        let started = Instant::now();
        let burnt = guarded(|| (fire.burn)(&self.fixture));
        self.restore();
        let fine = self.verdict(fire.name, started, burnt.as_ref().err());
        if let Ok(burnt) = burnt {
            self.table.borrow_mut().fires.push(burnt);
        }
        self.write();
        fine
    }

    fn verdict(&self, name: &str, started: Instant, error: Option<&anyhow::Error>) -> bool {
        let seconds = started.elapsed().as_secs_f64();
        match error {
            None => println!("test {name} ... ok ({seconds:.1} s)"),
            Some(error) => {
                println!("test {name} ... FAILED ({seconds:.1} s)\n{error:?}\n{}", self.fixture.evidence());
            }
        }
        error.is_none()
    }

    fn keep(&self, measured: Measured) {
        self.table.borrow_mut().rows.push(measured);
        self.write();
    }

    fn write(&self) {
        if let Err(error) = self.table.borrow().write() {
            println!("the table could not be written: {error:#}");
        }
    }

    /// Whatever a row has left: all nodes and networks are there again for the next one.
    fn restore(&self) {
        if let Err(error) = restore(&self.fixture) {
            println!("the cluster could not be restored: {error:#}");
        }
    }
}

fn rounds() -> usize {
    std::env::var("MATRIX_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(anyhow!("panicked")))
}

fn judge(row: &Row, measured: &Measured) -> Result<()> {
    ensure!(measured.equal, "weights differ from the undisturbed run's: {measured:?}");
    ensure!(row.loss == Loss::ToCheckpoint || measured.lost_steps == 0, "a completed step was lost: {measured:?}");
    ensure!(measured.application_restarts == 0, "a fault of the cluster spent a retry of the training: {measured:?}");
    Ok(())
}

fn restore(fixture: &Fixture) -> Result<()> {
    let cluster = &fixture.cluster;
    cluster.heal_s3()?;
    let running: Vec<String> = cluster.nodes().into_iter().map(|record| record.options.name).collect();
    for node in NODES {
        if !running.iter().any(|name| name == node) {
            cluster.node_add(&cluster.known_node(node))?;
            continue;
        }
        cluster.heal(node)?;
        // Fails where there is no notice.
        let _ = cluster.withdraw_notice(node);
    }
    forget(fixture)?;
    wait_until_ready(fixture)
}

/// A new operator does not avoid the nodes on which rows before have killed ranks.
fn forget(fixture: &Fixture) -> Result<()> {
    let selector = "app.kubernetes.io/component=operator";
    let words = ["delete", "pod", "--namespace", SYSTEM_NAMESPACE, "--selector", selector, "--wait=false"];
    fixture.cluster.kubectl().text(&words).map(drop)
}

fn wait_until_ready(fixture: &Fixture) -> Result<()> {
    let limit = format!("--timeout={}s", SOON.as_secs());
    let kubectl = fixture.cluster.kubectl();
    let wait = |words: &[&str]| -> Result<()> {
        let output = kubectl.command()?.arg("--request-timeout=0").args(words).arg(&limit).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    wait(&["wait", "node", "--all", "--for=condition=Ready"])?;
    for deployment in ["deployment/vicuna-operator", "deployment/vicuna-gateway"] {
        wait(&["rollout", "status", deployment, "--namespace", SYSTEM_NAMESPACE])?;
    }
    Ok(())
}
