//! Two nodes' pods with a program in each that plays sides of connections, and what the mesh goes through meanwhile.

mod cast;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::cast::{Actor, Services};
use super::Outcome;
use super::axes::{Capture, Combination, Family, Mesh, Name, Path, Server, meanwhile};
use super::ear::Ear;
use super::oracle::{self, Played};
use crate::peer::act::{Event, Order, Target};
use crate::peer::script::{Came, LIMIT, Report, Script};
use crate::poll::eventually;
use crate::process::Log;
use crate::redirect::Backend;
use crate::stories::tunnel::field;
use crate::topology::Pod;
use crate::world::{BOTH, On, Options, World};

/// How many connections are played at once.
const AT_ONCE: usize = 16;
/// Longer than any script, with everything its sides wait for.
const OVER_WITHIN: Duration = LIMIT.saturating_mul(3);
/// For log lines and counters that come after the end of a connection.
const TOLD_WITHIN: Duration = Duration::from_secs(15);

const LEVEL: &str = "/logging?level=ztunnel::app::inpod::world:debug";

/// The stage.
pub(super) struct Stage {
    // Ends before the world it lives in.
    actors: BTreeMap<String, Actor>,
    events: Receiver<Event>,
    ears: Vec<Ear>,
    world: World,
    /// A pod outside the mesh beside the client's, with which nobody has to do.
    bystander: Pod,
    services: Services,
    /// What nobody else says.
    start: String,
    next: usize,
}

/// What a connection is without a mesh: all that matters then.
type Plain = (Place, Family, Server, Script);

/// Between whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    TwoNodes,
    OneNode,
    OnePod,
}

/// Where a node's log ends and what its counters say, before something is done.
struct Mark {
    on: On,
    log: usize,
    counters: BTreeMap<String, u64>,
}

/// One connection.
struct Part<'a> {
    id: usize,
    combination: &'a Combination,
    client: Pod,
    server: Pod,
    to: Target,
    server_at: SocketAddr,
    script: Script,
    reports: [Option<Report>; 2],
    exchanged: [bool; 2],
    ready: bool,
    accepted: bool,
}

impl Stage {
    /// Sets it.
    pub(super) fn set(capture: Capture) -> Result<Self> {
        let backend = match capture {
            Capture::Ebpf => None,
            Capture::Iptables => Some(Backend::IptablesNft),
            Capture::Nft => Some(Backend::Nft),
        };
        let mut bystander = None;
        let services = Services::new();
        let world = World::start_prepared(Options::default(), |world| {
            bystander = Some(world.a.add_pod(&world.run, "bystander")?);
            services.write(&world.mesh)?;
            backend.map_or(Ok(()), |backend| world.enrol_by_agent(&BOTH, backend))
        })?;
        let bystander = bystander.context("a world without its pods")?;
        if backend.is_some() {
            // Under a node agent only this level says what of the mesh was read.
            for on in BOTH {
                let (status, said) = world.setting(on).ask("POST", LEVEL)?;
                ensure!(status == 200, "{status}: {}", String::from_utf8_lossy(&said));
            }
        }
        let (sender, events) = channel();
        let mut actors = BTreeMap::new();
        for pod in world.pods().chain([&bystander]) {
            actors.insert(pod.name.clone(), Actor::start(pod, sender.clone())?);
        }
        let start = format!("combi-{:08x}-", rand::random::<u32>());
        let ears =
            BOTH.iter().map(|on| Ear::open(&world.node(*on).place.netns, &start)).collect::<Result<_>>()?;
        Ok(Self { actors, events, ears, world, bystander, services, start, next: 0 })
    }

    pub(super) fn save_logs(&self) -> Result<PathBuf> {
        self.world.save_logs()
    }

    /// Takes it down; nothing may be left.
    pub(super) fn end(self) -> Result<()> {
        let Self { actors, ears, world, bystander, .. } = self;
        drop((actors, ears, bystander));
        world.end().map(drop)
    }

