//! The cast of the demo: two nodes, six pods, the programs in them, and one daemon per node.
//!
//! | pod | node | in the mesh | runs |
//! |---|---|---|---|
//! | `client`, `other` | node-a | yes, each with a service account of its own | curl |
//! | `near` | node-a | yes | nginx on 8080, a line server on 9000 |
//! | `outsider` | node-a | no | curl, nginx |
//! | `server` | node-b | yes | nginx on 8080, a line server on 9000 |
//! | `outside` | node-b | no | nginx on 8080, a line server on 9000 |

mod agents;
pub mod istio;
mod programs;
mod traces;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::agent::NodeAgent;
use crate::binaries;
use crate::daemon::{Daemon, Setting, extra_loopback};
use crate::leftovers::{BpfMaps, Machine, Nothing};
use crate::mesh::{Enrolment, MESHED, MeshFiles, PLAIN};
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::process::{Log, Process};
use crate::run::Run;
use crate::topology::{LINK, Node, Pod, in_url};
use crate::wire::Watch;

pub use traces::Traces;

/// The port of nginx in the pods.
pub const HTTP: u16 = 8080;
/// How much `/large` of nginx is.
pub const LARGE_MIB: u64 = 64;
/// The port of the line server in the pods.
pub const LINES: u16 = 9000;
/// Who is told something at once is told before a daemon gives up waiting for something itself, which takes 10 seconds.
const AT_ONCE: Duration = Duration::from_secs(9);
/// The cluster IPs of the service `server`.
pub const SERVICE_IPS: [&str; 2] = ["10.96.0.10", "fd96::10"];

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Where the clients are.
    A,
    /// Where the servers are.
    B,
}

/// Both nodes.
pub const BOTH: [On; 2] = [On::A, On::B];

/// Everything the scenarios work with. Fields end in the order they stand here: programs before namespaces.
#[derive(Debug)]
pub struct Testbed {
    daemons: [Option<Daemon>; 2],
    agents: [Option<NodeAgent>; 2],
    programs: Vec<Process>,
    settings: [Setting; 2],
    /// The objects the daemons read.
    pub mesh: MeshFiles,
    /// The node of the clients.
    pub a: Node,
    /// The node of the servers.
    pub b: Node,
    /// A client in the mesh.
    pub client: Pod,
    /// A client in the mesh with another service account.
    pub other: Pod,
    /// A server in the mesh, on the client's node.
    pub near: Pod,
    /// A pod outside the mesh, on the client's node.
    pub outsider: Pod,
    /// A server in the mesh, on the other node.
    pub server: Pod,
    /// A server outside the mesh, on the other node.
    pub outside: Pod,
    /// Further pods that a node agent enrols.
    further: Vec<Pod>,
    traces: Vec<(Pod, Traces)>,
    before: Machine,
    maps: BpfMaps,
    talk: bool,
    /// The run it all belongs to. Last: it removes what the others live in.
    pub run: Run,
}

/// What a client got.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The body.
    pub body: String,
    /// The address the client's socket says it is connected to (`getpeername`).
    pub remote: String,
    /// The client's own address (`getsockname`).
    pub local: String,
}

/// How a testbed is to be made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Leave it standing at the end.
    pub keep: bool,
    /// Say on standard error what is being done.
    pub talk: bool,
}

impl Testbed {
    /// Makes everything, starts both daemons, and waits until client and server can talk.
    pub fn start(options: Options) -> Result<Self> {
        Self::start_prepared(options, |_| Ok(()))
    }

    /// The same, with something done before the daemons start.
    pub fn start_prepared(options: Options, prepare: impl FnOnce(&mut Self) -> Result<()>) -> Result<Self> {
        let mut testbed = Self::without_daemons(options)?;
        if let Err(error) = prepare(&mut testbed) {
            testbed.run.take_down_after_all();
            return Err(error);
        }
        match testbed.start_daemons() {
            Ok(()) => Ok(testbed),
            Err(error) => {
                let logs = testbed.save_logs()?;
                testbed.run.take_down_after_all();
                Err(error.context(format!("logs are in {}", logs.display())))
            }
        }
    }

    /// Has every daemon that is started from now on started with these arguments, too.
    pub fn start_with(&mut self, further: &[String]) {
        for setting in &mut self.settings {
            setting.further = further.to_vec();
        }
    }

    /// Has every daemon that the environment tells everything be told this, too, from its next start on.
    pub fn start_with_variable(&mut self, name: &str, value: &str) {
        for chart in self.settings.iter_mut().filter_map(|setting| setting.chart.as_mut()) {
            chart.environment.push((name.to_owned(), value.to_owned()));
        }
    }

    /// Adds a pod that a node agent is to enrol. Before the agents start.
    pub fn add_meshed(&mut self, on: On, name: &str) -> Result<Pod> {
        let pod = self.node(on).add_pod(&self.run, name)?;
        self.further.push(pod.clone());
        Ok(pod)
    }

