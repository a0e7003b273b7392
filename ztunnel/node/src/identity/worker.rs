//! The one task that owns the node's certificates, and the handle by which they are read.
//!
//! What is asked for when is decided in `schedule`; here it is carried out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use rustls::pki_types::UnixTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_runtime::shutdown;
use ztunnel_tls::ca::{CertificateAuthority, IssueError};
use ztunnel_tls::configs::{Credentials, InvalidCredentials};
use ztunnel_tls::trust::{Learnt, Side, Trust};

use crate::identity::clock;
use crate::identity::schedule::{Issued, LOOK_MAX, Now, Outlook, Schedule};

/// One request to the authority takes no longer. Far longer than anybody waits for its outcome: a request that is given
/// up while the authority still works on it is work for nothing, and the next one comes on top, so that one that is
/// slow would be asked the more often the slower it is, and never answer in time.
const ISSUE_DEADLINE: Duration = Duration::from_secs(60);
/// A connection waits no longer for its certificate. The request for it goes on.
const WAIT_DEADLINE: Duration = Duration::from_secs(5);
/// Questions on their way to the worker. When full, who asks waits for room, within its own deadline.
const QUESTIONS_MAX: usize = 1024;
/// Connections that wait for a certificate. Further ones are refused at once.
const WAITING_MAX: usize = 16 * 1024;

/// Peers whose root is not known have the authority asked for a newer one no more often.
const STRANGERS_EVERY: Duration = Duration::from_secs(300);

/// Why a connection gets no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unavailable {
    /// The authority gave none, and will not be asked again soon.
    #[error("no certificate for {identity}")]
    Failed {
        /// Whose certificate.
        identity: SpiffeId,
        /// What the last attempt ended with.
        source: Arc<IssueError>,
    },
    /// None came in time.
    #[error("no certificate for {identity} within {}", humantime::format_duration(*waited))]
    Late {
        /// Whose certificate.
        identity: SpiffeId,
        /// How long was waited.
        waited: Duration,
        /// What the last attempt ended with, if one did.
        source: Option<Arc<IssueError>>,
    },
    /// Too many connections wait already.
    #[error("no certificate for {0}: too many connections wait for one")]
    Busy(SpiffeId),
    /// The process is ending.
    #[error("no certificate for {0}: the daemon is stopping")]
    Stopped(SpiffeId),
}

/// Time of day and chance, so that tests can choose both.
pub struct Environment {
    /// The time of day, by which certificates end.
    pub wall: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    /// A random number between -1 and 1.
    pub jitter: Box<dyn FnMut() -> f64 + Send>,
}

impl Default for Environment {
    fn default() -> Self {
        Self { wall: Arc::new(SystemTime::now), jitter: Box::new(|| rand::random_range(-1.0..=1.0)) }
    }
}

/// Starts the worker on the runtime of the caller. It ends when `signal` closes or the last handle is gone.
///
/// Peers are judged by `trust`, which learns the authority's roots from each of its answers.
pub fn start(ca: Arc<dyn CertificateAuthority>, trust: Trust, signal: shutdown::Signal) -> Identities {
    start_in(Environment::default(), ca, trust, Vec::new(), signal)
}

/// [`start`] with what an earlier daemon has left.
pub fn start_with(
    ca: Arc<dyn CertificateAuthority>,
    trust: Trust,
    inherited: Vec<Credentials>,
    signal: shutdown::Signal,
) -> Identities {
    start_in(Environment::default(), ca, trust, inherited, signal)
}

/// [`start`] with a time and chance of one's own.
pub fn start_in(
    environment: Environment,
    ca: Arc<dyn CertificateAuthority>,
    trust: Trust,
    inherited: Vec<Credentials>,
    signal: shutdown::Signal,
) -> Identities {
    let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
    let (retained, retain) = watch::channel(Arc::default());
    let (board, posted) = (Arc::new(ArcSwap::default()), watch::Sender::new(()));
    let wall = Arc::clone(&environment.wall);
    let mut worker = Worker {
        ca,
        environment,
        board: Arc::clone(&board),
        posted: posted.clone(),
        schedule: Schedule::default(),
        waiting: HashMap::new(),
        waiting_count: 0,
        trust: trust.clone(),
        held_back: HashMap::new(),
        asked: VecDeque::new(),
        asked_for_roots: None,
    };
    inherited.into_iter().for_each(|credentials| worker.inherit(credentials));
    shutdown::spawn(worker.run(asked, retain, signal));
    Identities { board, posted, wall, questions, retained: Arc::new(retained), trust }
}

