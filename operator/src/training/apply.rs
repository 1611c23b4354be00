//! Carries out a plan. Every write asks first whether we are still the leader.

use super::build;
use super::observe::{Observed, PodView};
use super::plan::{Action, Plan};
use crate::config::MANAGER;
use crate::context::Context;
use crate::leader::NotLeader;
use crate::pki::PkiError;
use crate::spot::notices::LEAVE_ANNOTATION;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Debug;
use std::time::Duration;
use tokio::time::Instant;
use vicuna_crds::VicunaTraining;

/// What somebody changed or deleted is put right after so long at the latest.
const APPLY_AGAIN: Duration = Duration::from_secs(600);
const MAX_APPLIED: usize = 16_384;

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{action} failed: {source}")]
    Kube {
        action: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("a pod cannot be described: {0}")]
    Build(#[from] serde_json::Error),
    #[error(transparent)]
    Trust(#[from] PkiError),
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
}

/// What became of a plan. Only [`apply`] makes one.
#[derive(Debug, Default)]
#[allow(clippy::manual_non_exhaustive, reason = "the attribute would let the rest of the crate make one")]
pub struct Applied {
    pub created: usize,
    pub deleted: usize,
    /// The first thing that failed. The rest was tried nevertheless.
    pub error: Option<ApplyError>,
    _private: (),
}

/// Remembers what was applied, so that nothing is sent that would change nothing.
#[derive(Debug, Default)]
pub struct AppliedBefore(Mutex<HashMap<String, (Instant, Vec<u8>)>>);

impl AppliedBefore {
    fn is_fresh(&self, key: &str, digest: &[u8]) -> bool {
        let applied = self.0.lock();
        applied.get(key).is_some_and(|(at, before)| at.elapsed() < APPLY_AGAIN && before == digest)
    }

    fn remember(&self, key: String, digest: Vec<u8>) {
        let mut applied = self.0.lock();
        if applied.len() >= MAX_APPLIED {
            applied.retain(|_, (at, _)| at.elapsed() < APPLY_AGAIN);
        }
        if applied.len() < MAX_APPLIED {
            applied.insert(key, (Instant::now(), digest));
        }
    }
}

/// Carries out `plan`.
pub async fn apply(context: &Context, before: &AppliedBefore, observed: &Observed, plan: &Plan) -> Applied {
    let mut applied = Applied::default();
    for action in &plan.actions {
        let result = match action {
            Action::Prepare { min_available } => prepare(context, before, observed, *min_available).await,
            Action::CreatePod { name, pool, replaces } => {
                create(context, observed, name, *pool, replaces.as_deref()).await.map(|()| applied.created += 1)
            }
            Action::AskToLeave { name, uid, why } => ask_to_leave(context, observed, name, uid, why).await,
            Action::DeleteTraining => delete_training(context, observed).await,
            Action::DeletePod { name, uid, why, force } => {
                delete(context, observed, name, uid, why, *force).await.map(|()| applied.deleted += 1)
            }
        };
        if let Err(error) = result {
            applied.error.get_or_insert(error);
        }
    }
    applied
}

async fn prepare(
    context: &Context,
    before: &AppliedBefore,
    observed: &Observed,
    min_available: u32,
) -> Result<(), ApplyError> {
    let namespace = observed.training.namespace().unwrap_or_default();
    context.trust.ensure(&namespace).await?;
    let account: ServiceAccount = build::service_account::service_account();
    server_side_apply(context, before, &namespace, &account).await?;
    let budget: PodDisruptionBudget = build::pdb::disruption_budget(&observed.training, min_available);
    server_side_apply(context, before, &namespace, &budget).await
}

/// Applies with our field manager. Only fields that we own are in `object`, so force takes nothing
/// from anybody.
async fn server_side_apply<K>(
    context: &Context,
    before: &AppliedBefore,
    namespace: &str,
    object: &K,
) -> Result<(), ApplyError>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Serialize
        + DeserializeOwned
        + Clone
        + Debug,
{
    let name = object.meta().name.clone().unwrap_or_default();
    let key = format!("{}/{namespace}/{name}", K::kind(&()));
    let digest = Sha256::digest(serde_json::to_vec(object)?).to_vec();
    if before.is_fresh(&key, &digest) {
        return Ok(());
    }
    context.leadership.check()?;
    let api: Api<K> = Api::namespaced(context.client.clone(), namespace);
    api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object))
        .await
        .map_err(|source| ApplyError::Kube { action: format!("applying {key}"), source: Box::new(source) })?;
    before.remember(key, digest);
    Ok(())
}

