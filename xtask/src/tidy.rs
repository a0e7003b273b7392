//! House rules that no compiler checks; `cargo xtask tidy` and a test run them.

mod modules;
mod source;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use xtask::places::repository;

use modules::Table;
use source::Source;

/// Longer files are reported, for somebody to look for a second noun in them.
const LONG: usize = 500;

/// What a look at the repository brought.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<String>,
    remarks: Vec<String>,
}

/// The command.
pub(crate) fn run() -> Result<ExitCode> {
    let findings = look(&repository())?;
    findings.remarks.iter().for_each(|remark| println!("note: {remark}"));
    findings.problems.iter().for_each(|problem| println!("error: {problem}"));
    println!("{} problems", findings.problems.len());
    Ok(if findings.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look(root: &Path) -> Result<Findings> {
    let mut findings = Findings::default();
    let sources = sources(root)?;
    for source in &sources {
        findings.problems.extend(source.forbidden_words());
        findings.problems.extend(source.without_purpose());
        let lines = source.production_lines();
        if lines > LONG {
            findings.remarks.push(format!("{}: {lines} lines without its tests", source.path.display()));
        }
    }
    let daemon = Path::new("ztunnel/src");
    let library = std::fs::read_to_string(root.join(daemon).join("lib.rs")).context("ztunnel/src/lib.rs")?;
    match Table::parse(&library) {
        Ok(table) => {
            findings.problems.extend(table.against_declarations(&library));
            findings.problems.extend(table.cycle());
            for source in &sources {
                if let Ok(path) = source.path.strip_prefix(daemon) {
                    findings.problems.extend(table.forbidden_imports(path, &source.production()));
                }
            }
        }
        Err(error) => findings.problems.push(format!("ztunnel/src/lib.rs: {error:#}")),
    }
    Ok(findings)
}

/// All Rust sources of the repository, by their path in it.
fn sources(root: &Path) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    for folder in ["ztunnel", "proto", "ebpf/abi", "ebpf/build", "ebpf/programs", "tests", "xtask"] {
        collect(root, &PathBuf::from(folder), &mut found)?;
    }
    Ok(found)
}

fn collect(root: &Path, folder: &Path, found: &mut Vec<Source>) -> Result<()> {
    let path = root.join(folder);
    if !path.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(&path).with_context(|| path.display().to_string())? {
        let entry = entry?;
        let below = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                collect(root, &below, found)?;
            }
        } else if below.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(entry.path())?;
            found.push(Source { path: below, text });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        let findings = look(&repository()).expect("the sources can be read");
        assert!(findings.problems.is_empty(), "{}", findings.problems.join("\n"));
    }

    #[test]
    fn the_look_goes_through_the_sources() {
        let sources = sources(&repository()).expect("the sources can be read");
        for path in ["ztunnel/src/lib.rs", "tests/src/lib.rs", "xtask/src/tidy.rs"] {
            assert!(sources.iter().any(|source| source.path == Path::new(path)), "{path}");
        }
    }
}