/// What is known about one identity.
#[derive(Debug, Clone, Default)]
struct Notice {
    /// The newest certificate that could be used when it came, perhaps ended.
    credentials: Option<Arc<Credentials>>,
    /// What the last attempt ended with, if it failed.
    failure: Option<Arc<IssueError>>,
}

/// How an identity stands, for those who ask.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Whose.
    pub identity: SpiffeId,
    /// The newest certificate, perhaps ended; nothing before the first one came.
    pub credentials: Option<Arc<Credentials>>,
    /// What the last attempt ended with, if it failed.
    pub failure: Option<Arc<IssueError>>,
}

/// Workloads of this node that cannot prove who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// How many identities have no certificate that is valid now, and not because they are new.
    pub lacking: usize,
    /// How many there are on the node.
    pub of: usize,
    /// One of them, and why.
    pub reason: String,
}

impl Shortage {
    /// Whether nobody on the node has one.
    pub fn is_total(&self) -> bool {
        self.lacking == self.of
    }
}

/// A certificate that is not shown yet.
struct HeldBack {
    /// When it will be.
    at: SystemTime,
    credentials: Arc<Credentials>,
}

/// Written by the worker alone.
type Board = ArcSwap<HashMap<SpiffeId, Notice>>;

type Answer = oneshot::Sender<Result<Arc<Credentials>, Unavailable>>;

struct Question {
    id: SpiffeId,
    answer: Answer,
}

/// Reads the node's certificates and asks for more. Cheap to clone.
#[derive(Clone)]
pub struct Identities {
    board: Arc<Board>,
    posted: watch::Sender<()>,
    wall: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    questions: mpsc::Sender<Question>,
    retained: Arc<watch::Sender<Arc<HashSet<SpiffeId>>>>,
    trust: Trust,
}

impl Identities {
    /// The certificate of `id`. At once and without a lock if one is held that is valid now; otherwise the
    /// authority is asked, and the caller waits for up to 5 s.
    pub async fn credentials(&self, id: &SpiffeId) -> Result<Arc<Credentials>, Unavailable> {
        match self.current(id) {
            Some(credentials) => Ok(credentials),
            None => self.wait_for(id).await,
        }
    }

