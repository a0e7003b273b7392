//! The frames a peer sends, looked at as they are read: before HTTP/2 makes anything of them.
//!
//! Of a frame its header is read (RFC 9113 §4.1), nothing else. What means nothing is left out (PRIORITY, types that
//! nobody knows, DATA without data), as HTTP/2 would end the
//! whole tunnel for a number of them. What padding without data took of the peer's windows is given back here, as HTTP/2
//! does not know of it. What carries nothing is
//! counted: a peer that sends more of it than it has reason to is told to be calm, and its tunnel ends. And a pass over a
//! tunnel ends after a number of frames, however few bytes they have, so that others have their turn.

use std::future::Future;
use std::pin::Pin;
use std::pin::pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use tokio::io::AsyncRead;
use tokio::io::ReadBuf;
use tokio::time::Instant;

/// Frames in one pass over a tunnel.
pub(crate) const PASS_FRAMES_MAX: u32 = 128;

/// Frames without data that may come at once.
pub(crate) const IDLE_FRAMES_MAX: u64 = 10_000;

/// How many of these may come in a second, besides what there is reason to send.
pub(crate) const IDLE_FRAMES_PER_SECOND: u64 = 500;

/// What a client says first (RFC 9113 §3.4).
const PREFACE: usize = 24;

/// The header of a frame.
const HEADER: usize = 9;

/// What is looked at, at most: the header, and the payload of a WINDOW_UPDATE.
const HEAD_MAX: usize = HEADER + 4;

/// Where fewer bytes are wanted than this, a header is read on its own.
const ROOM_MIN: usize = 64;

/// Streams that windows are owed to, at most: more than have frames in one pass, after which all are told.
const OWED_MAX: usize = 2 * PASS_FRAMES_MAX as usize;

/// The largest frame that is thrown away: what is larger is for HTTP/2 to complain of.
const DROPPED_MAX: usize = 16 * 1024;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;

/// An error code (RFC 9113 §7).
const ENHANCE_YOUR_CALM: u8 = 0xb;

/// What to say before a tunnel is closed for what came on it. Any of the streams may have been served.
pub(super) const CALM: [u8; HEADER + 8] =
    [0, 0, 8, GOAWAY, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, ENHANCE_YOUR_CALM];

/// The beginning of a frame, as much as is looked at.
#[derive(Debug, Default, Clone, Copy)]
struct Head {
    bytes: [u8; HEAD_MAX],
    length: usize,
}

impl Head {
    fn filled(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// How many bytes are needed to decide, as far as those that are there tell.
    fn needed(bytes: &[u8]) -> usize {
        match bytes {
            [_, _, _, DATA, flags, ..] if flags & PADDED != 0 && payload(bytes) > 0 => HEADER + 1,
            [_, _, _, WINDOW_UPDATE, ..] if payload(bytes) == 4 => HEADER + 4,
            _ => HEADER,
        }
    }
}

fn payload(head: &[u8]) -> usize {
    match head {
        [a, b, c, ..] => usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c),
        _ => 0,
    }
}

fn stream(head: &[u8]) -> u32 {
    match head {
        [_, _, _, _, _, a, b, c, d, ..] => u32::from_be_bytes([*a, *b, *c, *d]) & 0x7fff_ffff,
        _ => 0,
    }
}

/// Reads frames through to HTTP/2.
#[derive(Debug)]
pub(super) struct Frames {
    /// The beginning of the next frame.
    head: Head,
    /// What was decided to be passed on and had no room yet.
    ready: Head,
    /// What is left of the payload of the frame that is being read.
    left: usize,
    /// How much of it was passed on.
    passed: usize,
    /// What came of headers that are not complete.
    block: usize,
    dropping: bool,
    /// How many frames there were in this pass.
    in_pass: u32,
    /// How many more frames without data may come.
    idle: u64,
    /// Since when that has been counted.
    since: Option<Instant>,
    flooded: bool,
    /// What the peer takes more on all streams together, and nobody was told of yet.
    widened: u32,
    /// What of each stream's window was used for what was left out, and is to be given back.
    owed: Vec<(u32, u32)>,
}

impl Frames {
    /// Frames from a client, which says something else first.
    pub(super) fn of_client() -> Self {
        Self { left: PREFACE, ..Self::of_server() }
    }

    /// Frames from a server.
    pub(super) fn of_server() -> Self {
        Self {
            head: Head::default(),
            ready: Head::default(),
            left: 0,
            passed: 0,
            block: 0,
            dropping: false,
            in_pass: 0,
            idle: IDLE_FRAMES_MAX,
            since: None,
            flooded: false,
            widened: 0,
            owed: Vec::new(),
        }
    }

