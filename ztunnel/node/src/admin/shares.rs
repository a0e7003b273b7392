//! Who may be connected to a small server: a share for each source, so that nobody who opens many connections, or slow
//! ones, keeps the node's probes or a scrape from being answered.
//!
//! A new connection is always taken while there is room. Where its source has its share already, or the server is full,
//! another one makes room: of the same source, or of the one that has most; the oldest that has asked nothing yet, else
//! the oldest that has had its time. Pure: what closes and accepts is the server's business.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::time::Duration;

use tokio::time::Instant;

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// In all.
    pub(super) connections: usize,
    /// Of one source.
    pub(super) share: usize,
    /// After how long one that has asked something may have to make room; `None`: never.
    pub(super) patience: Option<Duration>,
}

/// One connection, in the order they came.
pub(super) type Number = u64;

#[derive(Debug)]
struct Held {
    source: IpAddr,
    since: Instant,
    asked: bool,
}

/// What becomes of a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is taken.
    Taken(Number),
    /// It is taken, and another one has to be closed.
    Instead(Number, Number),
    /// It is closed.
    Refused,
}

/// The connections of one server.
#[derive(Debug)]
pub(super) struct Shares {
    limits: Limits,
    held: BTreeMap<Number, Held>,
    next: Number,
}

impl Shares {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, held: BTreeMap::new(), next: 0 }
    }

    /// A connection from `peer` has come.
    pub(super) fn admit(&mut self, peer: IpAddr, now: Instant) -> Admission {
        let source = source(peer);
        let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for held in self.held.values() {
            *counts.entry(held.source).or_default() += 1;
        }
        let crowded = if counts.get(&source).is_some_and(|count| *count >= self.limits.share) {
            Some(source)
        } else if self.held.len() >= self.limits.connections {
            counts.iter().max_by_key(|(_, count)| **count).map(|(source, _)| *source)
        } else {
            None
        };
        let Some(crowded) = crowded else { return Admission::Taken(self.take(source, now)) };
        match self.victim(crowded, now) {
            Some(victim) => {
                self.held.remove(&victim);
                Admission::Instead(self.take(source, now), victim)
            }
            None => Admission::Refused,
        }
    }

    fn take(&mut self, source: IpAddr, now: Instant) -> Number {
        let number = self.next;
        self.next += 1;
        self.held.insert(number, Held { source, since: now, asked: false });
        number
    }

    fn victim(&self, source: IpAddr, now: Instant) -> Option<Number> {
        let of_source = || self.held.iter().filter(|(_, held)| held.source == source);
        let silent = of_source().find(|(_, held)| !held.asked);
        let slow = || {
            let patience = self.limits.patience?;
            of_source().find(|(_, held)| now >= held.since + patience)
        };
        silent.or_else(slow).map(|(number, _)| *number)
    }

    /// A connection has asked something.
    pub(super) fn asked(&mut self, number: Number) {
        if let Some(held) = self.held.get_mut(&number) {
            held.asked = true;
        }
    }

    /// A connection is over.
    pub(super) fn ended(&mut self, number: Number) {
        self.held.remove(&number);
    }
}

/// Who has one address of an IPv6 network has all of them.
fn source(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => {
            let network = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(network))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACKER: &str = "10.9.9.9";
    const KUBELET: &str = "10.0.0.1";
    const PATIENCE: Duration = Duration::from_secs(1);

    fn shares(connections: usize, share: usize) -> Shares {
        Shares::new(Limits { connections, share, patience: Some(PATIENCE) })
    }

    fn admit(shares: &mut Shares, peer: &str, now: Instant) -> Admission {
        shares.admit(peer.parse().unwrap(), now)
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_has_its_share_makes_room_for_itself() {
        let (mut shares, now) = (shares(8, 2), Instant::now());
        assert_eq!(admit(&mut shares, ATTACKER, now), Admission::Taken(0));
        assert_eq!(admit(&mut shares, "::ffff:10.9.9.9", now), Admission::Taken(1));
        assert_eq!(admit(&mut shares, ATTACKER, now), Admission::Instead(2, 0));
        assert_eq!(admit(&mut shares, KUBELET, now), Admission::Taken(3));
        for _ in 0..100 {
            assert!(
                matches!(admit(&mut shares, ATTACKER, now), Admission::Instead(_, victim) if victim != 3)
            );
        }
        shares.ended(3);
        assert_eq!(admit(&mut shares, KUBELET, now), Admission::Taken(104));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_server_takes_from_the_source_that_has_most() {
        let (mut shares, now) = (shares(4, 3), Instant::now());
        for number in 0..3 {
            assert_eq!(admit(&mut shares, ATTACKER, now), Admission::Taken(number));
        }
        assert_eq!(admit(&mut shares, KUBELET, now), Admission::Taken(3));
        assert_eq!(admit(&mut shares, "10.0.0.2", now), Admission::Instead(4, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_asked_is_answered_before_it_makes_room() {
        let (mut shares, now) = (shares(4, 2), Instant::now());
        for number in 0..2 {
            assert_eq!(admit(&mut shares, KUBELET, now), Admission::Taken(number));
            shares.asked(number);
        }
        assert_eq!(admit(&mut shares, KUBELET, now), Admission::Refused);
        assert_eq!(admit(&mut shares, KUBELET, now + PATIENCE), Admission::Instead(2, 0), "a slow reader");
        assert_eq!(
            admit(&mut shares, KUBELET, now + PATIENCE),
            Admission::Instead(3, 2),
            "a silent one first"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_ipv6_network_is_one_source() {
        let (mut shares, now) = (shares(8, 1), Instant::now());
        assert_eq!(admit(&mut shares, "fd00::1", now), Admission::Taken(0));
        assert_eq!(admit(&mut shares, "fd00::2:0:0:1", now), Admission::Instead(1, 0));
        assert_eq!(admit(&mut shares, "fd00:1::1", now), Admission::Taken(2));
    }
}
