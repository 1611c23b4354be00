//! A real Kubernetes cluster on this machine: control plane, several nodes, name server, S3, Prometheus.
//!
//! Everything lives in namespaces that [`Cluster::up`] makes and [`Cluster::down`] removes; the host's own network is
//! not touched. Several clusters may be up at the same time under different names.

mod certificates;
mod control_plane;
mod discovery;
mod forward;
mod kubectl;
mod layout;
mod monitoring;
mod network;
mod node;
mod process;
mod spot;
mod storage;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub use kubectl::Kubectl;
pub use layout::{CONTROL_PLANE_IP, repository};
pub use network::Outage;
pub use node::{CAPACITY_LABEL, NodeOptions, NodeRecord};
pub use process::wait_for;
pub use spot::RECLAIM_TAINT;
pub use storage::S3;

use layout::{API_PORT, Layout};
use process::Process;

/// What [`Cluster::up`] makes.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    pub name: String,
    /// Where the cluster keeps its files; `target/cluster/NAME` by default.
    pub state: Option<PathBuf>,
    pub nodes: Vec<NodeOptions>,
    pub s3: bool,
    pub prometheus: bool,
    /// Prometheus rule files.
    pub rules: Vec<PathBuf>,
    pub api_server_flags: Vec<String>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self::named("vicuna")
    }
}

impl ClusterOptions {
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: None,
            nodes: ["spot-1", "spot-2", "onprem-1"].map(NodeOptions::named).to_vec(),
            s3: true,
            prometheus: true,
            rules: Vec::new(),
            api_server_flags: Vec::new(),
        }
    }
}

/// A handle on a running cluster. Dropping it leaves the cluster up.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
}

impl Cluster {
    /// Makes the cluster and waits until its nodes are ready.
    pub fn up(options: &ClusterOptions) -> Result<Self> {
        let layout = Layout::new(&options.name, options.state.as_deref())?;
        if layout.root.exists() {
            bail!("cluster {}: {} exists; take it down first", layout.name, layout.root.display());
        }
        let cluster = Self { layout };
        cluster.build(options).with_context(|| {
            let logs = cluster.layout.root.display();
            format!("cluster {} did not come up; its logs are under {logs} until it is taken down", options.name)
        })?;
        Ok(cluster)
    }

    fn build(&self, options: &ClusterOptions) -> Result<()> {
        let layout = &self.layout;
        layout.create_folders()?;
        say("network and certificates");
        network::create_control_plane(layout)?;
        certificates::create(layout)?;
        say("control plane");
        control_plane::start_api(layout, &options.api_server_flags)?;
        if options.s3 {
            storage::start_s3(layout)?;
        }
        self.write_host_kubeconfig()?;
        control_plane::wait_until_served(layout)?;
        control_plane::grant_rights(layout)?;
        control_plane::start_controllers(layout)?;
        say("nodes");
        let added: Result<Vec<_>> =
            options.nodes.iter().map(|node| self.boot_node(node, options.nodes.len())).collect();
        self.start_services(options)?;
        self.finish_nodes(&added?)
    }

    /// Follows the pods for Prometheus, in this process, until it ends.
    pub fn discover_here(&self) -> Result<()> {
        discovery::serve(&self.layout)
    }

    fn start_services(&self, options: &ClusterOptions) -> Result<()> {
        if let Some(node) = options.nodes.last() {
            control_plane::start_proxy(&self.layout, &node.name)?;
        }
        if options.prometheus {
            monitoring::start_prometheus(&self.layout, &options.rules)?;
        }
        if options.s3 {
            let address = self.forward(control_plane_address(storage::S3_PORT))?;
            storage::create_bucket(&self.layout, address)?;
        }
        Ok(())
    }

    fn write_host_kubeconfig(&self) -> Result<()> {
        let layout = &self.layout;
        certificates::write_client(layout, "admin", "admin", Some("system:masters"))?;
        let address = self.forward(control_plane_address(API_PORT))?;
        certificates::write_kubeconfig(layout, &layout.kubeconfig(), "admin", &format!("https://{address}"))
    }

    /// Finds a cluster that is up.
    pub fn open(name: &str, state: Option<&Path>) -> Result<Self> {
        let layout = Layout::new(name, state)?;
        if !layout.root.exists() {
            bail!("cluster {name} is not up: no {}", layout.root.display());
        }
        Ok(Self { layout })
    }

