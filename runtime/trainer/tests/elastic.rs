//! The promise: the weights do not depend on how many ranks trained them, nor on stops in between.
//!
//! Real ranks in threads, real TCP on loopback, checkpoints on disk, the tiny model.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::{Fixture, STEPS, url};
use tch::Device;
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{Manifest, ManifestRef, Store, StoreError};
use vicuna_model::lora::Adapter;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::coordinator::{Holding, MemoryBase};
use vicuna_protocol::job::{
    Base, Lora, Method, Parameters, Precision, Recompute, Reproducibility, RopeScaling, RunLength, Scaling, TrainingJob,
};
use vicuna_trainer::checkpoint::Published;
use vicuna_trainer::collective::tcp::{Membership, Peer};
use vicuna_trainer::collective::{Collective, CollectiveError, Kind, Mesh, Network, Tag};
use vicuna_trainer::evaluation::{Evaluation, Stage};
use vicuna_trainer::generation::{Control, Finished, GenerationError, Next, Observer, Outcome, Start};
use vicuna_trainer::inputs;
use vicuna_trainer::local::{CallUp, called_up_on_threads, generation_on_threads};
use vicuna_trainer::log::{Line, What};
use vicuna_trainer::memory::agreement;
use vicuna_trainer::prepare::{Place, Session, prepare};
use vicuna_trainer::step::commit::Wishes;
use vicuna_trainer::step::{Committed, Engine, Peers, StepReport};
use vicuna_trainer::transfer;

fn manifests(fixture: &Fixture, session: &Session) -> Vec<ManifestRef> {
    fixture.runtime.block_on(session.manifests()).unwrap()
}

/// Records what happens, and may ask for the end.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    control: Control,
    losses: Mutex<Vec<f64>>,
    nexts: Mutex<Vec<Next>>,
    ready: Mutex<Option<String>>,
    checkpoints: Mutex<Vec<u64>>,
    /// Wishes for the end in the middle of this step's evaluation.
    stop_in_evaluation: Option<u64>,
    stages: Mutex<Vec<Stage>>,
    evaluations: Mutex<Vec<(u64, f64)>>,
}

impl Observer for Watch {
    fn ready(&self, state_digest: &str) {
        *self.ready.lock() = Some(state_digest.to_owned());
    }

    fn stepped(&self, report: &StepReport, next: Next) {
        self.losses.lock().push(report.loss);
        self.nexts.lock().push(next);
        // The wish travels with the next step's commit.
        if self.stop_after == Some(report.step + 1) {
            self.control.stop.cancel();
        }
    }

    fn evaluating(&self, stage: Stage) {
        self.stages.lock().push(stage);
        if self.stop_in_evaluation == Some(stage.step) {
            self.control.stop.cancel();
        }
    }

    fn evaluated(&self, evaluation: &Evaluation) {
        self.evaluations.lock().push((evaluation.step, evaluation.loss));
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
    memories: Vec<Option<Engine>>,
}

/// How a generation is to end.
#[derive(Clone, Copy)]
enum End {
    Complete,
    /// The last rank wishes it, with a checkpoint.
    Saved(u64),
    /// The last rank leaves.
    Left(u64),
    /// The last rank wishes it, and everybody stays.
    Paused(u64),
}

/// One generation from the base model or a checkpoint.
fn generation(session: &Arc<Session>, world: usize, base: Option<ManifestRef>, stop_after: Option<u64>) -> Run {
    let number = base.as_ref().map_or(0, |base| base.generation) + 1;
    let start = base.map_or(Start::Model, Start::Manifest);
    let memories = (0..world).map(|_| None).collect();
    continued(session, number, &start, memories, stop_after.map_or(End::Complete, End::Saved))
}

fn continued(session: &Arc<Session>, number: u64, start: &Start, memories: Vec<Option<Engine>>, end: End) -> Run {
    let mut memories = memories;
    let world = memories.len();
    let watches: Vec<Arc<Watch>> = (0..world).map(|rank| Arc::new(watch(start, end, rank == world - 1))).collect();
    let controls: Vec<Control> = watches.iter().map(|watch| watch.control.clone()).collect();
    let observers: Vec<Arc<dyn Observer>> = watches.iter().map(|watch| watch.clone() as _).collect();
    let outcomes = generation_on_threads(session, number, start, &controls, &observers, &mut memories).unwrap();
    let outcomes = outcomes.into_iter().map(Result::unwrap).collect();
    let ready: Vec<_> = watches.iter().map(|watch| watch.ready.lock().clone().unwrap()).collect();
    assert!(ready.iter().all(|digest| *digest == ready[0]), "{ready:?}");
    Run { outcomes, watches, memories }
}

fn watch(start: &Start, end: End, last: bool) -> Watch {
    let watch = Watch::default();
    watch.control.go.cancel();
    let stop_after = match end {
        End::Saved(step) | End::Left(step) | End::Paused(step) if last => Some(step),
        _ => None,
    };
    if stop_after == Some(start.step() + 1) {
        watch.control.stop.cancel();
    }
    match end {
        End::Saved(_) if last => watch.control.save.cancel(),
        End::Left(_) if last => watch.control.leave.cancel(),
        _ => {}
    }
    Watch { stop_after, ..watch }
}

/// What the coordinator says to the owners of these memories.
fn from_memory(session: &Session, memories: &[Option<Engine>]) -> Start {
    let holdings: Vec<_> = memories
        .iter()
        .map(|memory| memory.as_ref().map(|engine| transfer::holding(engine, &session.data)).unwrap_or_default())
        .collect();
    let step = holdings.iter().map(|holding| holding.step).max().unwrap();
    let ahead = memories.iter().flatten().find(|engine| engine.step == step).unwrap();
    let Committed { norm, updated } = ahead.committed;
    let covered = transfer::holders(&holdings, step, session.table.blocks.len());
    assert!(covered.iter().all(|holding| !holding.is_empty()), "every block is with somebody");
    Start::Memory { step, base: MemoryBase { updates: ahead.updates, norm, updated, holdings } }
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
fn in_bf16_too_sizes_and_stops_leave_no_trace() {
    let fixture = Fixture::new();
    let session = |bucket: &str| {
        let mut job = fixture.job(bucket);
        job.recipe.precision = Precision::Bf16;
        fixture.session(job)
    };
    let undisturbed = generation(&session("undisturbed"), 1, None, None);
    let losses = undisturbed.watches[0].losses.lock().clone();
    assert!(losses[STEPS as usize - 1] < losses[0], "it learns: {losses:?}");

    let disturbed = session("disturbed");
    let (_, manifest) = generation(&disturbed, 3, None, Some(2)).stopped();
    let resumed = generation(&disturbed, 2, Some(manifest), None);
    assert_eq!(resumed.result().digest, undisturbed.result().digest);
    let model = vicuna_model::load(&fixture.path("disturbed/result")).unwrap();
    assert_eq!(vicuna_model::weights_digest(&model.tensors).unwrap(), resumed.result().digest);
    let config = std::fs::read_to_string(fixture.path("disturbed/result/config.json")).unwrap();
    assert!(config.contains(r#""torch_dtype": "bfloat16""#), "{config}");
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
fn a_longer_context_is_in_the_result_s_configuration() {
    let fixture = Fixture::new();
    let mut job = fixture.job("bucket");
    job.recipe.rope_scaling = Some(RopeScaling { kind: Scaling::Linear, factor: 2.0 });
    let run = generation(&fixture.session(job), 1, None, None);
    let result = vicuna_model::load(&fixture.path("bucket/result")).unwrap();
    assert_eq!(result.config.rope_scaling, vicuna_model::RopeScaling::Linear { factor: 2.0 });
    assert_eq!(result.config.max_position, 1024);
    assert_eq!(vicuna_model::weights_digest(&result.tensors).unwrap(), run.result().digest);
}

#[test]
fn periodic_checkpoints_do_not_change_the_weights_and_old_ones_go() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("plain")), 1, None, None);
    let mut job = fixture.job("often");
    job.checkpoint.interval_seconds = Some(0);
    job.checkpoint.keep = 1;
    let session = fixture.session(job);
    let run = generation(&session, 2, None, None);
    assert_eq!(run.result().digest, undisturbed.result().digest);
    assert_eq!(*run.watches[0].checkpoints.lock().last().unwrap(), STEPS);
    // Whoever waits for steps knows that a copy comes before the next one.
    assert!(run.watches[1].nexts.lock().contains(&Next::Pause));
    let plain = undisturbed.watches[0].nexts.lock().clone();
    assert_eq!((&plain[..5], plain[5]), (&[Next::Step; 5][..], Next::End));
    let left = manifests(&fixture, &session);
    assert_eq!(left.iter().map(|manifest| manifest.step).collect::<Vec<_>>(), [STEPS]);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_older_one_serves() {
    type Damage = fn(&Path);
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("plain")), 1, None, None).result().digest.clone();
    let damages: [(&str, Damage); 3] = [
        ("flipped", |file| {
            let mut bytes = std::fs::read(file).unwrap();
            bytes[100] ^= 1;
            std::fs::write(file, bytes).unwrap();
        }),
        ("missing", |file| std::fs::remove_file(file).unwrap()),
        ("truncated", truncate),
    ];
    for (bucket, damage) in damages {
        let session = fixture.session(fixture.job(bucket));
        let (_, older) = generation(&session, 2, None, Some(2)).stopped();
        let (_, newer) = generation(&session, 2, Some(older.clone()), Some(4)).stopped();
        let store = Store::open(&url(&fixture.path(bucket))).unwrap();
        let manifest = fixture.runtime.block_on(vicuna_checkpoint::manifest::open(&store, &newer)).unwrap();
        let damaged = &manifest.blocks[0].digest;
        damage(&fixture.path(bucket).join("blocks").join(damaged));

        let refused = refusal(&session, newer);
        assert!(refused.contains(damaged.as_str()), "{bucket}: {refused}");
        assert_eq!(generation(&session, 2, Some(older), None).result().digest, undisturbed, "{bucket}");
    }
}

#[test]
fn a_manifest_that_is_cut_off_is_passed_over_for_the_one_before_it() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("plain")), 1, None, None).result().digest.clone();
    let session = fixture.session(fixture.job("bucket"));
    let (_, older) = generation(&session, 2, None, Some(2)).stopped();
    let (_, newer) = generation(&session, 2, Some(older.clone()), Some(4)).stopped();
    truncate(&fixture.path("bucket").join(&newer.key));
    assert_eq!(manifests(&fixture, &session), std::slice::from_ref(&older), "ranks do not tell of it");
    let refused = refusal(&session, newer.clone());
    assert!(refused.contains(&newer.key), "{refused}");
    assert_eq!(generation(&session, 2, Some(older), None).result().digest, undisturbed);
}

