//! A mesh file: Kubernetes and Istio YAML.
//!
//! Whatever is said of it names a line that it has, the same text is read as the same mesh, and no text costs more than
//! its length allows, whatever its aliases expand to.

use std::sync::Arc;

use ztunnel_objects::decode::Collector;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::translate::Options;
use ztunnel_objects::translate::Translation;
use ztunnel_objects::translate::translate;

use crate::memory::bounded_from;
use crate::xds_mesh::seen;

fn read(text: &str) -> (Translation, Vec<Diagnostic>) {
    let mut collector = Collector::default();
    collector.add(&Arc::from("mesh.yaml"), text);
    let (objects, said) = collector.finish();
    (translate(&objects, &Options { node: "n1".to_owned() }), said)
}

/// What the aliases of a short text may expand to.
const EXPANDED: usize = 16 << 20;

/// A text as the one file.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    // Reading takes some 30 times as much memory, says the reader; a little text with much to complain of takes more.
    let (translation, said) = bounded_from(EXPANDED, text.len(), 4096, || read(text));
    // YAML has more ways to end a line than one.
    let lines =
        1 + text.chars().filter(|c| matches!(c, '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}')).count();
    for diagnostic in said.iter().chain(&translation.diagnostics) {
        let line = diagnostic.line as usize;
        assert!((1..=lines + 1).contains(&line), "{diagnostic} names no line of {lines}");
        assert!(!diagnostic.message.is_empty());
    }
    for pod in &translation.pods {
        assert!(translation.mesh.workload(&pod.workload).is_some(), "{} is no workload", pod.workload);
    }
    let (again, said_again) = read(text);
    assert_eq!(seen(&again.mesh), seen(&translation.mesh));
    assert_eq!(said_again, said);
    assert_eq!((again.diagnostics, again.pods), (translation.diagnostics, translation.pods));
}