    /// The certificate of `id`, if one is held that is valid now.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Credentials>> {
        let board = self.board.load();
        let credentials = board.get(id)?.credentials.as_ref()?;
        credentials.validity().holds_at((self.wall)()).then(|| Arc::clone(credentials))
    }

    /// By what peers are judged.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Why the last attempt to get a certificate for `id` failed; nothing if it did not.
    pub fn failure(&self, id: &SpiffeId) -> Option<Arc<IssueError>> {
        self.board.load().get(id)?.failure.clone()
    }

    /// These are the identities of the workloads on this node: they are asked for ahead of need and renewed from
    /// now on, all others are forgotten. The newest call counts.
    pub fn retain(&self, ids: HashSet<SpiffeId>) {
        self.retained.send_replace(Arc::new(ids));
    }

    /// Learns of every change of what is known of an identity.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.posted.subscribe()
    }

    /// Whether `id` has no certificate because the authority says nothing, neither yes nor no.
    pub fn is_authority_silent(&self, id: &SpiffeId) -> bool {
        self.current(id).is_none() && self.failure(id).is_some_and(|failure| failure.is_silence())
    }

    /// Every certificate that can be used now, by identity: for the daemon after this one.
    pub fn usable(&self) -> Vec<Arc<Credentials>> {
        let now = (self.wall)();
        self.list().into_iter().filter(|held| held.validity().holds_at(now)).collect()
    }

    /// Which workloads of this node cannot prove who they are; `None` where all can. An identity that is new, and whose
    /// first certificate is asked for in these seconds, does not count.
    pub fn shortage(&self) -> Option<Shortage> {
        let (board, retained, now) = (self.board.load(), self.retained.borrow(), (self.wall)());
        let lacks = |id: &SpiffeId| {
            let notice = board.get(id)?;
            let why = match &notice.credentials {
                Some(held) if held.validity().holds_at(now) => return None,
                Some(held) if held.validity().is_ahead(now) => {
                    "its certificate is not valid yet: is the clock right?"
                }
                Some(_) => "its certificate has ended",
                None => "it has no certificate",
            };
            Some(match &notice.failure {
                Some(failure) => format!("{id}: {why}: {}", chain(failure)),
                // Without a certificate and without a failure it is new.
                None => notice.credentials.as_ref().map(|_| format!("{id}: {why}"))?,
            })
        };
        let mut ids: Vec<_> = retained.iter().collect();
        ids.sort_unstable();
        let mut reasons = ids.into_iter().filter_map(lacks);
        let reason = reasons.next()?;
        Some(Shortage { lacking: 1 + reasons.count(), of: retained.len(), reason })
    }

    /// Every certificate that is held, ended ones too, by identity: for dumps.
    pub fn list(&self) -> Vec<Arc<Credentials>> {
        let board = self.board.load();
        let mut all: Vec<_> = board.values().filter_map(|notice| notice.credentials.clone()).collect();
        all.sort_by(|one, other| one.identity().cmp(other.identity()));
        all
    }

    /// What is known about every identity of this node, in alphabetical order: for dumps.
    pub fn standings(&self) -> Vec<Standing> {
        let board = self.board.load();
        let retained = Arc::clone(&self.retained.borrow());
        let mut ids: Vec<_> = board.keys().chain(retained.iter()).cloned().collect();
        ids.sort_unstable();
        ids.dedup();
        let standing = |identity: SpiffeId| {
            let Notice { credentials, failure } = board.get(&identity).cloned().unwrap_or_default();
            Standing { identity, credentials, failure }
        };
        ids.into_iter().map(standing).collect()
    }

    // Apart from `credentials`, so that the future of a connection that need not wait stays small.
    async fn wait_for(&self, id: &SpiffeId) -> Result<Arc<Credentials>, Unavailable> {
        let asking = async {
            let (answer, answered) = oneshot::channel();
            let stopped = || Unavailable::Stopped(id.clone());
            let question = Question { id: id.clone(), answer };
            self.questions.send(question).await.map_err(|_| stopped())?;
            answered.await.map_err(|_| stopped())?
        };
        let late =
            |_| Unavailable::Late { identity: id.clone(), waited: WAIT_DEADLINE, source: self.failure(id) };
        Box::pin(timeout(WAIT_DEADLINE, asking)).await.map_err(late)?
    }
}

struct Worker {
    ca: Arc<dyn CertificateAuthority>,
    environment: Environment,
    board: Arc<Board>,
    /// Tells of each change of the board.
    posted: watch::Sender<()>,
    schedule: Schedule,
    waiting: HashMap<SpiffeId, Vec<Answer>>,
    /// The answers in `waiting`, counted.
    waiting_count: usize,
    trust: Trust,
    /// Certificates that are not valid yet, or under a root that peers may not know yet, until they are shown.
    held_back: HashMap<SpiffeId, HeldBack>,
    /// Requests of the last [`WAIT_DEADLINE`], the oldest first.
    asked: VecDeque<(Instant, SpiffeId)>,
    /// When a peer of an unknown root last had the authority asked.
    asked_for_roots: Option<Instant>,
}

impl Worker {
    async fn run(
        mut self,
        mut asked: mpsc::Receiver<Question>,
        mut retain: watch::Receiver<Arc<HashSet<SpiffeId>>>,
        mut signal: shutdown::Signal,
    ) {
        let mut under_way = FuturesUnordered::new();
        let closing = signal.closing();
        tokio::pin!(closing);
        let (mut strangers, mut revocations) = (self.trust.strangers(), self.trust.revocations());
        let mut clock = clock::changes();
        loop {
            let now = self.now();
            self.show_what_was_held_back(now);
            for id in self.schedule.tick(now) {
                self.post(&id, |_| None);
            }
            while let Some(id) = self.schedule.next() {
                self.asked.push_back((now.mono, id.clone()));
                under_way.push(issue(Arc::clone(&self.ca), id));
            }
            self.note_unanswered(now);
            tokio::select! {
                () = &mut closing => return,
                question = asked.recv() => match question {
                    Some(question) => self.question(question),
                    None => return,
                },
                // An error means that the last handle is gone, which `asked` notices.
                Ok(()) = retain.changed() => {
                    let ids = Arc::clone(&retain.borrow_and_update());
                    for id in self.schedule.retain(&ids) {
                        tracing::debug!(identity = %id, "certificate forgotten");
                        self.held_back.remove(&id);
                        self.post(&id, |_| None);
                    }
                }
                Ok(()) = strangers.changed() => self.ask_for_roots(),
                Ok(()) = revocations.changed() => self.look_own_up(),
                Some((id, outcome)) = under_way.next() => match outcome {
                    Ok(credentials) => self.issued(&id, credentials),
                    Err(error) => self.failed(&id, error),
                },
                Ok(()) = clock.changed() => {
                    let now = self.now();
                    tracing::info!(now = %humantime::format_rfc3339_seconds(now.wall), "the clock was set");
                    self.schedule.clock_was_set(now);
                }
                () = sleep_until(self.wake_at(now)) => {}
            }
        }
    }

