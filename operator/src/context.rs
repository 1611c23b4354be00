//! What both controllers share.

use crate::config::Config;
use crate::coordinator::registry::{Clock, Coordinator, Told};
use crate::events::Events;
use crate::leader::Leadership;
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::pki::{self, PkiError, Trust};
use crate::spot::notices::NoticeBook;
use crate::watches::Watches;
use std::sync::Arc;
use tokio::sync::mpsc;

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

impl Context {
    /// What a leader begins with: trust is there, the caches fill behind it. What memberships tell comes out of the
    /// receiver.
    pub async fn start(
        client: kube::Client,
        config: Arc<Config>,
        metrics: Arc<Metrics>,
        leadership: Leadership,
        clock: Clock,
        wall_clock: pki::Clock,
    ) -> Result<(Self, mpsc::Receiver<Told>), PkiError> {
        let (coordinator, told) = Coordinator::new(client.clone(), leadership.clone(), metrics.clone(), clock);
        let trust = Trust::start(client.clone(), config.clone(), leadership.clone(), wall_clock).await?;
        let context = Self {
            events: Events::start(client.clone(), &config, leadership.clone()),
            watches: Watches::start(&client),
            loads: Arc::new(Loads::default()),
            notices: Arc::new(NoticeBook::new(config.notice_sources.clone())),
            coordinator: Arc::new(coordinator),
            trust: Arc::new(trust),
            client,
            config,
            leadership,
            metrics,
        };
        Ok((context, told))
    }
}
