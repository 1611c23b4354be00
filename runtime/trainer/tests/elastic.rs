//! The promise: the weights do not depend on how many ranks trained them, nor on stops in between.
//!
//! Real ranks in threads, real TCP on loopback, checkpoints on disk, the tiny model.

mod support;

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use support::{Fixture, STEPS, url};
use tch::Device;
use vicuna_checkpoint::{ManifestRef, Store, StoreError};
use vicuna_protocol::job::TrainingJob;
use vicuna_trainer::checkpoint::Published;
use vicuna_trainer::generation::{Control, Finished, Observer, Outcome};
use vicuna_trainer::local::generation_on_threads;
use vicuna_trainer::prepare::{Place, Session, prepare};
use vicuna_trainer::step::StepReport;

fn manifests(fixture: &Fixture, session: &Session) -> Vec<ManifestRef> {
    fixture.runtime.block_on(session.manifests()).unwrap()
}

/// Records what happens, and may ask for the end.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    control: Control,
    losses: Mutex<Vec<f64>>,
    ready: Mutex<Option<String>>,
    checkpoints: Mutex<Vec<u64>>,
}

impl Observer for Watch {
    fn ready(&self, state_digest: &str) {
        *self.ready.lock() = Some(state_digest.to_owned());
    }

    fn stepped(&self, report: &StepReport, _last_of_generation: bool) {
        self.losses.lock().push(report.loss);
        // The wish travels with the next step's commit.
        if self.stop_after == Some(report.step + 1) {
            self.control.stop.cancel();
        }
    }

    fn checkpointed(&self, published: &Published) {
        self.checkpoints.lock().push(published.manifest.step);
    }

    fn blocked(&self, error: &StoreError) {
        panic!("the store is a folder: {error}");
    }
}

struct Run {
    outcomes: Vec<Outcome>,
    watches: Vec<Arc<Watch>>,
}

/// One generation; `stop_after` is the last rank's wish alone.
fn generation(session: &Arc<Session>, world: usize, base: Option<ManifestRef>, stop_after: Option<u64>) -> Run {
    let watches: Vec<Arc<Watch>> = (0..world)
        .map(|rank| {
            let control = Control::default();
            control.go.cancel();
            let stop_after = stop_after.filter(|_| rank == world - 1);
            Arc::new(Watch { stop_after, control, ..Watch::default() })
        })
        .collect();
    let controls: Vec<Control> = watches.iter().map(|watch| watch.control.clone()).collect();
    let observers: Vec<Arc<dyn Observer>> = watches.iter().map(|watch| watch.clone() as _).collect();
    let outcomes = generation_on_threads(session, base, &controls, &observers).unwrap();
    let ready: Vec<_> = watches.iter().map(|watch| watch.ready.lock().clone().unwrap()).collect();
    assert!(ready.iter().all(|digest| *digest == ready[0]), "{ready:?}");
    Run { outcomes, watches }
}

impl Run {
    fn result(&self) -> &Finished {
        let result = self.outcomes.iter().find_map(|outcome| match outcome {
            Outcome::Complete { result, step, .. } => {
                assert_eq!(*step, STEPS);
                result.as_ref()
            }
            Outcome::Stopped { .. } => None,
        });
        result.expect("a result")
    }

    /// All ranks stopped after the same step, with the same manifest.
    fn stopped(&self) -> (u64, ManifestRef) {
        let mut all = self.outcomes.iter().map(|outcome| match outcome {
            Outcome::Stopped { step, manifest } => (*step, manifest.clone().unwrap()),
            other => panic!("{other:?}"),
        });
        let first = all.next().unwrap();
        assert!(all.all(|other| other == first));
        first
    }
}

#[test]
fn every_number_of_ranks_trains_the_same_weights_and_losses() {
    let fixture = Fixture::new();
    let run = |world: usize| {
        let session = fixture.session(fixture.job(&format!("bucket-{world}")));
        let run = generation(&session, world, None, None);
        let losses = run.watches[world - 1].losses.lock().clone();
        (run.result().digest.clone(), losses)
    };
    let undisturbed = run(1);
    assert!(undisturbed.1[STEPS as usize - 1] < undisturbed.1[0], "it learns: {:?}", undisturbed.1);
    for world in [2, 3, 4, 9] {
        assert_eq!(run(world), undisturbed, "{world} ranks");
    }
}

#[test]
fn stops_and_changes_of_size_leave_no_trace_in_the_weights() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("undisturbed"));
    let undisturbed = generation(&session, 1, None, None).result().digest.clone();

    let session = fixture.session(fixture.job("disturbed"));
    let first = generation(&session, 3, None, Some(2));
    let (step, manifest) = first.stopped();
    assert_eq!(step, 2);
    let second = generation(&session, 1, Some(manifest), Some(4));
    let (step, manifest) = second.stopped();
    assert_eq!((step, manifest.generation), (4, 2));
    assert_eq!(manifests(&fixture, &session)[0], manifest);
    let third = generation(&session, 4, Some(manifest), None);
    assert_eq!(third.result().digest, undisturbed);
}

#[test]
fn the_result_is_a_model_with_the_digest_that_was_told() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let run = generation(&session, 2, None, None);
    assert_eq!(run.result().uri, url(&fixture.path("bucket/result")));
    let model = vicuna_model::load(&fixture.path("bucket/result")).unwrap();
    assert_eq!(vicuna_model::weights_digest(&model.tensors).unwrap(), run.result().digest);
    assert!(model.chat_template.is_some());
    // Someone who starts over from the last checkpoint only writes the result again.
    let newest = manifests(&fixture, &session).remove(0);
    assert_eq!(newest.step, STEPS);
    let again = generation(&session, 3, Some(newest), None);
    assert_eq!(again.result().digest, run.result().digest);
    assert!(again.watches[0].losses.lock().is_empty());
}

