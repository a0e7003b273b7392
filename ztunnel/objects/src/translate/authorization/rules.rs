//! The rules of an AuthorizationPolicy.
//!
//! What only layer 7 could see is left out so that it errs on the safe side: an allow rule that needs it never
//! matches; a deny rule matches without it. This is what istiod does for node proxies.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;

use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::kinds::Object;
use crate::kinds::security;
use crate::kinds::security::AuthorizationPolicy;
use crate::translate::Settings;

/// Reads the rules of one policy.
pub(super) struct RuleReader<'a> {
    object: &'a Object<AuthorizationPolicy>,
    action: Action,
    settings: &'a Settings,
    diagnostics: &'a mut Vec<Diagnostic>,
    failed: bool,
    /// Fields of the current rule that need layer 7, each with where it is.
    seven: Vec<(String, Vec<String>)>,
}

/// One side of a rule's entry: a match on what layer 4 sees.
enum Seen {
    Match(Box<Match>),
    /// Nothing of it is left at layer 4, so at layer 4 it matches anything.
    Anything,
}

/// Why one value is not what its field takes: message and hint.
type Unreadable = (String, String);

/// The conditions that layer 4 can see.
const CONDITIONS: [&str; 6] = [
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "destination.ip",
    "destination.port",
];

/// The conditions that it cannot, by how they begin.
const CONDITIONS_SEVEN: [&str; 7] = [
    "request.headers[",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[",
    "remote.ip",
    "connection.sni",
];

impl<'a> RuleReader<'a> {
    pub(super) fn new(
        object: &'a Object<AuthorizationPolicy>,
        action: Action,
        settings: &'a Settings,
        diagnostics: &'a mut Vec<Diagnostic>,
    ) -> Self {
        Self { object, action, settings, diagnostics, failed: false, seven: Vec::new() }
    }

    /// Whether anything was not understood.
    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    /// The rule at layer 4; `None` if there it can never match.
    pub(super) fn rule(&mut self, index: usize, rule: &security::Rule) -> Option<Rule> {
        let path = vec!["spec".to_owned(), "rules".to_owned(), index.to_string()];
        let mut clauses = Vec::new();
        if let Some(from) = &rule.from {
            let path = join(&path, "from");
            let sources = from.iter().map(|from| from.source.as_ref());
            clauses.extend(self.any_of(&path, "source", sources, Self::peer));
        }
        if let Some(to) = &rule.to {
            let path = join(&path, "to");
            let operations = to.iter().map(|to| to.operation.as_ref());
            clauses.extend(self.any_of(&path, "operation", operations, Self::operation));
        }
        if rule.when.as_ref().is_some_and(Vec::is_empty) {
            self.empty(&join(&path, "when"));
        }
        for (index, condition) in rule.when.iter().flatten().enumerate() {
            let path = join(&join(&path, "when"), &index.to_string());
            match self.condition(&path, condition) {
                Some(Seen::Match(only)) => clauses.push(Clause { matches: vec![*only] }),
                Some(Seen::Anything) | None => {}
            }
        }
        let seven = std::mem::take(&mut self.seven);
        let Some((_, place)) = seven.first() else { return Some(Rule { clauses }) };
        let fields: Vec<&str> = seven.iter().map(|(field, _)| field.as_str()).collect();
        let (consequence, hint) = match self.action {
            Action::Allow => {
                ("the rule allows nothing", "attach the policy to a waypoint, or remove the rule")
            }
            Action::Deny => (
                "they are left out, so the rule denies more",
                "attach the policy to a waypoint, or remove the rule",
            ),
        };
        let message = format!("rule {index} needs layer 7 ({}): {consequence}", fields.join(", "));
        let path: Vec<&str> = place.iter().map(String::as_str).collect();
        self.diagnostics.push(Diagnostic::warning_at(&self.object.source, &path, message).hint(hint));
        match self.action {
            Action::Allow => None,
            Action::Deny => Some(Rule { clauses }),
        }
    }

    /// A clause of the entries of `from` or `to`; none if one of them matches anything.
    fn any_of<'r, T: 'r>(
        &mut self,
        path: &[String],
        field: &str,
        entries: impl Iterator<Item = Option<&'r T>>,
        read: impl Fn(&mut Self, &[String], &T) -> Option<Seen>,
    ) -> Option<Clause> {
        let mut matches = Vec::new();
        let mut anything = false;
        let mut count = 0;
        for (index, entry) in entries.enumerate() {
            count += 1;
            let path = join(path, &index.to_string());
            let Some(entry) = entry else {
                self.fail(
                    &path,
                    format!("this names no {field}"),
                    format!("write {field}: with what is meant"),
                );
                continue;
            };
            match read(self, &join(&path, field), entry) {
                Some(Seen::Match(one)) => matches.push(*one),
                Some(Seen::Anything) => anything = true,
                None => {}
            }
        }
        if count == 0 {
            self.empty(path);
        }
        (!anything && !matches.is_empty()).then_some(Clause { matches })
    }

    fn peer(&mut self, path: &[String], peer: &security::Peer) -> Option<Seen> {
        let namespace = Arc::clone(&self.object.namespace);
        let account = |text: &str| service_account(text, &namespace);
        let only = Match {
            namespaces: self.values(path, "namespaces", &peer.namespaces, string),
            not_namespaces: self.values(path, "notNamespaces", &peer.not_namespaces, string),
            principals: self.principals(path, "principals", &peer.principals),
            not_principals: self.principals(path, "notPrincipals", &peer.not_principals),
            service_accounts: self.values(path, "serviceAccounts", &peer.service_accounts, account),
            not_service_accounts: self.values(
                path,
                "notServiceAccounts",
                &peer.not_service_accounts,
                account,
            ),
            source_ips: self.values(path, "ipBlocks", &peer.ip_blocks, network),
            not_source_ips: self.values(path, "notIpBlocks", &peer.not_ip_blocks, network),
            ..Match::default()
        };
        let seven = [
            ("requestPrincipals", &peer.request_principals),
            ("notRequestPrincipals", &peer.not_request_principals),
            ("remoteIpBlocks", &peer.remote_ip_blocks),
            ("notRemoteIpBlocks", &peer.not_remote_ip_blocks),
        ];
        self.seen(path, only, &seven)
    }

    fn operation(&mut self, path: &[String], operation: &security::Operation) -> Option<Seen> {
        let only = Match {
            destination_ports: self.values(path, "ports", &operation.ports, port),
            not_destination_ports: self.values(path, "notPorts", &operation.not_ports, port),
            ..Match::default()
        };
        let seven = [
            ("hosts", &operation.hosts),
            ("notHosts", &operation.not_hosts),
            ("methods", &operation.methods),
            ("notMethods", &operation.not_methods),
            ("paths", &operation.paths),
            ("notPaths", &operation.not_paths),
        ];
        self.seen(path, only, &seven)
    }

    /// What is left of an entry at layer 4.
    fn seen(&mut self, path: &[String], only: Match, seven: &[(&str, &Option<Vec<String>>)]) -> Option<Seen> {
        let before = self.seven.len();
        for (field, values) in seven {
            if values.is_some() {
                self.seven.push(((*field).to_owned(), join(path, field)));
            }
        }
        if only != Match::default() {
            return Some(Seen::Match(Box::new(only)));
        }
        if self.seven.len() > before {
            return Some(Seen::Anything);
        }
        if !self.failed {
            self.fail(
                path,
                "this names nothing".to_owned(),
                "write what is meant, or remove the list".to_owned(),
            );
        }
        None
    }

    fn condition(&mut self, path: &[String], condition: &security::Condition) -> Option<Seen> {
        let key = condition.key.as_str();
        let begins = |known: &&str| match known.ends_with('[') {
            true => key.starts_with(*known),
            false => key == *known,
        };
        if key.starts_with("experimental.envoy.filters.") || CONDITIONS_SEVEN.iter().any(begins) {
            self.seven.push((key.to_owned(), join(path, "key")));
            return Some(Seen::Anything);
        }
        let (values, not_values) = (&condition.values, &condition.not_values);
        let namespace = Arc::clone(&self.object.namespace);
        let account = |text: &str| service_account(text, &namespace);
        let mut only = Match::default();
        match key {
            "source.ip" => {
                only.source_ips = self.values(path, "values", values, network);
                only.not_source_ips = self.values(path, "notValues", not_values, network);
            }
            "source.namespace" => {
                only.namespaces = self.values(path, "values", values, string);
                only.not_namespaces = self.values(path, "notValues", not_values, string);
            }
            "source.principal" => {
                only.principals = self.principals(path, "values", values);
                only.not_principals = self.principals(path, "notValues", not_values);
            }
            "source.serviceAccount" => {
                only.service_accounts = self.values(path, "values", values, account);
                only.not_service_accounts = self.values(path, "notValues", not_values, account);
            }
            "destination.ip" => {
                only.destination_ips = self.values(path, "values", values, network);
                only.not_destination_ips = self.values(path, "notValues", not_values, network);
            }
            "destination.port" => {
                only.destination_ports = self.values(path, "values", values, port);
                only.not_destination_ports = self.values(path, "notValues", not_values, port);
            }
            other => {
                let known = CONDITIONS.into_iter().chain(CONDITIONS_SEVEN);
                let hint = nearest(other, known).map_or_else(
                    || format!("known are {}", CONDITIONS.join(", ")),
                    |known| format!("write {known} instead"),
                );
                self.fail(&join(path, "key"), format!("{other:?} is not a condition"), hint);
                return None;
            }
        }
        self.seen(path, only, &[])
    }

    /// Reads a list of principals, and says which of them can match nobody.
    fn principals(&mut self, path: &[String], field: &str, values: &Option<Vec<String>>) -> Vec<StringMatch> {
        let principals = self.values(path, field, values, principal);
        for (index, text) in values.iter().flatten().enumerate().filter(|(_, text)| !text.contains('*')) {
            let domain = &self.settings.trust_domain;
            let (message, hint) = match format!("spiffe://{text}").parse::<SpiffeId>() {
                Ok(id) if id.trust_domain().eq_ignore_ascii_case(domain.as_str()) => continue,
                Ok(id) => {
                    let (namespace, account) = (id.namespace(), id.service_account());
                    let message =
                        format!("{text:?} matches nobody: the trust domain of this mesh is {domain}");
                    (message, format!("write {domain}/ns/{namespace}/sa/{account} instead"))
                }
                // `principal` has said so.
                Err(_) if text.is_empty() || text.starts_with("spiffe:") => continue,
                Err(_) => {
                    let message = format!("{text:?} matches nobody: principals are identities");
                    (message, format!("write {domain}/ns/<namespace>/sa/<service account> instead"))
                }
            };
            let path = join(&join(path, field), &index.to_string());
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            self.diagnostics.push(Diagnostic::warning_at(&self.object.source, &path, message).hint(hint));
        }
        principals
    }

    /// Reads every value of a list.
    fn values<T>(
        &mut self,
        path: &[String],
        field: &str,
        values: &Option<Vec<String>>,
        read: impl Fn(&str) -> Result<T, Unreadable>,
    ) -> Vec<T> {
        let Some(values) = values else { return Vec::new() };
        let path = join(path, field);
        if values.is_empty() {
            self.empty(&path);
        }
        let mut understood = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            match read(value) {
                Ok(value) => understood.push(value),
                Err((message, hint)) => self.fail(&join(&path, &index.to_string()), message, hint),
            }
        }
        understood
    }

    /// A list without items may come of a template that had none to put in: not the same as no list.
    fn empty(&mut self, path: &[String]) {
        self.fail(path, "this list is empty".to_owned(), "remove it to match anything".to_owned());
    }

    fn fail(&mut self, path: &[String], message: String, hint: String) {
        self.failed = true;
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        self.diagnostics.push(Diagnostic::error_at(&self.object.source, &path, message).hint(hint));
    }
}

