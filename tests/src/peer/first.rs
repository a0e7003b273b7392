//! Waits for the first answer that gets through.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::http::request;

const CONNECT_LIMIT: Duration = Duration::from_millis(50);
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(1);

/// What the program does: says `trying`, asks again and again, and prints when the first byte of an answer came,
/// in nanoseconds since 1970, as `first <time>`.
pub fn first(to: SocketAddr, path: &str, limit: Duration) -> Result<()> {
    let request = request(to, path);
    let start = Instant::now();
    println!("trying");
    loop {
        match attempt(to, &request) {
            Ok(at) => {
                println!("first {}", at.duration_since(UNIX_EPOCH)?.as_nanos());
                return Ok(());
            }
            Err(error) => {
                ensure!(start.elapsed() < limit, "nothing after {limit:?}; the last try: {error:#}")
            }
        }
        thread::sleep(PAUSE);
    }
}

fn attempt(to: SocketAddr, request: &[u8]) -> Result<SystemTime> {
    let mut stream = TcpStream::connect_timeout(&to, CONNECT_LIMIT).context("cannot connect")?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    std::io::Write::write_all(&mut stream, request).context("cannot send")?;
    let mut start = [0; 13];
    stream.read_exact(&mut start[..1]).context("no answer")?;
    let at = SystemTime::now();
    stream.read_exact(&mut start[1..]).context("no answer")?;
    // A proxy that is up before its way to the server is says 503.
    ensure!(&start == b"HTTP/1.1 200 ", "answered {:?}", String::from_utf8_lossy(&start));
    Ok(at)
}
