//! AuthorizationPolicy.

use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;

use super::*;

/// A policy of namespace `shop`; `spec` is block YAML whose first line is line 20 of the text.
fn text(spec: &str) -> String {
    let spec = spec.replace('\n', "\n  ");
    SHOP.to_owned()
        + &pod("a", "10.0.0.1")
        + &format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n  {spec}\n"
        )
}

fn policy(translation: &Translation) -> Arc<Policy> {
    let mut policies = translation.mesh.policies();
    let policy = Arc::clone(policies.next().expect("a policy"));
    assert_eq!(policies.count(), 0);
    policy
}

fn rules(spec: &str) -> Vec<Rule> {
    policy(&good(&text(spec))).rules.clone()
}

fn rule(clauses: impl IntoIterator<Item = Vec<Match>>) -> Rule {
    Rule { clauses: clauses.into_iter().map(|matches| Clause { matches }).collect() }
}

fn denies_everything(policy: &Policy) -> bool {
    policy.action == Action::Deny && policy.rules == [Rule::default()]
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(Arc::from(text))
}

#[test]
fn a_policy_is_for_a_selection_a_namespace_or_the_mesh() {
    for (namespace, selector, scope, selects) in [
        ("shop", "selector: {matchLabels: {app: a}}", Scope::WorkloadSelector, vec!["p"]),
        ("shop", "action: ALLOW", Scope::Namespace, vec![]),
        ("shop", "selector: {}", Scope::Namespace, vec![]),
        ("istio-system", "action: ALLOW", Scope::Global, vec![]),
        ("istio-system", "selector: {matchLabels: {app: a}}", Scope::WorkloadSelector, vec!["p"]),
    ] {
        let text =
            text(selector).replace("name: p, namespace: shop", &format!("name: p, namespace: {namespace}"));
        let translation = good(&text);
        let key = PolicyKey { namespace: Arc::from(namespace), name: Arc::from("p") };
        let expected = Policy { key, scope, action: Action::Allow, dry_run: false, rules: vec![] };
        assert_eq!(*policy(&translation), expected);
        let selects: Vec<String> = selects.iter().map(|name| format!("{namespace}/{name}")).collect();
        assert_eq!(listed(&translation, "shop/a"), selects, "{namespace} {selector}");
    }
}

#[test]
fn every_field_of_layer_4_is_read() {
    let spec = "action: DENY
rules:
- from:
  - source:
      principals: ['*', cluster.local/ns/a/sa/b, 'td/*', '*/sa/b']
      notPrincipals: [cluster.local/ns/a/sa/x]
      namespaces: [n]
      notNamespaces: [m*]
  - source:
      ipBlocks: [10.0.0.0/8, 'fd00::1', '10.1.2.3/16', '::ffff:10.2.0.0/112']
      notIpBlocks: [10.9.9.9]
  - source:
      serviceAccounts: [shop/b, c]
      notServiceAccounts: [d]
  to:
  - operation:
      ports: ['80']
      notPorts: ['81']
  - operation:
      ports: ['443']
  when:
  - key: source.ip
    values: [1.2.3.4]
    notValues: [5.6.7.8]
  - key: source.namespace
    values: [n]
  - key: source.principal
    notValues: ['*']
  - key: source.serviceAccount
    values: [e]
  - key: destination.ip
    values: [10.0.0.1]
  - key: destination.port
    notValues: ['22']
- {}";
    let any = Match::default;
    let account = |name: &str| ServiceAccountMatch { namespace: Arc::from("shop"), name: Arc::from(name) };
    let net = |text: &str| text.parse().unwrap();
    let expected = rule([
        vec![
            Match {
                principals: vec![
                    StringMatch::Presence,
                    exact("cluster.local/ns/a/sa/b"),
                    StringMatch::Prefix(Arc::from("td/")),
                    StringMatch::Suffix(Arc::from("/sa/b")),
                ],
                not_principals: vec![exact("cluster.local/ns/a/sa/x")],
                namespaces: vec![exact("n")],
                not_namespaces: vec![StringMatch::Prefix(Arc::from("m"))],
                ..any()
            },
            Match {
                source_ips: vec![
                    net("10.0.0.0/8"),
                    net("fd00::1/128"),
                    net("10.1.0.0/16"),
                    net("10.2.0.0/16"),
                ],
                not_source_ips: vec![net("10.9.9.9/32")],
                ..any()
            },
            Match {
                service_accounts: vec![account("b"), account("c")],
                not_service_accounts: vec![account("d")],
                ..any()
            },
        ],
        vec![
            Match { destination_ports: vec![80], not_destination_ports: vec![81], ..any() },
            Match { destination_ports: vec![443], ..any() },
        ],
        vec![Match { source_ips: vec![net("1.2.3.4/32")], not_source_ips: vec![net("5.6.7.8/32")], ..any() }],
        vec![Match { namespaces: vec![exact("n")], ..any() }],
        vec![Match { not_principals: vec![StringMatch::Presence], ..any() }],
        vec![Match { service_accounts: vec![account("e")], ..any() }],
        vec![Match { destination_ips: vec![net("10.0.0.1/32")], ..any() }],
        vec![Match { not_destination_ports: vec![22], ..any() }],
    ]);
    assert_eq!(rules(spec), [expected, Rule::default()]);
}

