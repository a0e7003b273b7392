//! The daemon of one node, as a process of its own.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::binaries;
use crate::image::{PROGRAMS, assemble, contained};
use crate::netns::Netns;
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::process::{Log, Process, sh};

/// How long an old daemon may take for its open connections: longer than what is done meanwhile takes.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
const METRICS_PORT: u16 = 15020;
const READINESS_PORT: u16 = 15021;
/// The port of the loopback where operators ask.
pub const ADMIN_PORT: u16 = 15000;

/// What a daemon is started with; the same for each process that follows another on the node.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The node's name.
    pub node: String,
    /// The node's network namespace and its group for the node's own processes.
    pub place: Place,
    /// `--mesh`
    pub mesh: PathBuf,
    /// `--state-dir`
    pub state: PathBuf,
    /// `--pin-dir`
    pub pins: PathBuf,
    /// `--run-dir`: where two daemons of the node meet.
    pub meeting: PathBuf,
    /// `--kubepods-cgroup`
    pub kubepods: PathBuf,
    /// What else is typed.
    pub further: Vec<String>,
    /// `--zds`: where the node agent is that enrols the pods, if one does.
    pub agent: Option<PathBuf>,
    /// Started as Istio's chart does instead: `proxy ztunnel`, everything else by the environment.
    pub chart: Option<Chart>,
}

/// How Istio's chart starts a node proxy.
#[derive(Debug, Clone)]
pub struct Chart {
    /// The working directory, below which are the token and the root that the chart mounts.
    pub root: PathBuf,
    /// The variables.
    pub environment: Vec<(String, String)>,
    /// An image's root that it runs in, if not the machine's.
    pub image: Option<PathBuf>,
}

/// A running daemon. Killed when dropped: what it leaves in the kernel stays.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    mark: usize,
    started: Instant,
}

impl Setting {
    /// The command line, as a person would type it.
    pub fn arguments(&self) -> Vec<String> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut arguments = vec!["run".to_owned()];
        for (flag, value) in [
            ("--mesh", path(&self.mesh)),
            ("--node", self.node.clone()),
            ("--state-dir", path(&self.state)),
            ("--pin-dir", path(&self.pins)),
            ("--run-dir", path(&self.meeting)),
            ("--kubepods-cgroup", path(&self.kubepods)),
            ("--drain-deadline", format!("{}s", DRAIN_DEADLINE.as_secs())),
            ("--log-format", "plain".to_owned()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.extend(self.further.iter().cloned());
        if let Some(agent) = &self.agent {
            arguments.extend(["--zds".to_owned(), path(agent)]);
        }
        arguments
    }

    /// Starts a daemon without waiting for anything.
    pub fn start(&self) -> Result<Daemon> {
        let daemon = binaries::daemon()?;
        let command = match &self.chart {
            None => {
                let mut command = self.place.command(daemon)?;
                command.args(self.arguments());
                command
            }
            Some(chart) => {
                let mut command = match &chart.image {
                    None => self.place.command(daemon)?,
                    Some(image) => self.in_image(image, &chart.root, &daemon)?,
                };
                command.args(["proxy", "ztunnel"]).current_dir(&chart.root);
                command.envs(chart.environment.iter().map(|(name, value)| (name, value)));
                command
            }
        };
        // One file for all daemons of a node: who reads it reads the node's history.
        let mark = self.log().mark();
        let process = self.place.start(&format!("daemon-{}", self.node), command)?;
        Ok(Daemon { process, mark, started: Instant::now() })
    }

    fn in_image(&self, image: &Path, root: &Path, daemon: &Path) -> Result<Command> {
        let setpriv = Path::new("/usr/bin/setpriv");
        assemble(image, &[daemon, setpriv])?;
        let agent = self.chart_variable("INPOD_UDS").context("no INPOD_UDS")?;
        let sockets = Path::new(agent).parent().context("INPOD_UDS has no directory")?;
        let words = contained(image, &root.join("var/run/secrets"), &[sockets, &self.meeting]);
        let mut command = self.place.command(&words[0])?;
        command.args(&words[1..]).arg(Path::new("/").join(PROGRAMS).join("ztunnel"));
        Ok(command)
    }

    fn chart_variable(&self, name: &str) -> Option<&str> {
        let environment = &self.chart.as_ref()?.environment;
        Some(&environment.iter().find(|(variable, _)| variable == name)?.1)
    }

    /// Starts a daemon and waits until it says that it is ready.
    pub fn start_ready(&self) -> Result<Daemon> {
        let mut daemon = self.start()?;
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// What the node's daemons have printed, one after the other.
    pub fn log(&self) -> Log {
        Log::at(self.place.logs.join(format!("daemon-{}.log", self.node)))
    }

    /// The metrics as text, asked for inside the node.
    pub fn metrics(&self) -> Result<String> {
        self.http(METRICS_PORT, "/metrics")
    }

    /// The answer of the readiness port.
    pub fn readiness(&self) -> Result<String> {
        self.http(READINESS_PORT, "/healthz/ready")
    }

    /// What the admin port answers, asked for inside the node: the status and the body.
    pub fn ask(&self, method: &str, path: &str) -> Result<(u16, Vec<u8>)> {
        self.place.netns.enter(|| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, ADMIN_PORT))
                .with_context(|| format!("the admin port of {} does not answer", self.node))?;
            stream.set_read_timeout(Some(DRAIN_DEADLINE + PATIENCE))?;
            // Version 1.0: the answer comes in one piece, to the end of the connection.
            write!(stream, "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            let end =
                answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("not an HTTP answer")?;
            let head = std::str::from_utf8(&answer[..end])?;
            let status = head.split(' ').nth(1).context("no status")?.parse()?;
            Ok((status, answer.split_off(end + 4)))
        })
    }

