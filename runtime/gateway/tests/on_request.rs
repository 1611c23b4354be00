//! Models that a worker loads once there are requests for them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{MODEL, TestGateway, Worker, gateway, in_time, text};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{ModelOffer, ModelOffers, WorkerHello};

fn on_request(progress: &str) -> ModelOffer {
    ModelOffer { name: MODEL.into(), on_request: true, progress: progress.into(), ..ModelOffer::default() }
}

fn loaded() -> ModelOffer {
    ModelOffer { name: MODEL.into(), weights_digest: "d".into(), max_length: 64, ..ModelOffer::default() }
}

async fn worker(gateway: &TestGateway, name: &str, offer: ModelOffer) -> Worker {
    let hello = WorkerHello { worker: name.into(), models: vec![offer], slots: 4, ..WorkerHello::default() };
    let token = gateway.trust.token("vicuna-gateway", "team", name);
    let mut worker = gateway.attach(token, hello).await.unwrap();
    assert!(matches!(worker.next().await.unwrap(), FromGateway::Welcome(_)));
    worker
}

/// What is said again each second is taken once.
async fn next_but_loads(worker: &mut Worker) -> FromGateway {
    loop {
        match worker.next().await.unwrap() {
            FromGateway::LoadModel(_) => {}
            other => return other,
        }
    }
}

#[tokio::test]
async fn a_request_has_its_model_loaded_and_hears_how_far_that_is() {
    let gateway = gateway(&[]).await;
    let mut worker = worker(&gateway, "w-1", on_request("")).await;
    in_time(async {
        while gateway.running.gateway.registry.model(MODEL).is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let stream = gateway.stream(json!({}));
    let FromGateway::LoadModel(load) = worker.next().await.unwrap() else { panic!("expected to be asked") };
    assert_eq!(load.model, MODEL);
    let tell = |offer: ModelOffer| FromWorker::Offers(ModelOffers { models: vec![offer] });
    worker.send(tell(on_request("loading: fetched 1 of 2\nbytes"))).await;
    let mut stream = stream.await.unwrap();
    in_time(async {
        while !stream.raw.contains(": waiting for a worker; loading: fetched 1 of 2 bytes") {
            stream.more().await;
        }
    })
    .await;
    worker.send(tell(loaded())).await;
    let FromGateway::Generate(generate) = next_but_loads(&mut worker).await else { panic!("expected the request") };
    worker.speak(&generate, 0..2).await;
    worker.done(&generate, 2).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..2));
    assert!(gateway.running.gateway.registry.model(MODEL).unwrap().offer.is_some());
}

#[tokio::test]
async fn a_worker_that_has_the_model_is_preferred_to_one_that_would_have_to_load_it() {
    let gateway = gateway(&[]).await;
    let mut able = worker(&gateway, "w-1", on_request("")).await;
    let mut ready = worker(&gateway, "w-2", loaded()).await;
    gateway.wait_for_worker("w-2").await;
    let answer = gateway.ask(json!({}));
    let generate = ready.generate().await;
    ready.done(&generate, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
    let nothing = tokio::time::timeout(std::time::Duration::from_millis(100), able.next()).await;
    assert!(nothing.is_err(), "nobody asked it to load");
}

#[tokio::test]
async fn workers_that_cannot_load_a_model_do_not_keep_one_that_can_from_being_asked() {
    let gateway = gateway(&[]).await;
    let failed = "cannot be loaded: the bucket does not exist";
    let _at_start = worker(&gateway, "w-1", ModelOffer { at_start: true, ..on_request(failed) }).await;
    let _failed = worker(&gateway, "w-2", on_request(failed)).await;
    let mut able = worker(&gateway, "w-3", on_request("")).await;
    in_time(async {
        while gateway.running.gateway.registry.snapshot(std::time::Duration::ZERO).workers.len() < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let answer = gateway.ask(json!({}));
    let FromGateway::LoadModel(load) = able.next().await.unwrap() else { panic!("expected to be asked") };
    assert_eq!(load.model, MODEL);
    drop(answer);
}

#[tokio::test]
async fn a_worker_cannot_offer_names_that_it_did_not_come_with() {
    let gateway = gateway(&[]).await;
    let mut worker = worker(&gateway, "w-1", loaded()).await;
    let other = ModelOffer { name: "team/other".into(), ..loaded() };
    worker.send(FromWorker::Offers(ModelOffers { models: vec![other] })).await;
    let refused = loop {
        if let Err(status) = worker.next().await {
            break status;
        }
    };
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}
