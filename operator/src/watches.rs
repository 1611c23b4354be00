//! Caches of what the operator looks at, and a signal for each change. One watch of each kind serves
//! both controllers and the coordinator.

use crate::config::{MANAGER, SERVING_LABEL, TRAINING_LABEL};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use std::sync::Arc;
use tokio::sync::broadcast;
use vicuna_crds::VicunaTraining;

/// Changes that a slow reader may be behind; then it is told `Lagged` and looks at everything.
const MAX_BEHIND: usize = 4096;

/// Something in a cache is new, different or gone. The caches show it already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A pod of this training (namespace, name).
    TrainingPod(String, String),
    /// A pod of this serving (namespace, name).
    ServingPod(String, String),
    Node(String),
    Training(String, String),
}

#[derive(Clone)]
pub struct Watches {
    /// Our own pods, in all namespaces.
    pub pods: Store<Pod>,
    pub nodes: Store<Node>,
    pub trainings: Store<VicunaTraining>,
    changes: broadcast::Sender<Change>,
}

impl Watches {
    /// Starts the watches; they go on until the process ends.
    pub fn start(client: &Client) -> Self {
        let (changes, _) = broadcast::channel(MAX_BEHIND);
        let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}"));
        let all = watcher::Config::default();
        Self {
            pods: watch(Api::all(client.clone()), ours, slim_pod, pod_change, changes.clone()),
            nodes: watch(Api::all(client.clone()), all.clone(), slim_node, node_change, changes.clone()),
            trainings: watch(Api::all(client.clone()), all, slim_training, training_change, changes.clone()),
            changes,
        }
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Returns once all caches have been filled.
    pub async fn ready(&self) -> Result<(), kube::runtime::reflector::store::WriterDropped> {
        self.pods.wait_until_ready().await?;
        self.nodes.wait_until_ready().await?;
        self.trainings.wait_until_ready().await
    }

    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes.get(&ObjectRef::new(name))
    }

    pub fn training(&self, namespace: &str, name: &str) -> Option<Arc<VicunaTraining>> {
        self.trainings.get(&ObjectRef::new(name).within(namespace))
    }

    /// Pods with this label in this namespace.
    pub fn pods_of(&self, namespace: &str, label: &str, name: &str) -> Vec<Arc<Pod>> {
        self.pods.state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(namespace)
                && pod.labels().get(label).map(String::as_str) == Some(name)
        })
    }
}

/// A reflector with a hook after each change.
fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
    slim: fn(&mut K),
    change: fn(&K) -> Option<Change>,
    changes: broadcast::Sender<Change>,
) -> Store<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher(api, config).default_backoff().modify(slim).reflect(writer);
    tokio::spawn(async move {
        let mut events = std::pin::pin!(events);
        // An object that vanished while a watch was broken is in nobody's event: the periodic
        // look of controllers and coordinator finds it.
        while let Some(event) = events.next().await {
            match event {
                Ok(
                    watcher::Event::Apply(object) | watcher::Event::Delete(object) | watcher::Event::InitApply(object),
                ) => {
                    if let Some(change) = change(&object) {
                        // Nobody listening is fine.
                        let _ = changes.send(change);
                    }
                }
                Ok(watcher::Event::Init | watcher::Event::InitDone) => {}
                Err(error) => tracing::warn!(%error, kind = %K::kind(&()), "a watch broke and is retried"),
            }
        }
    });
    store
}

fn pod_change(pod: &Pod) -> Option<Change> {
    let namespace = pod.namespace()?;
    let labels = pod.labels();
    if let Some(name) = labels.get(TRAINING_LABEL) {
        return Some(Change::TrainingPod(namespace, name.clone()));
    }
    let name = labels.get(SERVING_LABEL)?;
    Some(Change::ServingPod(namespace, name.clone()))
}

fn node_change(node: &Node) -> Option<Change> {
    Some(Change::Node(node.name_any()))
}

fn training_change(training: &VicunaTraining) -> Option<Change> {
    Some(Change::Training(training.namespace()?, training.name_any()))
}

fn slim_pod(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
}

fn slim_node(node: &mut Node) {
    node.metadata.managed_fields = None;
    if let Some(status) = &mut node.status {
        status.images = None;
        status.volumes_in_use = None;
    }
}

fn slim_training(training: &mut VicunaTraining) {
    training.metadata.managed_fields = None;
}
