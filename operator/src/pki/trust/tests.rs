use super::super::authority::CA_DAYS;
use super::super::rotation::SPREAD;
use super::super::testing::{accepts, date};
use super::*;
use axum::body::{Body, to_bytes};
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

/// An API server that keeps objects by path, and nothing more.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<Shelf>>);

#[derive(Default)]
struct Shelf {
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Writes to paths with this in them are forbidden.
    forbidden: Option<&'static str>,
}

impl Server {
    fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move { Ok::<_, std::convert::Infallible>(server.answer(request).await) }
        });
        Client::new(service, "vicuna-system")
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Response<Body> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        if path == "/openid/v1/jwks" {
            return Response::new(Body::from(r#"{"keys":[]}"#));
        }
        let body = to_bytes(Body::new(request.into_body()), 1 << 20).await.unwrap();
        let object = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let (code, answer) = match self.0.lock().ask(&method, path, object) {
            Ok(object) => (StatusCode::OK, object),
            Err(code) => (code, refusal(code)),
        };
        Response::builder().status(code).body(Body::from(answer.to_string())).unwrap()
    }

    fn get(&self, path: &str) -> Value {
        self.0.lock().objects[path].clone()
    }
}

fn refusal(code: StatusCode) -> Value {
    let reason = match code {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::FORBIDDEN => "Forbidden",
        _ => "Conflict",
    };
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "", "reason": reason, "code": code.as_u16()})
}

