//! Every kind of connection, pairwise, against what would have been without a mesh.
//!
//! A combination has one value of each [axis](axes). [`cover`] chooses some hundred in which any two values that go
//! together are together; the [stage](stage) plays them in two nodes' pods, many at once, and beside them the same
//! scripts between pods outside the mesh. The [oracle] compares: both sides came as far, as soon, got the same bytes and
//! the same end, and saw the addresses they should; unless a policy is to refuse it. Nothing was in clear on any device,
//! both daemons' logs have their line, and the series of their metrics are those that they should be, label by label.

pub mod axes;
pub mod cover;
mod ear;
mod labels;
mod oracle;
mod stage;

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use self::axes::{Capture, Combination};
use self::stage::Stage;

/// What came of all combinations under one way of capturing.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many were played.
    pub played: usize,
    /// How many connections outside the mesh they were compared with.
    pub references: usize,
    /// What did not hold, and in which.
    pub failures: Vec<(Combination, String)>,
}

/// Plays the combinations of one way of capturing, and checks that nothing is left after them.
pub fn play(capture: Capture, chosen: &[Combination]) -> Result<Outcome> {
    let of_it: Vec<Combination> = chosen.iter().filter(|it| it.capture == capture).copied().collect();
    let mut stage = Stage::set(capture)?;
    let outcome = stage.play(&of_it);
    if outcome.as_ref().map_or(true, |outcome| !outcome.failures.is_empty()) {
        eprintln!("logs are in {}", stage.save_logs()?.display());
    }
    stage.end().context("something is left")?;
    outcome
}

/// Failures by what they say, for a report: many have one cause.
pub fn by_kind(failures: &[(Combination, String)]) -> BTreeMap<String, Vec<&Combination>> {
    let mut kinds: BTreeMap<String, Vec<&Combination>> = BTreeMap::new();
    for (combination, what) in failures {
        let kind = what.split(": ").next().unwrap_or_default();
        kinds.entry(kind.to_owned()).or_default().push(combination);
    }
    kinds
}
