//! Objects as YAML, and what they mean.

use std::sync::Arc;

use super::*;
use crate::model::identity::SpiffeId;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::model::workload::WorkloadKind;
use crate::standalone::decode::Collector;

mod authorization;
mod peers;
mod services;

/// Translates `text` for node `n1`.
fn translated(text: &str) -> Translation {
    let mut collector = Collector::default();
    collector.add(&Arc::from("m.yaml"), text);
    let (objects, mut diagnostics) = collector.finish();
    let mut translation = translate(&objects, &Options { node: "n1".to_owned() });
    diagnostics.append(&mut translation.diagnostics);
    diagnostics.sort_by_key(|diagnostic| diagnostic.line);
    Translation { diagnostics, ..translation }
}

/// What is said about `text`, without the name of the file.
fn said(translation: &Translation) -> Vec<String> {
    let texts = translation.diagnostics.iter().map(ToString::to_string);
    texts.map(|text| text.strip_prefix("m.yaml:").unwrap_or(&text).to_owned()).collect()
}

/// Translates what nothing is to be said about.
fn good(text: &str) -> Translation {
    let translation = translated(text);
    assert_eq!(said(&translation), Vec::<String>::new());
    translation
}

fn check_said(text: &str, expected: &[&str]) {
    assert_eq!(said(&translated(text)), expected, "{text}");
}

fn workload<'t>(translation: &'t Translation, name: &str) -> &'t Arc<Workload> {
    let uid = format!("Kubernetes//Pod/{name}");
    translation.mesh.workload(&uid).unwrap_or_else(|| panic!("no {uid}"))
}

/// The keys of the policies that a workload lists.
fn listed(translation: &Translation, name: &str) -> Vec<String> {
    workload(translation, name).policies.iter().map(ToString::to_string).collect()
}

/// Namespace `shop`, enrolled; lines 1 to 6.
const SHOP: &str = "apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {istio.io/dataplane-mode: ambient}
---
";

/// A pod of namespace `shop` with label `app: <name>`, captured here; 10 lines.
fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: shop
  labels: {{app: {name}}}
  annotations: {{ztunnel.io/netns: {name}}}
spec: {{nodeName: n1, serviceAccountName: {name}}}
status: {{podIPs: [{{ip: {ip}}}]}}
---
"
    )
}

#[test]
fn a_captured_pod_is_a_workload_with_an_identity() {
    let translation = good(&(SHOP.to_owned() + &pod("cart", "10.0.0.1")));
    let cart = workload(&translation, "shop/cart");
    let expected = Workload {
        uid: Arc::from("Kubernetes//Pod/shop/cart"),
        name: Arc::from("cart"),
        namespace: Arc::from("shop"),
        identity: "spiffe://cluster.local/ns/shop/sa/cart".parse::<SpiffeId>().unwrap(),
        node: Arc::from("n1"),
        cluster: Arc::from("Kubernetes"),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        workload_name: Arc::from("cart"),
        kind: WorkloadKind::Pod,
        canonical_name: Arc::from("cart"),
        canonical_revision: Arc::from("latest"),
        region: Arc::from(""),
        zone: Arc::from(""),
        reach: Reach::Hbone,
        healthy: true,
        host_network: false,
        policies: Vec::new(),
    };
    assert_eq!(**cart, expected);
    let [local] = &translation.pods[..] else { panic!("{:?}", translation.pods) };
    assert_eq!(local.uid.to_string(), "shop/cart");
    assert_eq!(local.workload, cart.uid);
    assert_eq!(local.netns.to_str(), Some("/run/netns/cart"));
    assert_eq!(local.addresses, cart.addresses);
}
