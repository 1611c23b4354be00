//! What is around the operator in a cluster: a market that gives and takes nodes, an autoscaler, the scheduler, kubelets
//! and the collectors of what is left over. They are beside the API server and never fail to reach it.

use super::Random;
use super::ranks::{Ending, Ranks};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use vicuna_tests::api_server::{Key, Store};

const KINDS: [&str; 2] = ["spot", "ondemand"];
const SPOT: &str = "spot";
/// Of each kind, at most.
const MAX_NODES: usize = 6;
const NOTICE_TAINT: &str = "aws-node-termination-handler/spot-itn";
const ADVICE_TAINT: &str = "aws-node-termination-handler/rebalance-recommendation";
/// Pods of nodes that are gone are taken away after so long.
const ORPHANED_MS: u64 = 40_000;
const COLLECT_EVERY_MS: u64 = 2_000;
/// Clocks of nodes and controllers differ by so much.
const MAX_SKEW_MS: u64 = 5_000;

#[derive(Clone, Debug, Default)]
struct Machine {
    kind: String,
    /// It is up from then on.
    up_at: u64,
    /// It is taken then.
    taken_at: Option<u64>,
    /// It is dead since then, without a word.
    dead_since: Option<u64>,
    /// How long it takes until that is known, and then until it is gone.
    unnoticed_ms: u64,
    warned: bool,
}

/// A pod on its node, as its kubelet knows it.
#[derive(Clone, Debug, Default)]
struct Container {
    starts_at: u64,
    started: bool,
    /// The kubelet has told it to end, and waits until then.
    killed_at: Option<u64>,
    ended: bool,
}

#[derive(Default)]
pub struct Market {
    machines: BTreeMap<String, Machine>,
    containers: BTreeMap<String, Container>,
    /// Kinds of which there are no more for now.
    sold_out: BTreeMap<String, u64>,
    /// Pods of machines that are gone, and since when.
    orphans: BTreeMap<String, u64>,
    born: u64,
    collects_at: u64,
}

impl Market {
    pub fn tend(&mut self, store: &mut Store, ranks: &mut Ranks, random: &mut Random) {
        let now = store.now_ms();
        self.machines(store, ranks, now, random);
        self.schedule(store, now, random);
        self.kubelets(store, ranks, now, random);
        self.collect(store, now);
        if now >= self.collects_at {
            self.collects_at = now + COLLECT_EVERY_MS;
            store.collect_garbage();
        }
    }

    /// One of the things that a market does to those who buy there.
    pub fn make_trouble(&mut self, store: &mut Store, random: &mut Random) -> Option<String> {
        let now = store.now_ms();
        let alive =
            |machine: &Machine| machine.dead_since.is_none() && machine.taken_at.is_none() && machine.up_at <= now;
        let candidates: Vec<String> =
            self.machines.iter().filter(|(_, machine)| alive(machine)).map(|(name, _)| name.clone()).collect();
        let name = random.pick(&candidates)?.clone();
        let machine = self.machines.get_mut(&name)?;
        let spot = machine.kind == SPOT;
        Some(match random.between(0, 12) {
            0..=3 if spot => {
                // Some providers are earlier than they say, some take the notice back.
                let in_ms = *random.pick(&[4_000, 15_000, 30_000, 45_000])?;
                // Whoever taints has a clock of its own.
                let skew_ms = random.between(0, 2 * MAX_SKEW_MS) as i64 - MAX_SKEW_MS as i64;
                self.notice(store, &name, in_ms, Some(skew_ms));
                format!("{name} is noticed to go in {in_ms} ms, by a clock that is {skew_ms} ms ahead")
            }
            4 | 5 => {
                self.die(&name, now, random.between(3_000, 40_000));
                format!("{name} dies without a word")
            }
            6 if spot => {
                machine.taken_at = Some(now);
                format!("{name} is taken without notice")
            }
            7 => {
                taint(store, &name, Some(taint_of(ADVICE_TAINT)));
                format!("{name} had better be left")
            }
            8 => {
                let key = node_key(&name);
                store.edit(&key, |node| node["spec"]["unschedulable"] = json!(true));
                format!("{name} is cordoned")
            }
            _ => {
                let kind = *random.pick(&KINDS)?;
                let lasts = random.between(20_000, 120_000);
                self.sold_out.insert(kind.to_owned(), now + lasts);
                format!("{kind} is sold out for {lasts} ms")
            }
        })
    }

