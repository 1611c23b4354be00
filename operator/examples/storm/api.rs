//! As much of an API server as a leader asks: single objects with versions, the list of the trainings' pods, empty lists
//! of all else, token keys. Watches stay silent, since nothing changes.

use super::{NAMESPACE, Size, pod, training};
use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use vicuna_operator::config::TRAINING_LABEL;

pub struct Api {
    jwks: String,
    pods: Value,
    objects: Mutex<Objects>,
}

#[derive(Default)]
struct Objects {
    by_path: HashMap<String, Value>,
    version: u64,
}

type Answer = (StatusCode, String);

/// Serves on a port of its own, and returns its URL.
pub async fn serve(jwks: String, size: &Size) -> Result<(String, Arc<Api>)> {
    let pods = (0..size.trainings).flat_map(|number| (0..size.ranks).map(move |place| pod_object(number, place)));
    let api = Arc::new(Api { jwks, pods: list(pods.collect()), objects: Mutex::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let router = Router::new().fallback(answer).with_state(api.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok((url, api))
}

/// The UID of a training is its name.
fn pod_object(number: usize, place: usize) -> Value {
    let (name, training) = (pod(number, place), training(number));
    json!({
        "metadata": {
            "name": name, "uid": name, "namespace": NAMESPACE, "labels": { TRAINING_LABEL: training },
            "ownerReferences": [{ "apiVersion": "v1", "kind": "T", "name": training, "uid": training }],
        },
        "spec": { "nodeName": format!("node-{place}"), "containers": [] },
        "status": { "phase": "Running" },
    })
}

fn list(items: Vec<Value>) -> Value {
    json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": "1" }, "items": items })
}

async fn answer(State(api): State<Arc<Api>>, method: Method, uri: Uri, body: Bytes) -> Answer {
    let is_watch = uri.query().is_some_and(|query| query.contains("watch=true"));
    match (uri.path(), &method) {
        (_, &Method::GET) if is_watch => std::future::pending().await,
        ("/openid/v1/jwks", _) => (StatusCode::OK, api.jwks.clone()),
        ("/api/v1/pods", &Method::GET) => (StatusCode::OK, api.pods.to_string()),
        (path, &Method::GET) if !path.contains("/namespaces/") => (StatusCode::OK, list(Vec::new()).to_string()),
        (path, _) => api.objects.lock().answer(&method, path, serde_json::from_slice(&body).unwrap_or_default()),
    }
}

impl Objects {
    fn answer(&mut self, method: &Method, path: &str, object: Value) -> Answer {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let path = if method == Method::POST { format!("{path}/{name}") } else { path.to_owned() };
        let version = |object: &Value| object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        let known = self.by_path.get(&path);
        match (method, known) {
            (&Method::GET, Some(known)) => (StatusCode::OK, known.to_string()),
            (&Method::GET | &Method::PUT, None) => refusal(StatusCode::NOT_FOUND, "NotFound"),
            (&Method::POST, Some(_)) => refusal(StatusCode::CONFLICT, "AlreadyExists"),
            (&Method::PUT, Some(known)) if version(&object).is_some_and(|was| Some(was) != version(known)) => {
                refusal(StatusCode::CONFLICT, "Conflict")
            }
            _ => self.put(path, object),
        }
    }

    fn put(&mut self, path: String, mut object: Value) -> Answer {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let text = object.to_string();
        self.by_path.insert(path, object);
        (StatusCode::OK, text)
    }
}

fn refusal(code: StatusCode, reason: &str) -> Answer {
    let (number, message) = (code.as_u16(), reason);
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": number,
    });
    (code, status.to_string())
}

impl Api {
    /// The CAs' certificates, once the leader has published them.
    pub fn trust_bundle(&self) -> Option<String> {
        let objects = self.objects.lock();
        let map = objects.by_path.iter().find(|(path, _)| path.ends_with("/configmaps/vicuna-trust"))?.1;
        Some(map["data"]["ca.crt"].as_str()?.to_owned())
    }
}
