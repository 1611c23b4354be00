//! The serving: the base model, the tuned one, a killed worker, a burst.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use vicuna_tests::cluster::wait_for;
use vicuna_tests::product::{Answer, Chat, Objects, StreamEvent, Workers, field};

use crate::report::Report;
use crate::stage::{NAMESPACE, Stage};

const QUESTION: &str = "Who are you?";
/// A long answer in which everybody sees what is lost or repeated.
const COUNT: &str = "List the numbers from 1 to 30, separated by commas.";
const READY_WITHIN: Duration = Duration::from_secs(300);
const BURST: usize = 12;

pub fn base_model(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("serve_base", "VicunaServing `base`: the model before");
    stage.apply_sample("serving-base.yaml", report)?;
    let answer = ask(stage, report, "base", QUESTION)?;
    report.note("answer_before", answer.text);
    Ok(())
}

pub fn tuned_model(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("serve_tuned", "VicunaServing `tuned`: the result of the training");
    stage.apply_sample("serving-tuned.yaml", report)?;
    let answer = ask(stage, report, "tuned", QUESTION)?;
    report.note("answer_after", answer.text);
    Ok(())
}

fn ask(stage: &Stage, report: &Report, name: &str, question: &str) -> Result<Answer> {
    wait_until_ready(stage, name)?;
    let chat = chat(stage, name);
    report.say(&format!("curl -N http://{}/v1/chat/completions  model {}", stage.gateway, chat.model));
    println!("           > {question}");
    print!("           ");
    let answer = chat.stream(question)?.read_to_end(print_text)?;
    println!();
    report.say(&format!("first token after {:.2} s", answer.first_token.unwrap_or_default().as_secs_f64()));
    Ok(answer)
}

fn print_text(event: &StreamEvent) -> Result<()> {
    if let StreamEvent::Text(text) = event {
        print!("{}", text.replace('\n', "\n           "));
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn chat(stage: &Stage, name: &str) -> Chat {
    Chat::new(stage.gateway, &format!("{NAMESPACE}/{name}"))
}

fn wait_until_ready(stage: &Stage, name: &str) -> Result<()> {
    stage.objects.wait("vicunaserving", name, READY_WITHIN, |vs| Objects::condition(vs, "Ready", "True"))?;
    let model = format!("{NAMESPACE}/{name}");
    wait_for(&format!("{model} at the gateway"), READY_WITHIN, || {
        Ok(Chat::models(stage.gateway)?.contains(&model).then_some(()))
    })
}

/// Streams an answer undisturbed, then again while the worker that streams it is killed.
pub fn kill_a_worker(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("kill", "The worker is killed while it streams");
    let mut chat = chat(stage, "tuned");
    chat.max_tokens = 96;
    let undisturbed = chat.ask(COUNT)?;
    let mut tokens = 0;
    let answer = chat.stream(COUNT)?.read_to_end(|event| {
        print_text(event)?;
        match event {
            StreamEvent::Text(_) => tokens += 1,
            StreamEvent::Comment(comment) => print!("[{comment}]"),
            _ => {}
        }
        if tokens == 12 {
            tokens += 1;
            print!(" \u{26a1} ");
            Workers::of(&format!("{NAMESPACE}/tuned"))?.kill();
        }
        Ok(())
    })?;
    println!();
    let equal = answer.text == undisturbed.text;
    report.say(&format!(
        "resumed {} time(s); longest gap {:.1} s; text equal to the undisturbed stream: {equal}",
        answer.resumes,
        answer.longest_gap.as_secs_f64()
    ));
    report.note(
        "killed_stream",
        json!({"resumes": answer.resumes, "equal_to_undisturbed": equal,
        "longest_gap_seconds": (answer.longest_gap.as_secs_f64() * 10.0).round() / 10.0}),
    );
    if answer.resumes == 0 {
        bail!("the stream was not resumed: the worker was not killed in time");
    }
    Ok(())
}

/// Many requests at once: one replica becomes two, and one again when they are gone.
pub fn burst(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("burst", &format!("A burst of {BURST} clients: the VicunaServing scales by itself"));
    wait_until_ready(stage, "tuned")?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..BURST).map(|_| scope.spawn(|| keep_asking(stage, &stop))).collect();
        let grown = follow_replicas(stage, report, |ready, _| ready >= 2);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let answered = clients.into_iter().map(|client| client.join().unwrap_or_else(|_| bail!("a client died")));
        (grown, answered.sum::<Result<usize>>())
    });
    let (up, answered) = (outcome.0?, outcome.1?);
    let down = follow_replicas(stage, report, |ready, desired| ready == 1 && desired == 1)?;
    report.note(
        "burst",
        json!({"answered": answered, "scale_up_seconds": up.as_secs(), "scale_down_seconds": down.as_secs()}),
    );
    Ok(())
}

fn keep_asking(stage: &Stage, stop: &std::sync::atomic::AtomicBool) -> Result<usize> {
    let chat = chat(stage, "tuned");
    let mut answered = 0;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        chat.ask(COUNT)?;
        answered += 1;
    }
    Ok(answered)
}

fn follow_replicas(stage: &Stage, report: &Report, enough: impl Fn(u64, u64) -> bool) -> Result<Duration> {
    let started = Instant::now();
    let mut last = String::new();
    while started.elapsed() < READY_WITHIN {
        let serving = stage.objects.get("vicunaserving", "tuned")?;
        let number = |path: &str| field(&serving, path).as_u64().unwrap_or(0);
        let (ready, desired) = (number("status.replicas.ready"), number("status.replicas.desired"));
        let line = format!("replicas: {ready} ready of {desired} desired{}", why(&serving));
        if line != last {
            report.say(&line);
            last = line;
        }
        if enough(ready, desired) {
            return Ok(started.elapsed());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    bail!("the VicunaServing did not scale: {:#}", stage.objects.get("vicunaserving", "tuned")?["status"])
}

fn why(serving: &Value) -> String {
    Objects::condition_of(serving, "ScalingActive")
        .and_then(|condition| condition["message"].as_str())
        .map_or_else(String::new, |message| format!("  ({message})"))
}
