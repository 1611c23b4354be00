//! An API server in memory, for one thread: what the operator relies on of a real one, and no more. Nothing in it is
//! random, and its time is tokio's, so that a test may stop the clock. [`crate::conformance`] says what it must do, and
//! runs against a real one too.
//!
//! `store` holds objects and their history, `ownership` knows who set which field, `selector` what a list or watch asks
//! for; this file is HTTP.

mod ownership;
mod selector;
mod store;

pub use store::{Key, Resource, Served, Store};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use selector::Selector;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use store::{Deletion, PatchKind, Watch, Write};

/// What a watch lasts that does not say how long.
const WATCH_SECONDS: u64 = 1800;

pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Cheap to clone; all clones are one server.
#[derive(Clone)]
pub struct ApiServer(Arc<Mutex<Store>>);

/// An answer that is an error, as `Status` tells it.
#[derive(Debug)]
pub struct Refusal {
    pub code: u16,
    pub reason: &'static str,
    pub message: String,
}

impl Refusal {
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    pub fn status(&self) -> Value {
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "code": self.code, "reason": self.reason, "message": self.message,
        })
    }

    /// A watch's last line.
    fn event(&self) -> Bytes {
        Bytes::from(format!("{}\n", json!({"type": "ERROR", "object": self.status()})))
    }

    pub fn response(&self) -> Response<Body> {
        answer(self.code, &self.status())
    }
}

impl ApiServer {
    /// An empty cluster with the namespace `default`, at this unix time.
    pub fn new(unix_ms: u64) -> Self {
        Self(Arc::new(Mutex::new(Store::new(unix_ms))))
    }

    /// For those who are beside the API: schedulers, kubelets, and whoever looks on.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client for it. To be called within a runtime.
    pub fn client(&self) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.call(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Answers one request. What it does is done before the first `await` returns.
    pub async fn call(&self, request: Request<kube::client::Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = match body.collect_bytes().await {
            Ok(body) => body,
            Err(error) => return Refusal::new(400, "BadRequest", error.to_string()).response(),
        };
        match self.respond(&parts, &body) {
            Ok(response) => response,
            Err(refusal) => refusal.response(),
        }
    }

    fn respond(&self, parts: &http::request::Parts, body: &[u8]) -> Result<Response<Body>, Refusal> {
        let path = parts.uri.path();
        match path {
            "/version" => {
                return Ok(answer(
                    200,
                    &json!({
                        "major": "1", "minor": "36", "gitVersion": "v1.36.0-simulated", "gitCommit": "", "gitTreeState": "clean",
                        "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
                    }),
                ));
            }
            "/openid/v1/jwks" => return Ok(answer(200, &json!({"keys": []}))),
            _ => {}
        }
        let route = Route::parse(path)
            .ok_or_else(|| Refusal::new(404, "NotFound", format!("the server has no resource at {path}")))?;
        let query: HashMap<String, String> =
            url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
        let text = |name: &str| query.get(name).cloned();
        if parts.method == Method::GET {
            return self.read(&route, &query);
        }
        let object = match body {
            [] => json!({}),
            body => serde_json::from_slice(body)
                .map_err(|error| Refusal::new(400, "BadRequest", format!("the body is no JSON: {error}")))?,
        };
        let manager = text("fieldManager").unwrap_or_else(|| "unknown".to_owned());
        let write = Write { status_only: route.subresource.as_deref() == Some("status"), manager };
        let mut store = self.store();
        let (code, object) = match (parts.method.as_str(), &route.name) {
            ("POST", None) => (201, store.create(route.resource, route.namespace.as_deref(), object, &write)?),
            ("PUT", Some(name)) => (200, store.replace(&route.key(name), object, &write)?),
            ("PATCH", Some(name)) => {
                let content = parts.headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                let kind = match content {
                    Some("application/merge-patch+json") => PatchKind::Merge,
                    Some("application/apply-patch+yaml") => {
                        PatchKind::Apply { force: text("force").as_deref() == Some("true") }
                    }
                    other => {
                        let message = format!("patches of type {other:?} are not simulated");
                        return Err(Refusal::new(415, "UnsupportedMediaType", message));
                    }
                };
                store.patch(&route.key(name), object, kind, &write)?
            }
            ("DELETE", Some(name)) => (200, store.delete(&route.key(name), &Deletion::of(&object))?),
            (method, _) => {
                return Err(Refusal::new(405, "MethodNotAllowed", format!("{method} {path} is not simulated")));
            }
        };
        Ok(answer(code, &object))
    }

    fn read(&self, route: &Route, query: &HashMap<String, String>) -> Result<Response<Body>, Refusal> {
        let mut store = self.store();
        if let Some(name) = &route.name {
            return Ok(answer(200, &store.get(&route.key(name))?));
        }
        let text = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
        let selector = Selector::parse(text("labelSelector"), text("fieldSelector"))?;
        if !matches!(text("watch"), "true" | "1") {
            return Ok(answer(200, &store.list(route.resource, route.namespace.as_deref(), &selector)));
        }
        let since = text("resourceVersion").parse().map_err(|_| {
            Refusal::new(400, "BadRequest", "a watch without the resourceVersion of a list is not simulated")
        })?;
        let watch = Watch::new(route.resource, route.namespace.clone(), selector);
        let events = match store.watch(watch, since) {
            Ok(events) => events.boxed(),
            // Told in the stream, as a real one does: a client that is refused a watch would ask for the same again.
            Err(expired) => stream::iter([expired.event()]).boxed(),
        };
        let seconds = text("timeoutSeconds").parse().unwrap_or(WATCH_SECONDS);
        let bookmark = (text("allowWatchBookmarks") == "true").then(|| (self.clone(), route.resource));
        Ok(watching(events, Duration::from_secs(seconds), bookmark))
    }
}

/// A watch's lines until its time is over; then, where asked for, a bookmark.
fn watching(
    events: impl Stream<Item = Bytes> + Send + 'static,
    lasts: Duration,
    bookmark: Option<(ApiServer, Resource)>,
) -> Response<Body> {
    let over = tokio::time::sleep(lasts);
    let last = stream::iter(bookmark).map(|(server, resource)| server.store().bookmark(resource));
    // What has happened by then is told first: a bookmark says that all was.
    let events = stream::unfold((Box::pin(events), Box::pin(over)), async |(mut events, mut over)| {
        let event = tokio::select! {
            biased;
            event = events.next() => event,
            () = &mut over => None,
        };
        event.map(|event| (event, (events, over)))
    });
    let lines = events.chain(last).map(|line| Ok(hyper::body::Frame::data(line)));
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(lines)));
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

