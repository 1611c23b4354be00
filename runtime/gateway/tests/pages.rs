//! The pages in a real browser, which `tests/tools/browser.sh` installs what drives it for, and what they are made
//! of, which `tests/tools/ui.sh` checks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{TestGateway, Worker, gateway};
use tokio::process::Command;
use tokio::time::{Instant, interval};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Draining, Generate, Load, Progress};

const ANSWER: &str = "This is a **red-breasted goose**, or *Branta ruficollis*. It can run `nothing`, not even \
<script>alert(1)</script> or <img src=x>.\n\n| what | value |\n|---|---|\n| length | 55 cm |\n| wingspan | 125 cm |\n\n\
1. It breeds in the Arctic.\n2. It winters at the Black Sea.\n\n```python\nfor bird in flock:\n    print(bird.name)\n```\n\nThat is all.";
const TICK: Duration = Duration::from_millis(12);
/// A prompt is long enough for the gateway to say how far it is read.
const READING: Duration = Duration::from_millis(1700);

#[tokio::test]
async fn one_chats_in_branches_and_sees_what_an_answer_waits_for() {
    use_page("chat").await;
}

#[tokio::test]
async fn models_are_compared_side_by_side_by_a_link_that_can_be_shared() {
    use_page("compare").await;
}

#[tokio::test]
async fn one_votes_in_the_arena_before_one_learns_the_names() {
    use_page("arena").await;
}

#[tokio::test]
async fn one_sees_workers_come_drain_and_go_as_it_happens() {
    use_page("live").await;
}

#[tokio::test]
async fn a_page_asks_for_the_key_where_the_gateway_does() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    let digest = hex::encode(Sha256::digest("sk-team"));
    std::fs::write(&keys, json!({ "keys": [{ "name": "team", "sha256": digest }] }).to_string()).unwrap();
    use_page_of("key", &["--api-keys-file", keys.to_str().unwrap()]).await;
}

