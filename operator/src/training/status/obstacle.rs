//! What is in the way, said so that somebody can remove it.

use crate::config::GIVE_UP_IMAGE_ANNOTATION;
use crate::coordinator::report::Blockage;
use crate::training::apply::{Applied, ApplyError};
use crate::training::observe::{Observed, PodView, Trouble};
use vicuna_protocol::coordinator::Cause;

/// Something outside the training that keeps it, or a part of it, from going on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// One word, for the condition's reason.
    pub reason: &'static str,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// Checkpoints cannot be written.
    pub of_store: bool,
    /// Fewer than `workers.min` can train with it.
    pub blocks: bool,
}

/// The most telling obstacle: a rank knows more than a pod, a pod more than the API server's refusal.
pub fn obstacle(observed: &Observed, applied: &Applied) -> Option<Obstacle> {
    let found = blocked_rank(observed).or_else(|| troubled_pod(observed)).or_else(|| refused(applied))?;
    Some(Obstacle { blocks: blocks(observed), ..found })
}

fn blocks(observed: &Observed) -> bool {
    let fit = observed.report.as_ref().map_or(0, |report| {
        let ranks = report.ranks.values();
        ranks.filter(|rank| rank.connected && rank.prepared && rank.blocked.is_none()).count()
    });
    fit < observed.training.spec.workers.min as usize
}

fn blocked_rank(observed: &Observed) -> Option<Obstacle> {
    let ranks = &observed.report.as_ref()?.ranks;
    let blockage = ranks.values().find_map(|rank| rank.blocked.as_ref().filter(|_| rank.connected))?;
    Some(Obstacle {
        reason: reason_of(blockage),
        message: blockage.message.clone(),
        of_store: blockage.cause == Cause::Store,
        blocks: false,
    })
}

/// The wire carries the kind of cause; the store's own words tell the rest (`vicuna-checkpoint`,
/// `StoreError`).
pub fn reason_of(blockage: &Blockage) -> &'static str {
    let says = |words: &str| blockage.message.contains(words);
    match blockage.cause {
        Cause::Store if says("the bucket of") => "BucketMissing",
        Cause::Store if says("there are no credentials for") => "CredentialsMissing",
        Cause::Store if says("refused the credentials") => "CredentialsRefused",
        // As `StoreError::StoreFull` says it; the object's name comes between.
        Cause::Store if says("the store of") && says(" is full (") => "StoreFull",
        Cause::Store if says("cannot be reached") => "StoreUnreachable",
        Cause::Store => "StoreFailed",
        Cause::Model => "ModelUnreadable",
        Cause::Data => "DatasetInvalid",
        Cause::OutOfMemory => "DoesNotFit",
        Cause::Numerics => "NumericsMismatch",
        Cause::Infrastructure => "InfrastructureFailed",
        Cause::Application | Cause::Unspecified => "RankBlocked",
    }
}

fn troubled_pod(observed: &Observed) -> Option<Obstacle> {
    // Nobody waits for a pod that is to take over from one that still trains.
    let waited_for = |pod: &PodView| pod.replaces.is_none() && !pod.deleting && pod.ended.is_none();
    let troubled = |pod: &&PodView| pod.trouble.is_some() && waited_for(pod);
    let pod = observed.pods.iter().find(troubled)?;
    let name = &pod.name;
    let (reason, message) = match pod.trouble.as_ref()? {
        Trouble::Unschedulable { message, .. } => (
            "Unschedulable",
            format!(
                "No node of pool {} takes pod {name}: {message} Add nodes, lower workers.resources, or add a pool.",
                pod.pool
            ),
        ),
        Trouble::Gated => (
            "WaitsForAdmission",
            format!(
                "Pod {name} has scheduling gates: the controller that set them has not admitted it yet. Look at its queue."
            ),
        ),
        Trouble::ImagePull { image, message } => (
            "ImagePullFailed",
            format!(
                "The image {image} of pod {name} cannot be pulled: {message} Check the operator's runtime image and the node's access to its registry. If it is gone for good and the training is bound to it, annotate the training with {GIVE_UP_IMAGE_ANNOTATION}={image}."
            ),
        ),
        Trouble::Configuration { message } => ("PodMisconfigured", configuration(observed, name, message)),
    };
    Some(Obstacle { reason, message, of_store: false, blocks: false })
}

fn configuration(observed: &Observed, pod: &str, message: &str) -> String {
    match &observed.training.spec.checkpoint.credentials {
        Some(secret) => format!(
            "Pod {pod} cannot start: {message}. Create the Secret {} with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or correct spec.checkpoint.credentials.",
            secret.name
        ),
        None => format!("Pod {pod} cannot start: {message}."),
    }
}

fn refused(applied: &Applied) -> Option<Obstacle> {
    match applied.error.as_ref()? {
        ApplyError::Kube { action, source } => {
            let kube::Error::Api(status) = source.as_ref() else { return None };
            // 403: quota, Pod Security, or RBAC; 422: a pod that the API server finds invalid.
            let refused = status.code == 403 || status.code == 422;
            refused.then(|| Obstacle {
                reason: "PodsRefused",
                message: format!("The API server refused {action}: {}. Check quotas, admission policies and the operator's permissions in the namespace.", status.message),
                of_store: false,
                blocks: false,
            })
        }
        _ => None,
    }
}