#[test]
fn periodic_checkpoints_do_not_change_the_weights_and_old_ones_go() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("plain")), 1, None, None);
    let mut job = fixture.job("often");
    job.checkpoint.interval_seconds = 0;
    job.checkpoint.keep = 1;
    let session = fixture.session(job);
    let run = generation(&session, 2, None, None);
    assert_eq!(run.result().digest, undisturbed.result().digest);
    assert_eq!(*run.watches[0].checkpoints.lock().last().unwrap(), STEPS);
    let left = manifests(&fixture, &session);
    assert_eq!(left.iter().map(|manifest| manifest.step).collect::<Vec<_>>(), [STEPS]);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_older_one_serves() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let (_, older) = generation(&session, 2, None, Some(2)).stopped();
    let (_, newer) = generation(&session, 2, Some(older.clone()), Some(4)).stopped();
    let store = Store::open(&url(&fixture.path("bucket"))).unwrap();
    let manifest = fixture.runtime.block_on(vicuna_checkpoint::manifest::open(&store, &newer)).unwrap();
    let damaged = &manifest.blocks[0].digest;
    let file = fixture.path("bucket/blocks").join(damaged);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let go = Control::default();
    go.go.cancel();
    let observer: Arc<dyn Observer> = Arc::new(Watch::default());
    let refused = generation_on_threads(&session, Some(newer), &[go], &[observer]).unwrap_err();
    assert!(refused.to_string().contains(damaged.as_str()), "{refused}");

    let undisturbed = generation(&fixture.session(fixture.job("plain")), 1, None, None);
    assert_eq!(generation(&session, 2, Some(older), None).result().digest, undisturbed.result().digest);
}

#[test]
fn a_checkpoint_of_another_recipe_is_not_taken() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let (_, manifest) = generation(&session, 1, None, Some(2)).stopped();
    let mut job = fixture.job("bucket");
    job.recipe.learning_rate = 2e-2;
    let go = Control::default();
    go.go.cancel();
    let observer: Arc<dyn Observer> = Arc::new(Watch::default());
    let refused = generation_on_threads(&fixture.session(job), Some(manifest), &[go], &[observer]).unwrap_err();
    assert!(refused.to_string().contains("another recipe"), "{refused}");
}

#[test]
fn abort_ends_all_ranks_without_a_checkpoint() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let controls = vec![Control::default(), Control::default()];
    let observers: Vec<Arc<dyn Observer>> = (0..2).map(|_| Arc::new(Watch::default()) as _).collect();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| generation_on_threads(&session, None, &controls, &observers));
        // Rank 0 trains and waits for rank 1, which never gets its Go.
        controls[0].go.cancel();
        controls.iter().for_each(|control| control.abort.cancel());
        assert!(run.join().unwrap().is_err());
    });
    assert!(manifests(&fixture, &session).is_empty());
}

#[test]
fn bad_input_is_named_with_its_cause() {
    use vicuna_protocol::coordinator::Cause;
    let fixture = Fixture::new();
    let attempt = |change: &dyn Fn(&mut TrainingJob)| {
        let mut job = fixture.job("bucket");
        change(&mut job);
        let place = Place { scratch: fixture.path("scratch"), device: Device::Cpu, threads: 1 };
        fixture.runtime.block_on(prepare(job, place)).unwrap_err()
    };
    let file = |name: &str, content: &str| {
        std::fs::write(fixture.path(name), content).unwrap();
        url(&fixture.path(name))
    };
    let (malformed, empty, no_model) =
        (file("bad.json", "[{\"id\": "), file("empty.json", ""), file("model.gguf", "GG"));

    let missing = attempt(&|job| job.dataset[0].from = url(&fixture.path("none.json")));
    assert_eq!(missing.cause, Cause::Data);
    assert!(missing.message.contains("none.json"), "{missing}");
    let bad = attempt(&|job| job.dataset[0].from = malformed.clone());
    assert!(bad.cause == Cause::Data && bad.message.contains("bad.json"), "{bad}");
    let nothing = attempt(&|job| job.dataset[0].from = empty.clone());
    assert!(nothing.cause == Cause::Data && nothing.message.contains("empty"), "{nothing}");
    let unreadable = attempt(&|job| job.model.from = no_model.clone());
    assert!(unreadable.cause == Cause::Model && unreadable.message.contains("model.gguf"), "{unreadable}");
    let template = attempt(&|job| job.model.template = Some("vicuna_v1.1".to_owned()));
    assert_eq!(template.cause, Cause::Model);
    let store = attempt(&|job| job.checkpoint.to = "nowhere://x".to_owned());
    assert_eq!(store.cause, Cause::Store);
    // Corrected data under the same name are read anew.
    std::fs::copy(fixture.path("data.json"), fixture.path("bad.json")).unwrap();
    let mut job = fixture.job("bucket");
    job.dataset[0].from = malformed;
    let place = Place { scratch: fixture.path("scratch"), device: Device::Cpu, threads: 1 };
    let deadline = Duration::from_secs(30);
    let corrected = fixture.runtime.block_on(async { tokio::time::timeout(deadline, prepare(job, place)).await });
    assert!(corrected.unwrap().is_ok());
}
