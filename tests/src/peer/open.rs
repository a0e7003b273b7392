//! Requests at a fixed rate over connections that stay open, and how long each took.
//!
//! The schedule is fixed before it starts (an "open" load), and a request's time counts from the moment it was
//! *due*, not from when a connection was free to carry it. A stall is so seen by every request that it delays.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use crate::poll::PATIENCE;

use super::http::{answer_length, exchange, request};

/// How long after the end the last answers may come: a slow machine makes as many requests in more time.
const GRACE: Duration = PATIENCE;

/// What came of a load. Times are in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Outcome {
    /// Requests that were due.
    pub due: u64,
    /// Those that were answered.
    pub answered: u64,
    /// Half of them took at most so long.
    pub p50: f64,
    /// 99 of 100.
    pub p99: f64,
    /// 999 of 1000.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

/// What to ask for, and how often.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The server.
    pub to: SocketAddr,
    /// The path of the page.
    pub path: String,
    /// Requests per second over all connections.
    pub rate: u64,
    /// How many connections share them.
    pub connections: usize,
    /// For how long.
    pub period: Duration,
}

struct Connection {
    stream: TcpStream,
    answer: Vec<u8>,
    /// When the request on its way was due.
    due: Option<Instant>,
}

/// What the program does: the plan, then one line of JSON.
pub fn open(plan: &Plan) -> Result<()> {
    println!("{}", serde_json::to_string(&run(plan)?)?);
    Ok(())
}

fn run(plan: &Plan) -> Result<Outcome> {
    ensure!(plan.rate > 0 && plan.connections > 0, "give a rate and a number of connections");
    // A sleep is otherwise 50 µs longer than asked for, and that would be in every time.
    nix::sys::prctl::set_timerslack(1).context("cannot set the timer slack")?;
    let request = request(plan.to, &plan.path);
    let mut connections = Vec::new();
    for _ in 0..plan.connections {
        connections.push(Connection::open(plan.to, &request)?);
    }
    let total = (plan.period.as_nanos() * u128::from(plan.rate) / 1_000_000_000) as u64;
    let start = Instant::now() + Duration::from_millis(5);
    let due = |number: u64| start + Duration::from_nanos(number * 1_000_000_000 / plan.rate);
    let (mut next, mut times) = (0, Vec::with_capacity(total as usize));
    let mut idle: VecDeque<usize> = (0..connections.len()).collect();
    while (next < total || idle.len() < connections.len()) && start.elapsed() < plan.period + GRACE {
        while next < total
            && due(next) <= Instant::now()
            && let Some(index) = idle.pop_front()
        {
            connections[index].ask(&request, due(next))?;
            next += 1;
        }
        let limit = match next < total && !idle.is_empty() {
            true => due(next).saturating_duration_since(Instant::now()),
            false => Duration::from_millis(100),
        };
        for index in readable(&connections, limit)? {
            if let Some(due) = connections[index].read()? {
                times.push(due.elapsed());
                idle.push_back(index);
            }
        }
    }
    Ok(summary(total, times))
}

/// Waits for an answer, at most so long; returns the connections that have something to read.
fn readable(connections: &[Connection], limit: Duration) -> Result<Vec<usize>> {
    let busy = connections.iter().enumerate().filter(|(_, connection)| connection.due.is_some());
    let (indices, mut polled): (Vec<usize>, Vec<PollFd<'_>>) =
        busy.map(|(index, c)| (index, PollFd::new(c.stream.as_fd(), PollFlags::POLLIN))).unzip();
    match ppoll(&mut polled, Some(TimeSpec::from_duration(limit)), None) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("cannot wait for answers"),
    }
    let ready = indices.into_iter().zip(polled).filter(|(_, polled)| polled.any() == Some(true));
    Ok(ready.map(|(index, _)| index).collect())
}

impl Connection {
    fn open(to: SocketAddr, request: &[u8]) -> Result<Self> {
        let mut stream = TcpStream::connect_timeout(&to, GRACE).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(GRACE))?;
        exchange(&mut stream, request)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, answer: Vec::new(), due: None })
    }

    fn ask(&mut self, request: &[u8], due: Instant) -> Result<()> {
        // An idle connection's send buffer is empty: a short request fits whole.
        self.stream.write_all(request).context("cannot send")?;
        self.due = Some(due);
        Ok(())
    }

    /// Reads what is there; when the answer is complete, returns when its request was due.
    fn read(&mut self) -> Result<Option<Instant>> {
        let mut chunk = [0; 8 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => anyhow::bail!("the server has closed the connection"),
                Ok(read) => self.answer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("cannot receive"),
            }
            if answer_length(&self.answer)?.is_some_and(|length| self.answer.len() >= length) {
                self.answer.clear();
                return Ok(self.due.take());
            }
        }
    }
}

fn summary(due: u64, mut times: Vec<Duration>) -> Outcome {
    times.sort_unstable();
    let at = |share: f64| {
        let rank = (times.len() as f64 * share).ceil() as usize;
        times.get(rank.saturating_sub(1)).map_or(0.0, |time| time.as_nanos() as f64 / 1000.0)
    };
    Outcome { due, answered: times.len() as u64, p50: at(0.5), p99: at(0.99), p999: at(0.999), max: at(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let times = (1..=1000).rev().map(Duration::from_micros).collect();
        let outcome = summary(1001, times);
        assert_eq!((outcome.due, outcome.answered), (1001, 1000));
        assert_eq!((outcome.p50, outcome.p99, outcome.p999, outcome.max), (500.0, 990.0, 999.0, 1000.0));
    }

    #[test]
    fn a_stall_of_the_server_is_in_the_times_of_the_requests_behind_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("it is bound");
        let stall = Duration::from_millis(200);
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut chunk = [0; 4096];
            for number in 0_u32.. {
                if stream.read(&mut chunk).unwrap_or(0) == 0 {
                    return;
                }
                if number == 3 {
                    std::thread::sleep(stall);
                }
                let answered = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
                assert!(answered.is_ok(), "the client reads every answer");
            }
        });
        let period = Duration::from_millis(400);
        let plan = Plan { to, path: "/".to_owned(), rate: 200, connections: 1, period };
        let outcome = run(&plan).expect("the server answers");
        assert_eq!((outcome.due, outcome.answered), (80, 80));
        // One request met the stall; some twenty of 80 waited for the connection behind it, half a stall on average.
        assert!(outcome.max >= 200_000.0, "{outcome:?}");
        assert!(outcome.p99 >= 150_000.0, "{outcome:?}");
    }
}
