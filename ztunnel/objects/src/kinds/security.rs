//! PeerAuthentication and AuthorizationPolicy of `security.istio.io/v1` (`v1beta1` has the same fields).
//!
//! Every field of the API is here, those of layer 7 too: a field that cannot be enforced must still be seen.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

/// Whether workloads take plain connections.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthentication {
    /// `security.istio.io/v1` or `v1beta1`.
    pub api_version: String,
    /// `PeerAuthentication`.
    pub kind: String,
    /// Name, namespace, labels.
    pub metadata: ObjectMeta,
    /// What it asks for.
    pub spec: Option<PeerAuthenticationSpec>,
    /// Written by Istio; of no meaning here.
    pub status: serde_json::Value,
}

/// What a PeerAuthentication asks for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthenticationSpec {
    /// The workloads it is for; all of the namespace (or of the mesh) without one.
    pub selector: Option<WorkloadSelector>,
    /// For all ports.
    pub mtls: Option<MutualTls>,
    /// For single ports of the workload.
    pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

/// A mutual TLS setting.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// `UNSET`, `DISABLE`, `PERMISSIVE` or `STRICT`.
    pub mode: Option<String>,
}

/// Selects workloads by label.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    /// All of these.
    pub match_labels: Option<BTreeMap<String, String>>,
}

/// Who may connect to workloads.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicy {
    /// `security.istio.io/v1` or `v1beta1`.
    pub api_version: String,
    /// `AuthorizationPolicy`.
    pub kind: String,
    /// Name, namespace, labels.
    pub metadata: ObjectMeta,
    /// What it allows or denies.
    pub spec: Option<AuthorizationPolicySpec>,
    /// Written by Istio; of no meaning here.
    pub status: serde_json::Value,
}

/// What an AuthorizationPolicy allows or denies.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicySpec {
    /// The workloads it is for; all of the namespace (or of the mesh) without one.
    pub selector: Option<WorkloadSelector>,
    /// A waypoint, gateway or service it is for.
    pub target_ref: Option<PolicyTargetReference>,
    /// Waypoints, gateways or services it is for.
    pub target_refs: Option<Vec<PolicyTargetReference>>,
    /// Matches when any of them does.
    pub rules: Option<Vec<Rule>>,
    /// `ALLOW` (the default), `DENY`, `AUDIT` or `CUSTOM`.
    pub action: Option<String>,
    /// Who decides a `CUSTOM` policy.
    pub provider: Option<ExtensionProvider>,
}

/// What a policy is attached to.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTargetReference {
    /// API group.
    pub group: Option<String>,
    /// Kind.
    pub kind: Option<String>,
    /// Name.
    pub name: Option<String>,
    /// Namespace.
    pub namespace: Option<String>,
}

/// An external authorizer.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Its name in the mesh-wide configuration.
    pub name: Option<String>,
}

/// Matches when its sources, its operations and all its conditions do.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Any of these; any source at all without.
    pub from: Option<Vec<RuleFrom>>,
    /// Any of these; any operation at all without.
    pub to: Option<Vec<RuleTo>>,
    /// All of these.
    pub when: Option<Vec<Condition>>,
}

/// Wraps a [`Peer`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleFrom {
    /// Who connects.
    pub source: Option<Peer>,
}

/// Who connects: all fields that are there must match.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename = "Source", rename_all = "camelCase", default)]
pub struct Peer {
    /// Identities, without `spiffe://`.
    pub principals: Option<Vec<String>>,
    /// None of these.
    pub not_principals: Option<Vec<String>>,
    /// Layer 7: identities from a token.
    pub request_principals: Option<Vec<String>>,
    /// Layer 7.
    pub not_request_principals: Option<Vec<String>>,
    /// Namespaces of identities.
    pub namespaces: Option<Vec<String>>,
    /// None of these.
    pub not_namespaces: Option<Vec<String>>,
    /// Addresses of peers.
    pub ip_blocks: Option<Vec<String>>,
    /// None of these.
    pub not_ip_blocks: Option<Vec<String>>,
    /// Layer 7: addresses by a header.
    pub remote_ip_blocks: Option<Vec<String>>,
    /// Layer 7.
    pub not_remote_ip_blocks: Option<Vec<String>>,
    /// Service accounts, `<namespace>/<name>` or `<name>`.
    pub service_accounts: Option<Vec<String>>,
    /// None of these.
    pub not_service_accounts: Option<Vec<String>>,
}

/// Wraps an [`Operation`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleTo {
    /// What is asked for.
    pub operation: Option<Operation>,
}

/// What is asked for: all fields that are there must match.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    /// Layer 7.
    pub hosts: Option<Vec<String>>,
    /// Layer 7.
    pub not_hosts: Option<Vec<String>>,
    /// Ports of the workload.
    pub ports: Option<Vec<String>>,
    /// None of these.
    pub not_ports: Option<Vec<String>>,
    /// Layer 7.
    pub methods: Option<Vec<String>>,
    /// Layer 7.
    pub not_methods: Option<Vec<String>>,
    /// Layer 7.
    pub paths: Option<Vec<String>>,
    /// Layer 7.
    pub not_paths: Option<Vec<String>>,
}

/// One attribute of a connection.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// The attribute's name.
    pub key: String,
    /// Any of these.
    pub values: Option<Vec<String>>,
    /// None of these.
    pub not_values: Option<Vec<String>>,
}
