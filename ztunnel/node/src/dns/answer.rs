//! Which service a pod means by a name, and which addresses that is. Pure.
//!
//! A name is looked for as it stands, then as the short forms that Kubernetes' resolvers complete, then without the
//! search domain that the pod's resolver has appended to it. What is found is answered with authority, also where
//! there is no address of the family asked for; what is not found is for another resolver to answer. So are questions
//! for anything but addresses: of a name that only the mesh has it then says that there is nothing of that kind
//! ([`has`]), instead of passing on that there is no such name, which resolvers remember for the addresses, too
//! (RFC 2308 §5).
//!
//! Istio's proxy differs in three ways. It passes that on. It answers for a headless service without ready endpoints
//! that there are no addresses, where Kubernetes' DNS says that there is no such name. And to it a wildcard covers
//! everything below it, also what is below a name that the mesh has as such, which is closer (RFC 4592 §3.3.1).
//! As in Istio's, a name is not there only because others are below it.

use std::net::IpAddr;
use std::sync::Arc;

use ztunnel_mesh::model::service::HealthPolicy;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::store::index::Mesh;

/// The addresses of one answer. More would not fit into a message over TCP (RFC 1035 §4.2.2).
const ADDRESSES_MAX: usize = 2000;

/// What names are completed with, and what is preferred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    domain: Arc<str>,
    preferred_namespace: Option<Arc<str>>,
    ipv6: bool,
}

impl Config {
    /// Completes names with the cluster's `domain`. Where several services have one name and neither is of the client's
    /// namespace nor canonical, that of `preferred_namespace` is meant. Without `ipv6` no IPv6 address is answered.
    pub fn new(domain: &str, preferred_namespace: Option<&str>, ipv6: bool) -> Self {
        Self {
            domain: Arc::from(domain.trim_matches('.').to_ascii_lowercase()),
            preferred_namespace: preferred_namespace.map(Arc::from),
            ipv6,
        }
    }
}

/// Which addresses are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4: `A`.
    V4,
    /// IPv6: `AAAA`.
    V6,
}

impl Family {
    fn is(self, ip: IpAddr) -> bool {
        match self {
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
        }
    }
}

/// What a name of the mesh stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The service.
    pub service: Arc<Service>,
    /// The name without the search domain, where it was found so: the name asked for is an alias of it.
    pub alias_of: Option<String>,
    /// Its addresses of the family asked for, in random order. There may be none.
    pub addresses: Vec<IpAddr>,
    /// Whether it can have none of that family.
    pub unsupported: bool,
    /// Whether there is such a name. There is none of a headless service nobody of which is ready (Kubernetes' DNS
    /// specification §2.4.1).
    pub exists: bool,
    /// The zone that is answered for: the cluster's, where the name is in it.
    pub zone: Option<Arc<str>>,
}

/// What a client means by `name`, which is in lower case and without the dot at its end; `None` where it is no name of
/// the mesh. Pure: the same `roll`, a random number, gives the same order of addresses.
pub fn find(
    mesh: &Mesh,
    config: &Config,
    client: &Workload,
    name: &str,
    family: Family,
    roll: u64,
) -> Option<Found> {
    let candidates = candidates(name, &client.namespace, &config.domain);
    let (service, alias_of) = candidates.into_iter().find_map(|candidate| {
        let (service, wildcard) = service(mesh, config, client, &candidate.name)?;
        // A name under a wildcard is as good as any other under it: an alias would say nothing.
        Some((service, candidate.stripped.filter(|_| !wildcard)))
    })?;
    let unsupported = (family == Family::V6 && !config.ipv6)
        || matches!(
            (service.ip_families, family),
            (Some(IpFamilies::V4Only), Family::V6) | (Some(IpFamilies::V6Only), Family::V4)
        );
    let addresses = if unsupported { Vec::new() } else { addresses(mesh, client, service, family) };
    let addresses = some_of(addresses, roll);
    let exists = !service.vips.is_empty() || endpoints(mesh, service).next().is_some();
    let alias_of = alias_of.filter(|_| exists);
    let zone = zone(config, alias_of.as_deref().unwrap_or(name));
    Some(Found { service: Arc::clone(service), alias_of, addresses, unsupported, exists, zone })
}

/// Whether the mesh has `name` for the client, if perhaps nothing but addresses of it; then it is also told of which
/// zone, if that is not the name itself.
pub fn has(mesh: &Mesh, config: &Config, client: &Workload, name: &str) -> Option<Option<Arc<str>>> {
    let mut candidates = candidates(name, &client.namespace, &config.domain).into_iter();
    let (service, _) = candidates.find_map(|candidate| service(mesh, config, client, &candidate.name))?;
    let exists = !service.vips.is_empty() || endpoints(mesh, service).next().is_some();
    exists.then(|| zone(config, name))
}

/// The cluster's domain, if `name` is below it.
fn zone(config: &Config, name: &str) -> Option<Arc<str>> {
    let below = name.strip_suffix(&*config.domain).is_some_and(|rest| rest.ends_with('.'));
    below.then(|| Arc::clone(&config.domain))
}

/// A name to look for.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    name: String,
    /// The name asked for, without the search domain.
    stripped: Option<String>,
}