fn truncate(file: &Path) {
    let length = std::fs::metadata(file).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length / 2).unwrap();
}

/// What a rank says of a checkpoint that it does not take.
fn refusal(session: &Arc<Session>, base: ManifestRef) -> String {
    let go = Control::default();
    go.go.cancel();
    attempt(session, base, go, Arc::new(Watch::default())).unwrap_err().to_string()
}

fn attempt(
    session: &Arc<Session>,
    base: ManifestRef,
    control: Control,
    observer: Arc<dyn Observer>,
) -> Result<Outcome, GenerationError> {
    let start = Start::Manifest(base);
    generation_on_threads(session, 9, &start, &[control], &[observer], &mut [None]).unwrap().remove(0)
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
    let refused = attempt(&fixture.session(job), manifest, go, observer).unwrap_err();
    assert!(refused.to_string().contains("another recipe"), "{refused}");
}

#[test]
fn data_or_a_frozen_base_that_changed_under_their_uris_are_not_gone_on_with() {
    use vicuna_protocol::coordinator::Cause;
    let fixture = Fixture::new();
    let session = || fixture.session(adapter_job(&fixture, "bucket", &Method::LoRA(lora())));
    let (_, manifest) = generation(&session(), 1, None, Some(2)).stopped();
    let refused = || {
        let go = Control::default();
        go.go.cancel();
        let observer: Arc<dyn Observer> = Arc::new(Watch::default());
        match attempt(&session(), manifest.clone(), go, observer).unwrap_err() {
            GenerationError::Inputs(trouble) => trouble,
            other => panic!("{other}"),
        }
    };
    let data = std::fs::read(fixture.path("data.json")).unwrap();
    fixture.write_data(41);
    let trouble = refused();
    assert!(trouble.cause == Cause::Data && trouble.message.contains("the prepared data changed"), "{trouble}");
    assert!(trouble.message.contains("data.json") && trouble.message.contains(&manifest.key), "{trouble}");

    std::fs::write(fixture.path("data.json"), data).unwrap();
    fixture.write_model(12);
    let trouble = refused();
    assert!(trouble.cause == Cause::Model && trouble.message.contains("the frozen base model changed"), "{trouble}");

    fixture.write_model(11);
    assert!(generation(&session(), 1, Some(manifest), None).result().loss.is_finite());
}

