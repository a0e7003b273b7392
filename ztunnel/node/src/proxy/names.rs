//! What the names of endpoints stand for that have no address: a `ServiceEntry` whose endpoints are resolved by DNS.
//!
//! The resolver is that of this process (`/etc/resolv.conf` and `/etc/hosts`, as the C library has it), not the pod's.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::lookup_host;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::timeout;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_runtime::shutdown;

/// How long an answer holds: what the C library says has no time to live.
const HOLDS: Duration = Duration::from_secs(30);
/// How long it holds that there is none.
const FAILURE_HOLDS: Duration = Duration::from_secs(2);
/// A connection waits no longer for an answer.
const WAIT: Duration = Duration::from_secs(5);
/// The question itself goes on for so long: a resolver that is slow is asked once, and its answer is there for the next
/// connection. Asked anew each time, it would be the busier the slower it is, and never be heard.
const ASKS_FOR: Duration = Duration::from_secs(30);
/// Names that are remembered by a thread; with more, all that no longer hold are forgotten, or else all.
const NAMES_MAX: usize = 4096;
/// Questions under way on a thread; further ones wait for their turn, no longer than one goes on.
const UNDER_WAY_MAX: usize = 32;
/// Clients and names that are counted apart; further ones are counted together.
const COUNTED_MAX: usize = 1000;

/// Why a name stands for no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// The resolver said so, or was not to be asked.
    #[error("{0}")]
    Failed(String),
    /// It did not answer in time.
    #[error("no answer within {} s", WAIT.as_secs())]
    Late,
    /// There is nothing behind it.
    #[error("the name has no address")]
    Nothing,
}

type Answer = Result<Arc<[IpAddr]>, NoAddress>;

/// Names, by what they stood for when they were asked about.
#[derive(Debug)]
pub struct Names {
    known: Mutex<HashMap<Arc<str>, Known>>,
    turns: Arc<Semaphore>,
    counted: Mutex<HashMap<LookupLabels, u64>>,
}

/// What a name stands for, and since when that is known; nothing while it is being asked.
type Known = watch::Receiver<Option<(Answer, Instant)>>;

/// Who asked about what: the labels of one series.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LookupLabels {
    /// Istio's labels of the source, in its order.
    pub source: [Arc<str>; 8],
    /// The name.
    pub hostname: Arc<str>,
}

/// The names of the labels in [`LookupLabels::source`].
pub const SOURCE_LABELS: [&str; 8] = [
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
];

impl Default for Names {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            turns: Arc::new(Semaphore::new(UNDER_WAY_MAX)),
            counted: Mutex::default(),
        }
    }
}

impl Names {
    /// What `host` stands for, asked on behalf of `source`. Waits for the resolver if that is not known, some seconds at
    /// most.
    pub async fn look_up(&self, host: &Arc<str>, source: &Workload) -> Answer {
        self.count(host, source);
        self.resolve(host, || ask(Arc::clone(host))).await
    }

    /// Every pair that asked so far, and how often it did.
    pub fn counted(&self) -> Vec<(LookupLabels, u64)> {
        self.counted.lock().iter().map(|(labels, count)| (labels.clone(), *count)).collect()
    }

    async fn resolve<F>(&self, host: &Arc<str>, ask: impl FnOnce() -> F) -> Answer
    where
        F: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
    {
        // All that ask meanwhile wait for the same answer.
        let mut known = self.entry(host, ask);
        match timeout(WAIT, known.wait_for(Option::is_some)).await {
            Ok(Ok(known)) => known.as_ref().map_or(Err(NoAddress::Late), |(answer, _)| answer.clone()),
            // The thread ends, or it takes its time.
            Ok(Err(_)) | Err(_) => Err(NoAddress::Late),
        }
    }

    /// What is known of `host`; it is asked about if that is nothing that still holds.
    fn entry<F>(&self, host: &Arc<str>, ask: impl FnOnce() -> F) -> Known
    where
        F: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
    {
        let mut known = self.known.lock();
        if let Some(entry) = known.get(host).filter(|entry| holds(entry)) {
            return entry.clone();
        }
        if known.len() >= NAMES_MAX {
            known.retain(|_, entry| holds(entry));
            if known.len() >= NAMES_MAX {
                known.clear();
            }
        }
        let (answer, answered) = watch::channel(None);
        known.insert(Arc::clone(host), answered.clone());
        let (asking, turns) = (ask(), Arc::clone(&self.turns));
        shutdown::spawn(async move {
            let asked = timeout(ASKS_FOR, async {
                let _turn = turns.acquire().await;
                asking.await
            });
            let found = match asked.await {
                Ok(Ok(addresses)) if addresses.is_empty() => Err(NoAddress::Nothing),
                Ok(Ok(addresses)) => Ok(Arc::from(addresses)),
                Ok(Err(error)) => Err(NoAddress::Failed(error.to_string())),
                Err(_elapsed) => Err(NoAddress::Late),
            };
            // Perhaps it was forgotten meanwhile.
            let _forgotten = answer.send(Some((found, Instant::now())));
        });
        answered
    }

