//! Which pods are enrolled, and what to capture of those on this node.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::core::v1::Pod;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::loss::Stance;
use ztunnel_mesh::source::pod::LocalPod;

use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::kinds::Object;
use crate::translate::Options;
use crate::translate::Settings;
use crate::translate::pods::Draft;
use crate::translate::pods::IPS;
use crate::translate::pods::display;
use crate::translate::pods::found;

/// Namespace or pod label: `ambient` puts in, `none` on a pod leaves out.
pub(super) const MODE: &str = "istio.io/dataplane-mode";
/// Pod annotation: the network namespace, an absolute path or a name under [`NETNS_DIR`].
pub(super) const NETNS: &str = "ztunnel.io/netns";
/// Every annotation of ours.
const ANNOTATIONS: [&str; 2] = [NETNS, IPS];
/// Where `ip netns` keeps network namespaces.
const NETNS_DIR: &str = "/run/netns";
/// Pod annotation of a pod that has a sidecar, which wins over ambient mode.
const SIDECAR: &str = "sidecar.istio.io/status";
/// Namespaces whose pods are never enrolled: the default of Istio's node agent.
const EXCLUDED: [&str; 1] = ["kube-system"];

/// Istio's node agent's rule: a pod's own label decides; without one its namespace's does.
pub(super) fn is_enrolled(
    object: &Object<Pod>,
    namespace: Option<&Object<Namespace>>,
    settings: &Settings,
) -> bool {
    if is_never_enrolled(object, settings) {
        return false;
    }
    match object.label(MODE) {
        Some("ambient") => true,
        Some("none") => false,
        Some(_) | None => namespace.and_then(|namespace| namespace.label(MODE)) == Some("ambient"),
    }
}

fn is_never_enrolled(object: &Object<Pod>, settings: &Settings) -> bool {
    let proxy = object.namespace == settings.root_namespace && object.label("app") == Some("ztunnel");
    proxy || EXCLUDED.contains(&&*object.namespace) || object.annotation(SIDECAR).is_some()
}

/// Why a pod is not enrolled.
pub(super) fn outside(
    object: &Object<Pod>,
    namespace: Option<&Object<Namespace>>,
    settings: &Settings,
) -> Stance {
    let in_network_of_node = object.value.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    match namespace {
        // Its namespace would have it in the mesh, or it has a word of its own.
        _ if in_network_of_node || object.label(MODE).is_some() => Stance::Told,
        Some(namespace) if namespace.label(MODE) == Some("ambient") => Stance::Told,
        Some(_) => Stance::ByNamespace,
        None if is_never_enrolled(object, settings) => Stance::Told,
        None => Stance::Unclear,
    }
}

/// Says so if a pod that is not enrolled names its network namespace, as if it were to be captured.
pub(super) fn check_outside(
    object: &Object<Pod>,
    namespace: Option<&Object<Namespace>>,
    settings: &Settings,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let labelled = namespace.is_some_and(|namespace| namespace.label(MODE).is_some());
    let by_namespace = outside(object, namespace, settings) == Stance::ByNamespace;
    if object.annotation(NETNS).is_none() || labelled || !by_namespace {
        return;
    }
    let message = format!(
        "pod {} has the annotation {NETNS}, but is not in the mesh: its namespace has no label {MODE}: ambient",
        display(object)
    );
    let hint = format!("label the namespace {}, or the pod {MODE}: none if that is meant", object.namespace);
    let path = ["metadata", "annotations", NETNS];
    diagnostics.push(Diagnostic::warning_at(&object.source, &path, message).hint(hint));
}

/// This incarnation of a pod.
pub(super) fn uid(object: &Object<Pod>) -> PodUid {
    let uid = object.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
    PodUid(uid.map_or_else(|| Arc::from(display(object)), Arc::from))
}

