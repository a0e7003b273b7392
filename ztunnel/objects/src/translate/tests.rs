//! Objects as YAML, and what they mean.

use std::sync::Arc;

use proptest::prelude::*;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;

use super::*;
use crate::decode::Collector;

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
        ..Workload::sample("shop", "cart")
    };
    assert_eq!(**cart, expected);
    let [local] = &translation.pods[..] else { panic!("{:?}", translation.pods) };
    assert_eq!(local.uid.to_string(), "shop/cart");
    assert_eq!(local.workload, cart.uid);
    assert_eq!(local.netns.to_str(), Some("/run/netns/cart"));
    assert_eq!(local.addresses, cart.addresses);
}

#[test]
fn enrolment_follows_the_labels_of_pod_and_namespace() {
    let table = [
        // namespace label, pod label, rest of the pod, enrolled
        ("ambient", "", "", true),
        ("ambient", "istio.io/dataplane-mode: none", "", false),
        ("none", "istio.io/dataplane-mode: ambient", "", true),
        ("none", "", "", false),
        ("ambient", "", "spec: {hostNetwork: true}", false),
    ];
    for (namespace, label, rest, enrolled) in table {
        let translation = good(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, labels: {{istio.io/dataplane-mode: {namespace}}}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: a, namespace: shop, uid: u-1, annotations: {{ztunnel.io/netns: /proc/7/ns/net, ztunnel.io/ips: \"10.0.0.1, fd00::1\"}}, labels: {{{label}}}}}
{rest}
"
        ));
        let a = workload(&translation, "shop/a");
        assert_eq!(a.reach == Reach::Hbone, enrolled, "{namespace} {label} {rest}");
        assert_eq!(a.addresses.len(), 2);
        assert_eq!(translation.mesh.workload_at("", a.addresses[0]).is_some(), !a.host_network);
        let local: Vec<_> =
            translation.pods.iter().map(|pod| (pod.uid.to_string(), pod.netns.clone())).collect();
        let expected = enrolled.then(|| ("u-1".to_owned(), "/proc/7/ns/net".into()));
        assert_eq!(local, Vec::from_iter(expected), "{namespace} {label} {rest}");
    }
}

#[test]
fn the_agents_other_rules_keep_pods_out() {
    for (namespace, metadata) in [
        ("shop", "annotations: {sidecar.istio.io/status: '{}'}, labels: {istio.io/dataplane-mode: ambient}"),
        ("kube-system", "labels: {istio.io/dataplane-mode: ambient}"),
        ("istio-system", "labels: {istio.io/dataplane-mode: ambient, app: ztunnel}"),
    ] {
        let translation = good(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, namespace: {namespace}, {metadata}}}, status: {{podIP: 10.0.0.1}}}}"
        ));
        assert_eq!(workload(&translation, &format!("{namespace}/a")).reach, Reach::Plain, "{namespace}");
    }
}

#[test]
fn a_pod_of_another_node_is_a_workload_but_not_captured() {
    let text = (SHOP.to_owned() + &pod("a", "10.0.0.1")).replace("nodeName: n1", "nodeName: n2");
    let translation = good(&text);
    assert_eq!(workload(&translation, "shop/a").reach, Reach::Hbone);
    assert!(translation.pods.is_empty());
}

#[test]
fn telemetry_names_come_from_owners_and_labels() {
    let table = [
        ("", "", WorkloadKind::Pod, "a-1", "a-1", "latest"),
        ("ReplicaSet shop-7d4", "pod-template-hash: 7d4", WorkloadKind::Deployment, "shop", "shop", "latest"),
        ("ReplicaSet shop-7d4", "", WorkloadKind::Pod, "shop-7d4", "shop-7d4", "latest"),
        ("StatefulSet db", "app: store, version: v2", WorkloadKind::Pod, "db", "store", "v2"),
        ("Job once", "", WorkloadKind::Job, "once", "once", "latest"),
        ("Job nightly-28912345", "", WorkloadKind::CronJob, "nightly", "nightly", "latest"),
        (
            "",
            "app: x, app.kubernetes.io/name: y, service.istio.io/canonical-name: z, version: '1', service.istio.io/canonical-revision: '3'",
            WorkloadKind::Pod,
            "a-1",
            "z",
            "3",
        ),
    ];
    for (owner, labels, kind, name, canonical, revision) in table {
        let owner = owner.split_once(' ').map_or(String::new(), |(kind, name)| {
            format!("{{apiVersion: x/v1, kind: {kind}, name: {name}, uid: u, controller: true}}")
        });
        let translation = translated(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a-1, labels: {{{labels}}}, ownerReferences: [{owner}]}}}}"
        ));
        let workload = workload(&translation, "default/a-1");
        assert_eq!(
            (
                workload.kind,
                &*workload.workload_name,
                &*workload.canonical_name,
                &*workload.canonical_revision
            ),
            (kind, name, canonical, revision),
            "{owner} {labels}"
        );
    }
}

#[test]
fn pods_that_ended_are_left_out_and_those_not_ready_are_unhealthy() {
    let pod = |name: &str, metadata: &str, status: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{istio.io/dataplane-mode: none}}, {metadata}}}, status: {{{status}}}}}\n---\n"
        )
    };
    let translation = good(
        &[
            pod("done", "", "phase: Succeeded, podIP: 10.0.0.1"),
            pod("new", "", "phase: Running, podIP: 10.0.0.1"),
            pod("unready", "", "conditions: [{type: Ready, status: 'False'}]"),
            pod("ready", "", "conditions: [{type: Ready, status: 'True'}]"),
            pod("going", "deletionTimestamp: 2026-01-01T00:00:00Z", "phase: Running"),
        ]
        .concat(),
    );
    let mut healthy: Vec<(&str, bool)> =
        translation.mesh.workloads().map(|workload| (&*workload.name, workload.healthy)).collect();
    healthy.sort_unstable();
    assert_eq!(healthy, [("going", false), ("new", true), ("ready", true), ("unready", false)]);
}

