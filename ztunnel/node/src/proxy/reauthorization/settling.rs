//! Which version of the mesh was the last of which all parts had come, and what becomes of a connection between two of
//! those. Pure: time comes in.

use std::sync::Arc;

use tokio::time::Instant;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::policy::authorize::Decision;
use ztunnel_mesh::policy::authorize::Denial;
use ztunnel_mesh::policy::authorize::Permit;
use ztunnel_mesh::policy::authorize::authorize;
use ztunnel_mesh::policy::authorize::is_settled;
use ztunnel_mesh::store::gap::SETTLED_AFTER;
use ztunnel_mesh::store::gap::SETTLED_WITHIN;
use ztunnel_mesh::store::index::Mesh;

use crate::proxy::reauthorization::facts::Facts;

/// Follows the versions of the mesh.
#[derive(Debug)]
pub(super) struct Settling {
    settled: Arc<Mesh>,
    /// The newest version's, of what workloads' policies are.
    newest: u64,
    /// When that began to change, and changed last, since it was settled.
    changing: Option<(Instant, Instant)>,
}

impl Settling {
    /// Begins with a mesh that counts as it is.
    pub(super) fn new(mesh: Arc<Mesh>) -> Self {
        Self { newest: mesh.authorization_version(), settled: mesh, changing: None }
    }

    /// The last version of which all parts had come.
    pub(super) fn settled(&self) -> &Arc<Mesh> {
        &self.settled
    }

    /// `mesh` is the newest version at `now`. Says whether anything has changed by which connections are authorized.
    pub(super) fn observe(&mut self, mesh: &Arc<Mesh>, now: Instant) -> bool {
        let version = mesh.authorization_version();
        let changed = version != self.newest;
        if changed {
            self.newest = version;
            let first = self.changing.map_or(now, |(first, _)| first);
            self.changing = Some((first, now));
        }
        let due = self.due().is_none_or(|due| due <= now);
        if due || mesh.is_whole() {
            let settled = self.changing.take().is_some();
            self.settled = Arc::clone(mesh);
            return changed || settled;
        }
        changed
    }

    /// When the newest version will be settled, if nothing changes any more. `None` if it is.
    pub(super) fn due(&self) -> Option<Instant> {
        self.changing.map(|(first, last)| (last + SETTLED_AFTER).min(first + SETTLED_WITHIN))
    }
}

/// What becomes of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may go on.
    Permitted(Permit),
    /// It may not.
    Denied(Denial),
    /// The workload names a policy that the mesh does not have (yet).
    Missing(PolicyKey),
    /// The newest version and the settled one do not say the same: one of them refuses it so, or the settled one does not
    /// know the workload.
    Unsettled(Option<Denial>),
    /// The mesh does not have the workload (any more), and so says nothing of its connections.
    Gone,
}

/// Authorizes a connection by the newest version of the mesh and the settled one.
pub(super) fn verdict(settled: &Mesh, mesh: &Mesh, facts: &Facts) -> Verdict {
    let Some(now) = decide(mesh, facts) else { return Verdict::Gone };
    if settled.authorization_version() != mesh.authorization_version() {
        let before = decide_before(settled, mesh, facts);
        if !matches!(now, Decision::Undecided(_)) && !is_settled(before.as_ref(), &now) {
            let refused = |decision: Decision| decision.last().err();
            return Verdict::Unsettled(refused(now).or_else(|| refused(before?)));
        }
    }
    match now {
        Decision::Undecided(missing) => Verdict::Missing(missing),
        Decision::Permitted(permit) => Verdict::Permitted(permit),
        Decision::Denied(denial) => Verdict::Denied(denial),
    }
}

fn decide(mesh: &Mesh, facts: &Facts) -> Option<Decision> {
    let policies = mesh.policies_of(mesh.workload(&facts.workload)?);
    Some(authorize(policies.known(), policies.missing(), &facts.inbound()))
}

/// What the settled version says, with those of its policies that had not come then and have come since. With nothing
/// else: what the workload names now, or no longer, is for the newest version to say.
fn decide_before(settled: &Mesh, newest: &Mesh, facts: &Facts) -> Option<Decision> {
    let policies = settled.policies_of(settled.workload(&facts.workload)?).completed_by(newest);
    Some(authorize(policies.known(), policies.missing(), &facts.inbound()))
}
