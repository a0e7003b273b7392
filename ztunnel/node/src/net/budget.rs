//! What the daemon holds for others, in bytes, and who gives way when it is too much.
//!
//! Everything that a peer's silence can fill is charged to a [`Holder`]: a connection, a stream or a tunnel. Holders
//! are of a [`Share`], a pod's, and shares are of the [`Budget`], the node's. Charging never fails and never waits:
//! what was received is there. When a share or the budget is used up, holders are told to let go ([`Holder::poll_shed`]): of
//! the pod that holds most, of the source that makes it hold most, the one that holds most; until an eighth is free again,
//! so that a crowd of small holders is looked through once for many and not once for each.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;
use tokio::time::Instant;

/// Of the node's budget one pod may use one part in so many.
pub const POD_PART: usize = 2;

/// How much is free after something had to give way, as a part of the whole.
const FREED_PART: usize = 8;

/// How often is told that something had to give way.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// How much of the budget is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Less than a quarter.
    None,
    /// More: what is kept is kept in as little memory as it needs.
    Some,
    /// More than half: less is taken at a time.
    Much,
}

/// What all pods of the node may make the daemon hold. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Node>);

struct Node {
    limit: usize,
    used: AtomicUsize,
    /// Of `used`, what those hold who were told to let go and have not done so yet.
    leaving: AtomicUsize,
    shares: Mutex<Vec<Weak<Share>>>,
    shed: AtomicU64,
    told: Mutex<Told>,
}

/// What was told of those who had to give way.
#[derive(Debug, Default)]
struct Told {
    at: Option<Instant>,
    /// How many since.
    since: u64,
}

/// What one pod makes the daemon hold.
pub struct Share {
    node: Arc<Node>,
    name: String,
    used: AtomicUsize,
    leaving: AtomicUsize,
    holders: Mutex<Slab<Arc<Slot>>>,
}

struct Slot {
    share: Arc<Share>,
    /// Who dialled the pod; `None` where the pod itself dials.
    source: Option<IpAddr>,
    /// What it costs even while it holds no bytes of anybody.
    cost: usize,
    /// Where it is among the holders of its share, which know it until it is dropped.
    key: usize,
    held: AtomicUsize,
    shed: AtomicBool,
    /// What it held when it was told to let go. Written before it can be dropped, under the lock of all holders.
    leaving: AtomicUsize,
    waker: AtomicWaker,
}

/// One that holds something. It holds nothing any more when dropped.
pub struct Holder {
    slot: Arc<Slot>,
}

impl Budget {
    /// So many bytes for all.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Node {
            limit,
            used: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            shares: Mutex::default(),
            shed: AtomicU64::new(0),
            told: Mutex::default(),
        }))
    }

    /// The share of a pod that is called so in the log.
    pub fn share(&self, name: String) -> Arc<Share> {
        let share = Arc::new(Share {
            node: Arc::clone(&self.0),
            name,
            used: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            holders: Mutex::default(),
        });
        let mut shares = self.0.shares.lock();
        shares.retain(|share| share.strong_count() > 0);
        shares.push(Arc::downgrade(&share));
        share
    }

    /// How many bytes may be held.
    pub fn limit(&self) -> usize {
        self.0.limit
    }

    /// How many are.
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// How many connections, streams and tunnels had to give way.
    pub fn shed(&self) -> u64 {
        self.0.shed.load(Ordering::Relaxed)
    }
}

impl Node {
    fn over(&self) -> usize {
        over(&self.used, &self.leaving, self.limit)
    }

    /// Has those who hold most let go, if too much is held.
    fn relieve(&self, share: &Share) {
        let limit = self.limit / POD_PART;
        if share.over(limit) > 0 {
            share.relieve(|| if share.over(limit) > 0 { share.over(freed(limit)) } else { 0 });
        }
        while self.over() > 0 {
            let shares: Vec<_> = self.shares.lock().iter().filter_map(Weak::upgrade).collect();
            let stays = |share: &Arc<Share>| {
                let used = share.used.load(Ordering::Relaxed);
                used.saturating_sub(share.leaving.load(Ordering::Relaxed))
            };
            let Some(largest) = shares.iter().max_by_key(|share| stays(share)) else { return };
            // No more than what makes it as large as another pod is: then that one's turn comes as well.
            let next = shares.iter().filter(|share| !Arc::ptr_eq(share, largest)).map(stays).max();
            let next = next.unwrap_or_default();
            let wanted = || {
                if self.over() == 0 {
                    return 0;
                }
                let above = stays(largest).saturating_sub(next);
                let least = self.limit / FREED_PART / FREED_PART;
                over(&self.used, &self.leaving, freed(self.limit)).min(above.max(least).max(1))
            };
            if largest.relieve(wanted) == 0 {
                return;
            }
        }
    }

