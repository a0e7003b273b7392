//! Two nodes' pods with a program in each that plays sides of connections, and what the mesh goes through meanwhile.

mod cast;
mod envoy;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::cast::{Actor, Services};
use self::source::{Published, Source};
use super::Outcome;
use super::axes::{Capture, Combination, End, Family, Limits, Mesh, Name, Path, Server, meanwhile};
use super::ear::Ear;
use super::labels::{self, Parties, Reporter, Series, Told, Who};
use super::oracle::{self, Played};
use crate::binaries;
use crate::mesh::{MESHED, PLAIN};
use crate::peer::act::{Event, Order, Target};
use crate::peer::script::{Came, LIMIT, Report, Script};
use crate::poll::eventually;
use crate::process::{Log, Process, sh};
use crate::redirect::Backend;
use crate::scenarios::tunnel::field;
use crate::testbed::{BOTH, HTTP, On, Options, Testbed};
use crate::topology::Pod;

/// How many connections are played at once.
const AT_ONCE: usize = 16;
/// Longer than any script, with everything its sides wait for.
const OVER_WITHIN: Duration = LIMIT.saturating_mul(3);
/// For log lines and counters that come after the end of a connection.
const TOLD_WITHIN: Duration = Duration::from_secs(15);

/// The buffer memory of a daemon, and how many readers of nothing fill a pod's share of it.
const BUFFERS: &str = "32Mi";
const CROWD: usize = 400;
const FULL: f64 = 8e6;
/// Ports of clients, where there are few, and else.
const PORT_RANGE: &str = "ipv4/ip_local_port_range";
const FEW_PORTS: &str = "40000 40031";

