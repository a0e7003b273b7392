//! Tables for people, with the columns of `istioctl ztunnel-config`.

use std::collections::HashMap;
use std::net::SocketAddr;

use time::UtcDateTime;
use time::format_description::well_known::Rfc3339;
use ztunnel_mesh::dump::Certificate;
use ztunnel_mesh::dump::Certificates;
use ztunnel_mesh::dump::Connection;
use ztunnel_mesh::dump::Dump;
use ztunnel_mesh::dump::Gateway;
use ztunnel_mesh::dump::RefusedResource;
use ztunnel_mesh::dump::Service;
use ztunnel_mesh::dump::Workload;

use super::Query;
use super::What;
use super::dump::Filter;

/// Between two columns.
const GAP: usize = 3;

/// The tables that `query` asks for.
pub(super) fn tables(dump: &Dump<'_>, query: &Query, now: UtcDateTime) -> String {
    let parts = [
        (What::Workload, workloads(dump, &query.filter)),
        (What::Service, services(dump, &query.filter)),
        (What::Policy, policies(dump, &query.filter)),
        (What::Certificate, certificates(dump, &query.filter, now)),
        (What::Connections, connections(dump, &query.filter, query.raw)),
    ];
    let wanted = parts.into_iter().filter(|(what, _)| query.what == What::All || query.what == *what);
    let unknown = rejected(dump).filter(|_| {
        matches!(query.what, What::All | What::Workload | What::Service) && query.filter == Filter::default()
    });
    let tables = wanted.map(|(_, table)| table).chain(unknown);
    let tables = tables.map(|table| table.text()).collect::<Vec<_>>().join("\n");
    let refused: String =
        dump.refused.iter().map(|refused| format!("Not in force: {}\n", refused.said)).collect();
    if refused.is_empty() { tables } else { format!("{refused}\n{tables}") }
}

struct Table<const N: usize> {
    head: [&'static str; N],
    rows: Vec<[String; N]>,
}

/// A table of any width.
trait Text {
    fn text(&self) -> String;
}

impl<const N: usize> Text for Table<N> {
    fn text(&self) -> String {
        let head = self.head.map(str::to_owned);
        let mut widths = [0; N];
        for row in std::iter::once(&head).chain(&self.rows) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = String::new();
            for (width, cell) in widths.iter().zip(row) {
                line += &format!("{cell:width$}{:GAP$}", "");
            }
            text.extend([line.trim_end(), "\n"]);
        }
        text
    }
}

fn workloads(dump: &Dump<'_>, filter: &Filter) -> Box<dyn Text> {
    let mut shown: Vec<_> = dump.workloads.read().iter().collect();
    shown.retain(|workload| filter.placed(&workload.name, &workload.namespace, &workload.node));
    shown.sort_by_key(|workload| (&workload.namespace, &workload.name));
    let names = waypoints(dump);
    let row = |workload: &Workload<'_>| {
        let address = match workload.workload_ips.is_empty() {
            true => workload.hostname.to_string(),
            false => workload.workload_ips.join(","),
        };
        [
            workload.namespace.to_string(),
            workload.name.to_string(),
            address,
            workload.node.to_string(),
            waypoint(&names, workload.waypoint.as_ref()),
            workload.protocol.to_string(),
        ]
    };
    Box::new(Table {
        head: ["NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"],
        rows: shown.into_iter().map(row).collect(),
    })
}

/// What was rejected, and is not dialled. Nothing, as a rule.
fn rejected(dump: &Dump<'_>) -> Option<Box<dyn Text>> {
    if dump.refused_resources.read().is_empty() {
        return None;
    }
    let row = |refused: &RefusedResource<'_>| {
        let addresses = refused.addresses.iter().map(|address| within(address));
        [refused.name.to_string(), addresses.collect::<Vec<_>>().join(","), refused.reason.to_string()]
    };
    Some(Box::new(Table {
        head: ["REFUSED", "ADDRESS", "REASON"],
        rows: dump.refused_resources.read().iter().map(row).collect(),
    }))
}

