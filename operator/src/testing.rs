//! For unit tests of this crate.

/// A client that no server answers.
pub(crate) fn dead_client() -> kube::Client {
    let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
        Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("no server in unit tests"))
    });
    kube::Client::new(service, "default")
}
