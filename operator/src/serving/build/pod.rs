//! A worker pod.

use super::account::WORKER_ACCOUNT;
use super::{labels, owner, selector};
use crate::config::{Config, METRICS_PORT, POOL_LABEL};
use crate::cpu;
use crate::serving::drain;
use crate::serving::names::public_name;
use crate::serving::observe::Source;
use crate::serving::plan::NewWorker;
use crate::spot::notices::NOTICE_ANNOTATION;
use k8s_openapi::api::core::v1::{
    Affinity, CSIVolumeSource, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource,
    EnvFromSource, EnvVar, EnvVarSource, HTTPGetAction, NodeAffinity, NodeSelector, NodeSelectorRequirement,
    NodeSelectorTerm, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSecurityContext, PodSpec, Probe,
    ProjectedVolumeSource, SeccompProfile, SecretEnvSource, SecretVolumeSource, SecurityContext,
    ServiceAccountTokenProjection, Toleration, TopologySpreadConstraint, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::time::Duration;
use vicuna_crds::{Pool, VicunaServing, WeightsCache};
use vicuna_protocol::GATEWAY_AUDIENCE;

/// Digest of what decides a worker besides its pool: pods of another one are replaced.
pub const REVISION_LABEL: &str = "vicuna.dev/revision";

const TOKEN_FOLDER: &str = "/var/run/secrets/vicuna";
const TRUST_FOLDER: &str = "/etc/vicuna/trust";
const SCRATCH_FOLDER: &str = "/scratch";
const CACHE_FOLDER: &str = "/cache";
const STORE_FOLDER: &str = "/var/run/secrets/store";
const TOKEN_SECONDS: i64 = 3600;
/// A node that stopped answering holds its workers so long; the gateway has moved their streams by then.
const UNREACHABLE_SECONDS: i64 = 5;
/// A model that is not there is asked for so long before the worker ends: it says why in `/readyz` and
/// comes up within seconds once it is, where a restarted container would wait for the kubelet's back-off.
const MODEL_PATIENCE: Duration = Duration::from_secs(3600);

/// The pod for a new worker.
pub fn pod(serving: &VicunaServing, source: &Source, config: &Config, new: &NewWorker) -> Pod {
    let NewWorker { name, pool, avoid } = new;
    let mut labels = labels(serving);
    labels.insert(POOL_LABEL.to_owned(), pool.name.clone());
    labels.insert(REVISION_LABEL.to_owned(), revision(serving, source, config));
    Pod {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: serving.namespace(),
            labels: Some(labels),
            annotations: Some(annotations(pool)),
            owner_references: owner(serving),
            ..ObjectMeta::default()
        },
        spec: Some(spec(serving, source, config, pool, avoid)),
        ..Pod::default()
    }
}

/// Digest of a worker's spec, the same in every pool and wherever it is.
pub fn revision(serving: &VicunaServing, source: &Source, config: &Config) -> String {
    let spec = spec(serving, source, config, &Pool::any_node(), &[]);
    let adapters: Vec<_> = source.adapters.iter().map(|adapter| &adapter.digest).collect();
    let text = serde_json::json!({ "spec": spec, "digest": source.digest, "adapters": adapters }).to_string();
    hex::encode(&Sha256::digest(text.as_bytes())[..8])
}

