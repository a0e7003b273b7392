//! Waiting for something to become true.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long to wait for what must come: what takes longer never comes. Far more than any of it takes, as it costs time
/// only where something fails, and a machine may be slow. How long something took is no test's business.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Tries until `attempt` succeeds or `limit` has passed; the last failure is the error.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= limit => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => sleep(Duration::from_millis(20)),
        }
    }
}

/// Checks that `attempt` succeeds every time for as long as `period`; the first failure is the error.
/// Returns how often it was tried.
pub fn throughout(period: Duration, mut attempt: impl FnMut() -> Result<()>) -> Result<u32> {
    let start = Instant::now();
    let mut tries = 0;
    while start.elapsed() < period || tries == 0 {
        tries += 1;
        attempt().map_err(|error| anyhow!("try {tries}, after {:?}: {error:#}", start.elapsed()))?;
        sleep(Duration::from_millis(10));
    }
    Ok(tries)
}
