//! Reads a packet capture: TCP streams, who opened them to which port, and whether they are TLS 1.3.
//!
//! Knows the classic pcap file of an Ethernet device, as `tcpdump -w` writes it, and no more than these scenarios
//! need of IP, TCP and TLS.

pub mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};

/// One TCP segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// Sequence number of the first byte.
    pub sequence: u32,
    /// SYN without ACK: a connection attempt.
    pub opens: bool,
    /// SYN, with or without ACK.
    pub syn: bool,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// What was captured.
#[derive(Debug, Default)]
pub struct Packets {
    /// All TCP segments, in order.
    pub segments: Vec<Segment>,
    /// Packets of any kind.
    pub total: usize,
    /// IP packets that are neither TCP nor ICMP.
    pub other_ip: usize,
    /// Everything, headers and all, in order: to search it for a marker.
    raw: Vec<Vec<u8>>,
}

/// Both directions of one connection, in the order of their bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream {
    /// What the client sent.
    pub sent: Vec<u8>,
    /// What the server sent.
    pub received: Vec<u8>,
    /// Whether its first segment was captured too.
    pub from_start: bool,
}

impl Packets {
    /// Reads a capture file. A last packet that is cut off is left out: the writer was stopped there.
    pub fn parse(file: &[u8]) -> Result<Self> {
        let head: [u8; 24] = file.get(..24).context("no pcap header")?.try_into()?;
        let magic = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        ensure!(
            matches!(magic, 0xa1b2_c3d4 | 0xa1b2_3c4d),
            "not a pcap file of this machine's byte order: {magic:#x}"
        );
        let link = u32::from_le_bytes([head[20], head[21], head[22], head[23]]);
        ensure!(link == 1, "not captured on an Ethernet device (link type {link})");
        let mut packets = Self::default();
        let mut rest = &file[24..];
        while let Some((record, after)) = rest.split_first_chunk::<16>() {
            let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
            let Some(frame) = after.get(..length) else { break };
            packets.add(frame);
            rest = &after[length..];
        }
        Ok(packets)
    }

    fn add(&mut self, frame: &[u8]) {
        self.total += 1;
        self.raw.push(frame.to_vec());
        match segment(frame) {
            Frame::Tcp(segment) => self.segments.push(segment),
            Frame::Icmp | Frame::NotIp => {}
            Frame::OtherIp => self.other_ip += 1,
        }
    }

    /// How many packets carry this text anywhere, in clear.
    pub fn with_marker(&self, marker: &str) -> usize {
        let marker = marker.as_bytes();
        self.raw.iter().filter(|frame| contains(frame, marker)).count()
    }

    /// Connection attempts by the port they went to, each connection counted once.
    pub fn attempts_by_port(&self) -> BTreeMap<u16, usize> {
        let mut seen = std::collections::BTreeSet::new();
        let mut counts = BTreeMap::new();
        for segment in self.segments.iter().filter(|segment| segment.opens) {
            if seen.insert((segment.from, segment.to, segment.sequence)) {
                *counts.entry(segment.to.port()).or_default() += 1;
            }
        }
        counts
    }

    /// Segments by the server's port, and of those the ones that carry bytes.
    pub fn segments_by_port(&self) -> BTreeMap<u16, usize> {
        let mut counts = BTreeMap::new();
        for segment in &self.segments {
            // The well-known side is the lower port: ephemeral ports begin at 32768.
            *counts.entry(segment.to.port().min(segment.from.port())).or_default() += 1;
        }
        counts
    }

