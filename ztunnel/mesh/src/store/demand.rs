//! Questions for what the mesh does not know: who decides asks by name and waits a little, the source of the mesh
//! subscribes, and answers once the mesh has what it found.
//!
//! One name is asked for once, however many wait for it, and that it is not there is remembered for a while, as long as
//! the source would tell if that changed. All of it is bounded: names, and who waits for one. Without an answer in time
//! there is none: that the mesh has no such name is never guessed.
//!
//! ```text
//!            ask                 answered: it is there
//! (nothing) ─────▶ Asked ──────────────────────────────▶ Found ── removed, or asked for again later ─▶ (nothing)
//!     ▲              │ answered: it is not there           ▲
//!     │              ▼                                     │ it came later
//!     └─ expired ─ Absent ─────────────────────────────────┘
//! ```
//!
//! What expires is unsubscribed from, and asked for anew when it is wanted again. While there is no source nothing
//! expires: what was not there before is taken not to be there still.
//!
//! What is there is unsubscribed from when nobody used it for long, or when there is too much of it, and is no longer in
//! the mesh then. Who uses something touches it ([`Demand::touch`]), which costs a hash and two relaxed
//! accesses; what the control plane is told, and when, is the other end's work ([`Demands::unused`],
//! [`Demands::unsubscribe`]).

use std::collections::HashMap;
use std::hash::DefaultHasher;
use std::hash::Hash;
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::Notify;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep_until;
use tokio::time::timeout;

use crate::store::demand::unused::Bounds;
use crate::store::demand::unused::Epoch;
use crate::store::index::Mesh;

#[cfg(test)]
mod tests;
mod unused;

/// Use is recorded to a part like this of [`Config::unused_for`].
const EPOCHS: u32 = 30;
/// Places where use is recorded: 256 KiB, and some times as many as there are names, mostly.
const PLACES: usize = 1 << 16;
/// How many times [`Config::found_max`] there may be while all of it is in use. Then nothing more is asked for.
const CROWD: usize = 4;
/// How long after it was told not to send something any more the source may send it: it had not read it then. One that
/// takes longer has long lost its stream.
const LATE: Duration = Duration::from_secs(300);

/// The bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How long one question is waited for.
    pub wait: Duration,
    /// How long it is remembered that a name is not there, or that nobody answered and nobody waits any more.
    pub absent_for: Duration,
    /// Names that are asked for or known not to be there. Of more the oldest that nobody waits for is forgotten; if
    /// all are waited for there is no answer.
    pub names_max: usize,
    /// Who may wait for one name. For more there is no answer.
    pub waiters_max: usize,
    /// How long what was found, or came by itself, is kept while nobody uses it: longer than what is used at all pauses
    /// (a job each quarter of an hour, say), as asking again costs a connection the time of an answer.
    pub unused_for: Duration,
    /// How much of that there may be. Of more, what was not used for longest is unsubscribed from. What is in use stays, up to
    /// four times as much; beyond that there are no answers.
    pub found_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            wait: Duration::from_secs(1),
            absent_for: Duration::from_secs(60),
            names_max: 4096,
            waiters_max: 1024,
            unused_for: Duration::from_secs(30 * 60),
            // Some tens of MiB.
            found_max: 16_384,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Too much is asked for.
    #[error("too many look-ups are under way")]
    Busy,
    /// It did not come in time.
    #[error("the control plane did not answer in {0:?}")]
    Late(Duration),
}

/// What was asked, in all.
#[derive(Debug, Default)]
pub struct Tally {
    answered: AtomicU64,
    known: AtomicU64,
    late: AtomicU64,
    busy: AtomicU64,
    unsubscribed: AtomicU64,
}

impl Tally {
    /// How many questions ended how, by name.
    pub fn results(&self) -> [(&'static str, u64); 4] {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("answered", count(&self.answered)),
            ("known", count(&self.known)),
            ("late", count(&self.late)),
            ("busy", count(&self.busy)),
        ]
    }

    /// How much that was there was unsubscribed from.
    pub fn unsubscribed(&self) -> u64 {
        self.unsubscribed.load(Ordering::Relaxed)
    }
}

/// When what was used last, by name.
#[derive(Debug)]
struct Uses {
    now: AtomicU32,
    /// By a hash of the name. Who shares a place is kept as long as the other is.
    places: Box<[AtomicU32]>,
}

