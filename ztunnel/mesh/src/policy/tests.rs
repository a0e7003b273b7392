//! The rules of the evaluation one by one, and all together against a second evaluator.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;

use crate::model::identity::SpiffeId;
use crate::model::identity::TrustDomain;
use crate::model::policy::Action;
use crate::model::policy::Clause;
use crate::model::policy::Match;
use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::model::policy::Rule;
use crate::model::policy::Scope;
use crate::model::policy::ServiceAccountMatch;
use crate::model::policy::StringMatch;
use crate::policy::authorize::Decision;
use crate::policy::authorize::Denial;
use crate::policy::authorize::DryRun;
use crate::policy::authorize::Inbound;
use crate::policy::authorize::Permit;
use crate::policy::authorize::authorize;
use crate::policy::authorize::dry_run;
use crate::policy::authorize::is_settled;

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Arc<Policy> {
    let key = PolicyKey { namespace: "shop".into(), name: name.into() };
    Arc::new(Policy { key, scope: Scope::Namespace, action, dry_run: false, rules })
}

/// A policy of one rule with one clause with one match.
fn simple(name: &str, action: Action, wanted: Match) -> Arc<Policy> {
    policy(name, action, vec![Rule { clauses: vec![Clause { matches: vec![wanted] }] }])
}

fn decide(policies: &[Arc<Policy>], inbound: &Inbound<'_>) -> Result<Permit, Denial> {
    authorize(policies.iter(), None, inbound).last()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.into())]
}

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// The cart, from 10.1.2.3 to 10.0.0.1:8080.
fn from_cart(id: &SpiffeId) -> Inbound<'_> {
    Inbound { identity: Some(id), ..anonymous() }
}

/// Plain text, from 10.1.2.3 to 10.0.0.1:8080.
fn anonymous() -> Inbound<'static> {
    let destination = SocketAddr::from(([10, 0, 0, 1], 8080));
    Inbound { identity: None, source: IpAddr::from([10, 1, 2, 3]), destination }
}

#[test]
fn without_policies_everybody_is_let_in() {
    assert_eq!(decide(&[], &anonymous()).map(|permit| permit.policy().cloned()), Ok(None));
}

#[test]
fn a_dry_run_policy_decides_nothing_and_what_it_would_have_done_is_known() {
    let to = |port| Match { destination_ports: vec![port], ..Match::default() };
    let as_dry_run = |policy: Arc<Policy>| Arc::new(Policy { dry_run: true, ..Policy::clone(&policy) });
    let (allow, other) = (simple("yes", Action::Allow, to(8080)), simple("other", Action::Allow, to(9)));
    let deny = simple("no", Action::Deny, to(8080));
    let check = |policies: &[Arc<Policy>], let_in: bool, dry_run_says: Option<DryRun>| {
        assert_eq!(decide(policies, &anonymous()).is_ok(), let_in);
        assert_eq!(dry_run(policies.iter(), &anonymous(), let_in), dry_run_says);
    };
    let refused = |policy: &Policy| Some(DryRun::Refused(Denial::Denied(policy.key.clone())));
    check(&[as_dry_run(Arc::clone(&deny))], true, refused(&deny));
    check(&[Arc::clone(&allow), as_dry_run(Arc::clone(&deny))], true, refused(&deny));
    check(&[as_dry_run(Arc::clone(&other))], true, Some(DryRun::Refused(Denial::NoneAllowed)));
    check(
        &[Arc::clone(&other), as_dry_run(Arc::clone(&allow))],
        false,
        Some(DryRun::LetIn(Some(allow.key.clone()))),
    );
    check(&[as_dry_run(Arc::clone(&allow))], true, None);
    check(&[Arc::clone(&deny), as_dry_run(Arc::clone(&allow))], false, None);
    check(&[Arc::clone(&allow), as_dry_run(other)], true, None);
}

