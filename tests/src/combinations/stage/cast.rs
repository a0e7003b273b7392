//! The programs that play, and the services in front of them.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::Sender;

use anyhow::{Context, Result, ensure};

use crate::binaries;
use crate::combinations::axes::Family;
use crate::combinations::labels;
use crate::mesh::{MESHED, MeshFiles, PLAIN};
use crate::peer::act::{Event, Order};
use crate::process::{Log, Process, spawn};
use crate::topology::Pod;

/// Ports of servers, and of the services before them.
const FIRST_PORT: u16 = 21_000;
const SERVICE_PORT: u16 = 10_000;
/// As many as one after the other are used before the first is used again.
const PORTS: usize = 96;
/// As many have ports of their own, with some to spare for those that have just ended.
pub(super) const AT_ONCE_MAX: usize = PORTS / 2;

/// The port of a server by its connection.
pub(super) fn port(id: usize) -> u16 {
    FIRST_PORT + (id % PORTS) as u16
}

/// The pod behind a waypoint.
pub(super) const GUARDED: &str = "guarded";
/// The pod of another network.
pub(super) const BEYOND: &str = "beyond";

/// All ports of servers.
pub(super) fn ports() -> impl Iterator<Item = u16> {
    (0..PORTS).map(port)
}

/// Where nobody is, though the mesh says so: on the server's node.
pub(super) fn ghost(family: Family) -> IpAddr {
    match family {
        Family::V4 => [10, 80, 2, 200].into(),
        Family::V6 => [0xfd80, 2, 0, 0, 0, 0, 0, 0x200].into(),
    }
}

/// Where nobody is, and nobody says so: there, too.
pub(super) fn nobody(family: Family) -> IpAddr {
    match family {
        Family::V4 => [10, 80, 2, 201].into(),
        Family::V6 => [0xfd80, 2, 0, 0, 0, 0, 0, 0x201].into(),
    }
}

/// A program in a pod. Killed when dropped.
#[derive(Debug)]
pub(super) struct Actor {
    orders: ChildStdin,
    _process: Process,
}

impl Actor {
    /// Starts it; what happens goes to `events`.
    pub(super) fn start(pod: &Pod, events: Sender<Event>) -> Result<Self> {
        let mut command = pod.place.command(binaries::peer()?)?;
        command.arg("act").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(command).context("cannot start ztunnel-peer")?;
        let orders = child.stdin.take().context("its input")?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let first = lines.next().context("it says nothing")??;
        ensure!(first == "acting", "it says {first}");
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(event) => drop(events.send(event)),
                    Err(error) => eprintln!("{line}: {error}"),
                }
            }
        });
        let log = Log::at(pod.place.logs.join(format!("act-{}.log", pod.name)));
        Ok(Self { orders, _process: Process::new(child, log) })
    }

    /// Tells it what to do.
    pub(super) fn order(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        self.orders.write_all(line.as_bytes()).context("it takes no orders any more")
    }
}

/// Services: one with virtual addresses and one without for each server, and some without endpoints that answer.
#[derive(Debug)]
pub(super) struct Services(Vec<(&'static str, &'static str)>);

impl Services {
    pub(super) fn new() -> Self {
        let meshed = ["server", "near", "ghost", "empty", GUARDED, BEYOND].map(|name| (name, MESHED));
        Self(meshed.into_iter().chain([("outside", PLAIN), ("nobody", PLAIN)]).collect())
    }

    /// The port of a service that leads to this one of its pods.
    pub(super) fn port(&self, name: &str, port: u16) -> u16 {
        // What stands in between passes a port on as it is.
        if name == GUARDED { port } else { port + SERVICE_PORT }
    }

    /// Their names.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name)
    }

    /// The service with virtual addresses, as metrics tell it.
    pub(super) fn told(&self, name: &str) -> labels::Service {
        labels::Service { name: format!("by-name-{name}"), namespace: self.namespace(name).to_owned() }
    }

    fn number(&self, name: &str) -> usize {
        self.0.iter().position(|(known, _)| *known == name).unwrap_or_default() + 1
    }

    /// The namespace of a service.
    pub(super) fn namespace(&self, name: &str) -> &'static str {
        self.0[self.number(name) - 1].1
    }

    pub(super) fn vip(&self, name: &str, family: Family) -> IpAddr {
        let number = self.number(name);
        match family {
            Family::V4 => [10, 97, 0, number as u8].into(),
            Family::V6 => [0xfd97, 0, 0, 0, 0, 0, 0, number as u16].into(),
        }
    }

    pub(super) fn host(&self, name: &str) -> String {
        format!("by-name-{name}.{}.svc.cluster.local", self.namespace(name))
    }

    pub(super) fn headless_host(&self, name: &str) -> String {
        format!("headless-{name}.{}.svc.cluster.local", self.namespace(name))
    }

    /// Writes all of them, and the pods that are not there.
    pub(super) fn write(&self, mesh: &MeshFiles) -> Result<()> {
        for (name, namespace) in &self.0 {
            let addresses = [Family::V4, Family::V6].map(|family| self.vip(name, family).to_string());
            let [v4, v6] = &addresses;
            let ports = self.ports_of(name);
            let object = |prefix: &str, ip: &str, ips: &str| {
                service(&format!("{prefix}-{name}"), namespace, (name, &ports), ip, ips)
            };
            let (by_name, headless) =
                (object("by-name", v4, &format!("[{v4}, \"{v6}\"]")), object("headless", "None", "[None]"));
            mesh.write(&format!("service-by-name-{name}"), &by_name)?;
            mesh.write(&format!("service-headless-{name}"), &headless)?;
        }
        let [v4, v6] = [Family::V4, Family::V6].map(ghost);
        mesh.write("pod-ghost", &pod("ghost", MESHED, v4, v6))?;
        let [v4, v6] = [Family::V4, Family::V6].map(nobody);
        mesh.write("pod-nobody", &pod("nobody", PLAIN, v4, v6))
    }

    fn ports_of(&self, name: &str) -> String {
        let entry = |(number, target)| {
            let port = self.port(name, target);
            format!("  - {{name: tcp-{number}, protocol: TCP, port: {port}, targetPort: {target}}}\n")
        };
        ports().enumerate().map(entry).collect()
    }
}

fn service(
    name: &str,
    namespace: &str,
    (app, ports): (&str, &str),
    cluster_ip: &str,
    cluster_ips: &str,
) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {namespace}
spec:
  type: ClusterIP
  clusterIP: {cluster_ip}
  clusterIPs: {cluster_ips}
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector:
    app: {app}
  ports:
{ports}"
    )
}

/// A pod of the second node.
fn pod(name: &str, namespace: &str, v4: IpAddr, v6: IpAddr) -> String {
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata:
  name: {name}
  namespace: {namespace}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  uid: {name}-1
  labels:
    app: {name}
spec:
  nodeName: node-b
  serviceAccountName: {name}
  containers:
  - name: app
    image: none
status:
  phase: Running
  podIP: {v4}
  podIPs:
  - ip: {v4}
  - ip: {v6}
  conditions:
  - type: Ready
    status: \"True\"
"
    )
}
