//! Pods → workloads.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::core::v1::Pod;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_mesh::source::loss::Census;
use ztunnel_mesh::source::loss::Stance;
use ztunnel_mesh::source::pod::LocalPod;

use crate::diagnostic::Diagnostic;
use crate::kinds::Object;
use crate::kinds::Objects;
use crate::kinds::Source;
use crate::translate::CLUSTER;
use crate::translate::NamedNetns;
use crate::translate::Options;
use crate::translate::Settings;
use crate::translate::enrolment;
use crate::translate::enrolment::Claims;

/// Pod annotation: addresses, separated by commas, for a pod without status.
pub(super) const IPS: &str = "ztunnel.io/ips";
/// Pod label of waypoints and gateways, which terminate HBONE themselves.
const TUNNEL: &str = "networking.istio.io/tunnel";
/// A pod whose policies are still being collected.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    pub(super) object: &'a Object<Pod>,
    pub(super) workload: Workload,
    /// Its traffic is ours (here or on another node), so that policies are enforced.
    pub(super) enrolled: bool,
    /// What to capture, if it is enrolled and on this node.
    pub(super) local: Option<LocalPod>,
}

/// A pod whose workload is complete but for the services it is behind.
#[derive(Debug)]
pub(super) struct Built<'a> {
    pub(super) object: &'a Object<Pod>,
    pub(super) workload: Workload,
}

impl<'a> Draft<'a> {
    /// The network namespace to capture, and where it is named.
    pub(super) fn named_netns(&self) -> Option<NamedNetns> {
        let Source { file, .. } = &self.object.source;
        let line = self.object.source.line_of(&["metadata", "annotations", enrolment::NETNS]);
        let local = self.local.as_ref()?;
        Some(NamedNetns {
            netns: local.netns.clone(),
            pod: display(self.object),
            addresses: local.addresses.clone(),
            place: (Arc::clone(file), line),
        })
    }

    pub(super) fn build(self) -> Built<'a> {
        Built { object: self.object, workload: self.workload }
    }
}

/// The indices of `pods` by namespace.
pub(super) fn by_namespace<'n>(
    namespaces: impl Iterator<Item = &'n Arc<str>>,
) -> HashMap<Arc<str>, Vec<usize>> {
    let mut index: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
    for (pod, namespace) in namespaces.enumerate() {
        index.entry(Arc::clone(namespace)).or_default().push(pod);
    }
    index
}

/// The pods that are part of the mesh, in the order of the objects.
pub(super) fn drafts<'a>(
    objects: &'a Objects,
    options: &Options,
    settings: &Settings,
    census: &mut Census,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Draft<'a>> {
    let namespaces: HashMap<&str, &Object<Namespace>> =
        objects.namespaces.iter().map(|namespace| (&*namespace.name, namespace)).collect();
    for namespace in &objects.namespaces {
        enrolment::check_namespace(namespace, diagnostics);
    }
    let mut unknown_namespaces = BTreeSet::new();
    let mut drafts: Vec<Draft<'a>> = Vec::with_capacity(objects.pods.len());
    let mut by_ip: HashMap<IpAddr, &Object<Pod>> = HashMap::new();
    let mut claims = Claims::default();
    for object in &objects.pods {
        let phase = object.value.status.as_ref().and_then(|status| status.phase.as_deref());
        let mut named =
            |stance| census.pods.insert(Arc::from(display(object)), (enrolment::uid(object), stance));
        if matches!(phase, Some("Succeeded" | "Failed")) {
            named(Stance::Told);
            continue;
        }
        enrolment::check_pod(object, diagnostics);
        let namespace = namespaces.get(&*object.namespace).copied();
        if namespace.is_none()
            && object.label(enrolment::MODE).is_none()
            && unknown_namespaces.insert(&object.namespace)
        {
            let message = format!(
                "namespace {} is not in the mesh file, so pods without a label {} of their own are not enrolled",
                object.namespace,
                enrolment::MODE
            );
            let hint = format!("add a Namespace {} with its labels", object.namespace);
            diagnostics
                .push(Diagnostic::warning_at(&object.source, &["metadata", "namespace"], message).hint(hint));
        }
        let before = diagnostics.len();
        let Some(mut draft) = draft(object, namespace, settings, diagnostics) else {
            named(Stance::Unclear);
            continue;
        };
        if !draft.workload.host_network {
            draft.workload.addresses.retain(|ip| {
                let first = *by_ip.entry(*ip).or_insert(object);
                let mine = std::ptr::eq(first, object);
                if !mine {
                    let message =
                        format!("pod {} has the address {ip} of pod {}", display(object), found(first));
                    let hint = "give one of them another address, or remove the one that is gone";
                    let path = ["status"];
                    diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
                }
                mine
            });
        }
        if draft.enrolled && !diagnostics[before..].iter().any(Diagnostic::is_error) {
            draft.local = enrolment::local(&draft, options, diagnostics)
                .filter(|local| claims.add(object, local, diagnostics));
        }
        if !draft.enrolled {
            enrolment::check_outside(object, namespace, settings, diagnostics);
        }
        named(match &draft.local {
            Some(local) => Stance::Here(local.netns.clone()),
            None if !draft.enrolled => enrolment::outside(object, namespace, settings),
            None if draft.workload.node.is_empty() || *draft.workload.node == options.node => Stance::Unclear,
            None => Stance::Elsewhere,
        });
        drafts.push(draft);
    }
    drafts
}

/// A pod by its full name.
pub(super) fn display(object: &Object<Pod>) -> String {
    format!("{}/{}", object.namespace, object.name)
}

