//! What the scenario tests share.
#![expect(clippy::print_stdout, reason = "what a story has seen is shown with the test")]

use ztunnel_tests::stories::Story;
use ztunnel_tests::world::{Options, World};

/// Tells one story in a new world, and checks that nothing is left after it.
pub(crate) fn tell(story: Story) {
    let mut world = World::start(Options::default()).unwrap_or_else(|error| panic!("no world: {error:#}"));
    let row = story.row(&mut world);
    let ended = world.end();
    println!("{}: {}", row.name, row.evidence);
    assert!(row.ok, "{}: {}", row.name, row.evidence);
    match ended {
        Ok(compared) => println!("{compared}"),
        Err(error) => panic!("something is left: {error:#}"),
    }
}
