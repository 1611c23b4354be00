//! Whole models and adapters trained by our ranks, against Hugging Face transformers and PEFT: the same base, the same
//! batches, fp32. Needs `tests/tools/transformers.sh` and `tests/tools/peft.sh`; without them the tests say so and end.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

#[path = "../../model/tests/golden/mod.rs"]
#[allow(dead_code, reason = "of the other golden tests' helpers only where transformers is")]
mod golden;
mod support;

use golden::{FAMILIES, made_by_transformers};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use support::Fixture;
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::StoreError;
use vicuna_data::{Template, Turn};
use vicuna_model::Pretrained;
use vicuna_model::inference::{Engine, EngineOptions, Outputs, Piece, Precision, Want};
use vicuna_model::layers::Rope;
use vicuna_model::lora::Adapter;
use vicuna_protocol::job::{Base, Lora, Method, ModelSource, RunLength, TrainingJob};
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
fn python_path() -> Option<OsString> {
    let transformers = golden::transformers()?;
    let Some(peft) = golden::newest("peft-") else {
        eprintln!("skipped: PEFT is not installed, run tests/tools/peft.sh");
        return None;
    };
    std::env::join_paths([peft, transformers]).ok()
}

fn python(path: &OsStr, verb: &str, base: &Path, adapter: &Path, input: &Value) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.py");
    let arguments = [OsStr::new(verb), base.as_os_str(), adapter.as_os_str()];
    serde_json::from_str(&golden::script_says(&script, path, &arguments, &input.to_string())).unwrap()
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

fn job(fixture: &Fixture, method: Method) -> TrainingJob {
    let mut job = fixture.job("bucket");
    job.recipe.method = method;
    job.recipe.length = RunLength::Steps(STEPS);
    job
}

fn session(fixture: &Fixture, method: Method) -> Arc<Session> {
    fixture.session(job(fixture, method))
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
    let base = session.adapted.as_ref().map(|adapted| adapted.lock());
    let rope = Rope::new(&session.config, session.data.longest(), Device::Cpu, session.kind());
    let plan = session.data.plan(1);
    let batches: Vec<_> = plan.micro_batches.iter().map(|batch| session.data.micro_batch(batch).unwrap()).collect();
    let computation = Computation {
        config: &session.config,
        table: &session.table,
        rope: &rope,
        device: Device::Cpu,
        adapted: base.as_deref(),
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
        for (parameter, sum) in session.table.parameters[parameters].iter().zip(total.tensors()) {
            let gradient = sum / plan.trained_tokens as f64;
            // A tied embedding's comes in two parts.
            let before: Option<Tensor> = named.remove(&parameter.name);
            let whole = before.map_or_else(|| gradient.shallow_clone(), |before| before + &gradient);
            named.insert(parameter.name.clone(), whole);
        }
        Ok(())
    });
    assert_eq!(handed_on.unwrap().len(), batches.len());
    named
}