/// What each rank of a generation with these sessions comes to.
fn on_ranks<T: Send>(sessions: &[Arc<Session>], work: impl Fn(&Session, Peers<'_>) -> T + Sync) -> Vec<T> {
    let networks: Vec<Network> = sessions.iter().map(|_| Network::listen("127.0.0.1:0").unwrap()).collect();
    let peer = |network: &Network| Peer { name: "rank".to_owned(), address: network.address().to_string() };
    let members: Vec<Peer> = networks.iter().map(peer).collect();
    std::thread::scope(|scope| {
        let run = |rank: usize| {
            let membership = Membership { generation: 1, rank, members: members.clone(), key: [7; 32] };
            let (network, session, work) = (&networks[rank], &sessions[rank], &work);
            scope.spawn(move || {
                let abort = CancellationToken::new();
                let mesh = Mesh::connect(network, &membership, 1 << 20, Duration::from_secs(30), &abort).unwrap();
                let done = work(session, Peers { collective: &mesh, abort: &abort });
                mesh.leave();
                done
            })
        };
        let threads: Vec<_> = (0..sessions.len()).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Whether each rank of a generation is content with what the others have read.
fn agreed(sessions: &[Arc<Session>], start: &Start, manifest: Option<&Manifest>) -> Vec<bool> {
    on_ranks(sessions, |session, peers| inputs::agree(session, start, manifest, peers).is_ok())
}

#[test]
fn a_rank_that_has_read_something_else_is_told_before_it_trains() {
    let fixture = Fixture::new();
    let most = fixture.session(fixture.job("bucket"));
    fixture.write_data(41);
    let odd = fixture.session(fixture.job("bucket"));
    let sessions = [&odd, &most, &most].map(Arc::clone);
    assert_eq!(agreed(&sessions, &Start::Model, None), [false, true, true]);
    assert_eq!(agreed(&sessions[..2], &Start::Model, None), [true, false]);
    assert_eq!(agreed(&sessions[1..], &Start::Model, None), [true, true]);
    // Who holds the state is right, however few they are.
    let holding = |blocks: &[u8]| Holding { lines: !blocks.is_empty(), step: 3, ..Holding::default() };
    let base = MemoryBase { holdings: vec![holding(&[0]), holding(&[]), holding(&[])], ..MemoryBase::default() };
    assert_eq!(agreed(&sessions, &Start::Memory { step: 3, base }, None), [true, false, false]);
}

#[test]
fn newcomers_do_not_outvote_who_has_read_what_the_checkpoint_was_written_with() {
    let fixture = Fixture::new();
    let right = fixture.session(fixture.job("bucket"));
    let (_, base) = generation(&right, 1, None, Some(2)).stopped();
    let store = Store::open(&url(&fixture.path("bucket"))).unwrap();
    let manifest = fixture.runtime.block_on(vicuna_checkpoint::manifest::open(&store, &base)).unwrap();
    fixture.write_data(41);
    let changed = fixture.session(fixture.job("bucket"));
    let sessions = [&changed, &right, &changed].map(Arc::clone);
    assert_eq!(agreed(&sessions, &Start::Manifest(base), Some(&manifest)), [false, true, false]);
}

#[test]
fn abort_ends_all_ranks_without_a_checkpoint() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let controls = vec![Control::default(), Control::default()];
    let observers: Vec<Arc<dyn Observer>> = (0..2).map(|_| Arc::new(Watch::default()) as _).collect();
    std::thread::scope(|scope| {
        let mut memories = [None, None];
        let (controls, observers, session) = (&controls, &observers, &session);
        let run = scope.spawn(move || {
            generation_on_threads(session, 1, &Start::Model, controls, observers, &mut memories).unwrap()
        });
        // Rank 0 trains and waits for rank 1, which never gets its Go.
        controls[0].go.cancel();
        controls.iter().for_each(|control| control.abort.cancel());
        assert!(run.join().unwrap().iter().all(Result::is_err));
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

#[test]
fn state_goes_from_memory_to_memory_and_leaves_no_trace_in_the_weights() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None);
    let session = fixture.session(fixture.job("disturbed"));

    // Three ranks, of which one leaves; two; five, of which three are newcomers; and then four.
    let first = continued(&session, 1, &Start::Model, vec![None, None, None], End::Left(2));
    let mut memories = first.memories;
    memories.truncate(2);
    let second = continued(&session, 2, &from_memory(&session, &memories), memories, End::Paused(3));
    let mut memories = second.memories;
    memories.extend([None, None, None]);
    let third = continued(&session, 3, &from_memory(&session, &memories), memories, End::Left(5));
    assert!(manifests(&fixture, &session).is_empty(), "nothing went through the store");
    assert!(third.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Stopped { step: 5, manifest: None })));
    let mut memories = third.memories;
    memories.truncate(4);
    let last = continued(&session, 4, &from_memory(&session, &memories), memories, End::Complete);
    assert_eq!(last.result().digest, undisturbed.result().digest);

    let losses = |run: &Run| run.watches[0].losses.lock().clone();
    assert_eq!(losses(&last), losses(&undisturbed)[5..], "losses are the same bits, too");
}

fn lora() -> Lora {
    Lora { rank: 4, alpha: 8.0, dropout: 0.1, targets: vec!["q_proj".to_owned(), "down_proj".to_owned()] }
}

fn adapter_job(fixture: &Fixture, bucket: &str, method: &Method) -> TrainingJob {
    let mut job = fixture.job(bucket);
    job.recipe.method = method.clone();
    job
}

#[test]
fn adapters_are_the_same_bits_for_every_number_of_ranks_and_whatever_happens() {
    let fixture = Fixture::new();
    let methods = [Method::LoRA(lora()), Method::QLoRA(lora(), Base::Nf4), Method::QLoRA(lora(), Base::Int8)];
    let mut digests = Vec::new();
    for (index, method) in methods.iter().enumerate() {
        let session = |name: &str| fixture.session(adapter_job(&fixture, &format!("{name}-{index}"), method));
        let losses = |run: &Run| run.watches[0].losses.lock().clone();
        let undisturbed = generation(&session("undisturbed"), 1, None, None);
        let (expected, curve) = (undisturbed.result().digest.clone(), losses(&undisturbed));
        assert!(curve[STEPS as usize - 1] < curve[0], "{method:?} learns: {curve:?}");
        for world in [2, 3] {
            let run = generation(&session(&format!("bucket-{world}")), world, None, None);
            assert_eq!((&run.result().digest, &losses(&run)), (&expected, &curve), "{method:?}, {world} ranks");
        }

        // Of three ranks one leaves; two, of which one is lost in a step; another joins; a checkpoint; one rank
        // that resumes from it in another session.
        let disturbed = session("disturbed");
        let mut memories = after_leave_and_loss(&disturbed);
        let start = from_memory(&disturbed, &memories);
        memories.push(None);
        let joined = from_memory(&disturbed, &memories);
        assert_eq!(start.step(), joined.step());
        let (step, manifest) = continued(&disturbed, 3, &joined, memories, End::Saved(5)).stopped();
        assert_eq!(step, 5);
        let resumed = generation(&session("disturbed"), 1, Some(manifest), None);
        assert_eq!(resumed.result().digest, expected, "{method:?} after leave, loss, join and resume");
        assert_eq!(losses(&resumed), curve[5..]);
        digests.push(expected);
    }
    digests.dedup();
    assert_eq!(digests.len(), methods.len(), "the base's precision makes a difference");
}

#[test]
fn packed_conversations_train_the_same_bits_for_every_number_of_ranks() {
    let fixture = Fixture::new();
    for (index, method) in [Method::Full, Method::LoRA(lora())].iter().enumerate() {
        let digests = [("one", 1), ("three", 3)].map(|(bucket, world)| {
            let mut job = adapter_job(&fixture, &format!("{bucket}-{index}"), method);
            job.recipe.packing = true;
            job.recipe.max_length = 512;
            let session = fixture.session(job);
            let encoded = session.data_report.encoded.as_ref().unwrap();
            assert!(encoded.rows > 0 && encoded.rows * 2 < encoded.sequences, "{encoded}");
            generation(&session, world, None, None).result().digest.clone()
        });
        assert_eq!(digests[0], digests[1]);
    }
}

#[test]
fn keeping_layers_instead_of_running_them_again_changes_no_bit() {
    let fixture = Fixture::new();
    for (index, method) in [Method::Full, Method::LoRA(lora())].iter().enumerate() {
        let digest = |recompute: Recompute, ranks: usize| {
            let mut job = adapter_job(&fixture, &format!("bucket-{index}-{recompute:?}-{ranks}"), method);
            job.recipe.recompute = recompute;
            generation(&fixture.session(job), ranks, None, None).result().digest.clone()
        };
        let expected = digest(Recompute::Always, 1);
        for ranks in [1, 2] {
            assert_eq!(digest(Recompute::Never, ranks), expected, "{method:?}, {ranks} ranks");
        }
    }
}

/// Of three ranks one leaves; of the two that stay one is lost in a step. What the last one holds.
fn after_leave_and_loss(session: &Arc<Session>) -> Vec<Option<Engine>> {
    let mut memories = continued(session, 1, &Start::Model, vec![None, None, None], End::Left(1)).memories;
    memories.truncate(2);
    let start = from_memory(session, &memories);
    let mut memories = continued(session, 2, &start, memories, End::Paused(2)).memories;
    broken_step(session, &mut memories, Kind::Commit);
    assert_eq!(steps_of(&memories), [3, 2]);
    memories.truncate(1);
    memories
}

/// A training with held-out sequences and these weights.
fn weights_of(fixture: &Fixture, bucket: &str, parameters: Parameters, precision: Precision) -> Arc<Session> {
    let mut job = fixture.job(bucket);
    (job.recipe.parameters, job.recipe.precision) = (parameters, precision);
    job.prepare.hold_out = Some(0.5);
    job.recipe.evaluate_every = Some(2);
    fixture.session(job)
}

#[test]
fn sharded_weights_train_the_bits_of_replicated_ones_whatever_happens() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let fixture = Fixture::new();
        let session = |bucket: &str, parameters| weights_of(&fixture, bucket, parameters, precision);
        let seen = |run: &Run| (run.watches[0].losses.lock().clone(), evaluations(run, 0));
        let replicated = generation(&session("replicated", Parameters::Replicated), 1, None, None);
        let expected = (replicated.result().digest.clone(), seen(&replicated));
        for world in [1, 2, 3, 4, 9] {
            let run = generation(&session(&format!("bucket-{world}"), Parameters::Sharded), world, None, None);
            assert_eq!((run.result().digest.clone(), seen(&run)), expected, "{precision:?}, {world} ranks");
        }

        // Of three ranks one leaves; two, of which one is lost in a step; two others join; a checkpoint; one rank with
        // all weights goes on from it.
        let disturbed = session("disturbed", Parameters::Sharded);
        let mut memories = after_leave_and_loss(&disturbed);
        memories.extend([None, None]);
        let start = from_memory(&disturbed, &memories);
        let (step, manifest) = continued(&disturbed, 3, &start, memories, End::Saved(4)).stopped();
        assert_eq!(step, 4);
        let resumed = generation(&session("disturbed", Parameters::Replicated), 1, Some(manifest), None);
        assert_eq!(resumed.result().digest, expected.0, "{precision:?} after leave, loss, join and resume");
    }
}

