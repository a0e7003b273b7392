//! The table of modules in the daemon's crate documentation, and what really imports what.
//!
//! The table has these columns, in this order:
//!
//! ```text
//! //! | Module | Owns | May import |
//! //! |---|---|---|
//! //! | [`model`] | the vocabulary | – |
//! //! | [`mesh`] | the one writer, and snapshots | `model` |
//! //! | [`app`] | the composition root | everything |
//! ```
//! `May import` lists modules (links and back quotes are fine), or is `–`, or `everything`. What is in *italics* is
//! another crate: *proto* is the wire formats, which no module imports without saying so; others are not checked.
//! `main` is `main.rs`. A module may always import itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Result, bail, ensure};

/// The crate of wire formats, as Rust names it.
const WIRE_FORMATS: &str = "ztunnel_proto";

/// What each module may import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    modules: BTreeMap<String, Imports>,
    /// The modules that may import the wire formats.
    doors: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Imports {
    Everything,
    Only(BTreeSet<String>),
}

impl Table {
    /// Finds the table in the crate's documentation.
    pub(crate) fn parse(library: &str) -> Result<Self> {
        let rows: Vec<Vec<&str>> = library
            .lines()
            .filter_map(|line| line.strip_prefix("//!"))
            .map(str::trim)
            .filter(|line| line.starts_with('|') && line.ends_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        let head = rows.iter().position(|row| row.as_slice() == ["Module", "Owns", "May import"]);
        let Some(head) = head else { bail!("no table with the columns Module, Owns, May import") };
        let mut table = BTreeMap::new();
        let mut doors = BTreeSet::new();
        for row in rows.iter().skip(head + 2) {
            let [module, _owns, imports] = row[..] else {
                bail!("a row with {} columns: {row:?}", row.len())
            };
            let module = plain(module);
            ensure!(!module.is_empty(), "a row without a module: {row:?}");
            if imports.split(',').any(|name| name.trim() == "*proto*") {
                doors.insert(module.clone());
            }
            ensure!(
                table.insert(module.clone(), parse_imports(imports)).is_none(),
                "{module} is there twice"
            );
        }
        ensure!(!table.is_empty(), "the table of modules is empty");
        for (module, imports) in &table {
            let Imports::Only(names) = imports else { continue };
            if let Some(unknown) = names.iter().find(|name| !table.contains_key(*name)) {
                bail!("{module} may import {unknown}, which has no row of its own");
            }
        }
        Ok(Self { modules: table, doors })
    }

    /// Modules without a row, and rows without a module.
    pub(crate) fn against_declarations(&self, library: &str) -> Vec<String> {
        let declared: BTreeSet<&str> = library
            .lines()
            .filter_map(|line| line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod ")))
            .filter_map(|rest| rest.strip_suffix(';'))
            .collect();
        let missing = declared.iter().filter(|name| !self.modules.contains_key(**name));
        let missing =
            missing.map(|name| format!("ztunnel/src/lib.rs: {name} has no row in the table of modules"));
        let empty = self.modules.keys().filter(|name| *name != "main" && !declared.contains(name.as_str()));
        let empty = empty.map(|name| {
            format!("ztunnel/src/lib.rs: the table has a row {name}, but there is no such module")
        });
        missing.chain(empty).collect()
    }

    /// A way round in the table itself, if there is one.
    pub(crate) fn cycle(&self) -> Option<String> {
        let mut done = BTreeSet::new();
        for module in self.modules.keys() {
            let mut way = Vec::new();
            if let Some(cycle) = self.walk(module, &mut way, &mut done) {
                return Some(format!("ztunnel/src/lib.rs: modules import each other: {cycle}"));
            }
        }
        None
    }

    fn walk<'a>(
        &'a self,
        module: &'a str,
        way: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<String> {
        if let Some(at) = way.iter().position(|other| *other == module) {
            let mut round = way[at..].to_vec();
            round.push(module);
            return Some(round.join(" → "));
        }
        if done.contains(module) {
            return None;
        }
        way.push(module);
        // "everything" stands for what is below: it can't be part of a way round by itself.
        if let Some(Imports::Only(names)) = self.modules.get(module) {
            for name in names {
                if let Some(cycle) = self.walk(name, way, done) {
                    return Some(cycle);
                }
            }
        }
        way.pop();
        done.insert(module);
        None
    }

    /// Imports in a file (its path below `ztunnel/src`) that the table does not allow.
    pub(crate) fn forbidden_imports(&self, path: &Path, production: &str) -> Vec<String> {
        let module = module_of(path);
        // The crate's root only lists the modules; they are documentation there.
        if module == "lib" {
            return Vec::new();
        }
        let door = (!self.doors.contains(&module) && names_crate(production, WIRE_FORMATS))
            .then(|| format!("ztunnel/src/{}: {module} may not import the wire formats", path.display()));
        let Some(Imports::Only(allowed)) = self.modules.get(&module) else {
            return door.into_iter().collect();
        };
        let root = if module == "main" { "ztunnel::" } else { "crate::" };
        imported(production, root)
            .into_iter()
            .filter(|name| self.modules.contains_key(name) && *name != module && !allowed.contains(name))
            .map(|name| format!("ztunnel/src/{}: {module} may not import {name}", path.display()))
            .chain(door)
            .collect()
    }
}

/// The top-level module that a file belongs to.
fn module_of(path: &Path) -> String {
    let first = path.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
    let first = first.unwrap_or_default();
    first.strip_suffix(".rs").unwrap_or(&first).to_owned()
}

/// Whether a crate is named in this text.
fn names_crate(text: &str, name: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        !text[..at].ends_with(part_of_name) && !text[at + name.len()..].starts_with(part_of_name)
    })
}