impl Uses {
    fn new() -> Self {
        Self { now: AtomicU32::new(1), places: (0..PLACES).map(|_| AtomicU32::new(0)).collect() }
    }

    fn now(&self) -> Epoch {
        self.now.load(Ordering::Relaxed)
    }

    fn place(&self, name: &str) -> &AtomicU32 {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        &self.places[hasher.finish() as usize % PLACES]
    }

    fn record(&self, name: &str) {
        let (now, place) = (self.now(), self.place(name));
        // Mostly it is known already, and other threads' copy of it stays good.
        if place.load(Ordering::Relaxed) != now {
            place.store(now, Ordering::Relaxed);
        }
    }
}

/// How it stands with a name.
#[derive(Debug)]
enum Entry {
    /// It was asked for, at this time. Who waits has a receiver, and is told by its end.
    Asked { answered: watch::Sender<()>, at: Instant },
    /// It was not there, at this time.
    Absent { at: Instant },
    /// It was there, at this time.
    Found { at: Instant },
}

impl Entry {
    fn asked(now: Instant) -> (Self, watch::Receiver<()>) {
        let (answered, waiting) = watch::channel(());
        (Self::Asked { answered, at: now }, waiting)
    }

    /// From when on it may be forgotten.
    fn idle_since(&self) -> Option<Instant> {
        match self {
            Self::Asked { answered, at } => (answered.receiver_count() == 0).then_some(*at),
            Self::Absent { at } => Some(*at),
            Self::Found { .. } => None,
        }
    }
}

/// What the source is to be told: first what is not asked for any more, then what is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requests {
    /// No longer asked for.
    pub unsubscribe: Vec<Arc<str>>,
    /// Asked for.
    pub subscribe: Vec<Arc<str>>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<Arc<str>, Entry>,
    /// Those of them that were found.
    found: usize,
    /// By what the source calls it, what is there.
    there: HashMap<Box<str>, There>,
    /// What the source was told not to send any more, and when.
    unsubscribed: HashMap<Box<str>, Instant>,
    /// There is a source that hears what is said. One that comes is told all.
    connected: bool,
    /// What it is to be told. No longer than there are names.
    requests: Requests,
}

/// Something that is there.
#[derive(Debug)]
struct There {
    /// As what it was asked for and found so.
    asked: Vec<Arc<str>>,
    since: Epoch,
}

/// What is done with a question.
enum Asked {
    Wait(watch::Receiver<()>),
    Known,
    Busy,
}

impl Table {
    fn ask(&mut self, name: &str, config: &Config, now: Instant) -> Asked {
        match self.entries.get_mut(name) {
            Some(Entry::Absent { .. }) => return Asked::Known,
            // Who asks looked before it was found, or the mesh knows no more of it than that it is there.
            Some(Entry::Found { at }) if now < *at + config.absent_for => return Asked::Known,
            Some(Entry::Asked { answered, .. }) if answered.receiver_count() < config.waiters_max => {
                return Asked::Wait(answered.subscribe());
            }
            Some(Entry::Asked { .. }) => return Asked::Busy,
            Some(Entry::Found { .. }) => self.forget(name),
            None => {}
        }
        if self.there.len() >= config.found_max.saturating_mul(CROWD) {
            return Asked::Busy;
        }
        while self.entries.len() - self.found >= config.names_max {
            let idle = self.entries.iter().filter_map(|(name, entry)| Some((entry.idle_since()?, name)));
            let Some((_, oldest)) = idle.min_by_key(|(since, _)| *since) else { return Asked::Busy };
            let oldest = Arc::clone(oldest);
            self.forget(&oldest);
        }
        let name: Arc<str> = Arc::from(name);
        let (entry, waiting) = Entry::asked(now);
        self.entries.insert(Arc::clone(&name), entry);
        if self.connected {
            self.requests.subscribe.push(name);
        }
        Asked::Wait(waiting)
    }

    fn forget(&mut self, name: &str) {
        let Some((name, entry)) = self.entries.remove_entry(name) else { return };
        self.found -= usize::from(matches!(entry, Entry::Found { .. }));
        let subscribe = &mut self.requests.subscribe;
        match subscribe.iter().position(|other| *other == name) {
            Some(at) => {
                subscribe.remove(at);
            }
            None if self.connected => self.requests.unsubscribe.push(name),
            None => {}
        }
    }

