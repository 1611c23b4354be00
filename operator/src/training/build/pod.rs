//! One rank's pod: restricted by Pod Security Standards, with the credentials' Secret that only the
//! kubelet reads.

use super::{labels, owner, service_account};
use crate::config::{Config, GIVE_UP_IMAGE_ANNOTATION, METRICS_PORT, POOL_LABEL, REPLACES_ANNOTATION, TRAINING_LABEL};
use crate::cpu;
use crate::spot::notices::NOTICE_ANNOTATION;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vicuna_crds::{Pool, VicunaTraining};
use vicuna_protocol::COORDINATOR_AUDIENCE;

const PEER_PORT: u16 = 7600;
const TOKEN_DIRECTORY: &str = "/var/run/secrets/vicuna";
const TRUST_DIRECTORY: &str = "/etc/vicuna/trust";
const SCRATCH_DIRECTORY: &str = "/scratch";
const STORE_DIRECTORY: &str = "/var/run/secrets/store";
const USER: i64 = 65532;
/// The kubelet renews the token well before.
const TOKEN_SECONDS: i64 = 3600;
/// Left of a notice for the node's own shutdown.
const MARGIN: Duration = Duration::from_secs(5);
/// How long a pod stays bound to a node that does not answer.
const UNREACHABLE_SECONDS: i64 = 30;

/// Where a pod is to be, and for whom.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub pool: &'a Pool,
    pub name: &'a str,
    /// UID of the pod from which it is to take over.
    pub replaces: Option<&'a str>,
    /// Nodes to which it must not go.
    pub avoided: &'a BTreeSet<String>,
    /// Nodes to which it should not go if there are others.
    pub suspect: &'a BTreeSet<String>,
}

/// A rank's pod.
pub fn pod(training: &VicunaTraining, config: &Config, place: &Place) -> Result<Pod, serde_json::Error> {
    let pool = place.pool;
    serde_json::from_value(json!({
        "metadata": {
            "name": place.name,
            "namespace": training.namespace(),
            "labels": pod_labels(training, pool),
            "annotations": annotations(training, place),
            "ownerReferences": owner(training).map(|owner| vec![owner]),
        },
        "spec": {
            "serviceAccountName": service_account::NAME,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            // A rank that ended is replaced, by us and where there is room, not restarted in its place.
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace_seconds(pool),
            "priorityClassName": training.spec.workers.priority_class_name,
            "nodeSelector": pool.node_selector,
            "tolerations": tolerations(pool),
            "affinity": affinity(training, place),
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container(training, config, pool)],
            "volumes": volumes(training, config),
        },
    }))
}

/// The user's first, so that ours hold.
fn pod_labels(training: &VicunaTraining, pool: &Pool) -> BTreeMap<String, String> {
    let template = training.spec.workers.template.as_ref();
    let mut all = template.map(|template| template.metadata.labels.clone()).unwrap_or_default();
    all.extend(labels(training));
    all.insert(POOL_LABEL.to_owned(), pool.name.clone());
    all
}

