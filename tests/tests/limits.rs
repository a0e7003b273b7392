//! What a node's daemon may be made to hold, and that it holds no more.

mod common;

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::hbone::{inside, tls};
use common::{in_world, in_world_that};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ztunnel_tests::binaries;
use ztunnel_tests::certificates::Signer;
use ztunnel_tests::memory::MemoryLimit;
use ztunnel_tests::peer::open::Outcome;
use ztunnel_tests::place::Place;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::process::Process;
use ztunnel_tests::topology::Pod;
use ztunnel_tests::world::{BOTH, HTTP, On, World, http};

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";

/// The memory a daemon has, and what of it connections and tunnels may hold: half, as it is by default.
const MEMORY: u64 = 256 << 20;
const BUFFERS: &str = "128Mi";

/// Clients that read nothing, and how many the first attack has.
const STALLED: usize = 1000;
const STALLED_MORE: usize = 4000;

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

/// So many clients of a pod that ask for much and read nothing, once they have asked.
fn stalled(from: &Pod, to: &Pod, count: usize) -> Result<(Process, String)> {
    let mut command = from.place.command(binaries::peer()?)?;
    command.args(["stall", &format!("{}:{HTTP}", to.v4), "/large", &count.to_string()]);
    let process = from.place.start_with(&format!("stall-{}-{count}", from.name), command, Stdio::piped())?;
    let log = process.log().clone();
    let said = log.wait_line(0, 4 * PATIENCE, "stalled", |line| line.starts_with("stalled"))?;
    Ok((process, said))
}

fn metric(world: &World, on: On, name: &str) -> Result<f64> {
    let text = world.setting(on).metrics()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.with_context(|| format!("no {name}"))?.parse().context("not a number")
}

#[test]
fn what_nobody_reads_does_not_use_up_the_memory_of_a_daemon() {
    in_world_that(
        "stalled",
        |world| {
            world.start_with(&["--buffer-memory".to_owned(), BUFFERS.to_owned()]);
            Ok(Vec::new())
        },
        |world, limits| {
            for on in BOTH {
                let daemon = world.daemon(on)?;
                // What it uses already counts elsewhere.
                let (pid, used) = (daemon.process().pid(), daemon.memory()?);
                let own = &world.setting(on).place.cgroup;
                let name = format!("{}-memory-{on:?}", world.run.prefix());
                let limit = MemoryLimit::new(&name, own, MEMORY - used)?;
                limit.hold(pid)?;
                limits.push(limit);
            }
            let idle = requests(&world.other.place, &world.server, 5)?;
            let mut said = vec![format!("idle: p99 {:.1} ms", idle.p99 / 1000.0)];
            let mut attack = |world: &mut World, from: &Pod, to: &Pod, count, what: &str| -> Result<()> {
                let (_clients, opened) = stalled(from, to, count)?;
                let busy = requests(&world.other.place, &world.server, 5)?;
                for on in BOTH {
                    world.daemon(on)?.process().must_run()?;
                    let held = metric(world, on, "ztunnel_buffer_bytes")?;
                    ensure!(held <= 128e6 * 1.1, "{what}: {on:?} holds {held} bytes");
                }
                let shed = metric(world, On::A, "ztunnel_connections_shed_total")?;
                let p99 = busy.p99 / 1000.0;
                said.push(format!("{what}: {opened}, {shed} shed, the neighbour's p99 {p99:.1} ms"));
                Ok(())
            };
            let [client, server] = [world.client.clone(), world.server.clone()];
            let [near, outside] = [world.near.clone(), world.outside.clone()];
            attack(world, &client, &server, STALLED, "by tunnel")?;
            attack(world, &client, &server, STALLED_MORE, "by tunnel, more of them")?;
            attack(world, &client, &near, STALLED, "on the same node")?;
            attack(world, &client, &outside, STALLED, "to a pod outside the mesh")?;
            for limit in limits.iter() {
                limit.must_not_have_killed()?;
                said.push(format!("at most {} MiB", limit.peak()? >> 20));
            }
            limits.clear();
            http(&world.client.place, world.server.v4.into(), "").context("afterwards")?;
            Ok(said.join("; "))
        },
    );
}

#[test]
fn a_flood_of_frames_is_cut_and_a_neighbour_served() {
    in_world("floods", |world| {
        let mesh = Signer::of_mesh(&world.setting(On::B).state)?;
        let to = (world.server.v4, 15008).into();
        let netns = world.outsider.place.netns.clone();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"12345678"].concat();
        let update = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1].to_vec();
        let priority = [&[0, 0, 5, 2, 0, 0, 0, 0, 1][..], &[0, 0, 0, 0, 9]].concat();
        let idle = requests(&world.other.place, &world.server, 3)?;
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
            let busy = requests(&world.other.place, &world.server, 3)?;
            said.push(format!("after {what}: p99 {:.1} ms", busy.p99 / 1000.0));
        }
        Ok(said.join("; "))
    });
}

#[test]
fn half_open_handshakes_keep_no_peer_out() {
    in_world("half open", |world| {
        let to = std::net::SocketAddr::from((world.server.v4, 15008));
        let outsider = world.outsider.place.netns.clone();
        let opened = outsider.enter(|| {
            let open = || std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5));
            Ok((0..1500).filter_map(|_| open().ok()).collect::<Vec<_>>())
        })?;
        // Each from a tunnel of its own: the pod that asks has none yet to that port of the address.
        let mesh = Signer::of_mesh(&world.setting(On::B).state)?;
        for _ in 0..10 {
            let certificate = mesh.sign(&[CLIENT])?;
            inside(&world.outside.place.netns, async { tls(to, Some(certificate), &["h2"]).await.map(drop) })
                .context("an honest handshake")?;
        }
        drop(opened);
        eventually(PATIENCE, || http(&world.client.place, world.server.v4.into(), "").map(drop))?;
        Ok("1,500 begun and not finished, 10 of 10 others done".to_owned())
    });
}
