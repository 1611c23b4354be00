//! Caches of what the operator looks at, and a signal for each change. One watch of each kind serves
//! both controllers and the coordinator.

use crate::config::{MANAGER, SERVING_LABEL, TRAINING_LABEL};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::ObjectMeta;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use parking_lot::RwLock;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
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
    index: Arc<RwLock<PodIndex>>,
    /// Names of all nodes that were ever heard of: some tens of bytes each, for as long as the process lives.
    met: Arc<RwLock<HashSet<String>>>,
    changes: broadcast::Sender<Change>,
}

impl Watches {
    /// Starts the watches; they go on until the process ends.
    pub fn start(client: &Client) -> Self {
        let (changes, _) = broadcast::channel(MAX_BEHIND);
        let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}"));
        let all = watcher::Config::default();
        let index: Arc<RwLock<PodIndex>> = Arc::default();
        let keep = {
            let index = index.clone();
            move |event: &watcher::Event<Pod>| index.write().learn(event)
        };
        let met: Arc<RwLock<HashSet<String>>> = Arc::default();
        let meet = {
            let (met, mut listed) = (met.clone(), Vec::new());
            move |event: &watcher::Event<Node>| match event {
                watcher::Event::Apply(node) => drop(met.write().insert(node.name_any())),
                // The cache shows a list only when it is whole.
                watcher::Event::InitApply(node) => listed.push(node.name_any()),
                watcher::Event::InitDone => met.write().extend(listed.drain(..)),
                watcher::Event::Init => listed.clear(),
                watcher::Event::Delete(_) => {}
            }
        };
        Self {
            pods: watch(Api::all(client.clone()), ours, slim_pod, keep, pod_change, changes.clone()),
            nodes: watch(Api::all(client.clone()), all.clone(), slim_node, meet, node_change, changes.clone()),
            trainings: watch(Api::all(client.clone()), all, slim_training, |_| {}, training_change, changes.clone()),
            index,
            met,
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

    /// `None`: it is gone. A node that pods are on already but that its own watch has not told of yet, because that is
    /// behind or broken, is there, with nothing known of it but its name.
    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        // Before the cache is asked: it may learn of the node just then.
        let unheard_of = !self.met.read().contains(name);
        let placeholder = || {
            let metadata = ObjectMeta { name: Some(name.to_owned()), ..Default::default() };
            unheard_of.then(|| Arc::new(Node { metadata, ..Default::default() }))
        };
        self.nodes.get(&ObjectRef::new(name)).or_else(placeholder)
    }

    pub fn training(&self, namespace: &str, name: &str) -> Option<Arc<VicunaTraining>> {
        self.trainings.get(&ObjectRef::new(name).within(namespace))
    }

    /// Pods of the training with this name in this namespace, and of its namesakes.
    pub fn pods_of(&self, namespace: &str, training: &str) -> Vec<Arc<Pod>> {
        let names = self.index.read().pods_of(namespace, training);
        names.iter().filter_map(|name| self.pods.get(&ObjectRef::new(name).within(namespace))).collect()
    }

    /// Namespaces and names of the trainings with a pod on this node.
    pub fn trainings_on(&self, node: &str) -> BTreeSet<(String, String)> {
        self.index.read().trainings_on(node)
    }
}

type Name = (String, String);

/// Which pods belong to which training, and where they are; so that looking at one training costs what
/// its own pods cost.
#[derive(Debug, Default)]
struct PodIndex {
    /// Training and node of each pod.
    known: HashMap<Name, (Name, Option<String>)>,
    /// Pod names by training.
    by_training: HashMap<Name, BTreeSet<String>>,
    /// Pods of each training on a node.
    by_node: HashMap<String, BTreeMap<Name, BTreeSet<String>>>,
    /// Pods of a list that is being read; those that are not in it are gone.
    listed: Option<BTreeSet<Name>>,
}