fn join(path: &[String], segment: &str) -> Vec<String> {
    path.iter().cloned().chain([segment.to_owned()]).collect()
}

fn string(text: &str) -> Result<StringMatch, Unreadable> {
    let (star, rest) = match (text.strip_prefix('*'), text.strip_suffix('*')) {
        _ if text == "*" => return Ok(StringMatch::Presence),
        (Some(rest), _) => (StringMatch::Suffix(Arc::from(rest)), rest),
        (None, Some(rest)) => (StringMatch::Prefix(Arc::from(rest)), rest),
        (None, None) => (StringMatch::Exact(Arc::from(text)), text),
    };
    if text.is_empty() {
        return Err(("a value is empty".to_owned(), "write \"*\" for any value, or remove it".to_owned()));
    }
    if rest.contains('*') {
        let message = format!("{text:?} has a * that is neither first nor last, which matches only itself");
        return Err((message, "write one * at the beginning or at the end".to_owned()));
    }
    Ok(star)
}

fn principal(text: &str) -> Result<StringMatch, Unreadable> {
    match text.strip_prefix("spiffe://") {
        Some(rest) => Err((format!("{text:?} would match no principal"), format!("write {rest} instead"))),
        None => string(text),
    }
}

fn service_account(text: &str, namespace: &Arc<str>) -> Result<ServiceAccountMatch, Unreadable> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Arc::from(namespace), name),
        None => (Arc::clone(namespace), text),
    };
    if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
        let hint = "write <namespace>/<service account>, without *".to_owned();
        return Err((format!("{text:?} is not a service account"), hint));
    }
    Ok(ServiceAccountMatch { namespace, name: Arc::from(name) })
}

fn network(text: &str) -> Result<IpNet, Unreadable> {
    let parsed = match text.parse::<IpAddr>() {
        Ok(ip) => Some(IpNet::from(canonical_ip(ip))),
        Err(_) => text.parse::<IpNet>().ok().map(canonical_network),
    };
    parsed.ok_or_else(|| {
        let hint = "write an address, or one with a prefix length such as 10.0.0.0/8".to_owned();
        (format!("{text:?} is not a range of addresses"), hint)
    })
}

/// Peers' addresses are compared in canonical form, so a range of IPv4-mapped ones is one of IPv4.
fn canonical_network(net: IpNet) -> IpNet {
    let mapped = match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            v6.addr().to_ipv4_mapped().map(|ip| (ip, v6.prefix_len() - 96))
        }
        IpNet::V6(_) | IpNet::V4(_) => None,
    };
    let net = mapped.and_then(|(ip, prefix)| IpNet::new(IpAddr::V4(ip), prefix).ok()).unwrap_or(net);
    net.trunc()
}

fn port(text: &str) -> Result<u16, Unreadable> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err((format!("{text:?} is not a port"), "write a number from 1 to 65535".to_owned())),
    }
}