    /// Has the daemon of a node read the mesh from somewhere else, from its next start on.
    pub fn read_mesh_from(&mut self, on: On, path: PathBuf) {
        self.settings[on as usize].mesh = path;
    }

    /// Starts both daemons, and waits until client and server can talk.
    pub fn start_daemons(&mut self) -> Result<()> {
        for on in BOTH {
            self.say(&format!("starting the daemon of {}", self.node(on).name));
            self.start_daemon(on)?;
        }
        self.note_maps();
        self.wait_settled()
    }

    /// Copies logs and captures to where they outlive the run: `target/logs/<run>`.
    pub fn save_logs(&self) -> Result<PathBuf> {
        let to = binaries::target().join("logs").join(self.run.prefix());
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(self.run.path("logs"))?.flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(to)
    }

    /// Makes everything but does not start a daemon.
    pub fn without_daemons(options: Options) -> Result<Self> {
        let before = Machine::look()?;
        let run = if options.keep { Run::begin_kept()? } else { Run::begin()? };
        if options.talk {
            eprintln!("· making two nodes and six pods ({}-*)", run.prefix());
        }
        let a = Node::create(&run, "node-a", 1)?;
        let b = Node::create(&run, "node-b", 2)?;
        a.join(&b)?;
        let [client, other] = [a.add_pod(&run, "client")?, a.add_pod(&run, "other")?];
        let [near, outsider] = [a.add_pod(&run, "near")?, a.add_pod(&run, "outsider")?];
        let [server, outside] = [b.add_pod(&run, "server")?, b.add_pod(&run, "outside")?];
        let mesh = MeshFiles::create(run.path("mesh"), run.path("mesh.new"))?;
        mesh.service("server", SERVICE_IPS[0], SERVICE_IPS[1])?;
        let settings = [setting(&run, &mesh, &a), setting(&run, &mesh, &b)];
        std::fs::create_dir_all(run.path("pins"))?;
        let mut testbed = Self {
            daemons: [None, None],
            agents: [None, None],
            programs: Vec::new(),
            settings,
            mesh,
            a,
            b,
            client,
            other,
            near,
            outsider,
            server,
            outside,
            further: Vec::new(),
            traces: Vec::new(),
            before,
            maps: BpfMaps::default(),
            talk: options.talk,
            run,
        };
        testbed.write_pods()?;
        testbed.start_programs()?;
        let look = |pod: &Pod| Ok((pod.clone(), Traces::look(&pod.place.netns)?));
        testbed.traces = testbed.pods().map(look).collect::<Result<_>>()?;
        Ok(testbed)
    }

    /// What the machine looked like before any of this.
    pub fn machine_before(&self) -> &Machine {
        &self.before
    }

    /// Prints what is being done, where the testbed talks.
    pub fn say(&self, what: &str) {
        if self.talk {
            eprintln!("· {what}");
        }
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        [&self.client, &self.other, &self.near, &self.outsider, &self.server, &self.outside].into_iter()
    }

    /// The pods that are in the mesh.
    pub fn meshed(&self) -> [&Pod; 4] {
        [&self.client, &self.other, &self.near, &self.server]
    }

    /// A node.
    pub fn node(&self, on: On) -> &Node {
        match on {
            On::A => &self.a,
            On::B => &self.b,
        }
    }

    /// What the daemon of a node is started with.
    pub fn setting(&self, on: On) -> &Setting {
        &self.settings[on as usize]
    }

    /// The running daemon of a node.
    pub fn daemon(&mut self, on: On) -> Result<&mut Daemon> {
        let daemon = self.daemons[on as usize].as_mut();
        daemon.with_context(|| format!("no daemon runs on {on:?}"))
    }

    /// Starts the daemon of a node and waits until it is ready.
    pub fn start_daemon(&mut self, on: On) -> Result<()> {
        let daemon = self.setting(on).start_ready()?;
        self.daemons[on as usize] = Some(daemon);
        Ok(())
    }

    /// Puts another daemon in charge of a node; returns the one before, which may still run.
    pub fn replace_daemon(&mut self, on: On, daemon: Daemon) -> Option<Daemon> {
        self.daemons[on as usize].replace(daemon)
    }

    /// Kills the daemon of a node with SIGKILL.
    pub fn kill_daemon(&mut self, on: On) -> Result<()> {
        let mut daemon = self.daemons[on as usize].take().context("no daemon to kill")?;
        daemon.process().kill_9()
    }

