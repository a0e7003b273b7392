//! The objects a mesh is written in, as Kubernetes and Istio define them.
//!
//! What is here is typed but not yet understood: names, addresses, actions and modes are texts, which
//! [`crate::translate`] judges. Does not know where objects come from, beyond the [`Source`] it
//! keeps of each, so that whatever is said of an object can name its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::kinds::security::AuthorizationPolicy;
use crate::kinds::security::PeerAuthentication;
use crate::yaml::Node;

pub mod security;

/// Where an object was found.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file; for objects from elsewhere, a text that names them as well.
    pub file: Arc<str>,
    /// The line it begins on; 0 where there are no lines.
    pub line: u32,
    /// Its text, to find the lines of its fields in.
    pub node: Option<Arc<Node>>,
}

impl Source {
    /// The line of the field that `path` leads to, or of as much of the way as is written.
    pub fn line_of(&self, path: &[&str]) -> u32 {
        self.node.as_ref().map_or(self.line, |node| node.line_of(path))
    }
}

/// One object.
#[derive(Debug, Clone)]
pub struct Object<T> {
    /// Where it was found.
    pub source: Source,
    /// Its namespace; empty for objects that have none.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// The rest.
    pub value: T,
}

impl<T> Object<T> {
    /// A label's value.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// Whether it has all of `labels`.
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.iter().all(|(key, value)| self.label(key) == Some(value))
    }
}

/// The part of Istio's mesh-wide configuration that matters here: key `mesh` of the ConfigMap `istio` in
/// `istio-system`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshConfig {
    /// `trustDomain`, and its line.
    pub trust_domain: Option<(String, u32)>,
    /// `rootNamespace`, and its line.
    pub root_namespace: Option<(String, u32)>,
}

/// Everything a mesh is made of, in the order it was found.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    /// Mesh-wide settings.
    pub mesh_config: Option<Object<MeshConfig>>,
    /// `v1` Namespaces.
    pub namespaces: Vec<Object<Namespace>>,
    /// `v1` Pods.
    pub pods: Vec<Object<Pod>>,
    /// `v1` Services.
    pub services: Vec<Object<Service>>,
    /// `security.istio.io` PeerAuthentications.
    pub peer_authentications: Vec<Object<PeerAuthentication>>,
    /// `security.istio.io` AuthorizationPolicies.
    pub authorization_policies: Vec<Object<AuthorizationPolicy>>,
}