    fn tell(&self, name: &str, count: u64, bytes: usize) {
        self.shed.fetch_add(count, Ordering::Relaxed);
        let mut told = self.told.lock();
        told.since += count;
        if told.at.is_none_or(|at| at.elapsed() >= TOLD_EVERY) {
            let (used, limit, closed) = (self.used.load(Ordering::Relaxed), self.limit, told.since);
            tracing::warn!(
                pod = name,
                closed,
                bytes,
                used,
                limit,
                "closed those who hold most: the memory for what peers do not take is used up"
            );
            *told = Told { at: Some(Instant::now()), since: 0 };
        }
    }
}

fn freed(limit: usize) -> usize {
    limit - limit / FREED_PART
}

/// How much each of those who hold so much may keep, so that so much is let go: who holds less loses nothing.
fn level(mut held: Vec<usize>, wanted: usize) -> usize {
    held.sort_unstable_by_key(|held| std::cmp::Reverse(*held));
    let mut all: usize = 0;
    for (at, own) in held.iter().enumerate() {
        all += own;
        let (count, next) = (at + 1, held.get(at + 1).copied().unwrap_or_default());
        let freed = all - count * next;
        if freed >= wanted {
            return next + (freed - wanted) / count;
        }
    }
    0
}

fn over(used: &AtomicUsize, leaving: &AtomicUsize, limit: usize) -> usize {
    used.load(Ordering::Relaxed).saturating_sub(leaving.load(Ordering::Relaxed)).saturating_sub(limit)
}

impl Share {
    /// One more that costs so much, whether it holds anything or not, for what the pod itself dials.
    pub fn holder(self: &Arc<Self>, cost: usize) -> Holder {
        self.holder_of(None, cost)
    }

    /// The same, for what `source` dials of the pod.
    pub fn holder_for(self: &Arc<Self>, source: IpAddr, cost: usize) -> Holder {
        self.holder_of(Some(source), cost)
    }

    fn holder_of(self: &Arc<Self>, source: Option<IpAddr>, cost: usize) -> Holder {
        let holder = {
            let mut holders = self.holders.lock();
            let entry = holders.vacant_entry();
            let slot = Arc::new(Slot {
                share: Arc::clone(self),
                source,
                cost,
                key: entry.key(),
                held: AtomicUsize::new(0),
                shed: AtomicBool::new(false),
                leaving: AtomicUsize::new(0),
                waker: AtomicWaker::new(),
            });
            entry.insert(Arc::clone(&slot));
            Holder { slot }
        };
        holder.set(0);
        holder
    }

    /// How much of the node's budget is used, by whomever.
    pub fn pressure(&self) -> Pressure {
        let (used, limit) = (self.node.used.load(Ordering::Relaxed), self.node.limit);
        let own = self.used.load(Ordering::Relaxed).saturating_mul(POD_PART);
        match used.max(own) {
            used if used >= limit / 2 => Pressure::Much,
            used if used >= limit / 4 => Pressure::Some,
            _ => Pressure::None,
        }
    }

    /// How many bytes the pod makes the daemon hold.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn over(&self, limit: usize) -> usize {
        over(&self.used, &self.leaving, limit)
    }

    /// Has those who hold most let go of so many bytes, and says how many it were. How many that has to be is asked once
    /// nobody else is at it: what others have closed meanwhile need not be closed again.
    fn relieve(&self, wanted: impl FnOnce() -> usize) -> usize {
        let holders = self.holders.lock();
        let wanted = wanted();
        if wanted == 0 {
            return 0;
        }
        let mut all: Vec<(usize, &Arc<Slot>)> = holders
            .iter()
            .filter(|(_, slot)| !slot.shed.load(Ordering::Relaxed))
            .map(|(_, slot)| (slot.held.load(Ordering::Relaxed), slot))
            .collect();
        all.sort_unstable_by_key(|(held, _)| std::cmp::Reverse(*held));
        let mut of: HashMap<Option<IpAddr>, usize> = HashMap::new();
        for (held, slot) in &all {
            *of.entry(slot.source).or_default() += held;
        }
        let level = level(of.values().copied().collect(), wanted);
        let (mut count, mut bytes) = (0, 0);
        for (held, slot) in all {
            if bytes >= wanted {
                break;
            }
            let Some(left) = of.get_mut(&slot.source).filter(|left| **left > level) else { continue };
            *left = left.saturating_sub(held);
            if slot.shed.swap(true, Ordering::Relaxed) {
                continue;
            }
            let held = slot.held.load(Ordering::Relaxed);
            slot.leaving.store(held, Ordering::Relaxed);
            self.leaving.fetch_add(held, Ordering::Relaxed);
            self.node.leaving.fetch_add(held, Ordering::Relaxed);
            slot.waker.wake();
            (count, bytes) = (count + 1, bytes + held);
        }
        drop(holders);
        if count > 0 {
            self.node.tell(&self.name, count, bytes);
        }
        bytes
    }
}

