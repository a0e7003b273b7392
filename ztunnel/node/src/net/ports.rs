//! Source ports of deliveries.
//!
//! A plain connection to a pod and the one that is made to its application for it have the same two addresses and the
//! same destination port: what tells them apart is the source port. The kernel of the client has chosen the one,
//! mostly from its range of ephemeral ports, without knowing of the other. So the other is chosen where clients do not
//! choose, at random, and never one at which the client itself has a connection open here. In a captured pod a program
//! of the kernel refuses such a connect, as the kernel itself does one from a port that already has a connection of ours;
//! then another port is tried. Elsewhere what clients have open is known from those who serve it ([`Ports::fronted`]):
//! but not what they had when a daemon took over.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use socket2::Socket;

use crate::net::netns::Netns;

/// How many ports are tried for one connection. While a client holds half of all there are, that all are taken happens
/// once in 65,000 times.
const TRIES: u32 = 16;
/// Of these, so many where hardly anybody listens either.
const QUIET_TRIES: u32 = 4;
/// No port below is taken: they are for applications.
const LOWEST: u16 = 2048;
/// No port above is taken: capture listens there.
const HIGHEST: u16 = 65_099;
/// With fewer ports outside of the clients' range, every other one inside is used, too.
const ENOUGH: u32 = 4096;
/// What a kernel has that nobody has told otherwise.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// Ports that follow each other in steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u16,
    step: u16,
    count: u32,
}

impl Run {
    /// Those of `first..=last`, as far as they may be taken at all.
    fn new(first: u16, last: u16, step: u16) -> Self {
        let last = last.min(HIGHEST);
        let count = if first <= last { u32::from((last - first) / step) + 1 } else { 0 };
        Self { first, step, count }
    }
}

/// From where ports are taken: what `connect` of a client does not use while it has others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Space {
    /// Above the clients' range; below it; in it, where there are not enough outside.
    runs: [Run; 3],
}

impl Space {
    /// `clients`: the range from which their ports come.
    fn beside(clients: &RangeInclusive<u16>) -> Self {
        let (low, high) = (*clients.start(), *clients.end());
        let above = Run::new(high.saturating_add(1).max(LOWEST), HIGHEST, 1);
        let below = Run::new(LOWEST, low.saturating_sub(1), 1);
        // `connect` begins with the parity of the range's first port.
        let first = low.max(LOWEST);
        let other = if first % 2 == low % 2 { first.saturating_add(1) } else { first };
        let inside = Run::new(other, if above.count + below.count < ENOUGH { high } else { 0 }, 2);
        Self { runs: [above, below, inside] }
    }

    /// One of the ports that may be had at the given try.
    fn pick(&self, tried: u32, roll: u32) -> Option<u16> {
        let [quiet, ..] = &self.runs;
        let runs = if tried < QUIET_TRIES && quiet.count > 0 { &self.runs[..1] } else { &self.runs[..] };
        let all: u32 = runs.iter().map(|run| run.count).sum();
        let mut at = ((u64::from(roll) * u64::from(all)) >> 32) as u32;
        for run in runs {
            if at < run.count {
                return Some(run.first + at as u16 * run.step);
            }
            at -= run.count;
        }
        None
    }
}

/// Whose connection comes from where: the client, and the port it has dialled.
type Front = (SocketAddr, u16);

/// The source ports of one pod's deliveries.
#[derive(Debug)]
pub struct Ports {
    space: Space,
    /// What clients have open. Two of the pod's addresses can have the same.
    open: Mutex<HashMap<Front, u32>>,
}

impl Ports {
    /// Those of the pod whose network namespace this is. Its clients are taken to choose from the same range.
    pub fn of(netns: &Netns) -> Self {
        let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        let clients = netns.run(read).and_then(|text| text).ok().and_then(|text| range(&text));
        Self::beside(&clients.unwrap_or(DEFAULT))
    }

    fn beside(clients: &RangeInclusive<u16>) -> Self {
        Self { space: Space::beside(clients), open: Mutex::default() }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Front, u32>> {
        self.open.lock()
    }

    /// `client` has a plain connection to `port` of the pod, for as long as the answer lives.
    pub fn fronted(self: &Arc<Self>, client: SocketAddr, port: u16) -> Fronted {
        let front = (client, port);
        *self.open().entry(front).or_default() += 1;
        Fronted { ports: Arc::clone(self), front }
    }

    /// The ports to try for a delivery.
    pub fn tries(self: &Arc<Self>, client: IpAddr, to: SocketAddr) -> Tries {
        Tries { ports: Arc::clone(self), client, to: to.port(), tried: 0 }
    }
}

/// `low high`, as the kernel writes it.
fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_whitespace().map(|word| word.parse().ok());
    Some(words.next()??..=words.next()??)
}

/// A client's open connection.
#[derive(Debug)]
pub struct Fronted {
    ports: Arc<Ports>,
    front: Front,
}

impl Drop for Fronted {
    fn drop(&mut self) {
        let mut open = self.ports.open();
        if let Some(count) = open.get_mut(&self.front) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.front);
            }
        }
    }
}

