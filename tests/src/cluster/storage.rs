//! The S3 server: SeaweedFS beside the control plane, with a bucket and a key of its own.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::control_plane::start;
use super::layout::{CONTROL_PLANE_IP, Layout, program};
use super::network::inside;
use super::process::{Process, wait_for};

pub const S3_PORT: u16 = 8333;
const BUCKET: &str = "vicuna";

/// How to reach the cluster's object storage.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct S3 {
    pub bucket: String,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// From pods.
    pub pod_endpoint: String,
    /// From the host.
    pub host_endpoint: String,
}

impl S3 {
    pub fn read(layout: &Layout) -> Result<Self> {
        let path = record(layout);
        let text =
            fs::read_to_string(&path).with_context(|| format!("no S3 server: cannot read {}", path.display()))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// As the environment variables that S3 clients understand, for the host.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ACCESS_KEY_ID", self.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.secret_key.clone()),
            ("AWS_REGION", self.region.clone()),
            ("AWS_ENDPOINT_URL", self.host_endpoint.clone()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }
}

fn record(layout: &Layout) -> PathBuf {
    layout.root.join("s3.json")
}

pub fn start_s3(layout: &Layout) -> Result<()> {
    let (access_key, secret_key) = (random_hex(10)?, random_hex(20)?);
    let data = layout.root.join("s3");
    fs::create_dir_all(&data)?;
    let identities = layout.root.join("s3-identities.json");
    fs::write(&identities, identities_text(&access_key, &secret_key))?;
    start(layout, "weed", &weed_flags(&data.display().to_string(), &identities.display().to_string()))?;
    let s3 = S3 {
        bucket: BUCKET.to_owned(),
        region: "us-east-1".to_owned(),
        access_key,
        secret_key,
        pod_endpoint: format!("http://s3.vicuna.test:{S3_PORT}"),
        host_endpoint: String::new(),
    };
    write(layout, &s3)
}

fn write(layout: &Layout, s3: &S3) -> Result<()> {
    fs::write(record(layout), serde_json::to_string_pretty(s3)?)?;
    Ok(())
}

fn identities_text(access_key: &str, secret_key: &str) -> String {
    let credentials = json!([{"accessKey": access_key, "secretKey": secret_key}]);
    let actions = json!(["Admin", "Read", "List", "Tagging", "Write"]);
    json!({"identities": [{"name": "vicuna", "credentials": credentials, "actions": actions}]}).to_string()
}

fn weed_flags(data: &str, identities: &str) -> Vec<String> {
    vec![
        "server".into(),
        format!("-dir={data}"),
        format!("-ip={CONTROL_PLANE_IP}"),
        "-ip.bind=0.0.0.0".into(),
        "-master.volumeSizeLimitMB=1024".into(),
        "-master.telemetry=false".into(),
        "-volume.max=100".into(),
        "-volume.minFreeSpace=1".into(),
        "-s3".into(),
        format!("-s3.port={S3_PORT}"),
        format!("-s3.config={identities}"),
    ]
}

/// Waits for the server, makes the bucket and notes where the host reaches it.
pub fn create_bucket(layout: &Layout, host: SocketAddr) -> Result<()> {
    let server: SocketAddr = format!("{CONTROL_PLANE_IP}:{S3_PORT}").parse()?;
    let namespace = layout.control_plane_namespace();
    wait_for("the S3 server", Duration::from_secs(60), || {
        inside(&namespace, || Ok(TcpStream::connect_timeout(&server, Duration::from_secs(1)).map(Some)?))
    })
    .with_context(|| Process::new(layout, "weed").told())?;
    wait_for("the bucket", Duration::from_secs(60), || {
        let listed = weed_shell(layout, &format!("s3.bucket.create -name {BUCKET}\ns3.bucket.list\n"))?;
        Ok(listed.contains(&format!("  {BUCKET}")).then_some(()))
    })?;
    write(layout, &S3 { host_endpoint: format!("http://{host}"), ..S3::read(layout)? })
}

fn weed_shell(layout: &Layout, script: &str) -> Result<String> {
    let path = layout.root.join("s3-script");
    fs::write(&path, script)?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", layout.control_plane_namespace()));
    command.arg(program("weed")?).args(["shell", "-master=127.0.0.1:9333", "-filer=127.0.0.1:8888"]);
    command.stdin(fs::File::open(&path)?).stderr(Stdio::null()).current_dir(&layout.root);
    Ok(String::from_utf8_lossy(&command.output()?.stdout).into_owned())
}

fn random_hex(bytes: usize) -> Result<String> {
    let mut noise = vec![0; bytes];
    fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    Ok(noise.iter().map(|byte| format!("{byte:02x}")).collect())
}
