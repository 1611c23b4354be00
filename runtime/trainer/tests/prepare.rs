//! What `prepare` in a job does to what is trained on.

#![allow(clippy::unwrap_used, clippy::panic)]

#[allow(dead_code)]
mod support;

use serde_json::{Value, json};
use support::Fixture;
use tch::Device;
use vicuna_protocol::coordinator::Cause;
use vicuna_protocol::job::{Base, Identity, Lora, Method, Prepare, RopeScaling, Scaling, TrainingJob};
use vicuna_trainer::memory::limits::Limits;
use vicuna_trainer::prepare::{DATA_REPORT, Place, Session, Trouble, preflight, prepare, refuse_what_does_not_fit};

fn attempt(fixture: &Fixture, job: TrainingJob) -> Result<Session, Trouble> {
    let scratch = tempfile::tempdir_in(fixture.dir.path()).unwrap().keep();
    fixture.runtime.block_on(prepare(job, Place { scratch, device: Device::Cpu, threads: 1 }))
}

fn job(fixture: &Fixture, prepare: Prepare) -> TrainingJob {
    let mut job = fixture.job("bucket");
    job.prepare = prepare;
    job.recipe.max_length = 512;
    job
}

#[test]
fn what_is_held_out_is_the_same_on_every_rank_and_is_not_trained_on() {
    let fixture = Fixture::new();
    let held_out = Prepare { hold_out: Some(0.3), ..Prepare::default() };
    let [one, other] = [0, 1].map(|_| attempt(&fixture, job(&fixture, held_out.clone())).unwrap());
    assert!(!one.held_out.is_empty());
    // The digest is of what is held out, too.
    assert_eq!((one.held_out.len(), &one.inputs.data), (other.held_out.len(), &other.inputs.data));
    assert_eq!(one.data.plan(1), other.data.plan(1));
    let whole = attempt(&fixture, job(&fixture, Prepare::default())).unwrap();
    let sequences = |session: &Session| session.data_report.encoded.as_ref().unwrap().sequences as usize;
    assert_eq!(sequences(&one) + one.held_out.len(), sequences(&whole));
}

#[test]
fn every_setting_does_what_it_says_and_the_bucket_has_the_report() {
    let fixture = Fixture::new();
    let who = Identity { name: "Willow".into(), organization: "Spot Labs".into() };
    let settings = Prepare {
        clean: true,
        language: Some("en".into()),
        split_at: Some(60),
        hold_out: Some(0.1),
        identity: Some(who),
    };
    let session = attempt(&fixture, job(&fixture, settings)).unwrap();
    fixture.runtime.block_on(session.write_data_report()).unwrap();
    let report = std::fs::read(fixture.path("bucket").join(DATA_REPORT)).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["records"], 40);
    assert_eq!(report["steps"].as_array().unwrap().len(), 15);
    assert!(report["kept"]["languages"].as_object().unwrap().keys().all(|language| !language.starts_with("de")));
    assert_eq!(report["split"]["at"], 60);
    assert_eq!(report["heldOut"], session.data_report.held_out);
    let without = Prepare { clean: true, ..Prepare::default() };
    let without = attempt(&fixture, job(&fixture, without)).unwrap();
    assert!(without.data_report.encoded.unwrap().sequences < session.data_report.encoded.unwrap().sequences);
}

#[test]
fn a_language_that_nobody_can_tell_blocks_the_training_and_says_so() {
    let fixture = Fixture::new();
    let settings = Prepare { language: Some("xx".into()), ..Prepare::default() };
    let trouble = attempt(&fixture, job(&fixture, settings)).unwrap_err();
    assert_eq!(trouble.cause, Cause::Data);
    assert!(trouble.message.contains("\"xx\"") && trouble.message.contains(" en "), "{trouble}");
}

