//! The cluster's certificate authority, and who it vouches for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::json;

use super::layout::{API_PORT, API_SERVICE_IP, CONTROL_PLANE_IP, Layout};
use super::process::run;

/// Whom a certificate names: Kubernetes reads the user from the common name and the group from the organisation.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    pub file: &'a str,
    pub user: &'a str,
    pub group: Option<&'a str>,
    pub hosts: &'a [&'a str],
}

impl<'a> Identity<'a> {
    pub fn client(file: &'a str, user: &'a str, group: Option<&'a str>) -> Self {
        Self { file, user, group, hosts: &[] }
    }
}

/// Creates the authority, the API server's certificates and the key of service-account tokens.
pub fn create(layout: &Layout) -> Result<()> {
    create_authority(layout)?;
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
    let hosts = [&names[..], &["localhost", "127.0.0.1", CONTROL_PLANE_IP, API_SERVICE_IP]].concat();
    issue(layout, Identity { file: "api-server", user: "kube-apiserver", group: None, hosts: &hosts })?;
    issue(layout, Identity::client("kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")))?;
    create_token_key(layout)
}

fn create_authority(layout: &Layout) -> Result<()> {
    let mut authority = parameters(&["vicuna-test-authority"], &[])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let certificate = authority.self_signed(&key)?;
    write_pair(layout, "ca", &certificate.pem(), &key)
}

/// Token keys are RSA, as in most clusters.
fn create_token_key(layout: &Layout) -> Result<()> {
    let (private, public) = (layout.certificates().join("tokens.key"), layout.certificates().join("tokens.pub"));
    run(Command::new("openssl").args(["genpkey", "-quiet", "-algorithm", "RSA", "-out"]).arg(&private))
        .or_else(|_| run(Command::new("openssl").args(["genpkey", "-algorithm", "RSA", "-out"]).arg(&private)))?;
    run(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&private).arg("-out").arg(&public))?;
    Ok(())
}

/// Issues a certificate as `FILE.crt` and `FILE.key`, good for a client and, with hosts, for a server.
pub fn issue(layout: &Layout, identity: Identity<'_>) -> Result<()> {
    let authority_key = KeyPair::from_pem(&read(&layout.certificates().join("ca.key"))?)?;
    let authority = Issuer::from_ca_cert_pem(&read(&layout.certificates().join("ca.crt"))?, authority_key)?;
    let mut names = vec![identity.user];
    names.extend(identity.group);
    let mut wanted = parameters(&names, identity.hosts)?;
    wanted.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    wanted.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = wanted.signed_by(&key, &authority)?;
    write_pair(layout, identity.file, &certificate.pem(), &key)
}

fn parameters(names: &[&str], hosts: &[&str]) -> Result<CertificateParams> {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut parameters = CertificateParams::new(hosts)?;
    let fields = [DnType::CommonName, DnType::OrganizationName];
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    for (field, value) in fields.into_iter().zip(names) {
        parameters.distinguished_name.push(field, *value);
    }
    parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2120, 1, 1);
    Ok(parameters)
}

fn write_pair(layout: &Layout, name: &str, certificate: &str, key: &KeyPair) -> Result<()> {
    fs::write(layout.certificates().join(format!("{name}.crt")), certificate)?;
    fs::write(layout.certificates().join(format!("{name}.key")), key.serialize_pem())?;
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Issues a client certificate and writes a kubeconfig that reaches the API server inside the namespaces.
pub fn write_client(layout: &Layout, file: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
    issue(layout, Identity::client(file, user, group))?;
    let path = layout.internal_kubeconfig(file);
    write_kubeconfig(layout, &path, file, &format!("https://{CONTROL_PLANE_IP}:{API_PORT}"))?;
    Ok(path)
}

/// Writes a kubeconfig with everything inline, so that it can be copied anywhere.
pub fn write_kubeconfig(layout: &Layout, path: &Path, certificate: &str, server: &str) -> Result<()> {
    let inline = |name: &str| -> Result<String> { Ok(STANDARD.encode(read(&layout.certificates().join(name))?)) };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": layout.name,
        "clusters": [{"name": layout.name, "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")?}}],
        "users": [{"name": certificate, "user": {
            "client-certificate-data": inline(&format!("{certificate}.crt"))?,
            "client-key-data": inline(&format!("{certificate}.key"))?,
        }}],
        "contexts": [{"name": layout.name, "context": {"cluster": layout.name, "user": certificate}}],
    });
    fs::write(path, serde_json::to_string_pretty(&config)?).with_context(|| format!("cannot write {}", path.display()))
}