#[test]
fn what_needs_layer_7_errs_on_the_safe_side() {
    let principal = Match { principals: vec![exact("cluster.local/ns/a/sa/x")], ..Match::default() };
    let port = Match { destination_ports: vec![80], ..Match::default() };
    // rule, what it is as ALLOW, what it is as DENY, the line and fields that are said
    let table = [
        ("to: [{operation: {methods: [GET]}}]", vec![], vec![rule([])], "methods"),
        (
            "{from: [{source: {principals: [cluster.local/ns/a/sa/x], requestPrincipals: ['*']}}]}",
            vec![],
            vec![rule([vec![principal.clone()]])],
            "requestPrincipals",
        ),
        (
            "{from: [{source: {principals: [cluster.local/ns/a/sa/x]}}], to: [{operation: {ports: ['80'], paths: [/a]}}]}",
            vec![],
            vec![rule([vec![principal.clone()], vec![port]])],
            "paths",
        ),
        // One entry that is anything at layer 4 makes the whole list anything.
        (
            "{from: [{source: {principals: [cluster.local/ns/a/sa/x]}}, {source: {remoteIpBlocks: [10.0.0.1]}}]}",
            vec![],
            vec![rule([])],
            "remoteIpBlocks",
        ),
        (
            "{from: [{source: {principals: [cluster.local/ns/a/sa/x]}}], when: [{key: 'request.headers[a]', values: [b]}]}",
            vec![],
            vec![rule([vec![principal.clone()]])],
            "request.headers[a]",
        ),
        ("when: [{key: connection.sni, values: [b]}]", vec![], vec![rule([])], "connection.sni"),
    ];
    for (written, allow, deny, field) in table {
        for (action, expected, consequence) in [
            ("ALLOW", allow, "the rule allows nothing"),
            ("DENY", deny, "they are left out, so the rule denies more"),
        ] {
            let translation = translated(&text(&format!("action: {action}\nrules:\n- {written}")));
            assert_eq!(policy(&translation).rules, expected, "{action} {written}");
            let hint = "attach the policy to a waypoint, or remove the rule";
            assert_eq!(
                said(&translation),
                [format!("23: warning: rule 0 needs layer 7 ({field}): {consequence} ({hint})")]
            );
        }
    }
    let mixed = "rules:\n- {to: [{operation: {hosts: [a]}}]}\n- {from: [{source: {principals: [cluster.local/ns/a/sa/x]}}]}";
    assert_eq!(policy(&translated(&text(mixed))).rules, [rule([vec![principal]])], "other rules stay");
}

#[test]
fn some_policies_are_not_for_us() {
    for (spec, from, to, expected) in [
        (
            "action: AUDIT",
            "",
            "",
            "21: warning: AuthorizationPolicy shop/p is for auditing, which is not done here: not enforced",
        ),
        (
            "targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}]",
            "",
            "",
            "21: warning: AuthorizationPolicy shop/p is for what targetRefs names, a waypoint or gateway: not enforced here",
        ),
        (
            "action: DENY\nrules: [{}]",
            "name: p,",
            "name: p, annotations: {istio.io/dry-run: 'true'},",
            "19: warning: AuthorizationPolicy shop/p is a dry run: not enforced",
        ),
    ] {
        let translation = translated(&text(spec).replace(from, to));
        assert_eq!(said(&translation), [expected]);
        assert_eq!(translation.mesh.policies().count(), 0);
    }
}

