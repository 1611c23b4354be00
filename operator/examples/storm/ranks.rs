//! Many ranks in one process: each has the trainer's own link to the coordinator, and says what a rank says. Ranks of one
//! training step together, as long as none of them is lost, whether or not there is a leader.

use super::link::{Link, Route};
use super::{ADDRESSES, COORDINATOR_AUDIENCE, NAMESPACE, Size, pod};
use anyhow::Result;
use parking_lot::Mutex;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{mpsc, watch};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::coordinator as wire;
use vicuna_protocol::coordinator::coordinator_message::Body as Heard;
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::tls;

/// Of the state, and micro-batches of a step.
const BLOCKS: usize = 64;
const STEPS: u64 = 1_000_000;
const SAY_EVERY: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Options {
    /// With tokens and the CA's certificate.
    #[arg(long)]
    folder: PathBuf,
    /// The trainings whose ranks these are.
    #[arg(long)]
    from: usize,
    #[arg(long)]
    until: usize,
}

/// What befell the ranks since the mark.
#[derive(Default)]
struct Tally {
    /// A leader took over from the one before the mark; it has another address.
    marked: AtomicBool,
    listening: AtomicBool,
    returned: AtomicU64,
    /// Attempts that were not welcomed: there was a leader when they began.
    failed: AtomicU64,
    formed: AtomicU64,
    stopped: AtomicU64,
    stale: AtomicU64,
    steps: AtomicU64,
    handshakes_ms: Mutex<Vec<u64>>,
    loss_of_a_whole_training_answered_ms: Mutex<Vec<u64>>,
    loss_of_a_gathering_training_answered_ms: Mutex<Vec<u64>>,
}

struct Training {
    number: usize,
    beat: watch::Sender<Beat>,
    /// Ranks that a leader has welcomed since the mark.
    returned: AtomicU64,
}

/// What all ranks of a training know at once.
#[derive(Clone, Copy, Default)]
struct Beat {
    /// The generation that trains; 0: none does.
    generation: u64,
    step: u64,
    lost: Option<Loss>,
}

#[derive(Clone, Copy)]
struct Loss {
    place: usize,
    at: Instant,
    /// All ranks were back when it came.
    whole: bool,
}

struct Rank {
    training: Arc<Training>,
    tally: Arc<Tally>,
    place: usize,
    link: Link,
    /// Its own, and what became of them.
    generation: u64,
    world: usize,
    said_step: u64,
    /// The loss that it has told of.
    told: Option<Loss>,
    dialled: Arc<Mutex<Option<Dial>>>,
    prepared: bool,
}

/// An attempt to reach the coordinator.
struct Dial {
    at: Instant,
    listening: bool,
}

pub fn run(options: &Options, size: &Size) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(live(options, size))
}

async fn live(options: &Options, size: &Size) -> Result<()> {
    let tally = Arc::new(Tally::default());
    let mut trainings = Vec::new();
    for number in options.from..options.until {
        let training = Arc::new(Training { number, beat: watch::Sender::default(), returned: AtomicU64::default() });
        for place in 0..size.ranks {
            start(training.clone(), tally.clone(), place, options, size);
        }
        let trainings_here = (options.until - options.from) as f64;
        let phase = (number - options.from) as f64 / trainings_here;
        tokio::spawn(keep_step(training.clone(), tally.clone(), size.step_seconds, phase));
        trainings.push(training);
        tokio::time::sleep(Duration::from_secs_f64(size.start_seconds / trainings_here)).await;
    }
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut said = tokio::time::interval(SAY_EVERY);
    loop {
        tokio::select! {
            order = orders.next_line() => match order?.as_deref() {
                Some("mark") => mark(&trainings, &tally),
                Some("listens") => tally.listening.store(true, Relaxed),
                Some("lose") => lose(&trainings, size.ranks),
                Some("report") => {
                    println!("{}", json!({ "report": report(&tally) }));
                    std::future::pending::<()>().await;
                }
                _ => return Ok(()),
            },
            _ = said.tick() => println!("{}", json!({ "returned": tally.returned.load(Relaxed) })),
        }
    }
}

