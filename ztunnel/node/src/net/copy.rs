//! Moving bytes between two sockets: each direction on its own, ends passed on as ends, resets as resets.
//!
//! What was said before a reset is delivered first: the kernel lets it be read behind a reset, which may have been noticed
//! first where something was to be written.
//!
//! There is no idle timeout: how long a connection may be silent is for its two ends to say. What each side
//! buffers is bounded: a direction reads on only when what it read is written, and what is not is charged to whose
//! connection it is ([`crate::net::budget`]).

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use socket2::SockRef;
use tokio::io::AsyncWrite;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio::time::sleep;

use crate::net::budget::Holder;
use crate::net::budget::Pressure;
use crate::net::budget::Shed;
use crate::net::buffer::READ_SIZE;
use crate::net::buffer::poll_read_up_to;
use crate::net::socket::reset_on_close;
use crate::net::splice::Pipe;
use crate::net::splice::cannot_splice;

/// Counts what a relay moves, while it moves it.
pub trait Meter {
    /// So many bytes went from the client to the server.
    fn up(&self, bytes: u64);
    /// So many bytes went from the server to the client.
    fn down(&self, bytes: u64);
}

/// Which side of a relay broke, and how.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The side that opened the connection.
    #[error("the client's connection broke before all data was sent")]
    Client(#[source] io::Error),
    /// The side that was dialled.
    #[error("the server's connection broke before all data was sent")]
    Server(#[source] io::Error),
    /// It had to give way.
    #[error(transparent)]
    Shed(Shed),
}

impl CopyError {
    /// Whether one of the two sides reset the connection, as applications do.
    pub fn is_reset(&self) -> bool {
        match self {
            Self::Client(error) | Self::Server(error) => is_reset(error),
            Self::Shed(_) => false,
        }
    }
}

/// Whether an error is what a socket says of a peer that reset the connection.
pub fn is_reset(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | BrokenPipe | NotConnected)
}

/// What one side had said before its connection broke is passed on for no longer than this. Who takes nothing must not
/// keep what is over.
pub const PARTING_WITHIN: Duration = Duration::from_secs(1);

/// One relayed connection: all there is of it. A future that resolves when both directions have ended; when
/// either side breaks, or it is dropped before, both are reset.
#[derive(Debug)]
pub struct Relay<M> {
    client: ResetUnlessDone,
    server: ResetUnlessDone,
    up: Direction,
    down: Direction,
    watch: Watch,
    /// One side broke, and what it had said before is not all passed on: until then.
    parting: Option<Box<Parting>>,
    holders: Holders,
    meter: M,
}

#[derive(Debug)]
struct Parting {
    error: CopyError,
    over: Pin<Box<Sleep>>,
}

/// Who is charged for what a relay holds.
#[derive(Debug)]
pub enum Holders {
    /// One for all of it.
    One(Holder),
    /// Each for what it does not take.
    Both {
        /// For what is to be written to the client.
        client: Holder,
        /// For what is to be written to the server.
        server: Holder,
    },
}

impl Holders {
    fn set(&self, up: usize, down: usize) {
        match self {
            Self::One(holder) => holder.set(up + down),
            Self::Both { client, server } => {
                server.set(up);
                client.set(down);
            }
        }
    }

    fn poll_shed(&self, cx: &Context<'_>) -> Poll<Shed> {
        match self {
            Self::One(holder) => holder.poll_shed(cx),
            Self::Both { client, server } => match client.poll_shed(cx) {
                Poll::Pending => server.poll_shed(cx),
                shed => shed,
            },
        }
    }

    fn pressure(&self) -> Pressure {
        match self {
            Self::One(holder) => holder.share().pressure(),
            Self::Both { client, server } => client.share().pressure().max(server.share().pressure()),
        }
    }
}