    /// A notice that does not come true.
    pub fn take_back(&mut self, store: &mut Store, random: &mut Random) -> Option<String> {
        let warned: Vec<String> =
            self.machines.iter().filter(|(_, machine)| machine.warned).map(|(name, _)| name.clone()).collect();
        let name = random.pick(&warned)?.clone();
        let machine = self.machines.get_mut(&name)?;
        (machine.taken_at, machine.warned) = (None, false);
        taint(store, &name, None);
        Some(format!("{name} stays after all"))
    }

    /// `skew_ms`: by how much the clock of who says when it was tainted is ahead; without it nobody says when.
    pub fn notice(&mut self, store: &mut Store, name: &str, in_ms: u64, skew_ms: Option<i64>) {
        let now = store.now_ms();
        if let Some(machine) = self.machines.get_mut(name) {
            (machine.taken_at, machine.warned) = (Some(now + in_ms), true);
        }
        let mut mark = taint_of(NOTICE_TAINT);
        if let Some(added) = skew_ms.and_then(|skew_ms| now.checked_add_signed(skew_ms)) {
            mark["timeAdded"] = json!(text_of(added));
        }
        taint(store, name, Some(mark));
    }

    /// Its machine is lost without a word, which is known after a while.
    pub fn die(&mut self, name: &str, now: u64, unnoticed_ms: u64) {
        if let Some(machine) = self.machines.get_mut(name) {
            (machine.dead_since, machine.unnoticed_ms) = (Some(now), unnoticed_ms);
        }
    }

    pub fn calm_down(&mut self) {
        self.sold_out.clear();
    }

    fn machines(&mut self, store: &mut Store, ranks: &mut Ranks, now: u64, random: &mut Random) {
        let mut gone = Vec::new();
        let used = nodes_with_pods(store);
        for (name, machine) in &mut self.machines {
            let known = store.find("Node", "", name).map(takes_pods);
            if machine.up_at <= now && known.is_none() && machine.dead_since.is_none() {
                store.put("Node", node(name, &machine.kind));
            }
            // An autoscaler takes down what is of no use.
            let useless = known == Some(false) && !used.contains(name);
            if useless || machine.taken_at.is_some_and(|at| now >= at) {
                gone.push(name.clone());
            }
            let Some(since) = machine.dead_since else { continue };
            ranks.node_died(name, now, random);
            if now >= since + machine.unnoticed_ms {
                set_ready(store, name, "Unknown");
            }
            if now >= since + 2 * machine.unnoticed_ms {
                gone.push(name.clone());
            }
        }
        for name in gone {
            ranks.node_died(&name, now, random);
            self.machines.remove(&name);
            store.remove(&node_key(&name));
        }
    }

    /// One pod a node.
    fn schedule(&mut self, store: &mut Store, now: u64, random: &mut Random) {
        let taken = nodes_with_pods(store);
        let mut free: Vec<Arc<Value>> = store
            .objects("Node")
            .filter(|(key, node)| !taken.contains(&key.name) && takes_pods(node))
            .map(|(_, node)| node.clone())
            .collect();
        let waiting: Vec<(Key, Arc<Value>)> = store
            .objects("Pod")
            .filter(|(_, pod)| pod["spec"]["nodeName"].is_null() && pod["metadata"]["deletionTimestamp"].is_null())
            .map(|(key, pod)| (key.clone(), pod.clone()))
            .collect();
        let mut wanted: BTreeMap<String, usize> = BTreeMap::new();
        let at = store.now_text();
        for (key, pod) in waiting {
            let found = free.iter().position(|node| fits(&pod, node));
            match found.map(|index| free.remove(index)) {
                Some(node) => {
                    let (name, uid) = (node["metadata"]["name"].clone(), text(&pod["metadata"]["uid"]));
                    store.edit(&key, |pod| {
                        pod["spec"]["nodeName"] = name;
                        pod["status"]["conditions"] = json!([condition("PodScheduled", "True", &at)]);
                    });
                    let starts_at = now + random.between(500, 4_000);
                    self.containers.insert(uid, Container { starts_at, ..Container::default() });
                }
                None => {
                    if pod["status"]["conditions"].is_null() {
                        let mut waits = condition("PodScheduled", "False", &at);
                        waits["reason"] = json!("Unschedulable");
                        store.edit(&key, |pod| pod["status"]["conditions"] = json!([waits]));
                    }
                    *wanted.entry(text(&pod["spec"]["nodeSelector"]["kind"])).or_default() += 1;
                }
            }
        }
        for (kind, pods) in wanted {
            self.provision(&kind, pods, now, random);
        }
    }