fn mark(trainings: &[Arc<Training>], tally: &Tally) {
    trainings.iter().for_each(|training| training.returned.store(0, Relaxed));
    for count in [&tally.returned, &tally.failed, &tally.formed, &tally.stopped, &tally.stale, &tally.steps] {
        count.store(0, Relaxed);
    }
    tally.handshakes_ms.lock().clear();
    tally.marked.store(true, Relaxed);
}

/// One rank of a training that is whole again, and one of a training that is not: the fullest of these.
fn lose(trainings: &[Arc<Training>], ranks: usize) {
    let returned = |training: &Arc<Training>| training.returned.load(Relaxed) as usize;
    let whole = trainings.iter().find(|training| returned(training) == ranks);
    let gathering = trainings.iter().filter(|training| returned(training) < ranks).max_by_key(|it| returned(it));
    for training in [whole, gathering].into_iter().flatten() {
        let loss = Loss { place: 0, at: Instant::now(), whole: returned(training) == ranks };
        training.beat.send_modify(|beat| (beat.lost, beat.generation) = (Some(loss), 0));
    }
}

fn report(tally: &Tally) -> serde_json::Value {
    json!({
        "returned": tally.returned.load(Relaxed),
        "failedAttemptsWhileThereWasALeader": tally.failed.load(Relaxed),
        "calledIntoAnotherGeneration": tally.formed.load(Relaxed),
        "stopped": tally.stopped.load(Relaxed),
        "stale": tally.stale.load(Relaxed),
        "stepsOfTrainings": tally.steps.load(Relaxed),
        "handshakeMs": *tally.handshakes_ms.lock(),
        "lossOfAWholeTrainingAnsweredMs": *tally.loss_of_a_whole_training_answered_ms.lock(),
        "lossOfAGatheringTrainingAnsweredMs": *tally.loss_of_a_gathering_training_answered_ms.lock(),
    })
}

/// A step is made whenever all train.
async fn keep_step(training: Arc<Training>, tally: Arc<Tally>, step_seconds: f64, phase: f64) {
    tokio::time::sleep(Duration::from_secs_f64(step_seconds * phase)).await;
    let mut clock = tokio::time::interval(Duration::from_secs_f64(step_seconds));
    loop {
        clock.tick().await;
        let stepped = training.beat.send_if_modified(|beat| {
            let trains = beat.generation > 0;
            beat.step += u64::from(trains);
            trains
        });
        tally.steps.fetch_add(u64::from(stepped), Relaxed);
    }
}

fn start(training: Arc<Training>, tally: Arc<Tally>, place: usize, options: &Options, size: &Size) {
    let name = pod(training.number, place);
    let token = options.folder.join(format!("{COORDINATOR_AUDIENCE}.{NAMESPACE}.{name}.token"));
    let (ca, address) = (options.folder.join("ca.crt"), ADDRESSES[place % ADDRESSES.len()]);
    let urls = [0, 1].map(|leader| format!("https://{address}:{}", size.port + leader));
    let dialled: Arc<Mutex<Option<Dial>>> = Arc::default();
    let (dials, told) = (dialled.clone(), tally.clone());
    let channel = move || {
        let dial = Dial { at: Instant::now(), listening: told.listening.load(Relaxed) };
        if dials.lock().replace(dial).is_some_and(|former| former.listening) {
            told.failed.fetch_add(1, Relaxed);
        }
        tls::channel(&urls[usize::from(told.marked.load(Relaxed))], &ca, "vicuna-operator")
    };
    let hello = wire::Hello {
        pod_name: name.clone(),
        pod_uid: name,
        node: format!("node-{place}"),
        peer_address: format!("10.0.0.1:{place}"),
        numerics_class: "one".to_owned(),
        ..Default::default()
    };
    let (link, inbox) = Link::start(Route { channel: Arc::new(channel), token: TokenFile::new(token) }, hello);
    let rank = Rank {
        training,
        tally,
        place,
        link,
        generation: 0,
        world: size.ranks,
        said_step: 0,
        told: None,
        dialled,
        prepared: false,
    };
    tokio::spawn(rank.live(inbox));
}

