//! The faults: what is done to a training while it runs.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vicuna_tests::cluster::{Outage, wait_for};
use vicuna_tests::product::{SYSTEM_NAMESPACE, Signal, signal_pod};

use super::run::{PATIENCE, Rank, Run, Shape, lease_holder, operators};
use crate::fixture::{Fixture, NAMESPACE};

/// What may be lost of the steps that all ranks have made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    None,
    /// Every holder of some block is gone at once: the newest checkpoint is gone back to.
    ToCheckpoint,
}

pub struct Row {
    pub name: &'static str,
    pub shape: Shape,
    pub loss: Loss,
    pub fault: fn(&Run) -> Result<()>,
}

const SHORT: u64 = 400;
/// For outages of half a minute.
const MEDIUM: u64 = 800;
/// For faults that take minutes.
const LONG: u64 = 2000;
/// For nodes that boot again several times.
const LONGEST: u64 = 8000;
const TWO: Shape =
    Shape { steps: SHORT, min: 1, max: 2, notice_seconds: 10, fallback: true, nodes: &[], interval_seconds: 10 };
const THREE: Shape = Shape { max: 3, ..TWO };

pub const ROWS: &[Row] = &[
    row("notice_of_30_s", Shape { notice_seconds: 30, steps: MEDIUM, ..TWO }, notice),
    row("notice_of_120_s", Shape { notice_seconds: 120, steps: LONGEST, ..TWO }, notice),
    row("notice_of_5_s", Shape { notice_seconds: 5, ..TWO }, notice),
    // No other node may take the rank's place meanwhile.
    row("notice_taken_back", Shape { steps: LONG, notice_seconds: 30, nodes: &SPOT, ..TWO }, notice_taken_back),
    row("pod_deleted", TWO, pod_deleted),
    row("rank_killed", TWO, rank_killed),
    row("rank_stopped", TWO, rank_stopped),
    row("node_gone", TWO, node_gone),
    Row { loss: Loss::ToCheckpoint, ..row("two_nodes_gone", THREE, spot_nodes_gone) },
    Row {
        loss: Loss::ToCheckpoint,
        ..row("all_nodes_gone", Shape { fallback: false, ..TWO }, spot_nodes_gone_and_back)
    },
    row("network_cut_to_a_rank", TWO, network_cut_to_a_rank),
    row("network_cut_to_the_operator", Shape { steps: MEDIUM, ..TWO }, network_cut_to_the_operator),
    row("network_cut_to_the_store", Shape { steps: MEDIUM, interval_seconds: 5, ..TWO }, network_cut_to_the_store),
    row("operator_killed_in_a_change", TWO, operator_killed_in_a_change),
    row("leader_partitioned", Shape { steps: MEDIUM, ..TWO }, leader_partitioned),
    row("store_down_in_an_emergency", Shape { min: 2, nodes: &SPOT, ..TWO }, store_down_in_an_emergency),
    row("node_comes_and_goes", Shape { steps: LONGEST, nodes: &["spot-1", "onprem-1"], ..TWO }, node_comes_and_goes),
    row("ten_reclaims", Shape { steps: LONGEST, notice_seconds: 5, ..TWO }, ten_reclaims),
    row(
        "return_to_the_first_pool",
        Shape { steps: LONG, max: 1, nodes: &["spot-1", "onprem-1"], ..TWO },
        return_to_the_first_pool,
    ),
];

/// One rank on the node that nothing befalls.
pub fn undisturbed(steps: u64) -> Shape {
    Shape { steps, max: 1, nodes: &["onprem-1"], ..TWO }
}

const fn row(name: &'static str, shape: Shape, fault: fn(&Run) -> Result<()>) -> Row {
    Row { name, shape, loss: Loss::None, fault }
}

fn notice(run: &Run) -> Result<()> {
    reclaim(run, &run.victim()?.node, Duration::from_secs(run.shape.notice_seconds))
}

/// The node is announced to go, goes, and steps are made again before that or after.
fn reclaim(run: &Run, node: &str, notice: Duration) -> Result<()> {
    let before = run.recoveries()?.len();
    run.fixture.cluster.reclaim(node, notice)?;
    run.wait_for_recovery(before)
}

