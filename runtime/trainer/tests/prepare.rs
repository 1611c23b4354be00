//! What `prepare` in a job does to what is trained on.

#![allow(clippy::unwrap_used, clippy::panic)]

#[allow(dead_code)]
mod support;

use support::Fixture;
use tch::Device;
use vicuna_protocol::coordinator::Cause;
use vicuna_protocol::job::{Identity, Prepare, TrainingJob};
use vicuna_trainer::prepare::{DATA_REPORT, Place, Session, Trouble, prepare};

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
    assert_eq!(one.held_out, other.held_out);
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
    assert_eq!(report["steps"].as_array().unwrap().len(), 14);
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
