//! What a tunnel's streams put on it together, and how much its peer still takes.
//!
//! HTTP/2 keeps what is to be sent until the socket takes it. Each piece of it is a [`Piece`], which counts on its
//! tunnel's [`Flow`], and in its stream's [`Queue`], until it has been encrypted or thrown away, whatever became of its
//! stream.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::net::budget::Holder;
use crate::net::budget::Pressure;
use crate::net::budget::Shed;

/// What a peer may send before it is told otherwise (RFC 9113 §6.9.2).
const FIRST_WINDOW: i64 = 65_535;

/// A peer that has let nothing more be sent on all streams together for so long has no room for further ones. In bulk
/// its window is used up now and then, for a round trip.
const EXHAUSTED_AFTER: Duration = Duration::from_millis(100);

/// What DATA is worth in frames that carry nothing: peers acknowledge it with one update for the stream and one for
/// the connection.
const UPDATES_PER_PIECE: u64 = 2;

/// The smallest piece of DATA for which peers send such updates of their own.
const FRAME: usize = 4 * 1024;

/// More than a tunnel has streams.
const WAITING_MAX: usize = 512;

/// What the streams of one tunnel share.
#[derive(Debug)]
pub(super) struct Flow {
    /// Bytes that wait to be sent, at most about so many.
    buffered: AtomicUsize,
    buffered_max: usize,
    /// Those who wait for fewer to wait, some of whom may have ended: at most [`WAITING_MAX`].
    waiting: Mutex<Vec<Waker>>,
    /// Bytes the peer takes on all streams together, as far as they were not handed to HTTP/2 yet.
    window: AtomicI64,
    /// When that was used up, and nothing was added since.
    exhausted: Mutex<Option<Instant>>,
    /// Since when streams whose own windows are used up have taken the room that all share.
    stuck: Mutex<Option<Instant>>,
    /// Frames without data that the peer has a reason to send.
    earned: AtomicU64,
    /// Streams that the peer has opened, and since when there are none.
    streams: Mutex<(usize, Instant)>,
    /// Whether it is to be closed as soon as it has no streams, and who is to be woken then.
    retired: AtomicBool,
    retirer: AtomicWaker,
    /// Who is charged for what the tunnel holds.
    holder: OnceLock<Holder>,
}

/// A stream that the peer has opened, until dropped.
#[derive(Debug)]
pub(super) struct Stream(Arc<Flow>);

impl Stream {
    /// Its half says when it has ended.
    pub(super) fn goes_on(self) {
        self.0.streams.lock().0 += 1;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.stream_ended();
    }
}

impl Flow {
    /// A tunnel on which about `buffered_max` bytes may wait.
    pub(super) fn new(buffered_max: usize) -> Arc<Self> {
        Arc::new(Self {
            buffered: AtomicUsize::new(0),
            buffered_max,
            waiting: Mutex::default(),
            window: AtomicI64::new(FIRST_WINDOW),
            exhausted: Mutex::new(None),
            stuck: Mutex::new(None),
            earned: AtomicU64::new(0),
            streams: Mutex::new((0, Instant::now())),
            retired: AtomicBool::new(false),
            retirer: AtomicWaker::new(),
            holder: OnceLock::new(),
        })
    }

    /// One more stream that the peer has opened.
    pub(super) fn stream(self: &Arc<Self>) -> Stream {
        self.streams.lock().0 += 1;
        Stream(Arc::clone(self))
    }

    /// One less.
    pub(super) fn stream_ended(&self) {
        let mut streams = self.streams.lock();
        streams.0 -= 1;
        streams.1 = Instant::now();
    }

