//! Asks workers that run and are not ready why. They know best (a bucket that is not there, a model
//! that cannot be read), and Kubernetes keeps a probe's answer nowhere but in an Event.

use super::{Life, Trouble, Worker};
use crate::config::METRICS_PORT;
use futures::future::join_all;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The reason of a worker that cannot have its model.
pub const MODEL_UNAVAILABLE: &str = "ModelUnavailable";
/// How a worker says so besides its sentence.
const MODEL_UNAVAILABLE_HEADER: &str = "vicuna-reason: ModelUnavailable";
/// Workers asked in one reconciliation, at most.
const ASKED_MAX: usize = 4;
/// Bytes read of an answer, at most.
const ANSWER_MAX: u64 = 4096;
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

pub async fn ask(workers: &mut [Worker]) {
    let silent = workers.iter_mut().filter(|worker| worker.life == Life::Coming && worker.trouble.is_none());
    let questions = silent.take(ASKED_MAX).map(|worker| async move {
        let Some(address) = worker.address.clone() else { return };
        let Some((reason, said)) = refusal(&format!("{address}:{METRICS_PORT}")).await else { return };
        let message = format!("The worker {} is not ready: {said}", worker.name);
        worker.trouble = Some(Trouble { reason, message, unschedulable_since: None });
    });
    join_all(questions).await;
}

/// What `/readyz` says where it says no, under the reason that fits; `None` where it says yes or nothing.
async fn refusal(address: &str) -> Option<(&'static str, String)> {
    let answer = tokio::time::timeout(ANSWER_WITHIN, get(address)).await.ok()?.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let refused = head.split(' ').nth(1)? == "503";
    let said = body.trim();
    let unavailable = head.lines().any(|line| line.eq_ignore_ascii_case(MODEL_UNAVAILABLE_HEADER));
    let reason = if unavailable { MODEL_UNAVAILABLE } else { "WorkerNotReady" };
    (refused && !said.is_empty()).then(|| (reason, said.to_owned()))
}

/// One HTTP/1.0 request: the server closes the connection after its answer.
async fn get(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;

    async fn answering(status: StatusCode, reason: &'static str, body: &'static str) -> String {
        let answer = (status, [("vicuna-reason", reason)], body);
        let router = Router::new().route("/readyz", get(move || async move { answer }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    #[tokio::test]
    async fn a_worker_is_believed_when_it_says_why_it_is_not_ready() {
        let no = StatusCode::SERVICE_UNAVAILABLE;
        let address = answering(no, "ModelUnavailable", "there is no bucket vicuna").await;
        assert_eq!(refusal(&address).await.unwrap(), (MODEL_UNAVAILABLE, "there is no bucket vicuna".to_owned()));
        let loading = answering(no, "ModelLoading", "fetched 1 of 2 bytes").await;
        assert_eq!(refusal(&loading).await.unwrap().0, "WorkerNotReady");
        let ready = answering(StatusCode::OK, "Ready", "attached to 1 gateways").await;
        assert_eq!(refusal(&ready).await, None);
    }

    #[tokio::test]
    async fn a_worker_that_does_not_answer_has_said_nothing() {
        assert_eq!(refusal("127.0.0.1:1").await, None);
    }
}