/// The names that follow `crate::` in this text, also within `crate::{…}`.
fn imported(text: &str, root: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(root) {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &text[at + root.len()..];
        match rest.strip_prefix('{') {
            None => found.extend(identifier(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut start = 0;
                for (position, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => {
                            found.extend(identifier(group[start..position].trim()));
                            break;
                        }
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            found.extend(identifier(group[start..position].trim()));
                            start = position + 1;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    found
}

fn identifier(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

fn parse_imports(cell: &str) -> Imports {
    if plain(cell).starts_with("everything") {
        return Imports::Everything;
    }
    let names = cell.split(',').map(str::trim).filter(|name| !name.starts_with('*') && !name.ends_with('*'));
    Imports::Only(names.map(plain).filter(|name| !name.is_empty() && name != "–" && name != "-").collect())
}

/// A cell without its markup.
fn plain(cell: &str) -> String {
    cell.chars().filter(|c| !"[]`".contains(*c)).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = "//! The daemon.\n//!\n//! | Module | Owns | May import |\n//! |---|---|---|\n//! | \
                           [`model`] | words | – |\n//! | [`mesh`] | state | `model` |\n//! | [`route`] | plans | \
                           [`model`], `mesh`, *an outside crate* |\n//! | [`app`] | the rest | everything |\n\npub mod \
                           app;\npub mod mesh;\npub mod model;\npub mod route;\n";

    fn table() -> Table {
        Table::parse(LIBRARY).expect("a good table")
    }

    #[test]
    fn imports_are_held_against_the_table() {
        let check = |path: &str, text: &str| table().forbidden_imports(Path::new(path), text);
        assert_eq!(check("mesh.rs", "use crate::model::A;\nuse crate::mesh::B;\n"), Vec::<String>::new());
        assert_eq!(check("app/pods.rs", "use crate::route::A;\n"), Vec::<String>::new());
        assert_eq!(
            check("mesh/index.rs", "fn f() { crate::route::plan() }\n"),
            ["ztunnel/src/mesh/index.rs: mesh may not import route"]
        );
        assert_eq!(
            check("mesh.rs", "use crate::{model::{A, b::C}, app};\n"),
            ["ztunnel/src/mesh.rs: mesh may not import app"]
        );
        assert_eq!(check("mesh.rs", "use other_crate::app;\nuse crate::unlisted;\n"), Vec::<String>::new());
    }

    #[test]
    fn wire_formats_come_in_by_the_doors_that_the_table_names() {
        let table = Table::parse(&LIBRARY.replace("state | `model`", "state | `model`, *proto*"));
        let table = table.expect("a good table");
        let check = |path: &str, text: &str| table.forbidden_imports(Path::new(path), text);
        let import = "use ztunnel_proto::workload::Workload;\n";
        assert_eq!(check("mesh/convert.rs", import), Vec::<String>::new());
        for file in ["route.rs", "app/pods.rs"] {
            let problems = check(file, import);
            assert!(problems.len() == 1 && problems[0].contains("the wire formats"), "{problems:?}");
        }
        assert_eq!(check("route.rs", "use ztunnel_protocol::A;\n"), Vec::<String>::new());
    }

    #[test]
    fn rows_and_modules_belong_together() {
        assert_eq!(table().against_declarations(LIBRARY), Vec::<String>::new());
        let changed = LIBRARY.replace("pub mod route;", "pub mod proxy;");
        let problems = table().against_declarations(&changed);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("proxy has no row") && problems[1].contains("route"), "{problems:?}");
    }

    #[test]
    fn a_way_round_is_found() {
        assert_eq!(table().cycle(), None);
        let knotted = LIBRARY.replace("words | – |", "words | route |");
        let cycle = Table::parse(&knotted).expect("well formed").cycle().expect("model → route → model");
        assert!(cycle.contains("→"), "{cycle}");
    }

    #[test]
    fn a_table_that_says_nothing_is_refused() {
        assert!(Table::parse("//! No table.\n").is_err());
        assert!(Table::parse("//! | Module | Owns | May import |\n//! |---|---|---|\n").is_err());
        assert!(Table::parse(&LIBRARY.replace("state | `model`", "state | `mdoel`")).is_err());
    }
}
