//! PeerAuthentication → policies that refuse plain connections, the way istiod converts it.
//!
//! A workload that must be spoken to with mutual TLS gets a deny policy on connections without an identity.
//! The most specific setting wins: port, workload, namespace, mesh; of several at one level the oldest.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::StringMatch;

use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::kinds::Object;
use crate::kinds::Objects;
use crate::kinds::security::MutualTls;
use crate::kinds::security::PeerAuthentication;
use crate::kinds::security::PeerAuthenticationSpec;
use crate::translate::Settings;
use crate::translate::pods::Draft;
use crate::translate::pods::by_namespace;

/// The name of the policy of every workload that is strict on all ports.
const STRICT: &str = "istio_converted_static_strict";

/// Whether a plain connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Permissive,
    Strict,
}

/// One PeerAuthentication, understood.
#[derive(Debug)]
struct Setting<'a> {
    object: &'a Object<PeerAuthentication>,
    labels: Option<&'a BTreeMap<String, String>>,
    /// `None` leaves it to the next level.
    mode: Option<Mode>,
    ports: BTreeMap<u16, Option<Mode>>,
}

/// What one PeerAuthentication with a selector comes to.
#[derive(Debug, Clone)]
enum Conversion {
    Nothing,
    StaticStrict,
    Own(PolicyKey),
}

