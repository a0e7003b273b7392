//! Watches the link between the nodes with tcpdump.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::pcap::{self, Packets, tls};
use crate::place::Place;
use crate::process::Process;

/// The port of the tunnels.
pub const HBONE_PORT: u16 = 15008;

/// A running capture.
#[derive(Debug)]
pub struct Watch {
    process: Process,
    file: PathBuf,
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
        command.arg(&file).args(filter.split_whitespace());
        let name = format!("tcpdump-{name}");
        let mark = crate::process::Log::at(place.logs.join(format!("{name}.log"))).mark();
        let process = place.start(&name, command)?;
        process.log().wait_line(mark, Duration::from_secs(10), "\"listening on\"", |line| {
            line.contains("listening on")
        })?;
        Ok(Self { process, file })
    }

    /// Ends the capture and reads it.
    pub fn finish(mut self) -> Result<Packets> {
        // The last packets are still on their way through the capture's buffer.
        std::thread::sleep(Duration::from_millis(100));
        self.process.must_run()?;
        self.process.signal(Signal::SIGINT);
        self.process.wait(Duration::from_secs(10))?;
        let dropped = self.process.log().text();
        if let Some(line) = dropped.lines().rev().find(|line| line.contains("dropped by kernel"))
            && !line.starts_with("0 ")
        {
            bail!("the capture is not complete: {line}");
        }
        pcap::read(&self.file)
    }
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

/// Checks that every TCP packet belongs to port 15008 and every stream is TLS 1.3. At least one must have carried
/// something, or there is nothing to be shown.
pub fn tunnels_only(packets: &Packets) -> Result<TunnelsOnly> {
    let by_port = packets.segments_by_port();
    let others: Vec<_> = by_port.iter().filter(|(port, _)| **port != HBONE_PORT).collect();
    ensure!(others.is_empty(), "TCP beside port {HBONE_PORT} (port, packets): {others:?}");
    ensure!(packets.other_ip == 0, "{} IP packets that are neither TCP nor ICMP", packets.other_ip);
    let streams = packets.streams(HBONE_PORT);
    let mut encrypted = 0;
    for stream in &streams {
        encrypted += tls::check(stream)?.encrypted;
    }
    ensure!(encrypted > 0, "no encrypted record was seen: {by_port:?}");
    Ok(TunnelsOnly { streams: streams.len(), encrypted, packets: by_port[&HBONE_PORT] })
}
