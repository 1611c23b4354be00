//! The objects of a serving, as they are applied.

pub mod account;
pub mod budget;
pub mod pod;

use crate::config::{MANAGER, SERVING_LABEL};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use std::collections::BTreeMap;
use vicuna_crds::VicunaServing;

/// Labels of everything that belongs to a serving.
pub fn labels(serving: &VicunaServing) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "vicuna-worker".to_owned()),
        ("app.kubernetes.io/component", "serving".to_owned()),
        ("app.kubernetes.io/managed-by", MANAGER.to_owned()),
        (SERVING_LABEL, serving.name_any()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// Selects a serving's pods: the status' selector, and what its budget covers.
pub fn selector(serving: &VicunaServing) -> BTreeMap<String, String> {
    [(SERVING_LABEL.to_owned(), serving.name_any())].into()
}

/// Removes what is owned with the serving.
pub fn owner(serving: &VicunaServing) -> Option<Vec<OwnerReference>> {
    serving.controller_owner_ref(&()).map(|owner| vec![owner])
}
