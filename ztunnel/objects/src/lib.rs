//! Kubernetes and Istio objects: read with file and line, and translated to the mesh.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `yaml` | YAML as a tree whose parts know their line | |
//! | `diagnostic` | what is wrong with an object, by file and line | kinds |
//! | `kinds` | the objects, typed | yaml |
//! | `decode` | documents → typed objects | yaml, diagnostic, kinds |
//! | `translate` | objects → mesh, and the pods of this node | diagnostic, kinds |
//! | `file` | a mesh file or a directory of them, read and translated | decode, diagnostic, translate |
//! | `local` | a mesh as `config_dump` shows it | decode, diagnostic, file, yaml |
//!
//! Nothing here waits or watches: whoever has objects calls. Only `file` and `local` know of files; any other source of
//! the same objects can feed [`translate`](mod@translate).
//!
//! # What a mesh file may hold
//!
//! * `v1` Namespace: label `istio.io/dataplane-mode: ambient` enrols its pods.
//! * `v1` Pod: labels (its own `istio.io/dataplane-mode`, `ambient` or `none`, wins over its namespace's),
//!   `spec.nodeName`, `spec.serviceAccountName`, container ports, `status`. Two annotations are ours:
//!   `ztunnel.io/netns`, the network namespace to capture, as an absolute path or as a name under `/run/netns`;
//!   and `ztunnel.io/ips`, addresses separated by commas, for a pod whose `status` has none. An enrolled pod is
//!   captured by the node that `spec.nodeName` names; without that, by each node that reads the annotation
//!   `ztunnel.io/netns`.
//! * `v1` Service with a selector.
//! * `security.istio.io/v1` (or `v1beta1`) PeerAuthentication and AuthorizationPolicy.
//! * `v1` ConfigMap `istio` of namespace `istio-system`: `trustDomain` and `rootNamespace` of its `data.mesh`.
//! * Lists of these, as `kubectl get -o yaml` prints them. Other kinds are named and skipped.

pub mod decode;
pub mod diagnostic;
pub mod file;
pub mod kinds;
pub mod local;
pub mod translate;
pub mod yaml;