    /// Ends every process, and removes every mount, namespace, cgroup and file of the cluster, up or half up.
    pub fn down(name: &str, state: Option<&Path>) -> Result<()> {
        let layout = Layout::new(name, state)?;
        for record in NodeRecord::all(&layout) {
            node::power_off(&layout, &record)?;
        }
        for process in Process::all(&layout) {
            process.kill()?;
        }
        network::remove_control_plane(&layout);
        node::remove_cgroups(&layout.cgroup());
        if layout.root.exists() {
            fs::remove_dir_all(&layout.root).with_context(|| format!("cannot remove {}", layout.root.display()))?;
        }
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.layout.name
    }

    pub fn state(&self) -> &Path {
        &self.layout.root
    }

    /// A kubeconfig that works from the host, as administrator.
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    pub fn kubectl(&self) -> Kubectl {
        Kubectl::of(&self.layout)
    }

    pub fn s3(&self) -> Result<S3> {
        S3::read(&self.layout)
    }

    /// Where the host reaches Prometheus.
    pub fn prometheus(&self) -> Result<String> {
        if Process::new(&self.layout, "prometheus").pid().is_none() {
            bail!("cluster {}: Prometheus does not run", self.name());
        }
        Ok(format!("http://{}", self.forward(control_plane_address(monitoring::PROMETHEUS_PORT))?))
    }