    /// Since when the peer has had no streams; `None` while it has.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let streams = self.streams.lock();
        (streams.0 == 0).then_some(streams.1)
    }

    /// Has the tunnel closed: the peer is told to open no more streams.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        self.retirer.wake();
    }

    /// Whether [`Self::retire`] was called. Who asks is woken when it is.
    pub(super) fn is_retired(&self, cx: &Context<'_>) -> bool {
        self.retirer.register(cx.waker());
        self.retired.load(Ordering::Relaxed)
    }

    /// `holder` is charged from now on, at most once.
    pub(super) fn charge_to(&self, holder: Holder) {
        let _first = self.holder.set(holder);
    }

    /// The tunnel holds so many bytes besides what waits to be sent. To be called after each pass.
    pub(super) fn settle(&self, others: usize) {
        if let Some(holder) = self.holder.get() {
            holder.set(self.buffered.load(Ordering::Relaxed) + others);
        }
    }

    /// Ready when the tunnel has to give way.
    pub(super) fn poll_shed(&self, cx: &Context<'_>) -> Poll<Shed> {
        self.holder.get().map_or(Poll::Pending, |holder| holder.poll_shed(cx))
    }

    /// How much of what may be held is held, by all.
    pub(super) fn pressure(&self) -> Pressure {
        self.holder.get().map_or(Pressure::None, |holder| holder.share().pressure())
    }

    /// How many bytes may be put on the tunnel. Who is told 0 is woken when that has changed.
    pub(super) fn room(&self, cx: &Context<'_>) -> usize {
        let room = self.buffered_max.saturating_sub(self.buffered.load(Ordering::Relaxed));
        if room == 0 {
            let mut waiting = self.waiting.lock();
            if waiting.len() >= WAITING_MAX {
                // Whoever still waits comes back; the others are forgotten.
                waiting.drain(..).for_each(Waker::wake);
            }
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
        }
        room
    }

    fn put(&self, length: usize) {
        self.buffered.fetch_add(length, Ordering::Relaxed);
        self.earned.fetch_add(UPDATES_PER_PIECE * (1 + length / FRAME) as u64, Ordering::Relaxed);
        if self.window.fetch_sub(length as i64, Ordering::Relaxed) <= length as i64 {
            self.exhausted.lock().get_or_insert_with(Instant::now);
        }
    }

    /// The peer takes so many bytes more, on all streams together.
    pub(super) fn widen(&self, bytes: u32) {
        if self.window.fetch_add(bytes.into(), Ordering::Relaxed) + i64::from(bytes) > 0 {
            *self.exhausted.lock() = None;
        }
    }

    /// A pass is over, and the socket took all that was to be sent or not. What waits then although it did waits for the
    /// windows of its streams: a peer may make them smaller than what is on its way to it already (RFC 9113 §6.9.2).
    pub(super) fn passed(&self, all: bool) {
        let waits = self.buffered.load(Ordering::Relaxed);
        let mut stuck = self.stuck.lock();
        if waits == 0 || waits < self.buffered_max / 2 {
            *stuck = None;
        } else if all {
            stuck.get_or_insert_with(Instant::now);
        }
    }

    /// Whether the peer has not let anything be sent for a while, on any stream: its windows are used up, or what some
    /// streams wait for has taken the room of all.
    pub(super) fn is_exhausted(&self) -> bool {
        [&self.exhausted, &self.stuck].into_iter().any(|since| {
            let since = since.lock();
            since.is_some_and(|since| since.elapsed() >= EXHAUSTED_AFTER)
        })
    }

    /// How many frames without data the peer has had reason to send since this was last asked.
    pub(super) fn take_earned(&self) -> u64 {
        if self.earned.load(Ordering::Relaxed) == 0 { 0 } else { self.earned.swap(0, Ordering::Relaxed) }
    }

    fn sent(&self, bytes: usize) {
        let before = self.buffered.fetch_sub(bytes, Ordering::Relaxed);
        // By half, so that who waits has something to do then.
        let (now, enough) = (before - bytes, self.buffered_max / 2);
        if now <= enough && before > enough {
            let waiting = std::mem::take(&mut *self.waiting.lock());
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

/// What one stream has put on its tunnel.
#[derive(Debug)]
pub(super) struct Queue {
    flow: Arc<Flow>,
    /// Bytes that wait to be sent.
    bytes: AtomicUsize,
    /// Who waits for none to wait.
    sent: AtomicWaker,
}

impl Queue {
    /// Nothing yet, on a tunnel with this flow.
    pub(super) fn new(flow: Arc<Flow>) -> Arc<Self> {
        Arc::new(Self { flow, bytes: AtomicUsize::new(0), sent: AtomicWaker::new() })
    }

    /// Its tunnel's.
    pub(super) fn flow(&self) -> &Flow {
        &self.flow
    }

    /// The piece that puts `bytes` on the tunnel.
    pub(super) fn piece(self: &Arc<Self>, bytes: Bytes) -> Piece {
        self.bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        self.flow.put(bytes.len());
        Piece { bytes, queue: Arc::clone(self) }
    }

    /// Waits until all of it has been encrypted or thrown away.
    pub(super) fn poll_sent(&self, cx: &Context<'_>) -> Poll<()> {
        self.sent.register(cx.waker());
        if self.bytes.load(Ordering::Relaxed) == 0 { Poll::Ready(()) } else { Poll::Pending }
    }

    fn take(&self, bytes: usize) {
        self.flow.sent(bytes);
        if self.bytes.fetch_sub(bytes, Ordering::Relaxed) == bytes {
            self.sent.wake();
        }
    }
}

/// Data on its way to a peer.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    queue: Arc<Queue>,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.queue.take(count);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let unsent = self.bytes.len();
        if unsent > 0 {
            self.queue.take(unsent);
            // HTTP/2 gives it to the other streams.
            self.queue.flow.widen(unsent.try_into().unwrap_or(u32::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker_ref;

    use super::*;

    #[test]
    fn what_waits_is_counted_until_it_is_sent_or_thrown_away() {
        let flow = Flow::new(1000);
        let cx = Context::from_waker(noop_waker_ref());
        let [first, second] = [0; 2].map(|_| Queue::new(Arc::clone(&flow)));
        let mut one = first.piece(Bytes::from(vec![7; 600]));
        let other = second.piece(Bytes::from(vec![7; 700]));
        assert!(first.poll_sent(&cx).is_pending() && second.poll_sent(&cx).is_pending());
        assert_eq!(flow.room(&cx), 0);
        assert_eq!(flow.waiting.lock().len(), 1);
        assert_eq!(flow.room(&cx), 0);
        assert_eq!(flow.waiting.lock().len(), 1, "no more than one for each who waits");
        one.advance(599);
        assert_eq!(flow.room(&cx), 299);
        assert_eq!(flow.waiting.lock().len(), 1, "half must be free");
        drop(other);
        assert_eq!((flow.room(&cx), flow.waiting.lock().len()), (999, 0));
        assert!(first.poll_sent(&cx).is_pending() && second.poll_sent(&cx).is_ready());
        drop(one);
        assert_eq!(flow.room(&cx), 1000);
        assert_eq!(
            flow.window.load(Ordering::Relaxed),
            FIRST_WINDOW - 599,
            "what was not sent was not taken"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_exhausted_once_it_takes_nothing_for_a_while() {
        let flow = Flow::new(1 << 20);
        let all = Bytes::from(vec![7; FIRST_WINDOW as usize]);
        let queue = Queue::new(Arc::clone(&flow));
        let mut piece = queue.piece(all.clone());
        piece.advance(all.len());
        assert!(!flow.is_exhausted());
        tokio::time::advance(EXHAUSTED_AFTER).await;
        assert!(flow.is_exhausted());
        flow.widen(1);
        assert!(!flow.is_exhausted());
        drop(queue.piece(all));
        tokio::time::advance(EXHAUSTED_AFTER).await;
        assert!(!flow.is_exhausted(), "its stream was reset before anything was sent");
        assert!(flow.take_earned() >= 4 && flow.take_earned() == 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_although_the_socket_takes_all_leaves_no_room() {
        let flow = Flow::new(1000);
        let small = Queue::new(Arc::clone(&flow)).piece(Bytes::from(vec![7; 499]));
        flow.passed(true);
        tokio::time::advance(EXHAUSTED_AFTER).await;
        assert!(!flow.is_exhausted(), "there is room for others");
        let large = Queue::new(Arc::clone(&flow)).piece(Bytes::from(vec![7; 1]));
        flow.passed(false);
        tokio::time::advance(EXHAUSTED_AFTER).await;
        assert!(!flow.is_exhausted(), "the socket will take more");
        flow.passed(true);
        assert!(!flow.is_exhausted(), "it may be on its way");
        tokio::time::advance(EXHAUSTED_AFTER).await;
        flow.passed(true);
        flow.passed(false);
        assert!(flow.is_exhausted());
        drop(large);
        flow.passed(false);
        assert!(!flow.is_exhausted());
        drop(small);
    }
}
