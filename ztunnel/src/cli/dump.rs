//! The parts of a dump that are shown.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::What;

/// Which entries are shown: those for which everything that is named holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// The name of a workload, service, policy or pod; of certificates a part of the identity.
    pub name: Option<String>,
    /// The namespace.
    pub namespace: Option<String>,
    /// The node, of workloads.
    pub node: Option<String>,
}

/// What a daemon knows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Dump {
    /// The mesh.
    pub workloads: Vec<Workload>,
    /// Its services.
    pub services: Vec<Service>,
    /// Its policies.
    pub policies: Vec<Policy>,
    /// What it has besides and could not be understood.
    pub refused_resources: Vec<Rejected>,
    /// What this node shows to others.
    pub certificates: Vec<Certificates>,
    /// This node's pods by their uids.
    pub workload_state: BTreeMap<String, State>,
    /// What sources of pods and mesh said last, where that is not in force.
    pub refused: Vec<Refused>,
}

/// What is not in force.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Refused {
    pub(super) said: String,
}

/// How many names are told to who asked for another one.
const NEAR_MAX: usize = 5;

impl Dump {
    /// Whether there is anything that is shown by `filter`. A pod need not have connections.
    pub(super) fn has(&self, what: What, filter: &Filter) -> bool {
        let all = what == What::All;
        let pod = |state: &State| {
            let info = state.info.as_ref();
            info.is_some_and(|info| filter.named(&info.name, &info.namespace))
        };
        let placed = |workload: &Workload| filter.placed(&workload.name, &workload.namespace, &workload.node);
        ((all || matches!(what, What::Workload | What::Connections)) && self.workloads.iter().any(placed))
            || ((all || what == What::Service)
                && self.services.iter().any(|service| filter.named(&service.name, &service.namespace)))
            || ((all || what == What::Policy)
                && self.policies.iter().any(|policy| filter.named(&policy.name, &policy.namespace)))
            || ((all || what == What::Certificate)
                && self.certificates.iter().any(|held| filter.identity(&held.identity)))
            || ((all || what == What::Connections) && self.workload_state.values().any(pod))
    }

    /// Some names that there are, those first that have most of `name`'s beginning.
    pub(super) fn near(&self, what: What, name: &str) -> Vec<String> {
        let mut names: Vec<&str> = match what {
            What::All | What::Workload => self.workloads.iter().map(|workload| &*workload.name).collect(),
            What::Service => self.services.iter().map(|service| &*service.name).collect(),
            What::Policy => self.policies.iter().map(|policy| &*policy.name).collect(),
            What::Certificate => self.certificates.iter().map(|held| &*held.identity).collect(),
            What::Connections => {
                let infos = self.workload_state.values().filter_map(|state| state.info.as_ref());
                infos.map(|info| &*info.name).collect()
            }
        };
        names.sort_unstable();
        names.dedup();
        let common = |other: &str| name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        names.sort_by_key(|other| std::cmp::Reverse(common(other)));
        names.into_iter().take(NEAR_MAX).map(str::to_owned).collect()
    }
}

/// A workload.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Workload {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) workload_ips: Vec<String>,
    pub(super) hostname: String,
    pub(super) node: String,
    pub(super) waypoint: Option<Waypoint>,
    pub(super) protocol: String,
    pub(super) status: String,
}

/// A workload or service that is not dialled, as nobody knows how.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Rejected {
    pub(super) name: String,
    pub(super) addresses: Vec<String>,
    pub(super) reason: String,
}

/// Where a waypoint is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Waypoint {
    pub(super) destination: String,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Service {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) hostname: String,
    pub(super) vips: Vec<String>,
    pub(super) waypoint: Option<Waypoint>,
    pub(super) endpoints: BTreeMap<String, Endpoint>,
}

/// A workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    pub(super) workload_uid: String,
}

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Policy {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) scope: String,
    pub(super) action: String,
}

/// The certificates of an identity.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificates {
    pub(super) identity: String,
    pub(super) state: String,
    pub(super) cert_chain: Vec<Certificate>,
    pub(super) root_certs: Vec<Certificate>,
}

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificate {
    pub(super) serial_number: String,
    pub(super) valid_from: String,
    pub(super) expiration_time: String,
}

/// A pod of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct State {
    pub(super) connections: Connections,
    pub(super) info: Option<Info>,
}

/// Which workload a pod is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Info {
    pub(super) name: String,
    pub(super) namespace: String,
}

/// A pod's open connections.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Connections {
    pub(super) inbound: Vec<Connection>,
    pub(super) outbound: Vec<Connection>,
}

/// An open connection.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Connection {
    pub(super) src: String,
    pub(super) original_dst: Option<String>,
    pub(super) actual_dst: String,
    pub(super) protocol: String,
}

impl Filter {
    /// Whether what has this name and namespace is shown.
    pub(super) fn named(&self, name: &str, namespace: &str) -> bool {
        let is = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        is(&self.name, name) && is(&self.namespace, namespace)
    }

    /// The same, for what may be on another node.
    pub(super) fn placed(&self, name: &str, namespace: &str, node: &str) -> bool {
        self.named(name, namespace) && self.node.as_deref().is_none_or(|wanted| wanted == node)
    }

    /// Whether the certificates of `identity` are shown.
    pub(super) fn identity(&self, identity: &str) -> bool {
        let namespace = self.namespace.as_deref();
        self.name.as_deref().is_none_or(|part| identity.contains(part))
            && namespace.is_none_or(|namespace| identity.contains(&format!("/ns/{namespace}/")))
    }
}

/// What of a dump is asked for, with all its keys.
pub fn part(dump: Value, what: What, filter: &Filter) -> Value {
    let Value::Object(mut dump) = dump else { return Value::Null };
    let mut kept = serde_json::Map::new();
    for (key, wanted) in KEYS {
        if what != What::All && what != wanted {
            continue;
        }
        let mut list = dump.remove(key).unwrap_or_default();
        let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        if key == REFUSED && *filter != Filter::default() {
            continue;
        }
        let named = |entry: &Value| filter.named(&text(entry, "name"), &text(entry, "namespace"));
        match &mut list {
            Value::Array(entries) => entries.retain(|entry| match wanted {
                What::Workload => {
                    filter.placed(&text(entry, "name"), &text(entry, "namespace"), &text(entry, "node"))
                }
                What::Certificate => filter.identity(&text(entry, "identity")),
                _ => named(entry),
            }),
            Value::Object(pods) => pods.retain(|_, pod| named(&pod["info"])),
            _ => {}
        }
        if what != What::All {
            return list;
        }
        // What there is only at times.
        if list.is_null() && key == REFUSED {
            continue;
        }
        kept.insert(key.to_owned(), list);
    }
    Value::Object(kept)
}

const REFUSED: &str = "refusedResources";

const KEYS: [(&str, What); 6] = [
    ("workloads", What::Workload),
    ("services", What::Service),
    ("policies", What::Policy),
    (REFUSED, What::All),
    ("certificates", What::Certificate),
    ("workloadState", What::Connections),
];