    fn wake_at(&self, now: Now) -> Instant {
        let shown = self.held_back.values().map(|held_back| {
            now.mono + held_back.at.duration_since(now.wall).unwrap_or_default().min(LOOK_MAX)
        });
        let unanswered = self.asked.front().map(|(asked, _)| *asked + WAIT_DEADLINE);
        shown.chain(unanswered).fold(self.schedule.wake_at(now), Instant::min)
    }

    fn inherit(&mut self, credentials: Credentials) {
        let (now, validity, id) = (self.now(), credentials.validity(), credentials.identity().clone());
        if !validity.holds_at(now.wall) {
            tracing::info!(identity = %id, "an earlier daemon's certificate is not valid now, and is not taken over");
            return;
        }
        self.trust.learn(credentials.roots(), now.wall, validity.life());
        self.schedule.inherit(&id, validity, now, (self.environment.jitter)());
        if self.ca.life().is_some_and(|asked| is_longer(validity.life(), asked)) {
            self.schedule.renew_soon(&id, now, (self.environment.jitter)());
        }
        let credentials = Some(Arc::new(credentials.judged_by(&self.trust)));
        self.post(&id, |_| Some(Notice { credentials, failure: None }));
    }

    fn now(&self) -> Now {
        Now { mono: Instant::now(), wall: (self.environment.wall)() }
    }

    fn question(&mut self, Question { id, answer }: Question) {
        let now = self.now();
        let notice = self.board.load().get(&id).cloned().unwrap_or_default();
        if let Some(credentials) = notice.credentials
            && credentials.validity().holds_at(now.wall)
        {
            let _gone = answer.send(Ok(credentials));
            return;
        }
        if self.waiting_count >= WAITING_MAX && !self.make_room() {
            let _gone = answer.send(Err(Unavailable::Busy(id)));
            return;
        }
        if let (Outlook::FailedUntil(_), Some(source)) = (self.schedule.want(&id, now), notice.failure) {
            let _gone = answer.send(Err(Unavailable::Failed { identity: id, source }));
            return;
        }
        self.waiting.entry(id).or_default().push(answer);
        self.waiting_count += 1;
    }

    /// Drops those who have stopped waiting. Whether that made room.
    fn make_room(&mut self) -> bool {
        self.waiting.retain(|_, answers| {
            answers.retain(|answer| !answer.is_closed());
            !answers.is_empty()
        });
        self.waiting_count = self.waiting.values().map(Vec::len).sum();
        self.waiting_count < WAITING_MAX
    }

    fn issued(&mut self, id: &SpiffeId, credentials: Credentials) {
        let now = self.now();
        let credentials = Arc::new(credentials.judged_by(&self.trust));
        if credentials.identity() != id {
            let issued = credentials.identity().clone();
            let error = InvalidCredentials::OtherIdentity { wanted: id.clone(), issued };
            return self.failed(id, error.into());
        }
        let validity = credentials.validity();
        if validity.is_over(now.wall) {
            return self.failed(id, IssueError::Expired);
        }
        let jitter = (self.environment.jitter)();
        match self.schedule.issued(id, validity, now, jitter) {
            Issued::Unwanted => self.tell(id, &Ok(credentials)),
            Issued::Publish => {
                tracing::debug!(identity = %id, serial = credentials.serial(), "certificate issued");
                self.learn(&credentials, now);
                self.publish(id, &credentials, now);
                self.tell(id, &Ok(credentials));
            }
            Issued::Later => {
                self.learn(&credentials, now);
                let from = humantime::format_rfc3339_seconds(validity.from);
                tracing::warn!(
                    identity = %id, %from,
                    "the new certificate is not valid yet and held back; compare the authority's clock with this node's"
                );
                self.publish(id, &credentials, now);
                let shown = self.board.load().get(id).and_then(|notice| notice.credentials.clone());
                self.tell(id, &Ok(shown.unwrap_or(credentials)));
            }
            Issued::TooEarly => {
                self.learn(&credentials, now);
                let sooner = |held: &HeldBack| {
                    held.at <= validity.from && !held.credentials.validity().is_over(now.wall)
                };
                if !self.held_back.get(id).is_some_and(sooner) {
                    self.hold_back(id, validity.from, &credentials);
                }
                let ahead = validity.from.duration_since(now.wall).unwrap_or_default();
                // Whole seconds are precise enough for people.
                let ahead = Duration::from_secs(ahead.as_secs() + 1);
                self.failed(id, IssueError::NotYetValid(ahead));
            }
        }
    }

