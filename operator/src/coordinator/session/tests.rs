use super::*;
use crate::coordinator::membership::Millis;
use async_trait::async_trait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use parking_lot::Mutex;
use wire::rank_message::Body as Said;

/// A record that outlives sessions.
#[derive(Clone, Default)]
struct SharedStore(Arc<Mutex<Option<Record>>>);

#[async_trait]
impl RecordStore for SharedStore {
    async fn read(&mut self) -> Result<Option<Record>, StoreError> {
        Ok(self.0.lock().clone())
    }

    async fn swap(&mut self, record: &Record) -> Result<Swap, StoreError> {
        *self.0.lock() = Some(record.clone());
        Ok(Swap::Written)
    }
}

fn start(store: &SharedStore) -> (SessionHandle, mpsc::Receiver<Told>) {
    let (told, receiver) = mpsc::channel(64);
    let opening = Opening {
        owner: crate::coordinator::store::Owner {
            namespace: "ns".into(),
            name: "t".into(),
            uid: "uid-t".into(),
            reference: OwnerReference::default(),
        },
        job: "{}".into(),
        target: Target { min: 1, max: 1, suspend: false, any_class: false },
        reproducibility: Default::default(),
        counters: Default::default(),
        began_at: None,
        checkpoint: None,
    };
    let metrics = Arc::new(Metrics::new().unwrap());
    let key = ("ns".to_owned(), "t".to_owned());
    let session = Session::start(key, opening, Box::new(store.clone()), Clock::start(), metrics, told);
    session.set_pods([("a".to_owned(), PodFact::default())].into());
    (session, receiver)
}

fn hello(generation: u64) -> wire::Hello {
    wire::Hello { pod_name: "a".into(), pod_uid: "a".into(), generation, ..Default::default() }
}

async fn next(answers: &mut mpsc::Receiver<Result<CoordinatorMessage, tonic::Status>>) -> Body {
    let message = tokio::time::timeout(Duration::from_secs(30), answers.recv()).await;
    message.unwrap().unwrap().unwrap().body.unwrap()
}

#[tokio::test]
async fn a_rank_gets_job_and_generation_and_each_generation_its_own_key() {
    let store = SharedStore::default();
    let mut keys = Vec::new();
    for round in 1..=2u64 {
        let (session, _told) = start(&store);
        let (sender, mut answers) = mpsc::channel(RANK_MAILBOX);
        // A new leader: the rank lost its place in the meantime.
        session.joined(round, hello(0), sender).await.unwrap();
        assert!(matches!(next(&mut answers).await, Body::Welcome(_)));
        session
            .said(round, "a", Said::Prepared(wire::Prepared { steps: 3, micro_batches: 1, ..Default::default() }))
            .await
            .unwrap();
        let form = loop {
            match next(&mut answers).await {
                Body::Form(form) => break form,
                Body::Stop(stop) => {
                    let stopped = wire::Stopped { generation: stop.generation, ..Default::default() };
                    session.said(round, "a", Said::Stopped(stopped)).await.unwrap();
                }
                other => panic!("unexpected {other:?}"),
            }
        };
        assert_eq!((form.generation, form.key.len()), (round, 32));
        assert_eq!(store.0.lock().as_ref().unwrap().generation, round);
        keys.push(form.key);
        let ready = wire::Ready { generation: round, state_digest: "d".into() };
        session.said(round, "a", Said::Ready(ready)).await.unwrap();
        assert_eq!(next(&mut answers).await, Body::Go(wire::Go { generation: round }));
    }
    assert_ne!(keys[0], keys[1]);
}

#[tokio::test]
async fn what_an_older_stream_says_is_dropped() {
    let (session, _told) = start(&SharedStore::default());
    let (old, _old_answers) = mpsc::channel(RANK_MAILBOX);
    let (new, mut answers) = mpsc::channel(RANK_MAILBOX);
    session.joined(1, hello(0), old).await.unwrap();
    session.joined(2, hello(0), new).await.unwrap();
    session.said(1, "a", Said::Prepared(wire::Prepared::default())).await.unwrap();
    session.closed(1, "a").await.unwrap();
    assert!(matches!(next(&mut answers).await, Body::Welcome(_)));
    session.said(2, "a", Said::Prepared(wire::Prepared::default())).await.unwrap();
    assert!(matches!(next(&mut answers).await, Body::Form(_)));
}

#[tokio::test]
async fn the_session_ends_with_its_last_handle() {
    let (session, mut told) = start(&SharedStore::default());
    drop(session);
    let ended = async { while told.recv().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(30), ended).await.unwrap();
}

#[test]
fn notices_of_others_leave_half_of_a_mailbox_to_what_a_rank_has_to_hear() {
    let (sender, _answers): (RankSender, _) = mpsc::channel(4);
    let (noticed, go) = (Body::Noticed(wire::Noticed::default()), Body::Go(wire::Go { generation: 1 }));
    for room in (1..=4).rev() {
        assert_eq!(may_be_left_out(&noticed, &sender), room <= 2, "{room}");
        assert!(!may_be_left_out(&go, &sender));
        assert!(sender.try_send(Ok(CoordinatorMessage { body: Some(go.clone()) })).is_ok());
    }
}

#[test]
fn the_clock_does_not_start_in_1970() {
    let now: Millis = Clock::start().now_ms();
    assert!(now > 1_600_000_000_000);
}
