//! The parts of a dump that are shown.

use serde_json::Value;
use ztunnel_mesh::dump::Dump;
use ztunnel_mesh::dump::Workload;
use ztunnel_mesh::dump::WorkloadState;

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

/// How many names are told to who asked for another one.
const NEAR_MAX: usize = 5;

/// Whether there is anything that is shown by `filter`. A pod need not have connections.
pub(super) fn has(dump: &Dump<'_>, what: What, filter: &Filter) -> bool {
    let all = what == What::All;
    let pod = |state: &WorkloadState| {
        let info = state.info.as_ref();
        info.is_some_and(|info| filter.named(&info.name, &info.namespace))
    };
    let placed = |workload: &Workload<'_>| filter.placed(&workload.name, &workload.namespace, &workload.node);
    ((all || matches!(what, What::Workload | What::Connections)) && dump.workloads.read().iter().any(placed))
        || ((all || what == What::Service)
            && dump.services.read().iter().any(|service| filter.named(&service.name, &service.namespace)))
        || ((all || what == What::Policy)
            && dump.policies.read().iter().any(|policy| filter.named(&policy.name, &policy.namespace)))
        || ((all || what == What::Certificate)
            && dump.certificates.iter().any(|held| filter.identity(&held.identity)))
        || ((all || what == What::Connections) && dump.workload_state.values().any(pod))
}

/// Some names that there are, those first that have most of `name`'s beginning.
pub(super) fn near(dump: &Dump<'_>, what: What, name: &str) -> Vec<String> {
    let mut names: Vec<&str> = match what {
        What::All | What::Workload => dump.workloads.read().iter().map(|workload| &*workload.name).collect(),
        What::Service => dump.services.read().iter().map(|service| &*service.name).collect(),
        What::Policy => dump.policies.read().iter().map(|policy| &*policy.name).collect(),
        What::Certificate => dump.certificates.iter().map(|held| &*held.identity).collect(),
        What::Connections => {
            let infos = dump.workload_state.values().filter_map(|state| state.info.as_ref());
            infos.map(|info| &*info.name).collect()
        }
    };
    names.sort_unstable();
    names.dedup();
    let common = |other: &str| name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    names.sort_by_key(|other| std::cmp::Reverse(common(other)));
    names.into_iter().take(NEAR_MAX).map(str::to_owned).collect()
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
