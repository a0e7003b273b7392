//! What both ends' metrics must say of a connection: decides, and touches nothing.

use std::collections::BTreeMap;

use super::axes::{Combination, Limits, Mesh, Name, Path, Server, no_connection};

/// The counters of connections.
const COUNTERS: [&str; 3] = ["opened", "closed", "failed"];

/// A workload: all of its names are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) name: String,
    pub(super) namespace: String,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) namespace: String,
}

/// Who takes part in a combination.
#[derive(Debug)]
pub(super) struct Parties {
    pub(super) client: Who,
    /// Nobody where nobody could be found.
    pub(super) server: Option<Who>,
    /// Whoever stands between them.
    pub(super) waypoint: Who,
    /// The service that is dialled by its address.
    pub(super) dialled: Option<Service>,
    /// The one by which the server is known to be reached at that port.
    pub(super) behind: Service,
    /// How often the client has tried.
    pub(super) attempts: u64,
}

/// The two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reporter {
    Source,
    Destination,
}

/// One series, and how many connections must be in it.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) reporter: Reporter,
    client: Who,
    /// Whether the client has proved who it is.
    proved: bool,
    server: Option<Who>,
    service: Option<Service>,
    encrypted: bool,
    flag: &'static str,
    least: u64,
    most: u64,
}

/// What must be told of a combination, by whom.
pub(super) fn expected(it: &Combination, parties: &Parties) -> Vec<Told> {
    // No daemon is asked.
    let own_address = it.path == Path::Itself && matches!(it.name, Name::PodIp | Name::Headless);
    let nobody_takes_it = it.limits == Limits::NoDescriptors;
    if own_address || nobody_takes_it {
        return Vec::new();
    }
    let mut told = Vec::new();
    if it.client_in_mesh() {
        told.extend(by_source(it, parties));
    }
    if it.server_in_mesh() && reaches(it) {
        told.extend(by_destination(it, parties));
    }
    told
}

/// Whether the server's daemon hears of it.
fn reaches(it: &Combination) -> bool {
    it.server != Server::Gone && !matches!(it.mesh, Mesh::NoEndpoint | Mesh::NeverGood)
}

fn by_source(it: &Combination, parties: &Parties) -> Vec<Told> {
    let nowhere = matches!(it.mesh, Mesh::NoEndpoint | Mesh::NeverGood);
    let plain = it.path == Path::PlainOut || nowhere;
    let server = match it.path {
        _ if nowhere => None,
        Path::Waypoint => Some(parties.waypoint.clone()),
        _ => parties.server.clone(),
    };
    let one = Told {
        reporter: Reporter::Source,
        client: parties.client.clone(),
        proved: !plain,
        server,
        service: parties.dialled.clone(),
        encrypted: !plain && !within_node(it),
        // A waypoint has said yes before it knows.
        flag: if no_connection(it) && it.path != Path::Waypoint { "CONNECT" } else { "-" },
        least: 1,
        most: 1,
    };
    with_attempts(it, parties, one)
}

fn by_destination(it: &Combination, parties: &Parties) -> Vec<Told> {
    let client = if it.path == Path::Waypoint { &parties.waypoint } else { &parties.client };
    let plain = it.path == Path::PlainIn;
    let denied =
        matches!(it.mesh, Mesh::Denied | Mesh::DeniedMeanwhile) || (plain && it.mesh == Mesh::Strict);
    let one = Told {
        reporter: Reporter::Destination,
        client: client.clone(),
        proved: !plain,
        server: parties.server.clone(),
        service: Some(parties.dialled.clone().unwrap_or_else(|| parties.behind.clone())),
        encrypted: !plain && !within_node(it),
        flag: match it.server {
            _ if denied => "DENY",
            Server::ClosedPort => "CONNECT",
            _ => "-",
        },
        least: 1,
        most: 1,
    };
    with_attempts(it, parties, one)
}

/// What happens within a node is not mutual TLS.
fn within_node(it: &Combination) -> bool {
    matches!(it.path, Path::SameNode | Path::Itself)
}

/// Of a server that comes back: each attempt before is a connection that has failed, or that it took and dropped as it
/// went away.
fn with_attempts(it: &Combination, parties: &Parties, one: Told) -> Vec<Told> {
    if it.server != Server::Restarting {
        return vec![one];
    }
    let refused = Told { flag: "CONNECT", least: 0, most: parties.attempts.saturating_sub(1), ..one.clone() };
    vec![Told { most: parties.attempts, ..one }, refused]
}

impl Told {
    /// The labels, in Istio's order.
    fn labels(&self, flag: &str) -> String {
        let mut labels: Vec<(String, &str)> = vec![(
            "reporter".to_owned(),
            match self.reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            },
        )];
        let service = self.service.as_ref();
        let host = service.map(|service| format!("{}.{}.svc.cluster.local", service.name, service.namespace));
        let proved = Some(&self.client).filter(|_| self.proved).map(principal);
        let expected = self.server.as_ref().map(principal);
        workload(&mut labels, "source", Some(&self.client), proved.as_deref());
        for (label, value) in [
            ("destination_service", host.as_deref()),
            ("destination_service_namespace", service.map(|service| &*service.namespace)),
            ("destination_service_name", service.map(|service| &*service.name)),
        ] {
            labels.push((label.to_owned(), value.unwrap_or(UNKNOWN)));
        }
        workload(&mut labels, "destination", self.server.as_ref(), expected.as_deref());
        for (label, value) in [
            ("request_protocol", "tcp"),
            ("response_flags", flag),
            ("connection_security_policy", if self.encrypted { "mutual_tls" } else { UNKNOWN }),
            ("source_region", UNKNOWN),
            ("source_zone", UNKNOWN),
            ("destination_region", UNKNOWN),
            ("destination_zone", UNKNOWN),
        ] {
            labels.push((label.to_owned(), value));
        }
        let labels: Vec<String> =
            labels.into_iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        labels.join(",")
    }
}

