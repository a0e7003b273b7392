//! What a node's daemon may be made to hold, and that it holds no more.

mod common;

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use common::hbone::{inside, tls};
use common::{in_testbed, in_testbed_that};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ztunnel_tests::binaries;
use ztunnel_tests::certificates::Signer;
use ztunnel_tests::memory::MemoryLimit;
use ztunnel_tests::peer::open::Outcome;
use ztunnel_tests::place::Place;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::testbed::{BOTH, HTTP, On, Testbed, http};
use ztunnel_tests::topology::Pod;

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";

/// The memory a daemon has, and what of it connections and tunnels may hold: half, as it is by default.
const MEMORY: u64 = 256 << 20;
const BUFFERS: &str = "128Mi";

/// Clients that read nothing, of the attacks that are not by tunnel.
const STALLED: usize = 1000;

/// The same by tunnel, and tunnels without streams; by hand more of both (`tests/README.md`).
const STALLED_BY_TUNNEL: (&str, usize) = ("ZTUNNEL_TEST_STALLED", 4000);
const IDLE_TUNNELS: (&str, usize) = ("ZTUNNEL_TEST_IDLE_TUNNELS", 2500);

fn count((name, usual): (&str, usize)) -> Result<usize> {
    let told = std::env::var(name).ok();
    told.map_or(Ok(usual), |told| told.parse().with_context(|| format!("{name} is not a number")))
}

/// Requests of a neighbour, which go on meanwhile.
fn requests(from: &Place, to: &Pod, seconds: u32) -> Result<Outcome> {
    let program = binaries::peer()?.display().to_string();
    let target = format!("{}:{HTTP}", to.v4);
    let output = from.run(&program, &["open", &target, "/", "50", "4", &seconds.to_string()])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let outcome: Outcome = serde_json::from_str(&text)
        .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
    // How long each took depends on what else the machine does; that each is answered does not.
    ensure!(outcome.answered == outcome.due, "{outcome:?}");
    Ok(outcome)
}

fn p99(outcome: &Outcome) -> f64 {
    outcome.p99 / 1000.0
}

/// What a neighbour sees of a crowd.
struct Seen {
    /// How many there were.
    opened: String,
    /// While they come.
    coming: Outcome,
    /// Once they are there.
    there: Outcome,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { opened, coming, there } = self;
        write!(f, "{opened}, the neighbour's p99 {:.1} ms meanwhile, {:.1} ms then", p99(coming), p99(there))
    }
}

/// So many clients of a pod that ask for much and read nothing, and what the neighbour's requests are like.
fn stalled((from, to): (&Pod, &Pod), count: usize, (neighbour, server): (&Pod, &Pod)) -> Result<Seen> {
    let mut command = from.place.command(binaries::peer()?)?;
    command.args(["stall", &format!("{}:{HTTP}", to.v4), "/large", &count.to_string()]);
    let process = from.place.start_with(&format!("stall-{}-{count}", from.name), command, Stdio::piped())?;
    let said = || process.log().since(0).lines().find(|line| line.starts_with("stalled")).map(str::to_owned);
    let mut coming: Option<Outcome> = None;
    while said().is_none() || coming.is_none() {
        let now = requests(&neighbour.place, server, 2)?;
        coming = Some(coming.filter(|worst| worst.p99 > now.p99).unwrap_or(now));
    }
    let (Some(opened), Some(coming)) = (said(), coming) else { bail!("it has just been said") };
    let there = requests(&neighbour.place, server, 3)?;
    Ok(Seen { opened, coming, there })
}

fn metric(testbed: &Testbed, on: On, name: &str) -> Result<f64> {
    let text = testbed.setting(on).metrics()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.with_context(|| format!("no {name}"))?.parse().context("not a number")
}

