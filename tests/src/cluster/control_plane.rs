//! etcd, the API server, the controllers and the name server, each a process in the control plane's namespace.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::certificates;
use super::kubectl::Kubectl;
use super::layout::{API_PORT, CONTROL_PLANE_IP, Layout, POD_RANGE, SERVICE_RANGE, program};
use super::process::{Process, wait_for};

/// Starts etcd and the API server; the rest needs the API server's answers.
pub fn start_api(layout: &Layout, extra_flags: &[String]) -> Result<()> {
    let data = layout.root.join("etcd");
    let etcd = [
        format!("--data-dir={}", data.display()),
        "--unsafe-no-fsync".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--quota-backend-bytes=2147483648".into(),
        "--log-level=warn".into(),
        "--logger=zap".into(),
    ];
    start(layout, "etcd", &etcd)?;
    start(layout, "kube-apiserver", &[api_server_flags(layout), extra_flags.to_vec()].concat())
}

fn api_server_flags(layout: &Layout) -> Vec<String> {
    let certificate = |name: &str| layout.certificates().join(name).display().to_string();
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={CONTROL_PLANE_IP}"),
        format!("--secure-port={API_PORT}"),
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        format!("--client-ca-file={}", certificate("ca.crt")),
        format!("--tls-cert-file={}", certificate("api-server.crt")),
        format!("--tls-private-key-file={}", certificate("api-server.key")),
        format!("--kubelet-certificate-authority={}", certificate("ca.crt")),
        format!("--kubelet-client-certificate={}", certificate("kubelet-client.crt")),
        format!("--kubelet-client-key={}", certificate("kubelet-client.key")),
        format!("--requestheader-client-ca-file={}", certificate("ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", certificate("tokens.pub")),
        format!("--service-account-signing-key-file={}", certificate("tokens.key")),
        "--allow-privileged=true".into(),
        "--default-not-ready-toleration-seconds=10".into(),
        "--default-unreachable-toleration-seconds=10".into(),
        "--profiling=false".into(),
    ]
}

pub fn wait_until_served(layout: &Layout) -> Result<()> {
    let kubectl = Kubectl::of(layout);
    wait_for("the API server", Duration::from_secs(90), || kubectl.text(&["get", "--raw", "/readyz"]).map(Some))
        .with_context(|| Process::new(layout, "kube-apiserver").told())
        .map(drop)
}

pub fn start_controllers(layout: &Layout) -> Result<()> {
    start_controller_manager(layout)?;
    start_scheduler(layout)?;
    start_name_server(layout)?;
    certificates::write_client(layout, "kube-proxy", "system:kube-proxy", None).map(drop)
}

/// Makes Services work in the control plane's namespace. kube-proxy insists on speaking for a node that exists.
pub fn start_proxy(layout: &Layout, node: &str) -> Result<()> {
    let config = layout.internal_kubeconfig("kube-proxy");
    let proxy = layout.root.join("kube-proxy.json");
    fs::write(&proxy, proxy_config(&config, node, CONTROL_PLANE_IP))?;
    start(layout, "kube-proxy", &[format!("--config={}", proxy.display())])
}

fn start_controller_manager(layout: &Layout) -> Result<()> {
    let name = "kube-controller-manager";
    let certificate = |name: &str| layout.certificates().join(name).display().to_string();
    let mut flags = controller_flags(layout, name)?;
    flags.extend([
        format!("--service-account-private-key-file={}", certificate("tokens.key")),
        format!("--root-ca-file={}", certificate("ca.crt")),
        format!("--cluster-signing-cert-file={}", certificate("ca.crt")),
        format!("--cluster-signing-key-file={}", certificate("ca.key")),
        "--use-service-account-credentials=true".into(),
        "--node-monitor-period=2s".into(),
        "--node-monitor-grace-period=20s".into(),
        "--node-eviction-rate=10".into(),
    ]);
    start(layout, name, &flags)
}

fn start_scheduler(layout: &Layout) -> Result<()> {
    start(layout, "kube-scheduler", &controller_flags(layout, "kube-scheduler")?)
}

fn controller_flags(layout: &Layout, name: &str) -> Result<Vec<String>> {
    let config = certificates::write_client(layout, name, &format!("system:{name}"), None)?;
    let config = config.display();
    Ok(vec![
        format!("--kubeconfig={config}"),
        format!("--authentication-kubeconfig={config}"),
        format!("--authorization-kubeconfig={config}"),
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
    ])
}

fn start_name_server(layout: &Layout) -> Result<()> {
    let config = certificates::write_client(layout, "coredns", "vicuna:coredns", Some("vicuna:observers"))?;
    let corefile = layout.root.join("Corefile");
    fs::write(&corefile, corefile_text(&config.display().to_string()))?;
    start(layout, "coredns", &[format!("-conf={}", corefile.display())])
}

fn corefile_text(kubeconfig: &str) -> String {
    format!(
        "cluster.local 10.in-addr.arpa {{
    bind {CONTROL_PLANE_IP}
    errors
    kubernetes cluster.local 10.in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 2
    }}
}}
vicuna.test {{
    bind {CONTROL_PLANE_IP}
    errors
    hosts {{
        {CONTROL_PLANE_IP} s3.vicuna.test prometheus.vicuna.test
    }}
}}
. {{
    bind {CONTROL_PLANE_IP}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"
    )
}

/// kube-proxy's configuration, on a node or beside the control plane.
pub fn proxy_config(kubeconfig: &std::path::Path, host: &str, address: &str) -> String {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": host,
        "bindAddress": address,
        "clusterCIDR": POD_RANGE,
        "clientConnection": {"kubeconfig": kubeconfig},
        "conntrack": {"maxPerCore": 0, "min": 0},
        "nftables": {"minSyncPeriod": "200ms"},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    })
    .to_string()
}

/// What the name server needs in the API.
pub fn grant_rights(layout: &Layout) -> Result<()> {
    let rule = |groups: &[&str], resources: &[&str]| json!({"apiGroups": groups, "resources": resources, "verbs": ["get", "list", "watch"]});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "vicuna:observers"},
            "rules": [
                rule(&[""], &["pods", "services", "endpoints", "namespaces", "nodes"]),
                rule(&["discovery.k8s.io"], &["endpointslices"]),
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "vicuna:observers"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "vicuna:observers"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "vicuna:observers"}],
        },
    ]});
    Kubectl::of(layout).apply(&list.to_string())
}

/// Starts a program of the control plane under its own name.
pub fn start(layout: &Layout, name: &str, flags: &[String]) -> Result<()> {
    let mut command = Command::new(program(name)?);
    command.args(flags).current_dir(&layout.root);
    Process::new(layout, name).start(&mut command, Some(&layout.control_plane_namespace()))
}
