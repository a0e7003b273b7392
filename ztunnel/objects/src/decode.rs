//! Typed objects out of YAML texts.
//!
//! Knows which kinds there are and how they are written (several documents to a text, lists of objects as
//! `kubectl get -o yaml` prints them). Does not know what the objects mean together, nor files.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use ztunnel_mesh::source::loss::FileCensus;
use ztunnel_mesh::source::loss::outline::Outline;

use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::kinds::MeshConfig;
use crate::kinds::Object;
use crate::kinds::Objects;
use crate::kinds::Source;
use crate::kinds::security::AuthorizationPolicy;
use crate::kinds::security::PeerAuthentication;
use crate::yaml;
use crate::yaml::Node;
use crate::yaml::Piece;
use crate::yaml::SyntaxError;
use crate::yaml::Value;
use crate::yaml::decoder::decode_all;

/// Collects the objects of any number of texts.
#[derive(Debug, Default)]
pub struct Collector {
    objects: Objects,
    diagnostics: Vec<Diagnostic>,
    /// Where each object was first seen, by kind, namespace and name.
    seen: HashMap<(&'static str, Arc<str>, Arc<str>), Source>,
    files: Vec<(Arc<str>, FileSeen)>,
    /// How many objects of a kind that is not read, and where the first of them is.
    skipped: BTreeMap<(String, String), (u32, Source)>,
}

/// How much there is.
#[derive(Debug, Clone, Copy)]
struct Mark {
    namespaces: usize,
    pods: usize,
    services: usize,
    peer_authentications: usize,
    authorization_policies: usize,
    diagnostics: usize,
}

/// What one text held.
#[derive(Debug, Clone, Default)]
pub struct FileSeen {
    /// Its objects, and how it ends.
    pub census: FileCensus,
    /// Nothing can have been cut off its end.
    pub whole: bool,
}

/// The kinds that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Namespace,
    Pod,
    Service,
    ConfigMap,
    PeerAuthentication,
    AuthorizationPolicy,
}

/// Of objects that there are many of, the lines of so many levels are kept.
const LINES_DEPTH: usize = 3;

/// Remarks beyond so many come without a guess at what was meant.
pub(super) const HINTS_MAX: usize = 1000;

const SECURITY: &str = "security.istio.io";
const SECURITY_VERSIONS: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];
/// Kinds of the security group that say nothing about layer 4.
const SECURITY_SKIPPED: [&str; 1] = ["RequestAuthentication"];

impl Kind {
    const ALL: [Self; 6] = [
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::ConfigMap,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::ConfigMap => "ConfigMap",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    fn is_security(self) -> bool {
        matches!(self, Self::PeerAuthentication | Self::AuthorizationPolicy)
    }

    fn versions(self) -> &'static [&'static str] {
        if self.is_security() { &SECURITY_VERSIONS } else { &["v1"] }
    }
}

/// Kinds that a mesh file has for its pods' sake: nothing is read from them, and nothing is said about that.
const SILENTLY_SKIPPED: [(&str, &str); 1] = [("ServiceAccount", "v1")];

/// What an object says it is.
struct Claim<'a> {
    kind: &'a str,
    api_version: &'a str,
}

/// Why an object is not of a kind that is read.
enum NotRead {
    /// Nothing to do with the mesh.
    Skip,
    /// It would matter, were it written right: message and hint.
    Wrong(String, String),
}

impl Claim<'_> {
    fn kind(&self) -> Result<Kind, NotRead> {
        let group = self.api_version.split_once('/').map_or("", |(group, _)| group);
        let known = Kind::ALL.into_iter().find(|kind| kind.as_str() == self.kind);
        match known {
            Some(kind) if kind.versions().contains(&self.api_version) => return Ok(kind),
            Some(kind) if self.api_version.is_empty() => {
                return Err(NotRead::Wrong(
                    format!("this {} has no apiVersion", self.kind),
                    format!("write apiVersion: {}", kind.versions()[0]),
                ));
            }
            // `Service` is also a kind of other groups; those are skipped.
            Some(kind)
                if kind.is_security() == (group == SECURITY) && (kind.is_security() || group.is_empty()) =>
            {
                return Err(NotRead::Wrong(
                    format!("{} {} is not known", self.api_version, self.kind),
                    format!("write apiVersion: {}", kind.versions()[0]),
                ));
            }
            Some(_) | None => {}
        }
        if group == SECURITY && !SECURITY_SKIPPED.contains(&self.kind) {
            // Skipping a policy because of a slip of the pen would leave its workloads open.
            let known = Kind::ALL.into_iter().filter(|kind| kind.is_security()).map(Kind::as_str);
            return Err(NotRead::Wrong(
                format!("kind {} of {} is not known", self.kind, self.api_version),
                nearest(self.kind, known).map_or(String::new(), |kind| format!("write kind: {kind}")),
            ));
        }
        Err(NotRead::Skip)
    }
}

