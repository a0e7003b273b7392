//! Enrolling and withdrawing one pod, step by step.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ztunnel_ebpf_abi::{ADDRESSES_PER_SLOT, PROBED_PER_SLOT, PodEntry, Record};
use ztunnel_mesh::model::addr::{PodUid, canonical_ip};

use super::error::{EnrolError, WithdrawError};
use super::guards::DEVICES_MAX;
use super::maps::{absent, pack, unpack};
use super::netlink::Netlink;
use super::node::uid_of;
use super::pins::{Pins, gone};
use super::reconcile::Watched;
use super::sys::{self, Attach, Ensured, Wanted};
use super::sysctls::{self, Former};
use super::{Captured, Enrolled, Links, Node, PodSpec, host, listeners, programs, routes};
use crate::net::netns::Netns;

/// How long a connection that the connect program has marked may take to send its SYN, on whatever machine. Nothing in the
/// kernel shows such a connection: it is in the midst of one system call.
const MARKED_WITHIN: Duration = Duration::from_millis(10);

impl Node {
    /// Binds the pod's listeners and reserves its slot. Nothing is redirected yet.
    pub fn bind(&mut self, pod: &PodSpec) -> Result<Captured, EnrolError> {
        if !self.is_owner() {
            return Err(EnrolError::Superseded);
        }
        let entered = |source| EnrolError::Netns { path: pod.netns.clone(), source };
        let netns = Arc::new(Netns::open(&pod.netns).map_err(entered)?);
        let (listeners, cookie, former) = netns
            .run(|| Ok((listeners::bind()?, listeners::current_netns_cookie()?, Former::look()?)))
            .map_err(entered)?
            .map_err(EnrolError::Listen)?;
        let slot = match self.reserve(pod, &netns, cookie, &former) {
            Err(EnrolError::Full) => {
                self.shut_without_slot(&pod.uid, &netns, cookie);
                return Err(EnrolError::Full);
            }
            reserved => reserved?,
        };
        let spec = pod.clone();
        // Bound again (it was withdrawn, or its listeners are to be replaced): what is in the kernel stays.
        let known = self.pods.remove(&pod.uid).filter(|known| known.cookie == cookie);
        let (renew, listening, links) = known.map_or_else(
            || (self.renew, None, Links::default()),
            |known| (known.renew, known.listeners, known.links),
        );
        let enrolled = Enrolled {
            slot,
            cookie,
            netns: Arc::clone(&netns),
            spec,
            renew,
            listeners: listening,
            closed: false,
            crowded: false,
            watched: Watched::default(),
            links,
        };
        self.pods.insert(pod.uid.clone(), enrolled);
        Ok(Captured { listeners: Arc::new(listeners), netns })
    }

    /// Finds or makes the pod's record. A record of the same UID in another namespace is of a pod that is gone.
    fn reserve(
        &mut self,
        pod: &PodSpec,
        netns: &Netns,
        cookie: u64,
        former: &Former,
    ) -> Result<u32, EnrolError> {
        for (slot, record) in self.maps.recorded() {
            if uid_of(&record) != pod.uid {
                continue;
            }
            if record.cookie == cookie {
                if let Some(record) = former.missing_in(&record) {
                    self.maps.records.insert(slot, record, 0).map_err(EnrolError::step("the record"))?;
                }
                return Ok(slot);
            }
            self.pods.remove(&pod.uid);
            self.dismantle(slot, &record).map_err(EnrolError::step("a new slot"))?;
        }
        let slot = self.maps.free_slot().ok_or(EnrolError::Full)?;
        let (uid, uid_len) = pack(pod.uid.0.as_bytes()).ok_or(EnrolError::TooLong)?;
        let (path, netns_len) = pack(pod.netns.as_os_str().as_bytes()).ok_or(EnrolError::TooLong)?;
        let (fwmark_accept, fwmark_reflect) = former.packed();
        let record = Record {
            netns_inode: netns.id().1,
            cookie,
            fwmark_accept,
            withdrawn: 0,
            uid_len,
            netns_len,
            fwmark_reflect,
            uid,
            netns: path,
        };
        self.maps.records.insert(slot, record, 0).map_err(EnrolError::step("the record"))?;
        Ok(slot)
    }

