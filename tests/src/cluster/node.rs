//! A node: containerd, kubelet and kube-proxy in network, pid and mount namespaces of their own.
//!
//! The pid namespace makes losing a node honest: killing its first process ends every process of every container
//! in one blow, as a power cut does. The mount namespace takes all mounts of all pods with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::certificates::{self, Identity};
use super::control_plane::proxy_config;
use super::kubectl::Kubectl;
use super::layout::{CONTROL_PLANE_IP, Layout, node_ip, pod_range, program};
use super::network;
use super::process::{Process, run, wait_for};

pub const CAPACITY_LABEL: &str = "vicuna.dev/capacity";
const CONTROLLERS: &[&str] =
    &["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd", "unified"];

/// What a node is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeOptions {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// As kubectl writes them: `key=value:Effect`.
    pub taints: Vec<String>,
}

impl NodeOptions {
    /// A node whose labels follow from its name: `onprem-…` is on-prem, `system-…` is for the product's own parts, and
    /// anything else is spot.
    pub fn named(name: &str) -> Self {
        let (capacity, zone) = match name.split('-').next() {
            Some("onprem") => ("on-prem", "on-prem".to_owned()),
            Some("system") => ("system", "on-prem".to_owned()),
            _ => ("spot", format!("zone-{}", name.rsplit('-').next().unwrap_or(name))),
        };
        let labels = [
            (CAPACITY_LABEL, capacity.to_owned()),
            ("topology.kubernetes.io/zone", zone),
            ("topology.kubernetes.io/region", "test".to_owned()),
            ("node.kubernetes.io/instance-type", format!("{capacity}.small")),
        ];
        Self {
            name: name.to_owned(),
            labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            taints: Vec::new(),
        }
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub fn taint(mut self, taint: &str) -> Self {
        self.taints.push(taint.to_owned());
        self
    }
}

/// A node that the cluster has, or had: its record outlives it, so that it can come back as it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeRecord {
    pub options: NodeOptions,
    pub index: u8,
    /// How much memory the node keeps from pods, so that all nodes together fit the machine.
    pub reserved_mib: u64,
}

impl NodeRecord {
    pub fn read(layout: &Layout, name: &str) -> Result<Self> {
        let path = record_path(layout, name);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("no node {name} in cluster {}: see `cluster node list`", layout.name))?;
        Ok(serde_json::from_str(&text)?)
    }

    pub fn all(layout: &Layout) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(layout.records()) else { return Vec::new() };
        let mut records: Vec<Self> = entries
            .flatten()
            .filter_map(|entry| serde_json::from_str(&fs::read_to_string(entry.path()).ok()?).ok())
            .collect();
        records.sort_by_key(|record| record.index);
        records
    }

    pub fn write(&self, layout: &Layout) -> Result<()> {
        fs::write(record_path(layout, &self.options.name), serde_json::to_string_pretty(self)?)?;
        Ok(())
    }
}

fn record_path(layout: &Layout, name: &str) -> PathBuf {
    layout.records().join(format!("{name}.json"))
}

pub fn process(layout: &Layout, name: &str) -> Process {
    Process::new(layout, &format!("node-{name}"))
}

/// Boots the node with an empty disk.
pub fn boot(layout: &Layout, record: &NodeRecord) -> Result<()> {
    let name = &record.options.name;
    if process(layout, name).pid().is_some() {
        bail!("node {name} is already running");
    }
    power_off(layout, record)?;
    let folder = layout.node(name);
    for part in ["cni", "lib", "work", "kubelet", "containerd", "pods", "plugins"] {
        fs::create_dir_all(folder.join(part))?;
    }
    network::create_node(layout, name, record.index)?;
    create_cgroups(layout, name)?;
    write_identity(layout, record)?;
    write_configs(layout, record)?;
    start(layout, record)
}

