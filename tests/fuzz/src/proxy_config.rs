//! `PROXY_CONFIG` and the mesh configuration file: YAML from the environment.
//!
//! It is in force or its problems are told, all of them, each with a name and what to write instead.

use std::collections::BTreeMap;

use ztunnel::config::env::Surroundings;
use ztunnel::config::env::resolve;

use crate::memory::bounded_from;

/// What the aliases of a short text may expand to.
const EXPANDED: usize = 16 << 20;

/// Both, the mesh configuration first, or `PROXY_CONFIG` alone.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let (mesh_config, proxy_config) = match text.split_once("\n---mesh---\n") {
        Some((mesh, proxy)) => (Some(mesh), proxy),
        None => (None, text),
    };
    let env = BTreeMap::from([("PROXY_CONFIG".to_owned(), proxy_config.to_owned())]);
    let resolved =
        bounded_from(EXPANDED, text.len(), 4096, || resolve(&env, Surroundings { mesh_config, cores: 4 }));
    match resolved {
        Ok(settings) => {
            assert!(settings.shown.windows(2).all(|two| two[0].name <= two[1].name), "it is in order");
        }
        Err(problems) => {
            assert!(!problems.0.is_empty());
            for problem in &problems.0 {
                assert!(!problem.name.is_empty() && !problem.accepted.is_empty(), "{problem:?}");
            }
        }
    }
}