    /// Another pass begins. There was reason for so many frames without data since the last.
    pub(super) fn pass(&mut self, earned: u64) {
        self.in_pass = 0;
        if self.idle < IDLE_FRAMES_MAX {
            let now = Instant::now();
            let since = self.since.get_or_insert(now);
            let more = now.duration_since(*since).as_millis() as u64 * IDLE_FRAMES_PER_SECOND / 1000;
            if more > 0 {
                *since = now;
            }
            self.idle = (self.idle + more + earned).min(IDLE_FRAMES_MAX);
        } else {
            self.since = None;
        }
    }

    /// Whether there were as many frames as a pass may have.
    pub(super) fn is_pass_over(&self) -> bool {
        self.in_pass >= PASS_FRAMES_MAX || self.flooded
    }

    /// Whether the peer has sent more than it had reason to: nothing is read any more.
    pub(super) fn is_flooded(&self) -> bool {
        self.flooded
    }

    /// Bytes that HTTP/2 keeps until it has all of a frame, or of all headers.
    pub(super) fn partial(&self) -> usize {
        self.block + if self.left > 0 { self.passed } else { 0 }
    }

    /// What the peer has come to take more on all streams together.
    pub(super) fn take_widened(&mut self) -> u32 {
        std::mem::take(&mut self.widened)
    }

    /// Whether the peer has to be told of windows ([`Self::take_owed`]).
    pub(super) fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// The frames that give back to the peer's windows what was left out took of them.
    pub(super) fn take_owed(&mut self) -> Vec<u8> {
        let all: u32 = self.owed.iter().map(|(_, bytes)| bytes).sum();
        let mut said = Vec::with_capacity((1 + self.owed.len()) * (HEADER + 4));
        for (stream, bytes) in std::iter::once((0, all)).chain(std::mem::take(&mut self.owed)) {
            said.extend_from_slice(&[0, 0, 4, WINDOW_UPDATE, 0]);
            said.extend_from_slice(&stream.to_be_bytes());
            said.extend_from_slice(&bytes.to_be_bytes());
        }
        said
    }

    /// So many bytes of a stream's window, and of that of all streams, are to be given back.
    fn owe(&mut self, stream: u32, bytes: usize) {
        // Padding is at most 256 bytes.
        let (bytes, is_full) = (bytes as u32, self.owed.len() >= OWED_MAX);
        match self.owed.iter_mut().find(|(other, _)| *other == stream) {
            Some((_, owed)) => *owed = owed.saturating_add(bytes),
            None if !is_full => self.owed.push((stream, bytes)),
            // It does not take what it is told, and goes on.
            None => self.flooded = true,
        }
    }