#[test]
fn from_one_generation_to_the_next_weights_may_become_sharded_and_whole_again() {
    let fixture = Fixture::new();
    let [replicated, sharded] = [Parameters::Replicated, Parameters::Sharded]
        .map(|parameters| weights_of(&fixture, "bucket", parameters, Precision::Bf16));
    let undisturbed = weights_of(&fixture, "undisturbed", Parameters::Replicated, Precision::Bf16);
    let undisturbed = generation(&undisturbed, 1, None, None).result().digest.clone();
    let memories = continued(&replicated, 1, &Start::Model, vec![None, None], End::Paused(1)).memories;
    assert!(memories.iter().flatten().all(Engine::has_weights));
    let start = from_memory(&sharded, &memories);
    let mut memories = continued(&sharded, 2, &start, memories, End::Paused(3)).memories;
    assert!(!memories.iter().flatten().any(Engine::has_weights));
    memories.push(None);
    let start = from_memory(&replicated, &memories);
    assert_eq!(continued(&replicated, 3, &start, memories, End::Complete).result().digest, undisturbed);
}

#[test]
fn sharded_adapters_and_layers_that_are_kept_are_the_same_bits() {
    let fixture = Fixture::new();
    let methods = [Method::Full, Method::LoRA(lora()), Method::QLoRA(lora(), Base::Nf4)];
    for (index, method) in methods.iter().enumerate() {
        let digest = |parameters: Parameters, recompute: Recompute, ranks: usize| {
            let mut job = adapter_job(&fixture, &format!("{index}-{parameters:?}-{recompute:?}-{ranks}"), method);
            (job.recipe.parameters, job.recipe.recompute) = (parameters, recompute);
            generation(&fixture.session(job), ranks, None, None).result().digest.clone()
        };
        let expected = digest(Parameters::Replicated, Recompute::Always, 1);
        for (recompute, ranks) in [(Recompute::Always, 3), (Recompute::Never, 1), (Recompute::Never, 3)] {
            assert_eq!(digest(Parameters::Sharded, recompute, ranks), expected, "{method:?}, {recompute:?}, {ranks}");
        }
    }
}

#[test]
fn a_rank_that_needs_sharded_weights_has_all_shard_them() {
    let fixture = Fixture::new();
    let [whole, part] = [Parameters::Replicated, Parameters::Sharded]
        .map(|parameters| weights_of(&fixture, "bucket", parameters, Precision::Fp32));
    let sharded = |sessions: &[&Arc<Session>]| {
        let sessions: Vec<Arc<Session>> = sessions.iter().map(|session| Arc::clone(session)).collect();
        on_ranks(&sessions, |session, peers| agreement::agree(session, 3, peers).unwrap().sharded)
    };
    assert_eq!(sharded(&[&whole, &whole, &part]), [true; 3]);
    assert_eq!(sharded(&[&whole, &whole]), [false; 2]);
}