    fn http(&self, port: u16, path: &str) -> Result<String> {
        self.place.netns.enter(|| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                .with_context(|| format!("port {port} of {} does not answer", self.node))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
            if !head.starts_with("HTTP/1.1 200") {
                bail!("{}: {}", head.lines().next().unwrap_or_default(), body.trim());
            }
            Ok(body.to_owned())
        })
    }

    /// Runs another subcommand of the daemon's program beside it, to its end.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        self.place.run(&binaries::daemon()?.display().to_string(), arguments)
    }

    /// Removes what the daemon has left in the kernel, the daemon's own way; returns what it says.
    pub fn uninstall(&self) -> Result<String> {
        let mut command = self.place.command(binaries::daemon()?)?;
        command.args(["uninstall", "--node", &self.node, "--pin-dir"]).arg(&self.pins);
        command.arg("--run-dir").arg(&self.meeting).arg("--kubepods-cgroup").arg(&self.kubepods);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let child = crate::process::spawn(command)?;
        let output = crate::process::finish(child, PATIENCE)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("uninstall: {}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(said.trim().to_owned())
    }
}

impl Daemon {
    /// Waits until it says that it is ready; returns how long that was after its start.
    pub fn wait_ready(&mut self) -> Result<Duration> {
        eventually(PATIENCE, || match self.is_ready() {
            Ok(true) => Ok(Ok(self.started.elapsed())),
            Ok(false) => bail!("not ready; it said: {}", self.process.log().tail(5)),
            // A daemon that has ended will not become ready: the inner error ends the waiting.
            Err(ended) => Ok(Err(ended)),
        })?
    }

    /// Whether it has said that it is ready. That it has ended before is an error.
    pub fn is_ready(&mut self) -> Result<bool> {
        let ended = self.process.must_run();
        if self.process.log().since(self.mark).lines().any(says_ready) {
            return Ok(true);
        }
        ended.map(|()| false)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Asks it to drain and exit, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM);
        self.ended()
    }

    /// Waits for it to exit by itself.
    pub fn ended(&mut self) -> Result<()> {
        let status = self.process.wait(DRAIN_DEADLINE + PATIENCE)?;
        if !status.success() {
            bail!("the daemon ended with {status}: {}", self.process.log().tail(5));
        }
        Ok(())
    }

    /// Resident memory in bytes that is its own: pages of files come and go.
    pub fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()))?;
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no RssAnon value")?.parse()?;
        Ok(kib * 1024)
    }

    /// How many file descriptors it has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.process.pid()))?.count())
    }

    /// How many descriptors it has of network namespaces and of files: what comes with messages. How many it has of
    /// anything else depends on which of its threads connections came to.
    pub fn files(&self) -> Result<usize> {
        let is_file = |target: &&String| target.starts_with("net:") || target.starts_with('/');
        Ok(self.open()?.iter().filter(is_file).count())
    }

    /// What it holds of a network namespace: the namespace itself, and TCP sockets in it.
    pub fn held_of(&self, netns: &Netns) -> Result<Vec<String>> {
        let namespace = format!("net:[{}]", std::fs::metadata(netns.path())?.ino());
        let sockets = netns.enter(|| {
            let mut sockets = BTreeSet::new();
            for table in ["tcp", "tcp6"] {
                let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
                let inodes = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(9));
                sockets.extend(inodes.map(|inode| format!("socket:[{inode}]")));
            }
            Ok(sockets)
        })?;
        let open = self.open()?.into_iter();
        Ok(open.filter(|target| *target == namespace || sockets.contains(target)).collect())
    }

    /// What its descriptors lead to.
    fn open(&self) -> Result<Vec<String>> {
        let mut targets = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.process.pid()))? {
            // One that has just been closed is gone from the directory, too.
            let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
            targets.push(target.to_string_lossy().into_owned());
        }
        Ok(targets)
    }
}

/// Whether a log line says that the daemon is ready: the word itself, and not "not ready".
fn says_ready(line: &str) -> bool {
    let mut words = line.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut before = "";
    words.any(|word| {
        let found = word == "ready" && before != "not";
        before = word;
        found
    })
}

/// The addresses on the `lo` of a node, without its own: the probe addresses while a daemon has been there.
pub fn extra_loopback(place: &Place) -> Result<Vec<String>> {
    let text = sh("ip", &["-n", place.netns.name(), "-o", "addr", "show", "dev", "lo"])?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .filter(|address| !matches!(*address, "127.0.0.1/8" | "::1/128"))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_told_from_not_ready() {
        for line in ["info\tapp\tready", "{\"message\":\"ready\",\"pods\":3}", "ready after 120ms"] {
            assert!(says_ready(line), "{line}");
        }
        for line in ["not ready, pending: proxy", "already loaded", "readiness on 15021", ""] {
            assert!(!says_ready(line), "{line}");
        }
    }
}
