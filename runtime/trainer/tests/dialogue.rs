//! The rank's life against a coordinator that the test plays, over real gRPC.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use parking_lot::Mutex;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use support::{Fixture, url};
use tch::Device;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::coordinator::coordinator_message::Body as Heard;
use vicuna_protocol::coordinator::coordinator_server::{Coordinator, CoordinatorServer};
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::coordinator::{self as wire, Cause, CoordinatorMessage, RankMessage};
use vicuna_protocol::job::{RunLength, TrainingJob};
use vicuna_trainer::collective::Network;
use vicuna_trainer::coordinator::{Link, Route};
use vicuna_trainer::http;
use vicuna_trainer::metrics::Metrics;
use vicuna_trainer::prepare::Place;
use vicuna_trainer::rank::{self, Exit, Parts};

const PATIENCE: Duration = Duration::from_secs(60);
type Answers = mpsc::Sender<Result<CoordinatorMessage, Status>>;

#[derive(Clone)]
struct Service {
    heard: mpsc::Sender<(String, Body)>,
    streams: Arc<Mutex<HashMap<String, Answers>>>,
}

#[tonic::async_trait]
impl Coordinator for Service {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<RankMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer secret");
        let mut said = request.into_inner();
        let Some(Ok(RankMessage { body: Some(Body::Hello(hello)) })) = said.next().await else {
            return Err(Status::invalid_argument("hello comes first"));
        };
        let (answers, stream) = mpsc::channel(64);
        let (pod, heard) = (hello.pod_uid.clone(), self.heard.clone());
        self.streams.lock().insert(pod.clone(), answers);
        tokio::spawn(async move {
            let _ = heard.send((pod.clone(), Body::Hello(hello))).await;
            while let Some(Ok(RankMessage { body: Some(body) })) = said.next().await {
                let _ = heard.send((pod.clone(), body)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// The coordinator, as the test plays it.
struct Play {
    job: TrainingJob,
    service: Service,
    heard: mpsc::Receiver<(String, Body)>,
    address: String,
    /// By pod, from its hello.
    peers: HashMap<String, String>,
}

impl Play {
    async fn start(job: TrainingJob) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (say, heard) = mpsc::channel(1024);
        let service = Service { heard: say, streams: Arc::default() };
        let server = Server::builder().add_service(CoordinatorServer::new(service.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { job, service, heard, address, peers: HashMap::new() }
    }

    /// Starts a rank; the sender is its SIGTERM.
    fn rank(&self, fixture: &Fixture, pod: &str) -> (tokio::task::JoinHandle<Exit>, oneshot::Sender<()>) {
        let network = Network::listen("127.0.0.1:0").unwrap();
        let url = format!("http://{}", self.address);
        let token = fixture.path("token");
        std::fs::write(&token, "secret\n").unwrap();
        let route = Route {
            channel: Arc::new(move || Ok(Endpoint::from_shared(url.clone()).unwrap().connect_lazy())),
            token: TokenFile::new(token),
        };
        let hello = wire::Hello {
            pod_name: pod.to_owned(),
            pod_uid: pod.to_owned(),
            node: "node".to_owned(),
            peer_address: network.address().to_string(),
            generation: 0,
            step: 0,
            numerics_class: "class".to_owned(),
            since_step_ms: 0,
        };
        let (link, inbox) = Link::start(route, hello);
        let scratch = fixture.path(&format!("scratch-{pod}"));
        let parts = Parts {
            link,
            inbox,
            network: Arc::new(network),
            place: Place { scratch, device: Device::Cpu, threads: 1 },
            status: http::Status { metrics: Metrics::new().unwrap(), ready: Arc::default() },
            grace: PATIENCE,
        };
        let (terminate, terminated) = oneshot::channel::<()>();
        let terminated = async move {
            if terminated.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        (tokio::spawn(rank::live(parts, terminated)), terminate)
    }

    async fn send(&self, pod: &str, body: Heard) {
        let stream = self.service.streams.lock().get(pod).cloned().unwrap();
        let _ = stream.send(Ok(CoordinatorMessage { body: Some(body) })).await;
    }

    /// The next message that `wanted` takes; hellos are answered on the way.
    async fn until<T>(&mut self, wanted: impl Fn(&str, &Body) -> Option<T>) -> T {
        let found = async {
            loop {
                let (pod, body) = self.heard.recv().await.unwrap();
                if let Body::Hello(hello) = &body {
                    self.peers.insert(pod.clone(), hello.peer_address.clone());
                    let job = serde_json::to_string(&self.job).unwrap();
                    self.send(&pod, Heard::Welcome(wire::Welcome { job })).await;
                }
                if let Some(found) = wanted(&pod, &body) {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("the rank does not say what is expected")
    }

    async fn prepared(&mut self, count: usize) {
        for _ in 0..count {
            self.until(|_, body| matches!(body, Body::Prepared(_)).then_some(())).await;
        }
    }

    /// Form, Ready from all with one digest, Go.
    async fn form(&mut self, generation: u64, pods: &[&str], base: Base) {
        let members: Vec<wire::Member> = pods
            .iter()
            .map(|pod| wire::Member {
                pod_uid: (*pod).to_owned(),
                pod_name: (*pod).to_owned(),
                node: "node".to_owned(),
                address: self.peers[*pod].clone(),
                leaves: false,
            })
            .collect();
        for (rank, pod) in pods.iter().enumerate() {
            let form = wire::Form {
                generation,
                rank: rank as u32,
                members: members.clone(),
                key: vec![generation as u8; 32],
                canary: pods.len() > 1,
                ..base.form()
            };
            self.send(pod, Heard::Form(form)).await;
        }
        let mut digests = Vec::new();
        for _ in pods {
            digests.push(self.until(|_, body| ready(body, generation)).await);
        }
        assert!(digests.iter().all(|digest| *digest == digests[0]));
        for pod in pods {
            self.send(pod, Heard::Go(wire::Go { generation })).await;
        }
    }

    async fn progress(&mut self, generation: u64) -> wire::Progress {
        self.until(|_, body| match body {
            Body::Progress(progress) if progress.generation == generation => Some(*progress),
            _ => None,
        })
        .await
    }

    async fn stop(&self, generation: u64, pods: &[&str], planned: bool) {
        for pod in pods {
            let stop = wire::Stop { generation, planned, reason: "test".to_owned(), ..Default::default() };
            self.send(pod, Heard::Stop(stop)).await;
        }
    }

    /// The answers of these ranks, in this order.
    async fn stopped(&mut self, generation: u64, pods: &[&str]) -> Vec<wire::Stopped> {
        let mut all = HashMap::new();
        while all.len() < pods.len() {
            let said = |pod: &str, body: &Body| match body {
                Body::Stopped(stopped) if stopped.generation == generation => Some((pod.to_owned(), stopped.clone())),
                _ => None,
            };
            let (pod, stopped) = self.until(said).await;
            all.insert(pod, stopped);
        }
        pods.iter().map(|pod| all.remove(*pod).unwrap()).collect()
    }

    async fn finished(&mut self) -> wire::Finished {
        self.until(|_, body| match body {
            Body::Finished(finished) => Some(finished.clone()),
            _ => None,
        })
        .await
    }

    async fn shut_down(&self, pods: &[&str]) {
        for pod in pods {
            let why = wire::shutdown::Why::Complete.into();
            self.send(pod, Heard::Shutdown(wire::Shutdown { why })).await;
        }
    }
}

/// Where a generation starts.
#[derive(Clone)]
enum Base {
    Model,
    Memory(u64, wire::MemoryBase),
}

impl Base {
    /// What these ranks said that they hold, in rank order.
    fn memory(stopped: &[wire::Stopped]) -> Self {
        let holdings: Vec<_> = stopped.iter().map(|one| one.holding.clone().unwrap()).collect();
        let ahead = holdings.iter().max_by_key(|holding| holding.step).unwrap().clone();
        let wire::Holding { step, updates, norm, updated, .. } = ahead;
        Self::Memory(step, wire::MemoryBase { updates, norm, updated, holdings })
    }

    fn form(&self) -> wire::Form {
        match self.clone() {
            Self::Model => wire::Form::default(),
            Self::Memory(step, memory) => wire::Form { base_step: step, memory: Some(memory), ..Default::default() },
        }
    }
}

fn ready(body: &Body, generation: u64) -> Option<String> {
    match body {
        Body::Ready(ready) if ready.generation == generation => Some(ready.state_digest.clone()),
        _ => None,
    }
}

fn job(fixture: &Fixture, bucket: &str, steps: u64) -> TrainingJob {
    let mut job = fixture.job(bucket);
    job.recipe.global_batch = 6;
    job.recipe.length = RunLength::Steps(steps);
    job
}

fn undisturbed(fixture: &Fixture, steps: u64) -> String {
    let session = fixture.session(job(fixture, "undisturbed", steps));
    vicuna_trainer::local::train(&session, 1, None).unwrap().digest
}

#[test]
fn a_disturbed_run_ends_with_the_undisturbed_weights() {
    const STEPS: u64 = 60;
    let fixture = Fixture::new();
    let expected = undisturbed(&fixture, STEPS);
    fixture.runtime.block_on(async {
        let mut play = Play::start(job(&fixture, "bucket", STEPS)).await;
        let (a, _a) = play.rank(&fixture, "a");
        let (b, _b) = play.rank(&fixture, "b");
        play.prepared(2).await;

        // Without a plan: what is in memory is enough, whether or not the step under way was committed.
        play.form(1, &["a", "b"], Base::Model).await;
        play.progress(1).await;
        play.stop(1, &["a", "b"], false).await;
        let mut stopped = play.stopped(1, &["a", "b"]).await;
        assert!(stopped.iter().all(|stopped| stopped.manifests.is_empty()));

        play.form(2, &["a", "b"], Base::memory(&stopped)).await;
        play.progress(2).await;
        play.stop(2, &["a", "b"], true).await;
        stopped = play.stopped(2, &["a", "b"]).await;
        let step = stopped[0].step;
        assert!(step < STEPS, "the stop came in time");
        assert!(stopped.iter().all(|one| one.step == step && one.manifests.is_empty()));
        stopped.remove(0);

        // The leader goes away for a while: the rank trains on and comes back as a member.
        play.form(3, &["b"], Base::memory(&stopped)).await;
        play.progress(3).await;
        play.service.streams.lock().clear();
        let back = play
            .until(|pod, body| match body {
                Body::Hello(hello) if pod == "b" => Some(hello.clone()),
                _ => None,
            })
            .await;
        assert_eq!(back.generation, 3);
        assert!(back.step > step);

        let finished = play.finished().await;
        assert_eq!((finished.generation, finished.step), (3, STEPS));
        assert_eq!(finished.uri, url(&fixture.path("bucket/result")));
        assert_eq!(finished.digest, expected);
        while play.service.streams.lock().len() < 2 {
            play.until(|_, body| matches!(body, Body::Hello(_)).then_some(())).await;
        }
        play.shut_down(&["a", "b"]).await;
        assert_eq!((a.await.unwrap(), b.await.unwrap()), (Exit::Done, Exit::Done));
    });
}

#[test]
fn a_loss_that_is_not_finite_ends_the_process_with_its_cause() {
    let fixture = Fixture::new();
    let mut job = job(&fixture, "bucket", 40);
    job.recipe.learning_rate = 1e30;
    fixture.runtime.block_on(async {
        let mut play = Play::start(job).await;
        let (rank, _terminate) = play.rank(&fixture, "a");
        play.prepared(1).await;
        play.form(1, &["a"], Base::Model).await;
        let failed = play.until(|_, body| match body {
            Body::Failed(failed) => Some(failed.clone()),
            _ => None,
        });
        let failed = failed.await;
        assert_eq!(failed.cause(), Cause::Numerics);
        assert!(failed.message.contains("learning rate"), "{}", failed.message);
        let exit = rank.await.unwrap();
        assert_eq!((exit, exit.code()), (Exit::Failed(Cause::Numerics), 25));
    });
}

#[test]
fn a_termination_leaves_all_state_with_those_who_stay() {
    let fixture = Fixture::new();
    fixture.runtime.block_on(async {
        let mut play = Play::start(job(&fixture, "bucket", 10_000)).await;
        let (a, _a) = play.rank(&fixture, "a");
        let (b, terminate_b) = play.rank(&fixture, "b");
        play.prepared(2).await;
        play.form(1, &["a", "b"], Base::Model).await;
        play.progress(1).await;
        terminate_b.send(()).unwrap();
        let notice = play.until(|pod, body| match body {
            Body::Notice(notice) if pod == "b" => Some(notice.clone()),
            _ => None,
        });
        let notice = notice.await;
        assert_eq!((notice.source.as_str(), notice.time_left_ms), ("SIGTERM", PATIENCE.as_millis() as u64));
        // The coordinator says nothing: the wish travels between the peers.
        let stopped = play.stopped(1, &["a", "b"]).await;
        assert!(stopped.iter().all(|one| one.manifests.is_empty() && one.step == stopped[0].step && one.step > 0));
        let step = stopped[0].step;
        play.form(2, &["a"], Base::memory(&stopped[..1])).await;
        assert_eq!(play.progress(2).await.step, step + 1);
        play.shut_down(&["a", "b"]).await;
        assert_eq!((a.await.unwrap(), b.await.unwrap()), (Exit::Done, Exit::Done));
    });
}

#[test]
fn what_is_missing_is_told_and_its_coming_is_noticed() {
    let fixture = Fixture::new();
    let mut job = job(&fixture, "bucket", 5);
    job.dataset[0].from = url(&fixture.path("later.json"));
    fixture.runtime.block_on(async {
        let mut play = Play::start(job).await;
        let (rank, _terminate) = play.rank(&fixture, "a");
        let blocked = play.until(|_, body| match body {
            Body::Blocked(blocked) => Some(blocked.clone()),
            _ => None,
        });
        let blocked = blocked.await;
        assert_eq!(blocked.cause(), Cause::Data);
        assert!(blocked.message.contains("later.json"), "{}", blocked.message);
        std::fs::copy(fixture.path("data.json"), fixture.path("later.json")).unwrap();
        play.prepared(1).await;
        play.shut_down(&["a"]).await;
        assert_eq!(rank.await.unwrap(), Exit::Done);
    });
}

#[test]
fn an_unloadable_manifest_is_told_and_an_older_base_still_works() {
    let fixture = Fixture::new();
    fixture.runtime.block_on(async {
        let mut play = Play::start(job(&fixture, "bucket", 3)).await;
        let (rank, _terminate) = play.rank(&fixture, "a");
        play.prepared(1).await;
        let missing = wire::ManifestRef {
            step: 2,
            generation: 1,
            key: "manifests/0000000002-000001.json".to_owned(),
            digest: "0".repeat(64),
            ..Default::default()
        };
        let member = wire::Member { address: play.peers["a"].clone(), ..wire::Member::default() };
        let form = wire::Form {
            generation: 2,
            rank: 0,
            members: vec![member],
            key: vec![0; 32],
            base_step: 2,
            base: Some(missing.clone()),
            ..Default::default()
        };
        play.send("a", Heard::Form(form)).await;
        let failed = play.until(|_, body| match body {
            Body::LoadFailed(failed) => Some(failed.clone()),
            _ => None,
        });
        let failed = failed.await;
        assert_eq!((failed.generation, failed.manifest), (2, Some(missing)));
        assert!(failed.message.contains("0000000002-000001"), "{}", failed.message);
        play.stop(2, &["a"], false).await;
        play.stopped(2, &["a"]).await;
        play.form(3, &["a"], Base::Model).await;
        assert_eq!(play.finished().await.step, 3);
        play.shut_down(&["a"]).await;
        assert_eq!(rank.await.unwrap(), Exit::Done);
    });
}

#[test]
fn a_stale_rank_starts_over_as_a_newcomer() {
    let fixture = Fixture::new();
    fixture.runtime.block_on(async {
        let mut play = Play::start(job(&fixture, "bucket", 10_000)).await;
        let (rank, _terminate) = play.rank(&fixture, "a");
        play.prepared(1).await;
        play.form(4, &["a"], Base::Model).await;
        play.progress(4).await;
        play.send("a", Heard::Stale(wire::Stale { generation: 4 })).await;
        let hello = play.until(|_, body| match body {
            Body::Hello(hello) => Some(hello.generation),
            _ => None,
        });
        assert_eq!(hello.await, 0);
        play.prepared(1).await;
        play.form(5, &["a"], Base::Model).await;
        play.progress(5).await;
        play.shut_down(&["a"]).await;
        assert_eq!(rank.await.unwrap(), Exit::Done);
    });
}