/// What to capture of an enrolled pod, if it is on this node.
pub(super) fn local(
    draft: &Draft<'_>,
    options: &Options,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<LocalPod> {
    let (object, workload) = (draft.object, &draft.workload);
    let annotation = object.annotation(NETNS);
    let here = if workload.node.is_empty() { annotation.is_some() } else { *workload.node == options.node };
    if workload.node.is_empty() && annotation.is_none() {
        let message = format!("pod {} is enrolled, but on no node: nobody captures it", display(object));
        let hint = format!("write spec.nodeName, or the annotation {NETNS} if it is on this node");
        diagnostics.push(Diagnostic::warning_at(&object.source, &["spec"], message).hint(hint));
    }
    if !here {
        return None;
    }
    let Some(annotation) = annotation else {
        let message = format!(
            "pod {} is enrolled and on this node, but its network namespace is not known: it is not captured",
            display(object)
        );
        let hint = format!(
            "add the annotation {NETNS}: <path, or name under {NETNS_DIR}>, or the label {MODE}: none"
        );
        diagnostics.push(Diagnostic::warning_at(&object.source, &["metadata"], message).hint(hint));
        return None;
    };
    let path = ["metadata", "annotations", NETNS];
    let netns = match annotation.trim() {
        absolute if absolute.starts_with('/') => PathBuf::from(absolute),
        name if !matches!(name, "" | "." | "..") && !name.contains('/') => {
            PathBuf::from(NETNS_DIR).join(name)
        }
        other => {
            let message = format!("{other:?} does not name a network namespace");
            let hint = format!("write an absolute path, or a name under {NETNS_DIR}");
            diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
            return None;
        }
    };
    if workload.addresses.is_empty() {
        let message = format!("pod {} has no address yet: it is not captured", display(object));
        let hint = format!("write status.podIPs, or the annotation {IPS}: <addresses separated by commas>");
        diagnostics.push(Diagnostic::warning_at(&object.source, &["metadata"], message).hint(hint));
        return None;
    }
    Some(LocalPod {
        uid: uid(object),
        workload: Arc::clone(&workload.uid),
        namespace: Arc::clone(&workload.namespace),
        name: Arc::clone(&workload.name),
        netns,
        addresses: workload.addresses.clone(),
    })
}

/// What captured pods may not share, and who has it.
#[derive(Debug, Default)]
pub(super) struct Claims<'a> {
    netns: HashMap<PathBuf, &'a Object<Pod>>,
    uid: HashMap<PodUid, &'a Object<Pod>>,
}

impl<'a> Claims<'a> {
    /// Notes what is `object`'s own; false, with an error, if another pod has it.
    pub(super) fn add(
        &mut self,
        object: &'a Object<Pod>,
        local: &LocalPod,
        diagnostics: &mut Vec<Diagnostic>,
    ) -> bool {
        let netns = *self.netns.entry(local.netns.clone()).or_insert(object);
        let uid = *self.uid.entry(local.uid.clone()).or_insert(object);
        let mut own = true;
        for (first, what, path) in [
            (netns, "network namespace", &["metadata", "annotations", NETNS][..]),
            (uid, "uid", &["metadata", "uid"]),
        ] {
            if !std::ptr::eq(first, object) {
                own = false;
                let message = format!("pod {} has the {what} of pod {}", display(object), found(first));
                diagnostics.push(Diagnostic::error_at(&object.source, path, message));
            }
        }
        own
    }
}

/// Says what is wrong with a namespace's label.
pub(super) fn check_namespace(object: &Object<Namespace>, diagnostics: &mut Vec<Diagnostic>) {
    check_mode(object, diagnostics);
    if object.label(MODE) == Some("ambient") && EXCLUDED.contains(&&*object.name) {
        let message = format!("pods of {} are never enrolled", object.name);
        let path = ["metadata", "labels", MODE];
        diagnostics.push(Diagnostic::warning_at(&object.source, &path, message));
    }
}

fn check_mode<T>(object: &Object<T>, diagnostics: &mut Vec<Diagnostic>) {
    if let Some(other) = object.label(MODE).filter(|mode| !matches!(*mode, "ambient" | "none")) {
        let message = format!("label {MODE} has no value {other:?}");
        let hint = nearest(other, ["ambient", "none"]).unwrap_or("ambient or none");
        let path = ["metadata", "labels", MODE];
        diagnostics.push(
            Diagnostic::warning_at(&object.source, &path, message).hint(format!("write {hint} instead")),
        );
    }
}

/// Says what is wrong with a pod's label and annotations.
pub(super) fn check_pod(object: &Object<Pod>, diagnostics: &mut Vec<Diagnostic>) {
    check_mode(object, diagnostics);
    for key in object.metadata.annotations.iter().flat_map(|annotations| annotations.keys()) {
        if key.starts_with("ztunnel.io/") && !ANNOTATIONS.contains(&key.as_str()) {
            let message = format!("annotation {key} is not known");
            let hint = nearest(key, ANNOTATIONS).map_or_else(
                || format!("known are {}", ANNOTATIONS.join(" and ")),
                |known| format!("write {known} instead"),
            );
            let path = ["metadata", "annotations", key];
            diagnostics.push(Diagnostic::warning_at(&object.source, &path, message).hint(hint));
        }
    }
}