impl Collector {
    /// Adds the objects of `text`, which is (or stands for) the file `file`.
    pub fn add(&mut self, file: &Arc<str>, text: &str) {
        let mut seen = FileSeen { whole: true, ..FileSeen::default() };
        seen.census.marked = text.trim_end().ends_with("\n...");
        seen.census.outline = Outline::of(text);
        let begun = self.mark();
        let (mut document, mut documents) = (begun, 0);
        let parsed = yaml::pieces(text, &mut |piece| match piece {
            Piece::Item(node) => {
                let kind = node.text("kind").unwrap_or_default();
                let api_version = node.text("apiVersion").unwrap_or_default();
                self.object(file, &node, &Claim { kind, api_version });
            }
            Piece::Document(node, given) => {
                if given > 0 && !node.text("kind").is_some_and(|kind| kind.ends_with("List")) {
                    // It was no list.
                    self.take_back(document);
                }
                self.document(file, node, given, &mut seen);
                documents += 1;
                document = self.mark();
            }
        });
        if let Err((line, error)) = parsed {
            // What came before the error is half of something.
            self.take_back(begun);
            return self.diagnostics.push(Diagnostic::error(file, line, error.to_string()));
        }
        let json = documents == 1 && file.ends_with(".json");
        seen.whole = documents > 0 && (seen.whole || seen.census.marked || json);
        self.files.push((Arc::clone(file), seen));
    }

    fn mark(&self) -> Mark {
        let objects = &self.objects;
        Mark {
            namespaces: objects.namespaces.len(),
            pods: objects.pods.len(),
            services: objects.services.len(),
            peer_authentications: objects.peer_authentications.len(),
            authorization_policies: objects.authorization_policies.len(),
            diagnostics: self.diagnostics.len(),
        }
    }

    /// Forgets what was added since.
    fn take_back(&mut self, mark: Mark) {
        let objects = &mut self.objects;
        objects.namespaces.truncate(mark.namespaces);
        objects.pods.truncate(mark.pods);
        objects.services.truncate(mark.services);
        objects.peer_authentications.truncate(mark.peer_authentications);
        objects.authorization_policies.truncate(mark.authorization_policies);
        self.diagnostics.truncate(mark.diagnostics);
    }

    /// What each text held, in the order they were added. Those that are no YAML are left out.
    pub fn files(&self) -> &[(Arc<str>, FileSeen)] {
        &self.files
    }