/// Both daemons live, hold no more than they may, and this is told of them.
fn bounded(testbed: &mut Testbed, what: &str) -> Result<String> {
    for on in BOTH {
        testbed.daemon(on)?.process().must_run()?;
        let held = metric(testbed, on, "ztunnel_buffer_bytes")?;
        ensure!(held <= 128e6 * 1.1, "{what}: {on:?} holds {held} bytes");
    }
    let shed = BOTH.map(|on| metric(testbed, on, "ztunnel_connections_shed_total"));
    let [a, b] = shed;
    Ok(format!("{} and {} shed", a?, b?))
}

/// In a testbed whose daemons have [`MEMORY`].
fn in_little_memory(name: &str, act: impl FnOnce(&mut Testbed, &mut Vec<String>) -> Result<()>) {
    in_testbed_that(
        name,
        |testbed| {
            testbed.start_with(&["--buffer-memory".to_owned(), BUFFERS.to_owned()]);
            Ok(Vec::new())
        },
        |testbed, limits| {
            for on in BOTH {
                let daemon = testbed.daemon(on)?;
                // What it uses already counts elsewhere.
                let (pid, used) = (daemon.process().pid(), daemon.memory()?);
                let own = &testbed.setting(on).place.cgroup;
                let name = format!("{}-memory-{on:?}", testbed.run.prefix());
                let limit = MemoryLimit::new(&name, own, MEMORY - used)?;
                limit.hold(pid)?;
                limits.push(limit);
            }
            let mut said = Vec::new();
            act(testbed, &mut said)?;
            for limit in limits.iter() {
                limit.must_not_have_killed()?;
                said.push(format!("at most {} MiB", limit.peak()? >> 20));
            }
            limits.clear();
            http(&testbed.client.place, testbed.server.v4.into(), "").context("afterwards")?;
            Ok(said.join("; "))
        },
    );
}

#[test]
fn what_nobody_reads_does_not_use_up_the_memory_of_a_daemon() {
    in_little_memory("stalled", |testbed, said| {
        let [client, other] = [testbed.client.clone(), testbed.other.clone()];
        let [near, server] = [testbed.near.clone(), testbed.server.clone()];
        let [outsider, outside] = [testbed.outsider.clone(), testbed.outside.clone()];
        let many = count(STALLED_BY_TUNNEL)?;
        let plain = (&outsider, &outside);
        // What the machine makes of it without a mesh.
        said.push(format!("no mesh, idle: p99 {:.1} ms", p99(&requests(&outsider.place, &outside, 3)?)));
        said.push(format!("no mesh: {}", stalled(plain, many, plain)?));
        let meshed = (&other, &server);
        said.push(format!("idle: p99 {:.1} ms", p99(&requests(&other.place, &server, 3)?)));
        for (what, whom, count) in [
            ("by tunnel", (&client, &server), many),
            ("on the same node", (&client, &near), STALLED),
            ("to a pod outside the mesh", (&client, &outside), STALLED),
        ] {
            let seen = stalled(whom, count, meshed)?;
            said.push(format!("{what}: {seen}, {}", bounded(testbed, what)?));
        }
        Ok(())
    });
}

#[test]
fn tunnels_that_nobody_uses_cost_no_other_its_own() {
    in_little_memory("idle tunnels", |testbed, said| {
        let mesh = Signer::of_mesh(&testbed.setting(On::B).state)?;
        let to = (testbed.server.v4, 15008).into();
        let many = count(IDLE_TUNNELS)?;
        let [other, server, outsider] =
            [testbed.other.clone(), testbed.server.clone(), testbed.outsider.clone()];
        said.push(format!("idle: p99 {:.1} ms", p99(&requests(&other.place, &server, 3)?)));
        // Of several identities, as one may have a part of a pod's tunnels only.
        let own = |account| mesh.sign(&[&format!("spiffe://cluster.local/ns/demo/sa/{account}")]);
        let accounts = ["client", "other", "near", "server"];
        let done = AtomicBool::new(false);
        let busy = std::thread::scope(|scope| {
            let crowd = scope.spawn(|| {
                let opened = inside(&outsider.place.netns, async {
                    let mut opened = Vec::with_capacity(many);
                    for account in accounts.into_iter().cycle().take(many) {
                        let mut stream = tls(to, Some(own(account)?), &["h2"]).await?;
                        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
                        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
                        opened.push(stream);
                    }
                    Ok(opened)
                });
                done.store(true, Ordering::Relaxed);
                opened
            });
            let mut coming: Option<Outcome> = None;
            while !done.load(Ordering::Relaxed) || coming.is_none() {
                let now = requests(&other.place, &server, 3)?;
                coming = Some(coming.filter(|worst| worst.p99 > now.p99).unwrap_or(now));
            }
            let opened = crowd.join().map_err(|_panic| anyhow!("the crowd failed"))??;
            let there = requests(&other.place, &server, 3)?;
            drop(opened);
            let (opened, coming) = (format!("{many} tunnels"), coming.context("it was asked")?);
            anyhow::Ok(Seen { opened, coming, there })
        })?;
        said.push(format!("{busy}, {}", bounded(testbed, "idle tunnels")?));
        Ok(())
    });
}