impl Holder {
    /// It holds so many bytes now.
    pub fn set(&self, bytes: usize) {
        let (share, slot) = (&self.slot.share, &self.slot);
        let held = bytes.saturating_add(slot.cost);
        let before = slot.held.load(Ordering::Relaxed);
        // What was told to let go is counted as it was then, until it is gone.
        if held == before || slot.shed.load(Ordering::Relaxed) {
            return;
        }
        // Only the holder itself changes it.
        slot.held.store(held, Ordering::Relaxed);
        if held < before {
            share.used.fetch_sub(before - held, Ordering::Relaxed);
            share.node.used.fetch_sub(before - held, Ordering::Relaxed);
            return;
        }
        let own = share.used.fetch_add(held - before, Ordering::Relaxed) + held - before;
        let all = share.node.used.fetch_add(held - before, Ordering::Relaxed) + held - before;
        if all > share.node.limit || own > share.node.limit / POD_PART {
            share.node.relieve(share);
        }
    }

    /// How many bytes it is charged for.
    pub fn held(&self) -> usize {
        self.slot.held.load(Ordering::Relaxed)
    }

    /// Whose it is.
    pub fn share(&self) -> &Arc<Share> {
        &self.slot.share
    }

    /// Waits for `future`, unless it has to give way meanwhile: then that is dropped.
    pub async fn run<T>(&self, future: impl Future<Output = T>) -> Result<T, Shed> {
        let mut future = pin!(future);
        poll_fn(|cx| match self.poll_shed(cx) {
            Poll::Ready(shed) => Poll::Ready(Err(shed)),
            Poll::Pending => future.as_mut().poll(cx).map(Ok),
        })
        .await
    }