fn write_identity(layout: &Layout, record: &NodeRecord) -> Result<()> {
    let (name, address) = (&record.options.name, node_ip(record.index));
    let file = format!("kubelet-{name}");
    let user = format!("system:node:{name}");
    certificates::issue(
        layout,
        Identity { file: &file, user: &user, group: Some("system:nodes"), hosts: &[name, &address] },
    )?;
    let server = format!("https://{CONTROL_PLANE_IP}:{}", super::layout::API_PORT);
    certificates::write_kubeconfig(layout, &layout.node(name).join("kubelet.kubeconfig"), &file, &server)
}

fn write_configs(layout: &Layout, record: &NodeRecord) -> Result<()> {
    let name = &record.options.name;
    let folder = layout.node(name);
    fs::write(folder.join("containerd.toml"), containerd_config(&folder))?;
    fs::write(folder.join("cni/10-pods.conflist"), cni_config(record.index))?;
    fs::write(folder.join("kubelet.json"), kubelet_config(layout, record))?;
    let proxy = proxy_config(&layout.internal_kubeconfig("kube-proxy"), name, &node_ip(record.index));
    fs::write(folder.join("kube-proxy.json"), proxy)?;
    fs::write(folder.join("boot.sh"), boot_script(layout, record)?)?;
    Ok(())
}

fn containerd_config(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "vicuna.dev/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#
    )
}

/// Point-to-point links route every packet, so that a Service works between two pods of one node as well.
fn cni_config(index: u8) -> String {
    let ipam =
        json!({"type": "host-local", "ranges": [[{"subnet": pod_range(index)}]], "routes": [{"dst": "0.0.0.0/0"}]});
    json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipMasq": false, "ipam": ipam}]})
        .to_string()
}

fn kubelet_config(layout: &Layout, record: &NodeRecord) -> String {
    let name = &record.options.name;
    let folder = layout.node(name);
    let certificate = |suffix: &str| layout.certificates().join(format!("kubelet-{name}.{suffix}"));
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": layout.certificates().join("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": certificate("crt"),
        "tlsPrivateKeyFile": certificate("key"),
        "containerRuntimeEndpoint": format!("unix://{}/containerd.sock", folder.display()),
        "podLogsDir": folder.join("pods"),
        "volumePluginDir": folder.join("plugins"),
        "clusterDNS": [CONTROL_PLANE_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "providerID": format!("vicuna-test:///{name}"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}/{name}", layout.cgroup()),
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "healthzPort": 0,
        "readOnlyPort": 0,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "imageMaximumGCAge": "0s",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
        "systemReserved": {"memory": format!("{}Mi", record.reserved_mib)},
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 12,
        "registerWithTaints": record.options.taints.iter().filter_map(|taint| parse_taint(taint)).collect::<Vec<_>>(),
        "serializeImagePulls": true,
        "syncFrequency": "10s",
        "containerLogMaxSize": "50Mi",
    })
    .to_string()
}

fn parse_taint(taint: &str) -> Option<serde_json::Value> {
    let (rest, effect) = taint.rsplit_once(':')?;
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    Some(json!({"key": key, "value": value, "effect": effect}))
}

/// The node's first process. It gets its own /run, /var/log and /var/lib, and restarts what ends.
fn boot_script(layout: &Layout, record: &NodeRecord) -> Result<String> {
    let name = &record.options.name;
    let folder = layout.node(name);
    let labels: Vec<String> = record.options.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    Ok(format!(
        r#"set -eu
cd '{folder}'
mount --make-rshared /
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=755 log /var/log
mount -t overlay overlay -o lowerdir=/var/lib,upperdir='{folder}/lib',workdir='{folder}/work' /var/lib
mkdir -p /run/lock /run/netns
keep() {{ while :; do "$@" || true; echo "$1 ended, starting it again"; sleep 1; done; }}
keep '{containerd}' --config '{folder}/containerd.toml' >> containerd.log 2>&1 &
until [ -S '{folder}/containerd.sock' ]; do sleep 0.1; done
keep '{kubelet}' --config='{folder}/kubelet.json' --kubeconfig='{folder}/kubelet.kubeconfig' \
    --root-dir='{folder}/kubelet' --cert-dir='{folder}/kubelet/pki' \
    --hostname-override='{name}' --node-ip='{address}' --node-labels='{labels}' >> kubelet.log 2>&1 &
keep '{proxy}' --config='{folder}/kube-proxy.json' >> kube-proxy.log 2>&1 &
while :; do wait; done
"#,
        folder = folder.display(),
        containerd = program("containerd")?.display(),
        kubelet = program("kubelet")?.display(),
        proxy = program("kube-proxy")?.display(),
        address = node_ip(record.index),
        labels = labels.join(","),
    ))
}

