//! A client that keeps one connection open and sends a line over it whenever it is told to.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::binaries;
use crate::place::Place;
use crate::poll::eventually;
use crate::process::Process;

/// What the program does: each line of standard input goes over the connection, each answer to standard output.
pub fn hold(to: SocketAddr) -> Result<()> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).context("cannot connect")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    println!("connected from {} to {}", stream.local_addr()?, stream.peer_addr()?);
    let mut answers = BufReader::new(&stream);
    for line in std::io::stdin().lines() {
        let mut writer = &stream;
        writer.write_all(format!("{}\n", line?).as_bytes()).context("cannot send")?;
        let mut answer = String::new();
        if answers.read_line(&mut answer).context("no answer")? == 0 {
            bail!("the server has closed the connection");
        }
        print!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// One open connection from a pod.
#[derive(Debug)]
pub struct Held {
    process: Process,
    mark: usize,
    count: u32,
}

impl Held {
    /// Opens a connection from `place`; its first line has been answered when this returns.
    pub fn open(place: &Place, to: SocketAddr) -> Result<Self> {
        let mut command = place.command(binaries::peer()?)?;
        command.args(["hold", &to.to_string()]);
        let name = format!("hold-{}", place.netns.name());
        let mark = crate::process::Log::at(place.logs.join(format!("{name}.log"))).mark();
        let process = place.start_with(&name, command, Stdio::piped())?;
        let mut held = Self { process, mark, count: 0 };
        held.say()?;
        Ok(held)
    }

    /// Sends a line and waits for its answer; returns the client address that the server saw.
    pub fn say(&mut self) -> Result<IpAddr> {
        self.count += 1;
        let word = format!("line-{}-{}", self.process.pid(), self.count);
        let ended = |process: &mut Process| process.must_run().err();
        let stdin = self.process.stdin().context("the client has no input")?;
        if let Err(error) = writeln!(stdin, "{word}") {
            bail!("the connection is gone: {error}; {:?}", ended(&mut self.process));
        }
        let log = self.process.log().clone();
        let answered = eventually(Duration::from_secs(6), || {
            // Asked first: what it has said before it ended counts.
            let broken = ended(&mut self.process);
            match (log.since(self.mark).lines().find(|line| line.ends_with(&word)), broken) {
                (Some(line), _) => Ok(Ok(line.to_owned())),
                (None, Some(broken)) => Ok(Err(broken.context("the open connection broke"))),
                (None, None) => bail!("no answer; the last words: {}", log.tail(3)),
            }
        });
        let line = answered??;
        let client = line.split(' ').next().unwrap_or_default();
        client.parse().with_context(|| line.clone())
    }
}