    /// Who waits is told by the end of what is replaced.
    fn is_there(&mut self, name: &str, aliases: &[String], (now, epoch): (Instant, Epoch)) {
        // It was sent before the source read that it is not wanted, so it is not sure that changes of it are sent.
        if self.unsubscribed.remove(name).is_some() && self.connected {
            self.requests.subscribe.push(Arc::from(name));
        }
        if !self.there.contains_key(name) {
            self.there.insert(Box::from(name), There { asked: Vec::new(), since: epoch });
        }
        for asked in std::iter::once(name).chain(aliases.iter().map(String::as_str)) {
            let Some(entry) = self.entries.get_mut(asked) else { continue };
            if let Entry::Found { at } = entry {
                *at = now;
                continue;
            }
            *entry = Entry::Found { at: now };
            self.found += 1;
            if let (Some((asked, _)), Some(there)) =
                (self.entries.get_key_value(asked), self.there.get_mut(name))
                && !there.asked.contains(asked)
            {
                there.asked.push(Arc::clone(asked));
            }
        }
    }

    fn is_gone(&mut self, name: &str, now: Instant) {
        // Another may come to be found by the same address, of which nobody would tell.
        self.forget_there(name);
        if let Some(entry @ Entry::Asked { .. }) = self.entries.get_mut(name) {
            *entry = Entry::Absent { at: now };
        }
    }

    /// What it was found by is not asked for any more. Whether its own name is among that.
    fn forget_there(&mut self, name: &str) -> bool {
        let asked = self.there.remove(name).map(|there| there.asked).unwrap_or_default();
        asked.iter().for_each(|asked| self.forget(asked));
        asked.iter().any(|asked| **asked == *name)
    }

    fn unsubscribe(&mut self, name: &str, now: Instant) {
        let is_said = self.forget_there(name);
        if self.connected {
            if !is_said {
                self.requests.unsubscribe.push(Arc::from(name));
            }
            self.unsubscribed.insert(Box::from(name), now);
        }
    }

    /// Forgets what is too old. Gives the time at which to look again.
    fn expire(&mut self, config: &Config, now: Instant) -> Instant {
        let expired =
            |entry: &Entry| entry.idle_since().is_some_and(|since| now >= since + config.absent_for);
        let expired: Vec<Arc<str>> = self
            .entries
            .iter()
            .filter(|(_, entry)| expired(entry))
            .map(|(name, _)| Arc::clone(name))
            .collect();
        expired.iter().for_each(|name| self.forget(name));
        self.unsubscribed.retain(|_, at| now < *at + LATE);
        now + config.absent_for / 4
    }
}