    /// Makes an address of the cluster (pod, Service or control plane) reachable from the host, on a free port.
    pub fn forward(&self, to: SocketAddr) -> Result<SocketAddr> {
        self.forward_at(to, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// The same on a port of the caller's choice. One address has one forward.
    pub fn forward_at(&self, to: SocketAddr, listen: SocketAddr) -> Result<SocketAddr> {
        forward::start(&self.layout, to, listen)
    }

    /// Forwards in this process until it ends.
    pub fn forward_here(&self, to: SocketAddr, listen: SocketAddr) -> Result<()> {
        forward::serve(&self.layout, to, listen)
    }

    /// Runs work on a thread inside the control plane's namespace, from where pods and Services are reached directly.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        network::inside(&self.layout.control_plane_namespace(), work)
    }

    /// A command that runs inside the control plane's namespace.
    pub fn command_inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.layout.control_plane_namespace())).arg(program);
        command
    }

    /// Adds a node, or brings one of that name back with an empty disk, and waits until it is ready.
    pub fn node_add(&self, options: &NodeOptions) -> Result<()> {
        let known = NodeRecord::all(&self.layout).len().max(3);
        let record = self.boot_node(options, known)?;
        self.finish_nodes(&[record])
    }

    fn boot_node(&self, options: &NodeOptions, siblings: usize) -> Result<NodeRecord> {
        let layout = &self.layout;
        let records = NodeRecord::all(layout);
        let old = records.iter().find(|record| record.options.name == options.name);
        let taken: BTreeSet<u8> = records.iter().map(|record| record.index).collect();
        let free = (1..=200).find(|index| !taken.contains(index));
        let index = old.map(|record| record.index).or(free).context("a cluster holds at most 200 nodes")?;
        if old.is_some() {
            self.kubectl().text(&["delete", "node", &options.name, "--ignore-not-found", "--wait=false"])?;
        }
        let record = NodeRecord { options: options.clone(), index, reserved_mib: reserved_mib(siblings)? };
        record.write(layout)?;
        node::boot(layout, &record)?;
        Ok(record)
    }

    /// Images first: a pod may land on the node in the moment in which it is ready.
    fn finish_nodes(&self, records: &[NodeRecord]) -> Result<()> {
        let names: Vec<&str> = records.iter().map(|record| record.options.name.as_str()).collect();
        for archive in self.images()? {
            self.load_on(&archive, &names)?;
        }
        for name in names {
            node::wait_until_ready(&self.layout, name)?;
        }
        Ok(())
    }

    /// The nodes that run now.
    pub fn nodes(&self) -> Vec<NodeRecord> {
        let running = |record: &NodeRecord| node::process(&self.layout, &record.options.name).pid().is_some();
        NodeRecord::all(&self.layout).into_iter().filter(running).collect()
    }

    /// The options with which a node of that name ran before, or those that follow from the name.
    pub fn known_node(&self, name: &str) -> NodeOptions {
        NodeRecord::read(&self.layout, name).map_or_else(|_| NodeOptions::named(name), |record| record.options)
    }

    /// The provider's notice, then its deed: see [`Cluster::notice`] and [`Cluster::kill`].
    pub fn reclaim(&self, node: &str, notice: Duration) -> Result<()> {
        let deadline = self.notice(node, notice)?;
        std::thread::sleep(deadline.saturating_duration_since(std::time::Instant::now()));
        self.kill(node, true)
    }

    /// Taints the node as the AWS node termination handler does; gives the moment at which the node must go.
    pub fn notice(&self, node: &str, notice: Duration) -> Result<std::time::Instant> {
        NodeRecord::read(&self.layout, node)?;
        spot::announce(&self.kubectl(), node, notice)
    }

    /// Takes a notice back: the node stays.
    pub fn withdraw_notice(&self, node: &str) -> Result<()> {
        spot::withdraw(&self.kubectl(), node)
    }

    /// Ends the node as a power cut does. With `delete` its Node object goes too, as a cloud's controller would see to.
    pub fn kill(&self, node: &str, delete: bool) -> Result<()> {
        let record = NodeRecord::read(&self.layout, node)?;
        node::power_off(&self.layout, &record)?;
        if delete {
            self.kubectl().text(&["delete", "node", node, "--ignore-not-found", "--wait=false"])?;
        }
        Ok(())
    }

    /// Cuts the node's network off; its pods run on.
    pub fn cut(&self, node: &str) -> Result<()> {
        network::set_link(&self.layout, NodeRecord::read(&self.layout, node)?.index, false)
    }

    pub fn heal(&self, node: &str) -> Result<()> {
        network::set_link(&self.layout, NodeRecord::read(&self.layout, node)?.index, true)
    }

    /// Cuts one pod's network off, by its address; its node and its neighbours there stay in reach.
    pub fn cut_pod(&self, address: &str) -> Result<()> {
        network::set_silence(&self.layout, address, true)
    }

    /// Ends [`Cluster::cut_pod`]; a pod that is not cut off is an error.
    pub fn heal_pod(&self, address: &str) -> Result<()> {
        network::set_silence(&self.layout, address, false)
    }

    /// Takes the object store away from all pods.
    pub fn cut_s3(&self, outage: Outage) -> Result<()> {
        network::begin_outage(&self.layout, storage::S3_PORT, outage)
    }

    /// Gives the object store back; no error where it was there.
    pub fn heal_s3(&self) -> Result<()> {
        network::end_outage(&self.layout)
    }

    /// Loads an image archive on the named nodes, or on all and on every node to come.
    pub fn load_image(&self, archive: &Path, nodes: Option<&[&str]>) -> Result<()> {
        let archive = fs::canonicalize(archive).with_context(|| format!("no image archive {}", archive.display()))?;
        if let Some(names) = nodes {
            return self.load_on(&archive, names);
        }
        let mut images = self.images()?;
        if !images.contains(&archive) {
            images.push(archive.clone());
            fs::write(self.image_list(), serde_json::to_string(&images)?)?;
        }
        let running = self.nodes();
        let names: Vec<&str> = running.iter().map(|record| record.options.name.as_str()).collect();
        self.load_on(&archive, &names)
    }

    fn load_on(&self, archive: &Path, nodes: &[&str]) -> Result<()> {
        let load = |name: &&str| node::load_image(&self.layout, name, archive);
        std::thread::scope(|scope| {
            let loads: Vec<_> = nodes.iter().map(|name| scope.spawn(move || load(name))).collect();
            loads
                .into_iter()
                .try_for_each(|one| one.join().unwrap_or_else(|_| bail!("a thread that loads images panicked")))
        })
    }

    fn image_list(&self) -> PathBuf {
        self.layout.root.join("images.json")
    }

    /// What every new node gets; the pause image always.
    fn images(&self) -> Result<Vec<PathBuf>> {
        match fs::read_to_string(self.image_list()) {
            Ok(text) => Ok(serde_json::from_str(&text)?),
            Err(_) => Ok(vec![cache()?.join("pause-1/pause.tar")]),
        }
    }
}

fn control_plane_address(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 200, 0, 1], port))
}

fn cache() -> Result<PathBuf> {
    let cache = std::env::var_os("VICUNA_CACHE").context("VICUNA_CACHE is not set: source tests/tools/env.sh")?;
    Ok(PathBuf::from(cache))
}

/// What each node must keep from its pods, so that all nodes together offer about what the machine has.
fn reserved_mib(nodes: usize) -> Result<u64> {
    let told = fs::read_to_string("/proc/meminfo")?;
    let kib: u64 = told
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .context("/proc/meminfo has no MemTotal")?;
    let nodes = nodes.max(1) as u64;
    Ok(kib / 1024 * (nodes - 1) / nodes)
}

fn say(step: &str) {
    eprintln!("cluster: {step}");
}