#[test]
fn offloaded_inputs_change_no_bit_on_a_gpu_and_are_refused_on_a_cpu() {
    let fixture = Fixture::new();
    let job = |bucket: &str, offload| {
        let mut job = fixture.job(bucket);
        (job.recipe.offload, job.recipe.recompute) = (offload, Recompute::Always);
        job
    };
    let plain = fixture.session(job("plain", false));
    if plain.device.is_cuda() {
        let digest = |session| generation(&session, 2, None, None).result().digest.clone();
        assert_eq!(digest(fixture.session(job("offloaded", true))), digest(plain));
        return;
    }
    let place = Place { scratch: fixture.path("scratch"), device: plain.device, threads: 1 };
    let trouble = fixture.runtime.block_on(prepare(job("offloaded", true), place)).unwrap_err();
    assert!(trouble.message.contains("memory.offload") && trouble.message.contains("GPU"), "{trouble}");
}

#[test]
fn where_bits_may_differ_a_training_survives_what_befalls_it_and_is_another_recipe() {
    let fixture = Fixture::new();
    let job = |bucket: &str| {
        let mut job = fixture.job(bucket);
        job.recipe.reproducibility = Reproducibility::Fast;
        job
    };
    let session = fixture.session(job("bucket"));
    let mut memories = continued(&session, 1, &Start::Model, vec![None, None, None], End::Left(2)).memories;
    memories.truncate(2);
    let start = from_memory(&session, &memories);
    let (step, manifest) = continued(&session, 2, &start, memories, End::Saved(4)).stopped();
    assert_eq!(step, 4);
    // Elsewhere it may be taken for exact only by another recipe's name.
    let go = Control::default();
    go.go.cancel();
    let exact = fixture.session(fixture.job("bucket"));
    let refused = attempt(&exact, manifest.clone(), go, Arc::new(Watch::default())).unwrap_err();
    assert!(refused.to_string().contains("another recipe"), "{refused}");
    let last = generation(&session, 2, Some(manifest), None);
    assert_whole(&fixture.runtime.block_on(session.log()).unwrap());
    assert!(last.result().loss.is_finite());
}

#[test]
fn of_adapters_only_the_adapters_are_checkpointed_and_the_result() {
    let fixture = Fixture::new();
    let session = fixture.session(adapter_job(&fixture, "bucket", &Method::QLoRA(lora(), Base::Nf4)));
    let run = generation(&session, 2, None, None);
    let store = Store::open(&url(&fixture.path("bucket"))).unwrap();
    let newest = manifests(&fixture, &session).remove(0);
    let manifest = fixture.runtime.block_on(vicuna_checkpoint::manifest::open(&store, &newest)).unwrap();
    let bytes: u64 = manifest.blocks.iter().map(|block| block.bytes).sum();
    // q_proj 64 → 64 and down_proj 128 → 64 in two layers, with both moments.
    assert_eq!(bytes, 12 * 2 * 4 * (64 + 64 + 128 + 64));

    let result = fixture.path("bucket/result");
    let adapter = Adapter::load(&result).unwrap();
    assert_eq!((adapter.base, adapter.scale), (session.job.model.from.clone(), 2.0));
    let base = vicuna_model::load(&fixture.path("model")).unwrap();
    let adapted = vicuna_model::load_adapted(&fixture.path("model"), &result).unwrap();
    assert!(adapted.chat_template.is_some());
    for (name, tensor) in &adapted.tensors {
        let changes = name.contains("q_proj") || name.contains("down_proj");
        assert_eq!(*tensor != base.tensors[name], changes, "{name}");
    }
    let merged = fixture.path("merged");
    vicuna_model::lora::merge(&fixture.path("model"), &result, &merged).unwrap();
    let merged = vicuna_model::load(&merged).unwrap();
    let digest = |model: &vicuna_model::Pretrained| vicuna_model::weights_digest(&model.tensors).unwrap();
    assert_eq!(digest(&merged), digest(&adapted));
    assert_ne!(run.result().digest, digest(&merged), "the digest that was told is the adapter's");
}

#[test]
fn a_target_that_no_layer_has_is_refused_by_name() {
    let fixture = Fixture::new();
    let targets = vec!["query".to_owned()];
    let job = adapter_job(&fixture, "bucket", &Method::LoRA(Lora { targets, ..lora() }));
    let place = Place { scratch: fixture.path("scratch"), device: Device::Cpu, threads: 1 };
    let trouble = fixture.runtime.block_on(prepare(job, place)).unwrap_err();
    assert!(trouble.message.contains("recipe.lora") && trouble.message.contains("\"query\""), "{trouble}");
}

/// The first generation of four ranks, of which some leave after the first step.
fn left_by(session: &Arc<Session>, leavers: usize) -> (Vec<Outcome>, Vec<Option<Engine>>) {
    let controls: Vec<Control> = (0..4).map(|_| Control::default()).collect();
    controls.iter().for_each(|control| control.go.cancel());
    controls[..leavers].iter().for_each(|control| control.leave.cancel());
    controls[0].stop.cancel();
    let observers: Vec<Arc<dyn Observer>> = (0..4).map(|_| Arc::new(Watch::default()) as _).collect();
    let mut memories: Vec<Option<Engine>> = (0..4).map(|_| None).collect();
    let outcomes = generation_on_threads(session, 1, &Start::Model, &controls, &observers, &mut memories).unwrap();
    (outcomes.into_iter().map(Result::unwrap).collect(), memories)
}

#[test]
fn several_ranks_may_leave_at_once() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None).result().digest.clone();
    let session = fixture.session(fixture.job("disturbed"));
    let (outcomes, mut memories) = left_by(&session, 3);
    assert!(outcomes.iter().all(|one| matches!(one, Outcome::Stopped { step: 1, manifest: None })), "{outcomes:?}");
    // Only the last one stays, and has everything.
    let rest = vec![memories.pop().unwrap()];
    let start = from_memory(&session, &rest);
    assert_eq!(continued(&session, 2, &start, rest, End::Complete).result().digest, undisturbed);
}

#[test]
fn when_everybody_leaves_the_store_keeps_the_state() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    for outcome in left_by(&session, 4).0 {
        assert!(matches!(outcome, Outcome::Stopped { step: 1, manifest: Some(manifest) } if manifest.step == 1));
    }
}

#[test]
fn ranks_that_come_together_only_to_write_down_what_they_hold_train_no_step() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None).result().digest.clone();
    let session = fixture.session(fixture.job("disturbed"));
    let paused = continued(&session, 1, &Start::Model, vec![None, None], End::Paused(3)).memories;
    assert!(manifests(&fixture, &session).is_empty());

    let (outcomes, memories) = called_up(&session, Purpose::Save, &[false, true], paused);
    for outcome in outcomes {
        assert!(matches!(outcome, Ok(Outcome::Stopped { step: 3, manifest: Some(manifest) }) if manifest.step == 3));
    }
    let base = manifests(&fixture, &session).remove(0);
    // Asserts that every block is there.
    from_memory(&session, &memories[..1]);
    drop(memories);
    assert_eq!(generation(&session, 3, Some(base), None).result().digest, undisturbed);
}

