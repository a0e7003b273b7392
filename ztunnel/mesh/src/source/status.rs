//! How a source of pods and mesh stands: whether what it says last is in force, and if not, why. And the wish that it be
//! read again.
//!
//! Written by whoever carries the source out, read by whoever is asked: readiness, metrics, dumps.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

/// What the operator can do about a version that is held.
pub const REMEDY: &str = "if that is meant: ztunnel reload --force";

/// Reasons that are kept of a version that is rejected.
const REASONS_MAX: usize = 20;

/// Wishes that may wait. Whoever wishes when it is full waits.
const WISHES: usize = 4;

/// Why the last version is not in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// It has errors.
    Rejected,
    /// It takes away what it should perhaps not: it waits until it has stayed so for a while.
    Waiting,
    /// Likewise, until somebody confirms it.
    Held,
}

impl Trouble {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Waiting => "waiting",
            Self::Held => "held",
        }
    }
}

/// A version that is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What it is a version of.
    pub what: &'static str,
    /// Why, in a word.
    pub trouble: Trouble,
    /// Why, line by line; the first few, and how many there are in all.
    pub reasons: Vec<String>,
    /// How many reasons there are.
    pub count: usize,
    /// Since when the version in force is not the last one.
    pub since: SystemTime,
}

/// One line, for a person.
impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.reasons.first().map_or("no reason is known", String::as_str);
        match self.trouble {
            Trouble::Rejected => write!(f, "{} is rejected: {reason}", self.what)?,
            Trouble::Waiting => write!(f, "{} waits for a moment: {reason}", self.what)?,
            Trouble::Held => write!(f, "{} is held: {reason}; {REMEDY}", self.what)?,
        }
        if self.count > 1 { write!(f, " (and {} more)", self.count - 1) } else { Ok(()) }
    }
}

/// How many versions came to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Carried out.
    pub applied: u64,
    /// Rejected for their errors.
    pub rejected: u64,
    /// Kept waiting or held when they came.
    pub held: u64,
}

#[derive(Debug, Default)]
struct State {
    refused: BTreeMap<&'static str, Refused>,
    tally: Tally,
}

/// How the sources of a daemon stand. Cheap to clone; each clone speaks of one of them.
#[derive(Debug, Clone)]
pub struct Source {
    what: &'static str,
    state: Arc<Mutex<State>>,
}

impl Default for Source {
    fn default() -> Self {
        Self { what: "the last change of the mesh files", state: Arc::default() }
    }
}

impl Source {
    /// To speak of another source of the same daemon; `what`: what a version of it is called.
    pub fn of(&self, what: &'static str) -> Self {
        Self { what, state: Arc::clone(&self.state) }
    }

    /// What a version of it is called.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// The last version is in force.
    pub fn applied(&self) {
        let mut state = self.state();
        state.refused.remove(self.what);
        state.tally.applied += 1;
    }

    /// The last version is not in force; `new`: it has just come.
    pub fn refused(&self, trouble: Trouble, reasons: Vec<String>, new: bool) {
        let mut state = self.state();
        if new {
            match trouble {
                Trouble::Rejected => state.tally.rejected += 1,
                Trouble::Waiting | Trouble::Held => state.tally.held += 1,
            }
        }
        let what = self.what;
        let since = state.refused.get(what).map_or_else(SystemTime::now, |refused| refused.since);
        let count = reasons.len();
        let reasons = reasons.into_iter().take(REASONS_MAX).collect();
        state.refused.insert(what, Refused { what, trouble, reasons, count, since });
    }

    /// Nothing of it is refused any more, though no version has come.
    pub fn cleared(&self) {
        self.state().refused.remove(self.what);
    }

    /// What of this source is not in force, if anything.
    pub fn refusal(&self) -> Option<Refused> {
        self.state().refused.get(self.what).cloned()
    }

    /// What of all of the daemon's sources is not in force.
    pub fn refusals(&self) -> Vec<Refused> {
        self.state().refused.values().cloned().collect()
    }

    /// How many versions came to what.
    pub fn tally(&self) -> Tally {
        self.state().tally
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one step, so a panic elsewhere in the holder leaves nothing half done.
        self.state.lock()
    }
}

/// A wish that the source be read again.
#[derive(Debug)]
pub struct Reload {
    /// Whatever it takes away is meant.
    pub force: bool,
    /// Where it is told what came of it.
    pub answer: oneshot::Sender<Result<String, String>>,
}

/// Where one wishes that the source be read again.
#[derive(Debug, Clone)]
pub struct Reloader(mpsc::Sender<Reload>);

/// Wishes, from whoever has them to whoever carries the source out.
pub fn reloads() -> (Reloader, mpsc::Receiver<Reload>) {
    let (sender, receiver) = mpsc::channel(WISHES);
    (Reloader(sender), receiver)
}

impl Reloader {
    /// Wishes it, and waits for what comes of it; `None` where nobody carries a source out any more.
    pub async fn reload(&self, force: bool) -> Option<Result<String, String>> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Reload { force, answer }).await.ok()?;
        answered.await.ok()
    }
}