    /// The streams to this port, put together again.
    pub fn streams(&self, port: u16) -> Vec<Stream> {
        type Pieces<'a> = (Option<u32>, Vec<(u32, &'a [u8])>);
        let mut sides: BTreeMap<(SocketAddr, SocketAddr), Pieces<'_>> = BTreeMap::new();
        for segment in &self.segments {
            let side = sides.entry((segment.from, segment.to)).or_default();
            if segment.syn {
                side.0 = Some(segment.sequence.wrapping_add(1));
            }
            if !segment.payload.is_empty() {
                side.1.push((segment.sequence, &segment.payload));
            }
        }
        let clients = sides.keys().filter(|(_, to)| to.port() == port).copied().collect::<Vec<_>>();
        let mut streams = Vec::new();
        for (client, server) in clients {
            let (start, sent) = &sides[&(client, server)];
            let received = sides.get(&(server, client)).map(|(start, pieces)| assemble(*start, pieces));
            streams.push(Stream {
                sent: assemble(*start, sent),
                received: received.unwrap_or_default(),
                from_start: start.is_some(),
            });
        }
        streams
    }
}

fn assemble(start: Option<u32>, pieces: &[(u32, &[u8])]) -> Vec<u8> {
    let Some(start) = start.or_else(|| pieces.first().map(|(sequence, _)| *sequence)) else {
        return Vec::new();
    };
    let mut sorted: Vec<(u32, &[u8])> =
        pieces.iter().map(|(sequence, bytes)| (sequence.wrapping_sub(start), *bytes)).collect();
    sorted.sort_by_key(|(offset, _)| *offset);
    let mut bytes = Vec::new();
    for (offset, piece) in sorted {
        let offset = offset as usize;
        if offset > bytes.len() {
            break; // A packet was not captured: what follows can't be put in order.
        }
        let known = bytes.len() - offset;
        if let Some(new) = piece.get(known..) {
            bytes.extend_from_slice(new);
        }
    }
    bytes
}

enum Frame {
    Tcp(Segment),
    Icmp,
    OtherIp,
    NotIp,
}

fn segment(frame: &[u8]) -> Frame {
    let Some(kind) = frame.get(12..14) else { return Frame::NotIp };
    let ip = &frame[14..];
    let parsed = match kind {
        [0x08, 0x00] => ipv4(ip),
        [0x86, 0xdd] => ipv6(ip),
        _ => return Frame::NotIp,
    };
    match parsed {
        Some((from, to, 6, payload)) => tcp(from, to, payload).map_or(Frame::OtherIp, Frame::Tcp),
        Some((_, _, 1 | 58, _)) => Frame::Icmp,
        _ => Frame::OtherIp,
    }
}

fn ipv4(ip: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let from: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
    let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
    // A packet bigger than 64 KiB (segmentation offload) says a length of 0.
    let end = if total == 0 { ip.len() } else { total };
    Some((Ipv4Addr::from(from).into(), Ipv4Addr::from(to).into(), *ip.get(9)?, ip.get(header..end)?))
}

fn ipv6(ip: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let length = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
    let from: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
    let to: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
    let end = if length == 0 { ip.len() } else { 40 + length };
    let (mut kind, mut payload) = (*ip.get(6)?, ip.get(40..end)?);
    // Multicast listener reports carry a hop-by-hop header before ICMP (RFC 3810).
    if kind == 0 {
        let length = 8 + 8 * usize::from(*payload.get(1)?);
        (kind, payload) = (*payload.first()?, payload.get(length..)?);
    }
    Some((Ipv6Addr::from(from).into(), Ipv6Addr::from(to).into(), kind, payload))
}

fn tcp(from: IpAddr, to: IpAddr, tcp: &[u8]) -> Option<Segment> {
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let sequence: [u8; 4] = tcp.get(4..8)?.try_into().ok()?;
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    let flags = *tcp.get(13)?;
    let (syn, ack) = (flags & 0x02 != 0, flags & 0x10 != 0);
    Some(Segment {
        from: SocketAddr::new(from, port(0)?),
        to: SocketAddr::new(to, port(2)?),
        sequence: u32::from_be_bytes(sequence),
        opens: syn && !ack,
        syn,
        payload: tcp.get(header..)?.to_vec(),
    })
}

pub(crate) fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Reads a capture file from disk.
pub fn read(path: &std::path::Path) -> Result<Packets> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.is_empty() {
        bail!("{} is empty: tcpdump did not run", path.display());
    }
    Packets::parse(&bytes).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests;