    /// Reads from `tls`. A read is empty only at the end.
    pub(super) fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        tls: &mut S,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            if self.ready.length > 0 {
                let length = self.ready.length.min(out.remaining());
                out.put_slice(&self.ready.bytes[..length]);
                self.ready.bytes.copy_within(length.., 0);
                self.ready.length -= length;
                return Poll::Ready(Ok(()));
            }
            let start = out.filled().len();
            let alone = self.head.length > 0 || out.remaining() < ROOM_MIN;
            if self.left == 0 && alone {
                if ready!(self.poll_head(tls, cx))? == 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                // Where there is little room, what comes next must not be begun.
                if self.left > 0 && (alone || self.dropping) {
                    let mut some = ReadBuf::new(out.initialize_unfilled_to(self.left.min(out.remaining())));
                    ready!(Pin::new(&mut *tls).poll_read(cx, &mut some))?;
                    let length = some.filled().len();
                    out.advance(length);
                } else {
                    ready!(Pin::new(&mut *tls).poll_read(cx, out))?;
                }
                if out.filled().len() == start {
                    return Poll::Ready(Ok(()));
                }
                let kept = self.sift(&mut out.filled_mut()[start..]);
                out.set_filled(start + kept);
                if kept > 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            if self.ready.length == 0 && self.is_pass_over() {
                step_aside(cx);
                return Poll::Pending;
            }
        }
    }

    /// Reads of the next frame what is needed to decide, and not a byte more. 0 at the end.
    fn poll_head<S: AsyncRead + Unpin>(
        &mut self,
        tls: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        let needed = Head::needed(self.head.filled());
        let mut out = ReadBuf::new(&mut self.head.bytes[self.head.length..needed]);
        ready!(Pin::new(tls).poll_read(cx, &mut out))?;
        let length = out.filled().len();
        self.head.length += length;
        let head = self.head;
        if head.length == Head::needed(head.filled()) {
            self.head.length = 0;
            if self.begin(head.filled()) {
                self.ready = head;
            }
        }
        Poll::Ready(Ok(length))
    }

    /// Leaves out of `bytes` what is not for HTTP/2, and says how many are left at its beginning.
    fn sift(&mut self, bytes: &mut [u8]) -> usize {
        let (mut from, mut to) = (0, 0);
        while from < bytes.len() {
            if self.left > 0 {
                let length = self.left.min(bytes.len() - from);
                if !self.dropping {
                    if from != to {
                        bytes.copy_within(from..from + length, to);
                    }
                    to += length;
                    self.passed += length;
                }
                self.left -= length;
                from += length;
                continue;
            }
            let rest = &bytes[from..];
            let needed = if rest.len() < HEADER { HEADER } else { Head::needed(rest) };
            if rest.len() < needed {
                self.head.bytes[..rest.len()].copy_from_slice(rest);
                self.head.length = rest.len();
                break;
            }
            let head: [u8; HEAD_MAX] = std::array::from_fn(|at| rest.get(at).copied().unwrap_or_default());
            if self.begin(&head[..needed]) {
                if from != to {
                    bytes.copy_within(from..from + needed, to);
                }
                to += needed;
            }
            from += needed;
        }
        to
    }

    /// A frame begins, of which this was looked at. Says whether it is for HTTP/2.
    fn begin(&mut self, head: &[u8]) -> bool {
        let length = payload(head);
        let passes = self.judge(head, length);
        self.left = length - (head.len() - HEADER);
        self.passed = head.len();
        self.dropping = !passes && self.left > 0;
        self.in_pass += 1;
        match (head[3], head[4]) {
            (HEADERS | CONTINUATION, flags) if flags & END_HEADERS == 0 => self.block += length,
            (HEADERS | CONTINUATION, _) => self.block = 0,
            _ => {}
        }
        passes
    }

    fn judge(&mut self, head: &[u8], length: usize) -> bool {
        match (head[3], head[4]) {
            (DATA, flags) if flags & END_STREAM != 0 => true,
            // Nothing, or nothing but padding.
            (DATA, flags) => {
                let padded =
                    flags & PADDED != 0 && length == head.get(HEADER).map_or(0, |n| usize::from(*n) + 1);
                if length == 0 || padded {
                    self.count_idle();
                    if padded {
                        self.owe(stream(head), length);
                    }
                    return false;
                }
                true
            }
            (WINDOW_UPDATE, _) => {
                self.count_idle();
                if let [.., a, b, c, d] = head
                    && head.len() == HEAD_MAX
                    && stream(head) == 0
                {
                    let more = u32::from_be_bytes([*a, *b, *c, *d]) & 0x7fff_ffff;
                    self.widened = self.widened.saturating_add(more);
                }
                true
            }
            (SETTINGS | PING | GOAWAY, _) => {
                self.count_idle();
                true
            }
            (kind, _) if (kind == PRIORITY || kind > CONTINUATION) && length <= DROPPED_MAX => {
                self.count_idle();
                false
            }
            _ => true,
        }
    }

    fn count_idle(&mut self) {
        match self.idle.checked_sub(1) {
            Some(left) => self.idle = left,
            None => self.flooded = true,
        }
    }
}

/// Where in what HTTP/2 says the end of a frame is: there something else may be said.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The beginning of the header of a frame, and how much there is of it.
    head: ([u8; HEADER], usize),
    /// What is left of the payload.
    left: usize,
    /// Whether more headers must follow next.
    in_block: bool,
}

impl Outgoing {
    /// What a client says.
    pub(super) fn of_client() -> Self {
        Self { left: PREFACE, ..Self::of_server() }
    }

    /// What a server says.
    pub(super) fn of_server() -> Self {
        Self { head: ([0; HEADER], 0), left: 0, in_block: false }
    }

    /// This was said.
    pub(super) fn said(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let length = self.left.min(bytes.len());
                self.left -= length;
                bytes = &bytes[length..];
                continue;
            }
            let (head, known) = &mut self.head;
            let length = (HEADER - *known).min(bytes.len());
            head[*known..*known + length].copy_from_slice(&bytes[..length]);
            *known += length;
            bytes = &bytes[length..];
            if *known == HEADER {
                *known = 0;
                self.left = payload(head);
                self.in_block = matches!(head[3], HEADERS | CONTINUATION) && head[4] & END_HEADERS == 0;
            }
        }
    }

    /// Whether a frame has ended here, and any may follow.
    pub(super) fn is_between_frames(&self) -> bool {
        self.left == 0 && self.head.1 == 0 && !self.in_block
    }
}