/// What `name` may be short for, the likeliest first, each once.
fn candidates(name: &str, namespace: &str, domain: &str) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = Vec::with_capacity(4);
    let mut add = |name: String, stripped: Option<&str>| {
        if all.iter().all(|known| known.name != name) {
            all.push(Candidate { name, stripped: stripped.map(str::to_owned) });
        }
    };
    add(name.to_owned(), None);
    completions(name, namespace, domain).into_iter().for_each(|name| add(name, None));
    for search in [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()] {
        let stripped = name.strip_suffix(&*search).and_then(|rest| rest.strip_suffix('.'));
        let Some(stripped) = stripped.filter(|rest| !rest.is_empty()) else { continue };
        add(stripped.to_owned(), Some(stripped));
        completions(stripped, namespace, domain).into_iter().for_each(|name| add(name, Some(stripped)));
    }
    all
}

/// What Kubernetes' search domains make of a short name.
fn completions(name: &str, namespace: &str, domain: &str) -> Vec<String> {
    match name.split('.').count() {
        1 => vec![format!("{name}.{namespace}.svc.{domain}")],
        2 => vec![format!("{name}.svc.{domain}"), format!("{name}.{namespace}.svc.{domain}")],
        3 if name.ends_with(".svc") => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        3 => vec![format!("{name}.svc.{domain}")],
        4 if name.ends_with(".svc") => vec![format!("{name}.{domain}")],
        _ => Vec::new(),
    }
}

/// The service of this hostname, or of a wildcard that covers it, and whether it was a wildcard: that of the closest name
/// above it that is there (RFC 4592 §3.3.1). What is there as such is not covered, also where it has no addresses.
fn service<'a>(
    mesh: &'a Mesh,
    config: &Config,
    client: &Workload,
    hostname: &str,
) -> Option<(&'a Arc<Service>, bool)> {
    if let Some(exact) = best(mesh, config, client, hostname) {
        return Some((exact, false));
    }
    let mut rest = hostname;
    while !is_there(mesh, client, rest)
        && let Some((_, parent)) = rest.split_once('.')
    {
        let wildcard = format!("*.{parent}");
        if is_there(mesh, client, &wildcard) {
            return Some((best(mesh, config, client, &wildcard)?, true));
        }
        rest = parent;
    }
    None
}

/// Whether there is a service of this hostname that the client may see.
fn is_there(mesh: &Mesh, client: &Workload, hostname: &str) -> bool {
    let all = mesh.services_by_hostname(hostname);
    all.iter().any(|service| service.is_visible_to(Some(&client.namespace)))
}

/// Of the services with this hostname that can be answered for and that the client may see: that of its own namespace,
/// else the canonical one, else that of the preferred namespace, else the first.
fn best<'a>(mesh: &'a Mesh, config: &Config, client: &Workload, hostname: &str) -> Option<&'a Arc<Service>> {
    let candidates = mesh.services_by_hostname(hostname).iter().filter(|service| {
        service.is_visible_to(Some(&client.namespace))
            && (!service.vips.is_empty() || is_headless(service, &config.domain))
    });
    let rank = |service: &Service| {
        let preferred = config.preferred_namespace.as_deref() == Some(&*service.namespace);
        (service.namespace == client.namespace, service.canonical, preferred)
    };
    candidates.reduce(|best, other| if rank(other) > rank(best) { other } else { best })
}

/// Whether a service without virtual addresses is one of Kubernetes, whose endpoints answer for it.
fn is_headless(service: &Service, domain: &str) -> bool {
    service.hostname.strip_suffix(domain).is_some_and(|rest| rest.ends_with(".svc."))
}

/// The addresses of the family by which the client reaches the service: those of the client's own network, as in
/// another one somebody else may have them.
fn addresses(mesh: &Mesh, client: &Workload, service: &Service, family: Family) -> Vec<IpAddr> {
    if !service.vips.is_empty() {
        let own = service.vips.iter().filter(|vip| vip.network == client.network);
        return own.map(|vip| vip.ip).filter(|ip| family.is(*ip)).collect();
    }
    endpoints(mesh, service)
        .filter(|workload| workload.network == client.network)
        .filter_map(|workload| workload.addresses.iter().copied().find(|ip| family.is(*ip)))
        .collect()
}

/// The endpoints of a service that are ready, or need not be.
fn endpoints<'a>(mesh: &'a Mesh, service: &Service) -> impl Iterator<Item = &'a Workload> {
    let all = service.health_policy() == HealthPolicy::AllowAll;
    let workloads = mesh.endpoints(&service.key).iter().map(|endpoint| &**endpoint.workload());
    workloads.filter(move |workload| all || workload.healthy)
}

/// As many as fit into an answer, in random order.
fn some_of(mut addresses: Vec<IpAddr>, roll: u64) -> Vec<IpAddr> {
    // SplitMix64: enough for an order that nobody has to be unable to guess.
    let mut state = roll;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let len = addresses.len();
    for at in 0..len.min(ADDRESSES_MAX) {
        let other = at + (next() % (len - at) as u64) as usize;
        addresses.swap(at, other);
    }
    addresses.truncate(ADDRESSES_MAX);
    addresses
}

#[cfg(test)]
mod tests;
