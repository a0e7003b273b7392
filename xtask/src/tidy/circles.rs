//! Files of one crate that import each other: none of them can be read, tested or moved alone.
//!
//! A file imports another when it names something in it: as a child of its own, by `super::`, by `self::` or by
//! `crate::`. A name that a file only shows to others (`pub use`) is not its own: whoever takes it from there imports the
//! file where it is. Modules cannot be in a circle, as the table of modules has none, so these are within a module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::paths::{Named, named};

/// The circles there are, by their files' paths below `src`. This may only become less: what is no longer a circle has to
/// go, and a new one is refused.
pub(crate) const KNOWN: &[&[&str]] = &[
    &["admin/console.rs", "admin/server.rs"],
    &["admin/profile.rs", "admin/profile/heap.rs", "admin/profile/heap/allocator.rs"],
    &[
        "capture.rs",
        "capture/host.rs",
        "capture/listeners.rs",
        "capture/maps.rs",
        "capture/reconcile.rs",
        "capture/shut.rs",
    ],
    &["cli.rs", "cli/dump.rs", "cli/render.rs"],
    &["config/env/proxy_config.rs", "config/env/reader.rs"],
    &["authority.rs", "authority/root.rs"],
    &["dns/pod.rs", "dns/server.rs"],
    &["enrol/zds/link.rs", "enrol/zds/message.rs"],
    &["policy/authorize.rs", "policy/matching.rs"],
    &["store.rs", "store/demand.rs", "store/demand/unused.rs", "store/index.rs"],
    &[
        "translate.rs",
        "translate/authorization.rs",
        "translate/authorization/rules.rs",
        "translate/enrolment.rs",
        "translate/peers.rs",
        "translate/pods.rs",
        "translate/services.rs",
    ],
];

/// Files by their modules (`["proxy", "live"]`; the root has no name), and what they show to others.
struct Files<'a> {
    paths: BTreeMap<Vec<&'a str>, &'a str>,
    shown: BTreeMap<Vec<&'a str>, BTreeMap<&'a str, Vec<&'a str>>>,
}

/// Which file imports which.
#[derive(Debug, Default)]
pub(crate) struct Graph<'a>(BTreeMap<&'a str, BTreeSet<&'a str>>);

/// Re-exports of re-exports are followed so far; there are no more than a few, unless they go round.
const SHOWN_DEPTH_MAX: usize = 8;

impl<'a> Graph<'a> {
    /// Of the files of a crate, by their paths below `src`, with their texts without comments and tests.
    pub(crate) fn of(sources: &'a [(String, String)]) -> Self {
        let mut files = Files { paths: BTreeMap::new(), shown: BTreeMap::new() };
        for (path, _) in sources {
            if let Some(module) = module(path) {
                files.paths.insert(module, path);
            }
        }
        let mut imports = Vec::new();
        for (path, text) in sources {
            let Some(here) = module(path) else { continue };
            let is_child = |word: &str| files.paths.contains_key(&[&here[..], &[word]].concat());
            let found = named(text, |word| matches!(word, "crate" | "self" | "super") || is_child(word));
            for Named { parts, shown_as } in found {
                let target = absolute(&here, &parts);
                match shown_as {
                    Some(name) => {
                        files.shown.entry(here.clone()).or_default().insert(name, target);
                    }
                    None => imports.push((&**path, target)),
                }
            }
        }
        let mut graph = Self::default();
        for (from, target) in imports {
            let to = files.resolve(&target, 0);
            if let Some(to) = to.filter(|to| *to != from) {
                graph.0.entry(from).or_default().insert(to);
            }
        }
        graph
    }

    /// The largest sets of files that all reach each other.
    pub(crate) fn circles(&self) -> Vec<BTreeSet<&'a str>> {
        let reached: BTreeMap<&str, BTreeSet<&str>> =
            self.0.keys().map(|file| (*file, self.reached_from(file))).collect();
        let mut circles = Vec::new();
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        for (file, others) in &reached {
            if !others.contains(file) || seen.contains(file) {
                continue;
            }
            let reach_it = |other: &&str| reached.get(other).is_some_and(|back| back.contains(file));
            let circle: BTreeSet<&str> = others.iter().copied().filter(reach_it).collect();
            seen.extend(&circle);
            circles.push(circle);
        }
        circles
    }

    fn reached_from(&self, file: &str) -> BTreeSet<&'a str> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&str> = vec![file];
        while let Some(file) = next.pop() {
            for to in self.0.get(file).into_iter().flatten() {
                if reached.insert(*to) {
                    next.push(to);
                }
            }
        }
        reached
    }

    /// The imports within a circle, for people.
    fn arrows(&self, circle: &BTreeSet<&str>) -> String {
        let arrow = |file: &&str| {
            let to = self.0.get(file).into_iter().flatten().copied();
            let to: Vec<&str> = to.filter(|to| circle.contains(to)).collect();
            format!("{file} → {}", to.join(", "))
        };
        circle.iter().map(arrow).collect::<Vec<_>>().join("; ")
    }
}

