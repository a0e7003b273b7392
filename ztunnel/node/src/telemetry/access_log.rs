//! The access log's lines: one per closed connection, in Istio's fields and order.
//!
//! Runs on the log writer's thread, so the data path pays for none of the formatting.

use std::net::SocketAddr;

use tracing::Level;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::canonical;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Workload;

use crate::telemetry::events::AccessRecord;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Closed;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::Security;
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
    match &addresses.hbone {
        Some(Authority::Address(target)) => address(line, "dst.hbone_addr", *target),
        Some(name @ Authority::Hostname { .. }) => line.shown("dst.hbone_addr", name),
        None => {}
    }
    if let Some(service) = &parties.service {
        known(line, "dst.service", &service.hostname);
    }
    workload(line, ["dst.workload", "dst.namespace"], parties.destination.as_deref());
    // Nobody proved it of a connection in clear.
    let proved = parties.destination_identity.as_ref().filter(|_| parties.security != Security::Plain);
    identity(line, "dst.identity", proved);
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
    line.quoted("duration", format_args!("{}ms", closed.duration.as_millis()));
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

#[cfg(test)]
mod tests {
    use std::time::Duration;
    use std::time::SystemTime;

    use super::*;
    use crate::telemetry::events::Opened;
    use crate::telemetry::events::RefusedEarly;
    use crate::telemetry::events::ResponseFlag;
    use crate::telemetry::testing::addresses;
    use crate::telemetry::testing::parties;

    /// 2026-01-01T00:00:00.000042Z
    fn at() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(1_767_225_600_000_042)
    }

    fn closed(parties: Parties, flag: ResponseFlag, error: Option<&str>) -> AccessRecord {
        AccessRecord::Closed(Closed {
            at: at(),
            parties,
            addresses: addresses(),
            received: 84,
            sent: 175,
            duration: Duration::from_micros(2_900),
            flag,
            error: error.map(str::to_owned),
        })
    }

    fn line(format: Format, record: &AccessRecord) -> String {
        let mut out = String::new();
        write(&mut out, format, record);
        out
    }

    #[test]
    fn an_outbound_connection_reads_as_istio_writes_it() {
        let record = closed(parties(Reporter::Source), ResponseFlag::None, None);
        assert_eq!(
            line(Format::Plain, &record),
            "2026-01-01T00:00:00.000042Z\tinfo\taccess\tconnection complete\t\
             src.addr=10.0.0.1:4242 src.workload=\"a-1\" src.namespace=\"shop\" \
             src.identity=\"spiffe://cluster.local/ns/shop/sa/a\" src.cluster=\"Kubernetes\" \
             dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 dst.service=\"b.shop.svc.cluster.local\" \
             dst.workload=\"b-1\" dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/b\" \
             dst.cluster=\"Kubernetes\" direction=\"outbound\" bytes_sent=84 bytes_recv=175 duration=\"2ms\"\n"
        );
    }

    #[test]
    fn the_server_sent_what_the_client_received() {
        let record = closed(parties(Reporter::Destination), ResponseFlag::None, None);
        let text = line(Format::Plain, &record);
        assert!(
            text.ends_with("direction=\"inbound\" bytes_sent=175 bytes_recv=84 duration=\"2ms\"\n"),
            "{text}"
        );
    }

    #[test]
    fn json_has_the_same_fields_in_the_same_order() {
        let record = closed(parties(Reporter::Source), ResponseFlag::Connect, Some("no \"route\""));
        let text = line(Format::Json, &record);
        assert_eq!(
            text,
            "{\"level\":\"error\",\"time\":\"2026-01-01T00:00:00.000042Z\",\"scope\":\"access\",\
             \"src.addr\":\"10.0.0.1:4242\",\"src.workload\":\"a-1\",\"src.namespace\":\"shop\",\
             \"src.identity\":\"spiffe://cluster.local/ns/shop/sa/a\",\"src.cluster\":\"Kubernetes\",\
             \"dst.addr\":\"10.0.0.2:15008\",\"dst.hbone_addr\":\"10.0.0.2:8080\",\
             \"dst.service\":\"b.shop.svc.cluster.local\",\"dst.workload\":\"b-1\",\"dst.namespace\":\"shop\",\
             \"dst.identity\":\"spiffe://cluster.local/ns/shop/sa/b\",\"dst.cluster\":\"Kubernetes\",\
             \"direction\":\"outbound\",\"bytes_sent\":84,\"bytes_recv\":175,\"duration\":\"2ms\",\
             \"error\":\"no \\\"route\\\"\",\"message\":\"connection complete\"}\n"
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let record = AccessRecord::Closed(Closed {
            at: at(),
            parties: Parties::unknown(Reporter::Source),
            addresses: Addresses { hbone: None, ..addresses() },
            received: 0,
            sent: 0,
            duration: Duration::ZERO,
            flag: ResponseFlag::Connect,
            error: Some("connection\nrefused".to_owned()),
        });
        assert_eq!(
            line(Format::Plain, &record),
            "2026-01-01T00:00:00.000042Z\terror\taccess\tconnection complete\t\
             src.addr=10.0.0.1:4242 dst.addr=10.0.0.2:15008 direction=\"outbound\" \
             bytes_sent=0 bytes_recv=0 duration=\"0ms\" error=\"connection\\nrefused\"\n"
        );
    }

    #[test]
    fn an_early_refusal_has_four_fields() {
        let record = AccessRecord::RefusedEarly(RefusedEarly {
            at: at(),
            reporter: Reporter::Destination,
            addresses: addresses(),
            error: "unknown source".to_owned(),
        });
        assert_eq!(
            line(Format::Plain, &record),
            "2026-01-01T00:00:00.000042Z\twarn\taccess\tconnection failed\t\
             src.addr=10.0.0.1:4242 dst.addr=10.0.0.2:15008 direction=\"inbound\" error=\"unknown source\"\n"
        );
    }

    #[test]
    fn an_opened_connection_has_no_outcome_yet() {
        let opened = Opened { at: at(), parties: parties(Reporter::Source), addresses: addresses() };
        let text = line(Format::Plain, &AccessRecord::Opened(opened));
        assert!(
            text.starts_with("2026-01-01T00:00:00.000042Z\tdebug\taccess\tconnection opened\tsrc.addr="),
            "{text}"
        );
        assert!(text.ends_with("direction=\"outbound\"\n"), "{text}");
    }
}