    /// Captures the pod: new connections from and to it go to `captured.listeners`. Idempotent; on a pod that
    /// an older daemon captured only the listeners change hands. When a step fails the pod is closed, as far as that
    /// is possible: its new connections are refused. Call again or `withdraw`.
    pub fn capture(&mut self, pod: &PodSpec, captured: &Captured) -> Result<(), EnrolError> {
        if !self.is_owner() {
            return Err(EnrolError::Superseded);
        }
        let known = self.pods.get_mut(&pod.uid).ok_or_else(|| EnrolError::NotBound(pod.uid.clone()))?;
        known.spec = pod.clone();
        known.watched.doubt();
        let slot = known.slot;
        let record = self.maps.records.get(&slot, 0).map_err(EnrolError::step("the record"))?;
        if record.withdrawn != 0 {
            let record = Record { withdrawn: 0, ..record };
            self.maps.records.insert(slot, record, 0).map_err(EnrolError::step("the record"))?;
        }
        self.maps.set_listeners(slot, &captured.listeners).map_err(EnrolError::step("the listeners"))?;
        known.listeners = Some(Arc::clone(&captured.listeners));
        // From here on nothing that happens in its namespace is missed.
        self.expect_changes(&pod.uid);
        let redirected = self.redirect(&pod.uid);
        match redirected {
            Ok(found) => found.log(&pod.uid),
            Err(error) => {
                self.shut(&pod.uid);
                return Err(error);
            }
        }
        // It has a slot by now, and what kept it closed is no longer needed.
        self.unslotted.remove(&pod.uid);
        warn_of_unanswered_probes(pod, captured);
        Ok(())
    }

    /// Attaches the lookup program, if it is not.
    pub(super) fn attach_lookup(&mut self, uid: &PodUid) -> Result<Ensured, EnrolError> {
        let Self { pods, pins, loader, .. } = self;
        let known = pods.get_mut(uid).ok_or_else(|| EnrolError::NotBound(uid.clone()))?;
        let Enrolled { slot, netns, links, renew, .. } = known;
        std::fs::create_dir_all(pins.pod(*slot)).map_err(EnrolError::step("the pins"))?;
        let wanted =
            Wanted { path: &pins.lookup(*slot), hook: Attach::SkLookup, target: netns.id().1, renew: *renew };
        let ensured = sys::ensure_link(
            &wanted,
            &mut links.lookup,
            || loader.object(*slot).and_then(|mut object| programs::load(&mut object, "steer")),
            |program| sys::attach(program, netns.as_fd().as_raw_fd() as u32, Attach::SkLookup),
        );
        ensured.map_err(EnrolError::step("the lookup program"))
    }