fn annotations(training: &VicunaTraining, place: &Place) -> BTreeMap<String, String> {
    let template = training.spec.workers.template.as_ref();
    let mut all = template.map(|template| template.metadata.annotations.clone()).unwrap_or_default();
    all.extend(
        [
            ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false".to_owned()),
            ("karpenter.sh/do-not-disrupt", "true".to_owned()),
            ("prometheus.io/scrape", "true".to_owned()),
            ("prometheus.io/port", METRICS_PORT.to_string()),
            (NOTICE_ANNOTATION, place.pool.notice().as_secs().to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    all.extend(place.replaces.map(|uid| (REPLACES_ANNOTATION.to_owned(), uid.to_owned())));
    all
}

/// The pod's time to leave, within what its pool's notice gives.
fn grace_seconds(pool: &Pool) -> u64 {
    pool.notice().saturating_sub(MARGIN).as_secs().max(MARGIN.as_secs())
}

fn tolerations(pool: &Pool) -> Vec<Value> {
    let own = pool.tolerations.iter().map(|toleration| json!(toleration));
    let gone = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"].map(|key| {
        json!({
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_SECONDS,
        })
    });
    own.chain(gone).collect()
}

fn affinity(training: &VicunaTraining, place: &Place) -> Value {
    let spread = json!({
        "preferredDuringSchedulingIgnoredDuringExecution": [{
            "weight": 100,
            "podAffinityTerm": {
                "topologyKey": "kubernetes.io/hostname",
                "labelSelector": {"matchLabels": {TRAINING_LABEL: training.name_any()}},
            },
        }],
    });
    let mut nodes = json!({});
    if !place.avoided.is_empty() {
        nodes["requiredDuringSchedulingIgnoredDuringExecution"] =
            json!({"nodeSelectorTerms": [{"matchFields": elsewhere(place.avoided)}]});
    }
    if !place.suspect.is_empty() {
        nodes["preferredDuringSchedulingIgnoredDuringExecution"] =
            json!([{"weight": 100, "preference": {"matchFields": elsewhere(place.suspect)}}]);
    }
    let bound = nodes.as_object().is_some_and(|nodes| !nodes.is_empty());
    json!({"podAntiAffinity": spread, "nodeAffinity": bound.then_some(nodes)})
}

/// Matching by field takes one name each; all expressions of a term must hold.
fn elsewhere(nodes: &BTreeSet<String>) -> Vec<Value> {
    nodes.iter().map(|node| json!({"key": "metadata.name", "operator": "NotIn", "values": [node]})).collect()
}

/// Once a step is made it stays what it was, whatever the operator was upgraded to: exact weights need one program.
pub fn image<'a>(training: &'a VicunaTraining, config: &'a Config) -> &'a str {
    pinned_image(training).unwrap_or(&config.runtime_image)
}

/// The image that the training is bound to, unless just that was given up.
pub fn pinned_image(training: &VicunaTraining) -> Option<&str> {
    let pinned = training.status.as_ref().and_then(|status| status.image.as_deref());
    pinned.filter(|image| image_to_give_up(training) != Some(image))
}

/// The image that somebody wants given up.
pub fn image_to_give_up(training: &VicunaTraining) -> Option<&str> {
    training.annotations().get(GIVE_UP_IMAGE_ANNOTATION).map(String::as_str)
}

/// The image that somebody has given up: the training is bound to it, or was until then.
pub fn given_up_image(training: &VicunaTraining) -> Option<&str> {
    let status = training.status.as_ref()?;
    let bound = [&status.image, &status.given_up_image];
    // What made steps was bound: where it is not known any more, an operator of before has given it up.
    let forgotten = status.image.is_none() && status.given_up_image.is_none() && status.progress.is_some();
    image_to_give_up(training).filter(|image| forgotten || bound.into_iter().flatten().any(|it| it == image))
}

/// Why nothing is given up, where somebody wants something given up that the training was never bound to.
pub fn nothing_to_give_up(training: &VicunaTraining) -> Option<String> {
    let asked = image_to_give_up(training).filter(|_| given_up_image(training).is_none())?;
    let bound = match training.status.as_ref().and_then(|status| status.image.as_deref()) {
        Some(image) => format!("It is bound to {image}: name that, or remove the annotation."),
        None => "It is bound to none: remove the annotation.".to_owned(),
    };
    Some(format!(
        "{GIVE_UP_IMAGE_ANNOTATION} names {asked}, which this training was never bound to, so nothing is given up. {bound}"
    ))
}

fn container(training: &VicunaTraining, config: &Config, pool: &Pool) -> Value {
    let probe = |path: &str| json!({"httpGet": {"path": path, "port": "metrics"}});
    let mut liveness = probe("/healthz");
    liveness["periodSeconds"] = json!(10);
    liveness["failureThreshold"] = json!(6);
    let mut readiness = probe("/readyz");
    readiness["periodSeconds"] = json!(2);
    json!({
        "name": "trainer",
        "image": image(training, config),
        "imagePullPolicy": config.image_pull_policy,
        "command": ["vicuna-trainer"],
        "args": arguments(config),
        "env": environment(training, pool),
        "envFrom": credentials(training),
        "ports": [
            {"name": "peers", "containerPort": PEER_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": training.spec.workers.resources.clone().unwrap_or_default(),
        "livenessProbe": liveness,
        "readinessProbe": readiness,
        // The end of the log explains a failure to whoever reads the status.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "token", "mountPath": TOKEN_DIRECTORY, "readOnly": true},
            {"name": "trust", "mountPath": TRUST_DIRECTORY, "readOnly": true},
            {"name": "scratch", "mountPath": SCRATCH_DIRECTORY},
            {"name": "store", "mountPath": STORE_DIRECTORY, "readOnly": true},
        ],
    })
}

fn arguments(config: &Config) -> Vec<String> {
    vec![
        format!("--coordinator={}", config.coordinator_url()),
        format!("--ca={TRUST_DIRECTORY}/ca.crt"),
        format!("--token-file={TOKEN_DIRECTORY}/token"),
        format!("--scratch={SCRATCH_DIRECTORY}"),
        format!("--listen=0.0.0.0:{PEER_PORT}"),
        format!("--metrics=0.0.0.0:{METRICS_PORT}"),
    ]
}

fn environment(training: &VicunaTraining, pool: &Pool) -> Vec<Value> {
    let fields = [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("POD_UID", "metadata.uid"),
        ("NODE_NAME", "spec.nodeName"),
        ("POD_IP", "status.podIP"),
    ];
    let field = |(name, path): (&str, &str)| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let threads = cpu::threads(training.spec.workers.resources.as_ref()).unwrap_or(1);
    let values = [
        // The number of threads decides the last bits: it must not depend on the node.
        json!({"name": "VICUNA_THREADS", "value": threads.to_string()}),
        json!({"name": "VICUNA_GRACE_SECONDS", "value": grace_seconds(pool).to_string()}),
        json!({"name": "TMPDIR", "value": SCRATCH_DIRECTORY}),
        json!({"name": "VICUNA_STORE_CREDENTIALS", "value": STORE_DIRECTORY}),
    ];
    fields.into_iter().map(field).chain(values).collect()
}

fn credentials(training: &VicunaTraining) -> Vec<Value> {
    let secret = training.spec.checkpoint.credentials.as_ref();
    secret.map(|secret| json!({"secretRef": {"name": secret.name, "optional": false}})).into_iter().collect()
}

fn volumes(training: &VicunaTraining, config: &Config) -> Value {
    let secret = training.spec.checkpoint.credentials.as_ref();
    // The environment makes a pod wait for its Secret, and says so; the volume brings what is corrected in it later.
    let store = match secret {
        Some(secret) => json!({"name": "store", "secret": {"secretName": secret.name, "optional": true}}),
        None => json!({"name": "store", "emptyDir": {}}),
    };
    json!([
        store,
        {
            "name": "token",
            "projected": {
                "sources": [{
                    "serviceAccountToken": {
                        "audience": COORDINATOR_AUDIENCE,
                        "expirationSeconds": TOKEN_SECONDS,
                        "path": "token",
                    },
                }],
            },
        },
        {"name": "trust", "configMap": {"name": config.trust_config_map}},
        {"name": "scratch", "emptyDir": {}},
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::tests::training;

    fn built(avoided: &[&str]) -> Pod {
        let mut training = training("t");
        training.spec.workers.resources =
            serde_json::from_value(json!({"limits": {"cpu": "2500m", "memory": "4Gi"}})).unwrap();
        let pool: Pool = serde_json::from_value(json!({
            "name": "spot", "capacity": "Spot", "nodeSelector": {"pool": "spot"}, "notice": "2m",
            "tolerations": [{"key": "spot", "operator": "Exists"}],
        }))
        .unwrap();
        training.spec.workers.template = serde_json::from_value(json!({"metadata": {
            "labels": {"kueue.x-k8s.io/queue-name": "research", POOL_LABEL: "mine"},
            "annotations": {"example.com/team": "a", "karpenter.sh/do-not-disrupt": "false"},
        }}))
        .unwrap();
        let avoided = avoided.iter().map(|node| (*node).to_owned()).collect();
        let suspect = ["bad".to_owned()].into();
        let place =
            Place { pool: &pool, name: "t-spot-0", replaces: Some("old"), avoided: &avoided, suspect: &suspect };
        pod(&training, &crate::config::tests::sample(), &place).unwrap()
    }

    #[test]
    fn users_add_labels_and_annotations_but_replace_none_of_ours() {
        let pod = built(&[]);
        assert_eq!(pod.labels()["kueue.x-k8s.io/queue-name"], "research");
        assert_eq!(pod.labels()[POOL_LABEL], "spot");
        assert_eq!(pod.annotations()["example.com/team"], "a");
        assert_eq!(pod.annotations()["karpenter.sh/do-not-disrupt"], "true");
        assert_eq!(pod.annotations()[REPLACES_ANNOTATION], "old");
    }

    #[test]
    fn the_pod_meets_the_restricted_standard() {
        let spec = built(&[]).spec.unwrap();
        let security = spec.security_context.unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
        let container = spec.containers[0].security_context.clone().unwrap();
        assert_eq!(container.allow_privilege_escalation, Some(false));
        assert_eq!(container.read_only_root_filesystem, Some(true));
        assert_eq!(container.capabilities.unwrap().drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(spec.automount_service_account_token, Some(false));
    }

    #[test]
    fn it_leaves_within_its_pools_notice_and_uses_whole_cpus() {
        let pod = built(&[]);
        assert_eq!(pod.annotations()[NOTICE_ANNOTATION], "120");
        let spec = pod.spec.unwrap();
        assert_eq!(spec.termination_grace_period_seconds, Some(115));
        let threads = spec.containers[0].env.as_ref().unwrap().iter().find(|env| env.name == "VICUNA_THREADS");
        assert_eq!(threads.unwrap().value.as_deref(), Some("2"));
        assert_eq!(spec.tolerations.unwrap().len(), 3);
    }

    #[test]
    fn noticed_nodes_are_avoided() {
        let affinity = |avoided: &[&str]| built(avoided).spec.unwrap().affinity.unwrap().node_affinity.unwrap();
        assert_eq!(affinity(&[]).required_during_scheduling_ignored_during_execution, None);
        let preferred = affinity(&[]).preferred_during_scheduling_ignored_during_execution.unwrap();
        assert_eq!(preferred[0].preference.match_fields.as_ref().unwrap()[0].values, Some(vec!["bad".to_owned()]));
        let required = affinity(&["a", "b"]).required_during_scheduling_ignored_during_execution.unwrap();
        assert_eq!(required.node_selector_terms[0].match_fields.as_ref().unwrap().len(), 2);
    }

    #[test]
    fn a_missing_secret_keeps_the_container_from_starting() {
        let spec = built(&[]).spec.unwrap();
        let secret = spec.containers[0].env_from.as_ref().unwrap()[0].secret_ref.clone().unwrap();
        assert_eq!((secret.name.as_str(), secret.optional), ("store", Some(false)));
    }
}