/// Before the rank is due to leave nothing changes; after it has left it comes back. The same process trains on.
fn notice_taken_back(run: &Run) -> Result<()> {
    let cluster = &run.fixture.cluster;
    let (victim, generation) = (run.victim()?, run.generation()?);
    let notice = || cluster.notice(&victim.node, Duration::from_secs(run.shape.notice_seconds));
    notice()?;
    wait_for("the operator to hear of the notice", PATIENCE, || Ok(run.notes("Noticed")?.first().map(drop)))?;
    cluster.withdraw_notice(&victim.node)?;
    run.wait_for_progress()?;
    ensure!(run.generation()? == generation, "ranks were stopped although the notice was taken back");
    let before = run.recoveries()?.len();
    notice()?;
    run.wait_for_recovery(before)?;
    cluster.withdraw_notice(&victim.node)?;
    run.wait_for_ranks(run.shape.max)?;
    ensure!(
        run.ranks()?.iter().any(|rank| rank.uid == victim.uid),
        "{} was replaced although its node stayed",
        victim.pod
    );
    let status = run.status()?;
    let reclaims = status["disruptions"]["reclaims"].as_u64().unwrap_or(0);
    ensure!(reclaims == 0, "a reclaim was counted although the node stayed: {:#}", status["disruptions"]);
    Ok(())
}

fn pod_deleted(run: &Run) -> Result<()> {
    let (victim, before) = (run.victim()?, run.recoveries()?.len());
    let words = ["delete", "pod", &victim.pod, "--namespace", NAMESPACE, "--wait=false"];
    run.fixture.cluster.kubectl().text(&words)?;
    run.wait_for_recovery(before)
}

pub fn rank_killed(run: &Run) -> Result<()> {
    signalled(run, Signal::Kill)
}

/// It keeps its connections and answers nobody: only the watchdog sees it.
fn rank_stopped(run: &Run) -> Result<()> {
    signalled(run, Signal::Stop)
}

fn signalled(run: &Run, signal: Signal) -> Result<()> {
    let before = run.recoveries()?.len();
    signal_pod(&run.victim()?.uid, signal)?;
    run.wait_for_recovery(before)
}

/// As in a power cut: the Node object stays.
fn node_gone(run: &Run) -> Result<()> {
    let before = run.recoveries()?.len();
    run.fixture.cluster.kill(&run.victim()?.node, false)?;
    run.wait_for_recovery(before)
}

fn spot_nodes_gone(run: &Run) -> Result<()> {
    let before = run.recoveries()?.len();
    after_a_checkpoint(run)?;
    for node in SPOT {
        run.fixture.cluster.kill(node, true)?;
    }
    run.wait_for_recovery(before)
}

fn spot_nodes_gone_and_back(run: &Run) -> Result<()> {
    let before = run.recoveries()?.len();
    after_a_checkpoint(run)?;
    for node in SPOT {
        run.fixture.cluster.kill(node, true)?;
    }
    for node in SPOT {
        run.fixture.cluster.node_add(&run.fixture.cluster.known_node(node))?;
    }
    run.wait_for_recovery(before)
}

const SPOT: [&str; 2] = ["spot-1", "spot-2"];

fn after_a_checkpoint(run: &Run) -> Result<()> {
    wait_for(&format!("a checkpoint of {}", run.name), PATIENCE, || {
        Ok(run.status()?["checkpoint"]["step"].is_u64().then_some(()))
    })?;
    run.must_run()
}

/// The pod alone: its node stays ready.
fn network_cut_to_a_rank(run: &Run) -> Result<()> {
    let (victim, before) = (run.victim()?, run.recoveries()?.len());
    cut_pod_while(run.fixture, &victim, || run.wait_for_recovery(before))
}

fn cut_pod_while(fixture: &Fixture, pod: &Rank, work: impl FnOnce() -> Result<()>) -> Result<()> {
    fixture.cluster.cut_pod(&pod.address)?;
    let done = work();
    fixture.cluster.heal_pod(&pod.address)?;
    done
}

/// Longer than the hold of its lease, so that it is no leader for a while; ranks train on.
fn network_cut_to_the_operator(run: &Run) -> Result<()> {
    let leader = leader(run.fixture)?;
    cut_pod_while(run.fixture, &leader, || {
        std::thread::sleep(Duration::from_secs(25));
        Ok(())
    })?;
    run.wait_for_progress()?;
    run.must_run()
}

fn network_cut_to_the_store(run: &Run) -> Result<()> {
    after_a_checkpoint(run)?;
    run.fixture.cluster.cut_s3(Outage::Silent)?;
    std::thread::sleep(Duration::from_secs(30));
    let trained = run.wait_for_progress();
    run.fixture.cluster.heal_s3()?;
    trained
}

