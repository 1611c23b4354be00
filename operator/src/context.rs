//! What both controllers share.

use crate::config::Config;
use crate::coordinator::registry::Coordinator;
use crate::events::Events;
use crate::leader::Leadership;
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::pki::Trust;
use crate::spot::notices::NoticeBook;
use crate::watches::Watches;
use std::sync::Arc;

/// Cheap to share: controllers get it as `Arc<Context>`.
pub struct Context {
    pub client: kube::Client,
    pub config: Arc<Config>,
    /// Ask `leadership.check()?` right before every write: it fails by the local clock before the
    /// lease can be another's.
    pub leadership: Leadership,
    pub loads: Arc<Loads>,
    pub metrics: Arc<Metrics>,
    pub events: Events,
    /// Caches of our pods (label `app.kubernetes.io/managed-by=vicuna-operator`, all namespaces) and
    /// of all nodes, with a signal on every change.
    pub watches: Watches,
    /// What is known of nodes that are about to go.
    pub notices: Arc<NoticeBook>,
    /// Call `trust.ensure(namespace)` before making pods in a namespace.
    pub trust: Arc<Trust>,
    /// The memberships of all trainings.
    pub coordinator: Arc<Coordinator>,
}
