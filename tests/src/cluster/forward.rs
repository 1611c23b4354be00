//! Forwards from the host's loopback into the cluster, by a detached process.
//!
//! A connection is made on a thread that has entered the control plane's namespace; the socket keeps that
//! namespace when the bytes are copied by others.

use std::fs;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::layout::Layout;
use super::network;
use super::process::{Process, wait_for};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Starts a forward, or finds the one that is there already, and gives the address on the host.
pub fn start(layout: &Layout, to: SocketAddr, listen: SocketAddr) -> Result<SocketAddr> {
    let (process, told) = (process(layout, to), address_file(layout, to));
    if process.pid().is_none() {
        let _ = fs::remove_file(&told);
        let mut command = Command::new(cluster_program()?);
        command.arg("--name").arg(&layout.name).arg("--state").arg(&layout.root);
        command.args(["forward", "--foreground", "--to", &to.to_string(), "--listen", &listen.to_string()]);
        process.start(&mut command, None)?;
    }
    wait_for(&format!("the forward to {to}"), Duration::from_secs(10), || Ok(fs::read_to_string(&told)?.parse().ok()))
        .with_context(|| process.told())
}

fn process(layout: &Layout, to: SocketAddr) -> Process {
    Process::new(layout, &format!("forward-{to}"))
}

fn address_file(layout: &Layout, to: SocketAddr) -> PathBuf {
    layout.forwards().join(to.to_string())
}

/// The `cluster` command, which a test finds beside its own folder.
pub fn cluster_program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let name = "cluster";
    if own.file_name().is_some_and(|file| file == name) {
        return Ok(own);
    }
    own.ancestors()
        .skip(1)
        .take(3)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| format!("no `cluster` program near {}: cargo build --release -p vicuna-tests", own.display()))
}

/// Listens and forwards until killed.
pub fn serve(layout: &Layout, to: SocketAddr, listen: SocketAddr) -> Result<()> {
    let namespace = Arc::new(network::open_namespace(&layout.control_plane_namespace())?);
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    let told = address_file(layout, to);
    let draft = told.with_extension("draft");
    fs::write(&draft, listener.local_addr()?.to_string())?;
    fs::rename(&draft, &told)?;
    for client in listener.incoming() {
        let (client, namespace) = (client?, namespace.clone());
        std::thread::spawn(move || {
            if let Err(error) = carry(client, &namespace, to) {
                eprintln!("forward to {to}: {error:#}");
            }
        });
    }
    Ok(())
}

fn carry(client: TcpStream, namespace: &fs::File, to: SocketAddr) -> Result<()> {
    network::enter(namespace)?;
    let server = TcpStream::connect_timeout(&to, CONNECT_LIMIT)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_reader, server_writer) = (client.try_clone()?, server.try_clone()?);
    let upward = std::thread::spawn(move || copy(client_reader, server_writer));
    copy(server, client);
    let _ = upward.join();
    Ok(())
}

/// Copies one direction; its end is passed on, and an error ends both.
fn copy(mut from: TcpStream, mut to: TcpStream) {
    let how = match io::copy(&mut from, &mut to) {
        Ok(_) => Shutdown::Write,
        Err(_) => Shutdown::Both,
    };
    let _ = to.shutdown(how);
    if how == Shutdown::Both {
        let _ = from.shutdown(how);
    }
}
