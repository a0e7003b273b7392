//! Layer-4 authorization policies, in the shape of `istio.security.Authorization`.
//!
//! A policy matches when any rule does; a rule when all its clauses do; a clause when any of its
//! matches does. The evaluation is in [`crate::policy`].

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

/// The name of a policy: `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that list its key.
    WorkloadSelector,
}

/// What a matching policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The connection may proceed; where an allow policy applies, what none matches is refused.
    Allow,
    /// The connection is refused, whatever else matches.
    Deny,
}

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub key: PolicyKey,
    /// Whom it applies to.
    pub scope: Scope,
    /// What it says.
    pub action: Action,
    /// It changes nothing: what it would do is only told.
    pub dry_run: bool,
    /// Its rules. A policy without rules never matches, so an allow policy without rules refuses all.
    pub rules: Vec<Rule>,
}

/// Matches when all its clauses do; without clauses, always.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// All of these.
    pub clauses: Vec<Clause>,
}

/// Matches when any of its matches does; without matches, always.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clause {
    /// Any of these.
    pub matches: Vec<Match>,
}

/// Matches when every field does: a field's positive list is empty or has a hit, and its negative list
/// has none. With all fields empty it never matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// The source's namespace.
    pub namespaces: Vec<StringMatch>,
    /// None of these.
    pub not_namespaces: Vec<StringMatch>,
    /// The source's identity, without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// None of these.
    pub not_principals: Vec<StringMatch>,
    /// The source's service account, in any trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// None of these.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The source's address.
    pub source_ips: Vec<IpNet>,
    /// None of these.
    pub not_source_ips: Vec<IpNet>,
    /// The destination's address.
    pub destination_ips: Vec<IpNet>,
    /// None of these.
    pub not_destination_ips: Vec<IpNet>,
    /// The destination's port.
    pub destination_ports: Vec<u16>,
    /// None of these.
    pub not_destination_ports: Vec<u16>,
}

/// A service account, whatever its trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// How a string is compared. Case matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// The same string.
    Exact(Arc<str>),
    /// It starts so (`abc*`).
    Prefix(Arc<str>),
    /// It ends so (`*abc`).
    Suffix(Arc<str>),
    /// It is there at all (`*`).
    Presence,
}