#[test]
fn deny_wins_over_allow_whatever_the_order() {
    let allow = simple("yes", Action::Allow, Match { destination_ports: vec![8080], ..Match::default() });
    let deny = simple("no", Action::Deny, Match { destination_ports: vec![8080], ..Match::default() });
    let expect = Err(Denial::Denied(deny.key.clone()));
    assert_eq!(decide(&[Arc::clone(&allow), Arc::clone(&deny)], &anonymous()), expect);
    assert_eq!(decide(&[deny, Arc::clone(&allow)], &anonymous()), expect);
    let permit = decide(&[Arc::clone(&allow)], &anonymous()).unwrap();
    assert_eq!(permit.policy(), Some(&allow.key));
}

#[test]
fn denials_read_as_istio_words_them() {
    let key = PolicyKey { namespace: "shop".into(), name: "no".into() };
    assert_eq!(Denial::Denied(key.clone()).to_string(), "explicitly denied by: shop/no");
    assert_eq!(Denial::NoneAllowed.to_string(), "allow policies exist, but none allowed");
    assert!(Denial::UnknownPolicy(key).to_string().contains("policy shop/no"));
}

#[test]
fn while_a_selected_policy_is_missing_only_a_refusal_is_certain() {
    let missing = PolicyKey { namespace: "shop".into(), name: "gone".into() };
    let (here, elsewhere) = (port(8080), port(9));
    let undecided = Decision::Undecided(missing.clone());
    for (what, policies, expect) in [
        ("nothing else", vec![], undecided.clone()),
        ("one that allows", vec![simple("yes", Action::Allow, here.clone())], undecided.clone()),
        ("one that allows others", vec![simple("yes", Action::Allow, elsewhere.clone())], undecided.clone()),
        ("one that denies others", vec![simple("no", Action::Deny, elsewhere)], undecided.clone()),
    ] {
        assert_eq!(authorize(policies.iter(), Some(&missing), &anonymous()), expect, "{what}");
    }
    let deny = simple("no", Action::Deny, here);
    let denied = Decision::Denied(Denial::Denied(deny.key.clone()));
    assert_eq!(authorize([&deny].into_iter(), Some(&missing), &anonymous()), denied);
    assert_eq!(undecided.last(), Err(Denial::UnknownPolicy(missing)), "in the end nobody is let in");
}

#[test]
fn between_two_parts_of_a_change_only_what_both_versions_say_holds() {
    let decide = |policies: &[Arc<Policy>]| authorize(policies.iter(), None, &anonymous());
    let (permitted, denied) = (decide(&[]), decide(&[simple("no", Action::Deny, port(8080))]));
    let undecided = Decision::Undecided(PolicyKey { namespace: "shop".into(), name: "gone".into() });
    for (before, now, expect) in [
        (None, &permitted, false),
        (None, &denied, false),
        (None, &undecided, false),
        (Some(&undecided), &permitted, false),
        (Some(&undecided), &denied, false),
        (Some(&undecided), &undecided, false),
        (Some(&permitted), &permitted, true),
        (Some(&permitted), &denied, false),
        (Some(&permitted), &undecided, false),
        (Some(&denied), &permitted, false),
        (Some(&denied), &denied, true),
        (Some(&denied), &undecided, false),
    ] {
        assert_eq!(is_settled(before, now), expect, "{before:?}, then {now:?}");
    }
}

/// Whether an allow policy of this one match lets the connection in.
fn lets_in(wanted: Match, inbound: &Inbound<'_>) -> bool {
    decide(&[simple("it", Action::Allow, wanted)], inbound).is_ok()
}

#[test]
fn empty_parts() {
    let with_rules = |rules| decide(&[policy("it", Action::Allow, rules)], &anonymous()).is_ok();
    assert!(!with_rules(vec![]), "a policy without rules never matches");
    assert!(with_rules(vec![Rule::default()]), "a rule without clauses matches");
    assert!(with_rules(vec![Rule { clauses: vec![Clause::default()] }]), "a clause without matches matches");
    assert!(!lets_in(Match::default(), &anonymous()), "a match without fields never matches");
    let empty_beside = Clause { matches: vec![Match::default(), port(8080)] };
    assert!(with_rules(vec![Rule { clauses: vec![empty_beside] }]), "another match of the clause may match");
}