/// A second generation that trains no step. The first rank hears of the end, the others of the beginning.
fn called_up(
    session: &Arc<Session>,
    purpose: Purpose,
    leaves: &[bool],
    memories: Vec<Option<Engine>>,
) -> (Vec<Result<Outcome, GenerationError>>, Vec<Option<Engine>>) {
    let mut memories = memories;
    let controls: Vec<Control> = memories.iter().map(|_| Control::default()).collect();
    controls[0].stop.cancel();
    controls[1..].iter().for_each(|control| control.go.cancel());
    let observers: Vec<Arc<dyn Observer>> = memories.iter().map(|_| Arc::new(Watch::default()) as _).collect();
    let (start, leaves) = (from_memory(session, &memories), leaves.to_vec());
    let call_up = CallUp { generation: 2, start, purpose, leaves };
    (called_up_on_threads(session, &call_up, &controls, &observers, &mut memories).unwrap(), memories)
}

#[test]
fn what_only_leavers_hold_is_handed_over_without_a_step() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None).result().digest.clone();
    // Those leave who share blocks; the last one is a newcomer, who stays with one who trained, or alone.
    for (index, leaves) in [[true, true, false, false], [true, true, true, false]].iter().enumerate() {
        let session = fixture.session(fixture.job(&format!("disturbed-{index}")));
        let mut memories = continued(&session, 1, &Start::Model, vec![None, None, None], End::Paused(3)).memories;
        memories.push(None);
        let (outcomes, memories) = called_up(&session, Purpose::HandOver, leaves, memories);
        for outcome in outcomes {
            assert!(matches!(outcome, Ok(Outcome::Stopped { step: 3, manifest: None })), "{outcome:?}");
        }
        let staying = memories.into_iter().zip(leaves).filter(|(_, leaves)| !**leaves).map(|(memory, _)| memory);
        let staying: Vec<Option<Engine>> = staying.collect();
        let start = from_memory(&session, &staying);
        assert_eq!(start.step(), 3);
        assert_eq!(continued(&session, 3, &start, staying, End::Complete).result().digest, undisturbed);
        assert_eq!(manifests(&fixture, &session).len(), 1, "but for the last one nothing went through the store");
        assert_whole(&fixture.runtime.block_on(session.log()).unwrap());
    }
}

#[test]
fn what_is_written_down_where_too_few_stay_goes_to_those_who_stay_too() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let controls: Vec<Control> = (0..4).map(|_| Control::default()).collect();
    controls.iter().for_each(|control| control.go.cancel());
    controls[..3].iter().for_each(|control| control.leave.cancel());
    controls[0].stop.cancel();
    controls[0].save.cancel();
    let observers: Vec<Arc<dyn Observer>> = (0..4).map(|_| Arc::new(Watch::default()) as _).collect();
    let mut memories: Vec<Option<Engine>> = (0..4).map(|_| None).collect();
    let outcomes = generation_on_threads(&session, 1, &Start::Model, &controls, &observers, &mut memories).unwrap();
    for outcome in outcomes {
        assert!(matches!(outcome, Ok(Outcome::Stopped { step: 1, manifest: Some(manifest) }) if manifest.step == 1));
    }
    // Asserts that every block is there.
    from_memory(&session, &[memories.pop().unwrap()]);
}

/// Loses its peer at a chosen message.
struct Breaks<'a> {
    mesh: &'a Mesh,
    at: Option<(Kind, u64)>,
    /// Commits that have arrived anywhere.
    commits: &'a AtomicUsize,
}

impl Collective for Breaks<'_> {
    fn rank(&self) -> usize {
        self.mesh.rank()
    }

    fn world(&self) -> usize {
        self.mesh.world()
    }

    fn send(&self, to: usize, tag: Tag, payload: &[u8]) -> Result<(), CollectiveError> {
        self.mesh.send(to, tag, payload)
    }

    fn receive(
        &self,
        from: usize,
        tag: Tag,
        cancel: &tokio_util::sync::CancellationToken,
    ) -> Result<Vec<u8>, CollectiveError> {
        if self.at == Some((tag.kind, tag.step)) {
            return Err(CollectiveError::Lost { peer: format!("rank {from}"), detail: "the test".to_owned() });
        }
        let received = self.mesh.receive(from, tag, cancel)?;
        self.commits.fetch_add(usize::from(tag.kind == Kind::Commit), Ordering::SeqCst);
        Ok(received)
    }
}

/// One more step of these ranks; the last one breaks at `at`.
fn broken_step(session: &Session, memories: &mut [Option<Engine>], at: Kind) {
    let world = memories.len();
    let networks: Vec<Network> = (0..world).map(|_| Network::listen("127.0.0.1:0").unwrap()).collect();
    let peer = |network: &Network| Peer { name: "peer".to_owned(), address: network.address().to_string() };
    let members: Vec<Peer> = networks.iter().map(peer).collect();
    let abort = tokio_util::sync::CancellationToken::new();
    let commits = AtomicUsize::new(0);
    // Nobody goes before the others have what was still sent to them.
    let sent = if at == Kind::Commit { (world - 1) * (world - 1) } else { 0 };
    std::thread::scope(|scope| {
        for (rank, memory) in memories.iter_mut().enumerate() {
            let (members, network, abort, commits) = (members.clone(), &networks[rank], &abort, &commits);
            scope.spawn(move || {
                let engine = memory.as_mut().unwrap();
                let membership = Membership { generation: 7, rank, members, key: [7; 32] };
                let mesh = Mesh::connect(network, &membership, 1 << 30, Duration::from_secs(30), abort).unwrap();
                let at = (rank == world - 1).then_some((at, engine.step + 1));
                let collective = Breaks { mesh: &mesh, at, commits };
                let peers = Peers { collective: &collective, abort };
                let made = engine.advance(&session.job.recipe, &session.data, peers, &Wishes::default);
                assert!(rank < world - 1 || made.is_err());
                if let Ok(report) = made {
                    // As a generation does after each step.
                    engine.log.stepped(&report, session.data.epochs_done(report.step));
                }
                let deadline = Instant::now() + Duration::from_secs(60);
                while commits.load(Ordering::SeqCst) < sent {
                    assert!(Instant::now() < deadline, "the others do not commit");
                    std::thread::yield_now();
                }
                if rank == world - 1 {
                    abort.cancel();
                }
            });
        }
    });
}

fn steps_of(memories: &[Option<Engine>]) -> Vec<u64> {
    memories.iter().flatten().map(|engine| engine.step).collect()
}

#[test]
fn a_rank_that_missed_the_commit_follows_those_who_have_it() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None).result().digest.clone();
    let session = fixture.session(fixture.job("disturbed"));
    for survivors in [0..2, 0..3, 1..3] {
        let mut memories = continued(&session, 1, &Start::Model, vec![None, None, None], End::Paused(2)).memories;
        // The last rank sends its own commit, and does not get the others'.
        broken_step(&session, &mut memories, Kind::Commit);
        assert_eq!(steps_of(&memories), [3, 3, 2]);
        let rest: Vec<_> = memories.drain(survivors).collect();
        let start = from_memory(&session, &rest);
        assert_eq!(start.step(), 3, "a step that anybody committed is not lost");
        assert_eq!(continued(&session, 2, &start, rest, End::Complete).result().digest, undisturbed);
    }
}

