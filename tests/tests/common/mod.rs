//! What the scenario tests share. Each test binary is in an enclosure of its own.
#![expect(clippy::print_stdout, reason = "what a scenario has seen is shown with the test")]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod envoy;
pub(crate) mod hbone;
pub(crate) mod sidecar;

use anyhow::Result;
use ztunnel_tests::scenarios::Scenario;
use ztunnel_tests::testbed::{Options, Testbed};

ztunnel_tests::enclosed!();

/// Runs one scenario in a new testbed, and checks that nothing is left after it.
pub(crate) fn run(scenario: Scenario) {
    in_testbed(scenario.name, scenario.run);
}

/// Does something in a new testbed, and checks that nothing is left after it.
pub(crate) fn in_testbed(name: &str, act: impl FnOnce(&mut Testbed) -> Result<String>) {
    act_in(Testbed::start(Options::default()), name, act);
}

/// Does something in a testbed that was just made, and checks that nothing is left after it.
pub(crate) fn act_in(testbed: Result<Testbed>, name: &str, act: impl FnOnce(&mut Testbed) -> Result<String>) {
    let mut testbed = testbed.unwrap_or_else(|error| panic!("no testbed: {error:#}"));
    let outcome = act(&mut testbed);
    end(testbed, name, outcome);
}

/// [`in_testbed`], in a testbed that is prepared before its daemons start; what that makes lives as long as the testbed.
pub(crate) fn in_testbed_that<T>(
    name: &str,
    prepare: impl FnOnce(&mut Testbed) -> Result<T>,
    act: impl FnOnce(&mut Testbed, &mut T) -> Result<String>,
) {
    let mut testbed =
        Testbed::without_daemons(Options::default()).unwrap_or_else(|error| panic!("no testbed: {error:#}"));
    let outcome = prepare(&mut testbed).and_then(|mut prepared| {
        testbed.start_daemons()?;
        act(&mut testbed, &mut prepared)
    });
    end(testbed, name, outcome);
}

fn end(testbed: Testbed, name: &str, outcome: Result<String>) {
    if outcome.is_err() {
        // The logs are in the testbed's directory, which is about to be removed.
        match testbed.save_logs() {
            Ok(path) => println!("logs are in {}", path.display()),
            Err(error) => println!("the logs are lost: {error:#}"),
        }
    }
    let ended = testbed.end();
    match outcome {
        Ok(evidence) => println!("{name}: {evidence}"),
        Err(error) => panic!("{name}: {error:#}"),
    }
    match ended {
        Ok(compared) => println!("{compared}"),
        Err(error) => panic!("something is left: {error:#}"),
    }
}
