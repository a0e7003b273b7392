//! Decides which certificate is asked for next. Pure: time and chance come in as arguments.
//!
//! ```text
//!            want / retain                 next                 issued
//!   (absent) ─────────────▶ Queued ─────────────▶ Issuing ─────────────▶ Held ──┐ half of its life is over
//!                             ▲                      │ failed                    │
//!                             ├──── the delay ── BackingOff                      │
//!                             └──────────────────────────────────────────────────┘
//! ```
//! A certificate that is held stays usable in every one of these states, from its first moment to its last. A clock
//! that is set can take it beyond either: then it is asked for anew.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_tls::validity::Validity;

/// So many requests are under way at once, as Istio's: an authority serves many nodes.
pub(super) const CONCURRENT_MAX: usize = 8;
/// The delay after a first failure; it doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// No delay is longer, so that an authority that is back is noticed soon.
const BACKOFF_MAX: Duration = Duration::from_secs(150);
/// How far a delay may be off its nominal length, so that nodes do not ask in step.
const BACKOFF_JITTER: f64 = 0.2;
/// How far a renewal may be off half-life, as a share of the half-life.
const RENEWAL_JITTER: f64 = 0.1;
/// A certificate is never renewed sooner than this after it came, however short its life.
const RENEWAL_MIN: Duration = Duration::from_secs(1);
/// A connection that waits pulls a retry forward to so long after the last attempt, which bounds how often the
/// authority is asked, whatever the number of connections.
const PULLED_MIN: Duration = Duration::from_secs(5);
/// Renewals for a common reason are spread over so long.
const SPREAD: Duration = Duration::from_secs(60);
/// A connection waits for a retry that is no further away than this; otherwise it hears of the failure at once.
const PATIENCE: Duration = Duration::from_secs(3);
/// Wall-clock times are compared at least so often: the clock may be set, or the machine may have slept.
pub(super) const LOOK_MAX: Duration = Duration::from_secs(60);

/// Both clocks, read together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// For delays.
    pub(super) mono: Instant,
    /// For what certificates say.
    pub(super) wall: SystemTime,
}

/// Who is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Priority {
    /// A connection waits for it.
    Waiting,
    /// One is held, and ends some day.
    Renewal,
    /// Nobody needs it yet.
    WarmUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued { priority: Priority, sequence: u64 },
    Issuing,
    BackingOff { since: Instant, until: Instant },
    Held,
}

/// The times of a certificate that is held; of two, where one takes over from the other in time.
#[derive(Debug, Clone, Copy)]
struct Held {
    renew_at: SystemTime,
    validity: Validity,
    came: Instant,
}

impl Held {
    /// `jitter` is between -1 and 1.
    fn new(validity: Validity, now: Now, jitter: f64) -> Self {
        let planned = validity.from + (validity.life() / 2).mul_f64(1.0 + RENEWAL_JITTER * jitter);
        let renew_at = if planned > now.wall {
            planned
        } else {
            // It came late in its life: make do with half of what is left.
            now.wall + validity.left(now.wall) / 2
        };
        Self { renew_at: renew_at.max(now.wall + RENEWAL_MIN), validity, came: now.mono }
    }

    /// Whether another one is to be asked for.
    fn is_due(&self, now: Now) -> bool {
        self.renew_at <= now.wall
            || (!self.validity.holds_at(now.wall) && self.came + RENEWAL_MIN <= now.mono)
    }

    /// When that will be so, if nobody sets the clock.
    fn due_in(&self, now: Now) -> Duration {
        let by_plan = self.renew_at.duration_since(now.wall).unwrap_or_default();
        let ends =
            if self.validity.is_ahead(now.wall) { Duration::ZERO } else { self.validity.left(now.wall) };
        by_plan.min(ends.max((self.came + RENEWAL_MIN).saturating_duration_since(now.mono)))
    }
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    held: Option<Held>,
    /// Consecutive failures.
    failures: u32,
    /// A local workload has this identity, so it is renewed without being asked for.
    retained: bool,
    /// A connection waits for the outcome.
    waiting: bool,
}