    fn provision(&mut self, kind: &str, pods: usize, now: u64, random: &mut Random) {
        if self.sold_out.get(kind).is_some_and(|until| now < *until) {
            return;
        }
        let of_kind = || self.machines.values().filter(|machine| machine.kind == kind);
        let booting = of_kind().filter(|machine| machine.up_at > now).count();
        let room = MAX_NODES.saturating_sub(of_kind().count());
        for _ in 0..pods.saturating_sub(booting).min(room) {
            let name = format!("{kind}-{}", self.born);
            self.born += 1;
            let up_at = now + random.between(3_000, 15_000);
            self.machines.insert(name, Machine { kind: kind.to_owned(), up_at, ..Machine::default() });
        }
    }

    fn kubelets(&mut self, store: &mut Store, ranks: &mut Ranks, now: u64, random: &mut Random) {
        let at = store.now_text();
        let bound: Vec<(Key, Arc<Value>)> = store
            .objects("Pod")
            .filter(|(_, pod)| pod["spec"]["nodeName"].is_string())
            .map(|(key, pod)| (key.clone(), pod.clone()))
            .collect();
        let uids: BTreeSet<String> = bound.iter().map(|(_, pod)| text(&pod["metadata"]["uid"])).collect();
        // Whose pod was deleted by force lives on until its kubelet, if there is one, hears of it.
        ranks.kill_all_but(&uids, now, random);
        self.containers.retain(|uid, _| uids.contains(uid));
        for (key, pod) in bound {
            let (uid, node) = (text(&pod["metadata"]["uid"]), text(&pod["spec"]["nodeName"]));
            let lives = self.machines.get(&node).is_some_and(|machine| machine.dead_since.is_none());
            let Some(container) = self.containers.get_mut(&uid).filter(|_| lives) else { continue };
            let deleted = pod["metadata"]["deletionTimestamp"].is_string();
            if deleted && (!container.started || container.ended) {
                store.remove(&key);
                continue;
            }
            if !container.started && now >= container.starts_at {
                container.started = true;
                ranks.start(&uid, &key.name, &node, now);
                store.edit(&key, |pod| runs(pod, &at));
            }
            if deleted && container.killed_at.is_none() {
                let grace_ms = pod["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(30) * 1000;
                container.killed_at = Some(now + grace_ms);
                ranks.terminate(&uid, now + grace_ms);
            }
            if container.killed_at.is_some_and(|at| now >= at) {
                ranks.kill(&uid, now, random);
                store.remove(&key);
                continue;
            }
            if let Some(ending) = ranks.ended(&uid) {
                container.ended = true;
                match deleted {
                    true => store.remove(&key),
                    false => store.edit(&key, |pod| ends(pod, ending, &at)),
                }
            }
        }
    }

    /// Pods of nodes that are gone, and of nodes that do not answer.
    fn collect(&mut self, store: &mut Store, now: u64) {
        let orphans: Vec<(Key, String)> = store
            .objects("Pod")
            .filter(|(_, pod)| {
                let node = pod["spec"]["nodeName"].as_str();
                node.is_some_and(|node| !self.machines.contains_key(node))
            })
            .map(|(key, pod)| (key.clone(), text(&pod["metadata"]["uid"])))
            .collect();
        self.orphans.retain(|uid, _| orphans.iter().any(|(_, orphan)| orphan == uid));
        for (key, uid) in orphans {
            let since = *self.orphans.entry(uid).or_insert(now);
            if now >= since + ORPHANED_MS {
                store.remove(&key);
            }
        }
    }
}

fn nodes_with_pods(store: &Store) -> BTreeSet<String> {
    store.objects("Pod").filter_map(|(_, pod)| pod["spec"]["nodeName"].as_str().map(str::to_owned)).collect()
}

fn node_key(name: &str) -> Key {
    let resource = vicuna_tests::api_server::Served::of_kind("Node").expect("nodes are served");
    Key { resource, namespace: String::new(), name: name.to_owned() }
}

fn node(name: &str, kind: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"kind": kind}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "8", "memory": "32Gi"}},
    })
}