fn annotations(pool: &Pool) -> BTreeMap<String, String> {
    [
        (NOTICE_ANNOTATION, pool.notice().as_secs().to_string()),
        // We move workers ourselves; a consolidation would take them while they stream.
        ("karpenter.sh/do-not-disrupt", "true".to_owned()),
        ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false".to_owned()),
        ("prometheus.io/scrape", "true".to_owned()),
        ("prometheus.io/port", METRICS_PORT.to_string()),
        ("prometheus.io/path", "/metrics".to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn spec(serving: &VicunaServing, source: &Source, config: &Config, pool: &Pool, avoid: &[String]) -> PodSpec {
    let grace = (drain::timeout(serving, pool) + drain::GRACE_MARGIN).as_secs();
    PodSpec {
        containers: vec![container(serving, source, config, pool)],
        volumes: Some(volumes(serving, source, config)),
        service_account_name: Some(WORKER_ACCOUNT.to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        restart_policy: Some("Always".to_owned()),
        termination_grace_period_seconds: Some(i64::try_from(grace).unwrap_or(i64::MAX)),
        node_selector: (!pool.node_selector.is_empty()).then(|| pool.node_selector.clone()),
        tolerations: Some(tolerations(pool)),
        affinity: affinity(avoid),
        topology_spread_constraints: Some(spread(serving)),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(65532),
            run_as_group: Some(65532),
            fs_group: Some(65532),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

fn container(serving: &VicunaServing, source: &Source, config: &Config, pool: &Pool) -> Container {
    Container {
        name: "worker".to_owned(),
        image: Some(config.runtime_image.clone()),
        image_pull_policy: Some(config.image_pull_policy.clone()),
        command: Some(vec!["/usr/bin/vicuna-worker".to_owned()]),
        args: Some(args(serving, source, config, pool)),
        env: Some(environment(serving)),
        env_from: source.credentials.as_ref().map(|secret| {
            vec![EnvFromSource {
                secret_ref: Some(SecretEnvSource { name: secret.clone(), optional: Some(false) }),
                ..EnvFromSource::default()
            }]
        }),
        ports: Some(vec![ContainerPort {
            name: Some("metrics".to_owned()),
            container_port: METRICS_PORT.into(),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: serving.spec.worker.resources.clone(),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        liveness_probe: Some(probe("/healthz", 10, 6)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(mounts(serving)),
        ..Container::default()
    }
}

fn args(serving: &VicunaServing, source: &Source, config: &Config, pool: &Pool) -> Vec<String> {
    let spec = &serving.spec;
    let mut args = vec![
        format!("--model-name={}", public_name(serving)),
        format!("--model-uri={}", source.uri),
        format!("--gateway={}", config.gateway_workers_url()),
        format!("--gateway-server-name={}", config.gateway_service),
        format!("--ca={TRUST_FOLDER}/ca.crt"),
        format!("--token-file={TOKEN_FOLDER}/token"),
        format!("--slots={}", spec.worker.slots),
        format!("--capacity={}", pool.capacity.name()),
        format!("--pool={}", pool.name),
        format!("--scratch={SCRATCH_FOLDER}"),
        format!("--metrics=0.0.0.0:{METRICS_PORT}"),
        format!("--drain-timeout={}", drain::timeout(serving, pool).as_secs()),
        format!("--model-patience={}", MODEL_PATIENCE.as_secs()),
    ];
    args.extend(source.adapters.iter().map(|adapter| format!("--adapter={}={}", adapter.name, adapter.uri)));
    args.extend(spec.model.template.map(|template| format!("--template={}", template.name())));
    args.push(format!("--quantization={}", spec.model.quantization.name()));
    if let Some(cache) = &spec.worker.cache {
        args.push(format!("--cache={CACHE_FOLDER}"));
        args.push(format!("--cache-mib={}", cache.size_mib));
    }
    args.extend(spec.model.max_length.map(|tokens| format!("--max-length={tokens}")));
    args
}

fn environment(serving: &VicunaServing) -> Vec<EnvVar> {
    let value = |name: &str, value: String| EnvVar { name: name.to_owned(), value: Some(value), ..EnvVar::default() };
    let threads = cpu::threads(serving.spec.worker.resources.as_ref());
    [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("POD_UID", "metadata.uid"),
        ("NODE_NAME", "spec.nodeName"),
        ("POD_IP", "status.podIP"),
    ]
    .map(|(name, path)| EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: path.to_owned(), api_version: None }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    })
    .into_iter()
    .chain([value("VICUNA_STORE_CREDENTIALS", STORE_FOLDER.to_owned())])
    // A request is no quota: without this a worker would use the CPUs of its neighbours.
    .chain(threads.map(|threads| value("VICUNA_THREADS", threads.to_string())))
    .collect()
}

fn probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(METRICS_PORT.into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(5),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

fn mounts(serving: &VicunaServing) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount("token", TOKEN_FOLDER, true),
        mount("trust", TRUST_FOLDER, true),
        mount("scratch", SCRATCH_FOLDER, false),
        mount("tmp", "/tmp", false),
        mount("store", STORE_FOLDER, true),
    ];
    mounts.extend(serving.spec.worker.cache.as_ref().map(|_| mount("cache", CACHE_FOLDER, false)));
    mounts
}

/// Kinds that the restricted standard allows: `hostPath` is none of them.
fn cache(cache: &WeightsCache) -> Volume {
    let claim = cache.claim_name.clone().map(|claim_name| PersistentVolumeClaimVolumeSource {
        claim_name,
        ..PersistentVolumeClaimVolumeSource::default()
    });
    let csi = cache.csi.clone().map(|csi| CSIVolumeSource {
        driver: csi.driver,
        volume_attributes: Some(csi.volume_attributes),
        ..CSIVolumeSource::default()
    });
    Volume { name: "cache".to_owned(), persistent_volume_claim: claim, csi, ..Volume::default() }
}

/// The environment makes a pod wait for its Secret, and says so; the volume brings what is corrected in it later.
fn store(source: &Source) -> Volume {
    let secret = source.credentials.as_ref().map(|name| SecretVolumeSource {
        secret_name: Some(name.clone()),
        optional: Some(true),
        ..SecretVolumeSource::default()
    });
    let empty_dir = secret.is_none().then(EmptyDirVolumeSource::default);
    Volume { name: "store".to_owned(), secret, empty_dir, ..Volume::default() }
}

fn volumes(serving: &VicunaServing, source: &Source, config: &Config) -> Vec<Volume> {
    let empty = |name: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    };
    let mut volumes = vec![
        Volume {
            name: "token".to_owned(),
            projected: Some(ProjectedVolumeSource {
                sources: Some(vec![VolumeProjection {
                    service_account_token: Some(ServiceAccountTokenProjection {
                        audience: Some(GATEWAY_AUDIENCE.to_owned()),
                        expiration_seconds: Some(TOKEN_SECONDS),
                        path: "token".to_owned(),
                    }),
                    ..VolumeProjection::default()
                }]),
                ..ProjectedVolumeSource::default()
            }),
            ..Volume::default()
        },
        Volume {
            name: "trust".to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: config.trust_config_map.clone(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        empty("scratch"),
        empty("tmp"),
        store(source),
    ];
    volumes.extend(serving.spec.worker.cache.as_ref().map(cache));
    volumes
}

fn tolerations(pool: &Pool) -> Vec<Toleration> {
    let mut tolerations = pool.tolerations.clone();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        tolerations.push(Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some("NoExecute".to_owned()),
            toleration_seconds: Some(UNREACHABLE_SECONDS),
            ..Toleration::default()
        });
    }
    tolerations
}

/// Keeps away from nodes that are about to go, even where the pool tolerates their taints.
fn affinity(avoid: &[String]) -> Option<Affinity> {
    if avoid.is_empty() {
        return None;
    }
    // A match on a field takes one value, so there is one for each node.
    let match_fields = avoid.iter().map(|node| NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "NotIn".to_owned(),
        values: Some(vec![node.clone()]),
    });
    let term = NodeSelectorTerm { match_fields: Some(match_fields.collect()), ..NodeSelectorTerm::default() };
    Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector { node_selector_terms: vec![term] }),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    })
}

/// One reclaim takes as few workers as can be.
fn spread(serving: &VicunaServing) -> Vec<TopologySpreadConstraint> {
    ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        .map(|key| TopologySpreadConstraint {
            topology_key: key.to_owned(),
            max_skew: 1,
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(LabelSelector { match_labels: Some(selector(serving)), ..LabelSelector::default() }),
            ..TopologySpreadConstraint::default()
        })
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::serving::observe::AdapterSource;
    use crate::serving::plan::tests::observed;
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn source() -> Source {
        Source { uri: "s3://b/m".into(), digest: None, credentials: Some("keys".into()), adapters: Vec::new() }
    }

    fn serving() -> Arc<VicunaServing> {
        observed(json!({
            "replicas": 1, "drain": { "timeout": "20s" },
            "worker": { "slots": 4, "resources": { "requests": { "cpu": "1500m" } } },
            "model": { "from": { "uri": "s3://b/m" }, "template": "chatml", "maxLength": 512, "quantization": "Int8" }
        }))
        .serving
    }

    fn built() -> Value {
        let serving = serving();
        let new = NewWorker { name: "s-1".into(), pool: serving.spec.pools[0].clone(), avoid: vec!["bad".into()] };
        serde_json::to_value(pod(&serving, &source(), &config::tests::sample(), &new)).unwrap()
    }

    #[test]
    fn a_worker_gets_the_agreed_arguments() {
        let pod = built();
        let args: Vec<_> =
            pod["spec"]["containers"][0]["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        for expected in [
            "--model-name=n/s",
            "--model-uri=s3://b/m",
            "--template=chatml",
            "--max-length=512",
            "--quantization=int8",
            "--slots=4",
            "--capacity=Spot",
            "--pool=spot",
            "--gateway=https://vicuna-gateway-workers.vicuna-system.svc:9443",
            "--ca=/etc/vicuna/trust/ca.crt",
            "--token-file=/var/run/secrets/vicuna/token",
            "--drain-timeout=10",
        ] {
            assert!(args.contains(&expected), "{expected} is not in {args:?}");
        }
        assert_eq!(pod["spec"]["containers"][0]["envFrom"][0]["secretRef"]["name"], "keys");
    }

    #[test]
    fn a_worker_computes_on_the_cpus_that_it_asks_for() {
        let pod = built();
        let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        let threads = env.iter().find(|variable| variable["name"] == "VICUNA_THREADS").unwrap();
        assert_eq!(threads["value"], "1");
    }

    #[test]
    fn a_worker_meets_the_restricted_pod_security_standard() {
        let pod = built();
        let spec = &pod["spec"];
        let container = &spec["containers"][0]["securityContext"];
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(spec["automountServiceAccountToken"], false);
    }

    #[test]
    fn weights_are_shared_on_a_volume_that_the_restricted_standard_allows() {
        let with = |cache: Value| {
            let mut serving = (*serving()).clone();
            serving.spec.worker.cache = serde_json::from_value(cache).unwrap();
            let source = source();
            let spec = spec(&serving, &source, &config::tests::sample(), &serving.spec.pools[0], &[]);
            serde_json::to_value(spec).unwrap()
        };
        let volume = |spec: &Value| {
            let volumes = spec["volumes"].as_array().unwrap();
            volumes.iter().find(|volume| volume["name"] == "cache").cloned()
        };
        let claimed = with(json!({ "claimName": "weights", "sizeMib": 5000 }));
        assert_eq!(volume(&claimed).unwrap()["persistentVolumeClaim"]["claimName"], "weights");
        let args = claimed["containers"][0]["args"].to_string();
        assert!(args.contains("--cache=/cache") && args.contains("--cache-mib=5000"), "{args}");
        let mounts = claimed["containers"][0]["volumeMounts"].to_string();
        assert!(mounts.contains("\"/cache\""), "{mounts}");
        let driven =
            with(json!({ "csi": { "driver": "node-folders.example", "volumeAttributes": { "name": "weights" } } }));
        assert_eq!(volume(&driven).unwrap()["csi"]["driver"], "node-folders.example");
        assert_eq!(volume(&with(Value::Null)), None);
    }

    #[test]
    fn a_worker_goes_to_its_pool_and_away_from_nodes_that_leave() {
        let pod = built();
        assert_eq!(pod["spec"]["nodeSelector"], json!({ "kind": "spot" }));
        let node_affinity = &pod["spec"]["affinity"]["nodeAffinity"];
        let terms = &node_affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
        assert_eq!(terms[0]["matchFields"][0]["values"], json!(["bad"]));
        assert_eq!(pod["metadata"]["labels"]["vicuna.dev/pool"], "spot");
        assert_eq!(pod["metadata"]["annotations"]["vicuna.dev/notice-seconds"], "30");
    }

    #[test]
    fn a_worker_outlives_its_drain() {
        assert_eq!(built()["spec"]["terminationGracePeriodSeconds"], 20);
    }

    #[test]
    fn adapters_are_named_to_the_worker_and_their_results_are_part_of_the_revision() {
        let (serving, config) = (serving(), config::tests::sample());
        let adapted = |digest: &str| {
            let (name, uri, digest) = ("n/s:a".to_owned(), "s3://b/a".to_owned(), Some(digest.to_owned()));
            Source { adapters: vec![AdapterSource { name, uri, digest }], ..source() }
        };
        let args = args(&serving, &adapted("d"), &config, &serving.spec.pools[0]);
        assert!(args.contains(&"--adapter=n/s:a=s3://b/a".to_owned()), "{args:?}");
        let of = |source: &Source| revision(&serving, source, &config);
        assert_ne!(of(&adapted("d")), of(&adapted("other")));
    }

    #[test]
    fn the_revision_changes_with_the_model_and_not_with_the_pool() {
        let serving = serving();
        let config = config::tests::sample();
        let of = |source: &Source| revision(&serving, source, &config);
        let mut retrained = source();
        retrained.digest = Some("other".into());
        assert_ne!(of(&source()), of(&retrained));
        let mut elsewhere = (*serving).clone();
        elsewhere.spec.pools.clear();
        assert_eq!(of(&source()), revision(&elsewhere, &source(), &config));
    }
}
