//! The second promise: no token is lost or repeated when a worker goes.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use vicuna_tests::cluster::{repository, wait_for};
use vicuna_tests::product::{Answer, Chat, Objects, StreamEvent, Workers, field};

use crate::fixture::{Fixture, NAMESPACE, SOON, TRAINED, make_tiny, put_folder, serving as one_worker};

const WORDS: &str = "Tell me about yourself.";

/// The tiny tokenizer's ids of `<|endoftext|>` and `<|im_end|>`.
const ENDS: [u32; 2] = [0, 2];

fn serving() -> Value {
    json!({
        "apiVersion": "vicuna.dev/v1alpha1",
        "kind": "VicunaServing",
        "metadata": {"name": "tiny", "namespace": NAMESPACE},
        "spec": {
            "model": {"from": {"trainingRef": {"name": "reclaimed"}}},
            "autoscaling": {
                "min": 1, "max": 2, "target": {"inFlight": 2},
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}},
            },
            "drain": {"timeout": "10s"},
            "worker": {"slots": 4, "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}},
        },
    })
}

pub fn the_result_is_served(fixture: &Fixture) -> Result<()> {
    fixture.apply(&serving())?;
    ready(fixture)?;
    let answer = chat(fixture, 64).ask(WORDS)?;
    ensure!(!answer.text.is_empty() && answer.finish_reason.is_some(), "no answer: {answer:?}");
    let again = chat(fixture, 64).ask(WORDS)?;
    ensure!(answer.text == again.text, "greedy answers differ: {:?} and {:?}", answer.text, again.text);
    Ok(())
}

pub fn a_stream_survives_its_worker(fixture: &Fixture) -> Result<()> {
    // It is not to end by itself.
    let chat = Chat { banned: ENDS.to_vec(), ..chat(fixture, 400) };
    let undisturbed = chat.ask(WORDS)?;
    // A stream may still end in the moment before the kill; then it has shown nothing, and another is asked.
    let mut answer = Answer::default();
    for _ in 0..5 {
        answer = killed_amid(&chat)?;
        ensure!(answer.text == undisturbed.text, "{:?} is not {:?}", answer.text, undisturbed.text);
        ready(fixture)?;
        if answer.resumes >= 1 {
            println!("  longest gap {:?}", answer.longest_gap);
            return Ok(());
        }
    }
    Err(anyhow!("the worker was not killed in time: {answer:?}"))
}

/// The answer to a stream during which all workers are killed, after its first words.
fn killed_amid(chat: &Chat) -> Result<Answer> {
    let workers = wait_for("a worker", SOON, || Ok(Workers::of(&chat.model).ok()))?;
    let amid = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| workers.kill_amid(&amid));
        let answer = chat.stream(WORDS).and_then(|stream| {
            stream.read_to_end(|event| {
                amid.fetch_or(matches!(event, StreamEvent::Text(_)), Ordering::Release);
                Ok(())
            })
        });
        // Also where nothing came.
        amid.store(true, Ordering::Release);
        answer
    })
}

pub fn replicas_follow_demand(fixture: &Fixture) -> Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(|| keep_asking(fixture, &stop))).collect();
        let grown = replicas(fixture, 2);
        stop.store(true, Ordering::Relaxed);
        let mut answered = 0;
        for client in clients {
            answered += client.join().map_err(|_| anyhow!("a client died"))??;
        }
        grown?;
        ensure!(answered > 0, "nobody was answered");
        Ok(())
    })?;
    replicas(fixture, 1)?;
    let serving = fixture.objects.get("vicunaserving", "tiny")?;
    let history = field(&serving, "status.scalingHistory").as_array().context("no scalingHistory")?;
    ensure!(history.len() >= 2, "up and down are not in the history: {history:?}");
    fixture.delete("vicunaserving", "tiny")
}

/// Two adapters and their base on one worker; one that is of another model is told by its name.
pub fn adapters_are_served_beside_their_base(fixture: &Fixture) -> Result<()> {
    for seed in ["5", "6"] {
        let folder = repository().join(format!("target/tiny-adapter-{seed}"));
        make_tiny(&folder, &["--adapter", "--seed", seed])?;
        put_folder(&fixture.bucket, &folder, &format!("adapters/{seed}"))?;
    }
    let mut object = one_worker("adapted", "s3://vicuna/models/tiny");
    let adapter =
        |seed: &str| json!({"name": format!("a{seed}"), "from": {"uri": format!("s3://vicuna/adapters/{seed}")}});
    object["spec"]["model"]["adapters"] = json!([adapter("5"), adapter("6")]);
    fixture.apply(&object)?;
    let names = ["adapted", "adapted:a5", "adapted:a6"].map(|name| format!("{NAMESPACE}/{name}"));
    wait_for("the adapters at the gateway", SOON, || {
        let models = Chat::models(fixture.gateway)?;
        Ok(names.iter().all(|name| models.contains(name)).then_some(()))
    })?;
    fixture.objects.wait("vicunaserving", "adapted", SOON, |vs| Objects::condition(vs, "Ready", "True"))?;
    let ask = |name: &String| Ok(Chat { max_tokens: 32, ..Chat::new(fixture.gateway, name) }.ask(WORDS)?.text);
    let answers = names.iter().map(ask).collect::<Result<Vec<_>>>()?;
    ensure!(answers[0] != answers[1] && answers[1] != answers[2], "adapters change nothing: {answers:?}");
    let told = fixture.objects.get("vicunaserving", "adapted")?;
    ensure!(field(&told, "status.adapters") == &json!(&names[1..]), "status.adapters: {told}");
    fixture.delete("vicunaserving", "adapted")
}

fn keep_asking(fixture: &Fixture, stop: &AtomicBool) -> Result<usize> {
    let chat = chat(fixture, 200);
    let mut answered = 0;
    while !stop.load(Ordering::Relaxed) {
        chat.ask(WORDS)?;
        answered += 1;
    }
    Ok(answered)
}

fn replicas(fixture: &Fixture, count: u64) -> Result<()> {
    let there =
        |vs: &Value| field(vs, "status.replicas.ready") == count && field(vs, "status.replicas.desired") == count;
    fixture.objects.wait("vicunaserving", "tiny", TRAINED, there).map(drop)
}

fn chat(fixture: &Fixture, max_tokens: u32) -> Chat {
    Chat { max_tokens, ..Chat::new(fixture.gateway, &format!("{NAMESPACE}/tiny")) }
}

fn ready(fixture: &Fixture) -> Result<()> {
    fixture.objects.wait("vicunaserving", "tiny", SOON, |vs| Objects::condition(vs, "Ready", "True"))?;
    let model = format!("{NAMESPACE}/tiny");
    wait_for("the model at the gateway", SOON, || Ok(Chat::models(fixture.gateway)?.contains(&model).then_some(())))
}
