//! HBONE: application connections as HTTP/2 CONNECT streams inside mutual TLS.
//!
//! Owns the headers ([`address`]), the tunnel as a client and as a server ([`client`], [`server`]), the reuse
//! of tunnels ([`pool`]), the two halves of a stream ([`stream`]) and tunnels inside of one ([`through`]). Which tunnel is dialled and who may use
//! one is decided elsewhere; nothing outside this module knows which HTTP/2 implementation is below.
//!
//! What makes it fast is in [`transport`]: everything a pass over a tunnel's streams has to say is written
//! with one system call, and read with one. A tunnel and its streams must stay on one thread for that.
//!
//! # Windows and memory
//!
//! A stream whose receiver does not read holds at most [`Config::stream_window`], and nothing of the other streams': the
//! tunnel's window is as large as those of all its streams together ([`Config::tunnel_window`]). A peer that gives its
//! streams less gets further ones on another tunnel once it takes nothing any more on one ([`pool`]).
//!
//! Nothing is read from an application before it may be sent on: at most [`Config::send_buffer`] waits on a stream, and
//! [`Config::tunnel_send_buffer`] on all of a tunnel. What waits is charged to whose it is
//! ([`crate::net::budget`]); when memory gets short windows become smaller (`window`), and who holds most gives way.
//!
//! What a peer sends is looked at frame by frame (`frames`): many of them do not take the thread from others, and one
//! that sends too many which carry nothing is told to be calm.

use std::time::Duration;

pub mod address;
pub mod client;
mod flow;
mod frames;
pub mod pool;
pub mod server;
pub mod stream;
pub mod through;
pub mod transport;
mod window;

#[cfg(test)]
pub(crate) use frames::IDLE_FRAMES_MAX;
#[cfg(test)]
pub(crate) use frames::IDLE_FRAMES_PER_SECOND;
#[cfg(test)]
pub(crate) use frames::PASS_FRAMES_MAX;
#[cfg(test)]
pub(crate) use transport::BACKLOG_MAX;

#[cfg(test)]
pub(crate) mod tests;

/// How tunnels behave. The two ends of a tunnel may differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Bytes a peer may send on one stream before they are delivered.
    pub stream_window: u32,
    /// The same for all streams of a tunnel together, if that is more than their own windows come to.
    pub connection_window: u32,
    /// The largest frame a peer may send. Peers send 16 KiB unless told otherwise, and larger ones bring
    /// nothing, but peers that were told so by others may.
    pub frame_max: u32,
    /// Bytes waiting to be sent on one stream, beyond which its source is not read.
    pub send_buffer: usize,
    /// The same on all streams of a tunnel together.
    pub tunnel_send_buffer: usize,
    /// Streams a peer may have open on a tunnel it dialled. Further ones are refused (REFUSED_STREAM), which
    /// tells the peer to use another tunnel.
    pub server_streams_max: u32,
    /// Streams this side opens on one tunnel, if the peer takes as many.
    pub client_streams_max: usize,
    /// Header bytes accepted in a request.
    pub request_headers_max: u32,
    /// Header bytes accepted in a response.
    pub response_headers_max: u32,
    /// The congestion control of tunnels' sockets; `None`: the system's. Between the nodes of a cluster cubic carries
    /// more for less CPU time than BBR, whose pacing costs a timer for every few packets. One the kernel does not
    /// have is passed over.
    pub congestion: Option<String>,
    /// Silence between pings.
    pub ping_interval: Duration,
    /// A tunnel whose peer has not answered a ping for so long is dead.
    pub ping_timeout: Duration,
    /// A tunnel without streams is closed after so long.
    pub idle_timeout: Duration,
    /// The same while another tunnel to the same peer has room: after a burst each would hold on to a quarter of a
    /// megabyte, and the next burst dials them again.
    pub spare_timeout: Duration,
    /// One that a peer has dialled and does not use is closed after so long: later than peers do it themselves.
    pub server_idle_timeout: Duration,
    /// A TLS and HTTP/2 handshake that takes longer is given up.
    pub handshake_timeout: Duration,
    /// Requests that may wait for one tunnel being dialled. Further ones fail at once.
    pub waiters_max: usize,
}

/// What HTTP/2 may keep of small DATA frames that nobody has asked for yet, at 256 bytes a frame. Whoever has a stream asks
/// for them in the same pass; so it is never reached, and one stream's small frames do not end the tunnel.
const DATA_FRAME_BUDGET: usize = 16 << 20;

impl Config {
    /// The window of a tunnel of so many streams: none of them can use up that of another.
    pub fn tunnel_window(&self, streams: u32) -> u32 {
        // The largest there is (RFC 9113 §6.9.1).
        const MAX: u32 = i32::MAX as u32;
        self.stream_window.saturating_mul(streams).max(self.connection_window).min(MAX)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 16 << 20,
            frame_max: 1 << 20,
            send_buffer: 512 << 10,
            tunnel_send_buffer: 1 << 20,
            server_streams_max: 200,
            client_streams_max: 100,
            request_headers_max: 64 * 1024,
            response_headers_max: 16 * 1024,
            congestion: Some("cubic".to_owned()),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(300),
            server_idle_timeout: Duration::from_secs(600),
            spare_timeout: Duration::from_secs(3),
            handshake_timeout: Duration::from_secs(10),
            waiters_max: 1024,
        }
    }
}