impl Entry {
    fn usable(&self, wall: SystemTime) -> bool {
        self.held.is_some_and(|held| held.validity.holds_at(wall))
    }

    fn priority(&self, wall: SystemTime) -> Priority {
        match (self.waiting, self.usable(wall)) {
            (true, _) => Priority::Waiting,
            (false, true) => Priority::Renewal,
            (false, false) => Priority::WarmUp,
        }
    }
}

/// What a connection that asks can expect.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outlook {
    /// An answer is being worked on.
    Wait,
    /// The last attempt failed, and the next is too far off to wait for.
    FailedUntil(Instant),
}

/// What follows from a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// The delay before the next attempt; none if nobody wants it any more.
    pub(super) retry_in: Option<Duration>,
    /// Whether those who wait are to be told; otherwise they wait for the retry.
    pub(super) tell: bool,
}

/// What came of an issued certificate.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Issued {
    /// It is to be published.
    Publish,
    /// It is to be published when its time comes: the one that is held lasts until then.
    Later,
    /// Its time has not come, and until then there is none: count it as a failure, and see [`Schedule::in_force`].
    TooEarly,
    /// The identity has left this node meanwhile.
    Unwanted,
}

/// All identities and what is to happen to each.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: HashMap<SpiffeId, Entry>,
    sequence: u64,
}

impl Schedule {
    /// A connection waits for `id`, of which no usable certificate is held.
    pub(super) fn want(&mut self, id: &SpiffeId, now: Now) -> Outlook {
        let sequence = self.next_sequence();
        let Some(entry) = self.entries.get_mut(id) else {
            self.add(id, Priority::Waiting, false);
            return Outlook::Wait;
        };
        if let Phase::BackingOff { since, until } = &mut entry.phase {
            *until = (*until).min((*since + PULLED_MIN).max(now.mono));
        }
        match &mut entry.phase {
            Phase::BackingOff { until, .. } if *until > now.mono + PATIENCE => {
                return Outlook::FailedUntil(*until);
            }
            Phase::BackingOff { .. } | Phase::Issuing => {}
            Phase::Queued { priority, .. } => *priority = Priority::Waiting,
            Phase::Held => entry.phase = Phase::Queued { priority: Priority::Waiting, sequence },
        }
        entry.waiting = true;
        Outlook::Wait
    }

    /// These are the identities of the workloads on the node: adds what is new, and returns what was forgotten.
    pub(super) fn retain(&mut self, ids: &HashSet<SpiffeId>) -> Vec<SpiffeId> {
        let mut forgotten = Vec::new();
        self.entries.retain(|id, entry| {
            entry.retained = ids.contains(id);
            if entry.retained {
                return true;
            }
            if entry.held.take().is_some() {
                forgotten.push(id.clone());
            }
            // What is under way ends first, lest a return of the identity asks a second time.
            entry.waiting || entry.phase == Phase::Issuing
        });
        // In order, so that the same set always leads to the same requests.
        let mut new: Vec<_> = ids.iter().filter(|id| !self.entries.contains_key(*id)).collect();
        new.sort();
        for id in new {
            self.add(id, Priority::WarmUp, true);
        }
        forgotten
    }