    fn count(&self, host: &Arc<str>, source: &Workload) {
        let mut counted = self.counted.lock();
        let labels = LookupLabels {
            source: [
                Arc::clone(&source.workload_name),
                Arc::clone(&source.canonical_name),
                Arc::clone(&source.canonical_revision),
                Arc::clone(&source.namespace),
                Arc::from(source.identity.as_str()),
                Arc::clone(&source.canonical_name),
                Arc::clone(&source.canonical_revision),
                Arc::clone(&source.cluster),
            ],
            hostname: Arc::clone(host),
        };
        let room = counted.len() < COUNTED_MAX || counted.contains_key(&labels);
        *counted.entry(if room { labels } else { LookupLabels::default() }).or_default() += 1;
    }
}

fn holds(known: &Known) -> bool {
    match &*known.borrow() {
        Some((Ok(_), since)) => since.elapsed() < HOLDS,
        Some((Err(_), since)) => since.elapsed() < FAILURE_HOLDS,
        // Still being asked.
        None => known.has_changed().is_ok(),
    }
}

async fn ask(host: Arc<str>) -> io::Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for found in lookup_host((&*host, 0)).await? {
        // One per protocol of the C library.
        if !addresses.contains(&found.ip()) {
            addresses.push(found.ip());
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering;

    use tokio::time::advance;

    use super::*;

    fn host(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_asked_about_once_while_the_answer_holds() {
        let names = Names::default();
        let times = Arc::new(AtomicUsize::new(0));
        let found = || {
            times.fetch_add(1, Ordering::Relaxed);
            async { Ok(vec![IpAddr::from([10, 0, 0, 1])]) }
        };
        let asked = || times.load(Ordering::Relaxed);
        let name = host("db.example");
        let (first, second) = tokio::join!(names.resolve(&name, found), names.resolve(&name, found));
        assert_eq!(first, second);
        assert_eq!(*first.expect("an address"), [IpAddr::from([10, 0, 0, 1])]);
        advance(HOLDS - Duration::from_secs(1)).await;
        names.resolve(&name, found).await.expect("an address");
        assert_eq!(asked(), 1);
        advance(Duration::from_secs(2)).await;
        names.resolve(&name, found).await.expect("an address");
        assert_eq!(asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_told_and_soon_forgotten() {
        let names = Names::default();
        let late = names.resolve(&host("slow"), std::future::pending).await;
        assert_eq!(late, Err(NoAddress::Late));
        assert_eq!(names.resolve(&host("none"), || async { Ok(vec![]) }).await, Err(NoAddress::Nothing));
        let failed = names.resolve(&host("bad"), || async { Err(io::Error::other("no such name")) }).await;
        assert_eq!(failed, Err(NoAddress::Failed("no such name".to_owned())));
        advance(FAILURE_HOLDS).await;
        let found = names.resolve(&host("bad"), || async { Ok(vec![IpAddr::from([10, 0, 0, 1])]) }).await;
        assert!(found.is_ok(), "{found:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_is_slow_is_asked_once_and_its_answer_counts() {
        let (names, name) = (Names::default(), host("slow"));
        let times = Arc::new(AtomicUsize::new(0));
        let slow = || {
            times.fetch_add(1, Ordering::Relaxed);
            async {
                tokio::time::sleep(Duration::from_secs(8)).await;
                Ok(vec![IpAddr::from([10, 0, 0, 1])])
            }
        };
        let began = Instant::now();
        assert_eq!(names.resolve(&name, slow).await, Err(NoAddress::Late));
        assert_eq!(began.elapsed(), WAIT);
        names.resolve(&name, slow).await.expect("the answer to the first question");
        assert_eq!(began.elapsed().as_secs(), 8);
        assert_eq!(times.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_and_counted_is_bounded() {
        let names = Names::default();
        for number in 0..NAMES_MAX + 10 {
            let found = || async { Ok(vec![IpAddr::from([10, 0, 0, 1])]) };
            names.resolve(&host(&number.to_string()), found).await.expect("an address");
            names.count(&host(&number.to_string()), &Workload::sample("shop", "cart"));
        }
        assert!(names.known.lock().len() <= NAMES_MAX);
        let counted = names.counted();
        assert_eq!(counted.len(), COUNTED_MAX + 1);
        let others = counted.iter().find(|(labels, _)| labels.hostname.is_empty());
        assert_eq!(others.map(|(_, count)| *count), Some((NAMES_MAX + 10 - COUNTED_MAX) as u64));
    }
}