/// One port after the other for one connection.
#[derive(Debug, Clone)]
pub struct Tries {
    ports: Arc<Ports>,
    client: IpAddr,
    to: u16,
    tried: u32,
}

impl Tries {
    /// The next port at which the client has no connection open; `None` when it is time to give up.
    fn next(&mut self) -> Option<SocketAddr> {
        while self.tried < TRIES {
            let port = self.ports.space.pick(self.tried, rand::random());
            self.tried += 1;
            let from = SocketAddr::new(self.client, port?);
            if !self.ports.open().contains_key(&(from, self.to)) {
                return Some(from);
            }
        }
        None
    }

    /// Gives `socket`, which has none, the client's address and a port. An application may listen on a port that is
    /// tried, so there may be several.
    pub(super) fn bind(&mut self, socket: &Socket) -> io::Result<()> {
        while let Some(from) = self.next() {
            match socket.bind(&from.into()) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                bound => return bound,
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "no source port is free for this client"))
    }

    /// Whether a connection that came to this is to be tried from another port: it has one from here already.
    pub(super) fn again(&self, error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && self.tried < TRIES
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use socket2::Domain;
    use socket2::Type;

    use super::*;

    fn picked(clients: RangeInclusive<u16>, tried: u32) -> HashSet<u16> {
        let space = Space::beside(&clients);
        (0..=u16::MAX).filter_map(|roll| space.pick(tried, u32::from(roll) << 16)).collect()
    }

    #[test]
    fn ports_are_taken_where_clients_do_not_choose() {
        assert_eq!(range("32768\t60999\n"), Some(DEFAULT));
        for clients in [DEFAULT, 40_000..=40_031, 1024..=40_000, 30_000..=65_535] {
            for tried in [0, QUIET_TRIES] {
                let picked = picked(clients.clone(), tried);
                assert!(picked.len() > 4000, "{clients:?}: {}", picked.len());
                assert!(picked.iter().all(|port| !clients.contains(port)), "{clients:?}");
                assert!(picked.iter().all(|port| (LOWEST..=HIGHEST).contains(port)), "{clients:?}");
            }
        }
        // Where a service would rather not be.
        assert!(picked(DEFAULT, 0).iter().all(|port| *port > *DEFAULT.end()));
        assert_eq!(picked(DEFAULT, QUIET_TRIES).len(), 30_720 + 4100);
    }

    #[test]
    fn where_clients_choose_any_port_every_other_one_is_taken() {
        for (clients, parity) in [(1024..=65_535, 1), (1025..=65_535, 0)] {
            let picked = picked(clients, 0);
            assert!(picked.len() > 31_000, "{}", picked.len());
            assert!(picked.iter().all(|port| port % 2 == parity));
        }
    }

    #[test]
    fn a_port_at_which_the_client_has_a_connection_open_is_not_tried() {
        let ports = Arc::new(Ports::beside(&(0..=HIGHEST - 2)));
        let client: IpAddr = "192.0.2.7".parse().unwrap();
        let to: SocketAddr = "192.0.2.8:80".parse().unwrap();
        let tried = |ports: &Arc<Ports>| {
            let mut tries = ports.tries(client, to);
            std::iter::from_fn(|| tries.next().map(|from| from.port())).collect::<HashSet<_>>()
        };
        // The quiet ones are two.
        let quiet = [HIGHEST - 1, HIGHEST];
        let mut fronts = Vec::from(quiet.map(|port| ports.fronted(SocketAddr::new(client, port), to.port())));
        assert!(quiet.iter().all(|port| !tried(&ports).contains(port)));
        // Another one's, or at another port of the pod.
        let _other = ports.fronted(SocketAddr::new("192.0.2.9".parse().unwrap(), 80), to.port());
        fronts.push(ports.fronted(SocketAddr::new(client, HIGHEST), to.port()));
        drop(fronts);
        let _elsewhere = ports.fronted(SocketAddr::new(client, HIGHEST), 81);
        assert!((0..50).any(|_| tried(&ports).contains(&HIGHEST)));
        assert_eq!(ports.open().len(), 2);
    }

    #[test]
    fn a_port_on_which_somebody_listens_is_passed_over() {
        let ports = Arc::new(Ports::beside(&(0..=HIGHEST - 2)));
        let to: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let taken = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        taken.bind(&SocketAddr::new(to.ip(), HIGHEST).into()).unwrap();
        for _ in 0..20 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let mut tries = ports.tries(to.ip(), to);
            tries.bind(&socket).unwrap();
            assert_ne!(socket.local_addr().unwrap().as_socket().unwrap().port(), HIGHEST);
        }
    }

    proptest! {
        #[test]
        fn whatever_the_range_and_the_roll_the_port_is_one_that_may_be_taken(
            low: u16, high: u16, tried in 0..TRIES, roll: u32,
        ) {
            let space = Space::beside(&(low..=high));
            if let Some(port) = space.pick(tried, roll) {
                prop_assert!((LOWEST..=HIGHEST).contains(&port));
            }
            let _none = range(&format!("{low} {high}"));
        }
    }
}