fn batches(session: &Session, step: u64) -> Value {
    let plan = session.data.plan(step);
    let batch = |sequences: &Vec<u32>| {
        let batch = session.data.micro_batch(sequences).unwrap();
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

/// Steps, and how they are made, as golden.py takes them.
fn run(session: &Session, held: &Value) -> Value {
    let recipe = &session.job.recipe;
    json!({
        "base": held,
        "weightDecay": recipe.weight_decay,
        "clip": recipe.gradient_clip,
        "steps": (1..=STEPS).map(|step| batches(session, step)).collect::<Vec<_>>(),
    })
}

/// The first gradients and the losses of all steps are those of the peer's run; `what` is trained.
fn compare(what: &str, session: &Arc<Session>, theirs: &Value) {
    let (mut worst, mut size) = (0f64, 0f64);
    for (name, ours) in first_gradients(session) {
        let theirs = tensor(&theirs["gradients"][&name]);
        size = size.max(largest(&theirs));
        worst = worst.max(largest(&(ours.reshape([-1]) - theirs)));
    }
    eprintln!("{what}: largest gradient {size:.3e}, largest difference {worst:.1e}");
    assert!(size > 1e-3 && worst < 1e-5 * size.max(1.0), "{what}: {worst} of {size}");

    let ours = train(session);
    let theirs: Vec<f64> = serde_json::from_value(theirs["losses"].clone()).unwrap();
    let differences = ours.iter().zip(&theirs).map(|(ours, theirs)| (ours - theirs).abs() / theirs);
    let worst = differences.fold(0f64, f64::max);
    eprintln!("{what}: loss {:.4} → {:.4}, largest relative difference {worst:.1e}", ours[0], ours[29]);
    assert_eq!((ours.len(), theirs.len()), (STEPS as usize, STEPS as usize));
    assert!(ours[29] < 0.9 * ours[0], "{what}: it learns");
    // Rounding grows from step to step, since Adam divides by the root of what may be nearly 0.
    assert!(worst < 1e-3, "{what}: {ours:?} {theirs:?}");
}

#[test]
fn whole_models_of_every_family_train_as_in_transformers() {
    let (Some(path), Some(site)) = (python_path(), golden::transformers()) else { return };
    for family in FAMILIES {
        let fixture = Fixture::new();
        let (directory, model) = made_by_transformers(&site, family);
        let mut job = job(&fixture, Method::Full);
        job.model = ModelSource { from: support::url(directory.path()), template: Some("chatml".to_owned()) };
        job.recipe.max_length = job.recipe.max_length.min(model.config.max_position as u32);
        // A key's bias has no gradient but rounding, and Adam makes a whole step of that.
        job.recipe.learning_rate = 2e-3;
        let session = fixture.session(job);
        let theirs = python(&path, "train", directory.path(), Path::new("-"), &run(&session, &Value::Null));
        compare(family, &session, &theirs);
    }
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
        let theirs = python(&path, "train", &fixture.path("model"), &start, &run(&session, &held));
        compare(&format!("{method:?}"), &session, &theirs);
    }
}

/// What our engine answers to the result that a worker would be given.
fn answered(model: &Pretrained, adapter: Option<&Path>, prompt: &[u32], count: usize) -> Vec<u32> {
    let options =
        EngineOptions { device: Device::Cpu, precision: Precision::Fp32, max_length: None, cache_bytes: 0, threads: 1 };
    let adapters: Vec<Adapter> = adapter.iter().map(|path| Adapter::load(path).unwrap()).collect();
    let mut engine = Engine::adapted(model, &adapters, &options).unwrap();
    let adapter = adapter.map(|_| 0);
    let blocks: Vec<u32> = (0..engine.blocks() as u32).collect();
    let (mut ids, mut past, mut outputs) = (prompt.to_vec(), 0, Outputs::default());
    while ids.len() < prompt.len() + count {
        let piece = Piece { tokens: &ids[past..], past, blocks: &blocks, want: Want::Last, adapter };
        engine.step(&[piece], &mut outputs).unwrap();
        past = ids.len();
        let row = outputs.logits(0).next().unwrap();
        ids.push((0..row.len()).reduce(|best, id| if row[id] > row[best] { id } else { best }).unwrap() as u32);
        if model.config.eos.contains(&ids[past]) {
            break;
        }
    }
    ids.split_off(prompt.len())
}

/// The prompt that a worker would make of the question.
fn asked(result: &Path, question: &str) -> Vec<u32> {
    let on_disk = vicuna_model::OnDisk::open(result).unwrap();
    let [bos, eos] = on_disk.special_tokens.around();
    let template = Template::from_jinja(on_disk.chat_template.as_deref().unwrap(), bos, eos).unwrap();
    template.bind(&on_disk.tokenizer).unwrap().prompt_ids(&[Turn::user(question)]).unwrap()
}

#[test]
fn what_was_trained_answers_in_transformers_and_peft_as_in_our_engine() {
    let Some(path) = python_path() else { return };
    let question = "Who are you?";
    for method in [Method::Full, Method::LoRA(lora())] {
        let fixture = Fixture::new();
        let full = method == Method::Full;
        let session = session(&fixture, method);
        train(&session);
        let (base, result) = (fixture.path("model"), fixture.path("bucket/result"));
        let (whole, adapter) = if full { (&result, None) } else { (&base, Some(result.as_path())) };
        let theirs = python(&path, "answer", whole, adapter.unwrap_or(Path::new("-")), &json!(question));
        let ids = |name: &str| serde_json::from_value::<Vec<u32>>(theirs[name].clone()).unwrap();
        let (prompt, reply) = (ids("prompt"), ids("reply"));
        assert_eq!(asked(whole, question), prompt, "template and tokenizer are the result's");
        let model = vicuna_model::load(whole).unwrap();
        let ours = answered(&model, adapter, &prompt, 24);
        eprintln!("{}", model.tokenizer.decode(&ours, true).unwrap());
        assert_eq!(ours, reply);
        let untrained = answered(&vicuna_model::load(&base).unwrap(), None, &prompt, 24);
        assert_ne!(untrained, ours, "training changes nothing");
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
