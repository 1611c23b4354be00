//! Objects, their versions, and what has happened to them.

use super::Refusal;
use super::ownership::{self, Owners};
use super::selector::Selector;
use bytes::Bytes;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tokio::time::Instant;

/// Changes that a watch may begin with, at most.
const MAX_HISTORY: usize = 4096;
const DEFAULT_GRACE_SECONDS: u64 = 30;

/// A kind of object that is served.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Served {
    pub api_version: &'static str,
    pub kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    /// Its status is written apart from the rest.
    has_status: bool,
    /// It counts changes of what is asked for.
    has_generation: bool,
}

pub type Resource = &'static Served;

const fn served(
    api_version: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    has_status: bool,
    has_generation: bool,
) -> Served {
    Served { api_version, kind, plural, namespaced, has_status, has_generation }
}

static SERVED: &[Served] = &[
    served("v1", "Namespace", "namespaces", false, true, false),
    served("v1", "Node", "nodes", false, true, false),
    served("v1", "Pod", "pods", true, true, true),
    served("v1", "ConfigMap", "configmaps", true, false, false),
    served("v1", "Secret", "secrets", true, false, false),
    served("v1", "ServiceAccount", "serviceaccounts", true, false, false),
    served("coordination.k8s.io/v1", "Lease", "leases", true, false, false),
    served("events.k8s.io/v1", "Event", "events", true, false, false),
    served("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", true, true, true),
    served("vicuna.dev/v1alpha1", "VicunaTraining", "vicunatrainings", true, true, true),
];

impl Served {
    pub fn find(api_version: &str, plural: &str) -> Option<Resource> {
        SERVED.iter().find(|served| served.api_version == api_version && served.plural == plural)
    }

    pub fn of_kind(kind: &str) -> Option<Resource> {
        SERVED.iter().find(|served| served.kind == kind)
    }
}

/// Where an object is; the namespace of what has none is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub resource: Resource,
    pub namespace: String,
    pub name: String,
}

#[derive(Clone, Debug)]
struct Stored {
    object: Arc<Value>,
    owners: Owners,
}

/// How and by whom something is written.
pub struct Write {
    pub status_only: bool,
    pub manager: String,
}

#[derive(Clone, Copy, Debug)]
pub enum PatchKind {
    /// RFC 7386.
    Merge,
    Apply {
        force: bool,
    },
}

/// What is to be so for a deletion to take place, and how long it may take.
#[derive(Debug, Default)]
pub struct Deletion {
    uid: Option<String>,
    resource_version: Option<String>,
    grace_seconds: Option<u64>,
}

impl Deletion {
    /// As `DeleteOptions` say it.
    pub fn of(options: &Value) -> Self {
        let text = |name: &str| options["preconditions"][name].as_str().map(str::to_owned);
        Self {
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            grace_seconds: options["gracePeriodSeconds"].as_u64(),
        }
    }
}

/// One change, as it is kept for watches.
#[derive(Clone, Debug)]
struct Change {
    revision: u64,
    key: Key,
    before: Option<Arc<Value>>,
    /// `None`: it was deleted.
    after: Option<Arc<Value>>,
}

pub struct Watch {
    resource: Resource,
    namespace: Option<String>,
    selector: Selector,
}

impl Watch {
    pub fn new(resource: Resource, namespace: Option<String>, selector: Selector) -> Self {
        Self { resource, namespace, selector }
    }

    /// What the change is for one who sees only what is selected.
    fn line(&self, change: &Change) -> Option<Bytes> {
        let elsewhere = self.namespace.as_ref().is_some_and(|namespace| *namespace != change.key.namespace);
        if self.resource != change.key.resource || elsewhere {
            return None;
        }
        let seen =
            |object: &Option<Arc<Value>>| object.as_ref().filter(|object| self.selector.selects(object)).cloned();
        let (kind, object) = match (seen(&change.before), seen(&change.after)) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", after),
            (Some(_), Some(after)) => ("MODIFIED", after),
            (Some(before), None) => ("DELETED", change.after.clone().unwrap_or(before)),
        };
        let mut object = (*object).clone();
        object["metadata"]["resourceVersion"] = json!(change.revision.to_string());
        Some(Bytes::from(format!("{}\n", json!({"type": kind, "object": object}))))
    }
}

/// All objects, and the time.
pub struct Store {
    objects: BTreeMap<Key, Stored>,
    revision: u64,
    born: u64,
    history: VecDeque<Change>,
    /// Up to here the history is forgotten.
    compacted: u64,
    watches: Vec<(Watch, UnboundedSender<Bytes>)>,
    started: Instant,
    started_ms: u64,
}

