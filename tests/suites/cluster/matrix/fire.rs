//! Servings under fire: many streams at once while what serves them comes and goes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use vicuna_tests::cluster::wait_for;
use vicuna_tests::product::{
    Asked, Chat, Chunk, Forced, Objects, References, Reply, SYSTEM_NAMESPACE, Signal, VARIANTS, Variant, field, force,
    signal_pod,
};

use super::run::PATIENCE;
use crate::bad_input::set;
use crate::fixture::{Fixture, NAMESPACE, serving};

pub struct Fire {
    pub name: &'static str,
    pub burn: fn(&Fixture) -> Result<Burnt>,
}

pub const FIRES: &[Fire] = &[
    Fire { name: "streams_under_fire", burn: workers_under_fire },
    Fire { name: "streams_and_lost_gateways", burn: gateways_under_fire },
];

/// What the clients saw.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Burnt {
    pub name: String,
    pub clients: usize,
    pub seconds: f64,
    /// What was done, and how often.
    pub faults: Vec<(String, usize)>,
    pub streams: usize,
    pub tokens: u64,
    /// Moves of streams from a worker to another.
    pub resumes: u64,
    /// Streams that a client went on with at another gateway.
    pub returns: usize,
    pub longest_gap_seconds: f64,
    /// The same without a fault, with as many clients.
    pub longest_gap_in_peace_seconds: f64,
    /// What a teacher says of the greedy ones.
    pub forced: Forced,
    /// Streams that failed, or were not the undisturbed one's token for token, or that a teacher finds fault with.
    pub wrong: Vec<String>,
}

/// Greedy answers that were delivered, each once, by what was asked.
type Delivered = HashMap<(String, Vec<String>), Reply>;

const CLIENTS: usize = 64;
const WORKERS: u64 = 3;
const NAME: &str = "fire";
const PEACE: Duration = Duration::from_secs(20);
const OUTAGE: Duration = Duration::from_secs(15);
const NOTICE: Duration = Duration::from_secs(10);
const PROMPTS: [&str; 8] = [
    "Tell me about yourself.",
    "Who made you?",
    "What is a vicuna?",
    "Count to ten.",
    "Name a colour.",
    "Why is the sky blue?",
    "Write a short poem.",
    "What can you do?",
];

impl Burnt {
    pub fn markdown(&self) -> String {
        let faults: Vec<String> = self.faults.iter().map(|(fault, times)| format!("{fault} {times}×")).collect();
        format!(
            "\n**{}**: {} clients for {:.0} s; {}. {} streams with {} tokens, {} moves between workers, {} between gateways; {} wrong or failed; of {} greedy answers a teacher found {} tokens the likeliest and {} tied; longest gap {:.1} s (in peace {:.1} s).\n",
            self.name.replace('_', " "),
            self.clients,
            self.seconds,
            faults.join(", "),
            self.streams,
            self.tokens,
            self.resumes,
            self.returns,
            self.wrong.len(),
            self.forced.answers,
            self.forced.likeliest,
            self.forced.ties,
            self.longest_gap_seconds,
            self.longest_gap_in_peace_seconds,
        )
    }
}

fn workers_under_fire(fixture: &Fixture) -> Result<Burnt> {
    let faults: &[Fault] = &[
        ("notice", drained),
        ("pod deleted", deleted),
        ("killed", killed),
        ("stopped", stopped),
        ("pod cut off", pod_cut_off),
        ("node cut off", node_cut_off),
    ];
    burn(fixture, "streams_under_fire", &[fixture.gateway], faults)
}

/// A client knows two gateways; one of them dies now and then, without a word.
fn gateways_under_fire(fixture: &Fixture) -> Result<Burnt> {
    scale_gateways(fixture, 2)?;
    let gateways: Result<Vec<SocketAddr>> = pods(fixture, SYSTEM_NAMESPACE, GATEWAYS)?
        .iter()
        .map(|pod| fixture.cluster.forward(SocketAddr::new(pod.address.parse()?, 8080)))
        .collect();
    let burnt = gateways.and_then(|gateways| {
        let faults: &[Fault] = &[("gateway killed", gateway_killed), ("worker killed", killed)];
        burn(fixture, "streams_and_lost_gateways", &gateways, faults)
    });
    scale_gateways(fixture, 1)?;
    burnt
}