fn port(port: u16) -> Match {
    Match { destination_ports: vec![port], ..Match::default() }
}

#[test]
fn any_rule_all_clauses_any_match() {
    let clause = |ports: &[u16]| Clause { matches: ports.iter().map(|one| port(*one)).collect() };
    let rule = |clauses: &[&[u16]]| Rule { clauses: clauses.iter().map(|ports| clause(ports)).collect() };
    let allowed = |rules| decide(&[policy("it", Action::Allow, rules)], &anonymous()).is_ok();
    assert!(allowed(vec![rule(&[&[1, 8080]])]));
    assert!(!allowed(vec![rule(&[&[8080], &[1]])]));
    assert!(allowed(vec![rule(&[&[8080], &[1]]), rule(&[&[8080], &[2, 8080]])]));
}

#[test]
fn each_field_is_compared_with_its_fact() {
    let cart = id(CART);
    let net = |text: &str| -> Vec<IpNet> { vec![text.parse().unwrap()] };
    let account = |namespace: &str, name: &str| {
        vec![ServiceAccountMatch { namespace: namespace.into(), name: name.into() }]
    };
    let d = Match::default;
    for (wanted, hit) in [
        (Match { namespaces: exact("shop"), ..d() }, true),
        (Match { namespaces: exact("Shop"), ..d() }, false),
        (Match { namespaces: vec![StringMatch::Prefix("sh".into())], ..d() }, true),
        (Match { namespaces: vec![StringMatch::Suffix("op".into())], ..d() }, true),
        (Match { namespaces: vec![StringMatch::Suffix("sh".into())], ..d() }, false),
        (Match { namespaces: vec![StringMatch::Presence], ..d() }, true),
        (Match { not_namespaces: exact("shop"), ..d() }, false),
        (Match { not_namespaces: exact("other"), ..d() }, true),
        (Match { principals: exact("cluster.local/ns/shop/sa/cart"), ..d() }, true),
        (Match { principals: exact(CART), ..d() }, false),
        (Match { principals: vec![StringMatch::Suffix("/sa/cart".into())], ..d() }, true),
        (Match { not_principals: vec![StringMatch::Presence], ..d() }, false),
        (Match { service_accounts: account("shop", "cart"), ..d() }, true),
        (Match { service_accounts: account("shop", "other"), ..d() }, false),
        (Match { service_accounts: account("other", "cart"), ..d() }, false),
        (Match { not_service_accounts: account("shop", "cart"), ..d() }, false),
        (Match { source_ips: net("10.1.0.0/16"), ..d() }, true),
        (Match { source_ips: net("10.2.0.0/16"), ..d() }, false),
        (Match { source_ips: net("::/0"), ..d() }, false),
        (Match { not_source_ips: net("10.1.2.3/32"), ..d() }, false),
        (Match { destination_ips: net("10.0.0.1/32"), ..d() }, true),
        (Match { not_destination_ips: net("10.0.0.0/24"), ..d() }, false),
        (port(8080), true),
        (port(80), false),
        (Match { not_destination_ports: vec![80], ..d() }, true),
        (Match { not_destination_ports: vec![8080], ..d() }, false),
        // Fields are joined by and, values of one field by or.
        (Match { namespaces: exact("shop"), ..port(80) }, false),
        (Match { namespaces: [exact("x"), exact("shop")].concat(), ..port(8080) }, true),
        (Match { not_destination_ports: vec![8080], ..port(8080) }, false),
    ] {
        assert_eq!(lets_in(wanted.clone(), &from_cart(&cart)), hit, "{wanted:?}");
    }
}

