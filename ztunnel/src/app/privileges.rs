//! What the process may do, asked before it is tried: the kernel's own word for all of it is "Permission denied", or that
//! it does not know the thing at all.

use std::fmt;

/// Capabilities that are needed to capture pods by programs (capabilities(7)).
const NEEDED: [Capability; 3] = [
    Capability { bit: 12, name: "CAP_NET_ADMIN" },
    Capability { bit: 13, name: "CAP_NET_RAW" },
    Capability { bit: 21, name: "CAP_SYS_ADMIN" },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Capability {
    bit: u32,
    name: &'static str,
}

/// The process lacks these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Missing(Vec<&'static str>);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not permitted: run as root (sudo), or give the process {}", self.0.join(", "))
    }
}

/// Whether pods may be captured by programs.
pub fn check() -> Result<(), Missing> {
    // Where there is no /proc the kernel says what it does not permit.
    match std::fs::read_to_string("/proc/self/status") {
        Ok(status) => judge(&status),
        Err(_) => Ok(()),
    }
}

/// By the text of `/proc/self/status`.
fn judge(status: &str) -> Result<(), Missing> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()) else {
        return Ok(());
    };
    let missing: Vec<_> =
        NEEDED.iter().filter(|needed| effective & (1 << needed.bit) == 0).map(|needed| needed.name).collect();
    if missing.is_empty() { Ok(()) } else { Err(Missing(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(judge("Name:\tx\nCapEff:\t000001ffffffffff\n"), Ok(()));
        assert_eq!(judge("CapEff:\t0000000000203000\n"), Ok(()));
        let nothing = judge("CapEff:\t0000000000000000\n").unwrap_err().to_string();
        assert_eq!(
            nothing,
            "not permitted: run as root (sudo), or give the process CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN"
        );
        assert_eq!(judge("CapEff:\t0000000000201000\n"), Err(Missing(vec!["CAP_NET_RAW"])));
    }
}
