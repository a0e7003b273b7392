//! A mesh written by hand, as a config dump shows it (`LOCAL_XDS`).
//!
//! It is read whole or not at all, then with what is wrong on which line, and as the same mesh again.

use ztunnel_objects::local::Place;
use ztunnel_objects::local::load;

use crate::memory::bounded_from;
use crate::xds_mesh::seen;

/// What the aliases of a short text may expand to.
const EXPANDED: usize = 16 << 20;

/// A text as the variable.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let place = Place::Variable("LOCAL_XDS", text.to_owned());
    match bounded_from(EXPANDED, text.len(), 4096, || load(&place)) {
        Ok(mesh) => assert!(load(&place).is_ok_and(|again| seen(&again) == seen(&mesh))),
        Err(wrong) => {
            let lines = 1 + text
                .chars()
                .filter(|c| matches!(c, '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}'))
                .count();
            assert!(wrong.iter().any(|it| it.is_error()));
            for diagnostic in &wrong {
                let line = diagnostic.line as usize;
                assert!((1..=lines + 1).contains(&line), "{diagnostic} names no line of {lines}");
                assert!(!diagnostic.message.is_empty());
            }
        }
    }
}
