//! Carries a plan out: server-side apply of what we own, deletion by UID. Each write asks first
//! whether we still lead.

use super::build::account::worker_account;
use super::build::budget::budget;
use super::build::pod::pod;
use super::observe::{Model, Observed};
use super::plan::{Action, NewWorker, Plan, Removal, Why};
use crate::config::MANAGER;
use crate::context::Context;
use crate::leader::NotLeader;
use crate::pki::PkiError;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{0}")]
    NotLeader(#[from] NotLeader),
    #[error("what workers trust could not be published: {0}")]
    Trust(#[from] PkiError),
    #[error("the {kind} {name} could not be written: {source}")]
    Write { kind: String, name: String, source: kube::Error },
}

/// What was done. Only [`apply`] makes one, so a status speaks of what is.
#[derive(Debug, Default)]
pub struct Applied {
    created: usize,
    deleted: usize,
    error: Option<ApplyError>,
}

impl Applied {
    pub fn created(&self) -> usize {
        self.created
    }

    pub fn deleted(&self) -> usize {
        self.deleted
    }

    /// What stopped it before its end.
    pub fn error(&self) -> Option<&ApplyError> {
        self.error.as_ref()
    }

    pub fn into_error(self) -> Option<ApplyError> {
        self.error
    }
}

pub async fn apply(context: &Context, observed: &Observed, plan: &Plan) -> Applied {
    let mut applied = Applied::default();
    applied.error = carry_out(context, observed, plan, &mut applied).await.err();
    applied
}

async fn carry_out(
    context: &Context,
    observed: &Observed,
    plan: &Plan,
    applied: &mut Applied,
) -> Result<(), ApplyError> {
    let serving = &observed.serving;
    let namespace = serving.namespace().unwrap_or_default();
    let Plan { scaling, actions, memory: _, again_after: _ } = plan;
    let creates = actions.iter().any(|action| matches!(action, Action::Create(_)));
    // Workers that are there need a bundle that changes with its CAs.
    if creates || !observed.workers.is_empty() {
        context.trust.ensure(&namespace).await?;
    }
    if creates {
        write(context, &namespace, &worker_account(&namespace)).await?;
    }
    // Creations first: a replacement should be on its way before anything goes.
    for action in actions {
        if let (Action::Create(new), Model::Known(source)) = (action, &observed.model) {
            let pod = pod(serving, source, &context.config, new);
            write(context, &namespace, &pod).await?;
            applied.created += 1;
            tell_created(context, observed, new);
        }
    }
    for action in actions {
        if let Action::Delete(removal) = action {
            delete(context, &namespace, removal).await?;
            applied.deleted += 1;
            tell_deleted(context, observed, removal);
        }
    }
    let budgeted = scaling.before != scaling.desired || applied.created > 0 || is_new(observed);
    if budgeted {
        write(context, &namespace, &budget(serving, scaling.desired)).await?;
    }
    Ok(())
}

fn is_new(observed: &Observed) -> bool {
    observed.serving.status.is_none()
}

async fn write<K>(context: &Context, namespace: &str, object: &K) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Serialize + DeserializeOwned + Clone + Debug,
{
    context.leadership.check()?;
    let api: Api<K> = Api::namespaced(context.client.clone(), namespace);
    let name = object.name_any();
    let parameters = PatchParams::apply(MANAGER).force();
    let written = api.patch(&name, &parameters, &Patch::Apply(object)).await;
    written.map(drop).map_err(|source| ApplyError::Write { kind: K::kind(&()).into_owned(), name, source })
}

async fn delete(context: &Context, namespace: &str, removal: &Removal) -> Result<(), ApplyError> {
    context.leadership.check()?;
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    let parameters = DeleteParams {
        grace_period_seconds: removal.grace.map(|grace| u32::try_from(grace.as_secs().max(1)).unwrap_or(u32::MAX)),
        preconditions: Some(Preconditions { uid: Some(removal.uid.clone()), resource_version: None }),
        ..DeleteParams::default()
    };
    match pods.delete(&removal.name, &parameters).await {
        Ok(_) => Ok(()),
        // Gone already, or a namesake is there.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        Err(source) => Err(ApplyError::Write { kind: "Pod".to_owned(), name: removal.name.clone(), source }),
    }
}

fn tell_created(context: &Context, observed: &Observed, new: &NewWorker) {
    let NewWorker { name, pool, avoid: _ } = new;
    tracing::info!(serving = observed.serving.name_any(), pod = name, pool = pool.name, "worker created");
    let about = observed.serving.object_ref(&());
    let note = format!("Created worker {name} in pool {}.", pool.name);
    context.events.normal(&about, "WorkerCreated", "Create", note);
}

fn tell_deleted(context: &Context, observed: &Observed, removal: &Removal) {
    let Removal { name, why, .. } = removal;
    tracing::info!(serving = observed.serving.name_any(), pod = name, ?why, "worker let go");
    let about = observed.serving.object_ref(&());
    let because = match why {
        Why::Ended => "it ended and a new one takes its place",
        Why::ScaledDown => "fewer workers are wanted; it finishes its requests first",
        Why::NodeLeaving => "its node goes; its streams go on elsewhere",
        Why::Outdated => "another model, image or spec is served now",
        Why::StockOut => "no node of its pool takes it; the next pool is tried",
    };
    context.events.normal(&about, "WorkerLetGo", "Delete", format!("Let worker {name} go: {because}."));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::serving::plan::tests::observed;
    use k8s_openapi::api::core::v1::ServiceAccount;
    use k8s_openapi::api::policy::v1::PodDisruptionBudget;
    use serde_json::json;

    #[test]
    fn everything_that_is_applied_has_a_name_a_namespace_and_only_our_fields() {
        let seen = observed(json!({ "replicas": 1 }));
        let Model::Known(source) = &seen.model else { panic!("the model is known") };
        let new = NewWorker { name: "s-1".into(), pool: seen.serving.spec.pools[0].clone(), avoid: vec![] };
        let pod: Pod = pod(&seen.serving, source, &config::tests::sample(), &new);
        let account: ServiceAccount = worker_account("n");
        let budget: PodDisruptionBudget = budget(&seen.serving, 1);
        for object in [json!(pod), json!(account), json!(budget)] {
            assert_eq!(object["metadata"]["namespace"], "n");
            assert!(object["metadata"]["name"].is_string());
            assert!(object.get("status").is_none(), "status is not ours: {object}");
        }
    }
}