#[derive(Debug)]
struct Shared {
    config: Config,
    table: Mutex<Table>,
    /// There are requests.
    wake: Notify,
    tally: Arc<Tally>,
    uses: Uses,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

/// Asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Demand(Arc<Shared>);

/// Learns what is asked, and answers. There is one.
#[derive(Debug)]
pub struct Demands {
    shared: Arc<Shared>,
    expire_at: Instant,
    epoch_ends: Instant,
    /// There is too much, and all of it is in use.
    in_vain: bool,
}

/// Makes the two ends.
pub fn channel(config: Config) -> (Demand, Demands) {
    let (table, wake, tally) = (Mutex::default(), Notify::new(), Arc::default());
    let shared = Arc::new(Shared { config, table, wake, tally, uses: Uses::new() });
    let now = Instant::now();
    let epoch_ends = now + config.unused_for / EPOCHS;
    (Demand(Arc::clone(&shared)), Demands { shared, expire_at: now, epoch_ends, in_vain: false })
}

impl Demand {
    /// Asks for a name: `network/address`, or a service's `namespace/hostname`. Waits as long as it was configured.
    /// What is there is then in a new snapshot of the mesh.
    pub async fn look_up(&self, name: &str) -> Result<(), NoAnswer> {
        let Shared { config, wake, tally, .. } = &*self.0;
        let asked = self.0.lock().ask(name, config, Instant::now());
        let (result, count) = match asked {
            Asked::Known => (Ok(()), &tally.known),
            Asked::Busy => (Err(NoAnswer::Busy), &tally.busy),
            Asked::Wait(mut waiting) => {
                wake.notify_one();
                match timeout(config.wait, waiting.changed()).await {
                    Ok(_ended) => (Ok(()), &tally.answered),
                    Err(_elapsed) => (Err(NoAnswer::Late(config.wait)), &tally.late),
                }
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// Marks this as used by a connection now: the unique name of a workload, or `namespace/hostname` of a service.
    pub fn touch(&self, name: &str) {
        self.0.uses.record(name);
    }
}

impl Demands {
    /// What was asked, in all.
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.shared.tally)
    }

    /// Begins with a new source: all that it is to be asked for, but what was found. From now on [`Self::next`] tells
    /// what is to be said to it.
    pub fn connected(&mut self) -> Vec<Arc<str>> {
        let mut table = self.shared.lock();
        table.connected = true;
        table.requests = Requests::default();
        table.unsubscribed = HashMap::new();
        let wanted = table.entries.iter().filter(|(_, entry)| !matches!(entry, Entry::Found { .. }));
        wanted.map(|(name, _)| Arc::clone(name)).collect()
    }

    /// The source is gone.
    pub fn disconnected(&mut self) {
        let mut table = self.shared.lock();
        table.connected = false;
        table.requests = Requests::default();
        table.unsubscribed = HashMap::new();
    }

    /// Waits for something to be said to the source. Nothing is lost if the wait is given up.
    pub async fn next(&mut self) -> Requests {
        loop {
            let now = Instant::now();
            {
                let mut table = self.shared.lock();
                if now >= self.expire_at {
                    self.expire_at = table.expire(&self.shared.config, now);
                }
                if table.requests != Requests::default() {
                    return std::mem::take(&mut table.requests);
                }
            }
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = sleep_until(self.expire_at) => {}
            }
        }
    }

    /// Tells those who wait for this by its name, or one of the others it has. The mesh has it.
    pub fn is_there(&self, name: &str, aliases: &[String]) {
        let now = (Instant::now(), self.shared.uses.now());
        self.shared.lock().is_there(name, aliases, now);
    }

    /// Tells those who wait for this that there is none. The mesh has it no more.
    pub fn is_gone(&self, name: &str) {
        self.shared.lock().is_gone(name, Instant::now());
    }

    /// When to look for what is unused.
    pub fn epoch_ends(&self) -> Instant {
        self.epoch_ends
    }

    /// To be called then. However long it was since the last time, nothing ages by more than one epoch: without a
    /// source, what is there is all there will be.
    pub fn next_epoch(&mut self) {
        self.epoch_ends = Instant::now() + self.shared.config.unused_for / EPOCHS;
        self.shared.uses.now.fetch_add(1, Ordering::Relaxed);
        self.in_vain = false;
    }

    /// Whether there is so much that some should be unsubscribed from now.
    pub fn is_crowded(&self) -> bool {
        !self.in_vain && self.shared.lock().there.len() > self.shared.config.found_max
    }

    /// What is to be unsubscribed from, services before their endpoints. Never what belongs to `node`, nor what came or was used
    /// in the last epoch: somebody may be about to decide by it.
    pub fn unused(&mut self, mesh: &Mesh, node: &str) -> Vec<Box<str>> {
        let Shared { config, uses, .. } = &*self.shared;
        let bounds = Bounds { after: EPOCHS, names_max: config.found_max };
        let table = self.shared.lock();
        let last = |name: &str, there: &There| uses.place(name).load(Ordering::Relaxed).max(there.since);
        let names = table.there.iter().map(|(name, there)| (&**name, last(name, there)));
        let unused: Vec<_> =
            unused::unused(mesh, node, names, uses.now(), bounds).into_iter().map(Box::from).collect();
        self.in_vain = table.there.len() - unused.len() > config.found_max;
        unused
    }

    /// Unsubscribes from these, by all names they were asked for. To be called before the mesh has
    /// them no more, so that who misses them then asks anew.
    pub fn unsubscribe(&self, names: &[Box<str>]) {
        let now = Instant::now();
        let mut table = self.shared.lock();
        names.iter().for_each(|name| table.unsubscribe(name, now));
        self.shared.tally.unsubscribed.fetch_add(names.len() as u64, Ordering::Relaxed);
        self.shared.wake.notify_one();
    }
}
