//! What the scenario tests share. Each test binary is in an enclosure of its own.
#![expect(clippy::print_stdout, reason = "what a story has seen is shown with the test")]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod envoy;
pub(crate) mod hbone;
pub(crate) mod sidecar;

use anyhow::Result;
use ztunnel_tests::stories::Story;
use ztunnel_tests::world::{Options, World};

ztunnel_tests::enclosed!();

/// Tells one story in a new world, and checks that nothing is left after it.
pub(crate) fn tell(story: Story) {
    in_world(story.name, story.tell);
}

/// Does something in a new world, and checks that nothing is left after it.
pub(crate) fn in_world(name: &str, act: impl FnOnce(&mut World) -> Result<String>) {
    act_in(World::start(Options::default()), name, act);
}

/// Does something in a world that was just made, and checks that nothing is left after it.
pub(crate) fn act_in(world: Result<World>, name: &str, act: impl FnOnce(&mut World) -> Result<String>) {
    let mut world = world.unwrap_or_else(|error| panic!("no world: {error:#}"));
    let told = act(&mut world);
    end(world, name, told);
}

/// [`in_world`], in a world that is prepared before its daemons start; what that makes lives as long as the world.
pub(crate) fn in_world_that<T>(
    name: &str,
    prepare: impl FnOnce(&mut World) -> Result<T>,
    act: impl FnOnce(&mut World, &mut T) -> Result<String>,
) {
    let mut world =
        World::without_daemons(Options::default()).unwrap_or_else(|error| panic!("no world: {error:#}"));
    let told = prepare(&mut world).and_then(|mut prepared| {
        world.start_daemons()?;
        act(&mut world, &mut prepared)
    });
    end(world, name, told);
}

fn end(world: World, name: &str, told: Result<String>) {
    if told.is_err() {
        // The logs are in the world's directory, which is about to be removed.
        match world.save_logs() {
            Ok(path) => println!("logs are in {}", path.display()),
            Err(error) => println!("the logs are lost: {error:#}"),
        }
    }
    let ended = world.end();
    match told {
        Ok(evidence) => println!("{name}: {evidence}"),
        Err(error) => panic!("{name}: {error:#}"),
    }
    match ended {
        Ok(compared) => println!("{compared}"),
        Err(error) => panic!("something is left: {error:#}"),
    }
}
