//! What we write into the API server, one resource a file. Pure.

pub mod pdb;
pub mod pod;
pub mod service_account;

use crate::config::{MANAGER, TRAINING_LABEL};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use std::collections::BTreeMap;
use vicuna_crds::VicunaTraining;

/// Labels of everything that belongs to a training.
pub fn labels(training: &VicunaTraining) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "vicuna-trainer"),
        ("app.kubernetes.io/component", "trainer"),
        ("app.kubernetes.io/managed-by", MANAGER),
        (TRAINING_LABEL, &training.name_any()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// How the training's pods are found.
pub fn selector(training: &VicunaTraining) -> String {
    format!("{TRAINING_LABEL}={}", training.name_any())
}

/// The training as owner; `None` before the API server has stored it.
pub fn owner(training: &VicunaTraining) -> Option<OwnerReference> {
    training.controller_owner_ref(&())
}