/// The stage.
pub(super) struct Stage {
    // Ends before the testbed it lives in.
    actors: BTreeMap<String, Actor>,
    events: Receiver<Event>,
    ears: Vec<Ear>,
    source: Source,
    /// Who reads nothing.
    crowd: Option<Process>,
    testbed: Testbed,
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
    series: Series,
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
        let mut prepared = None;
        let services = Services::new();
        let testbed = Testbed::start_prepared(Options::default(), |testbed| {
            let bystander = testbed.a.add_pod(&testbed.run, "bystander")?;
            let source = match backend {
                None => {
                    testbed.start_with(&["--buffer-memory".to_owned(), BUFFERS.to_owned()]);
                    services.write(&testbed.mesh)?;
                    Source::Files
                }
                Some(backend) => {
                    let published = Published::publish(testbed, backend, &services, &bystander)?;
                    Source::Istiod(Box::new(published))
                }
            };
            prepared = Some((bystander, source));
            Ok(())
        })?;
        let (bystander, source) = prepared.context("a testbed without its pods")?;
        let (sender, events) = channel();
        let mut actors = BTreeMap::new();
        let further = match &source {
            Source::Files => Vec::new(),
            Source::Istiod(published) => vec![&published.guarded, &published.beyond],
        };
        for pod in testbed.pods().chain([&bystander]).chain(further) {
            actors.insert(pod.name.clone(), Actor::start(pod, sender.clone())?);
        }
        let start = format!("combi-{:08x}-", rand::random::<u32>());
        let ears =
            BOTH.iter().map(|on| Ear::open(&testbed.node(*on).place.netns, &start)).collect::<Result<_>>()?;
        let crowd = None;
        Ok(Self { actors, events, ears, source, crowd, testbed, bystander, services, start, next: 0 })
    }

    pub(super) fn save_logs(&self) -> Result<PathBuf> {
        self.testbed.save_logs()
    }

    /// Takes it down; nothing may be left.
    pub(super) fn end(self) -> Result<()> {
        let Self { actors, ears, source, crowd, testbed, bystander, .. } = self;
        drop((actors, ears, source, crowd, bystander));
        testbed.end().map(drop)
    }

    /// Plays all of these: by what the mesh goes through, so many at once.
    pub(super) fn play(&mut self, combinations: &[Combination]) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let references = self.references(combinations)?;
        outcome.references = references.len();
        // What is idle for long is so at once.
        let mut phases: BTreeMap<(Mesh, Limits, bool), Vec<&Combination>> = BTreeMap::new();
        for it in combinations {
            // A service without endpoints is always there.
            let mesh = if it.mesh == Mesh::NoEndpoint { Mesh::Stable } else { it.mesh };
            phases.entry((mesh, it.limits, it.end == End::LongIdle)).or_default().push(it);
        }
        for ((mesh, limits, long), phase) in phases {
            let begun = Instant::now();
            self.source.prepare(&mut self.testbed, mesh).with_context(|| format!("before it is {mesh}"))?;
            let marks = self.marks()?;
            let spared = self.limit(limits).with_context(|| format!("before there are {limits}"))?;
            let mut told = Vec::new();
            for chunk in phase.chunks(if long { cast::AT_ONCE_MAX } else { AT_ONCE }) {
                // What came to no end is a finding of its own, and the others are played all the same.
                if let Err(error) = self.chunk(mesh, chunk, &references, (&mut outcome, &mut told)) {
                    outcome.failures.push((*chunk[0], format!("not played to the end: {error:#}")));
                }
            }
            self.unlimit(limits, &spared)?;
            let found =
                self.counted(&marks, &told).unwrap_or_else(|error| vec![(None, format!("{error:#}"))]);
            for (it, what) in found {
                let what = format!("{what} (while the mesh is {mesh}, limits {limits})");
                outcome.failures.push((it.unwrap_or(*phase[0]), what));
            }
            self.source.undo(&self.testbed, mesh).with_context(|| format!("after it was {mesh}"))?;
            let kind = if long { ", idle for long" } else { "" };
            eprintln!("· {mesh}, {limits}{kind}: {} in {:.1} s", phase.len(), begun.elapsed().as_secs_f64());
        }
        Ok(outcome)
    }

    /// Has there be little of something; what is to be given back is returned.
    fn limit(&mut self, limits: Limits) -> Result<Vec<(u32, String)>> {
        match limits {
            Limits::Ample => {}
            Limits::FewPorts => {
                for pod in self.testbed.pods() {
                    pod.place.netns.set_sysctl(PORT_RANGE, FEW_PORTS)?;
                }
            }
            Limits::MemoryFull => {
                let [from, to] = [&self.testbed.other, &self.testbed.server];
                let mut command = from.place.command(binaries::peer()?)?;
                command.args(["stall", &format!("{}:{HTTP}", to.v4), "/large", &CROWD.to_string()]);
                let crowd = from.place.start_with("crowd", command, Stdio::piped())?;
                crowd.log().wait_line(0, OVER_WITHIN, "the crowd", |line| line.starts_with("stalled"))?;
                self.crowd = Some(crowd);
                let held = |text: &str| {
                    let line = text.lines().find_map(|line| line.strip_prefix("ztunnel_buffer_bytes "))?;
                    line.parse::<f64>().ok()
                };
                eventually(TOLD_WITHIN, || {
                    let held =
                        held(&self.testbed.setting(On::A).metrics()?).context("no ztunnel_buffer_bytes")?;
                    ensure!(held > FULL, "the crowd has the daemon hold {held} bytes");
                    Ok(())
                })?;
            }
            Limits::NoDescriptors => {
                let mut spared = Vec::new();
                for on in BOTH {
                    let pid = self.testbed.daemon(on)?.process().pid();
                    let before = sh(
                        "prlimit",
                        &["--pid", &pid.to_string(), "--nofile", "-o", "SOFT", "--noheadings"],
                    )?;
                    let lowest = eventually(TOLD_WITHIN, || lowest_free_for_long(pid))?;
                    sh("prlimit", &["--pid", &pid.to_string(), &format!("--nofile={lowest}:")])?;
                    spared.push((pid, before.trim().to_owned()));
                }
                return Ok(spared);
            }
        }
        Ok(Vec::new())
    }

    /// Gives it back.
    fn unlimit(&mut self, limits: Limits, spared: &[(u32, String)]) -> Result<()> {
        if limits == Limits::FewPorts {
            // As in every new namespace.
            for pod in self.testbed.pods() {
                pod.place.netns.set_sysctl(PORT_RANGE, "32768 60999")?;
            }
        }
        self.crowd = None;
        for (pid, before) in spared {
            sh("prlimit", &["--pid", &pid.to_string(), &format!("--nofile={before}:")])?;
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
                let outsider = self.testbed.outsider.clone();
                let to = match place {
                    Place::TwoNodes => self.testbed.outside.clone(),
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
        (outcome, told): (&mut Outcome, &mut Vec<(On, Combination, Told)>),
    ) -> Result<()> {
        let marks = BOTH.map(|on| self.testbed.setting(on).log()).map(|log| log.mark());
        let mut parts: Vec<Part<'_>> = chunk.iter().map(|it| self.part(it)).collect();
        self.run(&mut parts, |stage, parts| {
            match mesh {
                Mesh::DeniedMeanwhile => {
                    stage.source.deny(&stage.testbed, "client")?;
                    // Who is not cut all the same is found by what it sees.
                    let _not_all = stage.wait_cut(parts, marks);
                }
                Mesh::OtherPolicyMeanwhile => stage.source.deny(&stage.testbed, "nobody")?,
                _ => {}
            }
            stage.go(parts)
        })?;
        if meanwhile(mesh) {
            self.source.no_policies(&self.testbed)?;
        }
        // What is to come has come by then, for all of them.
        let told_by = Instant::now() + TOLD_WITHIN;
        for part in &parts {
            outcome.played += 1;
            let found = self.findings(part, references, marks, told_by);
            outcome.failures.extend(found.into_iter().map(|what| (*part.combination, what)));
            let expected = labels::expected(part.combination, &self.parties(part));
            told.extend(expected.into_iter().map(|one| {
                let pod = if one.reporter == Reporter::Source { &part.client } else { &part.server };
                (self.node_of(pod), *part.combination, one)
            }));
        }
        Ok(())
    }

    fn node_of(&self, pod: &Pod) -> On {
        if pod.node == self.testbed.a.name { On::A } else { On::B }
    }

    /// Waits until as many connections are cut as are open.
    fn wait_cut(&self, parts: &[Part<'_>], marks: [usize; 2]) -> Result<()> {
        let open = parts.iter().filter(|part| part.script.held && part.reports[0].is_none()).count();
        eventually(TOLD_WITHIN, || {
            let cut: usize = BOTH
                .into_iter()
                .zip(marks)
                .map(|(on, mark)| self.testbed.setting(on).log().since(mark))
                .map(|said| said.lines().filter(|line| line.contains("due to policy change")).count())
                .sum();
            ensure!(cut >= open, "{cut} of {open} are cut");
            Ok(())
        })
    }

    /// Who takes part in a connection, as metrics tell it.
    fn parties(&self, part: &Part<'_>) -> Parties {
        let it = part.combination;
        let who = |name: &str| {
            let outside =
                [&self.testbed.outsider.name, &self.testbed.outside.name].into_iter().any(|pod| pod == name);
            let namespace = if outside || name == "nobody" { PLAIN } else { MESHED };
            Who { name: name.to_owned(), namespace: namespace.to_owned() }
        };
        let service = self.service(it, &part.server);
        let by_address = matches!(it.name, Name::ClusterIp | Name::HostName);
        let endpoint = if it.server == Server::Gone { service } else { &*part.server.name };
        Parties {
            client: who(&part.client.name),
            server: Some(who(endpoint)),
            waypoint: who("way"),
            dialled: by_address.then(|| self.services.told(service)),
            behind: self.services.told(&part.server.name),
            attempts: part.reports[0].as_ref().map_or(1, |report| report.attempts),
        }
    }

    /// The service that is dialled, or that the pod which is dialled is behind.
    fn service<'a>(&self, it: &Combination, server: &'a Pod) -> &'a str {
        match (it.mesh, it.server == Server::Gone) {
            (Mesh::NoEndpoint, _) => "empty",
            (_, true) if it.path == Path::Tunnel => "ghost",
            (_, true) => "nobody",
            _ => &server.name,
        }
    }

    fn published(&self) -> Option<&Published> {
        match &self.source {
            Source::Files => None,
            Source::Istiod(published) => Some(published),
        }
    }

    /// Who is who in a combination.
    fn part<'a>(&mut self, it: &'a Combination) -> Part<'a> {
        let (id, port) = self.number();
        let testbed = &self.testbed;
        let (client, server) = match it.path {
            Path::Tunnel => (&testbed.client, &testbed.server),
            Path::SameNode => (&testbed.client, &testbed.near),
            Path::PlainIn => (&testbed.outsider, &testbed.server),
            Path::PlainOut => (&testbed.client, &testbed.outside),
            Path::Itself => (&testbed.near, &testbed.near),
            Path::Waypoint => {
                (&testbed.client, self.published().map_or(&testbed.server, |istiod| &istiod.guarded))
            }
            Path::Double => {
                (&testbed.client, self.published().map_or(&testbed.server, |istiod| &istiod.beyond))
            }
        };
        let gone = it.server == Server::Gone;
        let v6 = it.family == Family::V6;
        let server_at = match gone {
            true if it.path == Path::PlainOut => SocketAddr::new(cast::nobody(it.family), port),
            true => SocketAddr::new(cast::ghost(it.family), port),
            false => SocketAddr::new(of(server, it.family), port),
        };
        // A gateway knows one address of the pod.
        let server_at =
            if it.path == Path::Double { SocketAddr::new(server.v4.into(), port) } else { server_at };
        let service = self.service(it, server);
        let service_port = self.services.port(service, port);
        let to = match it.name {
            Name::PodIp => Target::Address(server_at),
            Name::ClusterIp => {
                Target::Address(SocketAddr::new(self.services.vip(service, it.family), service_port))
            }
            Name::HostName => Target::Named { name: self.services.host(service), v6, port: service_port },
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
            seen_ip: match (it.path, self.published()) {
                (Path::Waypoint, Some(istiod)) => of(&istiod.way, it.family),
                (Path::Double, Some(istiod)) => istiod.gate.v4.into(),
                _ => of(&part.client, it.family),
            },
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
        // What stays in a pod may stay out of the daemon's sight, and what cannot be accepted does.
        let unseen = it.path == Path::Itself || it.limits == Limits::NoDescriptors;
        let Some(local) = client.local.filter(|_| !unseen) else { return found };
        let asked = match it.path {
            Path::Double => {
                let port = self.services.port(&part.server.name, part.server_at.port());
                format!("{}:{port}", self.services.host(&part.server.name))
            }
            _ => part.server_at.to_string(),
        };
        let sides = [
            ("outbound", &part.client, it.client_in_mesh()),
            ("inbound", &part.server, it.server_in_mesh() && part.accepted),
        ];
        for (direction, pod, _) in sides.into_iter().filter(|(_, _, tells)| *tells) {
            let on = self.node_of(pod);
            let log = self.testbed.setting(on).log();
            let server =
                if it.path == Path::Waypoint && direction == "outbound" { "way" } else { &part.server.name };
            // Of few ports each is soon used again, towards somebody else.
            let from_tells = it.limits != Limits::FewPorts;
            match line_of(&log, marks[on as usize], told_by, direction, (local, from_tells), &asked) {
                Ok(line) => found.extend(oracle::line(it, direction, client, &line, server)),
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
                let series = eventually(TOLD_WITHIN, || self.settled_series(on))?;
                Ok(Mark { on, log: self.testbed.setting(on).log().mark(), series })
            })
            .collect()
    }

    fn settled_series(&self, on: On) -> Result<Series> {
        let series = labels::series(&self.testbed.setting(on).metrics()?, &self.testbed.other.name);
        ensure!(labels::is_settled(&series), "on {on:?} some are opened and not closed: {series:?}");
        Ok(series)
    }

    /// Each line of a log is a connection that was counted, by the same side, and all of them are in the series in
    /// which they should be.
    fn counted(
        &self,
        marks: &[Mark],
        told: &[(On, Combination, Told)],
    ) -> Result<Vec<(Option<Combination>, String)>> {
        let mut found = Vec::new();
        for Mark { on, log, series: before } in marks {
            let now = eventually(TOLD_WITHIN, || {
                let now = self.settled_series(*on)?;
                let said = self.testbed.setting(*on).log().since(*log);
                for (direction, reporter) in [("outbound", "source"), ("inbound", "destination")] {
                    let lines = said
                        .lines()
                        .filter(|line| line.contains("connection complete"))
                        .filter(|line| field(line, "direction") == Some(direction))
                        .filter(|line| field(line, "src.workload") != Some(&self.testbed.other.name))
                        .count() as u64;
                    let of = |series: &Series| labels::count(series, "opened", reporter);
                    let counted = of(&now) - of(before);
                    ensure!(
                        counted == lines,
                        "counters differ: {reporter} on {on:?}: {counted} counted, {lines} lines"
                    );
                }
                Ok(now)
            })?;
            let here: Vec<(Combination, Told)> =
                told.iter().filter(|(at, _, _)| at == on).map(|(_, it, told)| (*it, told.clone())).collect();
            found.extend(labels::compare(before, &now, &here));
        }
        Ok(found)
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
        Path::Tunnel | Path::PlainIn | Path::PlainOut | Path::Waypoint | Path::Double => Place::TwoNodes,
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
    (client, tells): (SocketAddr, bool),
    server: &str,
) -> Result<String> {
    let of = |line: &str, key: &str| field(line, key).and_then(|value| value.parse::<SocketAddr>().ok());
    let what = format!("direction {direction}, {client} to {server}");
    log.wait_line(mark, told_by.saturating_duration_since(Instant::now()), &what, |line| {
        let from = of(line, "src.addr");
        let to = [field(line, "dst.hbone_addr"), field(line, "dst.addr")].contains(&Some(server));
        field(line, "direction") == Some(direction)
            && match direction {
                // Rules that redirect give a client another port where two of its connections would look the same.
                "outbound" => {
                    (tells && from == Some(client))
                        || (to && from.is_some_and(|from| from.ip() == client.ip()))
                }
                _ => to,
            }
    })
}

/// How often, and how far apart, it is looked whether a process's descriptors come and go.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// The lowest descriptor that a process does not use, once that stays the same: what it closes later would make room.
fn lowest_free_for_long(pid: u32) -> Result<u64> {
    let lowest = lowest_free(pid)?;
    for _ in 0..LOOKS {
        std::thread::sleep(BETWEEN_LOOKS);
        ensure!(lowest_free(pid)? == lowest, "descriptors of {pid} come and go");
    }
    Ok(lowest)
}

/// The lowest descriptor that a process does not use now.
fn lowest_free(pid: u32) -> Result<u64> {
    let mut used = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        used.extend(entry?.file_name().to_string_lossy().parse::<u64>().ok());
    }
    (0..).find(|number| !used.contains(number)).context("all are in use")
}