/// What a waypoint's destination may be → the name of the service that it is.
fn waypoints<'a>(dump: &'a Dump<'_>) -> HashMap<String, &'a str> {
    let mut names = HashMap::new();
    for service in dump.services.read() {
        names.insert(format!("{}/{}", service.namespace, service.hostname), &*service.name);
        names.extend(service.vips.iter().map(|vip| (vip.to_string(), &*service.name)));
    }
    names
}

fn waypoint(names: &HashMap<String, &str>, waypoint: Option<&Gateway<'_>>) -> String {
    let Some(waypoint) = waypoint else { return "None".to_owned() };
    names.get(&*waypoint.destination).map_or_else(|| "NA".to_owned(), |name| (*name).to_owned())
}

fn services(dump: &Dump<'_>, filter: &Filter) -> Box<dyn Text> {
    let healthy: HashMap<&str, bool> = (dump.workloads.read().iter())
        .map(|workload| (&*workload.uid, workload.status == "Healthy"))
        .collect();
    let mut shown: Vec<_> = dump.services.read().iter().collect();
    shown.retain(|service| filter.named(&service.name, &service.namespace));
    shown.sort_by_key(|service| (&service.namespace, &service.name));
    let names = waypoints(dump);
    let row = |service: &Service<'_>| {
        let endpoints = service.endpoints.read();
        let well = endpoints.filter(|(_, endpoint)| healthy.get(&*endpoint.workload_uid) == Some(&true));
        [
            service.namespace.to_string(),
            service.name.to_string(),
            service.vips.iter().map(|vip| within(vip)).collect::<Vec<_>>().join(","),
            waypoint(&names, service.waypoint.as_ref()),
            format!("{}/{}", well.count(), service.endpoints.len()),
        ]
    };
    Box::new(Table {
        head: ["NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"],
        rows: shown.into_iter().map(row).collect(),
    })
}

/// `<network>/<ip>` without the network.
fn within(vip: &str) -> &str {
    vip.split_once('/').map_or(vip, |(_network, ip)| ip)
}

fn policies(dump: &Dump<'_>, filter: &Filter) -> Box<dyn Text> {
    let mut shown: Vec<_> = dump.policies.read().iter().collect();
    shown.retain(|policy| filter.named(&policy.name, &policy.namespace));
    shown.sort_by_key(|policy| (&policy.namespace, &policy.name));
    Box::new(Table {
        head: ["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"],
        rows: (shown.into_iter())
            .map(|policy| {
                [&policy.namespace, &policy.name, &policy.action, &policy.scope].map(ToString::to_string)
            })
            .collect(),
    })
}

fn certificates(dump: &Dump<'_>, filter: &Filter, now: UtcDateTime) -> Box<dyn Text> {
    let mut rows = Vec::new();
    for held in dump.certificates.iter().filter(|held| filter.identity(&held.identity)) {
        let mut push = |kind: &str, certificate: &Certificate| {
            rows.push([
                held.identity.clone(),
                kind.to_owned(),
                // Why it is so is in the JSON.
                held.state.split(':').next().unwrap_or_default().to_owned(),
                is_valid(certificate, now).to_string(),
                hexadecimal(&certificate.serial_number),
                certificate.expiration_time.clone(),
                certificate.valid_from.clone(),
            ]);
        };
        for (kind, certificate) in kinds(held) {
            push(kind, certificate);
        }
        if held.cert_chain.is_empty() && held.root_certs.is_empty() {
            push("Leaf", &Certificate::default());
        }
    }
    Box::new(Table {
        head: [
            "CERTIFICATE NAME",
            "TYPE",
            "STATUS",
            "VALID CERT",
            "SERIAL NUMBER",
            "NOT AFTER",
            "NOT BEFORE",
        ],
        rows,
    })
}

