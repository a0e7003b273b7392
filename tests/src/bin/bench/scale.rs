//! What one node can hold: pods, connections that only are there, and what they cost.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::arguments::Column;
use ztunnel_tests::mesh::{Enrolment, MESHED};
use ztunnel_tests::poll::eventually;
use ztunnel_tests::process::{Process, cpu_time};
use ztunnel_tests::topology::Pod;

use super::column::{Running, start};
use super::load;
use super::usage::Usage;

/// How many pods the client's node has, step by step, beside the two of the site.
const PODS: [usize; 3] = [10, 100, 250];
/// How long a step's pods may take until they are captured.
const CAPTURED_WITHIN: Duration = Duration::from_secs(60);
/// Until what a step has stirred up is done and given back.
const SETTLE: Duration = Duration::from_secs(9);
/// How long the idle daemon is watched.
const IDLE: Duration = Duration::from_secs(10);
/// Connections that are open and idle beside a load.
const CROWDS: [u32; 3] = [0, 5000, 10_000];

/// Measures and returns the report.
pub(super) fn measure(seconds: u64) -> Result<String> {
    let mut running = start(Column::Ztunnel, None).context("cannot start")?;
    let mut report = pods(&running)?;
    running.must_run()?;
    report.push('\n');
    report += &crowds(&running, seconds)?;
    running.must_run()?;
    running.remove().context("cannot remove everything")?;
    Ok(report)
}

/// The daemon of the client's node.
fn daemon(running: &Running) -> Result<u32> {
    running.pids.first().copied().context("there is no daemon")
}

fn pods(running: &Running) -> Result<String> {
    let (site, pid) = (&running.site, daemon(running)?);
    let mut report = String::from(
        "Pods of one node; times are of the whole machine, memory and CPU of the node's daemon.\n\
         pods  captured, ms each  RSS, MiB  of it own, MiB  own, kB per pod  descriptors per pod  idle CPU, ms per s  wake-ups per s\n",
    );
    thread::sleep(SETTLE);
    let none = Usage::of(pid)?;
    let mut there = 0;
    for wanted in PODS {
        eprintln!("  {wanted} pods");
        let pods = (there..wanted)
            .map(|number| site.a.add_pod(&site.run, &format!("many-{number}")))
            .collect::<Result<Vec<_>>>()?;
        let begun = Instant::now();
        for pod in &pods {
            site.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
        }
        for pod in &pods {
            eventually(CAPTURED_WITHIN.saturating_sub(begun.elapsed()), || captured(pod))?;
        }
        let each = begun.elapsed().as_secs_f64() * 1e3 / pods.len() as f64;
        there = wanted;
        thread::sleep(SETTLE);
        let before = Usage::of(pid)?;
        let cpu = cpu_time(pid)?;
        thread::sleep(IDLE);
        let (now, idle) = (Usage::of(pid)?, cpu_time(pid)?.saturating_sub(cpu));
        let per_pod = |value: u64, none: u64| value.saturating_sub(none) as f64 / wanted as f64;
        writeln!(
            report,
            "{wanted:>4}  {each:>17.1}  {:>8.1}  {:>14.1}  {:>15.1}  {:>19.1}  {:>18.2}  {:>14.1}",
            now.resident as f64 / MIB,
            now.own as f64 / MIB,
            per_pod(now.own, none.own) / 1e3,
            per_pod(now.descriptors, none.descriptors),
            idle.as_secs_f64() * 1e3 / IDLE.as_secs_f64(),
            now.switches.saturating_sub(before.switches) as f64 / IDLE.as_secs_f64(),
        )?;
        // Whoever interrupts it has that much.
        eprintln!("{}", report.lines().next_back().unwrap_or_default());
    }
    Ok(report)
}

const MIB: f64 = (1 << 20) as f64;

fn captured(pod: &Pod) -> Result<()> {
    ensure!(pod.place.netns.ip(&["rule"])?.contains("lookup 100"), "{} is not captured", pod.name);
    Ok(())
}

fn crowds(running: &Running, seconds: u64) -> Result<String> {
    let (site, far) = (&running.site, running.far.http);
    let mut report = String::from(
        "Loads beside connections that are open and idle; memory of the client's daemon.\n\
         idle connections  requests/s, 64 conns  new conns/s, 16 clients  RSS, MiB  kB each  after, MiB\n",
    );
    let pid = daemon(running)?;
    let none = Usage::of(pid)?.resident;
    for connections in CROWDS {
        eprintln!("  {connections} idle connections");
        let mut crowd = Crowd::open(running, connections)?;
        thread::sleep(Duration::from_secs(2));
        let held = Usage::of(pid)?.resident;
        let http = load::http(&site.client.place, far, 64, false, seconds)?;
        let connect = load::http(&site.client.place, far, 16, true, seconds)?;
        crowd.close()?;
        thread::sleep(Duration::from_secs(10));
        let each = match connections {
            0 => String::from("-"),
            _ => format!("{:.2}", held.saturating_sub(none) as f64 / 1e3 / f64::from(connections)),
        };
        writeln!(
            report,
            "{connections:>16}  {:>20.0}  {:>23.0}  {:>8.1}  {each:>7}  {:>10.1}",
            http.rate,
            connect.rate,
            held as f64 / MIB,
            Usage::of(pid)?.resident as f64 / MIB,
        )?;
        // Whoever interrupts it has that much.
        eprintln!("{}", report.lines().next_back().unwrap_or_default());
    }
    Ok(report)
}

/// Connections of one program, or of two: each program has a limit of files of its own.
struct Crowd(Vec<Process>);

impl Crowd {
    const EACH_MAX: u32 = 5000;

    fn open(running: &Running, connections: u32) -> Result<Self> {
        let place = &running.site.client.place;
        let mut programs = Vec::new();
        let mut left = connections;
        while left > 0 {
            let part = left.min(Self::EACH_MAX);
            programs.push(load::start_peer(place, "crowd", running.far.http, part, "open")?);
            left -= part;
        }
        Ok(Self(programs))
    }

    fn close(&mut self) -> Result<()> {
        for mut program in self.0.drain(..) {
            program.must_run()?;
            program.close_stdin();
            let ended = program.wait(Duration::from_secs(10))?;
            ensure!(ended.success(), "the idle connections: {ended}");
        }
        Ok(())
    }
}
