//! Authorization policies.
//!
//! A policy that was left out because a part of it is not understood would let in whom it was to keep out. So every
//! policy with a name is taken, and what is not understood narrows what is let in, never widens it:
//!
//! * a match of an allow policy with such a part matches nobody;
//! * a match of a deny policy matches as if that part did;
//! * an unknown action denies; an unknown scope is the policy's namespace.

use ipnet::IpNet;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_proto::security as wire;

use crate::xds::convert::Converter;
use crate::xds::convert::Rejected;
use crate::xds::convert::workload::ip;

impl Converter {
    pub(super) fn policy(&mut self, from: &wire::Authorization) -> Result<Policy, Rejected> {
        if from.name.is_empty() || from.namespace.is_empty() {
            return Err(Rejected::Name(format!("{}/{}", from.namespace, from.name)));
        }
        let key = PolicyKey {
            namespace: self.interner.text(&from.namespace),
            name: self.interner.text(&from.name),
        };
        let scope = match wire::Scope::try_from(from.scope) {
            Ok(wire::Scope::Global) => Scope::Global,
            Ok(wire::Scope::Namespace) => Scope::Namespace,
            Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Err(_) => self.unknown(Scope::Namespace),
        };
        let action = match wire::Action::try_from(from.action) {
            Ok(wire::Action::Allow) => Action::Allow,
            Ok(wire::Action::Deny) => Action::Deny,
            Err(_) => self.unknown(Action::Deny),
        };
        let rules = from.rules.iter().map(|rule| Rule {
            clauses: rule.clauses.iter().map(|clause| self.clause(clause, action)).collect(),
        });
        Ok(Policy { key, scope, action, dry_run: from.dry_run, rules: rules.collect() })
    }

    fn clause(&mut self, from: &wire::Clause, action: Action) -> Clause {
        let mut matches = Vec::with_capacity(from.matches.len());
        for wanted in &from.matches {
            let before = self.unknown;
            let understood = self.one(wanted);
            if self.unknown == before {
                matches.push(understood);
                continue;
            }
            match action {
                // What has nothing to match, matches nobody.
                Action::Allow => matches.push(Match::default()),
                // What is left of it matches whoever it did, and more. If nothing is left it is everybody, as is a
                // clause without matches.
                Action::Deny if understood == Match::default() => return Clause::default(),
                Action::Deny => matches.push(understood),
            }
        }
        Clause { matches }
    }

    /// A match without what is not understood, which is counted. A list of which something is left out is empty: as if
    /// it matched.
    fn one(&mut self, from: &wire::Match) -> Match {
        if !from.extensions.is_empty() {
            self.unknown(());
        }
        Match {
            namespaces: self.wanted(&from.namespaces, Self::text_match),
            not_namespaces: self.unwanted(&from.not_namespaces, Self::text_match),
            principals: self.wanted(&from.principals, Self::text_match),
            not_principals: self.unwanted(&from.not_principals, Self::text_match),
            service_accounts: self.wanted(&from.service_accounts, Self::account),
            not_service_accounts: self.unwanted(&from.not_service_accounts, Self::account),
            source_ips: self.wanted(&from.source_ips, Self::range),
            not_source_ips: self.unwanted(&from.not_source_ips, Self::range),
            destination_ips: self.wanted(&from.destination_ips, Self::range),
            not_destination_ips: self.unwanted(&from.not_destination_ips, Self::range),
            destination_ports: self.wanted(&from.destination_ports, Self::port),
            not_destination_ports: self.unwanted(&from.not_destination_ports, Self::port),
        }
    }

    /// A list of which one must match: with one that is not understood, that may be the one.
    fn wanted<F, T>(&mut self, from: &[F], convert: fn(&mut Self, &F) -> Option<T>) -> Vec<T> {
        let all: Option<Vec<T>> = from.iter().map(|one| convert(self, one)).collect();
        all.unwrap_or_else(|| self.unknown(Vec::new()))
    }

    /// A list of which none may match: one that is not understood may not match.
    fn unwanted<F, T>(&mut self, from: &[F], convert: fn(&mut Self, &F) -> Option<T>) -> Vec<T> {
        let mut understood = Vec::with_capacity(from.len());
        for one in from {
            match convert(self, one) {
                Some(one) => understood.push(one),
                None => self.unknown(()),
            }
        }
        understood
    }

    fn text_match(&mut self, from: &wire::StringMatch) -> Option<StringMatch> {
        use wire::string_match::MatchType;
        Some(match from.match_type.as_ref()? {
            MatchType::Exact(text) => StringMatch::Exact(self.interner.text(text)),
            MatchType::Prefix(text) => StringMatch::Prefix(self.interner.text(text)),
            MatchType::Suffix(text) => StringMatch::Suffix(self.interner.text(text)),
            MatchType::Presence(_) => StringMatch::Presence,
        })
    }

    fn account(&mut self, from: &wire::ServiceAccountMatch) -> Option<ServiceAccountMatch> {
        Some(ServiceAccountMatch {
            namespace: self.interner.text(&from.namespace),
            name: self.interner.text(&from.service_account),
        })
    }

    fn range(&mut self, from: &wire::Address) -> Option<IpNet> {
        let ip = ip(&from.address).ok()?;
        // A range of IPv4 addresses may be written in their IPv6 form.
        let mapped = if ip.is_ipv4() && from.address.len() == 16 { 96 } else { 0 };
        IpNet::new(ip, u8::try_from(from.length.checked_sub(mapped)?).ok()?).ok()
    }

    fn port(&mut self, from: &u32) -> Option<u16> {
        u16::try_from(*from).ok()
    }
}
