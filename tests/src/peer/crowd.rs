//! Many connections that are opened, used once, and then left open.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::http::{exchange, request};

/// On a busy machine a handshake may have to be asked for several times.
const LIMIT: Duration = Duration::from_secs(60);

/// What the program does: so many connections, one request on each; says `open` and keeps them until standard
/// input ends.
pub fn crowd(to: SocketAddr, path: &str, count: usize) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    let request = request(to, path);
    let mut connections = Vec::with_capacity(count);
    for number in 1..=count {
        let open = || -> Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&to, LIMIT).context("cannot connect")?;
            stream.set_read_timeout(Some(LIMIT))?;
            exchange(&mut stream, &request)?;
            Ok(stream)
        };
        connections.push(open().with_context(|| format!("connection {number} of {count}"))?);
    }
    println!("open");
    let _closed = std::io::stdin().read_to_end(&mut Vec::new());
    drop(connections);
    Ok(())
}