    /// Ready when it has to give way.
    pub fn poll_shed(&self, cx: &Context<'_>) -> Poll<Shed> {
        if !self.slot.shed.load(Ordering::Relaxed) {
            self.slot.waker.register(cx.waker());
            if !self.slot.shed.load(Ordering::Relaxed) {
                return Poll::Pending;
            }
        }
        Poll::Ready(Shed(self.held()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let (share, slot) = (&self.slot.share, &self.slot);
        // From here on it is not told to let go any more.
        share.holders.lock().remove(slot.key);
        let leaving = slot.leaving.load(Ordering::Relaxed);
        share.leaving.fetch_sub(leaving, Ordering::Relaxed);
        share.node.leaving.fetch_sub(leaving, Ordering::Relaxed);
        let held = slot.held.load(Ordering::Relaxed);
        share.used.fetch_sub(held, Ordering::Relaxed);
        share.node.used.fetch_sub(held, Ordering::Relaxed);
    }
}

/// It had to give way: it held so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("closed because the memory for what peers do not take is used up, and it held {0} bytes")]
pub struct Shed(pub usize);

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("limit", &self.limit).field("used", &self.used).finish_non_exhaustive()
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share").field("name", &self.name).field("used", &self.used).finish_non_exhaustive()
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("share", &self.slot.share.name).field("held", &self.held()).finish()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker_ref;

    use super::*;

    fn is_shed(holder: &Holder) -> bool {
        holder.poll_shed(&Context::from_waker(noop_waker_ref())).is_ready()
    }

    fn shed(holders: &[Holder]) -> Vec<usize> {
        (0..holders.len()).filter(|index| is_shed(&holders[*index])).collect()
    }

    #[test]
    fn what_is_held_is_counted_until_it_is_let_go() {
        let budget = Budget::new(1000);
        let share = budget.share("one".to_owned());
        let one = share.holder(10);
        let two = share.holder(0);
        one.set(90);
        two.set(50);
        assert_eq!((budget.used(), share.used(), one.held()), (150, 150, 100));
        one.set(0);
        assert_eq!(budget.used(), 60);
        drop((one, two));
        assert_eq!((budget.used(), share.used(), budget.shed()), (0, 0, 0));
    }

    #[test]
    fn who_holds_most_gives_way_first() {
        let budget = Budget::new(2000);
        let share = budget.share("one".to_owned());
        let holders: Vec<_> = (0..10).map(|_| share.holder(0)).collect();
        for (holder, bytes) in holders.iter().zip([50, 60, 300, 70, 80, 200, 90, 100, 10, 20]) {
            holder.set(bytes);
        }
        assert_eq!(share.used(), 980, "the pod's half is not used up");
        assert!(shed(&holders).is_empty());
        holders[0].set(80);
        // An eighth of 1,000 is free again without the largest.
        assert_eq!(shed(&holders), [2]);
        // It counts until it is gone, and nobody else gives way for it meanwhile.
        assert_eq!(share.used(), 1010);
        holders[1].set(100);
        assert_eq!(shed(&holders), [2]);
        // Nor does it hold more meanwhile.
        holders[2].set(5000);
        assert_eq!((share.used(), budget.shed()), (1050, 1));
    }

    #[test]
    fn the_source_that_has_most_held_gives_way_first() {
        let budget = Budget::new(2000);
        let share = budget.share("one".to_owned());
        let source = |n: u8| IpAddr::from([10, 0, 0, n]);
        // Somebody else's, and the pod's own, of which each holds more than any of the crowd's.
        let others = [share.holder_for(source(1), 90), share.holder_for(source(2), 90), share.holder(90)];
        let crowd: Vec<_> = (0..100).map(|_| share.holder_for(source(3), 10)).collect();
        assert!(shed(&others).is_empty(), "{:?}", shed(&others));
        assert!(shed(&crowd).len() >= 27, "an eighth of 1,000 is free: {:?}", shed(&crowd));
        assert!(share.used() - share.leaving.load(Ordering::Relaxed) <= 1000);
    }

    #[test]
    fn who_holds_less_than_others_loses_nothing() {
        for (held, wanted, expect) in [
            (&[100][..], 30, 70),
            (&[100, 10, 10], 30, 70),
            (&[50, 50, 10], 30, 35),
            (&[50, 40, 10], 30, 30),
            (&[10, 10, 10], 30, 0),
            (&[10, 10, 10], 40, 0),
            (&[], 10, 0),
        ] {
            let got = level(held.to_vec(), wanted);
            assert_eq!(got, expect, "{held:?}");
            let freed: usize = held.iter().map(|held| held.saturating_sub(got)).sum();
            assert!(freed >= wanted.min(held.iter().sum()), "{held:?} {wanted}");
        }
    }

    #[test]
    fn the_pod_that_holds_most_gives_way_first() {
        let budget = Budget::new(1000);
        let [many, few] = ["many", "few"].map(|name| budget.share(name.to_owned()));
        let small: Vec<_> = (0..45).map(|_| many.holder(10)).collect();
        let large: Vec<_> = (0..2).map(|_| few.holder(200)).collect();
        let more = budget.share("more".to_owned()).holder(150);
        assert!(shed(&small).is_empty() && shed(&large).is_empty(), "{budget:?}");
        more.set(20);
        // 20 above the limit, 145 above what it is to be: 50 of those make the crowd as small as the other pod.
        assert!(shed(&small).len() >= 5, "{:?}", shed(&small));
        assert!(!is_shed(&more));
        let stays = |holders: &[Holder]| -> usize {
            holders.iter().filter(|holder| !is_shed(holder)).map(Holder::held).sum()
        };
        assert!(stays(&small) + stays(&large) + more.held() <= 1000);
        drop((small, large, more));
        assert_eq!(budget.used(), 0);
        assert_eq!(budget.0.leaving.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn who_is_gone_no_longer_counts_as_leaving() {
        let budget = Budget::new(100);
        let share = budget.share("one".to_owned());
        let holder = share.holder(0);
        holder.set(1000);
        assert!(is_shed(&holder));
        assert_eq!(holder.poll_shed(&Context::from_waker(noop_waker_ref())), Poll::Ready(Shed(1000)));
        drop(holder);
        let next = share.holder(0);
        next.set(49);
        assert!(!is_shed(&next));
        assert_eq!(share.pressure(), Pressure::Much, "a pod's part is as good as all of it");
        next.set(51);
        assert!(is_shed(&next));
    }
}