impl Store {
    pub fn new(unix_ms: u64) -> Self {
        let mut store = Self {
            objects: BTreeMap::new(),
            revision: 0,
            born: 0,
            history: VecDeque::new(),
            compacted: 0,
            watches: Vec::new(),
            started: Instant::now(),
            started_ms: unix_ms,
        };
        store.put("Namespace", json!({"metadata": {"name": "default"}}));
        store
    }

    pub fn now_ms(&self) -> u64 {
        self.started_ms + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// RFC 3339, in whole seconds, as the API writes times.
    pub fn now_text(&self) -> String {
        let seconds = i64::try_from(self.now_ms() / 1000).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or_default().to_string()
    }

    /// Of the last change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn objects(&self, kind: &str) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        let kind = kind.to_owned();
        self.objects.iter().filter(move |(key, _)| key.resource.kind == kind).map(|(key, stored)| (key, &stored.object))
    }

    pub fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<&Value> {
        let key = Key { resource: Served::of_kind(kind)?, namespace: namespace.to_owned(), name: name.to_owned() };
        self.objects.get(&key).map(|stored| stored.object.as_ref())
    }

    /// Makes or changes an object without asking anybody; for those who are beside the API, as a kubelet is.
    pub fn put(&mut self, kind: &str, object: Value) {
        let Some(resource) = Served::of_kind(kind) else { return };
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
        let key = Key { resource, namespace: text("namespace"), name: text("name") };
        match self.objects.get(&key).cloned() {
            Some(stored) => {
                let mut object = object;
                self.keep_identity(&mut object, &stored.object);
                drop(self.commit(&key, object, stored.owners));
            }
            None => {
                let object = self.newborn(&key, object);
                drop(self.commit(&key, object, Owners::new()));
            }
        }
    }

    /// Changes an object that is there, as [`Self::put`] does.
    pub fn edit(&mut self, key: &Key, change: impl FnOnce(&mut Value)) {
        let Some(stored) = self.objects.get(key).cloned() else { return };
        let mut object = (*stored.object).clone();
        change(&mut object);
        drop(self.commit(key, object, stored.owners));
    }

    /// Takes an object away at once.
    pub fn remove(&mut self, key: &Key) {
        if let Some(stored) = self.objects.remove(key) {
            self.record(Change { revision: 0, key: key.clone(), before: Some(stored.object), after: None });
        }
    }

    pub fn get(&self, key: &Key) -> Result<Value, Refusal> {
        self.objects.get(key).map(|stored| (*stored.object).clone()).ok_or_else(|| not_found(key))
    }

    pub fn list(&self, resource: Resource, namespace: Option<&str>, selector: &Selector) -> Value {
        let here = |key: &Key| key.resource == resource && namespace.is_none_or(|namespace| namespace == key.namespace);
        let found = self.objects.iter().filter(|(key, stored)| here(key) && selector.selects(&stored.object));
        let items: Vec<Value> = found.map(|(_, stored)| (*stored.object).clone()).collect();
        json!({
            "apiVersion": resource.api_version, "kind": format!("{}List", resource.kind),
            "metadata": {"resourceVersion": self.revision.to_string()}, "items": items,
        })
    }

    /// All changes after `since`, those to come too.
    pub fn watch(&mut self, watch: Watch, since: u64) -> Result<UnboundedReceiver<Bytes>, Refusal> {
        if since < self.compacted {
            let message = format!("too old resource version: {since} ({})", self.compacted);
            return Err(Refusal::new(410, "Expired", message));
        }
        let (sender, receiver) = unbounded();
        for change in self.history.iter().filter(|change| change.revision > since) {
            if let Some(line) = watch.line(change) {
                // The receiver is ours still.
                let _ = sender.unbounded_send(line);
            }
        }
        self.watches.push((watch, sender));
        Ok(receiver)
    }

    /// Forgets what has happened so far: who has not seen it has to list anew.
    pub fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    pub fn bookmark(&self, resource: Resource) -> Bytes {
        let object = json!({
            "apiVersion": resource.api_version, "kind": resource.kind,
            "metadata": {"resourceVersion": self.revision.to_string()},
        });
        Bytes::from(format!("{}\n", json!({"type": "BOOKMARK", "object": object})))
    }