type Fault = (&'static str, fn(&Fixture, usize) -> Result<()>);

fn burn(fixture: &Fixture, name: &str, gateways: &[SocketAddr], faults: &[Fault]) -> Result<Burnt> {
    let _ = fixture.delete("vicunaserving", NAME);
    fixture.apply(&object()?)?;
    ready(fixture, gateways)?;
    let references = References::ask(gateways[0], &model(), &PROMPTS)?;
    let (peace, _) = besiege(gateways, &references, PEACE, |deadline| {
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
        Ok(Vec::new())
    })?;
    let (besieged, delivered) =
        besiege(gateways, &references, fire_seconds(), |deadline| fire(fixture, faults, deadline))?;
    let (forced, mistaken) = teach(gateways[0], &delivered);
    fixture.delete("vicunaserving", NAME)?;
    let burnt = Burnt {
        name: name.to_owned(),
        longest_gap_in_peace_seconds: peace.longest_gap_seconds,
        forced,
        wrong: [peace.wrong, besieged.wrong.clone(), mistaken].concat(),
        ..besieged
    };
    println!("  {}", burnt.markdown().trim());
    ensure!(burnt.wrong.is_empty(), "{} streams were wrong: {:#?}", burnt.wrong.len(), &burnt.wrong);
    ensure!(burnt.resumes + burnt.returns as u64 > 0, "nothing was disturbed: {burnt:?}");
    ensure!(burnt.forced.answers > 0, "no greedy answer was there to check: {burnt:?}");
    Ok(burnt)
}

/// Each greedy answer is what the model would have said; the rest is why not.
fn teach(gateway: SocketAddr, delivered: &Delivered) -> (Forced, Vec<String>) {
    let (mut forced, mut mistaken) = (Forced::default(), Vec::new());
    for ((words, _), reply) in delivered {
        match force(gateway, &model(), words, reply) {
            Ok(one) => forced.add(one),
            Err(error) => mistaken.push(format!("the teacher on {words:?}: {error:#}")),
        }
    }
    (forced, mistaken)
}

fn fire_seconds() -> Duration {
    let told = std::env::var("FIRE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(told.unwrap_or(120))
}

/// Fault after fault, each when the workers are all there again.
fn fire(fixture: &Fixture, faults: &[Fault], deadline: Instant) -> Result<Vec<(String, usize)>> {
    let mut times = vec![0; faults.len()];
    for round in 0.. {
        if Instant::now() >= deadline {
            break;
        }
        let (name, fault) = faults[round % faults.len()];
        fault(fixture, round).with_context(|| name.to_owned())?;
        all_ready(fixture).with_context(|| format!("after {name}"))?;
        times[round % faults.len()] += 1;
    }
    Ok(faults.iter().map(|(name, _)| (*name).to_owned()).zip(times).collect())
}

/// Clients ask on and on until the deadline, and end what they have begun, while `work` is done.
fn besiege(
    gateways: &[SocketAddr],
    references: &References,
    length: Duration,
    work: impl FnOnce(Instant) -> Result<Vec<(String, usize)>>,
) -> Result<(Burnt, Delivered)> {
    let started = Instant::now();
    let deadline = started + length;
    let seen = Mutex::new((Burnt { clients: CLIENTS, ..Burnt::default() }, Delivered::default()));
    let done = Mutex::new(false);
    let asks_on = || Instant::now() < deadline || !done.lock().is_ok_and(|done| *done);
    let faults = std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (seen, asks_on) = (&seen, &asks_on);
            scope.spawn(move || {
                for number in client.. {
                    if !asks_on() {
                        break;
                    }
                    let (asked, reference) = references.get(number);
                    note(seen, asked, reference, ask(gateways, asked, number));
                }
            });
        }
        let faults = work(deadline);
        if let Ok(mut done) = done.lock() {
            *done = true;
        }
        faults
    })?;
    let (seen, delivered) = seen.into_inner().map_err(|_| anyhow!("a client died"))?;
    Ok((Burnt { seconds: started.elapsed().as_secs_f64(), faults, ..seen }, delivered))
}