    /// Starts a second daemon beside the first, waits until it is ready and the first has gone.
    /// With `ask` the first is also asked to (SIGTERM), as a service manager would.
    pub fn restart_daemon(&mut self, on: On, ask: bool) -> Result<Duration> {
        let mut next = self.setting(on).start()?;
        let ready = next.wait_ready().context("the second daemon")?;
        let Some(mut first) = self.replace_daemon(on, next) else { bail!("no first daemon on {on:?}") };
        if ask {
            first.stop().context("the first daemon, after SIGTERM")?;
        } else {
            first.ended().context("the first daemon was to drain and exit by itself")?;
        }
        Ok(ready)
    }

    /// Watches the link between the nodes.
    pub fn watch_link(&self, name: &str) -> Result<Watch> {
        Watch::start(&self.a.place, LINK, name, "")
    }

    /// Watches the link for anything that is not a tunnel: under load, tunnels are more than tcpdump can write.
    pub fn watch_link_for_clear(&self, name: &str) -> Result<Watch> {
        Watch::start(&self.a.place, LINK, name, "not tcp port 15008")
    }

    /// Writes all pods as they are at the start: enrolled by their namespace.
    pub fn write_pods(&self) -> Result<()> {
        for pod in self.meshed() {
            self.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
        }
        for pod in [&self.outsider, &self.outside] {
            self.mesh.pod(PLAIN, pod, Enrolment::Inherit)?;
        }
        Ok(())
    }

    /// Waits until both daemons have carried out what the mesh directory says now, in their decisions and in the
    /// kernel. Each reads it in its own time, so before that one may have and the other not.
    pub fn wait_carried_out(&self) -> Result<()> {
        let logs = BOTH.map(|on| self.setting(on).log());
        let marks = logs.each_ref().map(Log::mark);
        // An object that no daemon knows: who warns about it has read whatever was written before it.
        let witness = format!("Witness{:08x}", rand::random::<u32>());
        self.mesh.write("witness", &format!("apiVersion: ztunnel-tests/v1\nkind: {witness}\n"))?;
        for (on, (log, mark)) in BOTH.into_iter().zip(logs.iter().zip(marks)) {
            eventually(PATIENCE, || {
                let said = log.since(mark);
                let (_, after) = said.split_once(&witness).context("the change was not read")?;
                let (_, after) = after.split_once("mesh applied").context("the change was not applied")?;
                // Where a node agent says which pods there are the mesh does not.
                ensure!(
                    self.setting(on).agent.is_some() || after.contains("every pod is as the mesh says"),
                    "pods are not as the mesh says"
                );
                Ok(())
            })
            .with_context(|| format!("{}: {}", log.path().display(), log.tail(3)))?;
        }
        self.mesh.remove("witness")
    }

    /// Back to the state at the start: no policies, all pods enrolled, both daemons running.
    pub fn reset(&mut self) -> Result<()> {
        self.mesh.no_policies()?;
        self.write_pods()?;
        for on in BOTH {
            let running = match &mut self.daemons[on as usize] {
                Some(daemon) => daemon.process().is_running(),
                None => false,
            };
            if !running {
                self.start_daemon(on)?;
            }
        }
        self.wait_carried_out()?;
        self.wait_settled()
    }

    fn wait_settled(&self) -> Result<()> {
        eventually(PATIENCE, || {
            for (from, to) in [
                (&self.client, &self.server),
                (&self.other, &self.server),
                (&self.outsider, &self.server),
                (&self.client, &self.near),
                (&self.client, &self.outside),
            ] {
                for address in to.addresses() {
                    http(&from.place, address, "")
                        .with_context(|| format!("{} to {} at {address}", from.name, to.name))?;
                }
            }
            Ok(())
        })
        .context("the pods cannot talk although nothing forbids it")
    }

    /// Ends the daemons and everything they left in the kernel, their own way; returns what is wrong with it.
    pub fn stop_daemons(&mut self) -> Result<Vec<String>> {
        let mut said = Vec::new();
        self.note_maps();
        // Both at once: each takes its time for clients that have begun to connect.
        for daemon in self.daemons.iter_mut().flatten() {
            daemon.process().signal(Signal::SIGTERM);
        }
        for on in BOTH {
            if let Some(mut daemon) = self.daemons[on as usize].take() {
                daemon.ended()?;
            }
            said.push(self.setting(on).uninstall()?);
        }
        self.undo_redirection()?;
        for (pod, before) in &self.traces {
            before.same_again(&pod.place.netns).with_context(|| format!("pod {}", pod.name))?;
        }
        for on in BOTH {
            let addresses = extra_loopback(&self.node(on).place)?;
            ensure!(addresses.is_empty(), "addresses left on lo of {on:?}: {addresses:?}");
            let pins = &self.setting(on).pins;
            ensure!(!pins.exists(), "the pin directory {} is left", pins.display());
            let mounts = std::fs::read_to_string("/proc/mounts")?;
            let mounted = mounts.lines().find(|line| line.contains(&*pins.to_string_lossy()));
            ensure!(mounted.is_none(), "a mount is left: {mounted:?}");
        }
        Ok(said)
    }

