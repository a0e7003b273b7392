//! PeerAuthentication, judged by who gets through.

use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::StringMatch;

use super::*;

/// One PeerAuthentication in flow YAML, on a line of its own.
fn peer(place: &str, spec: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap();
    format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{namespace: {namespace}, name: {name}}}, spec: {{{spec}}}}}\n---\n"
    )
}

/// Whether a deny policy of this shape refuses, by the definition of policies: any rule, all clauses, any match,
/// all fields.
fn refuses(policy: &Policy, with_identity: bool, port: u16) -> bool {
    assert_eq!(policy.action, Action::Deny);
    let field = |positive: &[u16], negative: &[u16]| {
        (positive.is_empty() || positive.contains(&port)) && !negative.contains(&port)
    };
    let matches = |one: &Match| {
        let only = Match {
            not_principals: one.not_principals.clone(),
            destination_ports: one.destination_ports.clone(),
            not_destination_ports: one.not_destination_ports.clone(),
            ..Match::default()
        };
        assert_eq!(*one, only, "a field this evaluation does not know");
        let refused = one.not_principals.iter().any(|principal| {
            assert_eq!(*principal, StringMatch::Presence);
            with_identity
        });
        *one != Match::default() && !refused && field(&one.destination_ports, &one.not_destination_ports)
    };
    let clause = |clause: &Clause| clause.matches.is_empty() || clause.matches.iter().any(matches);
    policy.rules.iter().any(|rule: &Rule| rule.clauses.iter().all(clause))
}

/// Which of the ports 80 and 90 of pod `shop/a` take plain connections. Those with an identity always pass.
fn plain(translation: &Translation) -> [bool; 2] {
    let a = workload(translation, "shop/a");
    let policies: Vec<_> = translation.mesh.policies_of(a).known().collect();
    assert_eq!(translation.mesh.policies_of(a).missing(), None);
    for port in [80, 90] {
        assert!(!policies.iter().any(|policy| refuses(policy, true, port)), "mutual TLS refused at {port}");
    }
    [80, 90].map(|port| !policies.iter().any(|policy| refuses(policy, false, port)))
}

#[test]
fn the_most_specific_setting_decides_who_gets_through() {
    const MESH: &str = "istio-system/mesh";
    const NS: &str = "shop/ns";
    const A: &str = "shop/a";
    let strict = "mtls: {mode: STRICT}";
    let permissive = "mtls: {mode: PERMISSIVE}";
    let unset = "mtls: {mode: UNSET}";
    let select = |rest: &str| format!("selector: {{matchLabels: {{app: a}}}}, {rest}");
    let ports =
        |mode: &str, ports: &str| select(&format!("mtls: {{mode: {mode}}}, portLevelMtls: {{{ports}}}"));
    let strict_80 = "80: {mode: STRICT}";
    let permissive_80 = "80: {mode: PERMISSIVE}";
    let table = [
        ("nothing", Vec::<(&str, String)>::new(), [true, true]),
        ("mesh strict", vec![(MESH, strict.into())], [false, false]),
        (
            "mesh strict, namespace permissive",
            vec![(MESH, strict.into()), (NS, permissive.into())],
            [true, true],
        ),
        ("mesh strict, namespace unset", vec![(MESH, strict.into()), (NS, unset.into())], [false, false]),
        (
            "mesh strict, namespace says nothing",
            vec![(MESH, strict.into()), (NS, String::new())],
            [false, false],
        ),
        ("namespace strict", vec![(NS, strict.into())], [false, false]),
        ("other namespace strict", vec![("other/ns", strict.into())], [true, true]),
        ("workload strict", vec![(A, select(strict))], [false, false]),
        (
            "namespace strict, workload permissive",
            vec![(NS, strict.into()), (A, select(permissive))],
            [true, true],
        ),
        ("namespace strict, workload unset", vec![(NS, strict.into()), (A, select(unset))], [false, false]),
        ("strict but one port", vec![(A, ports("STRICT", permissive_80))], [true, false]),
        ("permissive but one port", vec![(A, ports("PERMISSIVE", strict_80))], [false, true]),
        ("strict and one port strict", vec![(A, ports("STRICT", strict_80))], [false, false]),
        ("permissive and one port permissive", vec![(A, ports("PERMISSIVE", permissive_80))], [true, true]),
        ("port unset inherits strict", vec![(A, ports("STRICT", "80: {mode: UNSET}"))], [false, false]),
        (
            "both ports",
            vec![(A, ports("STRICT", "80: {mode: PERMISSIVE}, 90: {mode: PERMISSIVE}"))],
            [true, true],
        ),
        (
            "both ports strict",
            vec![(A, ports("PERMISSIVE", "80: {mode: STRICT}, 90: {mode: STRICT}"))],
            [false, false],
        ),
        (
            "inherited strict but one port",
            vec![(NS, strict.into()), (A, ports("UNSET", permissive_80))],
            [true, false],
        ),
        (
            "inherited permissive but one port",
            vec![(MESH, permissive.into()), (A, ports("UNSET", strict_80))],
            [false, true],
        ),
        ("port by text", vec![(A, ports("STRICT", "'80': {mode: PERMISSIVE}"))], [true, false]),
    ];
    for (name, peers, expected) in table {
        let peers: String = peers.iter().map(|(place, spec)| peer(place, spec)).collect();
        let translation = good(&(SHOP.to_owned() + &pod("a", "10.0.0.1") + &peers));
        assert_eq!(plain(&translation), expected, "{name}");
    }
}