impl PodIndex {
    fn learn(&mut self, event: &watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.listed = Some(BTreeSet::new()),
            watcher::Event::InitApply(pod) => {
                self.put(pod);
                if let (Some(listed), Some(name)) = (&mut self.listed, name_of(pod)) {
                    listed.insert(name);
                }
            }
            watcher::Event::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                let gone: Vec<Name> = self.known.keys().filter(|name| !listed.contains(*name)).cloned().collect();
                gone.iter().for_each(|name| self.remove(name));
            }
            watcher::Event::Apply(pod) => self.put(pod),
            watcher::Event::Delete(pod) => {
                if let Some(name) = name_of(pod) {
                    self.remove(&name);
                }
            }
        }
    }

    fn put(&mut self, pod: &Pod) {
        let Some(name) = name_of(pod) else { return };
        let training = pod.labels().get(TRAINING_LABEL).map(|training| (name.0.clone(), training.clone()));
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let Some(training) = training else { return self.remove(&name) };
        if self.known.get(&name).is_some_and(|known| *known == (training.clone(), node.clone())) {
            return;
        }
        self.remove(&name);
        self.by_training.entry(training.clone()).or_default().insert(name.1.clone());
        if let Some(node) = &node {
            let on_node = self.by_node.entry(node.clone()).or_default();
            on_node.entry(training.clone()).or_default().insert(name.1.clone());
        }
        self.known.insert(name, (training, node));
    }

    fn remove(&mut self, name: &Name) {
        let Some((training, node)) = self.known.remove(name) else { return };
        if let Some(pods) = self.by_training.get_mut(&training) {
            pods.remove(&name.1);
            if pods.is_empty() {
                self.by_training.remove(&training);
            }
        }
        let Some(node) = node else { return };
        let Some(trainings) = self.by_node.get_mut(&node) else { return };
        if let Some(pods) = trainings.get_mut(&training) {
            pods.remove(&name.1);
            if pods.is_empty() {
                trainings.remove(&training);
            }
        }
        if trainings.is_empty() {
            self.by_node.remove(&node);
        }
    }

    fn pods_of(&self, namespace: &str, training: &str) -> Vec<String> {
        let key = (namespace.to_owned(), training.to_owned());
        self.by_training.get(&key).into_iter().flatten().cloned().collect()
    }

    fn trainings_on(&self, node: &str) -> BTreeSet<Name> {
        self.by_node.get(node).into_iter().flat_map(BTreeMap::keys).cloned().collect()
    }
}

fn name_of(pod: &Pod) -> Option<Name> {
    Some((pod.namespace()?, pod.metadata.name.clone()?))
}

/// A reflector with a hook after each change.
fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
    slim: fn(&mut K),
    mut seen: impl FnMut(&watcher::Event<K>) + Send + 'static,
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
            if let Ok(event) = &event {
                seen(event);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use watcher::Event;

    fn pod(name: &str, training: &str, node: Option<&str>) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "ns", "labels": {TRAINING_LABEL: training}},
            "spec": {"nodeName": node, "containers": []},
        }))
        .unwrap()
    }

    fn key(training: &str) -> Name {
        ("ns".to_owned(), training.to_owned())
    }

    #[test]
    fn pods_are_found_by_training_and_trainings_by_node() {
        let mut index = PodIndex::default();
        index.learn(&Event::Apply(pod("a-0", "a", None)));
        index.learn(&Event::Apply(pod("a-1", "a", Some("n1"))));
        index.learn(&Event::Apply(pod("b-0", "b", Some("n1"))));
        assert_eq!(index.pods_of("ns", "a"), ["a-0", "a-1"]);
        assert!(index.pods_of("other", "a").is_empty());
        assert_eq!(index.trainings_on("n1"), [key("a"), key("b")].into());
        index.learn(&Event::Apply(pod("a-0", "a", Some("n2"))));
        assert_eq!(index.trainings_on("n2"), [key("a")].into());
        index.learn(&Event::Delete(pod("a-1", "a", Some("n1"))));
        assert_eq!(index.pods_of("ns", "a"), ["a-0"]);
        assert_eq!(index.trainings_on("n1"), [key("b")].into());
    }

    #[test]
    fn what_vanished_while_the_watch_was_broken_is_forgotten_and_nothing_is_kept_of_it() {
        let mut index = PodIndex::default();
        for name in ["a-0", "a-1"] {
            index.learn(&Event::Apply(pod(name, "a", Some("n1"))));
        }
        index.learn(&Event::Init);
        index.learn(&Event::InitApply(pod("a-1", "a", Some("n1"))));
        assert_eq!(index.pods_of("ns", "a").len(), 2, "a list that is being read proves nothing yet");
        index.learn(&Event::InitDone);
        assert_eq!(index.pods_of("ns", "a"), ["a-1"]);
        index.learn(&Event::Delete(pod("a-1", "a", Some("n1"))));
        assert!(index.known.is_empty() && index.by_training.is_empty() && index.by_node.is_empty());
    }
}