#[test]
fn a_step_that_nobody_committed_is_made_again() {
    let fixture = Fixture::new();
    let undisturbed = generation(&fixture.session(fixture.job("undisturbed")), 1, None, None).result().digest.clone();
    let session = fixture.session(fixture.job("disturbed"));
    let mut memories = continued(&session, 1, &Start::Model, vec![None, None], End::Paused(2)).memories;
    // Without the gradients that it is twin of the last rank cannot vouch for them.
    broken_step(&session, &mut memories, Kind::Gradient);
    assert_eq!(steps_of(&memories), [2, 2]);
    let survivor = vec![memories.remove(0)];
    let start = from_memory(&session, &survivor);
    assert_eq!(start.step(), 2);
    assert_eq!(continued(&session, 2, &start, survivor, End::Complete).result().digest, undisturbed);
}

/// More held-out sequences than a round takes.
fn evaluating(fixture: &Fixture, bucket: &str) -> Arc<Session> {
    let mut job = fixture.job(bucket);
    job.prepare.hold_out = Some(0.5);
    job.recipe.evaluate_every = Some(2);
    let session = fixture.session(job);
    assert!(session.held_out.len() > 14, "{}", session.held_out.len());
    session
}

fn evaluations(run: &Run, rank: usize) -> Vec<(u64, f64)> {
    run.watches[rank].evaluations.lock().clone()
}

#[test]
fn the_held_out_loss_has_the_same_bits_for_every_number_of_ranks_and_falls() {
    let fixture = Fixture::new();
    let alone = generation(&evaluating(&fixture, "bucket-1"), 1, None, None);
    let losses = evaluations(&alone, 0);
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [2, 4, 6]);
    assert!(losses[2].1 < losses[0].1, "{losses:?}");
    for world in [2, 3, 9] {
        let run = generation(&evaluating(&fixture, &format!("bucket-{world}")), world, None, None);
        assert_eq!(run.result().digest, alone.result().digest);
        assert!((0..world).all(|rank| evaluations(&run, rank) == losses), "{world} ranks");
    }
}

#[test]
fn evaluating_does_not_change_the_weights() {
    let fixture = Fixture::new();
    let with = generation(&evaluating(&fixture, "with"), 2, None, None);
    let mut job = fixture.job("without");
    job.prepare.hold_out = Some(0.5);
    let session = fixture.session(job);
    assert!(!session.evaluates_after(1) && session.evaluates_after(STEPS));
    assert_eq!(generation(&session, 2, None, None).result().digest, with.result().digest);
}

#[test]
fn an_evaluation_that_a_leaver_ends_is_made_by_those_who_stay() {
    let fixture = Fixture::new();
    let undisturbed = generation(&evaluating(&fixture, "undisturbed"), 1, None, None);
    let session = evaluating(&fixture, "disturbed");
    let watches: Vec<Arc<Watch>> = (0..3).map(|_| Arc::new(watch(&Start::Model, End::Complete, false))).collect();
    let last = Arc::new(Watch { stop_in_evaluation: Some(2), ..watch(&Start::Model, End::Left(99), true) });
    let watches = [&watches[..2], &[last]].concat();
    let controls: Vec<Control> = watches.iter().map(|watch| watch.control.clone()).collect();
    let observers: Vec<Arc<dyn Observer>> = watches.iter().map(|watch| watch.clone() as _).collect();
    let mut memories = vec![None, None, None];
    let outcomes = generation_on_threads(&session, 1, &Start::Model, &controls, &observers, &mut memories).unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(Outcome::Stopped { step: 2, manifest: None }))));
    assert!(watches.iter().all(|watch| watch.evaluations.lock().is_empty()));
    assert!(!watches[0].stages.lock().is_empty(), "it was under way");

    memories.truncate(2);
    let start = from_memory(&session, &memories);
    let rest = continued(&session, 2, &start, memories, End::Complete);
    assert_eq!(evaluations(&rest, 1), evaluations(&undisturbed, 0));
    assert_eq!(rest.result().digest, undisturbed.result().digest);
}

/// A file of the published test data: in `VICUNA_TEST_DATA`, which then has it, or in the folder beside the repository.
fn test_data(file: &str) -> Option<PathBuf> {
    let named = std::env::var_os("VICUNA_TEST_DATA").map(PathBuf::from);
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let path = named.clone().unwrap_or_else(beside).join(file);
    if !path.exists() {
        assert!(named.is_none(), "VICUNA_TEST_DATA is set, and {} is not there", path.display());
        eprintln!("skipped: {} is absent; VICUNA_TEST_DATA names where it is", path.display());
        return None;
    }
    Some(path.canonicalize().unwrap())
}

/// Published conversations.
#[test]
fn real_conversations_are_prepared_and_learned_and_the_held_out_loss_falls() {
    let Some(path) = test_data("conversations/dummy_conversation.json") else { return };
    let fixture = Fixture::new();
    let mut job = fixture.job("bucket");
    job.dataset[0].from = url(&path);
    job.prepare.clean = true;
    job.prepare.hold_out = Some(0.1);
    job.recipe.length = vicuna_protocol::job::RunLength::Epochs(2);
    let session = fixture.session(job);
    let run = Run { memories: Vec::new(), ..continued(&session, 1, &Start::Model, vec![None, None], End::Complete) };
    let losses = evaluations(&run, 0);
    assert_eq!(losses.len(), 2, "one an epoch: {losses:?}");
    assert!(losses[1].1 < losses[0].1, "{losses:?}");
}

/// Each step once, in order, whatever happened.
fn assert_whole(log: &[Line]) {
    let steps: Vec<u64> = log.iter().filter(|line| matches!(line.what, What::Step(_))).map(|line| line.step).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
}

#[test]
fn a_newcomer_has_the_lines_that_are_not_in_the_store_yet() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let mut memories = continued(&session, 1, &Start::Model, vec![None, None], End::Paused(2)).memories;
    memories.push(None);
    let start = from_memory(&session, &memories);
    let memories = continued(&session, 2, &start, memories, End::Paused(3)).memories;
    let [old, new] = [0, 2].map(|rank| memories[rank].as_ref().unwrap());
    let steps = |engine: &Engine| engine.log.lines().iter().map(|line| line.step).collect::<Vec<u64>>();
    assert_eq!((steps(old), steps(new)), (vec![1, 2, 3], vec![1, 2, 3]));
    assert!(vicuna_trainer::transfer::holding(new, &session.data).lines, "it may be the one who writes them down");
}