#[test]
fn policies_are_named_as_istiod_names_them() {
    let strict = peer("istio-system/mesh", "mtls: {mode: STRICT}");
    let own = peer(
        "shop/own",
        "selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}",
    );
    let text = [SHOP, &pod("a", "10.0.0.1"), &pod("b", "10.0.0.2"), &strict, &own].concat();
    let translation = good(&text);
    assert_eq!(listed(&translation, "shop/a"), ["shop/converted_peer_authentication_own"]);
    assert_eq!(listed(&translation, "shop/b"), ["istio-system/istio_converted_static_strict"]);
}

#[test]
fn workloads_outside_the_mesh_are_left_alone() {
    let text = (SHOP.to_owned() + &pod("a", "10.0.0.1") + &peer("shop/ns", "mtls: {mode: STRICT}"))
        .replace("mode: ambient", "mode: none");
    let translation = good(&text);
    assert_eq!(listed(&translation, "shop/a"), Vec::<String>::new());
    assert_eq!(translation.mesh.policies().count(), 0);
}

#[test]
fn of_two_settings_the_older_or_first_one_counts() {
    let old = peer("shop/z", "mtls: {mode: STRICT}")
        .replace("name: z", "name: z, creationTimestamp: 2025-01-01T00:00:00Z");
    let new = peer("shop/y", "mtls: {mode: PERMISSIVE}")
        .replace("name: y", "name: y, creationTimestamp: 2026-01-01T00:00:00Z");
    let untimed = peer("shop/x", "mtls: {mode: PERMISSIVE}");
    let translation = translated(&[SHOP, &pod("a", "10.0.0.1"), &untimed, &new, &old].concat());
    assert_eq!(plain(&translation), [false, false]);
    assert_eq!(
        said(&translation),
        [
            "17: warning: PeerAuthentication shop/x is for workloads that shop/z (m.yaml:21) is for as well: the older or first one counts (make one of the two)",
            "19: warning: PeerAuthentication shop/y is for workloads that shop/z (m.yaml:21) is for as well: the older or first one counts (make one of the two)",
        ]
    );
}

#[test]
fn what_is_not_understood_is_said_and_strict() {
    for (spec, strict, expected) in [
        (
            "mtls: {mode: STRIKT}",
            true,
            "17: error: \"STRIKT\" is not a mode of mutual TLS (write STRICT instead)",
        ),
        (
            "mtls: {mode: DISABLE}",
            false,
            "17: warning: DISABLE is taken as PERMISSIVE: an enrolled workload always takes mutual TLS (write PERMISSIVE instead)",
        ),
        (
            "portLevelMtls: {80: {mode: PERMISSIVE}}",
            true,
            "17: error: portLevelMtls needs a selector (write spec.selector.matchLabels with the labels of the workloads)",
        ),
        (
            "selector: {matchLabels: {app: a}}, portLevelMtls: {web: {mode: PERMISSIVE}}",
            true,
            "17: error: \"web\" is not a port (write a number from 1 to 65535)",
        ),
        (
            "selector: {matchLabels: {app: kart}}, mtls: {mode: STRICT}",
            false,
            "17: warning: the selector matches no pod of namespace shop (write labels that its pods have)",
        ),
        ("mtls: {mod: STRICT}", false, "17: error: mod is not a field of MutualTls (write mode instead)"),
    ] {
        let translation = translated(&[SHOP, &pod("a", "10.0.0.1"), &peer("shop/p", spec)].concat());
        assert_eq!(said(&translation), [expected]);
        assert_eq!(plain(&translation), [!strict; 2], "{spec}");
    }
    check_said(
        &(SHOP.to_owned()
            + &pod("a", "10.0.0.1")
            + &peer("istio-system/p", "selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}")),
        &[
            "17: warning: the selector matches no pod of namespace istio-system (write labels that its pods have)",
        ],
    );
}

#[test]
fn in_the_root_namespace_a_selector_is_for_the_workloads_of_that_namespace() {
    let gate = (SHOP.to_owned() + &pod("gate", "10.0.0.2")).replace("shop", "istio-system");
    let strict = "mtls: {mode: STRICT}";
    let selected = format!("selector: {{matchLabels: {{app: gate}}}}, {strict}");
    let other = format!("selector: {{matchLabels: {{app: a}}}}, {strict}");
    for (peers, gate_lists, shop_lists) in [
        (peer("istio-system/p", &selected), vec!["istio-system/istio_converted_static_strict"], vec![]),
        (
            peer("istio-system/p", &selected.replace("STRICT", "PERMISSIVE"))
                + &peer("istio-system/mesh", strict),
            vec![],
            vec!["istio-system/istio_converted_static_strict"],
        ),
        (peer("istio-system/p", &other), vec![], vec![]),
    ] {
        let translation = translated(&[SHOP, &pod("a", "10.0.0.1"), &gate, &peers].concat());
        assert_eq!(listed(&translation, "istio-system/gate"), gate_lists, "{peers}");
        assert_eq!(listed(&translation, "shop/a"), shop_lists, "{peers}");
    }
}
