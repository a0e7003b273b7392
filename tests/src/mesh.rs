//! Writes the mesh directory: the Kubernetes and Istio objects the embedded control plane reads.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::topology::Pod;

/// The namespace of the enrolled pods.
pub const MESHED: &str = "demo";
/// The namespace of pods that know nothing of the mesh.
pub const PLAIN: &str = "plain";
/// Where a policy holds for the whole mesh.
pub const ROOT: &str = "istio-system";

/// Whether a pod is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrolment {
    /// As its namespace says.
    Inherit,
    /// Opted out by its own label.
    None,
}

/// The directory with one file per object. A change of a file is atomic: a reader sees the old or the new.
#[derive(Debug, Clone)]
pub struct MeshFiles {
    directory: PathBuf,
    staging: PathBuf,
}

impl MeshFiles {
    /// Makes the directory, with the namespaces in it.
    pub fn create(directory: PathBuf, staging: PathBuf) -> Result<Self> {
        for path in [&directory, &staging] {
            fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let files = Self { directory, staging };
        files.write("namespace-demo", &namespace(MESHED, true))?;
        files.write("namespace-plain", &namespace(PLAIN, false))?;
        files.write("namespace-istio-system", &namespace(ROOT, false))?;
        Ok(files)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Writes or replaces one file.
    pub fn write(&self, name: &str, yaml: &str) -> Result<()> {
        let (staged, path) = (self.staging.join(name), self.directory.join(format!("{name}.yaml")));
        fs::write(&staged, yaml).with_context(|| format!("cannot write {}", staged.display()))?;
        fs::rename(&staged, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes one file; it need not be there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.directory.join(format!("{name}.yaml"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Removes every file whose name starts so.
    pub fn remove_all(&self, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(&self.directory)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Writes a pod; its service account is called as it is.
    pub fn pod(&self, namespace: &str, pod: &Pod, enrolment: Enrolment) -> Result<()> {
        self.write(&format!("pod-{}", pod.name), &pod_yaml(namespace, pod, &pod.name, enrolment))
    }

    /// Writes a service with one cluster IP of each family, port 80 to port 8080 of the pods `app: <name>`.
    pub fn service(&self, name: &str, v4: &str, v6: &str) -> Result<()> {
        self.write(&format!("service-{name}"), &service_yaml(name, v4, v6))
    }

    /// Sets the mutual TLS mode of the demo's namespace: `STRICT` or `PERMISSIVE`.
    pub fn peer_authentication(&self, mode: &str) -> Result<()> {
        self.write("policy-peer-authentication", &peer_authentication_yaml(mode))
    }

    /// Denies what comes from one service account to the pods `app: <app>`.
    pub fn deny(&self, name: &str, app: &str, service_account: &str) -> Result<()> {
        self.write(&format!("policy-{name}"), &authorization_yaml(name, "DENY", app, service_account))
    }

    /// Allows nothing but what comes from one service account to the pods `app: <app>`.
    pub fn allow_only(&self, name: &str, app: &str, service_account: &str) -> Result<()> {
        self.write(&format!("policy-{name}"), &authorization_yaml(name, "ALLOW", app, service_account))
    }

    /// Removes every policy.
    pub fn no_policies(&self) -> Result<()> {
        self.remove_all("policy-")
    }
}

fn namespace(name: &str, ambient: bool) -> String {
    let labels = if ambient { "  labels:\n    istio.io/dataplane-mode: ambient\n" } else { "" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n{labels}")
}

fn pod_yaml(namespace: &str, pod: &Pod, service_account: &str, enrolment: Enrolment) -> String {
    let Pod { name, node, place, v4, v6 } = pod;
    let netns = place.netns.name();
    let opt_out = match enrolment {
        Enrolment::Inherit => "",
        Enrolment::None => "    istio.io/dataplane-mode: none\n",
    };
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata:
  name: {service_account}
  namespace: {namespace}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  uid: {name}-1
  labels:
    app: {name}
{opt_out}  annotations:
    ztunnel.io/netns: {netns}
spec:
  nodeName: {node}
  serviceAccountName: {service_account}
  containers:
  - name: app
    image: none
status:
  phase: Running
  podIP: {v4}
  podIPs:
  - ip: {v4}
  - ip: {v6}
  conditions:
  - type: Ready
    status: \"True\"
"
    )
}

fn service_yaml(name: &str, v4: &str, v6: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {MESHED}
spec:
  type: ClusterIP
  clusterIP: {v4}
  clusterIPs:
  - {v4}
  - {v6}
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector:
    app: {name}
  ports:
  - name: http
    protocol: TCP
    port: 80
    targetPort: 8080
"
    )
}

fn peer_authentication_yaml(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: {MESHED}
spec:
  mtls:
    mode: {mode}
"
    )
}

fn authorization_yaml(name: &str, action: &str, app: &str, service_account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: {name}
  namespace: {MESHED}
spec:
  selector:
    matchLabels:
      app: {app}
  action: {action}
  rules:
  - from:
    - source:
        principals:
        - cluster.local/ns/{MESHED}/sa/{service_account}
"
    )
}