/// Has the task polled again once all others that are ready, and those whose sockets are, have had their turn.
pub(super) fn step_aside(cx: &mut Context<'_>) {
    // Never ready at first.
    let _pending = pin!(tokio::task::yield_now()).poll(cx);
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::task::noop_waker_ref;

    use super::*;

    /// Gives pieces of these sizes, in turn.
    struct Pieces(VecDeque<u8>, usize, usize);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            out: &mut ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            self.1 = (self.1 * 31 + 7) % 1000;
            let length = (1 + self.1 % self.2).min(out.remaining()).min(self.0.len());
            for _ in 0..length {
                let byte = self.0.pop_front().unwrap_or_default();
                out.put_slice(&[byte]);
            }
            Poll::Ready(Ok(()))
        }
    }

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        [&[a, b, c, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// What comes through of `sent`, in rooms of these sizes.
    fn sifted(frames: &mut Frames, sent: &[u8], piece: usize, room: usize) -> Vec<u8> {
        let mut tls = Pieces(sent.iter().copied().collect(), 1, piece);
        let mut cx = Context::from_waker(noop_waker_ref());
        let mut got = Vec::new();
        let mut seed = 3;
        while !frames.is_flooded() {
            seed = (seed * 29 + 11) % 1000;
            let mut bytes = vec![0; 1 + seed % room];
            let mut out = ReadBuf::new(&mut bytes);
            let read = frames.poll_read(&mut tls, &mut cx, &mut out);
            if read.is_ready() && out.filled().is_empty() {
                break;
            }
            got.extend_from_slice(out.filled());
            frames.pass(0);
        }
        got
    }

    #[test]
    fn what_means_nothing_is_left_out_however_it_is_cut() {
        let kept = [
            frame(1, 4, 1, b"headers"),
            frame(DATA, 0, 1, &[7; 3000]),
            frame(DATA, PADDED, 1, b"\x02data\0\0"),
            frame(PING, 0, 0, b"12345678"),
            frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0]),
            frame(WINDOW_UPDATE, 0, 1, &[0, 0, 2, 0]),
            frame(CONTINUATION, 4, 1, b"more"),
            frame(DATA, END_STREAM, 1, b""),
            frame(DATA, END_STREAM | PADDED, 3, b"\x01\0"),
            frame(3, 0, 5, &[0, 0, 0, 8]),
        ];
        let dropped = [
            frame(DATA, 0, 1, b""),
            frame(PRIORITY, 0, 1, b"12345"),
            frame(DATA, PADDED, 1, b"\x02\0\0"),
            frame(DATA, PADDED, 1, b"\0"),
            frame(0x20, 0, 1, &[9; 700]),
            frame(0xff, 0, 0, b""),
        ];
        let mut sent = Vec::new();
        for (at, frame) in kept.iter().enumerate() {
            sent.extend_from_slice(frame);
            dropped.iter().cycle().skip(at).take(1 + at % 3).for_each(|frame| sent.extend_from_slice(frame));
        }
        for piece in [1, 2, 9, 13, 100, 1000] {
            for room in [1, 5, 12, 63, 64, 65, 200, 999] {
                let mut frames = Frames::of_server();
                assert_eq!(sifted(&mut frames, &sent, piece, room), kept.concat(), "{piece} {room}");
                assert_eq!(frames.take_widened(), 256, "{piece} {room}");
                assert_eq!(frames.partial(), 0);
            }
        }
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &sent[..]].concat();
        let got = sifted(&mut Frames::of_client(), &preface, 100, 100);
        assert_eq!(got, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &kept.concat()[..]].concat());
    }

    #[test]
    fn what_padding_took_of_the_windows_is_given_back() {
        let update = |stream: u8, bytes: u32| frame(WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes());
        let sent = [
            frame(DATA, PADDED, 1, &[&[255][..], &[0; 255]].concat()),
            frame(DATA, PADDED, 3, b"\0"),
            frame(DATA, 0, 5, b""),
            frame(DATA, PADDED, 1, b"\x02\0\0"),
            // HTTP/2 does it for those it knows of.
            frame(DATA, PADDED, 7, b"\x02data\0\0"),
            frame(DATA, END_STREAM | PADDED, 9, b"\x01\0"),
        ];
        for (piece, room) in [(1000, 999), (1, 1), (9, 64)] {
            let mut frames = Frames::of_server();
            sifted(&mut frames, &sent.concat(), piece, room);
            assert!(frames.owes());
            let told = [update(0, 260), update(1, 259), update(3, 1)].concat();
            assert_eq!(frames.take_owed(), told, "{piece} {room}");
            assert!(!frames.owes());
        }
        // Who takes nothing of what it is told is not remembered without end.
        let mut frames = Frames::of_server();
        for stream in 0..OWED_MAX as u32 {
            frames.owe(stream, 1);
            frames.owe(stream, 1);
        }
        assert!(!frames.is_flooded());
        frames.owe(OWED_MAX as u32, 1);
        assert!(frames.is_flooded());
        assert_eq!(frames.take_owed().len(), (1 + OWED_MAX) * (HEADER + 4));
    }

    #[test]
    fn the_end_of_a_frame_is_found_however_it_is_written() {
        let said = [
            frame(SETTINGS, 0, 0, b"123456"),
            frame(HEADERS, 0, 1, b"some"),
            frame(CONTINUATION, 0, 1, b""),
            frame(CONTINUATION, END_HEADERS, 1, b"more"),
            frame(DATA, 0, 1, &[7; 300]),
            frame(HEADERS, END_HEADERS, 3, b""),
        ];
        // The headers are not complete after these.
        let open = [1, 2];
        let mut ends = vec![0];
        for (at, frame) in said.iter().enumerate() {
            let end = said[..at].concat().len() + frame.len();
            if !open.contains(&at) {
                ends.push(end);
            }
        }
        let all = said.concat();
        for piece in [1, 8, 9, 13, 400] {
            let mut outgoing = Outgoing::of_server();
            let mut at = 0;
            assert!(outgoing.is_between_frames());
            for some in all.chunks(piece) {
                outgoing.said(some);
                at += some.len();
                assert_eq!(outgoing.is_between_frames(), ends.contains(&at), "{at} by {piece}");
            }
        }
        let mut outgoing = Outgoing::of_client();
        outgoing.said(&[b'P'; PREFACE - 1]);
        assert!(!outgoing.is_between_frames());
        outgoing.said(b".");
        assert!(outgoing.is_between_frames());
    }

    #[test]
    fn half_a_frame_is_known_to_be_kept() {
        let mut frames = Frames::of_server();
        let whole = frame(DATA, 0, 1, &[7; 3000]);
        sifted(&mut frames, &whole[..1000], 1000, 999);
        assert_eq!(frames.partial(), 1000);
        sifted(&mut frames, &whole[1000..], 1000, 999);
        assert_eq!(frames.partial(), 0);
    }

    #[test]
    fn a_pass_ends_after_a_number_of_frames() {
        let many = frame(PING, 0, 0, b"12345678").repeat(2 * PASS_FRAMES_MAX as usize);
        let mut tls = Pieces(many.into(), 1, 50);
        let mut frames = Frames::of_server();
        let mut cx = Context::from_waker(noop_waker_ref());
        while !frames.is_pass_over() {
            let mut bytes = [0; 100];
            let read = frames.poll_read(&mut tls, &mut cx, &mut ReadBuf::new(&mut bytes));
            assert!(read.is_ready());
        }
        assert!(tls.0.len() > 17 * (PASS_FRAMES_MAX as usize - 10));
        frames.pass(0);
        assert!(!frames.is_pass_over());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_more_than_it_has_reason_to_is_noticed() {
        let flood = |kind, payload: &[u8], count: u64| {
            let mut frames = Frames::of_server();
            sifted(&mut frames, &frame(kind, 0, 0, payload).repeat(count as usize), 1000, 999);
            frames.is_flooded()
        };
        for (kind, payload) in
            [(PING, &[7; 8][..]), (SETTINGS, b""), (WINDOW_UPDATE, &[0, 0, 0, 1]), (DATA, b"")]
        {
            assert!(!flood(kind, payload, IDLE_FRAMES_MAX), "{kind}");
            assert!(flood(kind, payload, IDLE_FRAMES_MAX + 1), "{kind}");
        }
        assert!(!flood(DATA, b"x", 10 * IDLE_FRAMES_MAX), "a little is not nothing");

        // Time forgives, and so does what was sent to the peer.
        let mut frames = Frames::of_server();
        let updates = frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]);
        sifted(&mut frames, &updates.repeat(IDLE_FRAMES_MAX as usize), 1000, 999);
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        frames.pass(100);
        sifted(&mut frames, &updates.repeat(IDLE_FRAMES_PER_SECOND as usize + 100), 1000, 999);
        assert!(!frames.is_flooded());
        sifted(&mut frames, &updates, 1000, 999);
        assert!(frames.is_flooded());
    }
}
