//! What is to be said about a mesh file: where, what, and what to write instead.

use std::fmt;
use std::sync::Arc;

use crate::kinds::Source;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The mesh file is not applied.
    Error,
    /// It is applied, but probably not what was meant.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One remark on one place of the mesh file. Reads
/// `mesh/shop.yaml:12: error: spec.selektor is not a field of ServiceSpec (write selector instead)`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file, as it was opened.
    pub file: Arc<str>,
    /// The line, counted from 1; 0 when the file as a whole is meant.
    pub line: u32,
    /// What is wrong.
    pub message: String,
    /// What to write or do instead, where there is a good guess; else empty.
    pub hint: String,
}

impl Diagnostic {
    /// An error at `line` of `file`.
    pub fn error(file: &Arc<str>, line: u32, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, file, line, message.into())
    }

    /// A warning at `line` of `file`.
    pub fn warning(file: &Arc<str>, line: u32, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, file, line, message.into())
    }

    /// An error at the field `path` of the object that came from `source`.
    pub fn error_at(source: &Source, path: &[&str], message: impl Into<String>) -> Self {
        Self::error(&source.file, source.line_of(path), message)
    }

    /// A warning at the field `path` of the object that came from `source`.
    pub fn warning_at(source: &Source, path: &[&str], message: impl Into<String>) -> Self {
        Self::warning(&source.file, source.line_of(path), message)
    }

    /// Says what to do instead.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same as an error.
    pub fn counted(self) -> Self {
        Self { severity: Severity::Error, ..self }
    }

    /// Whether it keeps the mesh file from being applied.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    fn new(severity: Severity, file: &Arc<str>, line: u32, message: String) -> Self {
        Self { severity, file: Arc::clone(file), line, message, hint: String::new() }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": {}: {}", self.severity, self.message)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// The one of `known` that `word` was probably meant to be: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    known
        .into_iter()
        .map(|candidate| (distance(&word.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance: how many letters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_finds_its_neighbour() {
        let known = ["selector", "ports", "clusterIP", "clusterIPs"];
        assert_eq!(nearest("selektor", known), Some("selector"));
        assert_eq!(nearest("port", known), Some("ports"));
        assert_eq!(nearest("clusterIps", known), Some("clusterIPs"));
        assert_eq!(nearest("frobnicate", known), None);
        assert_eq!(nearest("", known), None);
    }

    #[test]
    fn a_diagnostic_reads_as_one_line() {
        let file = Arc::from("mesh/a.yaml");
        let error = Diagnostic::error(&file, 3, "no such mode").hint("write STRICT instead");
        assert_eq!(error.to_string(), "mesh/a.yaml:3: error: no such mode (write STRICT instead)");
        assert_eq!(Diagnostic::warning(&file, 0, "is empty").to_string(), "mesh/a.yaml: warning: is empty");
    }
}
