//! Objects → mesh model: the one translator, whatever source the objects come from.
//!
//! Pure, and knows neither files nor YAML. It never gives up: what it cannot understand it reports, and leaves
//! out where that is safe. A policy that it cannot understand becomes one that refuses everything to the
//! workloads it selects, so a source that applies what has errors still fails closed.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::source::loss::Census;
use ztunnel_mesh::source::pod::LocalPod;
use ztunnel_mesh::store::index::Mesh;

use crate::diagnostic::Diagnostic;
use crate::kinds::Objects;
use crate::translate::pods::Draft;

mod authorization;
mod enrolment;
mod peers;
mod pods;
mod services;
#[cfg(test)]
mod tests;

/// For whom the mesh is translated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The name of this node, as `spec.nodeName` of a pod gives it.
    pub node: String,
}

/// What the objects mean.
#[derive(Debug)]
pub struct Translation {
    /// The whole mesh.
    pub mesh: Mesh,
    /// The pods of this node that are to be captured.
    pub pods: Vec<LocalPod>,
    /// What was not understood, or perhaps not meant.
    pub diagnostics: Vec<Diagnostic>,
    /// The network namespaces of `pods`, and where they are named.
    pub netns: Vec<NamedNetns>,
    /// What was named, whether it is part of the mesh or not.
    pub census: Census,
}

/// A network namespace that is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedNetns {
    /// Which.
    pub netns: PathBuf,
    /// Of which pod.
    pub pod: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The file and the line.
    pub place: (Arc<str>, u32),
}

impl NamedNetns {
    /// That it is not there.
    pub fn absent(&self) -> Diagnostic {
        let (file, line) = &self.place;
        let message =
            format!("network namespace {} of pod {} does not exist here", self.netns.display(), self.pod);
        Diagnostic::warning(file, *line, message).hint("`ip netns list` names those of /run/netns")
    }

    /// That there is no route from it to `probe`, where the node's own connections come from.
    pub fn unanswered(&self, probe: IpAddr) -> Diagnostic {
        let (file, line) = &self.place;
        let message = format!(
            "pod {} has no route to {probe}, from where the node's own connections come: kubelet's probes of it fail",
            self.pod
        );
        let hint = "give the pod a default route, or one to that address";
        Diagnostic::warning(file, *line, message).hint(hint)
    }
}

/// The name istiod gives to a cluster that was not named.
const CLUSTER: &str = "Kubernetes";

/// The DNS domain of services.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// What holds for the whole mesh.
#[derive(Debug)]
struct Settings {
    trust_domain: TrustDomain,
    /// The namespace whose policies are for the whole mesh.
    root_namespace: Arc<str>,
}

/// Translates `objects`. The same objects in the same order give the same result.
pub fn translate(objects: &Objects, options: &Options) -> Translation {
    let mut diagnostics = Vec::new();
    let settings = Settings::new(objects, &mut diagnostics);
    let mut census = Census::default();
    let mut drafts = pods::drafts(objects, options, &settings, &mut census, &mut diagnostics);
    let mut policies = authorization::policies(objects, &settings, &mut drafts, &mut diagnostics);
    policies.extend(peers::policies(objects, &settings, &mut drafts, &mut diagnostics));

    let netns = drafts.iter().filter_map(Draft::named_netns).collect();
    let locals = drafts.iter_mut().filter_map(|draft| draft.local.take()).collect();
    let pods: Vec<pods::Built<'_>> = drafts.into_iter().map(Draft::build).collect();
    let (services, memberships) = services::services(objects, &pods, &mut diagnostics);
    let workloads = pods
        .into_iter()
        .zip(memberships)
        .map(|(pod, services)| Arc::new(Workload { services: services.into_boxed_slice(), ..pod.workload }));
    let mesh =
        Mesh::new(settings.trust_domain, workloads, services, policies.into_iter().map(Arc::<Policy>::new));
    let policy = |kind, namespace: &str, name: &str| Arc::from(format!("{kind} {namespace}/{name}"));
    let authorizations = objects.authorization_policies.iter();
    census.policies.extend(authorizations.map(|at| policy("AuthorizationPolicy", &at.namespace, &at.name)));
    let authentications = objects.peer_authentications.iter();
    census.policies.extend(authentications.map(|at| policy("PeerAuthentication", &at.namespace, &at.name)));
    Translation { mesh, pods: locals, diagnostics, netns, census }
}

impl Settings {
    fn new(objects: &Objects, diagnostics: &mut Vec<Diagnostic>) -> Self {
        let mut trust_domain = TrustDomain::default();
        let mut root_namespace = Arc::from("istio-system");
        if let Some(object) = &objects.mesh_config {
            if let Some((name, line)) = &object.value.trust_domain {
                match TrustDomain::new(name) {
                    Ok(domain) => trust_domain = domain,
                    Err(error) => {
                        diagnostics.push(Diagnostic::error(&object.source.file, *line, error.to_string()));
                    }
                }
            }
            if let Some((name, _)) = &object.value.root_namespace {
                root_namespace = Arc::from(name.as_str());
            }
        }
        Self { trust_domain, root_namespace }
    }
}