    pub fn create(
        &mut self,
        resource: Resource,
        namespace: Option<&str>,
        object: Value,
        write: &Write,
    ) -> Result<Value, Refusal> {
        let mut object = ownership::without_nulls(object);
        self.check_namespace(resource, namespace)?;
        let inner = object["metadata"]["namespace"].as_str();
        if inner.is_some_and(|inner| namespace.is_some_and(|namespace| namespace != inner)) {
            return Err(Refusal::new(400, "BadRequest", "the namespace of the object is not that of the request"));
        }
        if let (None, Some(beginning)) =
            (object["metadata"]["name"].as_str(), object["metadata"]["generateName"].as_str())
        {
            let name = format!("{beginning}{:05}", self.born);
            object["metadata"]["name"] = json!(name);
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        check_name(resource, &name)?;
        let key = Key { resource, namespace: namespace.unwrap_or_default().to_owned(), name };
        if self.objects.contains_key(&key) {
            let message = format!("{} {:?} already exists", resource.plural, key.name);
            return Err(Refusal::new(409, "AlreadyExists", message));
        }
        let object = self.newborn(&key, without_status(resource, object));
        let mut owners = Owners::new();
        ownership::take_over(&mut owners, &write.manager, &json!({}), &object);
        Ok(self.commit(&key, object, owners))
    }

    pub fn replace(&mut self, key: &Key, object: Value, write: &Write) -> Result<Value, Refusal> {
        let stored = self.objects.get(key).cloned().ok_or_else(|| not_found(key))?;
        let object = ownership::without_nulls(object);
        check_identity(key, &stored.object, &object)?;
        let object = within(key.resource, &stored.object, object, write.status_only);
        self.update(key, stored, object, &write.manager)
    }

    /// The answer's code and the object.
    pub fn patch(&mut self, key: &Key, patch: Value, kind: PatchKind, write: &Write) -> Result<(u16, Value), Refusal> {
        let stored = match (self.objects.get(key).cloned(), kind) {
            (Some(stored), _) => stored,
            (None, PatchKind::Apply { .. }) if !write.status_only => return self.apply_new(key, patch, write),
            (None, _) => return Err(not_found(key)),
        };
        match kind {
            PatchKind::Merge => {
                check_patch(key, &stored.object, &patch, write)?;
                let mut object = (*stored.object).clone();
                merge(&mut object, &patch);
                let object = within(key.resource, &stored.object, object, write.status_only);
                self.update(key, stored, object, &write.manager).map(|object| (200, object))
            }
            PatchKind::Apply { force } => self.apply(key, stored, patch, force, write).map(|object| (200, object)),
        }
    }

    fn apply_new(&mut self, key: &Key, patch: Value, write: &Write) -> Result<(u16, Value), Refusal> {
        if patch["metadata"]["uid"].is_string() {
            return Err(conflict(key, "there is none with this uid"));
        }
        self.check_namespace(key.resource, Some(&key.namespace).filter(|name| !name.is_empty()).map(String::as_str))?;
        check_name(key.resource, &key.name)?;
        let patch = without_status(key.resource, ownership::without_nulls(patch));
        let fields = ownership::leaves(&patch);
        let object = self.newborn(key, patch);
        let owners = Owners::from([(write.manager.clone(), fields.into_keys().collect())]);
        Ok((201, self.commit(key, object, owners)))
    }

    fn apply(&mut self, key: &Key, stored: Stored, patch: Value, force: bool, write: &Write) -> Result<Value, Refusal> {
        check_patch(key, &stored.object, &patch, write)?;
        let mut fields = ownership::leaves(&ownership::without_nulls(patch));
        fields.retain(|path, _| !key.resource.has_status || (path[0] == "status") == write.status_only);
        // What is applied to the status and what is applied to the rest are kept apart.
        let manager = if write.status_only { format!("{} (status)", write.manager) } else { write.manager.clone() };
        let conflicts = ownership::conflicts(&stored.owners, &manager, &stored.object, &fields);
        if let Some((other, path)) = conflicts.first().filter(|_| !force) {
            let message = format!("Apply failed with a conflict with {other:?}: .{}", path.join("."));
            return Err(Refusal::new(409, "Conflict", message));
        }
        let Stored { object, mut owners } = stored;
        let mut changed = (*object).clone();
        ownership::apply(&mut owners, &manager, &mut changed, &fields);
        self.keep_identity(&mut changed, &object);
        Ok(self.commit(key, changed, owners))
    }

    fn update(&mut self, key: &Key, stored: Stored, mut object: Value, manager: &str) -> Result<Value, Refusal> {
        self.keep_identity(&mut object, &stored.object);
        let Stored { object: before, mut owners } = stored;
        ownership::take_over(&mut owners, manager, &before, &object);
        Ok(self.commit(key, object, owners))
    }

    /// The object as it is after that, or as it was where it is gone.
    pub fn delete(&mut self, key: &Key, deletion: &Deletion) -> Result<Value, Refusal> {
        let stored = self.objects.get(key).cloned().ok_or_else(|| not_found(key))?;
        let is = |wanted: &Option<String>, name: &str| {
            wanted.as_ref().is_none_or(|wanted| stored.object["metadata"][name].as_str() == Some(wanted))
        };
        if !is(&deletion.uid, "uid") || !is(&deletion.resource_version, "resourceVersion") {
            return Err(conflict(key, "the precondition is not met"));
        }
        let grace_seconds = grace_seconds(key.resource, &stored.object, deletion);
        let mut object = (*stored.object).clone();
        let sooner =
            object["metadata"]["deletionGracePeriodSeconds"].as_u64().is_none_or(|before| grace_seconds < before);
        if sooner {
            let at_ms = self.now_ms() + grace_seconds * 1000;
            object["metadata"]["deletionTimestamp"] = json!(text_of(at_ms));
            object["metadata"]["deletionGracePeriodSeconds"] = json!(grace_seconds);
        }
        Ok(self.commit(key, object, stored.owners))
    }

    /// Deletes what belongs only to objects that are gone, as the garbage collector does after a while.
    pub fn collect_garbage(&mut self) {
        let alive: BTreeSet<&str> =
            self.objects.values().filter_map(|stored| stored.object["metadata"]["uid"].as_str()).collect();
        let orphaned = |stored: &Stored| {
            let owners = stored.object["metadata"]["ownerReferences"].as_array();
            owners.is_some_and(|owners| {
                !owners.is_empty()
                    && owners.iter().all(|owner| owner["uid"].as_str().is_none_or(|uid| !alive.contains(uid)))
            })
        };
        let orphans: Vec<Key> = self
            .objects
            .iter()
            .filter(|(_, stored)| stored.object["metadata"]["deletionTimestamp"].is_null() && orphaned(stored))
            .map(|(key, _)| key.clone())
            .collect();
        for key in orphans {
            // It was there just now.
            let _ = self.delete(&key, &Deletion::default());
        }
    }

    /// Stores what has changed, or drops what is deleted and held by nothing.
    fn commit(&mut self, key: &Key, mut object: Value, owners: Owners) -> Value {
        let before = self.objects.get(key).map(|stored| stored.object.clone());
        if before.as_ref().is_some_and(|before| **before == object) {
            // Who owns what may have changed nevertheless.
            let object = Arc::new(object);
            let answer = (*object).clone();
            self.objects.insert(key.clone(), Stored { object, owners });
            return answer;
        }
        let held = object["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty());
        let metadata = &object["metadata"];
        let over = metadata["deletionTimestamp"].is_string() && metadata["deletionGracePeriodSeconds"] == 0 && !held;
        object["metadata"]["resourceVersion"] = json!((self.revision + 1).to_string());
        let answer = object.clone();
        let object = Arc::new(object);
        let after = (!over).then(|| object.clone());
        match over {
            true => drop(self.objects.remove(key)),
            false => drop(self.objects.insert(key.clone(), Stored { object: object.clone(), owners })),
        }
        let before = if over { before.map(|_| object) } else { before };
        self.record(Change { revision: 0, key: key.clone(), before, after });
        answer
    }

    fn record(&mut self, change: Change) {
        self.revision += 1;
        let change = Change { revision: self.revision, ..change };
        self.watches.retain(|(watch, sender)| match watch.line(&change) {
            Some(line) => sender.unbounded_send(line).is_ok(),
            None => !sender.is_closed(),
        });
        self.history.push_back(change);
        if self.history.len() > MAX_HISTORY {
            let forgotten = self.history.pop_front();
            self.compacted = forgotten.map_or(self.compacted, |change| change.revision);
        }
    }

    fn newborn(&mut self, key: &Key, object: Value) -> Value {
        self.born += 1;
        let uid = format!("00000000-0000-4000-8000-{:012x}", self.born);
        let mut object = ownership::without_nulls(object);
        object["apiVersion"] = json!(key.resource.api_version);
        object["kind"] = json!(key.resource.kind);
        object["metadata"]["name"] = json!(key.name);
        object["metadata"]["uid"] = json!(uid);
        object["metadata"]["creationTimestamp"] = json!(self.now_text());
        if key.resource.namespaced {
            object["metadata"]["namespace"] = json!(key.namespace);
        }
        if key.resource.has_generation {
            object["metadata"]["generation"] = json!(1);
        }
        if key.resource.kind == "Pod" {
            object["status"] = json!({"phase": "Pending"});
        }
        object
    }

    /// What the server alone decides; a change of what is asked for is counted.
    fn keep_identity(&self, object: &mut Value, before: &Value) {
        for name in ["apiVersion", "kind"] {
            object[name] = before[name].clone();
        }
        let own =
            ["name", "namespace", "uid", "creationTimestamp", "resourceVersion", "deletionTimestamp", "generation"];
        for name in own.into_iter().chain(["deletionGracePeriodSeconds"]) {
            match &before["metadata"][name] {
                Value::Null => {
                    if let Some(metadata) = object["metadata"].as_object_mut() {
                        metadata.remove(name);
                    }
                }
                value => object["metadata"][name] = value.clone(),
            }
        }
        if let Some(generation) = before["metadata"]["generation"].as_u64()
            && object["spec"] != before["spec"]
        {
            object["metadata"]["generation"] = json!(generation + 1);
        }
    }

    fn check_namespace(&self, resource: Resource, namespace: Option<&str>) -> Result<(), Refusal> {
        let there = |name: &str| self.find("Namespace", "", name).is_some();
        match (resource.namespaced, namespace) {
            (true, Some(name)) if !there(name) => {
                Err(Refusal::new(404, "NotFound", format!("namespaces {name:?} not found")))
            }
            (true, None) => Err(Refusal::new(405, "MethodNotAllowed", "the request names no namespace")),
            _ => Ok(()),
        }
    }
}

fn text_of(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

fn not_found(key: &Key) -> Refusal {
    Refusal::new(404, "NotFound", format!("{} {:?} not found", key.resource.plural, key.name))
}

fn conflict(key: &Key, why: &str) -> Refusal {
    let message = format!("Operation cannot be fulfilled on {} {:?}: {why}", key.resource.plural, key.name);
    Refusal::new(409, "Conflict", message)
}

/// A DNS subdomain.
fn check_name(resource: Resource, name: &str) -> Result<(), Refusal> {
    let part = |part: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(part) {
        return Ok(());
    }
    let message = format!("{} {name:?} is invalid: metadata.name: it must be a DNS subdomain", resource.kind);
    Err(Refusal::new(422, "Invalid", message))
}

/// Another's uid or an older version in what is written is refused.
fn check_identity(key: &Key, before: &Value, written: &Value) -> Result<(), Refusal> {
    for name in ["uid", "resourceVersion"] {
        let wanted = written["metadata"][name].as_str().filter(|wanted| !wanted.is_empty());
        if wanted.is_some_and(|wanted| before["metadata"][name].as_str() != Some(wanted)) {
            return Err(conflict(key, "the object has been modified, or is another one"));
        }
    }
    Ok(())
}

/// A uid cannot be changed; with a status, nobody looks at it.
fn check_patch(key: &Key, before: &Value, patch: &Value, write: &Write) -> Result<(), Refusal> {
    let is_other = patch["metadata"]["uid"].as_str().is_some_and(|uid| before["metadata"]["uid"] != uid);
    if is_other && !write.status_only {
        let message = format!("{} {:?} is invalid: metadata.uid: field is immutable", key.resource.kind, key.name);
        return Err(Refusal::new(422, "Invalid", message));
    }
    let mut versions = patch.clone();
    if let Some(metadata) = versions["metadata"].as_object_mut() {
        metadata.remove("uid");
    }
    check_identity(key, before, &versions)
}

/// What may be changed that way: only the status, or all but the status.
fn within(resource: Resource, before: &Value, mut after: Value, status_only: bool) -> Value {
    if status_only {
        let mut object = before.clone();
        object["status"] = after["status"].take();
        return ownership::without_nulls(object);
    }
    if resource.has_status {
        after["status"] = before["status"].clone();
    }
    ownership::without_nulls(after)
}

fn without_status(resource: Resource, mut object: Value) -> Value {
    if resource.has_status
        && let Some(object) = object.as_object_mut()
    {
        object.remove("status");
    }
    object
}

/// A pod that no kubelet has goes at once, like all that is no pod.
fn grace_seconds(resource: Resource, object: &Value, deletion: &Deletion) -> u64 {
    let ended = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if resource.kind != "Pod" || object["spec"]["nodeName"].is_null() || ended {
        return 0;
    }
    let own = object["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(DEFAULT_GRACE_SECONDS);
    deletion.grace_seconds.unwrap_or(own)
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        if value.is_null() {
            if let Some(target) = target.as_object_mut() {
                target.remove(name);
            }
        } else {
            merge(&mut target[name.as_str()], value);
        }
    }
}