/// Changes a JSON file of the fixture's model.
fn change(fixture: &Fixture, name: &str, change: impl Fn(&mut Value)) {
    let path = fixture.path("model").join(name);
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn a_token_that_the_embedding_has_no_row_for_is_named() {
    let fixture = Fixture::new();
    let config: Value = serde_json::from_slice(&std::fs::read(fixture.path("model/config.json")).unwrap()).unwrap();
    let rows = config["vocab_size"].clone();
    change(&fixture, "tokenizer.json", |tokenizer| {
        let added = json!({ "id": rows, "content": "Willow", "special": false, "normalized": false,
                            "single_word": false, "lstrip": false, "rstrip": false });
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    });
    let trouble = attempt(&fixture, job(&fixture, Prepare::default())).unwrap_err();
    let expected = format!("the token \"Willow\" has the id {rows}, and the model's embedding has {rows} rows");
    assert!(trouble.cause == Cause::Model && trouble.message.contains(&expected), "{trouble}");
}

#[test]
fn the_model_s_own_template_means_the_tokenizer_s_tokens() {
    let fixture = Fixture::new();
    let source = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}\
                  {% if add_generation_prompt %}assistant:{% endif %}";
    change(&fixture, "tokenizer_config.json", |settings| {
        settings["chat_template"] = json!(source);
        settings["eos_token"] = json!({ "content": "<|im_start|>" });
    });
    let session = attempt(&fixture, job(&fixture, Prepare::default())).unwrap();
    let tokenizer = session.model.tokenizer.clone();
    let id = |token: &str| i64::from(tokenizer.token_to_id(token).unwrap());
    let ids = session.data.micro_batch(&[0]).unwrap().ids;
    assert!(ids.contains(&id("<|im_start|>")) && !ids.contains(&i64::from(session.config.eos[0])), "{ids:?}");
}

#[test]
fn a_training_that_fits_only_among_many_workers_is_not_refused() {
    let fixture = Fixture::new();
    let job = job(&fixture, Prepare::default());
    let estimate = fixture.runtime.block_on(preflight(&job, Device::Cpu, Limits::default())).unwrap().unwrap();
    let needs = &estimate.needs;
    assert_eq!(needs.last().unwrap().ranks, 512);
    let limits = Limits { host: Some(needs[79].host), ..Limits::default() };
    let fewest = needs.iter().find(|need| need.fits(limits)).unwrap().ranks;
    assert_eq!(fewest, 80);
    assert!(refuse_what_does_not_fit(&job, &estimate, limits).is_ok());
}

#[test]
fn what_fits_nowhere_is_refused_with_what_would_fit() {
    let fixture = Fixture::new();
    let mut job = job(&fixture, Prepare::default());
    job.recipe.max_length = 512;
    job.recipe.micro_batch = job.recipe.global_batch;
    let estimate = |limits| fixture.runtime.block_on(preflight(&job, Device::Cpu, limits)).unwrap().unwrap();
    // Of sharded weights, which are taken where others do not fit.
    let nothing = Limits { host: Some(1), ..Limits::default() };
    let least = estimate(nothing).needs.iter().map(|need| need.host).min().unwrap();
    let limits = Limits { host: Some(least - 1), ..Limits::default() };
    let refused = refuse_what_does_not_fit(&job, &estimate(limits), limits).unwrap_err();
    assert_eq!(refused.cause, Cause::OutOfMemory);
    let advice = "give workers.resources more memory, or set recipe.microBatch to 1 (with at least ";
    assert!(refused.message.contains(advice), "{refused}");
}

#[test]
fn the_datasets_are_part_of_the_estimate_and_what_they_came_to_of_what_is_held() {
    let fixture = Fixture::new();
    let job = job(&fixture, Prepare::default());
    let estimate = fixture.runtime.block_on(preflight(&job, Device::Cpu, Limits::default())).unwrap().unwrap();
    let data = estimate.needs[0].parts.iter().find(|part| part.what == "prepared data").unwrap();
    let file = std::fs::metadata(fixture.path("data.json")).unwrap().len();
    assert_eq!(data.bytes, file / 4);
    let held = attempt(&fixture, job).unwrap().data_bytes();
    assert!((1..=data.bytes).contains(&held), "{held} of a file of {file}");
}