const UNKNOWN: &str = "unknown";

fn principal(who: &Who) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{}", who.namespace, who.name)
}

fn workload<'a>(
    labels: &mut Vec<(String, &'a str)>,
    end: &str,
    who: Option<&'a Who>,
    principal: Option<&'a str>,
) {
    let name = who.map_or(UNKNOWN, |who| &who.name);
    let known = |value| if who.is_some() { value } else { UNKNOWN };
    for (label, value) in [
        ("workload", name),
        ("canonical_service", name),
        ("canonical_revision", known("latest")),
        ("workload_namespace", who.map_or(UNKNOWN, |who| &who.namespace)),
        ("principal", principal.unwrap_or(UNKNOWN)),
        ("app", name),
        ("version", known("latest")),
        ("cluster", known("Kubernetes")),
    ] {
        labels.push((format!("{end}_{label}"), value));
    }
}

/// The connections of each series, by the counter's name and the labels.
pub(super) type Series = BTreeMap<(&'static str, String), u64>;

/// What metrics say of connections, except of those of one workload, which is somebody's crowd.
pub(super) fn series(metrics: &str, except: &str) -> Series {
    let mut found = Series::new();
    let except = format!("source_workload=\"{except}\"");
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix("istio_tcp_connections_") else { continue };
        let Some(counter) =
            COUNTERS.into_iter().find(|counter| rest.starts_with(&format!("{counter}_total{{")))
        else {
            continue;
        };
        let Some((labels, value)) = rest.split_once('{').and_then(|(_, rest)| rest.rsplit_once("} ")) else {
            continue;
        };
        if !labels.contains(&except) {
            *found.entry((counter, labels.to_owned())).or_default() +=
                value.parse::<u64>().unwrap_or_default();
        }
    }
    found
}

/// Whether as many were closed as opened, by each reporter.
pub(super) fn is_settled(series: &Series) -> bool {
    ["source", "destination"].into_iter().all(|reporter| {
        let [opened, closed] = ["opened", "closed"].map(|counter| count(series, counter, reporter));
        opened == closed
    })
}

/// How many one reporter has counted.
pub(super) fn count(series: &Series, counter: &str, reporter: &str) -> u64 {
    let start = format!("reporter=\"{reporter}\"");
    let of_it = series.iter().filter(|((known, labels), _)| *known == counter && labels.starts_with(&start));
    of_it.map(|(_, count)| count).sum()
}

/// What of this was not told, and what was told besides: one finding each.
pub(super) fn compare(
    before: &Series,
    now: &Series,
    told: &[(Combination, Told)],
) -> Vec<(Option<Combination>, String)> {
    /// How many there must be, and whose they are.
    type Wanted = BTreeMap<(&'static str, String), (u64, u64, Combination)>;
    let mut wanted = Wanted::new();
    for (it, told) in told {
        let mut add = |counter, flag| {
            let (least, most, _) = wanted.entry((counter, told.labels(flag))).or_insert((0, 0, *it));
            *least += told.least;
            *most += told.most;
        };
        add("opened", "-");
        add("closed", told.flag);
        if told.flag != "-" {
            add("failed", told.flag);
        }
    }
    let mut found = Vec::new();
    for ((counter, labels), (least, most, it)) in &wanted {
        let of = |series: &Series| series.get(&(*counter, labels.clone())).copied().unwrap_or_default();
        let count = of(now).saturating_sub(of(before));
        if !(*least..=*most).contains(&count) {
            let wanted = if least == most { least.to_string() } else { format!("{least} to {most}") };
            found.push((Some(*it), format!("metrics: {counter} {count} instead of {wanted}: {labels}")));
        }
    }
    for (key, count) in now {
        let more = count.saturating_sub(before.get(key).copied().unwrap_or_default());
        if more > 0 && !wanted.contains_key(key) {
            found.push((None, format!("metrics besides: {} {more}: {}", key.0, key.1)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_that_is_missing_or_not_expected_is_found() {
        let metrics = |counter: &str, source: &str, count: u64| {
            format!(
                "istio_tcp_connections_{counter}_total{{reporter=\"source\",source_workload=\"{source}\"}} {count}\n"
            )
        };
        let text =
            [metrics("opened", "client", 3), metrics("closed", "client", 2), metrics("opened", "crowd", 9)];
        let series = series(&text.concat(), "crowd");
        assert_eq!(series.len(), 2);
        assert_eq!(count(&series, "opened", "source"), 3);
        assert!(!is_settled(&series));
        let besides = compare(&Series::new(), &series, &[]);
        assert_eq!(besides.len(), 2);
        assert!(compare(&series, &series, &[]).is_empty());
    }
}
