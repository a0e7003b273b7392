//! House rules that no compiler checks; `cargo xtask tidy` and a test run them.

mod circles;
mod modules;
mod paths;
mod source;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use xtask::places::repository;

use circles::Graph;
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
    let mut crates = Vec::new();
    for folder in crates_of_the_daemon(root)? {
        let library = folder.join("lib.rs");
        let text =
            std::fs::read_to_string(root.join(&library)).with_context(|| library.display().to_string())?;
        let files: Vec<(String, String)> =
            sources.iter().filter_map(|source| production_below(source, &folder)).collect();
        match Table::parse(&folder, &text) {
            Ok(table) => {
                findings.problems.extend(table.against_declarations(&text));
                findings.problems.extend(table.cycle());
                findings.problems.extend(table.against_imports(&files));
            }
            Err(error) => findings.problems.push(format!("{}: {error:#}", library.display())),
        }
        crates.push(files);
    }
    let graphs: Vec<Graph<'_>> = crates.iter().map(|files| Graph::of(files)).collect();
    findings.problems.extend(circles::problems(&graphs, circles::KNOWN));
    Ok(findings)
}

/// Where the sources of the daemon's crates are: `ztunnel/src`, and those of every package below `ztunnel`.
fn crates_of_the_daemon(root: &Path) -> Result<Vec<PathBuf>> {
    let daemon = Path::new("ztunnel");
    let mut folders = vec![daemon.join("src")];
    for entry in std::fs::read_dir(root.join(daemon)).context("ztunnel")? {
        let entry = entry?;
        if entry.path().join("Cargo.toml").exists() {
            folders.push(daemon.join(entry.file_name()).join("src"));
        }
    }
    folders.sort();
    Ok(folders)
}

/// A source's path below a folder that it is in, and its text without comments and tests. None of those that are for
/// tests alone.
fn production_below(source: &Source, folder: &Path) -> Option<(String, String)> {
    let path = source.path.strip_prefix(folder).ok()?;
    (!source.is_test()).then(|| (path.display().to_string(), source.production()))
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