    /// Notes something about the texts themselves.
    pub fn report(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// Everything that was added, and what is to be said about it.
    pub fn finish(mut self) -> (Objects, Vec<Diagnostic>) {
        for ((kind, api_version), (count, source)) in self.skipped {
            let message = match (count, api_version.as_str()) {
                (1, "") => format!("kind {kind} is not read: skipped"),
                (1, _) => format!("kind {kind} ({api_version}) is not read: skipped"),
                (_, "") => format!("kind {kind} is not read: {count} objects are skipped, the first here"),
                _ => format!(
                    "kind {kind} ({api_version}) is not read: {count} objects are skipped, the first here"
                ),
            };
            let known =
                nearest(&kind, Kind::ALL.into_iter().map(Kind::as_str)).filter(|known| *known != kind);
            let hint = known.map_or(String::new(), |known| format!("if {known} is meant, write that"));
            self.diagnostics.push(Diagnostic::warning(&source.file, source.line, message).hint(hint));
        }
        (self.objects, self.diagnostics)
    }

    /// A document of whose list `given` elements were added already.
    fn document(&mut self, file: &Arc<str>, node: Arc<Node>, given: usize, seen: &mut FileSeen) {
        let kind = node.text("kind").unwrap_or_default();
        let api_version = node.text("apiVersion").unwrap_or_default();
        let items = node.entry("items").map(|entry| &entry.value.value);
        match (kind.strip_suffix("List"), items) {
            (Some(item_kind), Some(Value::List(items))) => {
                seen.census.objects += given + items.len();
                seen.census.empty_list |= given + items.len() == 0;
                // As `kubectl` prints it: what comes last is there.
                seen.whole &= node.is_after("kind", "items");
                for item in items {
                    // Items of `v1 List` say what they are, those of `PodList` need not.
                    let kind = item.text("kind").unwrap_or(item_kind);
                    let api_version = item.text("apiVersion").unwrap_or(api_version);
                    self.object(file, item, &Claim { kind, api_version });
                }
            }
            (Some(_), Some(_)) if node.entry("items").is_some_and(|entry| entry.value.is_null()) => {
                seen.whole = false;
            }
            _ => {
                seen.whole = false;
                seen.census.objects += 1;
                self.object(file, &node, &Claim { kind, api_version });
            }
        }
    }

    fn object(&mut self, file: &Arc<str>, node: &Arc<Node>, claim: &Claim<'_>) {
        let source = Source { file: Arc::clone(file), line: node.line, node: Some(Arc::clone(node)) };
        if claim.kind.is_empty() {
            let message = match node.value {
                Value::Map(_) => "this object has no kind",
                Value::List(_) | Value::Scalar { .. } => "this is not a Kubernetes object",
            };
            let hint = "write apiVersion, kind and metadata";
            self.diagnostics.push(Diagnostic::error_at(&source, &[], message).hint(hint));
            return;
        }
        let kind = match claim.kind() {
            Ok(kind) => kind,
            Err(NotRead::Skip) => return self.skip(claim, source),
            Err(NotRead::Wrong(message, hint)) => {
                let path = if message.starts_with("kind") { "kind" } else { "apiVersion" };
                self.diagnostics.push(Diagnostic::error_at(&source, &[path], message).hint(hint));
                return;
            }
        };
        match kind {
            Kind::ConfigMap => self.config_map(claim, source),
            Kind::Namespace => {
                if let Some(object) = self.typed(kind, source, |value: &mut Namespace| &mut value.metadata) {
                    self.objects.namespaces.push(object);
                }
            }
            Kind::Pod => {
                if let Some(object) = self.typed(kind, source, |value: &mut Pod| &mut value.metadata) {
                    self.objects.pods.push(object);
                }
            }
            Kind::Service => {
                if let Some(object) = self.typed(kind, source, |value: &mut Service| &mut value.metadata) {
                    self.objects.services.push(object);
                }
            }
            Kind::PeerAuthentication => {
                if let Some(object) =
                    self.typed(kind, source, |value: &mut PeerAuthentication| &mut value.metadata)
                {
                    self.objects.peer_authentications.push(object);
                }
            }
            Kind::AuthorizationPolicy => {
                if let Some(object) =
                    self.typed(kind, source, |value: &mut AuthorizationPolicy| &mut value.metadata)
                {
                    self.objects.authorization_policies.push(object);
                }
            }
        }
    }

    fn skip(&mut self, claim: &Claim<'_>, source: Source) {
        if SILENTLY_SKIPPED.contains(&(claim.kind, claim.api_version)) {
            return;
        }
        let key = (claim.kind.to_owned(), claim.api_version.to_owned());
        self.skipped.entry(key).or_insert((0, source)).0 += 1;
    }

    /// Decodes one object, reports what its type does not know, and notes its name.
    fn typed<T: DeserializeOwned>(
        &mut self,
        kind: Kind,
        source: Source,
        metadata: impl FnOnce(&mut T) -> &mut ObjectMeta,
    ) -> Option<Object<T>> {
        let node = Arc::clone(source.node.as_ref()?);
        let unknown = RefCell::default();
        let result = decode_all::<T>(&node, &unknown);
        for field in unknown.into_inner() {
            let message = format!("{} is not a field of {}", field.field, field.within);
            // Looking for what was meant takes a while; of a mistake that is made everywhere it is said often enough.
            let near = (self.diagnostics.len() < HINTS_MAX)
                .then(|| nearest(&field.field, field.known.iter().copied()))
                .flatten();
            let hint = near.map_or(String::new(), |known| format!("write {known} instead"));
            // A rule with a misspelt field would match more than was meant: such a policy is not applied.
            self.diagnostics.push(match kind.is_security() {
                true => Diagnostic::error(&source.file, field.line, message).hint(hint),
                false => Diagnostic::warning(&source.file, field.line, message).hint(hint),
            });
        }
        let mut value = match result {
            Ok(value) => value,
            Err(errors) => {
                for error in errors {
                    let message = format!("{} cannot be read: {error}", kind.as_str());
                    let diagnostic = Diagnostic::error(&source.file, error.line, message);
                    self.diagnostics.push(diagnostic.hint(error.hint));
                }
                return None;
            }
        };
        let metadata = std::mem::take(metadata(&mut value));
        let name = metadata.name.clone().unwrap_or_default();
        let namespace = match (kind, metadata.namespace.as_deref()) {
            (Kind::Namespace, _) => "",
            (_, None | Some("")) => "default",
            (_, Some(namespace)) => namespace,
        };
        let mut named = true;
        for (text, field, required) in [(name.as_str(), "name", true), (namespace, "namespace", false)] {
            if (required || !text.is_empty()) && !is_name(text) {
                named = false;
                let message = format!("metadata.{field} {text:?} of this {} is not a name", kind.as_str());
                let hint = "write lower-case letters, digits, '-' and '.'";
                self.diagnostics
                    .push(Diagnostic::error_at(&source, &["metadata", field], message).hint(hint));
            }
        }
        if !named {
            return None;
        }
        let (namespace, name): (Arc<str>, Arc<str>) = (Arc::from(namespace), Arc::from(name));
        let key = (kind.as_str(), Arc::clone(&namespace), Arc::clone(&name));
        if let Some(first) = self.seen.get(&key) {
            let message = format!("{} {} is there twice", kind.as_str(), display_name(&namespace, &name));
            let hint = format!("remove this one or the one at {}:{}", first.file, first.line);
            self.diagnostics.push(Diagnostic::error_at(&source, &[], message).hint(hint));
            return None;
        }
        let mut source = source;
        if matches!(kind, Kind::Pod | Kind::Namespace) {
            // Of these there are many, and nothing is said of what is deeper.
            source.node = Some(Arc::new(node.skeleton(LINES_DEPTH)));
        }
        self.seen.insert(key, Source { node: None, ..source.clone() });
        Some(Object { source, namespace, name, metadata, value })
    }

    /// Reads Istio's mesh-wide configuration; other ConfigMaps are none of our business.
    fn config_map(&mut self, claim: &Claim<'_>, source: Source) {
        let Some(node) = source.node.clone() else { return };
        let metadata = node.entry("metadata").map(|entry| &entry.value);
        let is = |field, text| metadata.and_then(|metadata| metadata.text(field)) == Some(text);
        if !(is("name", "istio") && is("namespace", "istio-system")) {
            return self.skip(claim, source);
        }
        let path = ["data", "mesh"];
        let mesh = node.entry("data").and_then(|entry| entry.value.entry("mesh"));
        let Some(mesh) = mesh else {
            let message = "ConfigMap istio-system/istio has no data.mesh";
            let hint = "write data: {mesh: \"trustDomain: <domain>\"}";
            self.diagnostics.push(Diagnostic::error_at(&source, &path, message).hint(hint));
            return;
        };
        let Value::Scalar { text, .. } = &mesh.value.value else {
            let message = "data.mesh must be a text that holds YAML";
            self.diagnostics.push(Diagnostic::error_at(&source, &path, message).hint("write mesh: |"));
            return;
        };
        // In a block text the first line stands below its key.
        let offset = if text.contains('\n') { mesh.line } else { mesh.line - 1 };
        let documents = match yaml::documents(text) {
            Ok(documents) => documents,
            Err((line, error)) => {
                let error = match error {
                    SyntaxError::Duplicate(key, first) => SyntaxError::Duplicate(key, offset + first),
                    other => other,
                };
                let message = format!("data.mesh: {error}");
                self.diagnostics.push(Diagnostic::error(&source.file, offset + line, message));
                return;
            }
        };
        let setting = |key: &str| {
            let node = documents.first()?;
            Some((node.text(key)?.to_owned(), offset + node.line_of(&[key])))
        };
        let value =
            MeshConfig { trust_domain: setting("trustDomain"), root_namespace: setting("rootNamespace") };
        if let Some(first) = &self.objects.mesh_config {
            let hint = format!("remove this one or the one at {}:{}", first.source.file, first.source.line);
            let message = "ConfigMap istio-system/istio is there twice";
            self.diagnostics.push(Diagnostic::error_at(&source, &[], message).hint(hint));
            return;
        }
        let (namespace, name) = (Arc::from("istio-system"), Arc::from("istio"));
        let metadata = ObjectMeta::default();
        self.objects.mesh_config = Some(Object { source, namespace, name, metadata, value });
    }
}

/// Whether Kubernetes takes `text` as a name (RFC 1123 subdomain).
fn is_name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    let outer = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= 253 && text.starts_with(outer) && text.ends_with(outer) && text.chars().all(inner)
}