impl<M: Meter> Relay<M> {
    /// Joins who dialled and who was dialled.
    pub fn new(client: ResetUnlessDone, server: ResetUnlessDone, holders: Holders, meter: M) -> Self {
        let (up, down) = (Direction::default(), Direction::default());
        Self { client, server, up, down, watch: Watch::default(), parting: None, holders, meter }
    }

    /// What counted; the rest is dropped.
    pub fn into_meter(self) -> M {
        self.meter
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        if let Poll::Ready(shed) = self.holders.poll_shed(cx) {
            return Poll::Ready(Err(CopyError::Shed(shed)));
        }
        if self.parting.is_none() {
            let error = match ready!(self.poll_moved(cx)) {
                Ok(()) => return Poll::Ready(Ok(())),
                Err(error) => error,
            };
            self.parting = Some(Box::new(Parting { error, over: Box::pin(sleep(PARTING_WITHIN)) }));
        }
        let Some(mut parting) = self.parting.take() else { return Poll::Pending };
        if self.poll_parted(&parting.error, cx).is_ready() || parting.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(parting.error));
        }
        self.parting = Some(parting);
        Poll::Pending
    }

    /// Passes on what the side that broke had said before.
    fn poll_parted(&mut self, error: &CopyError, cx: &mut Context<'_>) -> Poll<()> {
        let Self { client, server, up, down, holders, meter, .. } = self;
        let pressure = holders.pressure();
        let (client, server) = (&mut client.socket, &mut server.socket);
        let parted = match error {
            CopyError::Client(_) => {
                *down = Direction::default();
                up.poll_rest(client, server, pressure, cx, |bytes| meter.up(bytes))
            }
            CopyError::Server(_) => {
                *up = Direction::default();
                down.poll_rest(server, client, pressure, cx, |bytes| meter.down(bytes))
            }
            CopyError::Shed(_) => Poll::Ready(()),
        };
        holders.set(up.held(), down.held());
        parted
    }

    fn poll_moved(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        let Self { client, server, up, down, watch, holders, meter, .. } = self;
        let pressure = holders.pressure();
        let (client, server) = (&mut client.socket, &mut server.socket);
        let up_done =
            up.poll(client, server, pressure, cx, |bytes| meter.up(bytes)).map_err(
                |broken| match broken {
                    Broken::From(error) => CopyError::Client(error),
                    Broken::To(error) => CopyError::Server(error),
                },
            )?;
        let down_done = down.poll(server, client, pressure, cx, |bytes| meter.down(bytes)).map_err(
            |broken| match broken {
                Broken::From(error) => CopyError::Server(error),
                Broken::To(error) => CopyError::Client(error),
            },
        )?;
        if up_done.is_ready() && down_done.is_ready() {
            return Poll::Ready(Ok(()));
        }
        holders.set(up.held(), down.held());
        if watch.is_due(!up.is_reading() || !down.is_reading(), cx) {
            if let Ok(Some(error)) = client.take_error() {
                return Poll::Ready(Err(CopyError::Client(error)));
            }
            if let Ok(Some(error)) = server.take_error() {
                return Poll::Ready(Err(CopyError::Server(error)));
            }
        }
        Poll::Pending
    }
}

impl<M: Meter + Unpin> Future for Relay<M> {
    type Output = Result<(), CopyError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(self.poll_both(cx));
        if ended.is_ok() {
            self.client.done();
            self.server.done();
        }
        Poll::Ready(ended)
    }
}

/// A socket that is reset when it is dropped, unless it came to its proper end.
#[derive(Debug)]
pub struct ResetUnlessDone {
    /// The socket.
    pub socket: TcpStream,
    done: bool,
}

impl ResetUnlessDone {
    /// Guards `socket`.
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, done: false }
    }

    /// Both directions have ended: the close that follows is an ordinary one.
    pub fn done(&mut self) {
        self.done = true;
    }
}

impl Drop for ResetUnlessDone {
    fn drop(&mut self) {
        if !self.done {
            reset_on_close(&self.socket);
        }
    }
}

