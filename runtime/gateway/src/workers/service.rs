//! The gRPC service that workers attach to.

use super::connection::Connection;
use super::inquiry::Answer;
use super::registry::Registry;
use super::relay::{self, Peers, Relay};
use super::trust::Trust;
use crate::api::error::ApiError;
use crate::choice::{Loss, Work};
use crate::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Request, Response, Status, Streaming};
use vicuna_protocol::auth::{Caller, bearer};
use vicuna_protocol::inference::{
    Delta, Failure, GatewayMessage, GatewayWelcome, ModelOffer, Progress, WorkerHello, WorkerMessage, failure,
    gateway_message, worker_message::Body, workers_server::Workers,
};

/// Messages to a worker that it has not read yet: it is gone when there are more.
const OUTBOUND: usize = 4096;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_OFFERS: usize = 64;
const MAX_SLOTS: u32 = 4096;
const MAX_NAME: usize = 253;

type Outbound = mpsc::Sender<Result<GatewayMessage, Status>>;

#[derive(Clone)]
pub struct WorkerService {
    pub gateway: String,
    pub registry: Arc<Registry>,
    pub trust: Trust,
    pub metrics: Metrics,
    /// To whom workers are passed on that do not reach them; `None`: there are no others.
    pub peers: Option<Peers>,
}

