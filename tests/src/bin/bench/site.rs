//! The place of one measurement: two nodes, the link between them, three pods, and the servers in them.
//!
//! Every column of every round gets a new one, so that no column finds what another has left in the kernel: closed
//! connections, routes, caches. The site does not know which proxies it is for.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use ztunnel_tests::mesh::{Enrolment, MESHED, MeshFiles};
use ztunnel_tests::poll::eventually;
use ztunnel_tests::process::Process;
use ztunnel_tests::run::Run;
use ztunnel_tests::topology::{Node, Pod};

/// The port of nginx.
pub(crate) const HTTP: u16 = 8080;
/// The port of iperf3.
pub(crate) const STREAM: u16 = 5201;
/// The page that is asked for: 1 KiB.
pub(crate) const PAGE: &str = "/1k";

/// Two nodes and three pods. Fields end in the order they stand here.
#[derive(Debug)]
pub(crate) struct Site {
    programs: Vec<Process>,
    /// The node of the client.
    pub(crate) a: Node,
    /// The node of the server.
    pub(crate) b: Node,
    /// Where the load comes from.
    pub(crate) client: Pod,
    /// A server on the client's node.
    pub(crate) near: Pod,
    /// The server.
    pub(crate) server: Pod,
    /// The objects for a control plane that reads files.
    pub(crate) mesh: MeshFiles,
    /// What it all belongs to. Last: it removes what the others live in.
    pub(crate) run: Run,
}

impl Site {
    /// Makes nodes and pods and starts the servers.
    pub(crate) fn build() -> Result<Self> {
        let run = Run::begin()?;
        let (a, b) = (Node::create(&run, "node-a", 1)?, Node::create(&run, "node-b", 2)?);
        a.join(&b)?;
        let [client, near] = [a.add_pod(&run, "client")?, a.add_pod(&run, "near")?];
        let server = b.add_pod(&run, "server")?;
        let mesh = MeshFiles::create(run.path("mesh"), run.path("mesh.new"))?;
        for pod in [&client, &near, &server] {
            mesh.pod(MESHED, pod, Enrolment::Inherit)?;
            widen(pod)?;
        }
        // Whatever reaches a server without mutual TLS must not count.
        mesh.peer_authentication("STRICT")?;
        let mut programs = Vec::new();
        for pod in [&near, &server] {
            programs.push(nginx(&run, pod)?);
            let mut command = pod.place.command("iperf3")?;
            command.args(["--server", "--port", &STREAM.to_string()]);
            programs.push(pod.place.start(&format!("iperf3-{}", pod.name), command)?);
        }
        let site = Self { programs, a, b, client, near, server, mesh, run };
        for pod in [&site.near, &site.server] {
            eventually(Duration::from_secs(5), || listening(pod))?;
        }
        Ok(site)
    }

    /// Fails when a server has ended.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        self.programs.iter_mut().try_for_each(Process::must_run)
    }

    /// Ends the servers and removes everything.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.programs.clear();
        self.run.end()
    }
}

/// At the defaults of a fresh namespace a load of new connections soon runs out of ports and measures only that.
/// The range leaves out every port that something listens on. Congestion control is one without
/// pacing for all (reno: any namespace may have it): a machine whose default is BBR would measure that, where a proxy
/// does not choose.
fn widen(pod: &Pod) -> Result<()> {
    for (key, value) in [
        ("ipv4/ip_local_port_range", "16384 65000"),
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/tcp_max_tw_buckets", "1000"),
        ("ipv4/tcp_congestion_control", "reno"),
    ] {
        pod.place.netns.set_sysctl(key, value)?;
    }
    Ok(())
}

fn listening(pod: &Pod) -> Result<()> {
    pod.place.netns.enter(|| {
        for port in [HTTP, STREAM] {
            std::net::TcpListener::bind((pod.v4, port))
                .err()
                .filter(|error| error.kind() == std::io::ErrorKind::AddrInUse)
                .with_context(|| format!("nothing listens on port {port} of {}", pod.name))?;
        }
        Ok(())
    })
}

fn nginx(run: &Run, pod: &Pod) -> Result<Process> {
    let own = run.path("state").join(format!("nginx-{}", pod.name));
    let pages = own.join("pages");
    fs::create_dir_all(&pages)?;
    fs::write(pages.join(PAGE.trim_start_matches('/')), "x".repeat(1024))?;
    let path = own.join("nginx.conf");
    fs::write(&path, nginx_config(&own.display().to_string()))?;
    let mut command = pod.place.command("nginx")?;
    command.arg("-c").arg(&path).arg("-p").arg(&own);
    pod.place.start(&format!("nginx-{}", pod.name), command)
}

fn nginx_config(directory: &str) -> String {
    format!(
        "daemon off;
user root;
worker_processes 2;
worker_rlimit_nofile 65536;
pid {directory}/pid;
error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 600;
  tcp_nodelay on;
  sendfile on;
  open_file_cache max=10;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen {HTTP} backlog=4096;
    root {directory}/pages;
  }}
}}
"
    )
}
