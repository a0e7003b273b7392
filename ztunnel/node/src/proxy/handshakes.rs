//! TLS handshakes in progress with one pod, of which anybody may begin as many as they like.
//!
//! Nobody needs a certificate to begin one, so they are shared out among sources: who has too many loses the oldest, and
//! when there are too many in all, who has most does. An honest handshake takes milliseconds, one that is begun to
//! occupy its place is among the oldest soon.
//!
//! A source is an IPv4 address, or all addresses of an IPv6 /64. Whoever has a /64 to themselves can come from each of its
//! addresses, so they get one share for all of them. But as a rule the pods of a node have a /64 together, and none of
//! them may use it up for the others: where a source has its share, who comes from an address that has fewer than
//! another of the same source takes the place of that one's oldest. So one address gets what the others leave, and many
//! addresses of one host together no more than one address of IPv4.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Of the handshakes with a pod, those of one source may be one part in so many.
pub const SOURCE_PART: usize = 8;

/// A handshake may take so long before it has to make room for another of the same source that has as many: so that of a
/// crowd which comes at once the first get through.
const GRACE: Duration = Duration::from_secs(1);

/// Who begins handshakes, as far as an address tells.
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
    all: BTreeMap<u64, (IpAddr, Instant)>,
    of: HashMap<Source, Group>,
}

/// Who of one source is in. None of its addresses is without anybody.
#[derive(Debug, Default)]
struct Group {
    len: usize,
    of: HashMap<IpAddr, VecDeque<u64>>,
}

impl Group {
    /// Of the address that has most, how many it has, and the oldest.
    fn most(&self) -> Option<(usize, u64)> {
        let counted = self.of.values().filter_map(|ids| Some((ids.len(), *ids.front()?)));
        counted.max_by_key(|(len, oldest)| (*len, Reverse(*oldest)))
    }
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
    /// One from `ip` wants to get in, where `max` may be.
    fn enter(&mut self, ip: IpAddr, max: usize, now: Instant) -> Entry {
        let (ip, source) = (ip.to_canonical(), Source::from(ip));
        let share = (max / SOURCE_PART).max(1);
        let own = self.of.get(&source).map_or(0, |group| group.len);
        let gone = if own >= share {
            let gone = self.in_place_of(ip, source, now);
            if gone.is_none() {
                return Entry::Full;
            }
            gone
        } else if self.all.len() >= max {
            let oldest = |group: &Group| Some((group.len, Reverse(group.most()?.1)));
            let Some((most, Reverse(gone))) = self.of.values().filter_map(oldest).max() else {
                return Entry::Full;
            };
            if most <= own {
                return Entry::Full;
            }
            Some(gone)
        } else {
            None
        };
        if let Some(gone) = gone {
            self.leave(gone);
        }
        let id = self.next;
        self.next += 1;
        self.all.insert(id, (ip, now));
        let group = self.of.entry(source).or_default();
        group.len += 1;
        group.of.entry(ip).or_default().push_back(id);
        gone.map_or(Entry::In(id), |gone| Entry::Instead(id, gone))
    }

    /// Whose place one from `ip` gets of a source that has its share.
    fn in_place_of(&self, ip: IpAddr, source: Source, now: Instant) -> Option<u64> {
        let group = self.of.get(&source)?;
        let own = group.of.get(&ip).map_or(0, VecDeque::len);
        let is_old = |id: &u64| self.all.get(id).is_some_and(|(_, since)| now - *since >= GRACE);
        let (most, oldest) = group.most()?;
        // Afterwards neither has more than the other had.
        if most > own + 1 {
            return Some(oldest);
        }
        // Nobody has to go for one who has most already.
        let oldest = if own == most { *group.of.get(&ip)?.front()? } else { oldest };
        Some(oldest).filter(is_old)
    }