fn start(layout: &Layout, record: &NodeRecord) -> Result<()> {
    let name = &record.options.name;
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
        "bash",
    ]);
    command.arg(layout.node(name).join("boot.sh"));
    process(layout, name).start(&mut command, Some(&layout.node_namespace(name)))
}

/// Ends everything on the node at once and removes its network, cgroups and disk. The network goes first: a machine
/// without power closes no connection.
pub fn power_off(layout: &Layout, record: &NodeRecord) -> Result<()> {
    let name = &record.options.name;
    // A node whose start failed has none.
    let _ = network::set_link(layout, record.index, false);
    process(layout, name).kill()?;
    network::remove_node(layout, name, record.index);
    remove_cgroups(&format!("{}/{name}", layout.cgroup()));
    let folder = layout.node(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

pub fn wait_until_ready(layout: &Layout, name: &str) -> Result<()> {
    let kubectl = Kubectl::of(layout);
    let query = "-o=jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
    wait_for(&format!("node {name}"), Duration::from_secs(120), || {
        Ok((kubectl.text(&["get", "node", name, query])? == "True").then_some(()))
    })
    .with_context(|| format!("see {}/{{kubelet,containerd}}.log", layout.node(name).display()))
}

/// Imports an image archive into the node's containerd.
pub fn load_image(layout: &Layout, name: &str, archive: &Path) -> Result<()> {
    let socket = layout.node(name).join("containerd.sock");
    let mut probe = Command::new(program("ctr")?);
    probe.arg("--address").arg(&socket).arg("version");
    wait_for(&format!("containerd on node {name}"), Duration::from_secs(60), || run(&mut probe).map(Some))?;
    let mut import = Command::new(program("ctr")?);
    import.arg("--address").arg(&socket).args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
    run(&mut import).map(drop).with_context(|| format!("cannot load {} on node {name}", archive.display()))
}

/// Where cgroups are: one folder for each controller in version 1, one for all in version 2.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let single = root.join("cgroup.controllers").exists().then(|| root.to_owned());
    let separate = CONTROLLERS.iter().map(|name| root.join(name)).filter(|folder| folder.exists());
    single.into_iter().chain(separate).collect()
}

fn create_cgroups(layout: &Layout, name: &str) -> Result<()> {
    for controller in hierarchies() {
        for cgroup in [layout.cgroup(), format!("{}/{name}", layout.cgroup())] {
            let folder = controller.join(cgroup);
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
            copy_cpuset(&controller, &folder)?;
        }
    }
    Ok(())
}

/// A new cpuset holds nothing, and no process can enter it until it does.
fn copy_cpuset(controller: &Path, folder: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(controller.join(file)) {
            fs::write(folder.join(file), value)?;
        }
    }
    Ok(())
}

/// Removes a tree of cgroups in every controller; the kernel may take a moment to let go of killed processes.
pub fn remove_cgroups(cgroup: &str) {
    for controller in hierarchies() {
        let folder = controller.join(cgroup);
        let _ = wait_for("empty cgroups", Duration::from_secs(5), || {
            remove_cgroup(&folder);
            Ok((!folder.exists()).then_some(()))
        });
    }
}

fn remove_cgroup(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&entry.path());
    }
    let _ = fs::remove_dir(folder);
}