fn note(seen: &Mutex<(Burnt, Delivered)>, asked: &Asked, reference: &Reply, answer: Result<(Reply, usize)>) {
    let Ok(mut seen) = seen.lock() else { return };
    let (seen, delivered) = &mut *seen;
    seen.streams += 1;
    match answer {
        Err(error) => seen.wrong.push(format!("{:?} of {:?}: {error:#}", asked.variant, asked.words)),
        Ok((reply, returns)) => {
            seen.tokens += reply.completion_tokens;
            seen.resumes += reply.resumes;
            seen.returns += returns;
            seen.longest_gap_seconds = seen.longest_gap_seconds.max(reply.longest_gap.as_secs_f64());
            if let Some(difference) = reply.difference(reference) {
                seen.wrong.push(format!("{:?} of {:?}: {difference}", asked.variant, asked.words));
            }
            if asked.variant == Variant::Scored {
                let names = reply.choices.values().flat_map(|choice| &choice.tokens).map(|(name, _)| name.clone());
                delivered.insert((asked.words.clone(), names.collect()), reply);
            }
        }
    }
}

/// One stream to its end, as a client with a list of gateways reads it: where a connection breaks, or a gateway says
/// that it shuts down, it goes on at the next gateway after the last event that it has. Gives how often that was. Any
/// other error is the stream's end.
fn ask(gateways: &[SocketAddr], asked: &Asked, number: usize) -> Result<(Reply, usize)> {
    const ATTEMPTS: usize = 60;
    let (mut reply, mut returns, mut last_id) = (Reply::default(), 0, None);
    let mut last = Instant::now();
    for attempt in 0..ATTEMPTS {
        let gateway = gateways[(number / VARIANTS.len() + attempt) % gateways.len()];
        let mut stream = asked.stream(gateway, last_id.as_deref())?;
        let heard = reply.letters();
        let broken = loop {
            let Some(chunk) = stream.next_chunk()? else { break anyhow!("the stream broke off") };
            let shuts_down = matches!(&chunk, Chunk::Data(data) if data["error"]["code"] == "shutting_down");
            match reply.take(chunk, &mut last) {
                Ok(true) => return Ok((reply, returns)),
                Ok(false) => {}
                Err(error) if shuts_down => break error,
                Err(error) => return Err(error.context(format!("after {reply:?}"))),
            }
        };
        ensure!(gateways.len() > 1, "{broken}: {reply:?}");
        last_id = stream.last_id().map(str::to_owned);
        // What broke off in mid-stream is gone on with; what had said nothing yet is asked for anew.
        returns += usize::from(reply.letters() > heard);
        std::thread::sleep(Duration::from_millis(250));
    }
    Err(anyhow!("no gateway went on with the stream in {ATTEMPTS} attempts: {reply:?}"))
}

fn model() -> String {
    format!("{NAMESPACE}/{NAME}")
}

fn object() -> Result<Value> {
    let mut object = serving(NAME, "s3://vicuna/models/tiny");
    set(&mut object, "/spec/replicas", json!(WORKERS))?;
    set(&mut object, "/spec/worker/slots", json!(64))?;
    object["spec"]["drain"] = json!({"timeout": "5s"});
    object["spec"]["pools"] = json!([
        {"name": "spot", "capacity": "Spot", "nodeSelector": {"vicuna.dev/capacity": "spot"}, "notice": "10s", "max": 2},
        {"name": "on-prem", "capacity": "OnPrem", "nodeSelector": {"vicuna.dev/capacity": "on-prem"}},
    ]);
    Ok(object)
}

fn ready(fixture: &Fixture, gateways: &[SocketAddr]) -> Result<()> {
    all_ready(fixture)?;
    let model = model();
    wait_for("the model at the gateways", PATIENCE, || {
        let mut all = true;
        for gateway in gateways {
            all &= Chat::models(*gateway)?.contains(&model);
        }
        Ok(all.then_some(()))
    })
}

fn all_ready(fixture: &Fixture) -> Result<()> {
    let all = |vs: &Value| field(vs, "status.replicas.ready") == WORKERS && Objects::condition(vs, "Ready", "True");
    fixture.objects.wait("vicunaserving", NAME, PATIENCE, all).map(drop)
}

#[derive(Debug, Clone)]
struct Pod {
    name: String,
    uid: String,
    node: String,
    address: String,
}

const GATEWAYS: &str = "app.kubernetes.io/component=gateway";

