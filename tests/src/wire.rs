//! Watches the link between the nodes with tcpdump.

#![expect(unsafe_code, reason = "a packet socket")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::netns::Netns;
use crate::pcap::{self, Packets, tls};
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::process::Process;

/// The port of the tunnels.
pub const HBONE_PORT: u16 = 15008;
/// What a frame is that says where a capture ends: for experiments, and of no protocol (IEEE 802).
const END: u16 = 0x88b5;

/// A running capture.
#[derive(Debug)]
pub struct Watch {
    process: Process,
    file: PathBuf,
    netns: Netns,
    device: String,
}

impl Watch {
    /// Starts to capture on one device what passes `filter` (tcpdump's language; empty for everything); it is
    /// capturing when this returns.
    pub fn start(place: &Place, device: &str, name: &str, filter: &str) -> Result<Self> {
        let file = place.logs.join(format!("{name}.pcap"));
        let mut command = place.command("tcpdump")?;
        // -Z root: the file is in a directory of root's.
        command.args([
            "-i",
            device,
            "-n",
            "-U",
            "-s",
            "0",
            "-B",
            "16384",
            "--immediate-mode",
            "-Z",
            "root",
            "-w",
        ]);
        command.arg(&file);
        if !filter.is_empty() {
            command.arg(format!("({filter}) or ether proto {END}"));
        }
        let name = format!("tcpdump-{name}");
        let mark = crate::process::Log::at(place.logs.join(format!("{name}.log"))).mark();
        let process = place.start(&name, command)?;
        process.log().wait_line(mark, PATIENCE, "\"listening on\"", |line| line.contains("listening on"))?;
        Ok(Self { process, file, netns: place.netns.clone(), device: device.to_owned() })
    }

    /// Ends the capture and reads it.
    pub fn finish(mut self) -> Result<Packets> {
        // The last packets are still on their way through the capture's buffer: until one comes out that is put in now.
        let end = format!("end-{:016x}", rand::random::<u64>());
        self.netns.enter(|| send(&self.device, end.as_bytes()))?;
        eventually(PATIENCE, || {
            self.process.must_run()?;
            let written = std::fs::read(&self.file)?;
            let written = written.get(written.len().saturating_sub(SEARCHED)..).unwrap_or_default();
            ensure!(pcap::contains(written, end.as_bytes()), "the capture of {} stands still", self.device);
            Ok(())
        })?;
        self.process.signal(Signal::SIGINT);
        self.process.wait(PATIENCE)?;
        let dropped = self.process.log().text();
        if let Some(line) = dropped.lines().rev().find(|line| line.contains("dropped by kernel"))
            && !line.starts_with("0 ")
        {
            bail!("the capture is not complete: {line}");
        }
        pcap::read(&self.file)
    }
}

/// How much of a capture's end is searched for its last frame: others may come behind that.
const SEARCHED: usize = 1 << 20;

/// Sends a frame that is not of IP.
fn send(device: &str, payload: &[u8]) -> Result<()> {
    let index = nix::net::if_::if_nametoindex(device).with_context(|| device.to_owned())?;
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let socket = Errno::result(socket).context("a packet socket")?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut frame = vec![0xff; 12];
    frame.extend_from_slice(&END.to_be_bytes());
    frame.extend_from_slice(payload);
    // The shortest that Ethernet has.
    frame.resize(frame.len().max(60), 0);
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: END.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff; 8],
    };
    // SAFETY: frame and address are valid for their sizes.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    Errno::result(sent).with_context(|| format!("cannot send on {device}"))?;
    Ok(())
}

/// What a capture says about tunnels: nothing but TLS 1.3 to port 15008.
#[derive(Debug)]
pub struct TunnelsOnly {
    /// Streams looked at.
    pub streams: usize,
    /// Encrypted records in them.
    pub encrypted: usize,
    /// Packets of port 15008.
    pub packets: usize,
}

/// Checks that every TCP packet that opens a connection or carries something belongs to port 15008 and every stream is
/// TLS 1.3. At least one must have carried something, or there is nothing to be shown. A connection from before may
/// still have to end.
pub fn tunnels_only(packets: &Packets) -> Result<TunnelsOnly> {
    let by_port = packets.segments_by_port();
    let speaks = |segment: &&pcap::Segment| segment.opens || !segment.payload.is_empty();
    let tunnel =
        |segment: &&pcap::Segment| [segment.from, segment.to].iter().any(|at| at.port() == HBONE_PORT);
    let others: Vec<_> = packets.segments.iter().filter(speaks).filter(|segment| !tunnel(segment)).collect();
    ensure!(others.is_empty(), "TCP beside port {HBONE_PORT}: {by_port:?} (port, packets); {:?}", others[0]);
    ensure!(packets.other_ip == 0, "{} IP packets that are neither TCP nor ICMP", packets.other_ip);
    let streams = packets.streams(HBONE_PORT);
    let mut encrypted = 0;
    for stream in &streams {
        encrypted += tls::check(stream)?.encrypted;
    }
    ensure!(encrypted > 0, "no encrypted record was seen: {by_port:?}");
    Ok(TunnelsOnly { streams: streams.len(), encrypted, packets: by_port[&HBONE_PORT] })
}