#[test]
fn a_service_account_is_the_same_in_every_trust_domain() {
    let accounts = vec![ServiceAccountMatch { namespace: "shop".into(), name: "cart".into() }];
    let elsewhere = id("spiffe://elsewhere/ns/shop/sa/cart");
    assert!(lets_in(Match { service_accounts: accounts, ..Match::default() }, &from_cart(&elsewhere)));
    assert!(!lets_in(
        Match { principals: exact("cluster.local/ns/shop/sa/cart"), ..Match::default() },
        &from_cart(&elsewhere)
    ));
}

#[test]
fn without_an_identity_nothing_about_it_matches_and_every_exclusion_passes() {
    let any = || vec![StringMatch::Presence];
    let account = || vec![ServiceAccountMatch { namespace: "".into(), name: "".into() }];
    let d = Match::default;
    for (wanted, hit) in [
        (Match { principals: any(), ..d() }, false),
        (Match { principals: vec![StringMatch::Prefix("".into())], ..d() }, false),
        (Match { not_principals: any(), ..d() }, true),
        (Match { namespaces: any(), ..d() }, false),
        (Match { not_namespaces: any(), ..d() }, true),
        (Match { not_namespaces: exact("shop"), ..d() }, true),
        (Match { service_accounts: account(), ..d() }, false),
        (Match { not_service_accounts: account(), ..d() }, true),
        // The namespace of nobody is the empty string.
        (Match { namespaces: vec![StringMatch::Prefix("".into())], ..d() }, true),
    ] {
        assert_eq!(lets_in(wanted.clone(), &anonymous()), hit, "{wanted:?}");
    }
}

#[test]
fn strict_mutual_tls_denies_exactly_those_without_identity() {
    let not_present = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let strict = simple("istio_converted_static_strict", Action::Deny, not_present);
    let cart = id(CART);
    assert!(decide(std::slice::from_ref(&strict), &from_cart(&cart)).is_ok());
    assert_eq!(decide(std::slice::from_ref(&strict), &anonymous()), Err(Denial::Denied(strict.key.clone())));
}

#[test]
fn an_ipv4_mapped_source_is_in_ipv4_ranges() {
    let deny = simple(
        "no",
        Action::Deny,
        Match { source_ips: vec!["10.1.0.0/16".parse().unwrap()], ..Match::default() },
    );
    let mapped = Inbound { source: "::ffff:10.1.2.3".parse().unwrap(), ..anonymous() };
    assert_eq!(decide(std::slice::from_ref(&deny), &mapped), Err(Denial::Denied(deny.key.clone())));
}

/// A second evaluator, of another build: it computes sets of what matches rather than asking item by item.
mod oracle {
    use super::*;

    /// The values of one list of a field, each by whether the connection has it.
    enum Condition {
        AnyOf(Vec<bool>),
        NoneOf(Vec<bool>),
    }

    /// `None` for a list that says nothing.
    fn holds(condition: &Condition) -> Option<bool> {
        match condition {
            Condition::AnyOf(hits) | Condition::NoneOf(hits) if hits.is_empty() => None,
            Condition::AnyOf(hits) => Some(hits.contains(&true)),
            Condition::NoneOf(hits) => Some(!hits.contains(&true)),
        }
    }

    fn texts(wanted: &[StringMatch], actual: Option<&str>) -> Vec<bool> {
        let reversed = |text: &str| text.bytes().rev().collect::<Vec<_>>();
        let hit = |one: &StringMatch| {
            actual.is_some_and(|actual| match one {
                StringMatch::Exact(text) => actual.bytes().eq(text.bytes()),
                StringMatch::Prefix(text) => actual.bytes().take(text.len()).eq(text.bytes()),
                StringMatch::Suffix(text) => {
                    reversed(actual).iter().take(text.len()).eq(reversed(text).iter())
                }
                StringMatch::Presence => !actual.is_empty(),
            })
        };
        wanted.iter().map(hit).collect()
    }