    /// Trusts the roots that came with a certificate. A new one is a reason to renew all others: they are then
    /// certified under it well before anybody ceases to trust the old one.
    fn learn(&mut self, credentials: &Credentials, now: Now) {
        let life = credentials.validity().life();
        if self.trust.learn(credentials.roots(), now.wall, life) == Learnt::NewRoot {
            let roots = self.trust.roots().len();
            tracing::info!(roots, "the certificate authority has a new root; all certificates are renewed");
            self.schedule.renew_all(credentials.identity(), now, &mut self.environment.jitter);
        }
    }

    /// Shows a new certificate to peers from now on, or later: once it is valid, and, if it is under another root than
    /// the one that is shown now, once peers have heard of that. Those that have not been told of that root yet accept
    /// only the old one, and all of them renew within the life of a certificate. Half of what is left of the old one is a
    /// balance between those that know only the old root and, later, those that never knew it.
    fn publish(&mut self, id: &SpiffeId, credentials: &Arc<Credentials>, now: Now) {
        self.held_back.remove(id);
        let valid = credentials.validity();
        let shown = self.board.load().get(id).and_then(|notice| notice.credentials.clone());
        let mut at = valid.from;
        if let Some(shown) =
            shown.filter(|shown| shown.validity().holds_at(now.wall) && !self.is_revoked(shown))
            && !credentials.leads_to(shown.roots())
        {
            at = at.max(now.wall + shown.validity().left(now.wall) / 2);
            let from = humantime::format_rfc3339_seconds(at);
            tracing::info!(identity = %id, at = %from, "certificate under a new root: shown once peers know the root");
        }
        if now.wall < at {
            self.hold_back(id, at, credentials);
            return self.post(id, |notice| Some(Notice { failure: None, ..notice }));
        }
        let notice = Notice { credentials: Some(Arc::clone(credentials)), failure: None };
        self.post(id, |_| Some(notice));
    }

    fn hold_back(&mut self, id: &SpiffeId, at: SystemTime, credentials: &Arc<Credentials>) {
        self.held_back.insert(id.clone(), HeldBack { at, credentials: Arc::clone(credentials) });
    }

    /// Shows what is due, and what is better than a certificate that a clock that was set has made useless.
    fn show_what_was_held_back(&mut self, now: Now) {
        if self.held_back.is_empty() {
            return;
        }
        let board = self.board.load_full();
        let in_use = |id: &SpiffeId| {
            let shown = board.get(id).and_then(|notice| notice.credentials.as_ref());
            shown.is_some_and(|shown| shown.validity().holds_at(now.wall))
        };
        let due: Vec<_> = self
            .held_back
            .extract_if(|id, held| {
                let valid = held.credentials.validity();
                valid.is_over(now.wall) || (!valid.is_ahead(now.wall) && (held.at <= now.wall || !in_use(id)))
            })
            .collect();
        for (id, HeldBack { credentials, .. }) in due {
            let (valid, jitter) = (credentials.validity(), (self.environment.jitter)());
            if valid.is_over(now.wall) || !self.schedule.in_force(&id, valid, now, jitter) {
                continue;
            }
            tracing::info!(identity = %id, serial = credentials.serial(), "certificate that was held back is shown");
            self.post(&id, |_| Some(Notice { credentials: Some(Arc::clone(&credentials)), failure: None }));
            self.tell(&id, &Ok(credentials));
        }
        self.held_back.retain(|id, _| self.schedule.knows(id));
    }

