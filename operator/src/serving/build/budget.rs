//! What a drain of nodes may take at a time: one worker, and the last one only when it is replaced.

use super::{labels, owner, selector};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use vicuna_crds::VicunaServing;

/// An integer, because pods without a common controller allow no other bound.
pub fn budget(serving: &VicunaServing, desired: u32) -> PodDisruptionBudget {
    let floor = match desired {
        0 => 0,
        some => (some - 1).max(1),
    };
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(format!("{}-workers", serving.name_any())),
            namespace: serving.namespace(),
            labels: Some(labels(serving)),
            owner_references: owner(serving),
            ..ObjectMeta::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(i32::try_from(floor).unwrap_or(i32::MAX))),
            selector: Some(LabelSelector { match_labels: Some(selector(serving)), ..LabelSelector::default() }),
            // A worker that never became ready is in nobody's way.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::plan::tests::observed;
    use serde_json::json;

    #[test]
    fn a_drain_takes_one_worker_at_a_time_and_never_the_last() {
        let serving = observed(json!({ "replicas": 3 })).serving;
        let floor = |desired| budget(&serving, desired).spec.unwrap().min_available.unwrap();
        assert_eq!([0, 1, 2, 5].map(floor), [0, 1, 1, 4].map(IntOrString::Int));
    }
}
