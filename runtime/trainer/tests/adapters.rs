//! Our adapters against PEFT on Hugging Face transformers: the same base, the same batches, fp32. Needs
//! `tests/tools/transformers.sh` and `tests/tools/peft.sh`; without them the tests say so and end.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

#[path = "../../model/tests/golden/mod.rs"]
#[allow(dead_code, reason = "of the other golden tests' helpers only where transformers is")]
mod golden;
mod support;

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use support::Fixture;
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::StoreError;
use vicuna_model::layers::Rope;
use vicuna_model::lora::Adapter;
use vicuna_protocol::job::{Base, Lora, Method, RunLength};
use vicuna_trainer::checkpoint::Published;
use vicuna_trainer::evaluation::{Evaluation, Stage};
use vicuna_trainer::generation::{Control, Next, Observer, Start};
use vicuna_trainer::local::generation_on_threads;
use vicuna_trainer::prepare::Session;
use vicuna_trainer::schedule::learning_rate;
use vicuna_trainer::state::Weights;
use vicuna_trainer::step::StepReport;
use vicuna_trainer::step::gradients::Computation;
use vicuna_trainer::step::weights::Source;
use vicuna_trainer::tree::Summand;

const STEPS: u64 = 30;

/// transformers and PEFT, as PYTHONPATH.
fn python_path() -> Option<std::ffi::OsString> {
    let transformers = golden::transformers()?;
    let Some(peft) = golden::newest("peft-") else {
        eprintln!("skipped: PEFT is not installed, run tests/tools/peft.sh");
        return None;
    };
    std::env::join_paths([peft, transformers]).ok()
}

fn python(path: &std::ffi::OsStr, verb: &str, base: &Path, adapter: &Path, input: &Value) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapters.py");
    let mut child = Command::new("python3")
        .arg(script)
        .arg(verb)
        .args([base, adapter])
        .env("PYTHONPATH", path)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("LD_LIBRARY_PATH")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "adapters.py {verb} failed");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[derive(Default)]
struct Losses(Mutex<Vec<f64>>);

impl Observer for Losses {
    fn ready(&self, _: &str) {}

    fn stepped(&self, report: &StepReport, _: Next) {
        self.0.lock().push(report.loss);
    }

    fn evaluating(&self, _: Stage) {}

    fn evaluated(&self, _: &Evaluation) {}

    fn checkpointed(&self, _: &Published) {}

    fn blocked(&self, _: &StoreError) {}
}

fn lora() -> Lora {
    Lora { rank: 8, alpha: 16.0, dropout: 0.0, targets: vec!["all-linear".to_owned()] }
}

fn session(fixture: &Fixture, method: Method) -> Arc<Session> {
    let mut job = fixture.job("bucket");
    job.recipe.method = method;
    job.recipe.length = RunLength::Steps(STEPS);
    fixture.session(job)
}

/// Trains on two ranks; the losses.
fn train(session: &Arc<Session>) -> Vec<f64> {
    let control = Control::default();
    control.go.cancel();
    let losses = Arc::new(Losses::default());
    let observers: Vec<Arc<dyn Observer>> = vec![losses.clone(), Arc::new(Losses::default())];
    let controls = [control.clone(), control];
    let outcomes = generation_on_threads(session, 1, &Start::Model, &controls, &observers, &mut [None, None]).unwrap();
    outcomes.into_iter().for_each(|outcome| drop(outcome.unwrap()));
    std::mem::take(&mut *losses.0.lock())
}

fn first_weights(session: &Session) -> Weights {
    Weights { tensors: session.table.parameters.iter().map(|it| session.first_value(it).unwrap()).collect() }
}

/// The first step's gradients by name.
fn first_gradients(session: &Session) -> BTreeMap<String, Tensor> {
    let weights = first_weights(session);
    let base = session.adapted.as_ref().unwrap().lock();
    let rope = Rope::new(&session.config, session.data.longest(), Device::Cpu, session.kind());
    let plan = session.data.plan(1);
    let batches: Vec<_> = plan.micro_batches.iter().map(|batch| session.data.micro_batch(batch)).collect();
    let computation = Computation {
        config: &session.config,
        table: &session.table,
        rope: &rope,
        device: Device::Cpu,
        adapted: Some(&base),
        step: 1,
        whole_layers: 0,
        offload: false,
        abort: &CancellationToken::new(),
    };
    let mut named = BTreeMap::new();
    let handed_on = computation.run(&mut Source::Here(&session.table, &weights), 0, &batches, |partial| {
        let mut sums = partial.sums.into_iter().map(|(_, sum)| sum);
        let mut total = sums.next().unwrap();
        sums.for_each(|sum| total.add(sum));
        let parameters = session.table.group_parameters(partial.group);
        let parameters = session.table.parameters[parameters].iter().zip(total.tensors());
        named.extend(parameters.map(|(p, sum)| (p.name.clone(), sum / plan.trained_tokens as f64)));
        Ok(())
    });
    assert_eq!(handed_on.unwrap().len(), batches.len());
    named
}