impl<'a> Files<'a> {
    /// The file that a path leads to: the longest beginning of it that is one, or where that file has it from.
    fn resolve(&self, target: &[&'a str], depth: usize) -> Option<&'a str> {
        let length = (0..=target.len()).rev().find(|length| self.paths.contains_key(&target[..*length]))?;
        let (module, rest) = target.split_at(length);
        if depth < SHOWN_DEPTH_MAX
            && let Some((name, rest)) = rest.split_first()
            && let Some(shown) = self.shown.get(module).and_then(|shown| shown.get(name))
        {
            return self.resolve(&[&shown[..], rest].concat(), depth + 1);
        }
        self.paths.get(module).copied()
    }
}

/// What is wrong with the circles of all crates together: one that nobody knows, and one that is known and not there.
pub(crate) fn problems(graphs: &[Graph<'_>], known: &[&[&str]]) -> Vec<String> {
    let mut problems = Vec::new();
    let known: Vec<BTreeSet<&str>> = known.iter().map(|files| files.iter().copied().collect()).collect();
    let mut found = Vec::new();
    for graph in graphs {
        for circle in graph.circles() {
            if !known.iter().any(|known| circle.is_subset(known)) {
                problems
                    .push(format!("files import each other, and did not before: {}", graph.arrows(&circle)));
            }
            found.push(circle);
        }
    }
    for files in &known {
        if !found.contains(files) {
            let left: Vec<String> =
                found.iter().filter(|circle| circle.is_subset(files)).map(|circle| list(circle)).collect();
            let instead = if left.is_empty() { "nothing".to_owned() } else { left.join(" and ") };
            problems.push(format!(
                "xtask/src/tidy/circles.rs: {} are no circle any more: put {instead} in their place",
                list(files)
            ));
        }
    }
    problems
}

fn list(files: &BTreeSet<&str>) -> String {
    files.iter().copied().collect::<Vec<_>>().join(", ")
}

/// The module of a file; none of a program's root, which nothing imports.
fn module(path: &str) -> Option<Vec<&str>> {
    let stem = Path::new(path).file_stem()?.to_str()?;
    let folders = path.rsplit_once('/').map_or("", |(folders, _)| folders);
    let folders = folders.split('/').filter(|folder| !folder.is_empty());
    match (stem, path.contains('/')) {
        ("main", false) => None,
        ("lib", false) => Some(Vec::new()),
        ("mod", true) => Some(folders.collect()),
        _ => Some(folders.chain([stem]).collect()),
    }
}

/// A path that is said in a module, from the root.
fn absolute<'a>(module: &[&'a str], parts: &[&'a str]) -> Vec<&'a str> {
    let mut absolute = module.to_vec();
    for (index, part) in parts.iter().enumerate() {
        match (*part, index) {
            ("crate", 0) => absolute.clear(),
            // Within braces, too: the module itself.
            ("self", _) => {}
            ("super", _) => {
                absolute.pop();
            }
            _ => absolute.push(part),
        }
    }
    absolute
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(files: &[(&str, &str)]) -> Vec<(String, String)> {
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let sources = sources(files);
        Graph::of(&sources).circles().iter().map(list).collect()
    }

    #[test]
    fn files_that_name_each_other_are_a_circle_however_they_do_it() {
        for (name, a, b) in [
            ("by crate", "use crate::m::b::B;", "fn f(a: crate::m::a::A) {}"),
            ("by super", "use super::b;", "use super::a::{self, A};"),
        ] {
            assert_eq!(
                circles(&[("m.rs", "mod a;"), ("m/a.rs", a), ("m/b.rs", b)]),
                ["m/a.rs, m/b.rs"],
                "{name}"
            );
        }
        assert_eq!(circles(&[("m.rs", "fn f() { a::f() }"), ("m/a.rs", "use super::M;")]), ["m.rs, m/a.rs"]);
        assert_eq!(circles(&[("lib.rs", "fn f() { a::f() }"), ("a.rs", "use crate::M;")]), ["a.rs, lib.rs"]);
        let three =
            [("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c::C;"), ("c.rs", "use crate::a::A;")];
        assert_eq!(circles(&three), ["a.rs, b.rs, c.rs"]);
    }

    #[test]
    fn one_way_is_no_circle_and_neither_is_a_name_that_is_only_shown() {
        assert!(circles(&[("m.rs", "fn f() { a::f() }"), ("m/a.rs", "use crate::other::O;")]).is_empty());
        assert!(
            circles(&[("m.rs", "mod a;\npub use a::A;\nstruct M;"), ("m/a.rs", "use super::M;")]).is_empty()
        );
        // A file that names itself.
        assert!(circles(&[("m.rs", "use crate::m::M;")]).is_empty());
        assert!(circles(&[("main.rs", "use m::run;"), ("m.rs", "use crate::X;")]).is_empty());
    }

    #[test]
    fn a_name_that_is_shown_belongs_to_the_file_it_comes_from() {
        let parent = ("m.rs", "pub use a::A;\npub(crate) use b::B as Renamed;");
        let a = ("m/a.rs", "use super::Renamed;");
        assert_eq!(circles(&[parent, a, ("m/b.rs", "use crate::m::A;")]), ["m/a.rs, m/b.rs"]);
        // Round and round it goes, and the look ends.
        assert!(circles(&[("a.rs", "pub use crate::b::X;"), ("b.rs", "pub use crate::a::X;")]).is_empty());
    }

    #[test]
    fn the_known_circles_may_only_become_less() {
        let sources = sources(&[
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
            ("c.rs", "use crate::a::A;"),
        ]);
        let check = |known: &[&[&str]]| problems(&[Graph::of(&sources)], known);
        assert_eq!(check(&[&["a.rs", "b.rs"]]), Vec::<String>::new());
        let unknown = check(&[]);
        assert!(unknown.len() == 1 && unknown[0].contains("a.rs → b.rs; b.rs → a.rs"), "{unknown:?}");
        let smaller = check(&[&["a.rs", "b.rs", "c.rs"]]);
        assert!(smaller.len() == 1 && smaller[0].contains("put a.rs, b.rs in their place"), "{smaller:?}");
        let gone = check(&[&["a.rs", "b.rs"], &["c.rs", "d.rs"]]);
        assert!(gone.len() == 1 && gone[0].contains("put nothing"), "{gone:?}");
    }
}
