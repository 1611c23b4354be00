//! Network namespaces: one holds the bridge and the control plane, one holds each node.
//!
//! Nothing of the host's own network is touched: a veth pair is created with both ends inside namespaces.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use super::layout::{CONTROL_PLANE_IP, Layout, SERVICE_RANGE, node_ip, pod_range};
use super::process::run;

const BRIDGE: &str = "nodes";

pub fn open_namespace(name: &str) -> Result<File> {
    let path = format!("/run/netns/{name}");
    File::open(&path).with_context(|| format!("no network namespace {path}: is the cluster up?"))
}

/// Runs `work` on a thread that has entered the namespace: sockets made there belong to it.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = open_namespace(namespace)?;
    std::thread::scope(|scope| {
        let entered = scope.spawn(move || {
            enter(&file)?;
            work()
        });
        entered.join().map_err(|_| anyhow!("the thread in namespace {namespace} panicked"))?
    })
}

/// Moves the calling thread, and it alone, into the namespace.
pub fn enter(namespace: &File) -> Result<()> {
    // Safety: a plain system call on an open file.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot enter a network namespace: are you root?");
    }
    Ok(())
}

fn ip(namespace: Option<&str>, words: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    run(command.args(words.split(' '))).map(drop)
}

fn create_namespace(name: &str, settings: &[(&str, &str)]) -> Result<()> {
    ip(None, &format!("netns add {name}"))?;
    ip(Some(name), "link set lo up")?;
    inside(name, || {
        for (setting, value) in settings {
            let path = format!("/proc/sys/net/{setting}");
            fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
        }
        Ok(())
    })
}

const ROUTER: &[(&str, &str)] =
    &[("ipv4/ip_forward", "1"), ("ipv4/conf/all/send_redirects", "0"), ("ipv4/conf/default/send_redirects", "0")];

pub fn create_control_plane(layout: &Layout) -> Result<()> {
    let namespace = layout.control_plane_namespace();
    create_namespace(&namespace, ROUTER)?;
    ip(Some(&namespace), &format!("link add {BRIDGE} type bridge"))?;
    ip(Some(&namespace), &format!("addr add {CONTROL_PLANE_IP}/24 dev {BRIDGE}"))?;
    ip(Some(&namespace), &format!("link set {BRIDGE} up"))?;
    // kube-proxy rewrites the destination of what is sent to a Service, but only of what has a route.
    ip(Some(&namespace), &format!("route add {SERVICE_RANGE} dev {BRIDGE}"))?;
    bridge_without_filters(&namespace)
}

/// Frames between nodes must not pass the control plane's own Service rules.
fn bridge_without_filters(namespace: &str) -> Result<()> {
    inside(namespace, || {
        let _ = fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        Ok(())
    })
}

pub fn create_node(layout: &Layout, node: &str, index: u8) -> Result<()> {
    let (center, namespace, port) = (layout.control_plane_namespace(), layout.node_namespace(node), port(index));
    let address = node_ip(index);
    create_namespace(&namespace, ROUTER)?;
    ip(Some(&center), &format!("link add {port} type veth peer name eth0 netns {namespace}"))?;
    ip(Some(&center), &format!("link set {port} master {BRIDGE} up"))?;
    ip(Some(&namespace), &format!("addr add {address}/24 dev eth0"))?;
    ip(Some(&namespace), "link set eth0 up")?;
    ip(Some(&namespace), &format!("route add default via {CONTROL_PLANE_IP}"))?;
    ip(Some(&center), &format!("route replace {} via {address}", pod_range(index)))
}

pub fn set_link(layout: &Layout, index: u8, up: bool) -> Result<()> {
    let state = if up { "up" } else { "down" };
    ip(Some(&layout.control_plane_namespace()), &format!("link set {} {state}", port(index)))
}

/// Drops every packet that is routed to the address: connections to and from it fall silent, but on its own node.
pub fn set_silence(layout: &Layout, address: &str, silent: bool) -> Result<()> {
    let change = if silent { "replace" } else { "del" };
    ip(Some(&layout.control_plane_namespace()), &format!("route {change} blackhole {address}/32"))
}

/// How a service of the control plane is out of reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// Packets are dropped: nobody answers.
    Silent,
    /// Connections are reset, as where nobody listens.
    Refused,
}

const OUTAGE_TABLE: &str = "outage";

pub fn begin_outage(layout: &Layout, port: u16, outage: Outage) -> Result<()> {
    let verdict = match outage {
        Outage::Silent => "drop",
        Outage::Refused => "reject with tcp reset",
    };
    let chain = "{ type filter hook input priority -10; policy accept; }";
    let table = format!("add table inet {OUTAGE_TABLE}\nadd chain inet {OUTAGE_TABLE} input {chain}\n");
    let rule = format!("add rule inet {OUTAGE_TABLE} input iifname {BRIDGE} tcp dport {port} {verdict}\n");
    nft(layout, &(table + &rule))
}

pub fn end_outage(layout: &Layout) -> Result<()> {
    // Adding first makes the deletion of a table that is not there no error.
    nft(layout, &format!("add table inet {OUTAGE_TABLE}\ndelete table inet {OUTAGE_TABLE}\n"))
}

fn nft(layout: &Layout, script: &str) -> Result<()> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", layout.control_plane_namespace())).args(["nft", script]);
    run(&mut command).map(drop)
}

/// Takes the node's link, routes and namespace away; what is gone already is no error.
pub fn remove_node(layout: &Layout, node: &str, index: u8) {
    let center = layout.control_plane_namespace();
    let _ = ip(Some(&center), &format!("link del {}", port(index)));
    let _ = ip(Some(&center), &format!("route del {}", pod_range(index)));
    let _ = ip(None, &format!("netns del {}", layout.node_namespace(node)));
}

pub fn remove_control_plane(layout: &Layout) {
    let _ = ip(None, &format!("netns del {}", layout.control_plane_namespace()));
    remove_empty_folder();
}

/// `ip` mounts the folder of namespaces on itself; with the last namespace gone that is a trace to remove.
fn remove_empty_folder() {
    let folder = "/run/netns";
    let empty = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if empty {
        let _ = Command::new("umount").arg(folder).output();
        let _ = fs::remove_dir(folder);
    }
}

fn port(index: u8) -> String {
    format!("node{index}")
}
