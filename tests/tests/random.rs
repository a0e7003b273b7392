//! Random sequences of enrolment, policy, restarts and kills, against a model of who may talk to whom.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::in_testbed;
use proptest::prelude::{Just, Strategy, prop_oneof};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use ztunnel_tests::mesh::{Enrolment, MESHED};
use ztunnel_tests::poll::throughout;
use ztunnel_tests::testbed::{On, Testbed, http, http_refused};
use ztunnel_tests::topology::Pod;

const SEQUENCES: usize = 3;
const STEPS: usize = 10;
/// For how long what the model says must hold then.
const STAYS: Duration = Duration::from_millis(400);

/// What somebody does to the mesh.
#[derive(Debug, Clone, Copy)]
enum Step {
    ClientEnrolled(bool),
    ServerEnrolled(bool),
    Mode(Option<&'static str>),
    ClientDenied(bool),
    Restart(On),
    Kill(On),
}

/// What should hold.
#[derive(Debug, Clone, Copy)]
struct Model {
    client_enrolled: bool,
    server_enrolled: bool,
    strict: bool,
    client_denied: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Client,
    Other,
    Outsider,
}

impl Model {
    const START: Self =
        Self { client_enrolled: true, server_enrolled: true, strict: false, client_denied: false };

    fn apply(&mut self, step: Step) {
        match step {
            Step::ClientEnrolled(enrolled) => self.client_enrolled = enrolled,
            Step::ServerEnrolled(enrolled) => self.server_enrolled = enrolled,
            Step::Mode(mode) => self.strict = mode == Some("STRICT"),
            Step::ClientDenied(denied) => self.client_denied = denied,
            Step::Restart(_) | Step::Kill(_) => {}
        }
    }

    /// Whether this client gets an answer from the server.
    fn reaches(&self, who: Who) -> bool {
        let proves_who_it_is = match who {
            Who::Client => self.client_enrolled,
            Who::Other => true,
            Who::Outsider => false,
        };
        // Policies are the business of the server's side: where nobody captures it, there is none.
        if !self.server_enrolled {
            return true;
        }
        match proves_who_it_is {
            true => !(who == Who::Client && self.client_denied),
            // A denied principal is not matched by somebody without one.
            false => !self.strict,
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let on = || prop_oneof![Just(On::A), Just(On::B)];
    prop_oneof![
        proptest::bool::ANY.prop_map(Step::ClientEnrolled),
        proptest::bool::ANY.prop_map(Step::ServerEnrolled),
        prop_oneof![Just(None), Just(Some("STRICT")), Just(Some("PERMISSIVE"))].prop_map(Step::Mode),
        proptest::bool::ANY.prop_map(Step::ClientDenied),
        on().prop_map(Step::Restart),
        on().prop_map(Step::Kill),
    ]
}

fn act(testbed: &mut Testbed, step: Step) -> Result<()> {
    let enrolment = |enrolled| if enrolled { Enrolment::Inherit } else { Enrolment::None };
    match step {
        Step::ClientEnrolled(enrolled) => testbed.mesh.pod(MESHED, &testbed.client, enrolment(enrolled)),
        Step::ServerEnrolled(enrolled) => testbed.mesh.pod(MESHED, &testbed.server, enrolment(enrolled)),
        Step::Mode(Some(mode)) => testbed.mesh.peer_authentication(mode),
        Step::Mode(None) => testbed.mesh.remove("policy-peer-authentication"),
        Step::ClientDenied(true) => testbed.mesh.deny("no-client", "server", "client"),
        Step::ClientDenied(false) => testbed.mesh.remove("policy-no-client"),
        Step::Restart(on) => testbed.restart_daemon(on, false).map(drop),
        Step::Kill(on) => {
            testbed.kill_daemon(on)?;
            testbed.start_daemon(on)
        }
    }
}

fn agrees(testbed: &Testbed, model: &Model) -> Result<()> {
    let clients: [(Who, &Pod); 3] =
        [(Who::Client, &testbed.client), (Who::Other, &testbed.other), (Who::Outsider, &testbed.outsider)];
    for (who, pod) in clients {
        for address in testbed.server.addresses() {
            if model.reaches(who) {
                http(&pod.place, address, "").with_context(|| format!("{who:?} should reach {address}"))?;
            } else {
                http_refused(&pod.place, address).with_context(|| format!("{who:?} → {address}"))?;
            }
        }
    }
    for address in testbed.outside.addresses() {
        http(&testbed.client.place, address, "")
            .context("the client should reach what is outside the mesh")?;
    }
    Ok(())
}

#[test]
fn any_sequence_of_changes_ends_as_the_model_says() {
    in_testbed("random changes", |testbed| {
        let mut runner = TestRunner::default();
        let mut told = Vec::new();
        for number in 0..SEQUENCES {
            let steps = match proptest::collection::vec(step(), STEPS).new_tree(&mut runner) {
                Ok(tree) => tree.current(),
                Err(reason) => bail!("no sequence: {reason}"),
            };
            let mut model = Model::START;
            for (at, step) in steps.iter().enumerate() {
                let sofar = || format!("sequence {number}, after step {at} of {:?}", &steps[..=at]);
                act(testbed, *step).with_context(sofar)?;
                model.apply(*step);
                testbed.wait_carried_out().with_context(sofar)?;
                throughout(STAYS, || agrees(testbed, &model)).with_context(sofar)?;
            }
            told.push(format!("{steps:?}"));
            testbed.reset()?;
        }
        ensure!(told.len() == SEQUENCES);
        Ok(format!("{SEQUENCES} sequences of {STEPS} steps: {}", told.join("; ")))
    });
}
