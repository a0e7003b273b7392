//! AuthorizationPolicy → layer-4 policies.
//!
//! Whom a policy is for and what it does is decided here; its rules are read in [`rules`].

use std::collections::BTreeMap;
use std::sync::Arc;

use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;

use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::kinds::Object;
use crate::kinds::Objects;
use crate::kinds::security::AuthorizationPolicy;
use crate::kinds::security::AuthorizationPolicySpec;
use crate::translate::Settings;
use crate::translate::authorization::rules::RuleReader;
use crate::translate::pods::Draft;
use crate::translate::pods::by_namespace;

mod rules;

/// Annotation of a policy that is only to be tried out.
const DRY_RUN: &str = "istio.io/dry-run";

/// The policies of all AuthorizationPolicies; the keys of those with a selector are added to the workloads
/// they select.
pub(super) fn policies(
    objects: &Objects,
    settings: &Settings,
    drafts: &mut [Draft<'_>],
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Policy> {
    let index = by_namespace(drafts.iter().map(|draft| &draft.object.namespace));
    let mut policies = Vec::with_capacity(objects.authorization_policies.len());
    for object in &objects.authorization_policies {
        let default = AuthorizationPolicySpec::default();
        let spec = object.value.spec.as_ref().unwrap_or(&default);
        let Some((action, rules)) = meaning(object, spec, settings, diagnostics) else { continue };
        let key = PolicyKey { namespace: Arc::clone(&object.namespace), name: Arc::clone(&object.name) };
        let root = object.namespace == settings.root_namespace;
        let scope = match labels(spec) {
            None if root => Scope::Global,
            None => Scope::Namespace,
            Some(labels) => {
                let candidates = match root {
                    true => (0..drafts.len()).collect(),
                    false => index.get(&object.namespace).cloned().unwrap_or_default(),
                };
                let mut selects = false;
                for draft in candidates {
                    let draft = &mut drafts[draft];
                    if draft.object.has_labels(labels) {
                        selects = true;
                        draft.workload.policies.push(key.clone());
                    }
                }
                if !selects {
                    let message = format!("the selector of AuthorizationPolicy {key} matches no pod");
                    let hint = "write labels that the pods of its namespace have";
                    let path = ["spec", "selector"];
                    diagnostics.push(Diagnostic::warning_at(&object.source, &path, message).hint(hint));
                }
                Scope::WorkloadSelector
            }
        };
        policies.push(Policy { key, scope, action, dry_run: false, rules });
    }
    policies
}

fn labels(spec: &AuthorizationPolicySpec) -> Option<&BTreeMap<String, String>> {
    let labels = spec.selector.as_ref()?.match_labels.as_ref()?;
    (!labels.is_empty()).then_some(labels)
}

/// What a policy does; `None` if it is not enforced here. One that is not understood denies everything.
fn meaning(
    object: &Object<AuthorizationPolicy>,
    spec: &AuthorizationPolicySpec,
    settings: &Settings,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<(Action, Vec<Rule>)> {
    let name = format!("AuthorizationPolicy {}/{}", object.namespace, object.name);
    let mut warn = |path: &[&str], message: String| {
        diagnostics.push(Diagnostic::warning_at(&object.source, path, message));
    };
    if spec.target_ref.is_some() || spec.target_refs.as_ref().is_some_and(|refs| !refs.is_empty()) {
        let field = if spec.target_ref.is_some() { "targetRef" } else { "targetRefs" };
        warn(
            &["spec", field],
            format!("{name} is for what {field} names, a waypoint or gateway: not enforced here"),
        );
        return None;
    }
    let dry_run = ["metadata", "annotations", DRY_RUN];
    match object.annotation(DRY_RUN) {
        // The spellings that Istio reads as a boolean.
        Some("true" | "True" | "TRUE" | "t" | "T" | "1") => {
            warn(&dry_run, format!("{name} is a dry run: not enforced"));
            return None;
        }
        None | Some("false" | "False" | "FALSE" | "f" | "F" | "0") => {}
        Some(other) => {
            let message = format!("annotation {DRY_RUN} of {name} has no value {other:?}");
            let hint = "write \"true\" or \"false\"";
            diagnostics.push(Diagnostic::error_at(&object.source, &dry_run, message).hint(hint));
        }
    }
    let action_path = ["spec", "action"];
    let action = match spec.action.as_deref() {
        None | Some("" | "ALLOW") => Action::Allow,
        Some("DENY") => Action::Deny,
        Some("AUDIT") => {
            let message = format!("{name} is for auditing, which is not done here: not enforced");
            diagnostics.push(Diagnostic::warning_at(&object.source, &action_path, message));
            return None;
        }
        Some("CUSTOM") => {
            let message =
                format!("{name} asks an external authorizer, which is not supported: it denies everything");
            let hint = "write ALLOW or DENY with rules instead";
            diagnostics.push(Diagnostic::warning_at(&object.source, &action_path, message).hint(hint));
            return Some(deny_everything());
        }
        Some(other) => {
            let message = format!("{other:?} is not an action");
            let hint = nearest(other, ["ALLOW", "DENY"]).unwrap_or("ALLOW or DENY");
            diagnostics.push(
                Diagnostic::error_at(&object.source, &action_path, message)
                    .hint(format!("write {hint} instead")),
            );
            return Some(deny_everything());
        }
    };
    let written = spec.rules.as_deref().unwrap_or_default();
    if action == Action::Deny && written.is_empty() {
        let message = format!("{name} has no rules, so it denies nothing");
        let hint = "write rules: [{}] to deny everything";
        diagnostics.push(Diagnostic::warning_at(&object.source, &["spec"], message).hint(hint));
    }
    let mut reader = RuleReader::new(object, action, settings, diagnostics);
    let rules: Vec<Rule> =
        written.iter().enumerate().filter_map(|(index, rule)| reader.rule(index, rule)).collect();
    if reader.failed() { Some(deny_everything()) } else { Some((action, rules)) }
}

/// A rule without clauses matches always.
fn deny_everything() -> (Action, Vec<Rule>) {
    (Action::Deny, vec![Rule::default()])
}