#[test]
fn every_step_is_in_the_log_once_whoever_leaves() {
    let fixture = Fixture::new();
    let session = evaluating(&fixture, "bucket");
    let first = continued(&session, 1, &Start::Model, vec![None, None, None], End::Paused(2));
    // The scribe is lost without a word, and with it nothing.
    let mut memories = first.memories;
    memories.remove(0);
    memories.push(None);
    let second = continued(&session, 2, &from_memory(&session, &memories), memories, End::Left(3));
    let mut memories = second.memories;
    memories.truncate(2);
    memories.insert(0, None);
    let last = continued(&session, 3, &from_memory(&session, &memories), memories, End::Complete);
    let log = fixture.runtime.block_on(session.log()).unwrap();
    assert_whole(&log);
    let evaluated: Vec<u64> =
        log.iter().filter(|line| matches!(line.what, What::Evaluation(_))).map(|line| line.step).collect();
    assert_eq!(evaluated, [2, 4, 6]);
    let ranks = |at: usize| {
        log.iter().find_map(|line| match &line.what {
            What::Step(step) if line.step == at as u64 => Some(step.ranks),
            _ => None,
        })
    };
    assert_eq!([1, 3, 4].map(ranks), [Some(3), Some(3), Some(3)]);

    let result = fixture.path("bucket/result");
    let card = std::fs::read_to_string(result.join("README.md")).unwrap();
    let digest = &last.result().digest;
    assert!(card.contains(digest.as_str()) && card.contains(&session.recipe_digest), "{card}");
    assert!(card.contains("license: unknown") && card.contains("loss on the held-out conversations"), "{card}");
    assert!(std::fs::read_to_string(result.join("loss.svg")).unwrap().contains("<polyline"));
    let report = std::fs::read_to_string(result.join("data-report.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&report).unwrap()["records"], 40);
    assert!(fixture.path("bucket/data-report.json").exists());
}

/// Whatever the seed draws befalls the run: ranks leave, join and are lost in the midst of a step, and all of it goes through
/// the store.
fn disturbed(session: &Arc<Session>, random: &mut StdRng) -> Run {
    let newcomers = |count: usize| (0..count).map(|_| None).collect::<Vec<Option<Engine>>>();
    let mut memories = newcomers(random.random_range(1..4));
    let mut start = Start::Model;
    for number in 1.. {
        if start.step() + 1 >= STEPS {
            return continued(session, number, &start, memories, End::Complete);
        }
        let (world, to) = (memories.len(), random.random_range(start.step() + 1..STEPS));
        match random.random_range(0..4) {
            0 if world > 1 => {
                memories = continued(session, number, &start, memories, End::Left(to)).memories;
                memories.truncate(world - 1);
            }
            1 if world > 1 => {
                memories = continued(session, number, &start, memories, End::Paused(to)).memories;
                let at = if random.random() { Kind::Commit } else { Kind::Gradient };
                broken_step(session, &mut memories, at);
                memories.remove(random.random_range(0..world));
            }
            2 => {
                let (_, manifest) = continued(session, number, &start, memories, End::Saved(to)).stopped();
                memories = newcomers(random.random_range(1..4));
                start = Start::Manifest(manifest);
                continue;
            }
            _ => {
                memories = continued(session, number, &start, memories, End::Paused(to)).memories;
                memories.extend(newcomers(random.random_range(1..3)));
            }
        }
        start = from_memory(session, &memories);
    }
    unreachable!("each generation makes a step")
}

#[test]
fn whatever_befalls_a_run_its_weights_moments_and_log_are_those_of_the_undisturbed_one() {
    let fixture = Fixture::new();
    // What the last checkpoint holds, block by block, and the log's losses.
    let traces = |bucket: &str, session: &Arc<Session>, run: &Run| {
        let store = Store::open(&url(&fixture.path(bucket))).unwrap();
        let newest = manifests(&fixture, session).remove(0);
        let manifest = fixture.runtime.block_on(vicuna_checkpoint::manifest::open(&store, &newest)).unwrap();
        let losses = fixture.runtime.block_on(session.log()).unwrap().into_iter().filter_map(|line| match line.what {
            What::Step(step) => Some((line.step, step.loss.unwrap().to_bits())),
            What::Evaluation(_) => None,
        });
        (newest.step, manifest.blocks, losses.collect::<Vec<_>>(), run.result().digest.clone())
    };
    let session = fixture.session(fixture.job("undisturbed"));
    let expected = traces("undisturbed", &session, &generation(&session, 1, None, None));
    assert_eq!(expected.2.len(), STEPS as usize);
    for seed in 0..12 {
        let bucket = format!("seed-{seed}");
        let session = fixture.session(fixture.job(&bucket));
        let run = disturbed(&session, &mut StdRng::seed_from_u64(seed));
        assert!(traces(&bucket, &session, &run) == expected, "seed {seed} leaves a trace");
    }
}

#[test]
fn steps_that_are_not_finite_change_nothing_and_end_the_run_by_their_name() {
    let fixture = Fixture::new();
    let mut job = fixture.job("bucket");
    // Small enough that norms can still be taken, and too large for the product of queries and keys.
    job.recipe.learning_rate = 1e18;
    job.recipe.length = RunLength::Steps(40);
    let session = fixture.session(job);
    let memories = continued(&session, 1, &Start::Model, vec![None, None], End::Paused(1)).memories;
    let state = |memories: &[Option<Engine>]| {
        let engines = memories.iter().flatten();
        engines.map(|engine| (engine.updates, engine.blocks.clone())).collect::<Vec<_>>()
    };
    let before = state(&memories);
    let start = from_memory(&session, &memories);
    let go = Control::default();
    go.go.cancel();
    let watch = Arc::new(Watch::default());
    let observers: Vec<Arc<dyn Observer>> = vec![watch.clone(), Arc::new(Watch::default())];
    let mut memories = memories;
    let outcomes = generation_on_threads(&session, 2, &start, &[go.clone(), go], &observers, &mut memories).unwrap();
    for outcome in outcomes {
        assert!(matches!(outcome, Err(GenerationError::Numerics { step: 11 })), "{outcome:?}");
    }
    assert!(watch.losses.lock().iter().all(|loss| !loss.is_finite()), "{:?}", watch.losses.lock());
    assert!(state(&memories) == before, "ten steps in a row changed something");
    let blocks = || before.iter().flat_map(|(_, blocks)| blocks.values());
    assert!(blocks().flat_map(|block| &block.weights).all(|weight| weight.is_finite()));
}

#[test]
fn steps_that_are_made_again_from_a_checkpoint_are_in_the_log_once() {
    let fixture = Fixture::new();
    let session = fixture.session(fixture.job("bucket"));
    let (_, older) = generation(&session, 2, None, Some(2)).stopped();
    let (_, newer) = generation(&session, 2, Some(older.clone()), Some(4)).stopped();
    assert_eq!(newer.step, 4);
    // The newer one is lost.
    generation(&session, 3, Some(older), None);
    assert_whole(&fixture.runtime.block_on(session.log()).unwrap());
}