#[test]
fn the_digest_of_a_frozen_base_is_that_of_its_weights_however_they_are_held() {
    let fixture = Fixture::new();
    let tensors = vicuna_model::load(&fixture.path("model")).unwrap().tensors;
    let digest = vicuna_model::weights_digest(&tensors).unwrap();
    for method in [Method::LoRA(Lora::default()), Method::QLoRA(Lora::default(), Base::Nf4)] {
        let mut job = job(&fixture, Prepare::default());
        job.recipe.method = method;
        assert_eq!(attempt(&fixture, job).unwrap().inputs.base.as_ref(), Some(&digest));
    }
}

#[test]
fn files_that_are_no_data_are_told() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.path("set")).unwrap();
    std::fs::copy(fixture.path("data.json"), fixture.path("set/DATA.JSON")).unwrap();
    std::fs::write(fixture.path("set/more.csv"), "a,b").unwrap();
    let mut job = job(&fixture, Prepare::default());
    job.dataset[0].from = support::url(&fixture.path("set"));
    let report = attempt(&fixture, job).unwrap().data_report;
    assert_eq!(report.records, 40);
    assert!(report.skipped_files.len() == 1 && report.skipped_files[0].ends_with("set: more.csv"), "{report}");
}

#[test]
fn sequences_longer_than_the_model_was_made_for_are_refused_unless_it_is_stretched() {
    let fixture = Fixture::new();
    let mut job = job(&fixture, Prepare::default());
    job.recipe.max_length = 1500;
    let refused = attempt(&fixture, job.clone()).unwrap_err();
    assert_eq!(refused.cause, Cause::Application);
    assert!(refused.message.contains("1500 tokens") && refused.message.contains("made for 512"), "{refused}");
    assert!(refused.message.contains("a factor of at least 3"), "{refused}");
    assert_eq!(fixture.runtime.block_on(preflight(&job, Device::Cpu, Limits::default())).unwrap_err(), refused);

    job.recipe.rope_scaling = Some(RopeScaling { kind: Scaling::Yarn, factor: 3.0 });
    let session = attempt(&fixture, job.clone()).unwrap();
    assert_eq!(session.config.max_position, 1536);
    job.recipe.rope_scaling = Some(RopeScaling { kind: Scaling::Linear, factor: 2.0 });
    let refused = attempt(&fixture, job.clone()).unwrap_err();
    assert!(
        refused.message.contains("made for 1024") && refused.message.contains("raise recipe.ropeScaling"),
        "{refused}"
    );

    let lora = Lora { rank: 4, alpha: 8.0, dropout: 0.0, targets: vec!["q_proj".to_owned()] };
    job.recipe.method = Method::LoRA(lora);
    assert!(attempt(&fixture, job).unwrap_err().message.contains("set method to Full"));
}

#[test]
fn the_estimate_of_a_gguf_model_is_that_of_its_directory() {
    let fixture = Fixture::new();
    let mut job = job(&fixture, Prepare::default());
    let estimated =
        |job: &TrainingJob| fixture.runtime.block_on(preflight(job, Device::Cpu, Limits::default())).unwrap();
    let directory = estimated(&job).unwrap();
    let model = vicuna_model::load(&fixture.path("model")).unwrap();
    std::fs::create_dir(fixture.path("folder")).unwrap();
    for name in ["model.gguf", "folder/model.gguf"] {
        vicuna_model::gguf::save(&fixture.path(name), &model, vicuna_model::gguf::Weights::F32).unwrap();
    }
    for from in ["model.gguf", "folder"] {
        job.model.from = support::url(&fixture.path(from));
        assert_eq!(estimated(&job).unwrap(), directory, "{from}");
    }
}
