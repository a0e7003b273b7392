//! The mesh, the certificates and the connections as this proxy sees them, as one JSON document.
//!
//! Written in pieces and straight from one snapshot of each: the document of a big mesh is never in memory as a
//! whole, and nobody whose state it shows waits for it.

use std::collections::BTreeMap;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::time::SystemTime;

use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use ztunnel_mesh::dump;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::source::pod::Awaited;
use ztunnel_mesh::source::status::Refused;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::index::Mesh;

use crate::identity::worker::Identities;
use crate::proxy::DataPlane;
use crate::proxy::listing::Carrier;
use crate::proxy::listing::Connection;
use crate::proxy::listing::Original;
use crate::telemetry::events::Reporter;

pub mod certificates;

#[cfg(test)]
pub(crate) mod tests;

/// Everything that is shown.
#[derive(Clone)]
pub struct Sources {
    /// The mesh.
    pub mesh: MeshReader,
    /// What of it was given by hand, as that was at the start.
    pub local: Arc<Mesh>,
    /// The certificates.
    pub identities: Identities,
    /// The pods and their connections.
    pub data_plane: Arc<DataPlane>,
    /// The pods that are not served yet.
    pub waiting: watch::Receiver<Arc<[Awaited]>>,
    /// How the sources of pods and mesh stand.
    pub source: Source,
    /// What was configured.
    pub settings: Arc<[dump::Setting]>,
    /// Which build this is.
    pub version: dump::Version,
}

impl Sources {
    /// Writes the document. Waits where `out` does.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mesh = self.mesh.snapshot();
        let document = dump::Dump {
            refused: sources(&self.source),
            version: self.version.clone(),
            certificates: certificates::certificates(&self.identities.standings()),
            workload_state: self.pods(&mesh),
            ..settings(dump::Dump::of(&mesh, &self.local), &self.settings)
        };
        write(&document, out)
    }

    fn pods(&self, mesh: &Mesh) -> BTreeMap<String, dump::WorkloadState> {
        let state = |state: &'static str, info| dump::WorkloadState {
            state: state.into(),
            info,
            connections: dump::Connections::default(),
        };
        let mut pods = BTreeMap::new();
        for served in self.data_plane.served() {
            pods.insert(served.uid.to_string(), state("Up", info(mesh, &served.workload)));
        }
        for waiting in self.waiting.borrow().iter() {
            let info = info(mesh, &waiting.workload).unwrap_or_else(|| dump::WorkloadInfo {
                name: waiting.name.to_string(),
                namespace: waiting.namespace.to_string(),
                service_account: String::new(),
            });
            // One that is captured again serves meanwhile.
            pods.entry(waiting.uid.to_string()).or_insert_with(|| state("Pending", Some(info)));
        }
        let connections = self.data_plane.connections();
        let apart = self.data_plane.apart();
        for connection in connections {
            // A pod that was withdrawn keeps its connections to their end.
            let pod = pods.entry(connection.pod.to_string()).or_insert_with(|| {
                let known = apart.iter().rev().find(|pod| pod.uid == connection.pod);
                state("Up", known.and_then(|pod| info(mesh, &pod.workload)))
            });
            match connection.reporter {
                Reporter::Source => pod.connections.outbound.push(view(connection)),
                Reporter::Destination => pod.connections.inbound.push(view(connection)),
            }
        }
        for pod in pods.values_mut() {
            pod.connections.inbound.sort_unstable();
            pod.connections.outbound.sort_unstable();
        }
        pods
    }
}

/// Whose the pod is; `None` if only the mesh could say, and does not.
fn info(mesh: &Mesh, named: &Named) -> Option<dump::WorkloadInfo> {
    let (name, namespace, account) = match named {
        Named::Uid(uid) => {
            let workload = mesh.workload(uid)?;
            (&workload.name, &workload.namespace, workload.service_account())
        }
        Named::Pod { name, namespace, service_account, .. } => (name, namespace, &**service_account),
    };
    let (name, namespace) = (name.to_string(), namespace.to_string());
    Some(dump::WorkloadInfo { name, namespace, service_account: account.to_owned() })
}

fn rfc3339(time: SystemTime) -> String {
    let whole = time::UtcDateTime::from(time).replace_nanosecond(0).unwrap_or(time::UtcDateTime::UNIX_EPOCH);
    whole.format(&Rfc3339).unwrap_or_default()
}

fn sources(source: &Source) -> Vec<dump::Refused> {
    let view = |refused: Refused| dump::Refused {
        what: refused.what.into(),
        state: refused.trouble.word().into(),
        since: rfc3339(refused.since),
        said: refused.to_string(),
        reasons: refused.reasons,
    };
    source.refusals().into_iter().map(view).collect()
}

fn view(connection: Connection) -> dump::Connection {
    dump::Connection {
        src: connection.source,
        original_dst: connection.original.map(|original| match original {
            Original::Address(dst) => dst.0.to_string(),
            Original::Host(name) => name.to_string(),
        }),
        actual_dst: connection.actual,
        protocol: match connection.carrier {
            Carrier::Tcp => "TCP",
            Carrier::Hbone => "HBONE",
            Carrier::DoubleHbone => "DOUBLEHBONE",
        }
        .into(),
    }
}

/// With what is configured.
fn settings<'a>(dump: dump::Dump<'a>, settings: &'a [dump::Setting]) -> dump::Dump<'a> {
    let value = |setting: &'a dump::Setting| (setting.key(), dump::Text::from(&*setting.value));
    let origin = |setting: &'a dump::Setting| (setting.key(), dump::Text::from(&*setting.origin));
    dump::Dump {
        config: settings.iter().map(value).collect(),
        config_origins: settings.iter().map(origin).collect(),
        ..dump
    }
}

fn write(document: &dump::Dump<'_>, mut out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut out, document)?;
    out.write_all(b"\n")
}
