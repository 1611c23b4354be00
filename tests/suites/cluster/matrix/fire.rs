//! Servings under fire: many streams at once while what serves them comes and goes.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use vicuna_tests::cluster::wait_for;
use vicuna_tests::product::{Answer, Chat, Objects, SYSTEM_NAMESPACE, Signal, field, signal_pod};

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
    /// Streams that failed, or whose text or number of tokens was not the undisturbed one's.
    pub wrong: Vec<String>,
}

const CLIENTS: usize = 64;
const WORKERS: u64 = 3;
const NAME: &str = "fire";
const PEACE: Duration = Duration::from_secs(20);
const OUTAGE: Duration = Duration::from_secs(15);
const NOTICE: Duration = Duration::from_secs(10);
/// The tiny tokenizer's ids of `<|endoftext|>` and `<|im_end|>`: without them an answer has its full length.
const ENDS: [u32; 2] = [0, 2];
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
            "\n**{}**: {} clients for {:.0} s; {}. {} streams with {} tokens, {} moves between workers, {} between gateways; {} wrong or failed; longest gap {:.1} s (in peace {:.1} s).\n",
            self.name.replace('_', " "),
            self.clients,
            self.seconds,
            faults.join(", "),
            self.streams,
            self.tokens,
            self.resumes,
            self.returns,
            self.wrong.len(),
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
    let chat = chat(gateways[0]);
    let references: Vec<Answer> = PROMPTS.iter().map(|words| chat.ask(words)).collect::<Result<_>>()?;
    let peace = besiege(gateways, &references, PEACE, |deadline| {
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
        Ok(Vec::new())
    })?;
    let besieged = besiege(gateways, &references, fire_seconds(), |deadline| fire(fixture, faults, deadline))?;
    fixture.delete("vicunaserving", NAME)?;
    let burnt = Burnt {
        name: name.to_owned(),
        longest_gap_in_peace_seconds: peace.longest_gap_seconds,
        wrong: [peace.wrong, besieged.wrong.clone()].concat(),
        ..besieged
    };
    println!("  {}", burnt.markdown().trim());
    ensure!(burnt.wrong.is_empty(), "{} streams were wrong: {:#?}", burnt.wrong.len(), &burnt.wrong);
    ensure!(burnt.resumes + burnt.returns as u64 > 0, "nothing was disturbed: {burnt:?}");
    Ok(burnt)
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
    references: &[Answer],
    length: Duration,
    work: impl FnOnce(Instant) -> Result<Vec<(String, usize)>>,
) -> Result<Burnt> {
    let started = Instant::now();
    let deadline = started + length;
    let seen = Mutex::new(Burnt { clients: CLIENTS, ..Burnt::default() });
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
                    let answer = ask(gateways, number);
                    note(seen, number, &answer, &references[number % PROMPTS.len()]);
                }
            });
        }
        let faults = work(deadline);
        if let Ok(mut done) = done.lock() {
            *done = true;
        }
        faults
    })?;
    let seen = seen.into_inner().map_err(|_| anyhow!("a client died"))?;
    Ok(Burnt { seconds: started.elapsed().as_secs_f64(), faults, ..seen })
}

fn note(seen: &Mutex<Burnt>, number: usize, answer: &Result<(Answer, usize)>, reference: &Answer) {
    let Ok(mut seen) = seen.lock() else { return };
    let seen = &mut *seen;
    seen.streams += 1;
    match answer {
        Err(error) => seen.wrong.push(format!("stream {number}: {error:#}")),
        Ok((answer, returns)) => {
            seen.tokens += answer.completion_tokens;
            seen.resumes += answer.resumes;
            seen.returns += returns;
            seen.longest_gap_seconds = seen.longest_gap_seconds.max(answer.longest_gap.as_secs_f64());
            let same = |a: &Answer| (a.text.clone(), a.completion_tokens, a.finish_reason.clone());
            if same(answer) != same(reference) {
                seen.wrong.push(format!("stream {number}: {:?} is not {:?}", same(answer), same(reference)));
            }
        }
    }
}

/// One stream to its end, as a client with a list of gateways reads it: where a connection breaks it goes on at the
/// next gateway after the last event that it has. Gives how often that was.
fn ask(gateways: &[SocketAddr], number: usize) -> Result<(Answer, usize)> {
    const ATTEMPTS: usize = 60;
    let words = PROMPTS[number % PROMPTS.len()];
    let (mut answer, mut returns, mut last_id) = (Answer::default(), 0, None);
    let mut last = Instant::now();
    for attempt in 0..ATTEMPTS {
        let gateway = gateways[(number / PROMPTS.len() + attempt) % gateways.len()];
        let mut stream = chat(gateway).stream_after(words, last_id.as_deref())?;
        let heard = answer.text.len();
        while let Some(event) = stream.next_event()? {
            if answer.take(event, &mut last) {
                return Ok((answer, returns));
            }
        }
        ensure!(gateways.len() > 1, "the stream broke off: {answer:?}");
        last_id = stream.last_id().map(str::to_owned);
        // What broke off in mid-stream is gone on with; what had said nothing yet is asked for anew.
        returns += usize::from(answer.text.len() > heard);
        std::thread::sleep(Duration::from_millis(250));
    }
    Err(anyhow!("no gateway went on with the stream in {ATTEMPTS} attempts: {answer:?}"))
}

fn chat(gateway: SocketAddr) -> Chat {
    Chat { max_tokens: 300, banned: ENDS.to_vec(), ..Chat::new(gateway, &format!("{NAMESPACE}/{NAME}")) }
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
    let model = format!("{NAMESPACE}/{NAME}");
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
