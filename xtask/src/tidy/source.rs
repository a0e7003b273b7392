//! One source file, as far as tidy looks into it.

use std::path::PathBuf;

/// A Rust source.
#[derive(Debug)]
pub(crate) struct Source {
    /// Its path in the repository.
    pub(crate) path: PathBuf,
    /// What it says.
    pub(crate) text: String,
}

impl Source {
    /// The text without comments and without items for tests. A file that is for tests only has none.
    pub(crate) fn production(&self) -> String {
        if self.is_test() { String::new() } else { production(&self.text) }
    }

    /// How long it is without its tests.
    pub(crate) fn production_lines(&self) -> usize {
        if self.is_test() { 0 } else { without_tests(&self.text).lines().count() }
    }

    /// Words that mean that something is not finished.
    pub(crate) fn forbidden_words(&self) -> Vec<String> {
        // In two halves, so that this file does not find itself.
        let words = [("to", "do!("), ("unimpl", "emented!("), ("db", "g!("), ("FIX", "ME"), ("XX", "X:")];
        let mut found = Vec::new();
        for (number, line) in self.text.lines().enumerate() {
            for (first, second) in words {
                let word = format!("{first}{second}");
                if line.contains(&word) {
                    found.push(format!("{}:{}: {word}", self.path.display(), number + 1));
                }
            }
        }
        found
    }

    /// A module says first what it owns.
    pub(crate) fn without_purpose(&self) -> Option<String> {
        let exempt = self.is_test() || self.path.ends_with("build.rs") || self.path.ends_with("src/main.rs");
        let says = self.text.lines().any(|line| line.starts_with("//! ") && line.len() > 12);
        (!exempt && !says)
            .then(|| format!("{}: does not begin by saying what it owns (//! …)", self.path.display()))
    }

    /// Whether it is for tests alone.
    pub(crate) fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs")
            || self.path.components().any(|part| part.as_os_str() == "tests")
                && !self.path.starts_with("tests")
            || self.path.starts_with("tests/tests")
    }
}

fn production(text: &str) -> String {
    let mut kept = String::new();
    for line in without_tests(text).lines() {
        // Not within a text such as "spiffe://…".
        let comment = line.match_indices("//").find(|(at, _)| line[..*at].matches('"').count() % 2 == 0);
        let code = comment.map_or(line, |(at, _)| &line[..at]);
        kept.push_str(code);
        kept.push('\n');
    }
    kept
}

/// Leaves out what follows `#[cfg(test)]`, up to the end of that item. Counts on rustfmt: an item ends with a line
/// that is `}` at the item's own indentation, or with `;`.
fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if !line.trim_start().starts_with("#[cfg(test)]") {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let indentation = line.len() - line.trim_start().len();
        let end = format!("{}}}", " ".repeat(indentation));
        for line in lines.by_ref() {
            if line == end || (line.ends_with(';') && line.len() - line.trim_start().len() == indentation) {
                break;
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: PathBuf::from(path), text: text.to_owned() }
    }

    #[test]
    fn tests_and_comments_are_left_out() {
        let text = "use crate::model;\n// use crate::proxy;\nlet a = \"spiffe://x\"; // crate::app\n#[cfg(test)]\nmod \
                    tests {\n    use crate::admin;\n}\n#[cfg(test)]\nmod more;\nfn last() {}\n";
        let kept = source("ztunnel/src/a.rs", text).production();
        assert!(kept.contains("crate::model") && kept.contains("spiffe://x") && kept.contains("fn last"));
        for word in ["proxy", "app", "admin", "more"] {
            assert!(!kept.contains(word), "{word} in {kept}");
        }
        assert_eq!(source("ztunnel/src/a/tests.rs", text).production(), "");
    }

    #[test]
    fn what_is_not_finished_is_found() {
        let text = format!("//! Owns nothing at all.\nfn a() {{ {}) }}\n", concat!("to", "do!("));
        let found = source("ztunnel/src/a.rs", &text).forbidden_words();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("ztunnel/src/a.rs:2"), "{found:?}");
    }

    #[test]
    fn a_module_says_what_it_owns() {
        assert!(source("ztunnel/src/a.rs", "fn a() {}\n").without_purpose().is_some());
        assert!(source("ztunnel/src/a.rs", "//! .\nfn a() {}\n").without_purpose().is_some());
        assert!(source("ztunnel/src/a.rs", "//! Decides where things go.\n").without_purpose().is_none());
        assert!(source("ztunnel/src/a/tests.rs", "fn a() {}\n").without_purpose().is_none());
    }
}
