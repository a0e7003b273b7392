//! A client that keeps one connection open and sends a line over it whenever it is told to.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::binaries;
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::process::Process;

/// What the program does: each line of standard input goes over the connection, each answer to standard output.
pub fn hold(to: SocketAddr) -> Result<()> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).context("cannot connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
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
        let stdin = self.process.stdin().context("the client has no input")?;
        if let Err(error) = writeln!(stdin, "{word}") {
            bail!("the connection is gone: {error}; {:?}", self.process.must_run().err());
        }
        // Not longer than the client waits itself, which then ends.
        let line = eventually(2 * PATIENCE, || {
            // Looked at first: what an ended client has said is all there.
            let ended = self.process.must_run().err();
            let said = self.process.log().since(self.mark);
            match (said.lines().find(|line| line.ends_with(&word)), ended) {
                (Some(line), _) => Ok(Ok(line.to_owned())),
                (None, Some(ended)) => Ok(Err(ended.context("the open connection broke"))),
                (None, None) => bail!("no answer to {word}"),
            }
        })??;
        let client = line.split(' ').next().unwrap_or_default();
        client.parse().with_context(|| line.clone())
    }
}