    fn ranges(wanted: &[IpNet], actual: IpAddr) -> Vec<bool> {
        // The first and last address of the range, compared as numbers.
        let hit = |one: &IpNet| match (one, actual) {
            (IpNet::V4(net), IpAddr::V4(ip)) => (net.network()..=net.broadcast()).contains(&ip),
            (IpNet::V6(net), IpAddr::V6(ip)) => (net.network()..=net.broadcast()).contains(&ip),
            _ => false,
        };
        wanted.iter().map(hit).collect()
    }

    fn one_match(wanted: &Match, inbound: &Inbound<'_>) -> bool {
        let principal = inbound.identity.map(|id| id.as_str().strip_prefix("spiffe://").unwrap());
        let parts: Vec<&str> = principal.map(|text| text.split('/').collect()).unwrap_or_default();
        let namespace = Some(parts.get(2).copied().unwrap_or(""));
        let accounts = |list: &[ServiceAccountMatch]| -> Vec<bool> {
            let pair = |one: &ServiceAccountMatch| [one.namespace.to_string(), one.name.to_string()];
            list.iter().map(|one| parts.len() == 5 && pair(one) == [parts[2], parts[4]]).collect()
        };
        let ports = |list: &[u16]| -> Vec<bool> {
            list.iter().map(|one| *one == inbound.destination.port()).collect()
        };
        let to = inbound.destination.ip();
        let conditions = [
            Condition::AnyOf(texts(&wanted.namespaces, namespace)),
            Condition::NoneOf(texts(&wanted.not_namespaces, namespace)),
            Condition::AnyOf(texts(&wanted.principals, principal)),
            Condition::NoneOf(texts(&wanted.not_principals, principal)),
            Condition::AnyOf(accounts(&wanted.service_accounts)),
            Condition::NoneOf(accounts(&wanted.not_service_accounts)),
            Condition::AnyOf(ranges(&wanted.source_ips, inbound.source)),
            Condition::NoneOf(ranges(&wanted.not_source_ips, inbound.source)),
            Condition::AnyOf(ranges(&wanted.destination_ips, to)),
            Condition::NoneOf(ranges(&wanted.not_destination_ips, to)),
            Condition::AnyOf(ports(&wanted.destination_ports)),
            Condition::NoneOf(ports(&wanted.not_destination_ports)),
        ];
        // Of the conditions there are, all hold; and there is at least one.
        let outcomes: BTreeSet<bool> = conditions.iter().filter_map(holds).collect();
        outcomes == BTreeSet::from([true])
    }

    fn matching<'a>(
        policies: &'a [Arc<Policy>],
        action: Action,
        inbound: &'a Inbound<'_>,
    ) -> Vec<&'a Arc<Policy>> {
        let mut found = Vec::new();
        for policy in policies.iter().filter(|policy| policy.action == action) {
            let mut policy_hit = false;
            for rule in &policy.rules {
                let mut missed = 0;
                for clause in &rule.clauses {
                    let hits = clause.matches.iter().filter(|one| one_match(one, inbound)).count();
                    missed += usize::from(hits == 0 && !clause.matches.is_empty());
                }
                policy_hit |= missed == 0;
            }
            if policy_hit {
                found.push(policy);
            }
        }
        found
    }

    /// Whether the connection is let in, and by what, or why not.
    pub(super) fn decide(
        policies: &[Arc<Policy>],
        inbound: &Inbound<'_>,
    ) -> Result<Option<PolicyKey>, Denial> {
        let denying = matching(policies, Action::Deny, inbound);
        let allowing = matching(policies, Action::Allow, inbound);
        let any_allow = policies.iter().any(|policy| policy.action == Action::Allow);
        match (denying.first(), any_allow, allowing.first()) {
            (Some(policy), _, _) => Err(Denial::Denied(policy.key.clone())),
            (None, false, _) => Ok(None),
            (None, true, Some(policy)) => Ok(Some(policy.key.clone())),
            (None, true, None) => Err(Denial::NoneAllowed),
        }
    }
}

