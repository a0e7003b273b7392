//! The claims, each with its evidence.
//!
//! A story is given a [`World`] in which everything works, shows one thing, and returns what a sceptical reader
//! should see. It may leave policies, pods and daemons as it likes: [`World::reset`] follows.

pub mod basics;
pub mod closed;
pub mod cost;
pub mod enrolment;
pub mod near;
pub mod outage;
pub mod policy;
pub mod probes;
pub mod repair;
pub mod restart;
pub mod scale;
pub mod sockets;
pub mod tunnel;

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;
use serde::Serialize;

use crate::world::World;

/// One claim.
#[derive(Debug, Clone, Copy)]
pub struct Story {
    /// The claim, as a sentence.
    pub name: &'static str,
    /// Shows it; the text is the evidence.
    pub tell: fn(&mut World) -> Result<String>,
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

impl Story {
    /// Tells the story; a failure or a panic is a row that is not ok.
    pub fn row(&self, world: &mut World) -> Row {
        let told = catch_unwind(AssertUnwindSafe(|| (self.tell)(world)));
        let (ok, evidence) = match told {
            Ok(Ok(evidence)) => (true, evidence),
            Ok(Err(error)) => (false, format!("{error:#}")),
            Err(_) => (false, "the story itself panicked; see standard error".to_owned()),
        };
        Row { name: self.name.to_owned(), ok, evidence }
    }
}

/// What the demo shows, in its order.
pub const DEMO: &[Story] = &[
    basics::BOTH_FAMILIES,
    basics::SERVICE,
    near::SAME_NODE,
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