/// What each certificate is. A chain that comes without roots ends in one.
fn kinds(held: &Certificates) -> Vec<(&'static str, &Certificate)> {
    let last = held.cert_chain.len().saturating_sub(1);
    let chain = held.cert_chain.iter().enumerate().map(|(place, certificate)| match place {
        0 => ("Leaf", certificate),
        place if place == last && held.root_certs.is_empty() => ("Root", certificate),
        _ => ("Intermediate", certificate),
    });
    chain.chain(held.root_certs.iter().map(|certificate| ("Root", certificate))).collect()
}

fn is_valid(certificate: &Certificate, now: UtcDateTime) -> bool {
    let at = |text: &str| UtcDateTime::parse(text, &Rfc3339).ok();
    at(&certificate.valid_from).is_some_and(|from| from <= now)
        && at(&certificate.expiration_time).is_some_and(|end| now < end)
}

/// A decimal number of any length in hexadecimal; what is no number as it is.
fn hexadecimal(decimal: &str) -> String {
    if decimal.is_empty() || !decimal.bytes().all(|byte| byte.is_ascii_digit()) {
        return decimal.to_owned();
    }
    // The least significant digit first.
    let mut digits: Vec<u8> = vec![0];
    for byte in decimal.bytes() {
        let mut carry = u32::from(byte - b'0');
        for digit in &mut digits {
            let value = u32::from(*digit) * 10 + carry;
            *digit = (value & 0xf) as u8;
            carry = value >> 4;
        }
        while carry > 0 {
            digits.push((carry & 0xf) as u8);
            carry >>= 4;
        }
    }
    digits.iter().rev().map(|digit| char::from_digit((*digit).into(), 16).unwrap_or('?')).collect()
}

fn connections(dump: &Dump<'_>, filter: &Filter, raw: bool) -> Box<dyn Text> {
    let names = if raw { HashMap::new() } else { addresses(dump) };
    let name = |address: SocketAddr| match names.get(&address.ip().to_canonical().to_string()) {
        Some(name) => format!("{name}:{}", address.port()),
        None => address.to_string(),
    };
    // What is no address is a host name already.
    let target = |dialled: &str| dialled.parse().map_or_else(|_| dialled.to_owned(), name);
    let mut rows = Vec::new();
    for (uid, state) in &dump.workload_state {
        let pod = match &state.info {
            Some(info) if !filter.named(&info.name, &info.namespace) => continue,
            Some(info) => format!("{}.{}", info.name, info.namespace),
            None if *filter != Filter::default() => continue,
            None => uid.clone(),
        };
        let mut push = |direction: &str, local: SocketAddr, remote: SocketAddr, connection: &Connection| {
            let target = connection.original_dst.as_deref().map(target).unwrap_or_default();
            let protocol = connection.protocol.to_string();
            rows.push([pod.clone(), direction.to_owned(), name(local), name(remote), target, protocol]);
        };
        for connection in &state.connections.inbound {
            push("Inbound", connection.actual_dst, connection.src, connection);
        }
        for connection in &state.connections.outbound {
            push("Outbound", connection.src, connection.actual_dst, connection);
        }
    }
    rows.sort();
    Box::new(Table { head: ["WORKLOAD", "DIRECTION", "LOCAL", "REMOTE", "REMOTE TARGET", "PROTOCOL"], rows })
}

/// Address → the service's host name, or the pod's name and namespace.
fn addresses(dump: &Dump<'_>) -> HashMap<String, String> {
    let mut names = HashMap::new();
    for workload in dump.workloads.read() {
        let name = format!("{}.{}", workload.name, workload.namespace);
        names.extend(workload.workload_ips.iter().map(|ip| (ip.to_string(), name.clone())));
    }
    for service in dump.services.read() {
        names.extend(service.vips.iter().map(|vip| (within(vip).to_owned(), service.hostname.to_string())));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_hexadecimal_whatever_their_length() {
        for (decimal, expected) in [
            ("0", "0"),
            ("255", "ff"),
            ("340282366920938463463374607431768211456", "100000000000000000000000000000000"),
            ("not a number", "not a number"),
            ("", ""),
        ] {
            assert_eq!(hexadecimal(decimal), expected);
        }
    }
}