    /// Everything of `capture` but the listeners, for the reconciler as well; tells what was not as it should be.
    pub(super) fn redirect(&mut self, uid: &PodUid) -> Result<Found, EnrolError> {
        let known = self.pods.get_mut(uid).ok_or_else(|| EnrolError::NotBound(uid.clone()))?;
        let Enrolled { slot, cookie, netns, spec, crowded, .. } = known;
        let (slot, cookie, netns, path) = (*slot, *cookie, Arc::clone(netns), spec.netns.clone());
        let entered = |source| EnrolError::Netns { path: path.clone(), source };
        let inside = netns
            .run(|| inside(spec))
            .map_err(entered)?
            .map_err(EnrolError::step("rules, routes and settings"))?;
        let mut found = Found::default();
        found.repaired.extend(inside.added.iter().map(|what| format!("{what} was missing")));
        if inside.unknown > 0 && !*crowded {
            found.noticed.push(format!(
                "it has {} addresses more than the {ADDRESSES_PER_SLOT} there is room for: connections from and to them \
                 are refused",
                inside.unknown
            ));
        }
        *crowded = inside.unknown > 0;
        let probed: Vec<IpAddr> =
            spec.addresses.iter().take(PROBED_PER_SLOT as usize).map(|ip| canonical_ip(*ip)).collect();

        // Before the lookup program, which tells by them what the pod says to itself.
        let step = EnrolError::step("the map of addresses");
        if self.maps.set_addresses(slot, &inside.own).map_err(step)? {
            found.repaired.push("its addresses in the map were not current".to_owned());
        }
        match self.attach_lookup(uid)? {
            Ensured::Present => {}
            Ensured::Pinned => found.repaired.push("the lookup program was not pinned".to_owned()),
            Ensured::Attached => found.repaired.push("the lookup program was not attached".to_owned()),
        }
        if self.maps.set_pod_ips(slot, &probed).map_err(EnrolError::step("the map of pods"))? {
            found.repaired.push("its addresses for probes were not current".to_owned());
        }
        let entry = PodEntry { slot, flags: 0 };
        if self.maps.pods.get(&cookie, 0).ok() != Some(entry) {
            // From here on connections of the pod are marked.
            let step = EnrolError::step("the connect program's entry");
            self.maps.pods.insert(cookie, entry, 0).map_err(step)?;
            found.repaired.push("the connect program did not know it".to_owned());
        }
        let Self { pods, pins, devices_left, .. } = self;
        let known = pods.get_mut(uid).ok_or_else(|| EnrolError::NotBound(uid.clone()))?;
        let all = inside.devices.len();
        let Enrolled { renew, links, .. } = known;
        let guarded = netns
            .run(|| links.guards.ensure(pins, slot, &inside.devices, *renew))
            .map_err(entered)?
            .map_err(EnrolError::step("the guard (it needs Linux 6.6)"))?;
        found.repaired.extend(guarded.changed);
        for device in guarded.left {
            devices_left.fetch_add(1, Ordering::Relaxed);
            found.noticed.push(format!(
                "its device {device} was taken into another network namespace; the guard goes with it, so no connection \
                 gets out by it there"
            ));
        }
        if all > DEVICES_MAX {
            return Err(EnrolError::TooManyDevices { found: all, most: DEVICES_MAX });
        }
        if guarded.refused > 0 {
            let elsewhere = known.links.guards.elsewhere();
            return Err(EnrolError::TooManyElsewhere { elsewhere, refused: guarded.refused });
        }
        if guarded.unguarded > 0 {
            return Err(EnrolError::Unguarded(guarded.unguarded));
        }
        known.renew = false;
        known.closed = false;
        Ok(found)
    }

    /// Empties the pod's slot: new connections are refused at once, while the daemon can still accept what is
    /// queued. For a shutdown without a successor; `capture` brings it back.
    pub fn close(&mut self, uid: &PodUid) -> Result<(), WithdrawError> {
        if !self.is_owner() {
            return Err(WithdrawError::Superseded);
        }
        let known = self.pods.get_mut(uid).ok_or_else(|| WithdrawError::Unknown(uid.clone()))?;
        known.listeners = None;
        self.maps.clear_listeners(known.slot);
        Ok(())
    }

    /// [`Node::close`] for every pod; does nothing once a newer daemon owns the node.
    pub fn close_all(&mut self) {
        if self.is_owner() {
            for known in self.pods.values_mut() {
                known.listeners = None;
                self.maps.clear_listeners(known.slot);
            }
        }
    }

    /// Listens for tunnels where those arrive that are steered no longer: peers dial them until they have heard that the
    /// pod is withdrawn. To be called before.
    pub fn listen_for_the_late(&self, uid: &PodUid) -> io::Result<Arc<TcpListener>> {
        let known = self.pods.get(uid).ok_or(io::ErrorKind::NotFound)?;
        known.netns.run(listeners::bind_in_the_open)?.map(Arc::new)
    }

