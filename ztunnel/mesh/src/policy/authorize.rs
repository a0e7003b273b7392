//! The decision: deny policies first, then allow policies, and without allow policies everybody.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::addr::canonical;
use crate::model::addr::canonical_ip;
use crate::model::identity::SpiffeId;
use crate::model::policy::Action;
use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::policy::matching::policy_matches;

/// The facts about one connection that policies judge.
#[derive(Debug, Clone, Copy)]
pub struct Inbound<'a> {
    /// The identity the peer proved in its TLS handshake; `None` for plain text.
    pub identity: Option<&'a SpiffeId>,
    /// The address the TCP connection came from.
    pub source: IpAddr,
    /// Where the connection goes in the workload, before any rewriting to loopback.
    pub destination: SocketAddr,
}

/// Leave to deliver one connection to one workload. Only [`authorize`] makes one.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    rule: Option<PolicyKey>,
}

impl Permit {
    /// The allow policy that let the connection in; `None` where no allow policy applies.
    pub fn policy(&self) -> Option<&PolicyKey> {
        self.rule.as_ref()
    }
}

/// Why a connection may not reach its workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// This deny policy matches.
    #[error("explicitly denied by: {0}{meaning}", meaning = meaning(.0))]
    Denied(PolicyKey),
    /// Allow policies apply to the workload and none matches.
    #[error("allow policies exist, but none allowed")]
    NoneAllowed,
    /// The workload selects a policy the mesh does not have. It may be one that denies, so nobody is let in.
    #[error(
        "the workload selects policy {0}, which the mesh does not have; nothing is let in until it appears or is no longer selected"
    )]
    UnknownPolicy(PolicyKey),
}

/// Some policies have another name where people have written them.
fn meaning(policy: &PolicyKey) -> &'static str {
    match &*policy.name {
        "istio_converted_static_strict" => " (PeerAuthentication: mutual TLS is STRICT)",
        _ => "",
    }
}

/// What the policies make of a connection, as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It may proceed.
    Permitted(Permit),
    /// It may not.
    Denied(Denial),
    /// The policies that are known do not refuse it, and this one is named by the workload and not known (yet): it may
    /// be one that denies.
    Undecided(PolicyKey),
}

impl Decision {
    /// The decision when no more is waited for: what is undecided is refused.
    pub fn last(self) -> Result<Permit, Denial> {
        match self {
            Self::Permitted(permit) => Ok(permit),
            Self::Denied(denial) => Err(denial),
            Self::Undecided(missing) => Err(Denial::UnknownPolicy(missing)),
        }
    }
}

/// Whether a decision holds at once that was made amid changes: `now` is what the newest version of the mesh says, and
/// `before` what the last one said of which all parts had come, if it knew the workload. Policies that `before` lacked
/// and that have come since belong to it: with them it may be decided.
///
/// Changes that belong together come in several parts and in any order, and what is decided between two of them is
/// nobody's wish: a policy that is replaced by another is gone for a moment, and so is one that comes to apply in
/// another way, and one that the workload no longer names because another takes its place. What both versions agree on
/// holds; with what they do not, or with a workload that is new amid changes, the last part is waited for.
pub fn is_settled(before: Option<&Decision>, now: &Decision) -> bool {
    matches!(
        (before, now),
        (Some(Decision::Permitted(_)), Decision::Permitted(_))
            | (Some(Decision::Denied(_)), Decision::Denied(_))
    )
}

/// What would have become of a connection if the dry-run policies had decided, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DryRun {
    /// It was let in, and would not have been.
    Refused(Denial),
    /// It was refused, and would have been let in, by this allow policy.
    LetIn(Option<PolicyKey>),
}

/// Decides whether `inbound` may proceed. `policies` and `missing` are what
/// [`Mesh::policies_of`](crate::store::index::Mesh::policies_of) answers for the destination: the policies that the mesh
/// has, and the first one that it should have and has not.
///
/// A dry-run policy decides nothing: [`dry_run`] tells what it would have done. Any matching deny policy
/// refuses, whatever is missing. Without allow policies everybody else is let in; with them, those whom one of them
/// matches.
pub fn authorize<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>>,
    missing: Option<&PolicyKey>,
    inbound: &Inbound<'_>,
) -> Decision {
    match (decide(policies.filter(|policy| !policy.dry_run), inbound), missing) {
        (Err(denial @ Denial::Denied(_)), _) | (Err(denial), None) => Decision::Denied(denial),
        (_, Some(missing)) => Decision::Undecided(missing.clone()),
        (Ok(rule), None) => Decision::Permitted(Permit { rule: rule.cloned() }),
    }
}

/// What the dry-run policies among `policies` would have made of `inbound`, which was `let_in` or not; nothing if that
/// is no difference.
pub fn dry_run<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>>,
    inbound: &Inbound<'_>,
    let_in: bool,
) -> Option<DryRun> {
    match decide(policies, inbound) {
        Err(denial) if let_in => Some(DryRun::Refused(denial)),
        Ok(rule) if !let_in => Some(DryRun::LetIn(rule.cloned())),
        _ => None,
    }
}

fn decide<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>>,
    inbound: &Inbound<'_>,
) -> Result<Option<&'a PolicyKey>, Denial> {
    // An IPv4-mapped address is in no IPv4 range, so a deny policy for that range would miss it.
    let inbound = Inbound {
        identity: inbound.identity,
        source: canonical_ip(inbound.source),
        destination: canonical(inbound.destination),
    };
    let mut allow_policies_exist = false;
    let mut allowed_by = None;
    for policy in policies {
        match policy.action {
            Action::Deny if policy_matches(policy, &inbound) => {
                return Err(Denial::Denied(policy.key.clone()));
            }
            Action::Deny => {}
            Action::Allow => {
                allow_policies_exist = true;
                if allowed_by.is_none() && policy_matches(policy, &inbound) {
                    allowed_by = Some(&policy.key);
                }
            }
        }
    }
    match allowed_by {
        None if allow_policies_exist => Err(Denial::NoneAllowed),
        allowed_by => Ok(allowed_by),
    }
}