/// In the moment in which it has told the ranks to stop.
fn operator_killed_in_a_change(run: &Run) -> Result<()> {
    let (leader, victim) = (leader(run.fixture)?, run.victim()?);
    let before = run.recoveries()?.len();
    let mut command = run.fixture.cluster.kubectl().command()?;
    command.args([
        "logs",
        "--request-timeout=0",
        "--follow",
        "--since=1s",
        "--namespace",
        SYSTEM_NAMESPACE,
        &leader.pod,
    ]);
    let mut logs = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let lines = BufReader::new(logs.stdout.take().context("kubectl has no output")?).lines();
    let deadline = run.fixture.cluster.notice(&victim.node, Duration::from_secs(run.shape.notice_seconds))?;
    let stopping = lines.map_while(Result::ok).find(|line| line.contains("\"Stopping\"") && line.contains(&run.name));
    let killed = signal_pod(&leader.uid, Signal::Kill);
    let _ = logs.kill();
    let _ = logs.wait();
    killed?;
    stopping.context("the operator's log ended before it stopped a generation")?;
    std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
    run.fixture.cluster.kill(&victim.node, true)?;
    run.wait_for_recovery(before)
}

/// The first leader lives on without a network; the second one has to replace a rank that dies.
fn leader_partitioned(run: &Run) -> Result<()> {
    scale_operator(run.fixture, 2)?;
    let old = leader(run.fixture)?;
    let before = run.recoveries()?.len();
    let taken = cut_pod_while(run.fixture, &old, || {
        wait_for("another leader", PATIENCE, || {
            Ok((!lease_holder(run.fixture)?.starts_with(&format!("{}_", old.pod))).then_some(()))
        })?;
        // A recovery is measured from a step that this leader has heard of.
        run.wait_for_progress()?;
        signal_pod(&run.victim()?.uid, Signal::Kill)?;
        run.wait_for_recovery(before)
    });
    let scaled = scale_operator(run.fixture, 1);
    taken.and(scaled)
}

fn scale_operator(fixture: &Fixture, replicas: usize) -> Result<()> {
    let count = format!("--replicas={replicas}");
    let words = ["scale", "deployment/vicuna-operator", "--namespace", SYSTEM_NAMESPACE, &count];
    fixture.cluster.kubectl().text(&words)?;
    wait_for(&format!("{replicas} operators"), PATIENCE, || {
        let pods = operators(fixture)?;
        let holder = lease_holder(fixture)?;
        let led = pods.first().is_some_and(|pod| holder.starts_with(&format!("{}_", pod.pod)));
        Ok((pods.len() == replicas && led).then_some(()))
    })
}

fn leader(fixture: &Fixture) -> Result<Rank> {
    operators(fixture)?.into_iter().next().context("no operator runs")
}

/// Fewer than `min` will remain, and there is nowhere to write to: the one that stays keeps the state.
fn store_down_in_an_emergency(run: &Run) -> Result<()> {
    after_a_checkpoint(run)?;
    let (cluster, victim) = (&run.fixture.cluster, run.victim()?);
    let before = run.recoveries()?.len();
    cluster.cut_s3(Outage::Refused)?;
    let gone = cluster.reclaim(&victim.node, Duration::from_secs(run.shape.notice_seconds));
    let back = gone.and_then(|()| cluster.node_add(&cluster.known_node(&victim.node)));
    cluster.heal_s3()?;
    back?;
    run.wait_for_recovery(before)
}

/// As often as the machine boots a node, which takes it less than a minute.
fn node_comes_and_goes(run: &Run) -> Result<()> {
    let cluster = &run.fixture.cluster;
    for _ in 0..4 {
        let before = run.recoveries()?.len();
        cluster.kill("spot-1", true)?;
        run.wait_for_recovery(before)?;
        cluster.node_add(&cluster.known_node("spot-1"))?;
        run.wait_for_ranks(run.shape.max)?;
    }
    Ok(())
}

/// Each time the node that holds a rank goes, with 5 s of its notice left, and comes back.
fn ten_reclaims(run: &Run) -> Result<()> {
    let cluster = &run.fixture.cluster;
    for _ in 0..10 {
        let victim = run.victim()?;
        reclaim(run, &victim.node, Duration::from_secs(5))?;
        cluster.node_add(&cluster.known_node(&victim.node))?;
        run.wait_for_ranks(run.shape.max)?;
    }
    Ok(())
}

fn return_to_the_first_pool(run: &Run) -> Result<()> {
    let [first, second] = run.shape.nodes else { unreachable!("the row names two nodes") };
    let cluster = &run.fixture.cluster;
    reclaim(run, first, Duration::from_secs(run.shape.notice_seconds))?;
    trains_on(run, second)?;
    cluster.node_add(&cluster.known_node(first))?;
    trains_on(run, first)?;
    run.must_run()
}

fn trains_on(run: &Run, node: &str) -> Result<()> {
    let pools = || Ok::<_, anyhow::Error>(run.status()?["membership"]["pools"].clone());
    wait_for(&format!("{} on {node}", run.name), PATIENCE, || Ok((pools()?[node] == 1).then_some(())))
}
