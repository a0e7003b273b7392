//! The harness itself: that it sees what it claims to see, and leaves nothing behind. Needs no daemon.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use ztunnel_tests::binaries::peer;
use ztunnel_tests::cgroup;
use ztunnel_tests::leftovers::BpfMaps;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::peer::load::Load;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::process::{Log, Process, spawn};
use ztunnel_tests::testbed::{HTTP, Options, Testbed, http, lines_at};

ztunnel_tests::enclosed!();

#[test]
fn pods_talk_in_clear_without_a_daemon_and_the_capture_sees_it() -> Result<()> {
    let testbed = Testbed::without_daemons(Options::default())?;
    let watch = testbed.watch_link("harness")?;
    for address in testbed.server.addresses() {
        let answer = http(&testbed.client.place, address, "?marker=in-clear")?;
        ensure!(answer.body.contains("marker=in-clear"), "{}", answer.body);
        ensure!(answer.body.contains(&answer.local), "{} is not in {}", answer.local, answer.body);
    }
    let packets = watch.finish()?;
    ensure!(packets.with_marker("in-clear") >= 4, "{}", packets.with_marker("in-clear"));
    ensure!(packets.attempts_by_port().get(&HTTP) == Some(&2), "{:?}", packets.attempts_by_port());
    ensure!(ztunnel_tests::wire::tunnels_only(&packets).is_err(), "plain HTTP passed for a tunnel");

    let mut held = Held::open(&testbed.client.place, lines_at(testbed.server.v6))?;
    ensure!(held.say()? == testbed.client.v6);
    let mut load = Load::start(
        &testbed.client.place,
        600,
        &[(testbed.server.v4, HTTP).into(), (testbed.server.v6, HTTP).into()],
    )?;
    load.goes_on(500)?;
    let outcome = load.finish()?;
    ensure!(outcome.failed.is_empty() && outcome.ok >= 500, "{}", outcome.evidence());
    let mut refused = Load::start(&testbed.client.place, 100, &[(testbed.server.v4, 1).into()])?;
    refused.goes_on(20)?;
    let outcome = refused.finish()?;
    ensure!(outcome.ok == 0 && outcome.failed.contains_key("refused"), "{}", outcome.evidence());

    drop(held);
    testbed.write_pods()?;
    let (before, prefix) = (testbed.machine_before().clone(), testbed.run.prefix().to_owned());
    ensure!(before.differs(&prefix, &BpfMaps::default()).is_err(), "the standing testbed was not seen");
    drop(testbed);
    before.nothing_left(&prefix, &BpfMaps::default())?;
    Ok(())
}

/// A program in an enclosure, with a namespace, a device, a group and a process in it.
struct Enclosed {
    /// Outside: the parent.
    parent: Process,
    /// What is inside says of itself.
    said: String,
    inside: u32,
    beside: u32,
    log: PathBuf,
}

impl Enclosed {
    fn start(number: u32) -> Result<Self> {
        let log = std::env::temp_dir().join(format!("enclosed-{}-{number}.log", std::process::id()));
        let mut command = Command::new(peer()?);
        // The same name for all: none may see another's.
        command.args(["enclosed", "same"]).stdin(Stdio::piped());
        command.stdout(std::fs::File::create(&log)?);
        let parent = Process::new(spawn(command)?, Log::at(&log));
        let line = parent.log().wait_line(0, PATIENCE, "inside", |line| line.starts_with("inside "))?;
        let words: Vec<&str> = line.split([' ', ',']).collect();
        let [inside, beside] = [words[1].parse()?, words[2].parse()?];
        Ok(Self { parent, said: line, inside, beside, log })
    }

    /// Its group, seen from outside.
    fn group(&self) -> Result<PathBuf> {
        let start = format!("ztunnel-tests-{}-", self.parent.pid());
        let entries = std::fs::read_dir(cgroup::root()?)?.flatten();
        let mut found = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&start));
        Ok(found.next().context("no group of its own")?.path())
    }
}

impl Drop for Enclosed {
    fn drop(&mut self) {
        let _removed = std::fs::remove_file(&self.log);
    }
}

/// Whether there is such a process, and it has not ended.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[test]
fn enclosures_see_nothing_of_each_other_and_leave_nothing_behind() -> Result<()> {
    let (mut first, second) = (Enclosed::start(1)?, Enclosed::start(2)?);
    for each in [&first, &second] {
        ensure!(each.said.ends_with("namespaces: same, groups: same"), "{}", each.said);
    }
    let (own, others) = (first.group()?, second.group()?);
    first.parent.close_stdin();
    ensure!(first.parent.wait(PATIENCE)?.success());
    ensure!(!own.exists() && !runs(first.beside), "something is left of {}", first.said);
    ensure!(others.exists() && runs(second.inside) && runs(second.beside), "the other was disturbed");
    // By a signal to the parent alone, as a service manager sends it.
    second.parent.signal(Signal::SIGTERM);
    eventually(PATIENCE, || {
        ensure!(!others.exists() && !runs(second.inside) && !runs(second.beside), "{} is left", second.said);
        Ok(())
    })
}

#[test]
fn what_a_killed_enclosure_leaves_the_next_one_sweeps() -> Result<()> {
    let mut killed = Enclosed::start(3)?;
    let group = killed.group()?;
    killed.parent.kill_9()?;
    eventually(PATIENCE, || {
        ensure!(!runs(killed.inside), "it outlives its parent");
        Ok(())
    })?;
    ensure!(group.exists() && runs(killed.beside), "there is nothing to sweep");
    let mut next = Enclosed::start(4)?;
    ensure!(!group.exists() && !runs(killed.beside), "{} was not swept", group.display());
    next.parent.close_stdin();
    ensure!(next.parent.wait(PATIENCE)?.success());
    Ok(())
}
