//! The last good mesh in a file, so that a proxy that starts while the control plane is away serves what was known.
//!
//! A thread of its own reads the file once and then writes. Nobody waits for it: what it has not written yet is kept by
//! name, the newest state only, so that it never holds more than one mesh however slow the disk is.
//!
//! Nothing is written before the control plane was believed once in every type: a file always says what a whole mesh
//! was. What it holds is no secret, but who can write it decides who may talk to whom: it is made for its owner alone
//! and believed only if nobody else can have written it. `file` says what is in it and what damage means.
//!
//! A new file is on the disk before it takes the place of the old one. What is appended to it is the kernel's to write
//! when it likes: a process that dies loses nothing of it, a machine that fails loses the last changes, which the
//! control plane tells again. The time of its last change is when the mesh was last known to be good: it is set once a
//! minute while there is a stream.

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::SystemTime;

use parking_lot::Condvar;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::oneshot;
use ztunnel_proto::discovery::Resource;

use crate::xds::cache::file::Batch;
use crate::xds::cache::file::Log;
use crate::xds::cache::file::Unusable;
use crate::xds::counts::Counts;
use crate::xds::counts::Loaded;
use crate::xds::session::Accepted;
use crate::xds::session::Kind;

mod file;

#[cfg(test)]
mod tests;

/// What was last confirmed so long ago is not believed any more: addresses have other owners by then, and certificates
/// of that time have ended.
const AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How long changes are gathered before they are written together.
const GATHER: Duration = Duration::from_secs(1);
/// How often a file that needs no change is said to be good still.
const CONFIRM_EVERY: Duration = Duration::from_secs(60);
/// Until what could not be written is tried again: after one failure, and after many.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What a file held.
#[derive(Debug)]
pub(super) struct Stored {
    /// By kind.
    pub(super) resources: [Vec<Resource>; 2],
    /// How long ago it was known to be good.
    pub(super) age: Duration,
}

/// What a file of `scope` holds, by kind.
#[cfg(feature = "fuzzing")]
pub(crate) fn contents(file: &File, scope: &str) -> Result<[Vec<Resource>; 2], Box<dyn Error>> {
    Ok(file::scan(file, scope, file.metadata()?.len())?.resources(file)?)
}

/// What is known of the mesh and may not be written yet.
#[derive(Debug, Default)]
struct State {
    pending: Batch,
    /// With what the file has it is a whole mesh, as it was between two responses.
    settled: bool,
    /// There is a stream.
    connected: bool,
    /// What the file had is not part of the mesh: said before anything else is.
    disowned: bool,
    /// Nothing more comes.
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Waits while `condition` holds, and no longer than `time`.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        time: Duration,
        condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.wake.wait_while_for(&mut state, condition, time);
        state
    }
}

/// Hands to the writer what becomes of the mesh. The writer ends when this is dropped.
#[derive(Debug)]
pub(super) struct Cache(Arc<Shared>, Arc<Counts>);

impl Drop for Cache {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.wake.notify_all();
    }
}

impl Cache {
    /// Reads what is at `path` for `scope` on a thread of its own, which then waits for changes to write.
    pub(super) fn open(
        path: PathBuf,
        scope: String,
        counts: Arc<Counts>,
    ) -> io::Result<(Self, oneshot::Receiver<Option<Stored>>)> {
        let shared = Arc::new(Shared::default());
        let (sender, stored) = oneshot::channel();
        let cache = Self(Arc::clone(&shared), Arc::clone(&counts));
        let mut writer = Writer { shared, path, scope, counts, base: None, log: None, given_up: false };
        thread::Builder::new().name("mesh-cache".to_owned()).spawn(move || {
            let found = writer.load();
            // Without one who waits for it, it will have been disowned.
            let _not_waited_for = sender.send(found);
            writer.run();
        })?;
        Ok((cache, stored))
    }

    /// Takes what was accepted, in the middle of a response.
    pub(super) fn note(&self, kind: Kind, accepted: Vec<Accepted>) {
        let mut state = self.0.lock();
        state.pending.extend(accepted.into_iter().map(|it| ((kind, it.name), it.resource)));
        state.settled = false;
        self.1.cache_pending(state.pending.len());
    }

    /// Says that a response is at its end, and what was taken so far, with what the file had, a whole mesh.
    pub(super) fn settle(&self) {
        self.0.lock().settled = true;
        self.0.wake.notify_all();
    }

    /// Says whether there is a stream: what is known is good as of now.
    pub(super) fn connected(&self, connected: bool) {
        self.0.lock().connected = connected;
    }

    /// Says that what was in the file is not part of the mesh.
    pub(super) fn disown(&self) {
        self.0.lock().disowned = true;
    }
}

/// The writer's thread.
struct Writer {
    shared: Arc<Shared>,
    path: PathBuf,
    scope: String,
    counts: Arc<Counts>,
    /// What a new file begins with: a file, and how much of it.
    base: Option<(File, u64)>,
    /// The file that is written.
    log: Option<Log>,
    /// Another process has begun to write.
    given_up: bool,
}