fn batches(session: &Session, step: u64) -> Value {
    let plan = session.data.plan(step);
    let batch = |sequences: &Vec<u32>| {
        let batch = session.data.micro_batch(sequences);
        json!({ "rows": batch.rows, "length": batch.length, "ids": batch.ids, "labels": batch.labels })
    };
    json!({
        "tokens": plan.trained_tokens,
        "learningRate": learning_rate(&session.job.recipe, step, session.data.steps()),
        "batches": plan.micro_batches.iter().map(batch).collect::<Vec<_>>(),
    })
}

fn tensor(values: &Value) -> Tensor {
    Tensor::from_slice(&serde_json::from_value::<Vec<f32>>(values.clone()).unwrap())
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

#[test]
fn gradients_and_thirty_steps_are_those_of_peft() {
    let Some(path) = python_path() else { return };
    for (method, held) in [
        (Method::LoRA(lora()), Value::Null),
        (Method::QLoRA(lora(), Base::Nf4), json!("Nf4")),
        (Method::QLoRA(lora(), Base::Int8), json!("Int8")),
    ] {
        let fixture = Fixture::new();
        let session = session(&fixture, method.clone());
        let start = fixture.path("start");
        let named = session.table.parameters.iter().map(|it| it.name.clone());
        let first = named.zip(first_weights(&session).tensors).collect();
        Adapter::save(&start, &session.adapted.as_ref().unwrap().lock().lora, "base", &first).unwrap();
        let recipe = &session.job.recipe;
        let run = json!({
            "base": held,
            "weightDecay": recipe.weight_decay,
            "clip": recipe.gradient_clip,
            "steps": (1..=STEPS).map(|step| batches(&session, step)).collect::<Vec<_>>(),
        });
        let theirs = python(&path, "train", &fixture.path("model"), &start, &run);

        let (mut worst, mut size) = (0f64, 0f64);
        for (name, ours) in first_gradients(&session) {
            let theirs = tensor(&theirs["gradients"][&name]);
            size = size.max(largest(&theirs));
            worst = worst.max(largest(&(ours.reshape([-1]) - theirs)));
        }
        eprintln!("{method:?}: largest gradient {size:.3e}, largest difference {worst:.1e}");
        assert!(size > 1e-3 && worst < 1e-5 * size.max(1.0), "{worst} of {size}");

        let ours = train(&session);
        let theirs: Vec<f64> = serde_json::from_value(theirs["losses"].clone()).unwrap();
        let differences = ours.iter().zip(&theirs).map(|(ours, theirs)| (ours - theirs).abs() / theirs);
        let worst = differences.fold(0f64, f64::max);
        eprintln!("{method:?}: loss {:.4} → {:.4}, largest relative difference {worst:.1e}", ours[0], ours[29]);
        assert_eq!((ours.len(), theirs.len()), (STEPS as usize, STEPS as usize));
        assert!(ours[29] < 0.9 * ours[0], "it learns");
        assert!(worst < 1e-3, "{ours:?} {theirs:?}");
    }
}

#[test]
fn a_trained_adapter_gives_the_same_logits_in_peft_and_merged() {
    let Some(path) = python_path() else { return };
    let fixture = Fixture::new();
    let session = session(&fixture, Method::LoRA(lora()));
    train(&session);
    let (base, adapter) = (fixture.path("model"), fixture.path("bucket/result"));
    let ids: Vec<u32> = (0..60).map(|index| 3 + index * 31 % 250).collect();
    let theirs = python(&path, "logits", &base, &adapter, &json!(ids));

    let model = vicuna_model::load_adapted(&base, &adapter).unwrap();
    let ours = vicuna_model::logits(&model.config, &model.tensors, &ids).unwrap().reshape([-1]);
    let untrained = vicuna_model::load(&base).unwrap();
    let untrained = vicuna_model::logits(&untrained.config, &untrained.tensors, &ids).unwrap().reshape([-1]);
    assert!(largest(&(&ours - untrained)) > 0.1, "the adapter changes nothing");
    for way in ["adapted", "merged"] {
        let difference = largest(&(&ours - tensor(&theirs[way])));
        eprintln!("{way}: largest logit {:.3}, largest difference {difference:.1e}", largest(&ours));
        assert!(difference < 1e-4, "{way}: {difference}");
    }
}