impl Rank {
    async fn live(mut self, mut inbox: mpsc::Receiver<Heard>) {
        let mut beats = self.training.beat.subscribe();
        loop {
            tokio::select! {
                heard = inbox.recv() => match heard {
                    Some(Heard::Shutdown(_)) | None => return,
                    Some(heard) => self.hear(heard),
                },
                _ = beats.changed() => {
                    let beat = *beats.borrow_and_update();
                    if beat.lost.is_some_and(|loss| loss.place == self.place && self.told.is_none()) {
                        // As a process that is killed: its connection closes.
                        drop(inbox);
                        return self.link.start_over();
                    }
                    self.beat(beat);
                }
            }
        }
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Welcome(_) => self.welcomed(),
            Heard::Form(form) => self.form(&form),
            Heard::Go(go) => {
                let training =
                    |beat: &mut Beat| std::mem::replace(&mut beat.generation, go.generation) != go.generation;
                self.training.beat.send_if_modified(|beat| beat.lost.is_none() && training(beat));
            }
            Heard::Stop(stop) if stop.generation == self.generation => {
                self.tally.stopped.fetch_add(1, Relaxed);
                self.training.beat.send_modify(|beat| beat.generation = 0);
                self.say_stopped(Vec::new());
            }
            Heard::Stale(_) => {
                self.tally.stale.fetch_add(1, Relaxed);
                self.generation = 0;
                self.link.start_over();
            }
            Heard::Stop(_) | Heard::Noticed(_) | Heard::Shutdown(_) => {}
        }
    }

    fn welcomed(&mut self) {
        if let Some(dial) = self.dialled.lock().take() {
            self.tally.handshakes_ms.lock().push(dial.at.elapsed().as_millis() as u64);
            self.tally.returned.fetch_add(1, Relaxed);
            self.training.returned.fetch_add(1, Relaxed);
        }
        if !std::mem::replace(&mut self.prepared, true) {
            let (blocks, micro_batches) = (BLOCKS as u32, BLOCKS as u32);
            self.link.say(Body::Prepared(wire::Prepared { blocks, micro_batches, steps: STEPS, ..Default::default() }));
        }
    }

    fn form(&mut self, form: &wire::Form) {
        self.tally.formed.fetch_add(1, Relaxed);
        (self.generation, self.world, self.place) = (form.generation, form.members.len(), form.rank as usize);
        if let Some(loss) = self.told.take() {
            let answered = match loss.whole {
                true => &self.tally.loss_of_a_whole_training_answered_ms,
                false => &self.tally.loss_of_a_gathering_training_answered_ms,
            };
            answered.lock().push(loss.at.elapsed().as_millis() as u64);
        }
        self.said_step = form.base_step;
        self.training.beat.send_if_modified(|beat| {
            (beat.lost, beat.generation) = (None, 0);
            false
        });
        self.link.enter(form.generation, form.base_step);
        let (generation, state_digest) = (form.generation, "the same".to_owned());
        self.link.say(Body::Ready(wire::Ready { generation, state_digest }));
    }

    fn beat(&mut self, beat: Beat) {
        if let Some(loss) = beat.lost {
            if self.told.replace(loss).is_none() {
                self.say_stopped(vec![pod(self.training.number, loss.place)]);
            }
        } else if beat.generation == self.generation && beat.step > self.said_step {
            self.said_step = beat.step;
            self.link.say(Body::Progress(wire::Progress {
                generation: self.generation,
                step: beat.step,
                steps: STEPS,
                loss: 1.0,
                step_seconds: 20.0,
                tokens: 1 << 20,
                updated: true,
                ..Default::default()
            }));
        }
    }

    /// Each block is with its owner and with the rank before it.
    fn say_stopped(&self, lost: Vec<String>) {
        let step = self.training.beat.borrow().step;
        let mut blocks = vec![0u8; BLOCKS / 8];
        let holds = |block: usize| block % self.world == self.place || (block + 1) % self.world == self.place;
        (0..BLOCKS).filter(|block| holds(*block)).for_each(|block| blocks[block / 8] |= 1 << (block % 8));
        let holding = wire::Holding { step, updates: step, blocks, updated: true, lines: true, ..Default::default() };
        let (generation, holding, manifests) = (self.generation, Some(holding), Vec::new());
        self.link.say(Body::Stopped(wire::Stopped { generation, step, manifests, holding, lost }));
    }
}