    /// Queues what has become due, and returns what has ended without anybody wanting it.
    pub(super) fn tick(&mut self, now: Now) -> Vec<SpiffeId> {
        let mut forgotten = Vec::new();
        let mut due = Vec::new();
        self.entries.retain(|id, entry| {
            let is_due = match entry.phase {
                Phase::Queued { .. } | Phase::Issuing => return true,
                Phase::BackingOff { until, .. } => until <= now.mono,
                Phase::Held => entry.held.is_none_or(|held| held.is_due(now)),
            };
            if entry.retained || entry.waiting {
                if is_due {
                    due.push((entry.priority(now.wall), id.clone()));
                }
                return true;
            }
            // The delay outlives those who waited, or the next of them would cause a request of its own.
            let keep = entry.usable(now.wall) || (matches!(entry.phase, Phase::BackingOff { .. }) && !is_due);
            if keep && is_due {
                entry.phase = Phase::Held;
            } else if !keep {
                forgotten.push(id.clone());
            }
            keep
        });
        due.sort();
        for (priority, id) in due {
            let sequence = self.next_sequence();
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.phase = Phase::Queued { priority, sequence };
            }
        }
        forgotten
    }

    /// The next identity to ask for, if there is one and not too many are under way.
    pub(super) fn next(&mut self) -> Option<SpiffeId> {
        let running = self.entries.values().filter(|entry| entry.phase == Phase::Issuing).count();
        if running >= CONCURRENT_MAX {
            return None;
        }
        let queued = self.entries.iter_mut().filter_map(|(id, entry)| match entry.phase {
            Phase::Queued { priority, sequence } => Some((priority, sequence, id, entry)),
            _ => None,
        });
        let (_, _, id, entry) = queued.min_by_key(|(priority, sequence, ..)| (*priority, *sequence))?;
        entry.phase = Phase::Issuing;
        Some(id.clone())
    }

    /// A certificate of this validity, which is not over, came. `jitter` is between -1 and 1.
    pub(super) fn issued(&mut self, id: &SpiffeId, validity: Validity, now: Now, jitter: f64) -> Issued {
        let Some(entry) = self.entries.get_mut(id) else {
            return Issued::Unwanted;
        };
        if !entry.retained && !entry.waiting {
            self.entries.remove(id);
            return Issued::Unwanted;
        }
        let mut held = Held::new(validity, now, jitter);
        let issued = match entry.held.map(|before| before.validity) {
            _ if !validity.is_ahead(now.wall) => Issued::Publish,
            Some(before) if before.holds_at(now.wall) && validity.from <= before.until => {
                held.validity.from = before.from;
                Issued::Later
            }
            _ => return Issued::TooEarly,
        };
        entry.held = Some(held);
        entry.phase = Phase::Held;
        entry.failures = 0;
        entry.waiting = false;
        issued
    }

    /// The time has come of a certificate that was [`Issued::TooEarly`]. False if nobody wants it any more.
    pub(super) fn in_force(&mut self, id: &SpiffeId, validity: Validity, now: Now, jitter: f64) -> bool {
        let Some(entry) = self.entries.get_mut(id) else { return false };
        if entry.usable(now.wall) {
            return true;
        }
        entry.held = Some(Held::new(validity, now, jitter));
        entry.waiting = false;
        // A request that is under way ends first, lest there be a second one.
        if entry.phase != Phase::Issuing {
            entry.phase = Phase::Held;
            entry.failures = 0;
        }
        true
    }

    /// Whether a request for `id` is under way, and nothing can be used until it ends.
    pub(super) fn is_awaited(&self, id: &SpiffeId, now: Now) -> bool {
        let awaited = |entry: &Entry| entry.phase == Phase::Issuing && !entry.usable(now.wall);
        self.entries.get(id).is_some_and(awaited)
    }

    /// Whether anything is known of `id`.
    pub(super) fn knows(&self, id: &SpiffeId) -> bool {
        self.entries.contains_key(id)
    }

    /// Somebody has set the clock, which may have been why requests failed: none waits for its next turn.
    pub(super) fn clock_was_set(&mut self, now: Now) {
        for entry in self.entries.values_mut() {
            if let Phase::BackingOff { until, .. } = &mut entry.phase {
                *until = (*until).min(now.mono);
            }
        }
    }

    /// An earlier daemon has left a certificate of this validity, which holds now: it is kept if a workload here has the
    /// identity.
    pub(super) fn inherit(&mut self, id: &SpiffeId, validity: Validity, now: Now, jitter: f64) {
        let entry = Entry { phase: Phase::Issuing, held: None, failures: 0, retained: true, waiting: false };
        self.entries.insert(id.clone(), entry);
        self.issued(id, validity, now, jitter);
        if let Some(entry) = self.entries.get_mut(id) {
            entry.retained = false;
        }
    }

    /// The attempt failed. `jitter` is between -1 and 1.
    pub(super) fn failed(&mut self, id: &SpiffeId, now: Now, jitter: f64) -> Failed {
        let Some(entry) = self.entries.get_mut(id) else {
            return Failed { retry_in: None, tell: true };
        };
        let nominal = BACKOFF_FIRST.saturating_mul(1 << entry.failures.min(8)).min(BACKOFF_MAX);
        let delay = nominal.mul_f64(1.0 + BACKOFF_JITTER * jitter).min(BACKOFF_MAX);
        if !entry.retained && !entry.waiting && !entry.usable(now.wall) {
            self.entries.remove(id);
            return Failed { retry_in: None, tell: true };
        }
        entry.failures += 1;
        let tell = delay > PATIENCE;
        entry.waiting &= !tell;
        entry.phase = Phase::BackingOff { since: now.mono, until: now.mono + delay };
        Failed { retry_in: Some(delay), tell }
    }

    /// Renews what is held and retained soon, and what is `exempt` not. `chance` gives numbers between -1 and 1.
    pub(super) fn renew_all(&mut self, exempt: &SpiffeId, now: Now, mut chance: impl FnMut() -> f64) {
        let mut held: Vec<_> =
            self.entries.iter_mut().filter(|(id, entry)| *id != exempt && entry.retained).collect();
        // In order, so that the same chances always lead to the same requests.
        held.sort_by_key(|(id, _)| *id);
        for held in held.into_iter().filter_map(|(_, entry)| entry.held.as_mut()) {
            held.renew_at = held.renew_at.min(soon(now, chance()));
        }
    }

    /// Renews `id` soon, if it is held, and retained by then. `chance` is between -1 and 1.
    pub(super) fn renew_soon(&mut self, id: &SpiffeId, now: Now, chance: f64) {
        if let Some(held) = self.entries.get_mut(id).and_then(|entry| entry.held.as_mut()) {
            held.renew_at = held.renew_at.min(soon(now, chance));
        }
    }

    /// Renews `id` at once, if it is held and retained.
    pub(super) fn renew(&mut self, id: &SpiffeId, now: Now) {
        if let Some(held) =
            self.entries.get_mut(id).filter(|entry| entry.retained).and_then(|entry| entry.held.as_mut())
        {
            held.renew_at = held.renew_at.min(now.wall);
        }
    }

    /// Any identity that is held and retained: the first by name.
    pub(super) fn any(&self) -> Option<SpiffeId> {
        let held = self.entries.iter().filter(|(_, entry)| entry.retained && entry.held.is_some());
        held.map(|(id, _)| id).min().cloned()
    }

    /// When [`Schedule::tick`] should be called again, if nothing else happens before.
    pub(super) fn wake_at(&self, now: Now) -> Instant {
        let due = self.entries.values().filter_map(|entry| match entry.phase {
            Phase::Queued { .. } | Phase::Issuing => None,
            Phase::BackingOff { until, .. } => Some(until),
            Phase::Held => entry.held.map(|held| {
                let due = if entry.retained { held.due_in(now) } else { held.validity.left(now.wall) };
                now.mono + due.min(LOOK_MAX)
            }),
        });
        due.min().unwrap_or(now.mono + LOOK_MAX)
    }

    fn add(&mut self, id: &SpiffeId, priority: Priority, retained: bool) {
        let phase = Phase::Queued { priority, sequence: self.next_sequence() };
        let waiting = priority == Priority::Waiting;
        self.entries.insert(id.clone(), Entry { phase, held: None, failures: 0, retained, waiting });
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }
}

/// Some time within [`SPREAD`]. `chance` is between -1 and 1.
fn soon(now: Now, chance: f64) -> SystemTime {
    now.wall + SPREAD.mul_f64(f64::midpoint(chance, 1.0).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests;