    /// Stops capturing new connections. Open ones go on: the routes they need stay until [`Node::forget`].
    pub fn withdraw(&mut self, uid: &PodUid) -> Result<(), WithdrawError> {
        if !self.is_owner() {
            return Err(WithdrawError::Superseded);
        }
        let had_no_slot = self.open_without_slot(uid);
        let (slot, record) = match self.record(uid) {
            Err(WithdrawError::Unknown(_)) if had_no_slot => return Ok(()),
            found => found?,
        };
        if let Some(known) = self.pods.get_mut(uid) {
            known.listeners = None;
            known.closed = false;
            known.links = Links::default();
        }
        self.open_up(slot, &record)
    }

    /// Removes what is left of a withdrawn pod, once its connections have drained (those still open break).
    pub fn forget(&mut self, uid: &PodUid) -> Result<(), WithdrawError> {
        if !self.is_owner() {
            return Err(WithdrawError::Superseded);
        }
        let (slot, record) = self.record(uid)?;
        if let Some(known) = self.pods.get_mut(uid) {
            known.listeners = None;
            known.links = Links::default();
        }
        self.dismantle(slot, &record)?;
        self.pods.remove(uid);
        Ok(())
    }

    /// Removes what a dead daemon left for pods that are neither in `keep` nor enrolled by us, and the state of
    /// older versions. Call it once the pods of this node are known and enrolled. Returns the removed pods.
    pub fn sweep(&mut self, keep: &HashSet<PodUid>) -> Vec<PodUid> {
        let mut swept = Vec::new();
        if !self.is_owner() {
            return swept;
        }
        let mut over = self.maps.recorded();
        over.retain(|(_, record)| {
            let uid = uid_of(record);
            !keep.contains(&uid) && !self.pods.contains_key(&uid)
        });
        for (uid, dismantled) in self.dismantle_all(over) {
            match dismantled {
                Ok(()) => swept.push(uid),
                Err(error) => tracing::warn!(pod = %uid, %error, "cannot sweep a pod that is gone"),
            }
        }
        self.open_strangers();
        if self.renew
            && let Err(error) = self.note_programs()
        {
            tracing::warn!(%error, "the programs will be renewed once more");
        }
        for version in self.pins.other_versions() {
            if let Err(error) = Pins::of_version(&self.config.pin_dir, &version).remove_all() {
                tracing::warn!(version, %error, "cannot remove the pins of another version");
            }
        }
        swept
    }

    fn record(&self, uid: &PodUid) -> Result<(u32, Record), WithdrawError> {
        let found = self.maps.recorded().into_iter().find(|(_, record)| uid_of(record) == *uid);
        found.ok_or_else(|| WithdrawError::Unknown(uid.clone()))
    }

    /// The reverse of `redirect` as far as new connections are concerned.
    fn open_up(&mut self, slot: u32, record: &Record) -> Result<(), WithdrawError> {
        let marking = self.stop_marking(slot, record)?;
        std::thread::sleep(left_to_wait([marking], Instant::now()));
        self.stop_steering(slot, record)
    }

    /// Its first half: what the pod dials from now on goes its own way. Tells when that began, unless nothing that was
    /// marked before can be on its way.
    fn stop_marking(&mut self, slot: u32, record: &Record) -> Result<Option<Instant>, WithdrawError> {
        let here = self.pins.guarded(slot).into_iter().map(|device| self.pins.guard(slot, device));
        let elsewhere =
            self.pins.guarded_elsewhere(slot).into_iter().map(|link| self.pins.guard_elsewhere(slot, link));
        for guard in here.chain(elsewhere) {
            sys::detach(&guard).map_err(WithdrawError::step("the guard"))?;
        }
        let marked = self.maps.pods.get(&record.cookie, 0).is_ok();
        absent(self.maps.pods.remove(&record.cookie))
            .map_err(WithdrawError::step("the connect program's entry"))?;
        // Nobody dials in a namespace that is gone.
        Ok((marked && self.netns_of(record).is_some()).then(Instant::now))
    }

