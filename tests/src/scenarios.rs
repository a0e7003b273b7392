//! The claims, each with its evidence.
//!
//! A scenario is given a [`Testbed`] in which everything works, shows one thing, and returns what a sceptical reader
//! should see. It may leave policies, pods and daemons as it likes: [`Testbed::reset`] follows.

pub mod basics;
pub mod closed;
pub mod cost;
pub mod enrolment;
pub mod outage;
pub mod policy;
pub mod probes;
pub mod repair;
pub mod restart;
pub mod same_node;
pub mod scale;
pub mod sockets;
pub mod tunnel;

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;
use serde::Serialize;

use crate::testbed::Testbed;

/// One claim.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// The claim, as a sentence.
    pub name: &'static str,
    /// Shows it; the text is the evidence.
    pub run: fn(&mut Testbed) -> Result<String>,
}

/// What came of one claim.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The claim.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// What was seen.
    pub evidence: String,
}

impl Scenario {
    /// Runs the scenario; a failure or a panic is a row that is not ok.
    pub fn row(&self, testbed: &mut Testbed) -> Row {
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(testbed)));
        let (ok, evidence) = match outcome {
            Ok(Ok(evidence)) => (true, evidence),
            Ok(Err(error)) => (false, format!("{error:#}")),
            Err(_) => (false, "the scenario itself panicked; see standard error".to_owned()),
        };
        Row { name: self.name.to_owned(), ok, evidence }
    }
}

/// What the demo shows, in its order.
pub const DEMO: &[Scenario] = &[
    basics::BOTH_FAMILIES,
    basics::SERVICE,
    same_node::SAME_NODE,
    tunnel::ONLY_TLS,
    tunnel::IDENTITIES,
    policy::DENIED,
    policy::STRICT,
    policy::OUTSIDE_UNTOUCHED,
    probes::ONLY_THE_NODE,
    outage::KILLED_SOURCE,
    outage::KILLED_DESTINATION,
    restart::THREE_RESTARTS,
    enrolment::OPEN_CONNECTIONS,
    enrolment::WITHDRAWN_CLEAN,
];
