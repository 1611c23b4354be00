//! The service account of workers: it may do nothing at the API server, its token only names the pod.

use crate::config::MANAGER;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub const WORKER_ACCOUNT: &str = "vicuna-worker";

/// One for all servings of a namespace, so no serving owns it.
pub fn worker_account(namespace: &str) -> ServiceAccount {
    ServiceAccount {
        metadata: ObjectMeta {
            name: Some(WORKER_ACCOUNT.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some([("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned())].into()),
            ..ObjectMeta::default()
        },
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}