    /// Its second half. A connection that was marked just before sends its SYN meanwhile, and nobody else than the lookup
    /// program takes it: so not before what [`left_to_wait`] says.
    fn stop_steering(&mut self, slot: u32, record: &Record) -> Result<(), WithdrawError> {
        self.maps.set_pod_ips(slot, &[]).map_err(WithdrawError::step("the map of pods"))?;
        sys::detach(&self.pins.lookup(slot)).map_err(WithdrawError::step("the lookup program"))?;
        self.maps.set_addresses(slot, &[]).map_err(WithdrawError::step("the map of addresses"))?;
        self.maps.clear_listeners(slot);
        let record = Record { withdrawn: 1, ..*record };
        self.maps.records.insert(slot, record, 0).map_err(WithdrawError::step("the record"))
    }

    /// [`Self::dismantle`] for many, which costs no more time than one. What comes of each.
    pub(super) fn dismantle_all(
        &mut self,
        pods: Vec<(u32, Record)>,
    ) -> Vec<(PodUid, Result<(), WithdrawError>)> {
        let begun: Vec<_> =
            pods.into_iter().map(|(slot, record)| (self.stop_marking(slot, &record), slot, record)).collect();
        let marking = begun.iter().filter_map(|(marking, ..)| marking.as_ref().ok().copied());
        std::thread::sleep(left_to_wait(marking, Instant::now()));
        let mut done = Vec::with_capacity(begun.len());
        for (marking, slot, record) in begun {
            let dismantled = marking.and_then(|_| self.stop_steering(slot, &record));
            done.push((uid_of(&record), dismantled.and_then(|()| self.clear(slot, &record))));
        }
        done
    }

    /// All of a pod, whatever state it is in. Works when its namespace is gone.
    pub(super) fn dismantle(&mut self, slot: u32, record: &Record) -> Result<(), WithdrawError> {
        self.open_up(slot, record)?;
        self.clear(slot, record)
    }

    /// What is left of a pod that is opened up.
    fn clear(&mut self, slot: u32, record: &Record) -> Result<(), WithdrawError> {
        if let Some(netns) = self.netns_of(record) {
            let undone = netns.run(|| {
                routes::remove(&mut Netlink::open()?)?;
                Former::of(record).restore()
            });
            undone.and_then(|result| result).map_err(WithdrawError::step("rules and routes"))?;
        }
        gone(std::fs::remove_dir_all(self.pins.pod(slot))).map_err(WithdrawError::step("the pins"))?;
        absent(self.maps.records.remove(&slot)).map_err(WithdrawError::step("the record"))
    }

    /// Every pod that this or an earlier daemon captured, and whether its network namespace still exists.
    pub fn recorded(&self) -> Vec<(PodUid, bool)> {
        let recorded = self.maps.recorded().into_iter();
        recorded.map(|(_, record)| (uid_of(&record), self.netns_of(&record).is_some())).collect()
    }

    /// The pod's namespace if it still exists (or we hold it).
    fn netns_of(&self, record: &Record) -> Option<Arc<Netns>> {
        if let Some(known) = self.pods.values().find(|known| known.cookie == record.cookie) {
            return Some(Arc::clone(&known.netns));
        }
        let path = Path::new(std::ffi::OsStr::from_bytes(unpack(&record.netns, record.netns_len)));
        let netns = Netns::open(path).ok()?;
        let cookie = netns.run(listeners::current_netns_cookie).ok()?.ok()?;
        (cookie == record.cookie).then(|| Arc::new(netns))
    }
}

/// Without a mesh a pod needs no more than a route to its node. From inside the mesh it sees the node at an address of
/// its own, to which it needs one, too.
fn warn_of_unanswered_probes(pod: &PodSpec, captured: &Captured) {
    let found = captured.netns.run(|| host::unanswered(&pod.addresses)).and_then(|found| found);
    for from in found.unwrap_or_default() {
        tracing::warn!(
            pod = %pod.uid,
            %from,
            "the node's own connections to the pod come from an address to which the pod has no route: kubelet's probes of \
             it will fail; give the pod a default route, or one to that address"
        );
    }
}