impl Shelf {
    fn ask(&mut self, method: &Method, path: String, object: Value) -> Result<Value, StatusCode> {
        match *method {
            Method::POST | Method::PUT | Method::PATCH if self.forbidden.is_some_and(|part| path.contains(part)) => {
                Err(StatusCode::FORBIDDEN)
            }
            Method::GET => self.objects.get(&path).cloned().ok_or(StatusCode::NOT_FOUND),
            Method::POST => {
                let path = format!("{path}/{}", object["metadata"]["name"].as_str().unwrap());
                if self.objects.contains_key(&path) { Err(StatusCode::CONFLICT) } else { Ok(self.store(path, object)) }
            }
            Method::PUT => {
                let read = object["metadata"]["resourceVersion"].clone();
                let same = self.objects[&path]["metadata"]["resourceVersion"] == read;
                if same { Ok(self.store(path, object)) } else { Err(StatusCode::CONFLICT) }
            }
            Method::PATCH => Ok(self.store(path, object)),
            _ => Err(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    fn store(&mut self, path: String, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(path, object.clone());
        object
    }
}

/// A cluster, and a clock that a test turns.
struct Cluster {
    server: Server,
    time: Arc<Mutex<OffsetDateTime>>,
}

impl Cluster {
    fn at(start: OffsetDateTime) -> Self {
        Self { server: Server::default(), time: Arc::new(Mutex::new(start)) }
    }

    async fn trust(&self) -> Trust {
        let leadership = Leadership::for_tests(std::time::Duration::from_secs(3600));
        let config = Arc::new(crate::config::tests::sample());
        let time = self.time.clone();
        let clock: Clock = Arc::new(move || *time.lock());
        Trust::start(self.server.client(), config, leadership, clock).await.unwrap()
    }

    fn now(&self) -> OffsetDateTime {
        *self.time.lock()
    }

    fn pass(&self, duration: Duration) {
        *self.time.lock() += duration;
    }

    fn bundle(&self, namespace: &str) -> String {
        let map = self.server.get(&format!("/api/v1/namespaces/{namespace}/configmaps/vicuna-trust"));
        map["data"]["ca.crt"].as_str().unwrap().to_owned()
    }

    fn gateways(&self) -> Identity {
        let secret: Secret = serde_json::from_value(self.server.get(GATEWAY)).unwrap();
        let text = |key: &str| String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap();
        Identity { certificate: text("tls.crt"), key: text("tls.key") }
    }
}

const GATEWAY: &str = "/api/v1/namespaces/vicuna-system/secrets/vicuna-gateway-tls";
const CA: &str = "/api/v1/namespaces/vicuna-system/secrets/vicuna-ca";

#[tokio::test]
async fn a_succession_reaches_every_namespace_before_the_gateway_shows_it() {
    let cluster = Cluster::at(date(2026, 1, 1));
    let trust = cluster.trust().await;
    trust.ensure("team").await.unwrap();
    trust.refresh().await.unwrap();
    let (first_bundle, first_leaf) = (cluster.bundle("team"), cluster.gateways());
    assert!(accepts(&first_bundle, &first_leaf, "vicuna-gateway", cluster.now()));

    cluster.pass(Duration::days(CA_DAYS * 92 / 100));
    trust.refresh().await.unwrap();
    let (announced, old_leaf) = (cluster.bundle("team"), cluster.gateways());
    assert_eq!(announced.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(accepts(&first_bundle, &old_leaf, "vicuna-gateway", cluster.now()), "the old CA still signs");

    cluster.pass(SPREAD);
    trust.refresh().await.unwrap();
    let new_leaf = cluster.gateways();
    assert!(!accepts(&first_bundle, &new_leaf, "vicuna-gateway", cluster.now()), "the new CA signs");
    assert!(accepts(&announced, &new_leaf, "vicuna-gateway", cluster.now()), "and was announced");
    assert!(accepts(&cluster.bundle("team"), &old_leaf, "vicuna-gateway", cluster.now()), "the old is not forgotten");
}

#[tokio::test]
async fn a_new_leader_goes_on_where_the_last_one_was() {
    let cluster = Cluster::at(date(2026, 1, 1));
    drop(cluster.trust().await);
    cluster.pass(Duration::days(CA_DAYS * 92 / 100));
    cluster.trust().await.refresh().await.unwrap();
    let announced = cluster.bundle("vicuna-system");
    cluster.pass(SPREAD / 2);
    let next = cluster.trust().await;
    next.refresh().await.unwrap();
    assert_eq!(cluster.bundle("vicuna-system"), announced);
    cluster.pass(SPREAD / 2);
    next.refresh().await.unwrap();
    assert!(accepts(&announced, &cluster.gateways(), "vicuna-gateway", cluster.now()));
    assert!(cluster.server.get(CA)["data"]["former.crt"].is_string());
}

#[tokio::test]
async fn certificates_are_renewed_in_time_and_not_before() {
    let cluster = Cluster::at(date(2026, 1, 1));
    let trust = cluster.trust().await;
    trust.refresh().await.unwrap();
    let (gateways, own) = (cluster.gateways().certificate, trust.issued.lock().clone());
    cluster.pass(RENEW_AFTER - Duration::hours(1));
    trust.refresh().await.unwrap();
    assert_eq!((cluster.gateways().certificate, trust.issued.lock().clone()), (gateways.clone(), own.clone()));
    cluster.pass(Duration::hours(2));
    trust.refresh().await.unwrap();
    assert_ne!(cluster.gateways().certificate, gateways);
    assert_ne!(*trust.issued.lock(), own);
}

#[tokio::test]
async fn a_namespace_that_refuses_its_bundle_keeps_no_certificate_from_being_renewed() {
    let cluster = Cluster::at(date(2026, 1, 1));
    let trust = cluster.trust().await;
    trust.ensure("closed").await.unwrap();
    trust.refresh().await.unwrap();
    let (gateways, own) = (cluster.gateways().certificate, trust.issued.lock().clone());
    cluster.server.0.lock().forbidden = Some("/closed/");
    cluster.pass(RENEW_AFTER + Duration::hours(1));
    let error = trust.refresh().await.unwrap_err();
    assert!(error.to_string().contains("closed/vicuna-trust"), "{error}");
    assert_ne!(cluster.gateways().certificate, gateways);
    assert_ne!(*trust.issued.lock(), own);
}

#[tokio::test]
async fn a_ca_that_somebody_deleted_is_made_anew_and_everything_follows() {
    let cluster = Cluster::at(date(2026, 1, 1));
    let trust = cluster.trust().await;
    trust.refresh().await.unwrap();
    let before = cluster.bundle("vicuna-system");
    cluster.server.0.lock().objects.remove(CA);
    trust.refresh().await.unwrap();
    let after = cluster.bundle("vicuna-system");
    assert_ne!(before, after);
    assert!(accepts(&after, &cluster.gateways(), "vicuna-gateway", cluster.now()));
    assert_eq!(trust.issued.lock().ca, trust.succession().signing.digest());
}

#[tokio::test]
async fn the_coordinator_is_dialled_before_and_after_a_succession_without_a_restart() {
    let cluster = Cluster::at(OffsetDateTime::now_utc());
    let trust = cluster.trust().await;
    let listener = crate::pki::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let address = listener.local_addr().unwrap();
    let _connections = trust.listen(listener).unwrap();
    trust.refresh().await.unwrap();
    let before = cluster.bundle("vicuna-system");
    assert!(dials(address, &before).await);
    cluster.server.0.lock().objects.remove(CA);
    trust.refresh().await.unwrap();
    assert!(dials(address, &cluster.bundle("vicuna-system")).await);
    assert!(!dials(address, &before).await);
}

/// As ranks and gateways dial: by the bundle that is mounted.
async fn dials(address: std::net::SocketAddr, bundle: &str) -> bool {
    use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(bundle)).domain_name("vicuna-operator");
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
    endpoint.connect().await.is_ok()
}
