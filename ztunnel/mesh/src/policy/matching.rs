//! Whether one policy matches one connection: the semantics of `istio.security.Authorization`, layer 4 only.
//!
//! Does not know what a match means for the connection: see [`crate::policy::authorize`].

use ipnet::IpNet;

use crate::model::identity::SpiffeId;
use crate::model::policy::Clause;
use crate::model::policy::Match;
use crate::model::policy::Policy;
use crate::model::policy::Rule;
use crate::model::policy::ServiceAccountMatch;
use crate::model::policy::StringMatch;
use crate::policy::authorize::Inbound;

/// Whether any rule of `policy` matches. A policy without rules never does.
pub fn policy_matches(policy: &Policy, inbound: &Inbound<'_>) -> bool {
    policy.rules.iter().any(|rule| rule_matches(rule, inbound))
}

fn rule_matches(rule: &Rule, inbound: &Inbound<'_>) -> bool {
    rule.clauses.iter().all(|clause| clause_matches(clause, inbound))
}

fn clause_matches(clause: &Clause, inbound: &Inbound<'_>) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|one| match_matches(one, inbound))
}

fn match_matches(wanted: &Match, inbound: &Inbound<'_>) -> bool {
    // Everything is named, so that a new field of `Match` does not compile until it is judged here.
    let Match {
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
    } = wanted;
    // What says nothing about the connection must not let it in (or shut it out): an attribute that could
    // not be expressed here leaves such a match behind.
    if *wanted == Match::default() {
        return false;
    }
    let Inbound { identity, source, destination } = *inbound;
    let namespace = |one: &StringMatch| string_matches(one, identity.map_or("", SpiffeId::namespace));
    let principal = |one: &StringMatch| identity.is_some_and(|id| principal_matches(one, id));
    let account = |one: &ServiceAccountMatch| {
        identity.is_some_and(|id| id.namespace() == &*one.namespace && id.service_account() == &*one.name)
    };
    let from = |one: &IpNet| one.contains(&source);
    let to = |one: &IpNet| one.contains(&destination.ip());
    let port = |one: &u16| *one == destination.port();

    field_matches(namespaces, not_namespaces, namespace)
        && field_matches(principals, not_principals, principal)
        && field_matches(service_accounts, not_service_accounts, account)
        && field_matches(source_ips, not_source_ips, from)
        && field_matches(destination_ips, not_destination_ips, to)
        && field_matches(destination_ports, not_destination_ports, port)
}

/// No positive list or a hit in it, and no hit in the negative one.
fn field_matches<T>(wanted: &[T], unwanted: &[T], hit: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&hit)) && !unwanted.iter().any(&hit)
}

/// Whether an identity without its scheme is meant. In the part that is a trust domain case means nothing: the control
/// plane writes policies with the spelling of the mesh's settings, and a peer has its own in its certificate.
fn principal_matches(wanted: &StringMatch, id: &SpiffeId) -> bool {
    let (domain, path) = (id.trust_domain(), id.path());
    match wanted {
        StringMatch::Exact(text) => {
            text.len() == domain.len() + path.len()
                && starts_with(text, domain)
                && text.as_bytes().ends_with(path.as_bytes())
        }
        StringMatch::Prefix(text) => match text.len().checked_sub(domain.len()) {
            None | Some(0) => starts_with(domain, text),
            Some(_) => {
                starts_with(text, domain) && path.as_bytes().starts_with(&text.as_bytes()[domain.len()..])
            }
        },
        StringMatch::Suffix(text) => match text.len().checked_sub(path.len()) {
            None | Some(0) => path.ends_with(&**text),
            Some(of_domain) => {
                let end = domain.len().checked_sub(of_domain).map(|at| &domain[at..]);
                end.is_some_and(|end| starts_with(text, end)) && text.as_bytes().ends_with(path.as_bytes())
            }
        },
        StringMatch::Presence => true,
    }
}

/// Whether `text` starts with `start`, in any case.
fn starts_with(text: &str, start: &str) -> bool {
    text.as_bytes().get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start.as_bytes()))
}

fn string_matches(wanted: &StringMatch, value: &str) -> bool {
    match wanted {
        StringMatch::Exact(text) => value == &**text,
        StringMatch::Prefix(text) => value.starts_with(&**text),
        StringMatch::Suffix(text) => value.ends_with(&**text),
        StringMatch::Presence => !value.is_empty(),
    }
}