fn answer(code: u16, body: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// `/apis/GROUP/VERSION/namespaces/NAMESPACE/RESOURCE/NAME/SUBRESOURCE`, of which not all need be there.
struct Route {
    resource: Resource,
    namespace: Option<String>,
    name: Option<String>,
    subresource: Option<String>,
}

impl Route {
    fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (api_version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ((*version).to_owned(), rest),
            ["apis", group, version, rest @ ..] => (format!("{group}/{version}"), rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let (resource, rest) = rest.split_first()?;
        let resource = Served::find(&api_version, resource)?;
        let at = |index: usize| rest.get(index).map(|part| (*part).to_owned());
        Some(Self { resource, namespace, name: at(0), subresource: at(1) })
    }

    fn key(&self, name: &str) -> Key {
        Key { resource: self.resource, namespace: self.namespace.clone().unwrap_or_default(), name: name.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_simulated_api_server_does_what_the_operator_relies_on() {
        let server = ApiServer::new(1_750_000_000_000);
        let collector = server.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                collector.store().collect_garbage();
            }
        });
        for (name, result) in crate::conformance::run(server.client()).await {
            result.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_version_that_is_too_old_to_watch_from_is_gone() {
        let server = ApiServer::new(0);
        for index in 0..3 {
            let map = json!({"metadata": {"name": format!("m{index}"), "namespace": "default"}});
            server.store().put("ConfigMap", map);
        }
        server.store().compact();
        let maps: kube::Api<k8s_openapi::api::core::v1::ConfigMap> = kube::Api::namespaced(server.client(), "default");
        let events = maps.watch(&Default::default(), "1").await.unwrap();
        let told = events.boxed().next().await.unwrap().unwrap();
        assert!(matches!(told, kube::api::WatchEvent::Error(status) if status.code == 410));
    }
}