fn display_name(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::translate::Options;
    use crate::translate::translate;

    fn collected(text: &str) -> (Objects, Vec<String>) {
        let mut collector = Collector::default();
        collector.add(&Arc::from("m.yaml"), text);
        let (objects, diagnostics) = collector.finish();
        (objects, diagnostics.iter().map(ToString::to_string).collect())
    }

    fn check_said(text: &str, expected: &[&str]) {
        assert_eq!(collected(text).1, expected, "{text}");
    }

    #[test]
    fn objects_come_one_by_one_or_in_lists_as_yaml_or_json() {
        for text in [
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: b}\n",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n",
            "apiVersion: v1\nkind: PodList\nmetadata: {resourceVersion: '7'}\nitems:\n- {metadata: {name: a}}\n- {metadata: {name: b}}\n",
            "{\"apiVersion\": \"v1\", \"kind\": \"List\",\n\t\"items\": [\n\t\t{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"a\"}},\n\t\t{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"b\"}}]}",
        ] {
            let (objects, said) = collected(text);
            assert_eq!(said, Vec::<String>::new(), "{text}");
            let names: Vec<_> = objects.pods.iter().map(|pod| (&*pod.namespace, &*pod.name)).collect();
            assert_eq!(names, [("default", "a"), ("default", "b")]);
        }
        assert_eq!(collected("apiVersion: v1\nkind: PodList\nitems:\n").1, Vec::<String>::new());
    }

    #[test]
    fn what_kubectl_prints_is_known_entirely() {
        let text = "apiVersion: v1
kind: Pod
metadata:
  annotations: {a: b}
  creationTimestamp: \"2026-08-01T10:00:00Z\"
  generateName: a-
  managedFields:
  - apiVersion: v1
    fieldsType: FieldsV1
    fieldsV1: {f:metadata: {f:labels: {\".\": {}}}}
    manager: kubectl
    operation: Update
    time: \"2026-08-01T10:00:00Z\"
  name: a-1
  ownerReferences:
  - {apiVersion: apps/v1, blockOwnerDeletion: true, controller: true, kind: ReplicaSet, name: a, uid: u}
spec:
  containers:
  - image: a:1
    name: a
    ports: [{containerPort: 80, protocol: TCP}]
    livenessProbe: {httpGet: {path: /, port: web}, failureThreshold: 3}
    resources: {limits: {cpu: 500m, memory: 1Gi}, requests: {cpu: 1}}
  tolerations: [{effect: NoExecute, key: k, operator: Exists, tolerationSeconds: 300}]
  volumes: [{name: t, projected: {defaultMode: 420, sources: [{serviceAccountToken: {expirationSeconds: 3607, path: token}}]}}]
status:
  conditions: [{lastProbeTime: null, lastTransitionTime: \"2026-08-01T10:00:00Z\", observedGeneration: 1, status: \"True\", type: Ready}]
  containerStatuses: [{name: a, ready: true, restartCount: 0, image: a, imageID: x, state: {running: {startedAt: \"2026-08-01T10:00:00Z\"}}}]
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}]
  qosClass: Burstable
";
        let (objects, said) = collected(text);
        assert_eq!(said, Vec::<String>::new());
        assert_eq!(objects.pods.len(), 1);
    }

    #[test]
    fn kinds_that_are_not_read_are_named_once() {
        check_said(
            "kind: Deployment\napiVersion: apps/v1\n---\nkind: Deployment\napiVersion: apps/v1\n---\nkind: Pods\napiVersion: v1\n---\nkind: Service\napiVersion: serving.knative.dev/v1\n---\nkind: ConfigMap\napiVersion: v1\nmetadata: {name: a}\n",
            &[
                "m.yaml:13: warning: kind ConfigMap (v1) is not read: skipped",
                "m.yaml:1: warning: kind Deployment (apps/v1) is not read: 2 objects are skipped, the first here",
                "m.yaml:7: warning: kind Pods (v1) is not read: skipped (if Pod is meant, write that)",
                "m.yaml:10: warning: kind Service (serving.knative.dev/v1) is not read: skipped",
            ],
        );
    }

    #[test]
    fn service_accounts_are_expected_and_not_read() {
        check_said("kind: ServiceAccount\napiVersion: v1\nmetadata: {name: a}\n", &[]);
        check_said(
            "kind: ServiceAccount\napiVersion: v2\n",
            &["m.yaml:1: warning: kind ServiceAccount (v2) is not read: skipped"],
        );
    }

    #[test]
    fn what_is_no_object_of_its_kind_is_said() {
        for (text, expected) in [
            (
                "- a\n",
                "m.yaml:1: error: this is not a Kubernetes object (write apiVersion, kind and metadata)",
            ),
            (
                "\nmetadata: {}\n",
                "m.yaml:2: error: this object has no kind (write apiVersion, kind and metadata)",
            ),
            ("a: b: c\n", "m.yaml:1: error: not YAML: mapping values are not allowed in this context"),
            ("kind: Pod\n", "m.yaml:1: error: this Pod has no apiVersion (write apiVersion: v1)"),
            ("kind: Pod\napiVersion: v2\n", "m.yaml:2: error: v2 Pod is not known (write apiVersion: v1)"),
            (
                "apiVersion: security.istio.io/v1alpha1\nkind: PeerAuthentication\n",
                "m.yaml:1: error: security.istio.io/v1alpha1 PeerAuthentication is not known (write apiVersion: security.istio.io/v1)",
            ),
            (
                "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\n",
                "m.yaml:2: error: kind AuthorisationPolicy of security.istio.io/v1 is not known (write kind: AuthorizationPolicy)",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: A_b\n",
                "m.yaml:4: error: metadata.name \"A_b\" of this Pod is not a name (write lower-case letters, digits, '-' and '.')",
            ),
            (
                "apiVersion: v1\nkind: Namespace\nmetadata: {labels: {a: b}}\n",
                "m.yaml:3: error: metadata.name \"\" of this Namespace is not a name (write lower-case letters, digits, '-' and '.')",
            ),
            (
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    a: 1\n    a: 2\n",
                "m.yaml:7: error: data.mesh: key \"a\" is there twice, first on line 6",
            ),
        ] {
            check_said(text, &[expected]);
        }
    }

    /// Texts that are nearly objects, so that more than the scanner is reached.
    fn nearly() -> impl Strategy<Value = String> {
        let words = [
            "apiVersion",
            "kind",
            "v1",
            "security.istio.io/v1",
            "Pod",
            "Service",
            "Namespace",
            "List",
            "items",
            "PeerAuthentication",
            "AuthorizationPolicy",
            "ConfigMap",
            "metadata",
            "name",
            "namespace",
            "spec",
            "rules",
            "from",
            "source",
            "principals",
            "ports",
            "mtls",
            "mode",
            "STRICT",
            "80",
            "-1",
            "1e9",
            "~",
            "&a",
            "*a",
            "!!str",
            "|",
            ">",
            "\"",
            "'",
            "#",
            "?",
            "---",
            "...",
            "<<",
            "%YAML 1.2",
            "@",
            "\u{feff}",
        ];
        let token = prop_oneof![
            6 => proptest::sample::select(words.to_vec()).prop_map(str::to_owned),
            4 => proptest::sample::select(vec![": ", "\n", "\n  ", "\n- ", "- ", "{", "}", "[", "]", ", ", " ", "\t"])
                .prop_map(str::to_owned),
            1 => any::<char>().prop_map(String::from),
        ];
        proptest::collection::vec(token, 0..60).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        #[test]
        fn no_text_panics(text in prop_oneof![nearly(), any::<String>()]) {
            let (objects, _) = collected(&text);
            let _ = translate(&objects, &Options::default());
        }
    }
}