    /// Plays all of these: by what the mesh goes through, so many at once.
    pub(super) fn play(&mut self, combinations: &[Combination]) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let references = self.references(combinations)?;
        outcome.references = references.len();
        let mut phases: BTreeMap<Mesh, Vec<&Combination>> = BTreeMap::new();
        for it in combinations {
            // A service without endpoints is always there.
            let mesh = if it.mesh == Mesh::NoEndpoint { Mesh::Stable } else { it.mesh };
            phases.entry(mesh).or_default().push(it);
        }
        for (mesh, phase) in phases {
            let begun = Instant::now();
            let marks = self.marks()?;
            self.prepare(mesh)?;
            for chunk in phase.chunks(AT_ONCE) {
                self.chunk(mesh, chunk, &references, &mut outcome)
                    .with_context(|| format!("while the mesh is {mesh}"))?;
            }
            self.undo(mesh)?;
            if let Err(error) = self.counted(&marks) {
                let any = phase[0];
                outcome
                    .failures
                    .push((*any, format!("counters differ: while the mesh is {mesh}: {error:#}")));
            }
            eprintln!("· {mesh}: {} in {:.1} s", phase.len(), begun.elapsed().as_secs_f64());
        }
        Ok(outcome)
    }

    fn prepare(&self, mesh: Mesh) -> Result<()> {
        let files = &self.world.mesh;
        match mesh {
            Mesh::Denied => self.deny("client")?,
            Mesh::Strict => files.peer_authentication("STRICT")?,
            Mesh::SourceAway => {
                return std::fs::rename(files.path(), files.path().with_extension("away"))
                    .map_err(Into::into);
            }
            _ => return Ok(()),
        }
        self.world.wait_carried_out()
    }

    fn undo(&self, mesh: Mesh) -> Result<()> {
        let files = &self.world.mesh;
        match mesh {
            Mesh::SourceAway => std::fs::rename(files.path().with_extension("away"), files.path())?,
            Mesh::Stable | Mesh::NoEndpoint => return Ok(()),
            _ => files.no_policies()?,
        }
        self.world.wait_carried_out()
    }

    /// Refuses a service account at all servers in the mesh.
    fn deny(&self, service_account: &str) -> Result<()> {
        for app in [&self.world.server, &self.world.near] {
            self.world.mesh.deny(&format!("no-{}", app.name), &app.name, service_account)?;
        }
        Ok(())
    }

    /// What happens without a mesh, to each script that is played.
    fn references(&mut self, combinations: &[Combination]) -> Result<BTreeMap<String, [Option<Report>; 2]>> {
        let mut wanted: BTreeMap<String, Plain> = BTreeMap::new();
        for it in combinations {
            let plain = plain(it);
            wanted.insert(key(&plain), plain);
        }
        let all: Vec<(String, Plain)> = wanted.into_iter().collect();
        let mut references = BTreeMap::new();
        for chunk in all.chunks(AT_ONCE) {
            let mut parts = Vec::new();
            for (key, (place, family, server, script)) in chunk {
                // Beside the mesh, with everything else as there.
                let stands_for = combinations.iter().find(|it| self::key(&plain(it)) == *key);
                let stands_for = stands_for.context("a reference of nothing")?;
                let outsider = self.world.outsider.clone();
                let to = match place {
                    Place::TwoNodes => self.world.outside.clone(),
                    Place::OneNode => self.bystander.clone(),
                    Place::OnePod => outsider.clone(),
                };
                let (id, port) = self.number();
                let at = match (server, family) {
                    (Server::Gone, _) => SocketAddr::new(cast::nobody(*family), port),
                    _ => SocketAddr::new(of(&to, *family), port),
                };
                let script = Script { marker: format!("plain-{id}"), ..script.clone() };
                parts.push(Part::new(id, stands_for, outsider, to, Target::Address(at), at, script));
            }
            self.run(&mut parts, |stage, parts| stage.go(parts))?;
            for ((key, _), part) in chunk.iter().zip(parts) {
                references.insert(key.clone(), part.reports);
            }
        }
        Ok(references)
    }

    fn number(&mut self) -> (usize, u16) {
        self.next += 1;
        (self.next, cast::port(self.next))
    }

    fn chunk(
        &mut self,
        mesh: Mesh,
        chunk: &[&Combination],
        references: &BTreeMap<String, [Option<Report>; 2]>,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let marks = BOTH.map(|on| self.world.setting(on).log()).map(|log| log.mark());
        let mut parts: Vec<Part<'_>> = chunk.iter().map(|it| self.part(it)).collect();
        self.run(&mut parts, |stage, parts| {
            match mesh {
                Mesh::DeniedMeanwhile => stage.deny("client")?,
                Mesh::OtherPolicyMeanwhile => stage.deny("nobody")?,
                _ => return stage.go(parts),
            }
            stage.world.wait_carried_out()?;
            stage.go(parts)
        })?;
        if meanwhile(mesh) {
            self.world.mesh.no_policies()?;
            self.world.wait_carried_out()?;
        }
        // What is to come has come by then, for all of them.
        let told_by = Instant::now() + TOLD_WITHIN;
        for part in &parts {
            outcome.played += 1;
            let found = self.findings(part, references, marks, told_by);
            outcome.failures.extend(found.into_iter().map(|what| (*part.combination, what)));
        }
        Ok(())
    }

    /// Who is who in a combination.
    fn part<'a>(&mut self, it: &'a Combination) -> Part<'a> {
        let (id, port) = self.number();
        let world = &self.world;
        let (client, server) = match it.path {
            Path::Tunnel => (&world.client, &world.server),
            Path::SameNode => (&world.client, &world.near),
            Path::PlainIn => (&world.outsider, &world.server),
            Path::PlainOut => (&world.client, &world.outside),
            Path::Itself => (&world.near, &world.near),
        };
        let gone = it.server == Server::Gone;
        let v6 = it.family == Family::V6;
        let server_at = match gone {
            true if it.path == Path::PlainOut => SocketAddr::new(cast::nobody(it.family), port),
            true => SocketAddr::new(cast::ghost(it.family), port),
            false => SocketAddr::new(of(server, it.family), port),
        };
        let service = match (it.mesh, gone) {
            (Mesh::NoEndpoint, _) => "empty",
            (_, true) if it.path == Path::Tunnel => "ghost",
            (_, true) => "nobody",
            _ => &server.name,
        };
        let to = match it.name {
            Name::PodIp => Target::Address(server_at),
            Name::ClusterIp => Target::Address(SocketAddr::new(
                self.services.vip(service, it.family),
                cast::service_port(port),
            )),
            Name::HostName => {
                Target::Named { name: self.services.host(service), v6, port: cast::service_port(port) }
            }
            // Without a virtual address nobody translates ports.
            Name::Headless => Target::Named { name: self.services.headless_host(service), v6, port },
        };
        let (_, _, _, script) = plain(it);
        let script = Script { marker: format!("{}{id}", self.start), held: meanwhile(it.mesh), ..script };
        Part::new(id, it, client.clone(), server.clone(), to, server_at, script)
    }

    /// Plays these at once; `meanwhile` when all that are to be exchanged have been.
    fn run(
        &mut self,
        parts: &mut [Part<'_>],
        meanwhile: impl FnOnce(&mut Self, &[Part<'_>]) -> Result<()>,
    ) -> Result<()> {
        for part in parts.iter() {
            if part.has_server() {
                let (id, port, v6) = (part.id, part.server_at.port(), part.server_at.is_ipv6());
                let (state, script) = (part.combination.server, part.script.clone());
                self.order(&part.server, &Order::Serve { id, port, v6, state, script })?;
            }
        }
        self.until(parts, |part| part.ready || !part.has_server()).context("servers do not start")?;
        for part in parts.iter() {
            let (id, to, script) = (part.id, part.to.clone(), part.script.clone());
            let again = part.combination.server == Server::Restarting;
            self.order(&part.client, &Order::Connect { id, to, again, script })?;
        }
        self.until(parts, |part| {
            !part.script.held || part.exchanged == [true; 2] || part.reports[0].is_some()
        })
        .context("what is to be exchanged is not")?;
        meanwhile(self, parts)?;
        self.until(parts, |part| part.reports[0].is_some()).context("clients do not end")?;
        for part in parts.iter().filter(|part| part.has_server()) {
            // Where the client was told that it is over, nobody comes any more.
            if part.reports[0].as_ref().is_some_and(|report| !report.error.is_empty()) {
                self.order(&part.server, &Order::Stop { id: part.id })?;
            }
        }
        self.until(parts, |part| part.reports[1].is_some() || !part.has_server())
            .context("servers do not end")
    }

    /// Has the clients go on that wait for it.
    fn go(&mut self, parts: &[Part<'_>]) -> Result<()> {
        for part in parts.iter().filter(|part| part.script.held) {
            self.order(&part.client, &Order::Go { id: part.id })?;
        }
        Ok(())
    }

    fn order(&mut self, pod: &Pod, order: &Order) -> Result<()> {
        self.actors.get_mut(&pod.name).with_context(|| format!("nobody acts in {}", pod.name))?.order(order)
    }

    /// Takes in what happens until all are so far.
    fn until(&self, parts: &mut [Part<'_>], so_far: impl Fn(&Part<'_>) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !parts.iter().all(&so_far) {
            let left = OVER_WITHIN.saturating_sub(begun.elapsed());
            let Ok(event) = self.events.recv_timeout(left) else {
                let waited: Vec<String> = parts
                    .iter()
                    .filter(|part| !so_far(part))
                    .map(|part| part.combination.to_string())
                    .collect();
                bail!("still not after {OVER_WITHIN:?}: {}", waited.join("; "));
            };
            let id = match &event {
                Event::Ready(id) | Event::Accepted(id) | Event::Exchanged(id, _) | Event::Done(id, _, _) => {
                    *id
                }
            };
            let Some(part) = parts.iter_mut().find(|part| part.id == id) else { continue };
            match event {
                Event::Ready(_) => part.ready = true,
                Event::Accepted(_) => part.accepted = true,
                Event::Exchanged(_, side) => part.exchanged[side as usize] = true,
                Event::Done(_, side, report) => part.reports[side as usize] = Some(report),
            }
        }
        Ok(())
    }

    fn findings(
        &self,
        part: &Part<'_>,
        references: &BTreeMap<String, [Option<Report>; 2]>,
        marks: [usize; 2],
        told_by: Instant,
    ) -> Vec<String> {
        let it = part.combination;
        let Some(client) = &part.reports[0] else { return vec!["no report: of the client".to_owned()] };
        let nobody = [None, None];
        let played = Played {
            combination: it,
            client,
            server: part.reports[1].as_ref().filter(|_| part.accepted),
            reference: references.get(&key(&plain(it))).unwrap_or(&nobody),
            dialled: match part.to {
                Target::Address(to) => Some(to),
                Target::Named { .. } => None,
            },
            client_ip: of(&part.client, it.family),
            server_at: part.server_at,
        };
        let mut found = oracle::judge(&played);
        found.extend(self.told(part, client, marks, told_by));
        let in_clear = self.ears.iter().any(|ear| ear.heard().contains(&part.script.marker));
        let may_be = !(it.client_in_mesh() && it.server_in_mesh());
        if in_clear && !may_be {
            found.push("in clear: what was said was on a device".to_owned());
        }
        if !in_clear
            && may_be
            && client.came == Came::Through
            && part.script.size > part.script.marker.len() + 1
        {
            found.push("not heard: what is in clear was on no device, so nobody listens".to_owned());
        }
        found
    }

    /// Looks for the lines of both daemons.
    fn told(&self, part: &Part<'_>, client: &Report, marks: [usize; 2], told_by: Instant) -> Vec<String> {
        let it = part.combination;
        let mut found = Vec::new();
        // What stays in a pod may stay out of the daemon's sight.
        let Some(local) = client.local.filter(|_| it.path != Path::Itself) else { return found };
        let sides = [
            ("outbound", &part.client, it.client_in_mesh()),
            ("inbound", &part.server, it.server_in_mesh() && part.accepted),
        ];
        for (direction, pod, _) in sides.into_iter().filter(|(_, _, tells)| *tells) {
            let on = if pod.node == self.world.a.name { On::A } else { On::B };
            let log = self.world.setting(on).log();
            match line_of(&log, marks[on as usize], told_by, direction, local, part.server_at) {
                Ok(line) => found.extend(oracle::line(it, direction, client, &line, &part.server.name)),
                Err(error) => found.push(format!("no {direction} line: {error:#}")),
            }
        }
        found
    }

    /// The counters of both nodes, and where their logs end.
    fn marks(&self) -> Result<Vec<Mark>> {
        BOTH.into_iter()
            .map(|on| {
                // What came before has been counted.
                let counters = eventually(TOLD_WITHIN, || self.settled_counters(on))?;
                Ok(Mark { on, log: self.world.setting(on).log().mark(), counters })
            })
            .collect()
    }

    fn settled_counters(&self, on: On) -> Result<BTreeMap<String, u64>> {
        let counters = counters(&self.world.setting(on).metrics()?);
        for reporter in ["source", "destination"] {
            let [opened, closed] =
                ["opened", "closed"].map(|what| counters.get(&format!("{what} {reporter}")).copied());
            ensure!(opened == closed, "{reporter} on {on:?}: {opened:?} opened, {closed:?} closed");
        }
        Ok(counters)
    }

    /// Each line of a log is a connection that was counted, by the same side.
    fn counted(&self, marks: &[Mark]) -> Result<()> {
        for Mark { on, log, counters: before } in marks {
            eventually(TOLD_WITHIN, || {
                let now = self.settled_counters(*on)?;
                let said = self.world.setting(*on).log().since(*log);
                for (direction, reporter) in [("outbound", "source"), ("inbound", "destination")] {
                    let lines = said
                        .lines()
                        .filter(|line| line.contains("connection complete"))
                        .filter(|line| field(line, "direction") == Some(direction))
                        .count() as u64;
                    let of = |counters: &BTreeMap<String, u64>| {
                        counters.get(&format!("opened {reporter}")).copied().unwrap_or_default()
                    };
                    let counted = of(&now) - of(before);
                    ensure!(counted == lines, "{reporter} on {on:?}: {counted} counted, {lines} lines");
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl<'a> Part<'a> {
    fn new(
        id: usize,
        combination: &'a Combination,
        client: Pod,
        server: Pod,
        to: Target,
        server_at: SocketAddr,
        script: Script,
    ) -> Self {
        let (reports, exchanged) = ([None, None], [false; 2]);
        Self {
            id,
            combination,
            client,
            server,
            to,
            server_at,
            script,
            reports,
            exchanged,
            ready: false,
            accepted: false,
        }
    }

    fn has_server(&self) -> bool {
        !matches!(self.combination.server, Server::ClosedPort | Server::Gone)
    }
}

/// The address of a pod.
fn of(pod: &Pod, family: Family) -> IpAddr {
    match family {
        Family::V4 => pod.v4.into(),
        Family::V6 => pod.v6.into(),
    }
}

/// What a combination is without a mesh.
fn plain(it: &Combination) -> Plain {
    let place = match it.path {
        Path::Tunnel | Path::PlainIn | Path::PlainOut => Place::TwoNodes,
        Path::SameNode => Place::OneNode,
        Path::Itself => Place::OnePod,
    };
    let script = Script {
        marker: String::new(),
        first: it.first,
        size: it.size.bytes(),
        pause: it.pause,
        held: false,
        end: it.end,
    };
    (place, it.family, it.server, script)
}

fn key(plain: &Plain) -> String {
    format!("{plain:?}")
}

/// The line of the access log about a connection. The client's side knows it by the client's address, the server's by
/// the server's: ports of servers are not used twice at once.
fn line_of(
    log: &Log,
    mark: usize,
    told_by: Instant,
    direction: &str,
    client: SocketAddr,
    server: SocketAddr,
) -> Result<String> {
    let of = |line: &str, key: &str| field(line, key).and_then(|value| value.parse::<SocketAddr>().ok());
    let what = format!("direction {direction}, {client} to {server}");
    log.wait_line(mark, told_by.saturating_duration_since(Instant::now()), &what, |line| {
        let from = of(line, "src.addr");
        let to = [of(line, "dst.hbone_addr"), of(line, "dst.addr")].contains(&Some(server));
        field(line, "direction") == Some(direction)
            && match direction {
                // Rules that redirect give a client another port where two of its connections would look the same.
                "outbound" => {
                    from == Some(client) || (to && from.is_some_and(|from| from.ip() == client.ip()))
                }
                _ => to,
            }
    })
}

/// Connections by what became of them and who says so.
fn counters(metrics: &str) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix("istio_tcp_connections_") else { continue };
        let Some((what, rest)) = rest.split_once("_total{reporter=\"") else { continue };
        let Some((reporter, rest)) = rest.split_once('"') else { continue };
        let value = rest.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).unwrap_or_default();
        *found.entry(format!("{what} {reporter}")).or_default() += value;
    }
    found
}