/// The policies of all PeerAuthentications; their keys are added to the workloads they are for.
pub(super) fn policies(
    objects: &Objects,
    settings: &Settings,
    drafts: &mut [Draft<'_>],
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Policy> {
    let mut mesh: Option<Setting<'_>> = None;
    let mut namespaces: HashMap<&str, Setting<'_>> = HashMap::new();
    let mut selected: Vec<Setting<'_>> = Vec::new();
    for object in oldest_first(&objects.peer_authentications) {
        let setting = understand(object, diagnostics);
        let root = object.namespace == settings.root_namespace;
        let first = match setting.labels {
            // In the root namespace, too, it is for the workloads of its own namespace.
            Some(_) => {
                selected.push(setting);
                continue;
            }
            None if root => match &mesh {
                Some(first) => first.object,
                None => {
                    mesh = Some(setting);
                    continue;
                }
            },
            None => match namespaces.get(&*object.namespace) {
                Some(first) => first.object,
                None => {
                    namespaces.insert(&object.namespace, setting);
                    continue;
                }
            },
        };
        diagnostics.push(shadowed(object, first));
    }

    let mut policies = Vec::new();
    let mut conversions: Vec<Option<Conversion>> = vec![None; selected.len()];
    let mut matched = vec![false; selected.len()];
    let mut tied = vec![false; selected.len()];
    let index = by_namespace(selected.iter().map(|setting| &setting.object.namespace));
    let mut strict_used = false;
    for draft in drafts {
        let default = [namespaces.get(&*draft.workload.namespace), mesh.as_ref()]
            .into_iter()
            .flatten()
            .find_map(|setting| setting.mode)
            .unwrap_or(Mode::Permissive);
        let mut own = None;
        for candidate in index.get(&draft.workload.namespace).into_iter().flatten().copied() {
            let setting = &selected[candidate];
            if !setting.labels.is_some_and(|labels| draft.object.has_labels(labels)) {
                continue;
            }
            matched[candidate] = true;
            match own {
                None => own = Some(candidate),
                Some(first) if !tied[candidate] => {
                    tied[candidate] = true;
                    let first: &Setting<'_> = &selected[first];
                    diagnostics.push(shadowed(setting.object, first.object));
                }
                Some(_) => {}
            }
        }
        if !draft.enrolled {
            continue;
        }
        let conversion = match own {
            None if default == Mode::Strict => Conversion::StaticStrict,
            None => Conversion::Nothing,
            Some(own) => conversions[own]
                .get_or_insert_with(|| convert(&selected[own], default, &mut policies))
                .clone(),
        };
        match conversion {
            Conversion::Nothing => {}
            Conversion::Own(key) => draft.workload.policies.push(key),
            Conversion::StaticStrict => {
                strict_used = true;
                draft.workload.policies.push(strict_key(settings));
            }
        }
    }
    for (setting, _) in selected.iter().zip(matched).filter(|(_, matched)| !matched) {
        let object = setting.object;
        let message = format!("the selector matches no pod of namespace {}", object.namespace);
        let hint = "write labels that its pods have";
        diagnostics.push(Diagnostic::warning_at(&object.source, &["spec", "selector"], message).hint(hint));
    }
    if strict_used {
        policies.push(deny(strict_key(settings), no_identity()));
    }
    policies
}

/// What a setting with a selector asks for, given what it inherits. A deny policy, where plain connections
/// are refused on some port only.
fn convert(setting: &Setting<'_>, inherited: Mode, policies: &mut Vec<Policy>) -> Conversion {
    let default = setting.mode.unwrap_or(inherited);
    let ports = setting.ports.iter().map(|(port, mode)| (*port, mode.unwrap_or(default)));
    let other: Vec<u16> = ports.filter(|(_, mode)| *mode != default).map(|(port, _)| port).collect();
    let on_ports = match default {
        Mode::Strict if other.is_empty() => return Conversion::StaticStrict,
        Mode::Permissive if other.is_empty() => return Conversion::Nothing,
        Mode::Strict => Match { not_destination_ports: other, ..Match::default() },
        Mode::Permissive => Match { destination_ports: other, ..Match::default() },
    };
    let object = setting.object;
    let key = PolicyKey {
        namespace: Arc::clone(&object.namespace),
        name: Arc::from(format!("converted_peer_authentication_{}", object.name)),
    };
    let mut rule = no_identity();
    rule.clauses.push(Clause { matches: vec![on_ports] });
    policies.push(deny(key.clone(), rule));
    Conversion::Own(key)
}

fn strict_key(settings: &Settings) -> PolicyKey {
    PolicyKey { namespace: Arc::clone(&settings.root_namespace), name: Arc::from(STRICT) }
}

fn no_identity() -> Rule {
    let nobody = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    Rule { clauses: vec![Clause { matches: vec![nobody] }] }
}

fn deny(key: PolicyKey, rule: Rule) -> Policy {
    Policy { key, scope: Scope::WorkloadSelector, action: Action::Deny, dry_run: false, rules: vec![rule] }
}

/// Those with a time of creation by that, then those without in the order they were found.
fn oldest_first(objects: &[Object<PeerAuthentication>]) -> Vec<&Object<PeerAuthentication>> {
    let mut sorted: Vec<&Object<PeerAuthentication>> = objects.iter().collect();
    sorted.sort_by(|a, b| {
        let created = |object: &Object<PeerAuthentication>| object.metadata.creation_timestamp.clone();
        let (a, b) = (created(a), created(b));
        (a.is_none(), a).cmp(&(b.is_none(), b))
    });
    sorted
}

fn shadowed(object: &Object<PeerAuthentication>, first: &Object<PeerAuthentication>) -> Diagnostic {
    let message = format!(
        "PeerAuthentication {}/{} is for workloads that {}/{} ({}:{}) is for as well: the older or first one counts",
        object.namespace, object.name, first.namespace, first.name, first.source.file, first.source.line
    );
    Diagnostic::warning_at(&object.source, &["spec"], message).hint("make one of the two")
}

/// Reads one object. What it cannot read it takes for strict.
fn understand<'a>(object: &'a Object<PeerAuthentication>, diagnostics: &mut Vec<Diagnostic>) -> Setting<'a> {
    static EMPTY: PeerAuthenticationSpec =
        PeerAuthenticationSpec { selector: None, mtls: None, port_level_mtls: None };
    let spec = object.value.spec.as_ref().unwrap_or(&EMPTY);
    let labels = spec.selector.as_ref().and_then(|selector| selector.match_labels.as_ref());
    let labels = labels.filter(|labels| !labels.is_empty());
    let mut mode = spec
        .mtls
        .as_ref()
        .and_then(|mtls| understand_mode(object, mtls, &["spec", "mtls", "mode"], diagnostics));
    let mut ports = BTreeMap::new();
    for (text, mtls) in spec.port_level_mtls.iter().flatten() {
        let port_mode = understand_mode(object, mtls, &["spec", "portLevelMtls", text, "mode"], diagnostics);
        match text.parse::<u16>() {
            Ok(port) if port > 0 => {
                ports.insert(port, port_mode);
            }
            _ => {
                let message = format!("{text:?} is not a port");
                let hint = "write a number from 1 to 65535";
                let path = ["spec", "portLevelMtls", text];
                diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
                mode = Some(Mode::Strict);
            }
        }
    }
    if labels.is_none() && !ports.is_empty() {
        let message = "portLevelMtls needs a selector";
        let hint = "write spec.selector.matchLabels with the labels of the workloads";
        diagnostics
            .push(Diagnostic::error_at(&object.source, &["spec", "portLevelMtls"], message).hint(hint));
        mode = Some(Mode::Strict);
    }
    Setting { object, labels, mode, ports }
}

fn understand_mode(
    object: &Object<PeerAuthentication>,
    mtls: &MutualTls,
    path: &[&str],
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Mode> {
    match mtls.mode.as_deref() {
        None | Some("" | "UNSET") => None,
        Some("STRICT") => Some(Mode::Strict),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("DISABLE") => {
            let message = "DISABLE is taken as PERMISSIVE: an enrolled workload always takes mutual TLS";
            diagnostics
                .push(Diagnostic::warning_at(&object.source, path, message).hint("write PERMISSIVE instead"));
            Some(Mode::Permissive)
        }
        Some(other) => {
            let message = format!("{other:?} is not a mode of mutual TLS");
            let modes = ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"];
            let hint = nearest(other, modes).map_or_else(
                || "write STRICT or PERMISSIVE instead".to_owned(),
                |mode| format!("write {mode} instead"),
            );
            diagnostics.push(Diagnostic::error_at(&object.source, path, message).hint(hint));
            Some(Mode::Strict)
        }
    }
}
