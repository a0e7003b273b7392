//! The columns: what stands between client and server.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use xtask::arguments::Column;
use xtask::rows::Work;
use ztunnel_tests::daemon::{Daemon, Setting};
use ztunnel_tests::poll::eventually;
use ztunnel_tests::process::Process;
use ztunnel_tests::topology::{Node, Pod};

use super::envoy::{self, Mode};
use super::load;
use super::peer::{self, Agent};
use super::site::{HTTP, STREAM, Site};

const FIRST_LIMIT_S: u32 = 20;

/// The address of each kind of server, as the client has to dial it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    /// nginx
    pub(crate) http: SocketAddr,
    /// iperf3
    pub(crate) stream: SocketAddr,
}

/// A site with its proxies running. The proxies end before the site.
#[derive(Debug)]
pub(crate) struct Running {
    proxies: Proxies,
    /// The processes that are accounted: the proxies on the way to the server.
    pub(crate) pids: Vec<u32>,
    /// To the server on the other node.
    pub(crate) far: Way,
    /// To the server on the client's node.
    pub(crate) near: Way,
    /// From the start of the client's proxy to the first byte of an answer through it; none without a proxy.
    pub(crate) first_byte: Option<Duration>,
    /// Where it runs.
    pub(crate) site: Site,
}

#[derive(Debug)]
enum Proxies {
    None,
    Daemons([Daemon; 2]),
    Programs(Vec<Process>),
    Agents([Agent; 2]),
}

/// Whether a load goes through a column. Streams are not HTTP.
pub(crate) fn carries(column: Column, work: Work) -> bool {
    !(column == Column::EnvoyHttp && matches!(work, Work::Stream { .. }))
}

/// Builds a site and starts the proxies on it; an answer has come through them when this returns.
pub(crate) fn start(column: Column, peer_binary: Option<&Path>) -> Result<Running> {
    let site = Site::build().context("the site")?;
    match column {
        Column::Bare => {
            First::wait(&site, plain(&site.server).http)?.came()?;
            Ok(running(site, Proxies::None, Vec::new(), None))
        }
        Column::Ztunnel => start_daemons(site),
        Column::EnvoyTcp => start_envoys(site, Mode::Tcp),
        Column::EnvoyHttp => start_envoys(site, Mode::Http),
        Column::Peer => start_peers(site, peer_binary.context("say which program with --peer-binary")?),
    }
}

impl Running {
    /// Fails when a proxy or a server has ended.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        match &mut self.proxies {
            Proxies::None => {}
            Proxies::Daemons(daemons) => {
                for daemon in daemons {
                    daemon.process().must_run()?;
                }
            }
            Proxies::Programs(programs) => programs.iter_mut().try_for_each(Process::must_run)?,
            Proxies::Agents(agents) => agents.iter_mut().try_for_each(|agent| agent.proxy().must_run())?,
        }
        self.site.must_run()
    }

    /// Ends the proxies and removes the site.
    pub(crate) fn remove(self) -> Result<()> {
        drop(self.proxies);
        self.site.remove()
    }
}

fn running(site: Site, proxies: Proxies, pids: Vec<u32>, first_byte: Option<Duration>) -> Running {
    let (far, near) = (plain(&site.server), plain(&site.near));
    Running { proxies, pids, far, near, first_byte, site }
}

fn plain(pod: &Pod) -> Way {
    Way { http: (pod.v4, HTTP).into(), stream: (pod.v4, STREAM).into() }
}

/// A client that asks until it gets an answer.
struct First {
    process: Process,
    since: SystemTime,
}

impl First {
    fn wait(site: &Site, to: SocketAddr) -> Result<Self> {
        let process = load::start_peer(&site.client.place, "first", to, FIRST_LIMIT_S, "trying")?;
        Ok(Self { process, since: SystemTime::now() })
    }

    /// How long it took from [`First::wait`] to the first byte.
    fn came(mut self) -> Result<Duration> {
        let log = self.process.log().clone();
        let limit = Duration::from_secs(u64::from(FIRST_LIMIT_S) + 1);
        let line = match log.wait_line(0, limit, "an answer", |line| line.starts_with("first ")) {
            Ok(line) => line,
            Err(error) => {
                self.process.must_run()?;
                return Err(error);
            }
        };
        let nanoseconds: u64 = line["first ".len()..].parse().context("the time of the first byte")?;
        let at = UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        // With nothing to wait for, the answer is there before we look at the clock.
        Ok(at.duration_since(self.since).unwrap_or_default())
    }
}

fn start_daemons(site: Site) -> Result<Running> {
    std::fs::create_dir_all(site.run.path("pins"))?;
    let [client_setting, server_setting] = [&site.a, &site.b].map(|node| setting(&site, node));
    let server = server_setting.start_ready().context("the server's daemon")?;
    // The server's daemon takes nothing in the clear, so an answer has come through both.
    let first = First::wait(&site, plain(&site.server).http)?;
    let mut client = client_setting.start()?;
    client.wait_ready().context("the client's daemon")?;
    let last_words = || [&client_setting, &server_setting].map(|setting| setting.log().tail(2)).join(" | ");
    let first_byte = first.came().with_context(|| format!("the daemons said: {}", last_words()))?;
    let mut daemons = [client, server];
    let pids = daemons.iter_mut().map(|daemon| daemon.process().pid()).collect();
    Ok(running(site, Proxies::Daemons(daemons), pids, Some(first_byte)))
}

fn setting(site: &Site, node: &Node) -> Setting {
    Setting {
        node: node.name.clone(),
        place: node.place.clone(),
        mesh: site.mesh.path().to_owned(),
        // One authority for both nodes: they share its directory as a cluster shares its root.
        state: site.run.path("authority"),
        meeting: site.run.path("meeting").join(&node.name),
        pins: site.run.path("pins").join(&node.name),
        kubepods: node.kubepods.path().to_owned(),
        further: Vec::new(),
        agent: None,
        chart: None,
    }
}

fn start_envoys(site: Site, mode: Mode) -> Result<Running> {
    let server = envoy::start_server(&site, &site.server, mode)?;
    let near = envoy::start_server(&site, &site.near, mode)?;
    for (pod, envoy) in [(&site.server, &server), (&site.near, &near)] {
        let up = || envoy::is_up(pod).with_context(|| envoy.log().tail(5));
        eventually(Duration::from_secs(10), up)?;
    }
    let [far, near_way] = envoy::servers(&site).map(|(_, [http, stream])| Way { http, stream });
    let first = First::wait(&site, far.http)?;
    let client = envoy::start_client(&site, mode)?;
    let first_byte = first.came().with_context(|| format!("through Envoy: {}", client.log().tail(5)))?;
    let pids = vec![client.pid(), server.pid()];
    let proxies = Proxies::Programs(vec![client, server, near]);
    Ok(Running { far, near: near_way, ..running(site, proxies, pids, Some(first_byte)) })
}

fn start_peers(site: Site, program: &Path) -> Result<Running> {
    peer::redirect(&site)?;
    let mesh = peer::mesh_file(&site)?;
    let server = peer::start(&site, &site.b, &[&site.server], program, &mesh)?;
    let first = First::wait(&site, plain(&site.server).http)?;
    let client = peer::start(&site, &site.a, &[&site.client, &site.near], program, &mesh)?;
    let first_byte = first.came().context("through the peer's program")?;
    let mut agents = [client, server];
    let pids = agents.iter_mut().map(|agent| agent.proxy().pid()).collect();
    Ok(running(site, Proxies::Agents(agents), pids, Some(first_byte)))
}