fn taint_of(key: &str) -> Value {
    json!({"key": key, "effect": "NoSchedule"})
}

/// As Kubernetes writes times.
fn text_of(unix_ms: u64) -> String {
    let time = OffsetDateTime::from_unix_timestamp((unix_ms / 1000) as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(&Rfc3339).unwrap_or_default()
}

/// `None`: it has none any more.
fn taint(store: &mut Store, node: &str, taint: Option<Value>) {
    let taints: Vec<Value> = taint.into_iter().collect();
    store.edit(&node_key(node), |node| node["spec"]["taints"] = json!(taints));
}

fn set_ready(store: &mut Store, node: &str, status: &str) {
    let ready = json!([{"type": "Ready", "status": status}]);
    store.edit(&node_key(node), |node| node["status"]["conditions"] = ready);
}

fn takes_pods(node: &Value) -> bool {
    let tainted = node["spec"]["taints"].as_array().is_some_and(|taints| !taints.is_empty());
    let ready = node["status"]["conditions"][0]["status"] == "True";
    ready && !tainted && node["spec"]["unschedulable"] != true
}

fn fits(pod: &Value, node: &Value) -> bool {
    let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let fields = terms["nodeSelectorTerms"][0]["matchFields"].as_array();
    let avoided = fields
        .into_iter()
        .flatten()
        .any(|field| field["values"].as_array().is_some_and(|names| names.contains(&node["metadata"]["name"])));
    !avoided && pod["spec"]["nodeSelector"]["kind"] == node["metadata"]["labels"]["kind"]
}

fn condition(kind: &str, status: &str, at: &str) -> Value {
    json!({"type": kind, "status": status, "lastTransitionTime": at})
}

fn container_status(state: Value) -> Value {
    json!([{"name": "trainer", "image": "i", "imageID": "i", "ready": true, "restartCount": 0, "state": state}])
}

fn runs(pod: &mut Value, at: &str) {
    pod["status"]["phase"] = json!("Running");
    pod["status"]["containerStatuses"] = container_status(json!({"running": {"startedAt": at}}));
    if let Some(conditions) = pod["status"]["conditions"].as_array_mut() {
        conditions.push(condition("Ready", "True", at));
    }
}

fn ends(pod: &mut Value, ending: Ending, at: &str) {
    let (phase, exit_code) = match ending {
        Ending::Done => ("Succeeded", 0),
        Ending::Crashed => ("Failed", 1),
    };
    pod["status"]["phase"] = json!(phase);
    let terminated = json!({"terminated": {"exitCode": exit_code, "reason": "Error", "finishedAt": at}});
    pod["status"]["containerStatuses"] = container_status(terminated);
    if let Some(conditions) = pod["status"]["conditions"].as_array_mut() {
        conditions.retain(|condition| condition["type"] != "Ready");
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What a training in this market says of its pools.
pub fn pools() -> Value {
    json!([
        {"name": "spot", "capacity": "Spot", "nodeSelector": {"kind": "spot"}, "notice": "30s", "hourlyPrice": 1.0},
        {"name": "ondemand", "capacity": "OnDemand", "nodeSelector": {"kind": "ondemand"}, "hourlyPrice": 3.0},
    ])
}
