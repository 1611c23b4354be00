//! How many ranks voluntary evictions must leave.

use super::{labels, owner};
use crate::config::TRAINING_LABEL;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use vicuna_crds::VicunaTraining;

pub fn disruption_budget(training: &VicunaTraining, min_available: u32) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(training.name_any()),
            labels: Some(labels(training)),
            owner_references: owner(training).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(i32::try_from(min_available).unwrap_or(i32::MAX))),
            selector: Some(LabelSelector {
                match_labels: Some([(TRAINING_LABEL.to_owned(), training.name_any())].into()),
                ..LabelSelector::default()
            }),
            // A pod that does not run protects nothing.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}
