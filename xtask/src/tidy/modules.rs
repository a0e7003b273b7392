//! The table of modules in a crate's documentation, and what really imports what.
//!
//! Every crate of the daemon has one: `ztunnel` and what is a crate below it.
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
//! `main` is `main.rs`. A module may always import itself. What a module may import and does not is refused, too: a
//! permission that nobody needs is an invitation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use super::paths::named;

/// The crate of wire formats, as Rust names it.
const WIRE_FORMATS: &str = "ztunnel_proto";

/// What each module may import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    /// Where the crate's sources are: its own library is `lib.rs` in it.
    folder: PathBuf,
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
    /// Finds the table in the documentation of the crate whose sources are in that folder.
    pub(crate) fn parse(folder: &Path, library: &str) -> Result<Self> {
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
        Ok(Self { folder: folder.to_owned(), modules: table, doors })
    }

    /// Modules without a row, and rows without a module.
    pub(crate) fn against_declarations(&self, library: &str) -> Vec<String> {
        let declared: BTreeSet<&str> = library
            .lines()
            .filter_map(|line| {
                ["pub mod ", "pub(crate) mod ", "mod "].into_iter().find_map(|start| line.strip_prefix(start))
            })
            .filter_map(|rest| rest.strip_suffix(';'))
            .collect();
        let missing = declared.iter().filter(|name| !self.modules.contains_key(**name));
        let missing =
            missing.map(|name| format!("{}: {name} has no row in the table of modules", self.at("lib.rs")));
        let empty = self.modules.keys().filter(|name| *name != "main" && !declared.contains(name.as_str()));
        let empty = empty.map(|name| {
            format!("{}: the table has a row {name}, but there is no such module", self.at("lib.rs"))
        });
        missing.chain(empty).collect()
    }

    /// A way round in the table itself, if there is one.
    pub(crate) fn cycle(&self) -> Option<String> {
        let mut done = BTreeSet::new();
        for module in self.modules.keys() {
            let mut way = Vec::new();
            if let Some(cycle) = self.walk(module, &mut way, &mut done) {
                return Some(format!("{}: modules import each other: {cycle}", self.at("lib.rs")));
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

    /// What is wrong with the imports of these files (paths below the folder, texts without comments and tests): what the
    /// table does not allow, and what it allows for nobody.
    pub(crate) fn against_imports(&self, files: &[(String, String)]) -> Vec<String> {
        let mut problems = Vec::new();
        let mut needed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut doors = BTreeSet::new();
        for (path, text) in files {
            let module = module_of(path);
            // The crate's root only lists the modules; they are documentation there.
            if module == "lib" {
                continue;
            }
            if names_crate(text, WIRE_FORMATS) {
                if !self.doors.contains(&module) {
                    problems.push(format!("{}: {module} may not import the wire formats", self.at(path)));
                }
                doors.insert(module.clone());
            }
            let Some(Imports::Only(allowed)) = self.modules.get(&module) else { continue };
            let root = if module == "main" { self.crate_name() } else { "crate".to_owned() };
            let mut imports = imported(text, &root);
            imports.retain(|name| self.modules.contains_key(name) && *name != module);
            let forbidden = imports.iter().filter(|name| !allowed.contains(*name));
            problems
                .extend(forbidden.map(|name| format!("{}: {module} may not import {name}", self.at(path))));
            needed.entry(module).or_default().extend(imports);
        }
        for (module, imports) in &self.modules {
            let Imports::Only(allowed) = imports else { continue };
            let needed = needed.remove(module).unwrap_or_default();
            let proto = (self.doors.contains(module) && !doors.contains(module)).then_some("*proto*");
            problems.extend(allowed.difference(&needed).map(String::as_str).chain(proto).map(|name| {
                format!(
                    "{}: {module} may import {name} and does not: take that out of the table",
                    self.at("lib.rs")
                )
            }));
        }
        problems
    }

    fn at(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }

    /// As Rust names it: packages here have the names of their folders.
    fn crate_name(&self) -> String {
        let package = self.folder.parent().and_then(Path::file_name).unwrap_or_default();
        package.to_string_lossy().replace('-', "_")
    }
}

/// The top-level module that a file belongs to.
fn module_of(path: &str) -> String {
    let first = path.split('/').next().unwrap_or_default();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// Whether a crate is named in this text.
fn names_crate(text: &str, name: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        !text[..at].ends_with(part_of_name) && !text[at + name.len()..].starts_with(part_of_name)
    })
}

/// The modules that this text names, by paths from the root of the crate.
fn imported(text: &str, root: &str) -> BTreeSet<String> {
    let paths = named(text, |word| word == root);
    paths.iter().filter_map(|path| path.parts.get(1)).map(|name| (*name).to_owned()).collect()
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

    fn parse(library: &str) -> Result<Table> {
        Table::parse(Path::new("ztunnel/src"), library)
    }

    fn table() -> Table {
        parse(LIBRARY).expect("a good table")
    }

    /// What a file adds to the problems of a crate that has none.
    fn check(table: &Table, path: &str, text: &str) -> Vec<String> {
        let good =
            [("mesh/good.rs", "use crate::model::A;"), ("route/good.rs", "use crate::{mesh::B, model::C};")];
        let files = good.into_iter().chain([(path, text)]);
        let files: Vec<_> = files.map(|(path, text)| (path.to_owned(), text.to_owned())).collect();
        table.against_imports(&files)
    }

    #[test]
    fn imports_are_held_against_the_table() {
        let check = |path: &str, text: &str| check(&table(), path, text);
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
    fn every_crate_has_a_table_of_its_own() {
        let files = [("mesh.rs".to_owned(), "use crate::app::A;".to_owned())];
        let table = Table::parse(Path::new("ztunnel/node/src"), LIBRARY).expect("a good table");
        let problems = table.against_imports(&files);
        assert_eq!(problems[0], "ztunnel/node/src/mesh.rs: mesh may not import app");
        let main = LIBRARY.replace("| everything |\n", "| everything |\n//! | `main` | starts | `app` |\n");
        let table = Table::parse(Path::new("ztunnel/node/src"), &main).expect("a good table");
        let files = [("main.rs".to_owned(), "use node::mesh::A;".to_owned())];
        let problems = table.against_imports(&files);
        assert!(
            problems.contains(&"ztunnel/node/src/main.rs: main may not import mesh".to_owned()),
            "{problems:?}"
        );
    }

    #[test]
    fn permissions_that_nobody_needs_are_refused() {
        let wide = LIBRARY.replace("state | `model`", "state | `model`, *proto*");
        let files = [("mesh.rs".to_owned(), "use ztunnel_proto::A;".to_owned())];
        let problems = parse(&wide).expect("a good table").against_imports(&files);
        let of = |module: &str, name: &str| {
            format!("ztunnel/src/lib.rs: {module} may import {name} and does not: take that out of the table")
        };
        assert_eq!(problems, [of("mesh", "model"), of("route", "mesh"), of("route", "model")]);
        let problems = check(&parse(&wide).expect("a good table"), "app.rs", "");
        assert_eq!(problems, [of("mesh", "*proto*")]);
    }

    #[test]
    fn wire_formats_come_in_by_the_doors_that_the_table_names() {
        let table =
            parse(&LIBRARY.replace("state | `model`", "state | `model`, *proto*")).expect("a good table");
        let import = "use ztunnel_proto::workload::Workload;\n";
        assert_eq!(check(&table, "mesh/convert.rs", import), Vec::<String>::new());
        for file in ["route.rs", "app/pods.rs"] {
            let problems = check(&table, file, import);
            assert!(problems[0].starts_with(&format!("ztunnel/src/{file}: ")), "{problems:?}");
            assert!(problems[0].ends_with("may not import the wire formats"), "{problems:?}");
        }
        let problems = check(&table, "route.rs", "use ztunnel_protocol::A;\n");
        assert!(problems.iter().all(|problem| !problem.contains("route")), "{problems:?}");
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
        let cycle = parse(&knotted).expect("well formed").cycle().expect("model → route → model");
        assert!(cycle.contains("→"), "{cycle}");
    }

    #[test]
    fn a_table_that_says_nothing_is_refused() {
        assert!(parse("//! No table.\n").is_err());
        assert!(parse("//! | Module | Owns | May import |\n//! |---|---|---|\n").is_err());
        assert!(parse(&LIBRARY.replace("state | `model`", "state | `mdoel`")).is_err());
    }
}
