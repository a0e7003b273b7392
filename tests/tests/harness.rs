//! The harness itself: that it sees what it claims to see, and leaves nothing behind. Needs no daemon.

use anyhow::{Result, ensure};
use ztunnel_tests::leftovers::BpfMaps;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::peer::load::Load;
use ztunnel_tests::world::{HTTP, Options, World, http, lines_at};

#[test]
fn pods_talk_in_clear_without_a_daemon_and_the_capture_sees_it() -> Result<()> {
    let world = World::without_daemons(Options::default())?;
    let watch = world.watch_link("harness")?;
    for address in world.server.addresses() {
        let answer = http(&world.client.place, address, "?marker=in-clear")?;
        ensure!(answer.body.contains("marker=in-clear"), "{}", answer.body);
        ensure!(answer.body.contains(&answer.local), "{} is not in {}", answer.local, answer.body);
    }
    let packets = watch.finish()?;
    ensure!(packets.with_marker("in-clear") >= 4, "{}", packets.with_marker("in-clear"));
    ensure!(packets.attempts_by_port().get(&HTTP) == Some(&2), "{:?}", packets.attempts_by_port());
    ensure!(ztunnel_tests::wire::tunnels_only(&packets).is_err(), "plain HTTP passed for a tunnel");

    let mut held = Held::open(&world.client.place, lines_at(world.server.v6))?;
    ensure!(held.say()? == world.client.v6);
    let mut load = Load::start(
        &world.client.place,
        600,
        &[(world.server.v4, HTTP).into(), (world.server.v6, HTTP).into()],
    )?;
    load.goes_on(500)?;
    let outcome = load.finish()?;
    ensure!(outcome.failed.is_empty() && outcome.ok >= 500, "{}", outcome.evidence());
    let mut refused = Load::start(&world.client.place, 100, &[(world.server.v4, 1).into()])?;
    refused.goes_on(20)?;
    let outcome = refused.finish()?;
    ensure!(outcome.ok == 0 && outcome.failed.contains_key("refused"), "{}", outcome.evidence());

    drop(held);
    world.write_pods()?;
    let (before, prefix) = (world.machine_before().clone(), world.run.prefix().to_owned());
    ensure!(before.differs(&prefix, &BpfMaps::default()).is_err(), "the standing world was not seen");
    drop(world);
    before.nothing_left(&prefix, &BpfMaps::default())?;
    Ok(())
}