    fn leave(&mut self, id: u64) {
        let Some((ip, _)) = self.all.remove(&id) else { return };
        let source = Source::from(ip);
        let Some(group) = self.of.get_mut(&source) else { return };
        if let Some(own) = group.of.get_mut(&ip) {
            own.retain(|other| *other != id);
            if own.is_empty() {
                group.of.remove(&ip);
            }
        }
        group.len -= 1;
        if group.len == 0 {
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
        self.0.lock()
    }

    /// A place for one more, if it gets one among `max`.
    pub fn enter(&self, source: IpAddr, max: usize) -> Option<Place> {
        let mut places = self.places();
        let id = match places.crowd.enter(source, max, Instant::now()) {
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

    fn ip(ip: &str) -> IpAddr {
        ip.parse().unwrap()
    }

    fn source(ip: &str) -> Source {
        Source::from(self::ip(ip))
    }

    #[tokio::test(start_paused = true)]
    async fn no_source_keeps_others_out() {
        let mut crowd = Crowd::default();
        let (flood, honest) = (ip("10.0.0.1"), ip("10.0.0.2"));
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
        let sources: Vec<IpAddr> = (0..max / 2).map(|n| ip(&format!("10.0.1.{n}"))).collect();
        for source in sources.iter().chain(&sources) {
            assert!(matches!(crowd.enter(*source, max, now), Entry::In(_)));
        }
        let late = ip("10.0.0.2");
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
    async fn a_pod_does_not_use_up_what_its_node_mates_need() {
        let mut crowd = Crowd::default();
        let (flood, mate) = (ip("fd00::1"), ip("fd00::2"));
        let max = 8 * SOURCE_PART;
        let now = Instant::now();
        for id in 0..8 {
            assert_eq!(crowd.enter(flood, max, now), Entry::In(id), "what nobody else needs");
        }
        assert_eq!(crowd.enter(flood, max, now), Entry::Full);
        // As many as the other, at once.
        for id in 0..4 {
            assert_eq!(crowd.enter(mate, max, now), Entry::Instead(8 + id, id));
        }
        assert_eq!(crowd.enter(mate, max, now), Entry::Full);
        assert_eq!(crowd.enter(flood, max, now), Entry::Full);
        let third = ip("fd00::3");
        assert_eq!(crowd.enter(third, max, now), Entry::Instead(12, 4), "of those who have most, the oldest");
        // Who does not have most does not lose by who has.
        tokio::time::advance(GRACE).await;
        assert_eq!(crowd.enter(mate, max, Instant::now()), Entry::Instead(13, 8), "its own oldest");
        assert_eq!(crowd.all.len(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_a_whole_network_has_one_share() {
        let mut crowd = Crowd::default();
        let max = 8 * SOURCE_PART;
        let hops: Vec<IpAddr> = (1..1000).map(|n| ip(&format!("fd00::{n:x}"))).collect();
        let now = Instant::now();
        for (n, hop) in hops.iter().enumerate() {
            let entered = crowd.enter(*hop, max, now);
            // Of a crowd that comes at once the first get through.
            assert_eq!(entered == Entry::Full, n >= 8, "{entered:?}");
        }
        assert_eq!(crowd.enter(ip("fd00:0:0:1::1"), max, now), Entry::In(8));
        tokio::time::advance(GRACE).await;
        for hop in &hops {
            crowd.enter(*hop, max, Instant::now());
        }
        assert_eq!((crowd.all.len(), crowd.of[&source("fd00::")].len), (9, 8));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_to_go_is_told() {
        let all = Handshakes::default();
        let ip = ip("10.0.0.1");
        let mut first = all.enter(ip, 1).unwrap();
        assert!(all.enter(ip, 1).is_none());
        tokio::time::advance(GRACE).await;
        let _second = all.enter(ip, 1).unwrap();
        first.taken().await;
        drop(first);
        assert_eq!(all.places().crowd.all.len(), 1, "the place is the other's now");
    }
}