impl Writer {
    fn load(&mut self) -> Option<Stored> {
        let mut torn = false;
        let mut load = || -> Result<_, Unusable> {
            let file = file::open(&self.path)?;
            let about = file.metadata()?;
            // A clock that went back makes nothing older.
            let age = SystemTime::now().duration_since(about.modified()?).unwrap_or_default();
            if age > AGE_MAX {
                return Err(Unusable::Expired(age.as_secs() / 3600));
            }
            let scan = file::scan(&file, &self.scope, about.len())?;
            let resources = scan.resources(&file)?;
            torn = scan.torn;
            Ok((file, scan.end, Stored { resources, age }))
        };
        let path = self.path.display();
        match load() {
            Ok((file, end, stored)) => {
                if torn {
                    tracing::warn!(%path, "the end of the mesh cache is damaged: what comes before it is used");
                }
                self.counts.cache_loaded(if torn { Loaded::Torn } else { Loaded::Whole });
                self.counts.cache_bytes(end);
                self.base = Some((file, end));
                Some(stored)
            }
            Err(Unusable::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                self.counts.cache_loaded(Loaded::Absent);
                None
            }
            Err(unusable) => {
                let result = match unusable {
                    Unusable::Io(_) => Loaded::Unreadable,
                    Unusable::Foreign(_) => Loaded::Foreign,
                    Unusable::Damaged => Loaded::Damaged,
                    Unusable::Expired(_) => Loaded::Expired,
                };
                self.counts.cache_loaded(result);
                tracing::warn!(%path, error = &unusable as &dyn Error, "the mesh cache is not used");
                None
            }
        }
    }

    fn run(&mut self) {
        let mut retry = RETRY.0;
        loop {
            let shared = Arc::clone(&self.shared);
            let due = |state: &mut State| state.settled && !state.pending.is_empty();
            let mut state = shared.wait(shared.lock(), CONFIRM_EVERY, |state| !state.ended && !due(state));
            if std::mem::take(&mut state.disowned) {
                self.base = None;
            }
            if due(&mut state) {
                state = shared.wait(state, GATHER, |state| !state.ended);
                // Not in the middle of a response.
                state = shared.wait(state, CONFIRM_EVERY, |state| !state.ended && !due(state));
                if !due(&mut state) {
                    continue;
                }
                let batch = std::mem::take(&mut state.pending);
                drop(state);
                match self.write(&batch) {
                    Ok(()) => {
                        retry = RETRY.0;
                        let state = shared.lock();
                        self.counts.cache_pending(state.pending.len());
                    }
                    Err(error) => {
                        self.counts.cache_written(false);
                        let path = self.path.display();
                        tracing::warn!(%path, error = &error as &dyn Error, again_in = ?retry, "cannot write the mesh cache");
                        let mut state = shared.lock();
                        // What came since is newer.
                        for (name, old) in batch {
                            state.pending.entry(name).or_insert(old);
                        }
                        if shared.wait(state, retry, |state| !state.ended).ended {
                            return;
                        }
                        retry = (retry * 2).min(RETRY.1);
                    }
                }
                continue;
            }
            let (ended, connected) = (state.ended, state.connected);
            drop(state);
            if ended {
                return;
            }
            if connected && !self.given_up {
                self.confirm();
            }
        }
    }

    fn write(&mut self, batch: &Batch) -> Result<(), Unusable> {
        if let Some(log) = &self.log {
            // Where there is nothing any more, a new one is made.
            self.given_up |= log.is_replaced(&self.path).unwrap_or(false);
        }
        if self.given_up {
            return Ok(());
        }
        match self.log.take() {
            Some(mut log) if !log.is_long() && self.path.exists() => {
                let before = log.length;
                if let Err(error) = log.append(batch) {
                    // What is behind the last mark is half of something.
                    self.base = Some((log.file, before));
                    return Err(error.into());
                }
                self.log = Some(log);
            }
            Some(log) => {
                self.base = Some((log.file, log.length));
                self.rewrite(batch)?;
            }
            None => self.rewrite(batch)?,
        }
        self.counts.cache_written(true);
        self.counts.cache_bytes(self.log.as_ref().map_or(0, |log| log.length));
        Ok(())
    }

    fn rewrite(&mut self, batch: &Batch) -> Result<(), Unusable> {
        let log = match &self.base {
            None => Log::create(&self.path, &self.scope, None, batch)?,
            Some((file, end)) => {
                let scan = file::scan(file, &self.scope, *end)?;
                Log::create(&self.path, &self.scope, Some((file, &scan)), batch)?
            }
        };
        self.base = None;
        self.log = Some(log);
        Ok(())
    }

    fn confirm(&self) {
        // Before the first change the file is still the one that was read, and as good.
        let file =
            self.log.as_ref().map(|log| &log.file).or_else(|| self.base.as_ref().map(|(file, _)| file));
        if let Some(Err(error)) = file.map(|file| file.set_modified(SystemTime::now())) {
            let path = self.path.display();
            tracing::debug!(%path, error = &error as &dyn Error, "cannot say that the mesh cache is good");
        }
    }
}