#[tokio::test]
async fn what_is_served_is_what_the_sources_give_and_their_types_are_right() {
    let script = repository().join("tests/tools/ui.sh");
    let output = Command::new(script).arg("check").output().await.unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Says so where it is not installed.
fn playwright() -> Option<PathBuf> {
    let value = |name: &str| std::env::var(name).ok();
    let folder = value("VICUNA_CACHE").zip(value("PLAYWRIGHT_VERSION"));
    let folder = folder.map(|(cache, version)| PathBuf::from(cache).join(format!("playwright-{version}")));
    let folder = folder.filter(|folder| folder.exists());
    if folder.is_none() {
        eprintln!("skipped: Playwright is not installed, run tests/tools/browser.sh");
    }
    folder
}

async fn use_page(name: &str) {
    use_page_of(name, &[]).await;
}

async fn use_page_of(name: &str, flags: &[&str]) {
    let Some(playwright) = playwright() else {
        return;
    };
    let gateway = gateway(flags).await;
    let shots = repository().join("target/pages");
    let mut browser = Command::new("python3")
        .env("PYTHONPATH", playwright)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(repository().join("tests/browser/pages.py"))
        .args([name, &gateway.url("/")])
        .arg(&shots)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    tokio::select! {
        status = browser.wait() => assert!(status.unwrap().success(), "see above; screenshots are in {}", shots.display()),
        () = play(&gateway) => unreachable!("workers are replaced for ever"),
    }
}

/// Four workers in three places, and one that comes when its model is asked for.
async fn play(gateway: &TestGateway) {
    gateway.running.gateway.registry.expect(&["team/cold".to_owned()]);
    tokio::join!(
        actor(gateway, Role { model: "team/alpha", names: "alpha", first: 0, place: ("spot-1", "cheap", "Spot") }),
        actor(gateway, Role { model: "team/alpha", names: "alpha", first: 1, place: ("big-7", "steady", "OnDemand") }),
        actor(gateway, Role { model: "team/beta", names: "beta", first: 0, place: ("", "", "External") }),
        async {
            while gateway.running.gateway.loads.demand("team/cold").queued == 0 {
                tokio::time::sleep(TICK).await;
            }
            // For the gateway to say that it is being loaded.
            tokio::time::sleep(READING).await;
            actor(gateway, Role { model: "team/cold", names: "cold", first: 0, place: ("rack-3", "own", "OnPrem") })
                .await;
        },
    );
}

struct Role {
    model: &'static str,
    names: &'static str,
    first: u32,
    place: (&'static str, &'static str, &'static str),
}

/// One worker after the other: each plays until it dies or has drained.
async fn actor(gateway: &TestGateway, role: Role) {
    let mut number = role.first;
    loop {
        let change = |hello: &mut vicuna_protocol::inference::WorkerHello| {
            let (node, pool, capacity) = role.place;
            hello.models[0].name = role.model.into();
            hello.models[0].max_length = 4096;
            (hello.node, hello.pool, hello.capacity) = (node.into(), pool.into(), capacity.into());
        };
        let mut worker = gateway.worker_with(&format!("{}-{number}", role.names), change).await;
        act(&mut worker).await;
        number += 2;
        drop(worker);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// An answer that is being written.
struct Part {
    generate: Generate,
    words: Vec<&'static str>,
    position: usize,
    begins: Instant,
    /// The worker dies halfway.
    fatal: bool,
}

async fn act(worker: &mut Worker) {
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    let mut ticks = interval(TICK);
    let mut draining = false;
    loop {
        tokio::select! {
            message = worker.next() => match message.unwrap() {
                FromGateway::Generate(generate) => {
                    let part = begin(worker, generate).await;
                    if part.generate.messages.last().is_some_and(|message| message.content.contains("drain")) {
                        worker.send(FromWorker::Draining(Draining { deadline_ms: 20_000 })).await;
                        draining = true;
                    }
                    parts.insert(part.generate.request.clone(), part);
                }
                FromGateway::Cancel(cancel) => drop(parts.remove(&cancel.request)),
                _ => {}
            },
            _ = ticks.tick() => {
                for part in parts.values_mut() {
                    if speak(worker, part).await {
                        return;
                    }
                }
                parts.retain(|_, part| part.position <= part.words.len());
                report(worker, parts.len());
                if draining && parts.is_empty() {
                    return;
                }
            }
        }
    }
}

async fn begin(worker: &Worker, generate: Generate) -> Part {
    let asked = generate.messages.last().map_or("", |message| message.content.as_str());
    let times = if asked.contains("long") { 6 } else { 1 };
    let fatal = asked.contains("move") && generate.generated.is_empty();
    let mut begins = Instant::now() + Duration::from_millis(150);
    if asked.contains("read") {
        begins = Instant::now() + READING;
        let (request, choice) = (generate.request.clone(), generate.choice);
        worker.send(FromWorker::Progress(Progress { request, choice, computed: 512, all: 2048 })).await;
    }
    let words: Vec<_> = ANSWER.split_inclusive(' ').collect();
    Part { words: words.repeat(times), position: generate.generated.len(), generate, begins, fatal }
}

/// Says the next word; tells whether it was its last.
async fn speak(worker: &Worker, part: &mut Part) -> bool {
    if Instant::now() < part.begins {
        return false;
    }
    match part.words.get(part.position) {
        Some(word) => worker.say(&part.generate, part.position, word).await,
        None => worker.done(&part.generate, part.position as u32).await,
    }
    part.position += 1;
    part.fatal && part.position > part.words.len() / 2
}

fn report(worker: &Worker, running: usize) {
    let used = 400 + 700 * running as u64;
    *worker.load.lock() = Load {
        running: running as u32,
        waiting: 0,
        slots: 4,
        tokens_per_second: running as f64 / TICK.as_secs_f64(),
        kv_tokens: 4096,
        kv_tokens_free: 4096 - used.min(4096),
    };
}