#[test]
fn a_flood_of_frames_is_cut_and_a_neighbour_served() {
    in_testbed("floods", |testbed| {
        let mesh = Signer::of_mesh(&testbed.setting(On::B).state)?;
        let to = (testbed.server.v4, 15008).into();
        let netns = testbed.outsider.place.netns.clone();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"12345678"].concat();
        let update = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1].to_vec();
        let priority = [&[0, 0, 5, 2, 0, 0, 0, 0, 1][..], &[0, 0, 0, 0, 9]].concat();
        let idle = requests(&testbed.other.place, &testbed.server, 3)?;
        let mut said = vec![format!("idle: p99 {:.1} ms", idle.p99 / 1000.0)];
        for (what, frame) in [
            ("SETTINGS", settings.to_vec()),
            ("PING", ping),
            ("WINDOW_UPDATE", update),
            ("PRIORITY", priority),
        ] {
            let certificate = mesh.sign(&[CLIENT])?;
            let cut = inside(&netns, async {
                let mut stream = tls(to, Some(certificate), &["h2"]).await?;
                stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
                stream.write_all(&settings).await?;
                let (mut read, mut write) = tokio::io::split(stream);
                let many = frame.repeat(500);
                let flood = async { while write.write_all(&many).await.is_ok() {} };
                let mut heard = Vec::new();
                let (ended, ()) = tokio::join!(read.read_to_end(&mut heard), flood);
                // GOAWAY with ENHANCE_YOUR_CALM; a reset may come before it was read.
                let calm = |said: &[u8]| said[..4] == [0, 0, 8, 7] && said[16] == 11;
                Ok(ended.is_err() || heard.windows(17).any(calm))
            })?;
            ensure!(cut, "a flood of {what} was not told to be calm");
            let busy = requests(&testbed.other.place, &testbed.server, 3)?;
            said.push(format!("after {what}: p99 {:.1} ms", busy.p99 / 1000.0));
        }
        Ok(said.join("; "))
    });
}

#[test]
fn half_open_handshakes_keep_no_peer_out() {
    in_testbed("half open", |testbed| {
        let to = std::net::SocketAddr::from((testbed.server.v4, 15008));
        let outsider = testbed.outsider.place.netns.clone();
        let opened = outsider.enter(|| {
            let open = || std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5));
            Ok((0..1500).filter_map(|_| open().ok()).collect::<Vec<_>>())
        })?;
        // Each from a tunnel of its own: the pod that asks has none yet to that port of the address.
        let mesh = Signer::of_mesh(&testbed.setting(On::B).state)?;
        for _ in 0..10 {
            let certificate = mesh.sign(&[CLIENT])?;
            inside(&testbed.outside.place.netns, async {
                tls(to, Some(certificate), &["h2"]).await.map(drop)
            })
            .context("an honest handshake")?;
        }
        drop(opened);
        eventually(PATIENCE, || http(&testbed.client.place, testbed.server.v4.into(), "").map(drop))?;
        Ok("1,500 begun and not finished, 10 of 10 others done".to_owned())
    });
}
