//! What both ends' daemons tell of a connection, on every way that it can take.

mod common;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use common::in_testbed_that;
use ztunnel_tests::mesh::{MESHED, PLAIN};
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::testbed::{BOTH, SERVICE_IPS, Testbed, curl, http, lines_at};
use ztunnel_tests::topology::{Pod, in_url};

/// The labels of the traffic metrics, in Istio's order.
const LABELS: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

/// A service in front of `near` whose addresses are those of the pod.
const HEADLESS: &str = "apiVersion: v1
kind: Service
metadata:
  name: db
  namespace: demo
spec:
  clusterIP: None
  selector:
    app: near
  ports:
  - name: lines
    protocol: TCP
    port: 9000
";

/// A pod as the metrics have it, with the labels of its workload.
struct Party<'a> {
    pod: &'a str,
    namespace: &'a str,
    /// Whether its identity is told.
    named: bool,
}

/// What one end tells.
struct Told<'a> {
    source: Party<'a>,
    destination: Option<Party<'a>>,
    service: Option<&'a str>,
    security: &'a str,
}

impl Told<'_> {
    /// All labels with their values.
    fn labels(&self, reporter: &str) -> Vec<(String, String)> {
        let party = |party: Option<&Party<'_>>, kind: &str| {
            let Some(Party { pod, namespace, named }) = party else { return "unknown".to_owned() };
            match kind {
                "workload" | "canonical_service" | "app" => (*pod).to_owned(),
                "canonical_revision" | "version" => "latest".to_owned(),
                "workload_namespace" => (*namespace).to_owned(),
                "cluster" => "Kubernetes".to_owned(),
                "principal" if *named => format!("spiffe://cluster.local/ns/{namespace}/sa/{pod}"),
                _ => "unknown".to_owned(),
            }
        };
        let service =
            |value: &dyn Fn(&str) -> String| self.service.map_or_else(|| "unknown".to_owned(), value);
        let value = |label: &str| match label {
            "reporter" => reporter.to_owned(),
            "destination_service" => service(&|name| format!("{name}.{MESHED}.svc.cluster.local")),
            "destination_service_name" => service(&str::to_owned),
            "destination_service_namespace" => service(&|_| MESHED.to_owned()),
            "request_protocol" => "tcp".to_owned(),
            "response_flags" => "-".to_owned(),
            "connection_security_policy" => self.security.to_owned(),
            label => match label.split_once('_') {
                Some(("source", kind)) => party(Some(&self.source), kind),
                Some((_, kind)) => party(self.destination.as_ref(), kind),
                None => "unknown".to_owned(),
            },
        };
        LABELS.map(|label| (label.to_owned(), value(label))).to_vec()
    }
}

/// How many connections were opened, by label set, as both daemons tell.
fn opened(testbed: &Testbed) -> Result<BTreeMap<Vec<(String, String)>, u64>> {
    let mut all = BTreeMap::new();
    for on in BOTH {
        let metrics = testbed.setting(on).metrics()?;
        for line in metrics.lines() {
            let Some(sample) = line.strip_prefix("istio_tcp_connections_opened_total{") else { continue };
            let (labels, count) = sample.rsplit_once("} ").context("not a sample")?;
            let labels = labels.split(',').map(|label| {
                let (name, value) = label.split_once('=').context("not a label")?;
                Ok((name.to_owned(), value.trim_matches('"').to_owned()))
            });
            *all.entry(labels.collect::<Result<_>>()?).or_default() += count.parse::<u64>()?;
        }
    }
    Ok(all)
}

/// Does something that is one connection, and compares all that both ends tell of it.
fn check(
    testbed: &Testbed,
    way: &str,
    [source, destination]: [Option<Told<'_>>; 2],
    connect: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = opened(testbed)?;
    connect().with_context(|| way.to_owned())?;
    let mut expected = BTreeMap::new();
    expected.extend(source.map(|told| (told.labels("source"), 1)));
    expected.extend(destination.map(|told| (told.labels("destination"), 1)));
    eventually(PATIENCE, || {
        let mut new = opened(testbed)?;
        new.retain(|labels, count| {
            *count -= before.get(labels).copied().unwrap_or_default();
            *count > 0
        });
        ensure!(new == expected, "{way}: {new:#?} and not {expected:#?}");
        Ok(())
    })
}

fn meshed(pod: &Pod) -> Party<'_> {
    Party { pod: &pod.name, namespace: MESHED, named: true }
}

fn plain(pod: &Pod) -> Party<'_> {
    Party { namespace: PLAIN, ..meshed(pod) }
}

fn every_way(testbed: &Testbed) -> Result<String> {
    let Testbed { client, server, near, outsider, outside, .. } = testbed;
    let place = &client.place;
    // Within a node everything is known, and nothing is encrypted.
    let from_client = |to, service, security| {
        Some(Told { source: meshed(client), destination: Some(meshed(to)), service, security })
    };
    let mut ways = 0;
    let mut check = |way: &str, told, connect: &dyn Fn() -> Result<()>| {
        ways += 1;
        check(testbed, way, told, connect)
    };
    for (address, vip) in server.addresses().into_iter().zip(SERVICE_IPS) {
        let told = |service| from_client(server, service, "mutual_tls");
        // The client knows only that no service was dialled, the server which of its services has the port.
        check("a pod's address", [told(None), told(Some("server"))], &|| http(place, address, "").map(drop))?;
        let url = format!("http://{}/", in_url(vip.parse()?));
        let both = [told(Some("server")), told(Some("server"))];
        check("a virtual address", both, &|| curl(place, &[&url]).map(drop))?;
        let lines = lines_at(address);
        check("a port of no service", [told(None), told(None)], &|| Held::open(place, lines).map(drop))?;
    }
    for address in near.addresses() {
        let told = |service| from_client(near, service, "unknown");
        check("the same node", [told(None), told(None)], &|| http(place, address, "").map(drop))?;
        let lines = lines_at(address);
        let headless = [told(None), told(Some("db"))];
        check("a headless service", headless, &|| Held::open(place, lines).map(drop))?;
    }
    for address in server.addresses() {
        let told = Told {
            source: Party { named: false, ..plain(outsider) },
            destination: Some(meshed(server)),
            service: Some("server"),
            security: "unknown",
        };
        let connect = || http(&outsider.place, address, "").map(drop);
        check("in clear, to the mesh", [None, Some(told)], &connect)?;
    }
    for address in outside.addresses() {
        let told = Told {
            source: Party { named: false, ..meshed(client) },
            destination: Some(plain(outside)),
            service: None,
            security: "unknown",
        };
        check("in clear, out of the mesh", [Some(told), None], &|| http(place, address, "").map(drop))?;
    }
    Ok(format!("{ways} connections, each with all of its labels at both ends"))
}

#[test]
fn both_ends_tell_who_was_reached_by_which_service_on_every_way() {
    let prepare = |testbed: &mut Testbed| testbed.mesh.write("service-db", HEADLESS);
    in_testbed_that("labels", prepare, |testbed, ()| every_way(testbed));
}
