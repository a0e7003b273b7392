//! Clients that ask for much and read nothing of it.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::http::request;

const LIMIT: Duration = Duration::from_secs(10);

/// Open files besides the connections.
const FILES: u64 = 64;

/// What the program does: so many connections, one request on each, of which no answer is read; says how many could be
/// made, and keeps them until standard input ends.
pub fn stall(to: SocketAddr, path: &str, count: usize) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let hard = hard.max(count as u64 + FILES);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    let request = request(to, path);
    let open = || -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.write_all(&request)?;
        Ok(stream)
    };
    let connections: Vec<TcpStream> = (0..count).filter_map(|_| open().ok()).collect();
    println!("stalled {}", connections.len());
    let _closed = std::io::stdin().read_to_end(&mut Vec::new());
    drop(connections);
    Ok(())
}