/// How long a socket that is not being read may be broken before it is noticed.
const WATCH_PERIOD: Duration = Duration::from_secs(10);

/// Looks after sockets that nobody reads: a reset arrives unseen while a relay waits for the other side to
/// take data, or after an end was read. Costs nothing while all is read.
#[derive(Debug, Default)]
pub struct Watch(Option<Pin<Box<Sleep>>>);

impl Watch {
    /// Whether it is time to ask the sockets for errors. `unread` says whether there is reason to.
    pub fn is_due(&mut self, unread: bool, cx: &mut Context<'_>) -> bool {
        if !unread {
            self.0 = None;
            return false;
        }
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep(WATCH_PERIOD)));
        let mut due = false;
        while timer.as_mut().poll(cx).is_ready() {
            due = true;
            timer.as_mut().reset(tokio::time::Instant::now() + WATCH_PERIOD);
        }
        due
    }
}

enum Broken {
    From(io::Error),
    To(io::Error),
}

/// One direction: reading → ending (the source has ended, the rest is being written) → done.
///
/// What comes in small pieces is copied. Where one large piece follows another ([`BULK_AFTER`]) the bytes are spliced,
/// until less comes at a time than copying is worth.
#[derive(Debug, Default)]
struct Direction {
    outflow: Outflow,
    state: State,
    /// Large pieces in a row.
    large: u8,
    /// Lent while there is something in it, which comes before whatever is read next.
    pipe: Option<Pipe>,
}

/// Large pieces in a row, each of which filled what one read takes, after which bytes are spliced.
const BULK_AFTER: u8 = 4;

/// Bytes a direction moves before the other one, and then other connections, have their turn.
const TURN_MAX: usize = 512 * 1024;

/// What a small piece counts for: it costs calls as well, of which a task has a budget for both directions.
const TURN_MIN: usize = TURN_MAX / 32;

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Reading,
    Ending,
    Done,
}

impl Direction {
    /// Whether the source is waited on for data, so that its errors are seen at once.
    fn is_reading(&self) -> bool {
        self.state == State::Reading && self.outflow.is_empty() && self.pipe.is_none()
    }

    /// Takes what the source has, and says how much: it is in `outflow` or `pipe` then, or the source has ended.
    fn poll_take(
        &mut self,
        from: &mut TcpStream,
        pressure: Pressure,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let size = match pressure {
            Pressure::None => READ_SIZE,
            Pressure::Some => READ_SIZE / 2,
            Pressure::Much => READ_SIZE / 4,
        };
        let taken = match self.poll_splice(from, cx) {
            Some(spliced) => ready!(spliced)?,
            None => {
                let chunk = ready!(poll_read_up_to(size, pressure, from, cx))?;
                let taken = chunk.len();
                self.outflow.push(chunk);
                taken
            }
        };
        self.large = if taken >= size { self.large.saturating_add(1) } else { 0 };
        if taken == 0 {
            self.state = State::Ending;
        }
        Poll::Ready(Ok(taken))
    }

    /// The same into a pipe; `None` where there is no reason to, or no way, or nothing that could be spliced.
    fn poll_splice(&mut self, from: &TcpStream, cx: &mut Context<'_>) -> Option<Poll<io::Result<usize>>> {
        if self.large < BULK_AFTER {
            return None;
        }
        let mut pipe = Pipe::lend()?;
        match pipe.poll_fill(from, cx) {
            Poll::Ready(Err(error)) if cannot_splice(&error) => None,
            Poll::Ready(Ok(0)) => None,
            Poll::Ready(Ok(taken)) => {
                self.pipe = Some(pipe);
                Some(Poll::Ready(Ok(taken)))
            }
            other => Some(other),
        }
    }

    /// What was taken and nobody has taken on.
    fn held(&self) -> usize {
        self.outflow.len() + self.pipe.as_ref().map_or(0, Pipe::len)
    }