async fn create(
    context: &Context,
    observed: &Observed,
    name: &str,
    pool: usize,
    replaces: Option<&str>,
) -> Result<(), ApplyError> {
    let Some(pool) = observed.pools.get(pool) else { return Ok(()) };
    // Where all are on one node, who takes over is to be on another.
    let replaced = |pod: &&PodView| replaces == Some(pod.uid.as_str()) && observed.pools_apart.contains(&pool.name);
    let crowded = observed.pods.iter().filter(replaced).filter_map(|pod| pod.node.clone());
    let avoided = observed.avoided_nodes.iter().cloned().chain(crowded).collect();
    let place = build::pod::Place { pool, name, replaces, avoided: &avoided, suspect: &observed.suspect_nodes };
    let pod = build::pod::pod(&observed.training, &context.config, &place)?;
    context.leadership.check()?;
    let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    match pods(context, observed).create(&parameters, &pod).await {
        Ok(_) => {
            tracing::info!(pod = name, pool = pool.name, "made a pod");
            Ok(())
        }
        // The cache has not shown it yet: it is there, and that is what was wanted.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(source) => Err(ApplyError::Kube { action: format!("making pod {name}"), source: Box::new(source) }),
    }
}

/// Its node, or its pool, is to be left; membership and plan see the mark in the cache.
async fn ask_to_leave(
    context: &Context,
    observed: &Observed,
    name: &str,
    uid: &str,
    why: &str,
) -> Result<(), ApplyError> {
    context.leadership.check()?;
    // A namesake is refused.
    let patch = json!({"metadata": {"uid": uid, "annotations": {LEAVE_ANNOTATION: why}}});
    match pods(context, observed).patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => {
            tracing::info!(pod = name, why, "asked a pod to leave");
            Ok(())
        }
        // Gone, or another's: a uid cannot be changed, so the patch is invalid then.
        Err(kube::Error::Api(status)) if [404, 409, 422].contains(&status.code) => Ok(()),
        Err(source) => Err(ApplyError::Kube { action: format!("marking pod {name}"), source: Box::new(source) }),
    }
}

async fn delete_training(context: &Context, observed: &Observed) -> Result<(), ApplyError> {
    context.leadership.check()?;
    let name = observed.training.name_any();
    let namespace = observed.training.namespace().unwrap_or_default();
    let api: Api<VicunaTraining> = Api::namespaced(context.client.clone(), &namespace);
    let parameters = DeleteParams {
        preconditions: Some(Preconditions { uid: observed.training.uid(), ..Preconditions::default() }),
        ..DeleteParams::default()
    };
    match api.delete(&name, &parameters).await {
        Ok(_) => {
            tracing::info!(namespace, training = name, "deleted a training whose ttlAfterFinished has passed");
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        Err(source) => Err(ApplyError::Kube { action: format!("deleting training {name}"), source: Box::new(source) }),
    }
}

async fn delete(
    context: &Context,
    observed: &Observed,
    name: &str,
    uid: &str,
    why: &str,
    force: bool,
) -> Result<(), ApplyError> {
    context.leadership.check()?;
    let parameters = DeleteParams {
        // Nobody answers for a node that is gone.
        grace_period_seconds: force.then_some(0),
        preconditions: Some(Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() }),
        ..DeleteParams::default()
    };
    match pods(context, observed).delete(name, &parameters).await {
        Ok(_) => {
            tracing::info!(pod = name, why, "deleted a pod");
            Ok(())
        }
        // Gone, or another one with its name.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        Err(source) => Err(ApplyError::Kube { action: format!("deleting pod {name}"), source: Box::new(source) }),
    }
}

fn pods(context: &Context, observed: &Observed) -> Api<Pod> {
    let namespace = observed.training.namespace().unwrap_or_default();
    Api::namespaced(context.client.clone(), &namespace)
}