/// A pod and where it is written.
pub(super) fn found(object: &Object<Pod>) -> String {
    format!("{} ({}:{})", display(object), object.source.file, object.source.line)
}

fn draft<'a>(
    object: &'a Object<Pod>,
    namespace: Option<&Object<Namespace>>,
    settings: &Settings,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Draft<'a>> {
    let spec = object.value.spec.as_ref();
    let named =
        spec.and_then(|spec| spec.service_account_name.as_deref().or(spec.service_account.as_deref()));
    let service_account = named.filter(|name| !name.is_empty()).unwrap_or("default");
    let identity = match SpiffeId::new(&settings.trust_domain, &object.namespace, service_account) {
        Ok(identity) => identity,
        Err(error) => {
            let path = ["spec", "serviceAccountName"];
            diagnostics.push(Diagnostic::error_at(&object.source, &path, error.to_string()));
            return None;
        }
    };
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let enrolled = !host_network && enrolment::is_enrolled(object, namespace, settings);
    let native = !host_network && object.label(TUNNEL) == Some("http");
    let (kind, workload_name) = owner(object);
    let label = |keys: &[&str]| keys.iter().find_map(|key| object.label(key)).map(Arc::<str>::from);
    let canonical_name = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
        .unwrap_or_else(|| Arc::clone(&workload_name));
    let canonical_revision =
        label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| Arc::from("latest"));
    let workload = Workload {
        uid: Arc::from(format!("{CLUSTER}//Pod/{}/{}", object.namespace, object.name)),
        name: Arc::clone(&object.name),
        namespace: Arc::clone(&object.namespace),
        identity,
        node: Arc::from(spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()),
        cluster: Arc::from(CLUSTER),
        network: Arc::default(),
        addresses: addresses(object, diagnostics),
        hostname: Arc::default(),
        workload_name,
        kind,
        canonical_name,
        canonical_revision,
        region: label(&["topology.kubernetes.io/region"]).unwrap_or_default(),
        zone: label(&["topology.kubernetes.io/zone"]).unwrap_or_default(),
        subzone: Arc::default(),
        reach: if enrolled || native { Reach::Hbone } else { Reach::Plain },
        native_tunnel: native,
        application_tunnel: None,
        healthy: is_healthy(object),
        capacity: 1,
        host_network,
        waypoint: None,
        network_gateway: None,
        services: Box::default(),
        policies: Vec::new(),
    };
    Some(Draft { object, workload, enrolled, local: None })
}

/// Ready as Kubernetes means it; a pod that does not say (written by hand) is.
fn is_healthy(object: &Object<Pod>) -> bool {
    let status = object.value.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    object.metadata.deletion_timestamp.is_none() && ready.is_none_or(|ready| ready.status == "True")
}

/// The object that owns a pod, seen through the ReplicaSet of a Deployment and the Job of a CronJob.
fn owner(object: &Object<Pod>) -> (WorkloadKind, Arc<str>) {
    let owners = object.metadata.owner_references.as_deref().unwrap_or_default();
    let Some(owner) = owners.iter().find(|owner| owner.controller == Some(true)) else {
        return (WorkloadKind::Pod, Arc::clone(&object.name));
    };
    let name = owner.name.as_str();
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = object.label("pod-template-hash");
            let deployment = hash.and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'));
            match deployment {
                Some(deployment) => (WorkloadKind::Deployment, Arc::from(deployment)),
                None => (WorkloadKind::Pod, Arc::from(name)),
            }
        }
        "Deployment" => (WorkloadKind::Deployment, Arc::from(name)),
        "CronJob" => (WorkloadKind::CronJob, Arc::from(name)),
        "Job" => {
            // A CronJob names its jobs <name>-<time in minutes>.
            let cron = name.rsplit_once('-').filter(|(_, time)| {
                (8..=10).contains(&time.len()) && time.chars().all(|c| c.is_ascii_digit())
            });
            match cron {
                Some((cron, _)) => (WorkloadKind::CronJob, Arc::from(cron)),
                None => (WorkloadKind::Job, Arc::from(name)),
            }
        }
        _ => (WorkloadKind::Pod, Arc::from(name)),
    }
}

/// The addresses of a pod: those of its status; if it has none there, those of the annotation.
fn addresses(object: &Object<Pod>, diagnostics: &mut Vec<Diagnostic>) -> Vec<IpAddr> {
    let status = object.value.status.as_ref();
    let all = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    let mut texts: Vec<&str> = all.iter().map(|ip| ip.ip.as_str()).collect();
    let mut path = vec!["status", "podIPs"];
    if texts.is_empty() {
        path = vec!["status", "podIP"];
        texts.extend(status.and_then(|status| status.pod_ip.as_deref()).filter(|ip| !ip.is_empty()));
    }
    if texts.is_empty() {
        path = vec!["metadata", "annotations", IPS];
        let annotation = object.annotation(IPS).unwrap_or_default();
        texts.extend(annotation.split(',').map(str::trim).filter(|ip| !ip.is_empty()));
    }
    let mut addresses = Vec::with_capacity(texts.len());
    for text in texts {
        let ip = text.parse().map(canonical_ip).ok();
        match ip.filter(|ip| !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()) {
            Some(ip) if addresses.contains(&ip) => {}
            Some(ip) => addresses.push(ip),
            None => {
                let message = format!("{text:?} is not the address of a pod");
                let hint = "write an IPv4 or IPv6 address without a prefix length";
                diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
            }
        }
    }
    addresses
}
