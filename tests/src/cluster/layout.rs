//! Where a cluster keeps its files, and which addresses its parts have.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The control plane's address on the bridge: API server, name server, S3 and Prometheus live there.
pub const CONTROL_PLANE_IP: &str = "10.200.0.1";
pub const SERVICE_RANGE: &str = "10.202.0.0/16";
pub const API_SERVICE_IP: &str = "10.202.0.1";
pub const POD_RANGE: &str = "10.201.0.0/16";
pub const API_PORT: u16 = 6443;

/// The node's address on the bridge.
pub fn node_ip(index: u8) -> String {
    format!("10.200.0.{}", index + 10)
}

/// The range that the node's pods get their addresses from.
pub fn pod_range(index: u8) -> String {
    format!("10.201.{index}.0/24")
}

/// A cluster's name and its state folder, from which every other path follows.
#[derive(Debug, Clone)]
pub struct Layout {
    pub name: String,
    pub root: PathBuf,
}

impl Layout {
    /// `state` defaults to `target/cluster/NAME` in this repository.
    pub fn new(name: &str, state: Option<&Path>) -> Result<Self> {
        let root = match state {
            Some(path) => std::path::absolute(path)?,
            None => repository().join("target/cluster").join(name),
        };
        let layout = Self { name: name.to_owned(), root };
        layout.check()?;
        Ok(layout)
    }

    fn check(&self) -> Result<()> {
        let well_formed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || !self.name.chars().all(well_formed) {
            bail!("cluster name {:?}: use lower-case letters, digits and dashes", self.name);
        }
        // A node sees its own /run, /var/log and /var/lib instead of the host's.
        for hidden in ["/run", "/var/run", "/var/log", "/var/lib"] {
            if self.root.starts_with(hidden) {
                bail!("state folder {}: choose one outside {hidden}, which nodes cannot see", self.root.display());
            }
        }
        let longest = self.node("a-node-with-a-long-name").join("containerd.sock.ttrpc");
        if longest.as_os_str().len() > 107 {
            bail!("state folder {}: too long for the path of a Unix socket, choose a shorter one", self.root.display());
        }
        Ok(())
    }

    pub fn control_plane_namespace(&self) -> String {
        format!("{}-cp", self.name)
    }

    pub fn node_namespace(&self, node: &str) -> String {
        format!("{}-{node}", self.name)
    }

    /// The name, relative to each cgroup controller, under which all of the cluster's pods are.
    pub fn cgroup(&self) -> String {
        format!("vicuna-cluster-{}", self.name)
    }

    pub fn certificates(&self) -> PathBuf {
        self.root.join("certificates")
    }

    pub fn node(&self, node: &str) -> PathBuf {
        self.root.join("nodes").join(node)
    }

    pub fn records(&self) -> PathBuf {
        self.root.join("records")
    }

    pub fn processes(&self) -> PathBuf {
        self.root.join("processes")
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub fn forwards(&self) -> PathBuf {
        self.root.join("forwards")
    }

    /// Works from the host.
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }

    /// Works from inside the cluster's namespaces only.
    pub fn internal_kubeconfig(&self, user: &str) -> PathBuf {
        self.root.join(format!("{user}.kubeconfig"))
    }

    pub fn create_folders(&self) -> Result<()> {
        let folders = [self.certificates(), self.records(), self.processes(), self.logs(), self.forwards()];
        for folder in folders {
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(())
    }
}

/// The folder that holds the workspace's Cargo.toml: what `tests/tools/env.sh` was sourced from. Only without it the
/// folder that was built last, since clones share cargo's target folder.
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::var_os("VICUNA_REPOSITORY").map_or_else(|| tests.parent().unwrap_or(tests).to_owned(), PathBuf::from)
}

/// A program from the cache, or from the system.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!("{name} is not on the PATH: run tests/tools/all.sh once, then `source tests/tools/env.sh`")
        })
}
