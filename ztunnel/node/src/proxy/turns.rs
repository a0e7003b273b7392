//! Turns on a data-plane thread, shared out among those whose work is done there.
//!
//! A thread gives each of its tasks a turn, one after the other. Whoever has a thousand connections on which something
//! moves would have a thousand turns for one of another's; and a request of the other waits through six such rounds on
//! its way there and back. So tasks are in a [`Lane`]: that of who causes their work. A lane whose tasks have worked for
//! [`SLICE`] has had its turn; its tasks then wait, in their order, until everybody else had theirs, and those whose
//! sockets are ready by then as well.
//!
//! A lane that never works for so long at a time costs nothing but the look at the clock.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
use pin_project_lite::pin_project;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_runtime::shutdown;

use crate::proxy::handshakes::Source;

/// How long the tasks of one lane work in one turn: a few passes over what moves most. A task is not interrupted.
pub const SLICE: Duration = Duration::from_micros(500);

/// The lanes of one thread.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    all: HashMap<Key, Weak<Mutex<State>>>,
    /// How many there may be before those are forgotten that nobody is in.
    look_at: usize,
}

/// Who causes work: what a pod dials is its own, what comes to it is theirs who dial it.
type Key = (PodUid, Option<Source>);

/// Lanes kept without a look whether anybody is in them.
const LANES_MIN: usize = 64;

impl Lanes {
    /// The lane of what `pod` dials.
    pub fn of_pod(&self, pod: &PodUid) -> Lane {
        self.of((pod.clone(), None))
    }

    /// The lane of what `source` dials of `pod`.
    pub fn of_source(&self, pod: &PodUid, source: IpAddr) -> Lane {
        self.of((pod.clone(), Some(source.into())))
    }

    fn of(&self, key: Key) -> Lane {
        let mut known = self.0.lock();
        if let Some(state) = known.all.get(&key).and_then(Weak::upgrade) {
            return Lane(state);
        }
        if known.all.len() >= known.look_at.max(LANES_MIN) {
            known.all.retain(|_, state| state.strong_count() > 0);
            known.look_at = 2 * known.all.len();
        }
        let state = Arc::default();
        known.all.insert(key, Arc::downgrade(&state));
        Lane(state)
    }
}

/// Those who share turns. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Lane(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// How long its tasks have worked in this turn.
    used: Duration,
    /// Whether the turn is over, or others wait for the next.
    over: bool,
    waiting: VecDeque<Arc<Place>>,
    /// Who is let in now.
    next: Option<Arc<Place>>,
}

impl State {
    /// Lets the next in. Whether there is one, or one that was let in and had no turn yet.
    fn let_in(&mut self) -> bool {
        // Those who are gone, and those who were, keep no place.
        let waits = |place: &Arc<Place>| Arc::strong_count(place) > 1;
        if self.next.as_ref().is_some_and(waits) {
            return true;
        }
        self.next = None;
        while let Some(place) = self.waiting.pop_front() {
            if waits(&place) {
                place.is_in.store(true, Ordering::Release);
                place.waker.wake();
                self.next = Some(place);
                return true;
            }
        }
        false
    }
}

/// The place of a task that waits.
#[derive(Debug, Default)]
struct Place {
    is_in: AtomicBool,
    waker: AtomicWaker,
}