    /// Writes all that was taken.
    fn poll_write(
        &mut self,
        to: &mut TcpStream,
        cx: &mut Context<'_>,
        mut count: impl FnMut(u64),
    ) -> Poll<io::Result<()>> {
        while !self.outflow.is_empty() {
            let written = ready!(self.outflow.poll_write(to, cx))?;
            count(written as u64);
        }
        while let Some(pipe) = &mut self.pipe {
            let written = ready!(pipe.poll_drain(to, cx))?;
            count(written as u64);
            if pipe.is_empty() {
                self.pipe = None;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Passes on what there is of a source that broke. There is an end behind it, or the same error once more: neither is
    /// one that is passed on.
    fn poll_rest(
        &mut self,
        from: &mut TcpStream,
        to: &mut TcpStream,
        pressure: Pressure,
        cx: &mut Context<'_>,
        mut count: impl FnMut(u64),
    ) -> Poll<()> {
        while ready!(self.poll_write(to, cx, &mut count)).is_ok() && self.state == State::Reading {
            if ready!(self.poll_take(from, pressure, cx)).is_err() {
                break;
            }
        }
        Poll::Ready(())
    }

    fn poll(
        &mut self,
        from: &mut TcpStream,
        to: &mut TcpStream,
        pressure: Pressure,
        cx: &mut Context<'_>,
        mut count: impl FnMut(u64),
    ) -> Poll<Result<(), Broken>> {
        let mut turn = 0;
        loop {
            ready!(self.poll_write(to, cx, &mut count)).map_err(Broken::To)?;
            match self.state {
                State::Reading => {
                    if turn >= TURN_MAX {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    turn += ready!(self.poll_take(from, pressure, cx)).map_err(Broken::From)?.max(TURN_MIN);
                }
                State::Ending => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Broken::To)?;
                    self.state = State::Done;
                }
                State::Done => return Poll::Ready(Ok(())),
            }
        }
    }
}

/// How many pieces one write gathers.
const GATHER_MAX: usize = 64;

/// Pieces smaller than this are joined when one write can take no more of them: small pieces that nobody takes
/// would cost more than what is in them.
const JOIN_MAX: usize = 4096;

/// Pieces waiting to be written to a socket, many by one system call.
#[derive(Debug, Default)]
pub struct Outflow {
    pieces: VecDeque<Bytes>,
    /// What comes after `pieces`, joined: few have any.
    tail: Option<Box<BytesMut>>,
    bytes: usize,
}

impl Outflow {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether as much waits as one write takes.
    pub fn is_full(&self) -> bool {
        self.pieces.len() >= GATHER_MAX
    }

    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Queues a piece.
    pub fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.bytes += piece.len();
        if self.is_full() && piece.len() < JOIN_MAX {
            self.tail.get_or_insert_default().extend_from_slice(&piece);
            return;
        }
        self.push_tail();
        self.pieces.push_back(piece);
    }

    /// Keeps small pieces in no more memory than they need, as nobody takes them for now: each may be all that is left of
    /// much else that was received with it.
    pub fn settle(&mut self) {
        if self.bytes < self.pieces.len() * JOIN_MAX {
            let mut all = BytesMut::with_capacity(self.bytes);
            self.pieces.drain(..).for_each(|piece| all.extend_from_slice(&piece));
            if let Some(tail) = self.tail.take() {
                all.extend_from_slice(&tail);
            }
            self.tail = Some(Box::new(all));
            self.pieces = VecDeque::new();
        }
    }

    fn push_tail(&mut self) {
        if let Some(tail) = self.tail.take() {
            self.pieces.push_back(tail.freeze());
        }
    }

    /// Writes once, and says how many bytes that took.
    pub fn poll_write(&mut self, to: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.is_full() {
            self.push_tail();
        }
        let to = Pin::new(to);
        let written = if self.pieces.len() == 1 {
            ready!(to.poll_write(cx, &self.pieces[0]))?
        } else {
            let mut slices = [IoSlice::new(&[]); GATHER_MAX];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            ready!(to.poll_write_vectored(cx, &slices[..count]))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.consume(written);
        Poll::Ready(Ok(written))
    }

    /// The same, where the end comes right after all of this: it goes with the last of it, in one packet, once `to`
    /// is shut down or closed.
    pub fn poll_write_last(&mut self, to: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.push_tail();
        let mut slices = [IoSlice::new(&[]); GATHER_MAX];
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        let (slices, flags) = (&slices[..count], libc::MSG_MORE | libc::MSG_NOSIGNAL);
        let written = loop {
            ready!(to.poll_write_ready(cx))?;
            let send = || match slices {
                [only] => SockRef::from(to).send_with_flags(only, flags),
                _ => SockRef::from(to).send_vectored_with_flags(slices, flags),
            };
            match to.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => break written?,
            }
        };
        self.consume(written);
        Poll::Ready(Ok(written))
    }

    fn consume(&mut self, written: usize) {
        self.bytes -= written;
        let mut left = written;
        while let Some(first) = self.pieces.front_mut() {
            if left < first.len() {
                first.advance(left);
                return;
            }
            left -= first.len();
            self.pieces.pop_front();
        }
        // An idle connection keeps no long queue.
        if self.pieces.capacity() > 8 {
            self.pieces = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Read;
    use std::io::Write;

    use tokio::io::AsyncReadExt;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::net::splice::SPLICE_SIZE;
    use crate::net::splice::SPLICED;

    #[derive(Default)]
    struct Count {
        up: Cell<u64>,
        down: Cell<u64>,
    }

    impl Meter for &Count {
        fn up(&self, bytes: u64) {
            self.up.set(self.up.get() + bytes);
        }
        fn down(&self, bytes: u64) {
            self.down.set(self.down.get() + bytes);
        }
    }

    /// Relays between two plain sockets.
    async fn relayed(client: TcpStream, server: TcpStream, count: &Count) -> Result<(), CopyError> {
        let holders =
            Holders::One(crate::net::budget::Budget::new(usize::MAX).share(String::new()).holder(0));
        Relay::new(ResetUnlessDone::new(client), ResetUnlessDone::new(server), holders, count).await
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        (near, far)
    }

    #[tokio::test]
    async fn each_direction_ends_on_its_own() {
        let (mut client, front) = pair().await;
        let (back, mut server) = pair().await;
        let count = Count::default();
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = Vec::new();
            server.read_to_end(&mut question).await.unwrap();
            assert_eq!(question, b"question");
            let answer = vec![7; 3_000_000];
            let (sent, got) = tokio::join!(
                async {
                    server.write_all(&answer).await.unwrap();
                    server.shutdown().await.unwrap();
                },
                async {
                    let mut got = Vec::new();
                    client.read_to_end(&mut got).await.unwrap();
                    got
                }
            );
            let () = sent;
            assert_eq!(got, answer);
        };
        let (done, ()) = tokio::join!(relayed(front, back, &count), talk);
        done.unwrap();
        assert_eq!((count.up.get(), count.down.get()), (8, 3_000_000));
    }

    /// Sends `size` bytes one way and as many other ones back, while a receiver takes its time now and then.
    async fn echo_in_bulk(size: usize) {
        let (client, front) = pair().await;
        let (back, server) = pair().await;
        let count = Count::default();
        let data: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        let talk = async {
            let ((mut from_server, mut to_server), (mut from_client, mut to_client)) =
                (client.into_split(), server.into_split());
            let send = async |to: &mut tokio::net::tcp::OwnedWriteHalf| {
                to.write_all(&data).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let receive = async |from: &mut tokio::net::tcp::OwnedReadHalf| {
                let mut got = Vec::new();
                while from.read_buf(&mut got).await.unwrap() > 0 {
                    if got.len() % 7 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                assert!(got == data);
            };
            tokio::join!(
                send(&mut to_server),
                receive(&mut from_client),
                send(&mut to_client),
                receive(&mut from_server)
            );
        };
        let (done, ()) = tokio::join!(relayed(front, back, &count), talk);
        done.unwrap();
        assert_eq!((count.up.get(), count.down.get()), (size as u64, size as u64));
    }

    #[tokio::test]
    async fn bulk_arrives_whole_and_is_counted() {
        for size in [READ_SIZE * (usize::from(BULK_AFTER) + 1) - 1, 5_000_000, 50_000_001] {
            let before = SPLICED.get();
            echo_in_bulk(size).await;
            let spliced = SPLICED.get() - before;
            // Whether pieces are large is the kernel's to say, but for most of so many.
            let expected = if size > 5_000_000 { size } else { 0 };
            assert!(spliced >= expected, "{spliced} of twice {size} bytes");
        }
    }

    #[tokio::test]
    async fn one_direction_leaves_the_other_and_other_connections_their_turn() {
        const TOTAL: usize = 100_000_000;
        let (client, front) = pair().await;
        let (back, server) = pair().await;
        let [client, server] = [client, server].map(|socket| {
            let socket = socket.into_std().unwrap();
            socket.set_nonblocking(false).unwrap();
            socket
        });
        (&server).write_all(b"greeting").unwrap();
        // Both ends are as fast as they can: there is always more to read, and room for it.
        let sending = std::thread::spawn(move || {
            let piece = vec![7; 1 << 20];
            let mut left = TOTAL;
            while left > 0 {
                left -= (&client).write(&piece[..left.min(piece.len())]).unwrap();
            }
            client
        });
        let receiving = std::thread::spawn(move || {
            let mut left = TOTAL;
            let mut piece = vec![0; 1 << 20];
            while left > 0 {
                left -= (&server).read(&mut piece).unwrap();
            }
            server
        });
        front.readable().await.unwrap();
        back.readable().await.unwrap();
        let count = Count::default();
        let mut relay = std::pin::pin!(relayed(front, back, &count));
        let mut greeted = None;
        std::future::poll_fn(|cx| {
            let before = count.up.get();
            let done = relay.as_mut().poll(cx);
            let turn = count.up.get() - before;
            assert!(turn <= (TURN_MAX + SPLICE_SIZE) as u64, "{turn} bytes at once");
            if turn > 0 {
                greeted.get_or_insert_with(|| count.down.get());
            }
            if done.is_ready() || count.up.get() == TOTAL as u64 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        assert_eq!(greeted, Some(8), "the other direction moves in the same turn");
        let _open = (sending.join().unwrap(), receiving.join().unwrap());
    }

    #[tokio::test]
    async fn bulk_arrives_whole_when_no_pipe_can_be_had() {
        let taken: Vec<Pipe> = std::iter::from_fn(Pipe::lend).collect();
        assert!(!taken.is_empty());
        let before = SPLICED.get();
        echo_in_bulk(5_000_000).await;
        assert_eq!(SPLICED.get(), before);
        drop(taken);
        echo_in_bulk(5_000_000).await;
    }

    #[tokio::test]
    async fn urgent_data_does_not_hold_up_what_comes_after_it() {
        let data = vec![7; 3_000_000];
        // The end comes at once, or not before all has arrived.
        for (after, at_once) in [(data.len(), true), (100, true), (0, true), (data.len(), false)] {
            let (client, front) = pair().await;
            let (back, mut server) = pair().await;
            let client = client.into_std().unwrap();
            client.set_nonblocking(false).unwrap();
            // A thread of its own, so that what is urgent comes while the rest is on its way.
            let sending = std::thread::spawn({
                let data = data.clone();
                move || {
                    (&client).write_all(&data).unwrap();
                    SockRef::from(&client).send_out_of_band(b"!").unwrap();
                    (&client).write_all(&data[..after]).unwrap();
                    if !at_once {
                        (&client).read_exact(&mut [0]).unwrap();
                    }
                    client.shutdown(std::net::Shutdown::Write).unwrap();
                    client
                }
            });
            let receive = async {
                let mut got = vec![0; data.len() + after];
                server.read_exact(&mut got).await.unwrap();
                server.write_all(b".").await.unwrap();
                assert_eq!(server.read(&mut got).await.unwrap(), 0, "the end");
                drop(server);
            };
            let count = Count::default();
            let both = async { tokio::join!(relayed(front, back, &count), receive) };
            let (done, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("an end");
            done.unwrap();
            sending.join().unwrap();
        }
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_as_a_reset() {
        let (client, front) = pair().await;
        let (back, mut server) = pair().await;
        reset_on_close(&client);
        drop(client);
        let error = relayed(front, back, &Count::default()).await.unwrap_err();
        assert!(matches!(error, CopyError::Client(_)), "{error}");
        let error = server.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_reset_is_seen_although_nobody_takes_the_data() {
        tokio::time::pause();
        let (mut client, front) = pair().await;
        let (back, server) = pair().await;
        let count = Count::default();
        let fill = async {
            // Until nothing moves any more: the server reads nothing.
            let data = vec![0; 1 << 20];
            while let Ok(more) = tokio::time::timeout(Duration::from_secs(1), client.write_all(&data)).await {
                more.unwrap();
            }
            reset_on_close(&client);
            drop(client);
        };
        let (done, ()) = tokio::join!(relayed(front, back, &count), fill);
        assert!(matches!(done.unwrap_err(), CopyError::Client(_)));
        drop(server);
    }

    #[tokio::test]
    async fn an_end_goes_with_the_last_data_and_all_of_it_arrives() {
        for pieces in [1, 3, 2 * GATHER_MAX] {
            let (near, mut far) = pair().await;
            let mut outflow = Outflow::default();
            for _ in 0..pieces {
                outflow.push(Bytes::from(vec![7; JOIN_MAX]));
            }
            while !outflow.is_empty() {
                std::future::poll_fn(|cx| outflow.poll_write_last(&near, cx)).await.unwrap();
            }
            drop(near);
            let mut got = Vec::new();
            far.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, vec![7; pieces * JOIN_MAX]);
        }
    }

    #[test]
    fn small_pieces_that_nobody_takes_are_joined() {
        let mut outflow = Outflow::default();
        for n in 0..100_000_u32 {
            outflow.push(Bytes::copy_from_slice(&n.to_be_bytes()));
        }
        outflow.push(Bytes::from(vec![0; JOIN_MAX]));
        assert_eq!(outflow.len(), 400_000 + JOIN_MAX);
        assert_eq!(outflow.pieces.len(), GATHER_MAX + 2);
        let all: Vec<u8> = outflow.pieces.iter().flatten().copied().collect();
        assert!(all.chunks(4).zip(0..100_000_u32).all(|(piece, n)| piece == n.to_be_bytes()));
    }

    #[test]
    fn an_outflow_loses_nothing_however_it_is_cut() {
        for cut in 1..12 {
            let mut outflow = Outflow::default();
            for piece in ["ab", "", "cde", "f", "ghijk"] {
                outflow.push(Bytes::from_static(piece.as_bytes()));
            }
            let mut seen = Vec::new();
            while !outflow.is_empty() {
                let take = cut.min(outflow.len());
                let all: Vec<u8> = outflow.pieces.iter().flatten().copied().collect();
                seen.extend_from_slice(&all[..take]);
                outflow.consume(take);
            }
            assert_eq!(seen, b"abcdefghijk");
            assert!(outflow.pieces.is_empty());
        }
    }
}