#[test]
fn the_trust_domain_and_root_namespace_come_from_the_mesh_config() {
    let config = "apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    defaultConfig: {}
    trustDomain: td.example
    rootNamespace: mesh-root
";
    let translation = good(&format!(
        "{SHOP}{}{config}---
{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: d, namespace: mesh-root}}, spec: {{mtls: {{mode: STRICT}}}}}}",
        pod("a", "10.0.0.1")
    ));
    assert_eq!(translation.mesh.trust_domain().as_str(), "td.example");
    assert_eq!(workload(&translation, "shop/a").identity.as_str(), "spiffe://td.example/ns/shop/sa/a");
    assert_eq!(listed(&translation, "shop/a"), ["mesh-root/istio_converted_static_strict"]);
    check_said(
        &config.replace("td.example", "t/d"),
        &["7: error: \"t/d\" is not a trust domain: use letters, digits, '.', '-' and '_'"],
    );
}

#[test]
fn what_is_wrong_with_pods_is_said() {
    let two = SHOP.to_owned() + &pod("a", "10.0.0.1") + &pod("b", "10.0.0.1");
    check_said(
        &two,
        &[
            "25: error: pod shop/b has the address 10.0.0.1 of pod shop/a (m.yaml:7) (give one of them another address, or remove the one that is gone)",
        ],
    );
    check_said(
        &two.replace("10.0.0.1}]}\n---\napi", "10.0.0.2}]}\n---\napi").replace("netns: b", "netns: a"),
        &["23: error: pod shop/b has the network namespace of pod shop/a (m.yaml:7)"],
    );
    check_said(
        &two.replace("10.0.0.1}]}\n---\napi", "10.0.0.2}]}\n---\napi").replace("name: ", "uid: u\n  name: "),
        &["22: error: pod shop/b has the uid of pod shop/a (m.yaml:8)"],
    );
    let one = SHOP.to_owned() + &pod("a", "10.0.0.1");
    for (from, to, expected) in [
        (
            "annotations: {ztunnel.io/netns: a}",
            "annotations: {ztunnel.io/netn: a}",
            &[
                "9: warning: pod shop/a is enrolled and on this node, but its network namespace is not known: it is not captured (add the annotation ztunnel.io/netns: <path, or name under /run/netns>, or the label istio.io/dataplane-mode: none)",
                "13: warning: annotation ztunnel.io/netn is not known (write ztunnel.io/netns instead)",
            ][..],
        ),
        (
            "netns: a}",
            "netns: ../a}",
            &[
                "13: error: \"../a\" does not name a network namespace (write an absolute path, or a name under /run/netns)",
            ],
        ),
        (
            "ip: 10.0.0.1",
            "ip: 10.0.0.1/32",
            &[
                "15: error: \"10.0.0.1/32\" is not the address of a pod (write an IPv4 or IPv6 address without a prefix length)",
            ],
        ),
        (
            "status: {podIPs: [{ip: 10.0.0.1}]}",
            "",
            &[
                "9: warning: pod shop/a has no address yet: it is not captured (write status.podIPs, or the annotation ztunnel.io/ips: <addresses separated by commas>)",
            ],
        ),
        (
            "  annotations: {ztunnel.io/netns: a}\nspec: {nodeName: n1, ",
            "spec: {",
            &[
                "13: warning: pod shop/a is enrolled, but on no node: nobody captures it (write spec.nodeName, or the annotation ztunnel.io/netns if it is on this node)",
            ],
        ),
        (
            "mode: ambient",
            "mode: Ambient",
            &["5: warning: label istio.io/dataplane-mode has no value \"Ambient\" (write ambient instead)"],
        ),
        (
            "namespace: shop",
            "namespace: shopp",
            &[
                "11: warning: namespace shopp is not in the mesh file, so pods without a label istio.io/dataplane-mode of their own are not enrolled (add a Namespace shopp with its labels)",
            ],
        ),
        (
            "serviceAccountName: a",
            "serviceAccountName: a/b",
            &["14: error: \"a/b\" is not a namespace or service account name"],
        ),
    ] {
        assert!(one.contains(from), "{from}");
        check_said(&one.replace(from, to), expected);
    }
}

proptest! {
    /// A good text with a piece of it replaced: it may be refused, but it is always the same, and never a panic.
    #[test]
    fn no_slip_of_the_pen_panics(at in any::<proptest::sample::Index>(), length in 0_usize..20, piece in "[-a-z0-9*/.:{}\\[\\]\n ]{0,8}") {
        let mut text = SHOP.to_owned() + &pod("a", "10.0.0.1") + &pod("b", "10.0.0.2") + SLIPPERY;
        let from = at.index(text.len());
        text.replace_range(from..(from + length).min(text.len()), &piece);
        let (first, second) = (translated(&text), translated(&text));
        prop_assert_eq!(said(&first), said(&second));
        prop_assert_eq!(first.pods, second.pods);
    }
}

/// Everything else there is, in ASCII.
const SLIPPERY: &str = "apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {clusterIPs: [10.96.0.1, 'fd00::9'], selector: {app: a}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: a, namespace: shop}
spec: {selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: ['*'], ipBlocks: [10.0.0.0/8, '::ffff:10.0.0.0/104'], serviceAccounts: [a/b]}}]
    to: [{operation: {ports: ['80'], methods: [GET]}}]
    when: [{key: source.ip, values: [10.0.0.1], notValues: [10.0.0.2]}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: td.example
";