impl Lane {
    /// Has `future` run in this lane.
    pub fn run<F: Future>(self, future: F) -> Turns<F> {
        Turns { future, lane: self, place: None }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    /// Whether a task may work now. If not it is woken when it may.
    fn enter(&self, place: &mut Option<Arc<Place>>, cx: &Context<'_>) -> bool {
        if let Some(own) = place {
            own.waker.register(cx.waker());
            let is_in = own.is_in.load(Ordering::Acquire);
            if is_in {
                *place = None;
            }
            return is_in;
        }
        let mut state = self.state();
        if !state.over {
            return true;
        }
        let own = Arc::new(Place::default());
        own.waker.register(cx.waker());
        state.waiting.push_back(Arc::clone(&own));
        *place = Some(own);
        false
    }

    /// A task has worked so long.
    fn worked(&self, time: Duration) {
        let mut state = self.state();
        state.used += time;
        if state.used < SLICE {
            if state.over {
                state.let_in();
            }
        } else if !state.over {
            state.over = true;
            drop(state);
            let lane = self.clone();
            shutdown::spawn(async move { lane.take_turns().await });
        }
    }

    /// Begins a turn whenever all others had theirs, until nobody waits.
    async fn take_turns(self) {
        loop {
            tokio::task::yield_now().await;
            let mut state = self.state();
            state.used = Duration::ZERO;
            if !state.let_in() {
                state.over = false;
                return;
            }
        }
    }
}

pin_project! {
    /// A future that runs in a lane.
    #[derive(Debug)]
    pub struct Turns<F> {
        #[pin]
        future: F,
        lane: Lane,
        // While it waits.
        place: Option<Arc<Place>>,
    }
}

impl<F: Future> Future for Turns<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if !this.lane.enter(this.place, cx) {
            return Poll::Pending;
        }
        let begun = Instant::now();
        let polled = this.future.poll(cx);
        this.lane.worked(begun.elapsed());
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Longer than anything takes, on whatever machine.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Has so many turns, of which each takes a while, and counts them.
    fn work(turns: usize, count: &Arc<AtomicUsize>) -> impl Future<Output = ()> + Send + use<> {
        let (mut left, count) = (turns, Arc::clone(count));
        poll_fn(move |cx| {
            std::thread::sleep(SLICE / 3);
            count.fetch_add(1, Ordering::Relaxed);
            left -= 1;
            if left == 0 {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// How much a crowd works while somebody else has so many turns.
    async fn crowd_works(crowd: usize, spawn: impl Fn(Pin<Box<dyn Future<Output = ()> + Send>>)) -> usize {
        const TURNS: usize = 20;
        let count = Arc::default();
        for _ in 0..crowd {
            spawn(Box::pin(work(usize::MAX, &count)));
        }
        // It is at work.
        while count.load(Ordering::Relaxed) < crowd {
            tokio::task::yield_now().await;
        }
        let before = count.load(Ordering::Relaxed);
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
        (count.load(Ordering::Relaxed) - before) / TURNS
    }

    #[tokio::test]
    async fn a_crowd_has_turns_as_one() {
        let lane = Lane::default();
        let shared = crowd_works(100, |task| drop(shutdown::spawn(lane.clone().run(task)))).await;
        // It works until it has worked for the slice; no task of it for less than a third of that.
        assert!(shared <= 4, "{shared} for each turn of another");
    }

    #[tokio::test]
    async fn all_of_a_lane_have_their_turns() {
        let lane = Lane::default();
        let counts: Vec<Arc<AtomicUsize>> = (0..20).map(|_| Arc::default()).collect();
        let tasks = counts.iter().map(|count| shutdown::spawn(lane.clone().run(work(10, count))));
        let mut tasks: Vec<_> = tasks.collect();
        // Some are gone while they wait, or when it is their turn.
        while counts[19].load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let gone = tasks.split_off(10);
        gone.iter().for_each(tokio::task::JoinHandle::abort);
        for task in tasks {
            tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
        }
        for count in &counts[..10] {
            assert_eq!(count.load(Ordering::Relaxed), 10);
        }
        drop(gone);
        // And the lane is as it was at first.
        let over = async {
            while lane.state().over {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, over).await.unwrap();
        tokio::time::timeout(PATIENCE, lane.clone().run(work(3, &Arc::default()))).await.unwrap();
        assert!(lane.state().waiting.is_empty());
    }

    #[test]
    fn lanes_are_those_of_who_causes_the_work() {
        let lanes = Lanes::default();
        let same = |one: &Lane, other: &Lane| Arc::ptr_eq(&one.0, &other.0);
        let (pod, other): (PodUid, PodUid) = ("pod".into(), "other".into());
        let ip = |n: u8| IpAddr::from([10, 0, 0, n]);
        let dials = lanes.of_pod(&pod);
        assert!(same(&dials, &lanes.of_pod(&pod)));
        assert!(!same(&dials, &lanes.of_pod(&other)));
        let one = lanes.of_source(&pod, ip(1));
        assert!(same(&one, &lanes.of_source(&pod, ip(1))));
        for different in [lanes.of_source(&pod, ip(2)), lanes.of_source(&other, ip(1)), dials] {
            assert!(!same(&one, &different));
        }
        // Those that nobody is in are forgotten.
        for n in 0..10 * LANES_MIN {
            lanes.of_source(&format!("pod-{n}").as_str().into(), ip(1));
        }
        assert!(lanes.0.lock().all.len() <= LANES_MIN);
    }
}
