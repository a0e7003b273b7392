//! TLS handshakes in progress with one pod, of which anybody may begin as many as they like.
//!
//! Nobody needs a certificate to begin one, so they are shared out among source addresses: who has too many loses the
//! oldest, and when there are too many in all, who has most does. An honest handshake takes milliseconds, one that is
//! begun to occupy its place is among the oldest soon.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// Of the handshakes with a pod, those of one source may be one part in so many.
pub const SOURCE_PART: usize = 8;

/// A handshake may take so long before it has to make room for another of the same source: so that of a crowd which
/// comes at once the first get through.
const GRACE: Duration = Duration::from_secs(1);

/// Who begins handshakes, as far as an address tells: a host has a whole /64 of IPv6 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source(IpAddr);

impl Source {
    /// The address, or the first of those it may have.
    pub fn address(self) -> IpAddr {
        self.0
    }
}

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        })
    }
}

/// Who is in, in the order of arrival.
#[derive(Debug, Default)]
struct Crowd {
    next: u64,
    all: BTreeMap<u64, (Source, Instant)>,
    of: HashMap<Source, VecDeque<u64>>,
}

/// Whether one more gets in.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    /// Under this number.
    In(u64),
    /// Under this number, and that one has to go.
    Instead(u64, u64),
    Full,
}

impl Crowd {
    /// One of `source` wants to get in, where `max` may be.
    fn enter(&mut self, source: Source, max: usize, now: Instant) -> Entry {
        let share = (max / SOURCE_PART).max(1);
        let own = self.of.get(&source).map_or(0, VecDeque::len);
        let gone = if own >= share {
            let oldest = self.of.get(&source).and_then(|own| own.front()).copied();
            let old = oldest.filter(|id| self.all.get(id).is_some_and(|(_, since)| now - *since >= GRACE));
            if old.is_none() {
                return Entry::Full;
            }
            old
        } else if self.all.len() >= max {
            let Some(most) =
                self.of.values().max_by_key(|ids| (ids.len(), std::cmp::Reverse(ids.front().copied())))
            else {
                return Entry::Full;
            };
            if most.len() <= own {
                return Entry::Full;
            }
            most.front().copied()
        } else {
            None
        };
        if let Some(gone) = gone {
            self.leave(gone);
        }
        let id = self.next;
        self.next += 1;
        self.all.insert(id, (source, now));
        self.of.entry(source).or_default().push_back(id);
        gone.map_or(Entry::In(id), |gone| Entry::Instead(id, gone))
    }

    fn leave(&mut self, id: u64) {
        let Some((source, _)) = self.all.remove(&id) else { return };
        let Some(own) = self.of.get_mut(&source) else { return };
        own.retain(|other| *other != id);
        if own.is_empty() {
            self.of.remove(&source);
        }
    }
}

/// The handshakes in progress with one pod.
#[derive(Debug, Clone, Default)]
pub struct Handshakes(Arc<Mutex<Places>>);

#[derive(Debug, Default)]
struct Places {
    crowd: Crowd,
    told: HashMap<u64, oneshot::Sender<()>>,
}

impl Handshakes {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more, if it gets one among `max`.
    pub fn enter(&self, source: IpAddr, max: usize) -> Option<Place> {
        let mut places = self.places();
        let id = match places.crowd.enter(source.into(), max, Instant::now()) {
            Entry::In(id) => id,
            Entry::Instead(id, gone) => {
                // Dropped, it tells.
                places.told.remove(&gone);
                id
            }
            Entry::Full => return None,
        };
        let (sender, gone) = oneshot::channel();
        places.told.insert(id, sender);
        Some(Place { all: self.clone(), id, gone })
    }
}

/// A place among the handshakes, given back when dropped.
#[derive(Debug)]
pub struct Place {
    all: Handshakes,
    id: u64,
    gone: oneshot::Receiver<()>,
}

impl Place {
    /// Waits until another needs it more.
    pub async fn taken(&mut self) {
        let _dropped = (&mut self.gone).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.all.places();
        places.crowd.leave(self.id);
        places.told.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(ip: &str) -> Source {
        Source::from(ip.parse::<IpAddr>().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn no_source_keeps_others_out() {
        let mut crowd = Crowd::default();
        let (flood, honest) = (source("10.0.0.1"), source("10.0.0.2"));
        let max = 8 * SOURCE_PART;
        for id in 0..8 {
            assert_eq!(crowd.enter(flood, max, Instant::now()), Entry::In(id));
        }
        assert_eq!(crowd.enter(flood, max, Instant::now()), Entry::Full, "its share");
        assert_eq!(crowd.enter(honest, max, Instant::now()), Entry::In(8));
        tokio::time::advance(GRACE).await;
        assert_eq!(crowd.enter(flood, max, Instant::now()), Entry::Instead(9, 0), "its own oldest goes");
        assert_eq!(crowd.enter(honest, max, Instant::now()), Entry::In(10));
        crowd.leave(9);
        assert_eq!(crowd.enter(flood, max, Instant::now()), Entry::In(11));
    }

    #[tokio::test(start_paused = true)]
    async fn many_sources_do_not_keep_others_out() {
        let mut crowd = Crowd::default();
        let now = Instant::now();
        let max = 8 * SOURCE_PART;
        let sources: Vec<Source> = (0..max / 2).map(|n| source(&format!("10.0.1.{n}"))).collect();
        for source in sources.iter().chain(&sources) {
            assert!(matches!(crowd.enter(*source, max, now), Entry::In(_)));
        }
        let late = source("10.0.0.2");
        assert_eq!(crowd.enter(late, max, now), Entry::Instead(64, 0), "who has more loses the oldest");
        assert_eq!(crowd.all.len(), max);
        crowd.leave(64);
        assert_eq!(crowd.of.len(), sources.len());
    }

    #[test]
    fn a_host_has_many_addresses_of_ipv6() {
        assert_eq!(source("fd00::1"), source("fd00::ffff:1:2:3"));
        assert_ne!(source("fd00::1"), source("fd00:0:0:1::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_to_go_is_told() {
        let all = Handshakes::default();
        let ip = "10.0.0.1".parse().unwrap();
        let mut first = all.enter(ip, 1).unwrap();
        assert!(all.enter(ip, 1).is_none());
        tokio::time::advance(GRACE).await;
        let _second = all.enter(ip, 1).unwrap();
        first.taken().await;
        drop(first);
        assert_eq!(all.places().crowd.all.len(), 1, "the place is the other's now");
    }
}