/// Few different values, so that they hit often.
fn some_name() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("a"), Just("b"), Just("ab"), Just("ba")]
}

fn some_text(values: impl Strategy<Value = String>) -> impl Strategy<Value = StringMatch> {
    (values, 0..4, any::<prop::sample::Index>()).prop_map(|(text, kind, cut)| {
        let at = cut.index(text.len() + 1);
        match kind {
            0 => StringMatch::Exact(text.into()),
            1 => StringMatch::Prefix(text[..at].into()),
            2 => StringMatch::Suffix(text[at..].into()),
            _ => StringMatch::Presence,
        }
    })
}

fn some_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..4u8).prop_map(|last| IpAddr::from([10, 0, last & 1, last])),
        (0..4u16).prop_map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])),
    ]
}

fn some_net() -> impl Strategy<Value = IpNet> {
    (some_ip(), any::<prop::sample::Index>()).prop_map(|(ip, length)| {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        // Around the last bits, where the addresses differ, and the shortest.
        let length = [0, bits - 16, bits - 2, bits - 1, bits][length.index(5)];
        IpNet::new(ip, length).unwrap()
    })
}

fn list<T: Clone + Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    // Mostly nothing: with twelve fields, a match would else never match.
    prop_oneof![5 => Just(Vec::new()), 1 => prop::collection::vec(of, 1..3)]
}

fn some_match() -> impl Strategy<Value = Match> {
    let namespace = || list(some_text(some_name().prop_map(str::to_owned)));
    let principal = || list(some_text(some_identity().prop_map(|id| id.principal().to_owned())));
    let account = || {
        list((some_name(), some_name()).prop_map(|(namespace, name)| ServiceAccountMatch {
            namespace: namespace.into(),
            name: name.into(),
        }))
    };
    let net = || list(some_net());
    let port = || list(1..4u16);
    (
        (namespace(), namespace(), principal(), principal(), account(), account()),
        (net(), net(), net(), net(), port(), port()),
    )
        .prop_map(|(who, place)| {
            let (
                namespaces,
                not_namespaces,
                principals,
                not_principals,
                service_accounts,
                not_service_accounts,
            ) = who;
            let (
                source_ips,
                not_source_ips,
                destination_ips,
                not_destination_ips,
                destination_ports,
                not_destination_ports,
            ) = place;
            Match {
                namespaces,
                not_namespaces,
                principals,
                not_principals,
                service_accounts,
                not_service_accounts,
                source_ips,
                not_source_ips,
                destination_ips,
                not_destination_ips,
                destination_ports,
                not_destination_ports,
            }
        })
}

fn some_identity() -> impl Strategy<Value = SpiffeId> {
    (some_name(), some_name(), some_name()).prop_map(|(domain, namespace, account)| {
        SpiffeId::new(&TrustDomain::new(domain).unwrap(), namespace, account).unwrap()
    })
}

fn some_policies() -> impl Strategy<Value = Vec<Arc<Policy>>> {
    let clause = prop::collection::vec(some_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let rules = prop::collection::vec(rule, 0..3);
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    prop::collection::vec((action, rules), 0..4).prop_map(|policies| {
        let numbered = policies.into_iter().enumerate();
        numbered.map(|(number, (action, rules))| policy(&number.to_string(), action, rules)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_evaluators_agree(
        policies in some_policies(),
        identity in prop::option::of(some_identity()),
        source in some_ip(),
        ip in some_ip(),
        port in 1..4u16,
    ) {
        let inbound =
            Inbound { identity: identity.as_ref(), source, destination: SocketAddr::new(ip, port) };
        let decided = decide(&policies, &inbound).map(|permit| permit.policy().cloned());
        prop_assert_eq!(decided, oracle::decide(&policies, &inbound));
    }
}