    /// Says of requests that nobody answers that this is so, to those who ask what is wrong.
    fn note_unanswered(&mut self, now: Now) {
        while let Some((asked, _)) = self.asked.front()
            && *asked + WAIT_DEADLINE <= now.mono
            && let Some((_, id)) = self.asked.pop_front()
        {
            let known = self.board.load().get(&id).is_some_and(|notice| notice.failure.is_some());
            if !known && self.schedule.is_awaited(&id, now) {
                let failure = Some(Arc::new(IssueError::Unanswered(WAIT_DEADLINE)));
                tracing::warn!(identity = %id, "the certificate authority has not answered yet; going on waiting for it");
                self.post(&id, |notice| Some(Notice { failure, ..notice }));
            }
        }
    }

    /// A peer's chain led to no known root: perhaps the authority has a new one by now.
    fn ask_for_roots(&mut self) {
        let now = self.now();
        if self.asked_for_roots.is_some_and(|asked| now.mono < asked + STRANGERS_EVERY) {
            return;
        }
        if let Some(id) = self.schedule.any() {
            self.asked_for_roots = Some(now.mono);
            tracing::info!(
                "a peer's certificate is of an unknown root; asking the authority whether there is a new one"
            );
            self.schedule.renew(&id, now);
        }
    }

    fn is_revoked(&self, credentials: &Credentials) -> bool {
        let at = credentials.not_before().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.trust.names(credentials.chain(), UnixTime::since_unix_epoch(at), Side::Server)
    }

    /// Other lists are in force: what if they name a certificate of our own?
    fn look_own_up(&mut self) {
        let now = self.now();
        let mut held: Vec<_> =
            self.board.load().values().filter_map(|notice| notice.credentials.clone()).collect();
        held.retain(|held| self.is_revoked(held));
        for credentials in held {
            tracing::error!(
                identity = %credentials.identity(), serial = credentials.serial(),
                "a certificate of this node was revoked; asking for another"
            );
            self.schedule.renew(credentials.identity(), now);
        }
    }

    fn failed(&mut self, id: &SpiffeId, error: IssueError) {
        let jitter = (self.environment.jitter)();
        let failed = self.schedule.failed(id, self.now(), jitter);
        let source = Arc::new(error);
        let held = self.board.load().get(id).and_then(|notice| notice.credentials.clone());
        tracing::warn!(
            identity = %id,
            error = %chain(&source),
            retry_in = ?failed.retry_in,
            usable_until = ?held.as_ref().map(|held| held.not_after()),
            "certificate not issued",
        );
        if failed.retry_in.is_some() {
            let failure = Some(Arc::clone(&source));
            self.post(id, |notice| Some(Notice { failure, ..notice }));
        } else {
            self.post(id, |_| None);
        }
        if failed.tell {
            self.tell(id, &Err(Unavailable::Failed { identity: id.clone(), source }));
        }
    }

    fn tell(&mut self, id: &SpiffeId, outcome: &Result<Arc<Credentials>, Unavailable>) {
        let answers = self.waiting.remove(id).unwrap_or_default();
        self.waiting_count -= answers.len();
        for answer in answers {
            // Who has stopped waiting does not mind.
            let _gone = answer.send(outcome.clone());
        }
    }

    /// Replaces what the board says about `id`.
    fn post(&self, id: &SpiffeId, change: impl FnOnce(Notice) -> Option<Notice>) {
        let mut board = HashMap::clone(&self.board.load());
        if let Some(notice) = change(board.remove(id).unwrap_or_default()) {
            board.insert(id.clone(), notice);
        }
        self.board.store(Arc::new(board));
        self.posted.send_replace(());
    }
}

/// Whether certificates that live for `life` live longer than is asked for now, by more than authorities add (they
/// backdate).
fn is_longer(life: Duration, asked: Duration) -> bool {
    life > asked + (asked / 10).max(Duration::from_secs(300))
}

/// One request, which ends in time and does not take the worker along when it panics.
async fn issue(
    ca: Arc<dyn CertificateAuthority>,
    id: SpiffeId,
) -> (SpiffeId, Result<Credentials, IssueError>) {
    let attempt = AssertUnwindSafe(async { timeout(ISSUE_DEADLINE, ca.issue(&id)).await }).catch_unwind();
    let outcome = match attempt.await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_elapsed)) => Err(IssueError::Deadline(ISSUE_DEADLINE)),
        Err(_panic) => Err(IssueError::Panicked),
    };
    (id, outcome)
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
