//! The access log's lines: one per closed connection, in Istio's fields and order.
//!
//! Runs on the log writer's thread, so the data path pays for none of the formatting.

use std::net::SocketAddr;

use tracing::Level;

use crate::model::addr::canonical;
use crate::model::identity::SpiffeId;
use crate::model::workload::Workload;
use crate::telemetry::events::AccessRecord;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Closed;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::line::Format;
use crate::telemetry::line::Head;
use crate::telemetry::line::Line;

/// The target of access log lines, as filters name it: `RUST_LOG=info,access=off`.
pub const TARGET: &str = "access";

/// Appends `record` to `out` as one line.
pub fn write(out: &mut String, format: Format, record: &AccessRecord) {
    let (at, message) = match record {
        AccessRecord::Opened(opened) => (opened.at, "connection opened"),
        AccessRecord::Closed(closed) => (closed.at, "connection complete"),
        AccessRecord::RefusedEarly(refused) => (refused.at, "connection failed"),
    };
    let level: Level = record.level();
    let mut line = Line::begin(out, format, Head { at, level, target: TARGET, message }, &[]);
    match record {
        AccessRecord::Opened(opened) => ends(&mut line, &opened.parties, &opened.addresses),
        AccessRecord::Closed(closed) => {
            ends(&mut line, &closed.parties, &closed.addresses);
            outcome(&mut line, closed);
        }
        AccessRecord::RefusedEarly(refused) => {
            address(&mut line, "src.addr", refused.addresses.source);
            address(&mut line, "dst.addr", refused.addresses.destination);
            line.text("direction", refused.reporter.direction());
            line.text("error", &refused.error);
        }
    }
    line.end(&[]);
}

fn ends(line: &mut Line<'_>, parties: &Parties, addresses: &Addresses) {
    address(line, "src.addr", addresses.source);
    workload(line, ["src.workload", "src.namespace"], parties.source.as_deref());
    identity(line, "src.identity", parties.source_identity.as_ref());
    cluster(line, "src.cluster", parties.source.as_deref());

    address(line, "dst.addr", addresses.destination);
    if let Some(target) = addresses.hbone {
        address(line, "dst.hbone_addr", target);
    }
    if let Some(service) = &parties.service {
        known(line, "dst.service", &service.hostname);
    }
    workload(line, ["dst.workload", "dst.namespace"], parties.destination.as_deref());
    identity(line, "dst.identity", parties.destination_identity.as_ref());
    cluster(line, "dst.cluster", parties.destination.as_deref());

    line.text("direction", parties.reporter.direction());
}

fn outcome(line: &mut Line<'_>, closed: &Closed) {
    // The log speaks from the side of the pod the line is about: what it sent. The counters speak of the client:
    // `sent` is what was sent to it.
    let (sent, received) = match closed.parties.reporter {
        Reporter::Source => (closed.received, closed.sent),
        Reporter::Destination => (closed.sent, closed.received),
    };
    line.number("bytes_sent", sent);
    line.number("bytes_recv", received);
    line.text("duration", &format!("{}ms", closed.duration.as_millis()));
    if let Some(error) = &closed.error {
        line.text("error", error);
    }
}

fn workload(line: &mut Line<'_>, [name, namespace]: [&str; 2], workload: Option<&Workload>) {
    if let Some(workload) = workload {
        known(line, name, if workload.name.is_empty() { &workload.canonical_name } else { &workload.name });
        known(line, namespace, &workload.namespace);
    }
}

fn cluster(line: &mut Line<'_>, key: &str, workload: Option<&Workload>) {
    if let Some(workload) = workload {
        known(line, key, &workload.cluster);
    }
}

fn identity(line: &mut Line<'_>, key: &str, identity: Option<&SpiffeId>) {
    if let Some(identity) = identity {
        line.text(key, identity.as_str());
    }
}

fn address(line: &mut Line<'_>, key: &str, address: SocketAddr) {
    line.shown(key, canonical(address));
}

fn known(line: &mut Line<'_>, key: &str, value: &str) {
    if !value.is_empty() {
        line.text(key, value);
    }
}