#[test]
fn a_policy_that_is_not_understood_denies_everything() {
    let select = "selector: {matchLabels: {app: a}}\n";
    for (spec, expected) in [
        (
            "action: CUSTOM\nprovider: {name: x}",
            "22: warning: AuthorizationPolicy shop/p asks an external authorizer, which is not supported: it denies everything (write ALLOW or DENY with rules instead)",
        ),
        ("action: Deny", "22: error: \"Deny\" is not an action (write DENY instead)"),
        (
            "rules:\n- from:\n  - source: {ipBlocks: [10.0.0.0/33]}",
            "24: error: \"10.0.0.0/33\" is not a range of addresses (write an address, or one with a prefix length such as 10.0.0.0/8)",
        ),
        (
            "rules:\n- to:\n  - operation:\n      ports: ['http']",
            "25: error: \"http\" is not a port (write a number from 1 to 65535)",
        ),
        (
            "rules:\n- when:\n  - key: source.prinzipal\n    values: [a]",
            "24: error: \"source.prinzipal\" is not a condition (write source.principal instead)",
        ),
        (
            "rules:\n- when:\n  - key: source.ip",
            "24: error: this names nothing (write what is meant, or remove the list)",
        ),
        (
            "rules:\n- from:\n  - source: {}",
            "24: error: this names nothing (write what is meant, or remove the list)",
        ),
        ("rules:\n- from:\n  - {}", "24: error: this names no source (write source: with what is meant)"),
        ("rules:\n- when: []", "23: error: this list is empty (remove it to match anything)"),
        ("rules:\n- from: []", "23: error: this list is empty (remove it to match anything)"),
        (
            "rules:\n- from:\n  - source: {principals: []}",
            "24: error: this list is empty (remove it to match anything)",
        ),
        (
            "rules:\n- from:\n  - source:\n      principals:\n      - spiffe://td/ns/a/sa/b",
            "26: error: \"spiffe://td/ns/a/sa/b\" would match no principal (write td/ns/a/sa/b instead)",
        ),
        (
            "rules:\n- from:\n  - source: {principals: ['td/ns/*/sa/b']}",
            "24: error: \"td/ns/*/sa/b\" has a * that is neither first nor last, which matches only itself (write one * at the beginning or at the end)",
        ),
        (
            "rules:\n- from:\n  - source: {serviceAccounts: ['shop/*']}",
            "24: error: \"shop/*\" is not a service account (write <namespace>/<service account>, without *)",
        ),
    ] {
        let translation = translated(&text(&format!("{select}{spec}")));
        assert_eq!(said(&translation), [expected]);
        assert!(denies_everything(&policy(&translation)), "{spec}");
        assert_eq!(listed(&translation, "shop/a"), ["shop/p"]);
    }
}

#[test]
fn slips_of_the_pen_are_said() {
    check_said(
        &text("selector: {matchLabels: {app: b}}"),
        &[
            "21: warning: the selector of AuthorizationPolicy shop/p matches no pod (write labels that the pods of its namespace have)",
        ],
    );
    for (principal, expected) in [
        (
            "td/ns/a/sa/b",
            "24: warning: \"td/ns/a/sa/b\" matches nobody: the trust domain of this mesh is cluster.local (write cluster.local/ns/a/sa/b instead)",
        ),
        (
            "shop/b",
            "24: warning: \"shop/b\" matches nobody: principals are identities (write cluster.local/ns/<namespace>/sa/<service account> instead)",
        ),
    ] {
        check_said(
            &text(&format!("rules:\n- when:\n  - key: source.principal\n    values: [{principal}]")),
            &[expected],
        );
    }
    check_said(
        &text("action: DENY"),
        &[
            "20: warning: AuthorizationPolicy shop/p has no rules, so it denies nothing (write rules: [{}] to deny everything)",
        ],
    );
    check_said(
        &text("rules:\n- from:\n  - source:\n      principal: [a]\n      namespaces: [b]"),
        &["24: error: principal is not a field of Source (write principals instead)"],
    );
    check_said(
        &text("rules:\n- to:\n  - operation: {ports: [80]}"),
        &[
            "23: error: AuthorizationPolicy cannot be read: spec.rules[0].to[0].operation.ports[0]: expected a text, found the number 80 (write \"80\" in quotes)",
        ],
    );
}