fn pods(fixture: &Fixture, namespace: &str, selector: &str) -> Result<Vec<Pod>> {
    let words = ["get", "pods", "--namespace", namespace, "--selector", selector, "--output", "json"];
    let listed: Value = serde_json::from_str(&fixture.cluster.kubectl().text(&words)?)?;
    let text = |pod: &Value, path: &str| field(pod, path).as_str().map(str::to_owned);
    let pod = |pod: &Value| {
        let runs = field(pod, "status.phase") == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
        runs.then_some(())?;
        Some(Pod {
            name: text(pod, "metadata.name")?,
            uid: text(pod, "metadata.uid")?,
            node: text(pod, "spec.nodeName")?,
            address: text(pod, "status.podIP")?,
        })
    };
    Ok(listed["items"].as_array().into_iter().flatten().filter_map(pod).collect())
}

/// One of the workers on spot nodes, in turn.
fn victim(fixture: &Fixture, round: usize) -> Result<Pod> {
    let mut all = pods(fixture, NAMESPACE, &format!("vicuna.dev/serving={NAME}"))?;
    all.retain(|pod| pod.node.starts_with("spot-"));
    ensure!(!all.is_empty(), "no worker of {NAME} is on a spot node");
    Ok(all.swap_remove(round % all.len()))
}

fn drained(fixture: &Fixture, round: usize) -> Result<()> {
    let node = victim(fixture, round)?.node;
    fixture.cluster.reclaim(&node, NOTICE)?;
    fixture.cluster.node_add(&fixture.cluster.known_node(&node))
}

fn deleted(fixture: &Fixture, round: usize) -> Result<()> {
    let pod = victim(fixture, round)?.name;
    let words = ["delete", "pod", &pod, "--namespace", NAMESPACE, "--wait=false"];
    fixture.cluster.kubectl().text(&words)?;
    gone(fixture, &pod)
}

/// Until the operator has seen it too: ready workers are counted only then.
fn gone(fixture: &Fixture, pod: &str) -> Result<()> {
    wait_for(&format!("the end of {pod}"), PATIENCE, || {
        let all = pods(fixture, NAMESPACE, &format!("vicuna.dev/serving={NAME}"))?;
        Ok(all.iter().all(|other| other.name != pod).then_some(()))
    })
}

fn killed(fixture: &Fixture, round: usize) -> Result<()> {
    signal_pod(&victim(fixture, round)?.uid, Signal::Kill)?;
    pause();
    Ok(())
}

/// Long enough for the gateway to take its streams elsewhere; then it wakes up and has missed that.
fn stopped(fixture: &Fixture, round: usize) -> Result<()> {
    let uid = victim(fixture, round)?.uid;
    signal_pod(&uid, Signal::Stop)?;
    pause();
    signal_pod(&uid, Signal::Continue)
}

fn pod_cut_off(fixture: &Fixture, round: usize) -> Result<()> {
    let address = victim(fixture, round)?.address;
    fixture.cluster.cut_pod(&address)?;
    pause();
    fixture.cluster.heal_pod(&address)
}

/// Until its worker has been replaced.
fn node_cut_off(fixture: &Fixture, round: usize) -> Result<()> {
    let victim = victim(fixture, round)?;
    fixture.cluster.cut(&victim.node)?;
    let replaced = gone(fixture, &victim.name).and_then(|()| all_ready(fixture));
    fixture.cluster.heal(&victim.node)?;
    replaced
}

fn gateway_killed(fixture: &Fixture, round: usize) -> Result<()> {
    let all = pods(fixture, SYSTEM_NAMESPACE, GATEWAYS)?;
    signal_pod(&all.get(round / 2 % all.len().max(1)).context("no gateway runs")?.uid, Signal::Kill)?;
    pause();
    scale_gateways(fixture, 2)
}

fn pause() {
    std::thread::sleep(OUTAGE);
}

fn scale_gateways(fixture: &Fixture, replicas: usize) -> Result<()> {
    let count = format!("--replicas={replicas}");
    let words = ["scale", "deployment/vicuna-gateway", "--namespace", SYSTEM_NAMESPACE, &count];
    fixture.cluster.kubectl().text(&words)?;
    wait_for(&format!("{replicas} gateways"), PATIENCE, || {
        let words = ["get", "deployment", "vicuna-gateway", "--namespace", SYSTEM_NAMESPACE, "--output", "json"];
        let deployment: Value = serde_json::from_str(&fixture.cluster.kubectl().text(&words)?)?;
        Ok((field(&deployment, "status.readyReplicas") == replicas).then_some(()))
    })
}