/// How long it is until of the pods that were marked until then nothing that is marked is on its way any more.
fn left_to_wait(marked_until: impl IntoIterator<Item = Option<Instant>>, now: Instant) -> Duration {
    let last = marked_until.into_iter().flatten().max();
    last.map_or(Duration::ZERO, |last| (last + MARKED_WITHIN).saturating_duration_since(now))
}

/// What was not as it should be.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// And is again.
    pub repaired: Vec<String>,
    /// And stays so. Said once.
    pub noticed: Vec<String>,
}

impl Found {
    fn log(&self, uid: &PodUid) {
        self.noticed.iter().for_each(|what| tracing::warn!(pod = %uid, "{what}"));
    }
}

/// What was found and done in a pod's namespace.
struct Inside {
    added: Vec<&'static str>,
    own: Vec<IpAddr>,
    /// How many addresses there are that `own` has no room for.
    unknown: usize,
    devices: Vec<routes::Device>,
}

/// Rules, routes, the sysctls; and a look at addresses and devices. Runs in the pod's namespace.
fn inside(pod: &PodSpec) -> io::Result<Inside> {
    let mut netlink = Netlink::open()?;
    let ensured = routes::ensure(&mut netlink, &routes::families(&pod.addresses));
    let mut added = ensured.map_err(|error| match error.raw_os_error() {
        // What the kernel says of a source address that is nobody's.
        Some(libc::EINVAL) => io::Error::new(
            error.kind(),
            format!("{error}: does a device of the pod have its addresses {:?}?", pod.addresses),
        ),
        _ => error,
    })?;
    added.extend(sysctls::ensure()?);
    let (own, unknown) = own_addresses(&pod.addresses, routes::addresses(&mut netlink)?);
    Ok(Inside { added, own, unknown, devices: routes::devices(&mut netlink)? })
}

/// The addresses the programs are told of, those the mesh knows first, and how many there is no room for.
fn own_addresses(known: &[IpAddr], mut found: Vec<IpAddr>) -> (Vec<IpAddr>, usize) {
    let mut own = Vec::new();
    for ip in known.iter().map(|ip| canonical_ip(*ip)) {
        if !own.contains(&ip) {
            own.push(ip);
        }
    }
    found.sort_unstable();
    found.dedup();
    found.retain(|ip| !own.contains(ip));
    own.extend(found);
    let all = own.len();
    own.truncate(ADDRESSES_PER_SLOT as usize);
    (own, all - all.min(ADDRESSES_PER_SLOT as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pods_are_waited_for_together_and_those_that_nobody_dials_in_not_at_all() {
        let now = Instant::now();
        let millis = Duration::from_millis;
        let ago = |ms| Some(now.checked_sub(millis(ms)).expect("the machine runs for longer"));
        assert_eq!(left_to_wait([], now), Duration::ZERO);
        assert_eq!(left_to_wait([None, None], now), Duration::ZERO);
        assert_eq!(left_to_wait([Some(now)], now), MARKED_WITHIN);
        assert_eq!(left_to_wait([ago(9), ago(4), None, ago(7)], now), millis(6));
        assert_eq!(left_to_wait([ago(11)], now), Duration::ZERO);
    }

    #[test]
    fn the_addresses_that_the_mesh_knows_have_room_first() {
        let ip = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        let known = [ip(9), ip(7), ip(9)];
        assert_eq!(own_addresses(&known, vec![ip(8), ip(7), ip(8)]), (vec![ip(9), ip(7), ip(8)], 0));
        let many: Vec<IpAddr> = (100..17_100).map(ip).collect();
        let (own, unknown) = own_addresses(&known, many);
        assert_eq!((own.len(), unknown), (ADDRESSES_PER_SLOT as usize, 17_002 - ADDRESSES_PER_SLOT as usize));
        assert_eq!(own[..3], [ip(9), ip(7), ip(100)]);
    }
}