    /// What a pod's network looked like before any daemon ran.
    pub fn traces_before(&self, pod: &Pod) -> Result<&Traces> {
        let found = self.traces.iter().find(|(other, _)| other.name == pod.name);
        found.map(|(_, traces)| traces).with_context(|| format!("no pod {}", pod.name))
    }

    /// Stops the daemons, removes everything, and compares the machine with how it was before.
    pub fn end(mut self) -> Result<Nothing> {
        let stopped = self.stop_daemons();
        self.programs.clear();
        let Self { mut run, before, maps, daemons, programs, .. } = self;
        drop((daemons, programs));
        let removed = run.end();
        stopped.context("the daemons did not clean up behind themselves")?;
        removed?;
        before.nothing_left(run.prefix(), &maps)
    }

    /// Remembers which BPF maps are this testbed's, to look for them at the end.
    fn note_maps(&mut self) {
        for setting in &self.settings {
            self.maps.add_pinned(&setting.pins);
        }
    }

    /// Leaves everything standing and running; returns how to enter its enclosure.
    pub fn leave_standing(mut self) -> Result<String> {
        let entrance = self.run.leave_standing()?;
        for program in &mut self.programs {
            program.keep();
        }
        for daemon in self.daemons.iter_mut().flatten() {
            daemon.process().keep();
        }
        Ok(entrance)
    }

    fn start_programs(&mut self) -> Result<()> {
        let mut programs = Vec::new();
        for pod in [&self.server, &self.outside, &self.near, &self.outsider] {
            programs.push(programs::nginx(pod, &self.run.path("state"))?);
        }
        for pod in [&self.server, &self.outside, &self.near] {
            programs.push(programs::line_server(pod)?);
        }
        for pod in [&self.server, &self.outside, &self.near, &self.outsider] {
            for address in pod.addresses() {
                eventually(PATIENCE, || http(&pod.place, address, ""))
                    .with_context(|| format!("nginx in {}", pod.name))?;
            }
        }
        self.programs = programs;
        Ok(())
    }
}

fn setting(run: &Run, mesh: &MeshFiles, node: &Node) -> Setting {
    Setting {
        node: node.name.clone(),
        place: node.place.clone(),
        mesh: mesh.path().to_owned(),
        // One authority for both nodes: they share its directory as a cluster shares its root.
        state: run.path("authority"),
        meeting: run.path("meeting").join(&node.name),
        pins: run.path("pins").join(&node.name),
        kubepods: node.kubepods.path().to_owned(),
        further: Vec::new(),
        agent: None,
        chart: None,
    }
}

/// One HTTP request by curl to nginx in a pod, with a query.
pub fn http(place: &Place, to: IpAddr, query: &str) -> Result<Answer> {
    curl(place, &[&format!("http://{}:{HTTP}/{query}", in_url(to))])
}

/// Runs curl; an answer with status 200, or an error with curl's words.
pub fn curl(place: &Place, arguments: &[&str]) -> Result<Answer> {
    curl_within(place, PATIENCE, arguments)
}

fn curl_within(place: &Place, limit: Duration, arguments: &[&str]) -> Result<Answer> {
    let format = "\n%{remote_ip} %{local_ip} %{http_code}";
    let limit = limit.as_secs().to_string();
    let mut all = vec!["-q", "-sS", "-g", "--noproxy", "*", "-m", &limit, "-w", format];
    all.extend_from_slice(arguments);
    let output = place.run("curl", &all)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let (body, facts) = text.rsplit_once('\n').context("curl printed no facts")?;
    let facts: Vec<&str> = facts.split(' ').collect();
    let [remote, local, status] = facts[..] else { bail!("curl printed {facts:?}") };
    ensure!(status == "200", "HTTP status {status}: {body}");
    Ok(Answer { body: body.trim().to_owned(), remote: remote.to_owned(), local: local.to_owned() })
}

/// Checks that a request does not get through, and that the client is told at once rather than left waiting.
pub fn refused(place: &Place, arguments: &[&str]) -> Result<String> {
    let mut waited = 0;
    loop {
        match curl_within(place, AT_ONCE, arguments) {
            Ok(answer) => bail!("was let through: {}", answer.body),
            Err(error) if !error.to_string().contains("(28)") => return Ok(error.to_string()),
            // A machine that stands still for so long does not do so twice.
            Err(error) if waited > 0 => bail!("was left waiting, twice: {error}"),
            Err(_) => waited += 1,
        }
    }
}

/// [`refused`] for a request to nginx in a pod.
pub fn http_refused(place: &Place, to: IpAddr) -> Result<String> {
    refused(place, &[&format!("http://{}:{HTTP}/", in_url(to))])
}

/// The address of the line server at `address`.
pub fn lines_at(address: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(address.into(), LINES)
}