#[tonic::async_trait]
impl Workers for WorkerService {
    type AttachStream = ReceiverStream<Result<GatewayMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<WorkerMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let caller = self.trust.verify(request.metadata())?;
        // Pods reach all gateways by themselves.
        let passed_on = caller.pod_name.is_none() && !relay::is_relayed(request.metadata());
        let token = request.metadata().get("authorization").cloned().filter(|_| passed_on);
        let (outbound, messages) = mpsc::channel(OUTBOUND);
        let service = self.clone();
        tokio::spawn(async move {
            if let Err(status) = service.serve(caller, request.into_inner(), token, &outbound).await {
                tracing::warn!(%status, "a worker's stream ends");
                // A worker that does not read its end will see the stream break.
                let _ = outbound.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

impl WorkerService {
    async fn serve(
        &self,
        caller: Caller,
        mut inbound: Streaming<WorkerMessage>,
        token: Option<AsciiMetadataValue>,
        outbound: &Outbound,
    ) -> Result<(), Status> {
        let hello = first_message(&mut inbound).await?;
        let hello = accept(&caller, hello)?;
        if self.registry.has_instance(&caller.namespace, &hello) {
            return Err(Status::already_exists("this worker is attached here by another connection"));
        }
        if !self.registry.has_room_for(&caller.namespace, &hello) {
            return Err(Status::resource_exhausted(format!(
                "the models of namespace {} are too many for this gateway already; serve fewer names, or wait an hour for \
                 those to be forgotten that nobody serves any more",
                caller.namespace
            )));
        }
        let welcome =
            gateway_message::Body::Welcome(GatewayWelcome { gateway: self.gateway.clone(), takes_batches: true });
        let welcome = GatewayMessage { body: Some(welcome) };
        outbound.send(Ok(welcome)).await.map_err(|_| Status::cancelled("the worker went away"))?;
        tracing::info!(
            worker = hello.worker,
            node = hello.node,
            capacity = hello.capacity,
            slots = hello.slots,
            models = hello.models.len(),
            "worker attached"
        );
        let connection = self.registry.attach(&caller, hello.clone(), outbound.clone());
        let passed_on = self.peers.clone().zip(token);
        let relay = passed_on.map(|(peers, token)| Relay::start(peers, connection.clone(), hello, token));
        let ended = self.listen(&connection, &mut inbound, relay.as_ref()).await;
        self.registry.detach(connection.id);
        tracing::info!(worker = &*connection.worker, "worker detached");
        ended
    }

    async fn listen(
        &self,
        connection: &Connection,
        inbound: &mut Streaming<WorkerMessage>,
        relay: Option<&Relay>,
    ) -> Result<(), Status> {
        loop {
            tokio::select! {
                () = connection.gone.cancelled() => {
                    return Err(Status::aborted("this connection was given up; attach again"));
                }
                message = inbound.message() => match message?.map(|message| message.body) {
                    Some(Some(Body::Batch(batch))) => {
                        let mut bodies = batch.messages.into_iter().filter_map(|message| message.body);
                        bodies.try_for_each(|body| self.take(connection, body, relay))?;
                    }
                    Some(Some(body)) => self.take(connection, body, relay)?,
                    Some(None) => {}
                    None => return Ok(()),
                },
            }
        }
    }

    fn take(&self, connection: &Connection, body: Body, relay: Option<&Relay>) -> Result<(), Status> {
        match (relay, body) {
            (Some(relay), Body::TokenRenewed(renewed)) => self.renew(connection, relay, &renewed.token),
            (Some(relay), body) if relay.passes_on(&body) => {}
            (_, body) => self.handle(connection, body)?,
        }
        Ok(())
    }

    /// A token that is no better than the old one changes nothing: the worker stays as it is.
    fn renew(&self, connection: &Connection, relay: &Relay, token: &str) {
        let worker = &*connection.worker;
        match self.trust.verify_token(token).and_then(|caller| Ok((caller, bearer(token)?))) {
            Ok((caller, bearer)) if caller.namespace == connection.namespace => relay.renew(bearer),
            Ok((caller, _)) => {
                tracing::warn!(worker, caller.namespace, "a renewed token is of another namespace; the old one stays");
            }
            Err(status) => tracing::warn!(worker, %status, "a renewed token is not acceptable; the old one stays"),
        }
    }

    fn handle(&self, connection: &Connection, body: Body) -> Result<(), Status> {
        match body {
            Body::Load(load) => self.registry.report(connection, load),
            Body::Offers(offers) => {
                let models = offers.models.into_iter().map(readable).collect();
                if !self.registry.offers_now(connection, models) {
                    return Err(Status::invalid_argument("a worker offers the names of its hello, and no others"));
                }
            }
            Body::Delta(delta) => self.delta(connection, delta)?,
            Body::PromptScores(scores) => {
                if let Some(choice) = connection.choice(&scores.request, scores.choice) {
                    choice.score_prompt(connection.id, scores.first as usize, scores.tokens);
                }
            }
            Body::Progress(progress) => {
                if let Some(choice) = connection.choice(&progress.request, progress.choice) {
                    choice.works(connection.id, work(&progress));
                }
            }
            Body::Done(done) => {
                if let Some(choice) = connection.choice(&done.request, done.choice) {
                    connection.succeeded(choice.finish(connection.id, done));
                }
            }
            Body::Failure(failure) => self.fail(connection, failure),
            Body::Embeddings(answer) => {
                connection.answer(&answer.request.clone(), Answer::Embeddings(answer));
            }
            Body::TokenCount(answer) => {
                connection.answer(&answer.request.clone(), Answer::TokenCount(answer));
            }
            Body::Transcript(answer) => {
                connection.answer(&answer.request, Answer::Transcript(answer.choices));
            }
            // It is checked when the worker calls again.
            Body::TokenRenewed(_) => {}
            Body::Draining(draining) => {
                tracing::info!(worker = &*connection.worker, draining.deadline_ms, "worker drains");
                self.registry.drain(connection);
            }
            Body::Hello(_) => {
                return Err(Status::invalid_argument("a worker says hello once"));
            }
            Body::Batch(_) => {
                return Err(Status::invalid_argument("a batch holds no batch"));
            }
        }
        Ok(())
    }

    fn delta(&self, connection: &Connection, delta: Delta) -> Result<(), Status> {
        // What was cancelled meanwhile still comes for a moment.
        let Some(choice) = connection.choice(&delta.request, delta.choice) else {
            return Ok(());
        };
        let appended = choice
            .append(connection.id, delta)
            .map_err(|broken| Status::data_loss(format!("{broken}; attach again")))?;
        let model = [choice.job.model()];
        self.metrics.tokens.with_label_values(&model).inc_by(appended.new as u64);
        if let Some(gap) = appended.gap {
            self.metrics.resume_gap_seconds.with_label_values(&model).observe(gap.as_secs_f64());
        }
        Ok(())
    }

    fn fail(&self, connection: &Connection, failure: Failure) {
        if connection.is_asked(&failure.request) {
            return connection.answer(&failure.request.clone(), Answer::Failed(failure));
        }
        let Some(choice) = connection.choice(&failure.request, failure.choice) else {
            return;
        };
        match failure.code() {
            failure::Code::Invalid => choice.fail(ApiError::invalid(failure)),
            failure::Code::Overloaded => choice.lose(connection.id, Loss::Overloaded),
            failure::Code::Internal | failure::Code::Unspecified => {
                let (request, message) = (&failure.request, &failure.message);
                tracing::warn!(worker = &*connection.worker, request, message, "worker failed");
                self.registry.failed(connection.id);
                choice.lose(connection.id, Loss::Failed);
            }
        }
    }
}

/// What is told to clients is one line.
fn readable(mut offer: ModelOffer) -> ModelOffer {
    const LONGEST: usize = 300;
    offer.progress =
        offer.progress.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(LONGEST).collect();
    offer
}

fn work(progress: &Progress) -> Work {
    match progress.all {
        0 => Work::None,
        all => Work::Reading { computed: progress.computed.min(all), all },
    }
}

async fn first_message(inbound: &mut Streaming<WorkerMessage>) -> Result<WorkerHello, Status> {
    let message = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
    match message.map_err(|_| Status::deadline_exceeded("no hello within 10 s"))?? {
        Some(WorkerMessage { body: Some(Body::Hello(hello)) }) => Ok(hello),
        _ => Err(Status::invalid_argument("the first message must be a hello")),
    }
}

/// Checks what a worker says of itself against its token.
fn accept(caller: &Caller, mut hello: WorkerHello) -> Result<WorkerHello, Status> {
    if let Some(pod) = &caller.pod_name {
        hello.worker.clone_from(pod);
    }
    let namespace = format!("{}/", caller.namespace);
    let foreign = hello.models.iter().find(|offer| !offer.name.starts_with(&namespace));
    if let Some(offer) = foreign {
        return Err(Status::permission_denied(format!(
            "a worker of namespace {} may not offer {}",
            caller.namespace, offer.name
        )));
    }
    let named = |name: &str| !name.is_empty() && name.len() <= 2 * MAX_NAME && !name.contains(char::is_control);
    let sound = !hello.models.is_empty()
        && hello.models.len() <= MAX_OFFERS
        && hello.models.iter().all(|offer| named(&offer.name) && (offer.max_length > 0 || offer.on_request))
        && (1..=MAX_SLOTS).contains(&hello.slots)
        && named(&hello.worker)
        && [&hello.instance, &hello.node, &hello.pool, &hello.capacity].iter().all(|text| text.len() <= MAX_NAME);
    match sound {
        true => Ok(hello),
        false => Err(Status::invalid_argument(format!(
            "a hello needs a name, 1 to {MAX_OFFERS} models with their length, and 1 to {MAX_SLOTS} slots"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(model: &str) -> WorkerHello {
        WorkerHello {
            worker: "claimed".into(),
            models: vec![ModelOffer { name: model.into(), max_length: 8, ..ModelOffer::default() }],
            slots: 1,
            ..WorkerHello::default()
        }
    }

    fn caller() -> Caller {
        Caller { namespace: "team".into(), service_account: "sa".into(), pod_name: Some("pod-1".into()), pod_uid: None }
    }

    #[test]
    fn a_worker_is_who_its_token_says_and_offers_only_its_namespace() {
        assert_eq!(accept(&caller(), hello("team/m")).unwrap().worker, "pod-1");
        for foreign in ["other/m", "team", "teams/m"] {
            let status = accept(&caller(), hello(foreign)).unwrap_err();
            assert_eq!(status.code(), tonic::Code::PermissionDenied);
        }
    }

    #[test]
    fn a_model_comes_with_as_many_adapters_as_a_serving_may_name() {
        let offers = (0..16).map(|number| hello(&format!("team/m:{number}")).models.remove(0));
        let mut whole = hello("team/m");
        whole.models.extend(offers);
        assert_eq!(accept(&caller(), whole).unwrap().models.len(), 17);
    }

    #[test]
    fn an_unsound_hello_is_refused() {
        let mut empty = hello("team/m");
        empty.slots = 0;
        assert_eq!(accept(&caller(), empty).unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
