//! Reads a mesh file: a directory of YAML files, or one of them.
//!
//! The only place that opens these files. Bounds how much it reads. What the objects in them mean is
//! [`crate::translate`]'s business.

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use ztunnel_mesh::source::loss::Census;
use ztunnel_mesh::source::pod::LocalPod;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_runtime::files;

use crate::decode::Collector;
use crate::diagnostic::Diagnostic;
use crate::translate;
use crate::translate::NamedNetns;
use crate::translate::Options;

/// What a mesh file says to one node.
#[derive(Debug)]
pub struct Loaded {
    /// The whole mesh.
    pub mesh: Mesh,
    /// The pods of this node that are to be captured.
    pub pods: Vec<LocalPod>,
    /// What was understood, but perhaps not meant.
    pub warnings: Vec<Diagnostic>,
    /// The network namespaces of the pods, and where they are named.
    pub netns: Vec<NamedNetns>,
    /// What was named, to be compared with other versions.
    pub census: Census,
}

/// A mesh file, and for whom it is read.
#[derive(Debug, Clone)]
pub struct Place {
    /// A directory or one file.
    pub path: PathBuf,
    /// The name of this node.
    pub node: Arc<str>,
    /// Whether warnings count as errors.
    pub strict: bool,
}

impl Place {
    /// [`load`]s it.
    pub fn load(&self) -> Result<Loaded, Vec<Diagnostic>> {
        let loaded = load(&self.path, &self.node)?;
        match self.strict && !loaded.warnings.is_empty() {
            true => Err(loaded.warnings.into_iter().map(Diagnostic::counted).collect()),
            false => Ok(loaded),
        }
    }
}

/// How much all files together may hold: some 6,000 pods as `kubectl` prints them, or ten times as many written
/// by hand. Reading takes some 30 times as much memory for a moment.
pub(super) const BYTES_MAX: u64 = 32 << 20;

/// How many remarks are made on one load. A mistake is often made in every object.
const DIAGNOSTICS_MAX: usize = 1000;

/// Of a file with comments at most.
const NOTHING: &str = "holds no object";

/// An empty file may be one that is just being written, or that a full disk has cut.
const EMPTY_LIST: &str =
    "for a mesh without anything, write an empty list: {apiVersion: v1, kind: List, items: []}";

/// How many files a directory may have.
const FILES_MAX: usize = 10_000;

/// Reads the mesh file at `path` (a directory or one file) as the node named `node`.
///
/// In a directory every `*.yaml`, `*.yml` and `*.json` is read, in the order of the names; names that begin
/// with a dot are not, nor are directories inside. Symbolic links are followed. Blocks.
///
/// On any error nothing of it is used; what is returned then names errors and warnings, by place.
pub fn load(path: &Path, node: &str) -> Result<Loaded, Vec<Diagnostic>> {
    let mut collector = Collector::default();
    read(path, &mut collector);
    let seen = collector.files().to_vec();
    let (objects, mut diagnostics) = collector.finish();
    let nothing = seen.iter().filter(|(_, seen)| seen.census.objects == 0 && !seen.census.empty_list);
    let emptiness = if seen.len() == 1 { Diagnostic::error } else { Diagnostic::warning };
    diagnostics.extend(nothing.map(|(file, _)| emptiness(file, 0, NOTHING.to_owned()).hint(EMPTY_LIST)));
    let options = Options { node: node.to_owned() };
    let translation = translate::translate(&objects, &options);
    diagnostics.extend(translation.diagnostics);
    diagnostics.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
    let failed = diagnostics.iter().any(Diagnostic::is_error);
    if diagnostics.len() > DIAGNOSTICS_MAX {
        // What keeps the file from being applied is never crowded out.
        diagnostics.sort_by_key(|diagnostic| !diagnostic.is_error());
        let message = format!("{} more remarks are left out", diagnostics.len() - DIAGNOSTICS_MAX);
        diagnostics.truncate(DIAGNOSTICS_MAX);
        diagnostics.push(Diagnostic::warning(&display(path), 0, message));
    }
    if failed {
        return Err(diagnostics);
    }
    let mut census = translation.census;
    let empty_list = seen.iter().any(|(_, seen)| seen.census.empty_list);
    let whole = !path.is_dir() && seen.iter().all(|(_, seen)| seen.whole);
    census.complete = whole || (empty_list && census.pods.is_empty());
    census.files = seen.into_iter().map(|(file, seen)| (file, seen.census)).collect();
    let (mesh, pods, netns) = (translation.mesh, translation.pods, translation.netns);
    Ok(Loaded { mesh, pods, warnings: diagnostics, netns, census })
}

fn read(path: &Path, collector: &mut Collector) {
    let name = display(path);
    let files = match files(path, collector) {
        Ok(files) => files,
        Err(error) => {
            let message = format!("cannot be read: {error}");
            return collector.report(Diagnostic::error(&name, 0, message));
        }
    };
    if files.is_empty() {
        let message = "has no .yaml, .yml or .json file";
        return collector.report(Diagnostic::error(&name, 0, message).hint(EMPTY_LIST));
    }
    let mut left = BYTES_MAX;
    for file in files {
        let name = display(&file);
        match read_text(&file, left) {
            Ok(text) if text.trim().is_empty() => {
                collector.report(Diagnostic::error(&name, 0, "is empty").hint(EMPTY_LIST));
            }
            Ok(text) => {
                left -= text.len() as u64;
                collector.add(&name, &text);
            }
            Err(error) => {
                collector.report(Diagnostic::error(&name, 0, format!("cannot be read: {error}")));
                if error.kind() == io::ErrorKind::FileTooLarge {
                    return;
                }
            }
        }
    }
}

/// The files that make up `path`, in the order in which they are read.
fn files(path: &Path, collector: &mut Collector) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = PathBuf::from(entry?.file_name());
        let file = path.join(&name);
        if is_mesh_file(&name) {
            files.push(file);
        } else if !is_hidden(&name) && fs::metadata(&file).is_ok_and(|metadata| metadata.is_dir()) {
            let message = "directories inside a mesh directory are not read";
            let hint = "move its files up";
            collector.report(Diagnostic::warning(&display(&file), 0, message).hint(hint));
        }
        if files.len() > FILES_MAX {
            return Err(io::Error::other(format!("there are more than {FILES_MAX} files")));
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a directory's file of this name is part of the mesh file.
pub fn is_mesh_file(name: &Path) -> bool {
    let extension = name.extension().and_then(|extension| extension.to_str());
    !is_hidden(name) && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Editors keep their own files so, and Kubernetes the versions of a mounted ConfigMap.
fn is_hidden(name: &Path) -> bool {
    name.as_os_str().as_encoded_bytes().starts_with(b".")
}

pub(crate) fn read_text(file: &Path, bytes_max: u64) -> io::Result<String> {
    let bytes = files::read(file, bytes_max)?;
    if bytes.len() as u64 > bytes_max {
        let message = format!("the mesh file is larger than {} MiB in all", BYTES_MAX >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count();
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line} is not UTF-8"))
    })
}

/// A path as diagnostics name it.
pub fn display(path: &Path) -> Arc<str> {
    Arc::from(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn pod(name: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: none}}}}}}\n"
        )
    }

    fn names(loaded: &Loaded) -> Vec<&str> {
        let mut names: Vec<&str> = loaded.mesh.workloads().map(|workload| &*workload.name).collect();
        names.sort_unstable();
        names
    }

    fn said(result: Result<Loaded, Vec<Diagnostic>>, dir: &Path) -> Vec<String> {
        let said = match result {
            Ok(loaded) => loaded.warnings,
            Err(errors) => errors,
        };
        let dir = format!("{}/", dir.display());
        said.iter().map(|diagnostic| diagnostic.to_string().replace(&dir, "")).collect()
    }

    #[test]
    fn a_directory_is_read_without_what_is_hidden_or_something_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("..2026")).unwrap();
        write("..2026/mounted.yaml", &pod("mounted"));
        symlink("..2026", dir.path().join("..data")).unwrap();
        symlink("..data/mounted.yaml", dir.path().join("mounted.yaml")).unwrap();
        write("a.yml", &pod("a"));
        write("b.json", &pod("b"));
        for other in [".hidden.yaml", "c.yaml~", "d.yaml.swp", "README.md"] {
            write(other, "not: [an object");
        }
        let loaded = load(dir.path(), "n1").unwrap();
        assert_eq!(names(&loaded), ["a", "b", "mounted"]);
        assert_eq!(said(Ok(loaded), dir.path()), Vec::<String>::new());
        fs::create_dir(dir.path().join("more")).unwrap();
        assert_eq!(
            said(load(dir.path(), "n1"), dir.path()),
            ["more: warning: directories inside a mesh directory are not read (move its files up)"]
        );
        assert_eq!(names(&load(&dir.path().join("a.yml"), "n1").unwrap()), ["a"], "a file alone");
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            said(load(dir.path(), "n1"), dir.path()),
            [format!("{}: error: has no .yaml, .yml or .json file ({EMPTY_LIST})", dir.path().display())]
        );
        fs::write(dir.path().join("a.yaml"), pod("a")).unwrap();
        fs::write(dir.path().join("b.yaml"), b"a: b\nc: \xff\n").unwrap();
        symlink("gone", dir.path().join("c.yaml")).unwrap();
        fs::create_dir(dir.path().join("d.yaml")).unwrap();
        assert_eq!(
            said(load(dir.path(), "n1"), dir.path()),
            [
                "b.yaml: error: cannot be read: line 2 is not UTF-8",
                "c.yaml: error: cannot be read: No such file or directory (os error 2)",
                "d.yaml: error: cannot be read: it is not a regular file",
            ]
        );
    }

    #[test]
    fn an_empty_file_is_an_error_and_an_empty_list_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let check = |text: &str| {
            fs::write(&file, text).unwrap();
            load(&file, "n1").map(|loaded| loaded.census.complete).map_err(|said| said[0].message.clone())
        };
        assert_eq!(check(""), Err("is empty".to_owned()));
        assert_eq!(check(" \n\n"), Err("is empty".to_owned()));
        assert_eq!(check("# nothing\n---\n"), Err(NOTHING.to_owned()));
        assert_eq!(check("apiVersion: v1\nkind: List\nitems:\n"), Err(NOTHING.to_owned()), "cut off");
        assert_eq!(check("{apiVersion: v1, kind: List, items: []}"), Ok(true));
        assert_eq!(check(&pod("a")), Ok(false));
        assert_eq!(check(&(pod("a") + "...\n")), Ok(true), "an end mark");
        let list = format!("apiVersion: v1\nitems:\n- {}kind: List\nmetadata: {{}}\n", pod("a"));
        assert_eq!(check(&list), Ok(true), "as kubectl prints it");
        assert_eq!(check(&(list + "---\n" + &pod("b"))), Ok(false));
        // In a directory it may be there for later, unless it is wholly empty.
        fs::write(dir.path().join("b.yaml"), "# nothing\n").unwrap();
        assert_eq!(load(dir.path(), "n1").unwrap().warnings.len(), 1);
        fs::write(dir.path().join("b.yaml"), "").unwrap();
        assert!(load(dir.path(), "n1").is_err());
        let strict = Place { path: file, node: Arc::from("n1"), strict: true };
        fs::write(
            &strict.path,
            pod("a") + "---\n{apiVersion: v1, kind: Pod, metadata: {name: b, lables: {}}}\n",
        )
        .unwrap();
        assert!(load(&strict.path, "n1").is_ok() && strict.load().is_err());
    }

    #[test]
    fn what_is_said_is_in_the_order_of_the_places() {
        let dir = tempfile::tempdir().unwrap();
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  action: DEMY\n";
        fs::write(dir.path().join("a.yaml"), format!("{policy}---\nkind: Foo\n")).unwrap();
        fs::write(dir.path().join("b.yaml"), pod("a") + "---\n" + &pod("a")).unwrap();
        let said = said(load(dir.path(), "n1"), dir.path());
        let expected = [
            "a.yaml:5: error: \"DEMY\" is not an action (write DENY instead)",
            "a.yaml:7: warning: kind Foo is not read: skipped",
            "b.yaml:3: error: Pod default/a is there twice (remove this one or the one at b.yaml:1)",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn errors_are_not_crowded_out() {
        let dir = tempfile::tempdir().unwrap();
        let service = "{apiVersion: v1, kind: Service, metadata: {name: a#}}\n---\n";
        let mut text: String = (0..2000).map(|n| service.replace('#', &n.to_string())).collect();
        text += "kind: [";
        fs::write(dir.path().join("a.yaml"), &text).unwrap();
        let said = load(dir.path(), "n1").unwrap_err();
        assert!(said.len() == 1 && said[0].is_error(), "a text that is not YAML gives no objects: {said:?}");
        text = text.replace("kind: [", "kind: Pod");
        fs::write(dir.path().join("a.yaml"), &text).unwrap();
        let said = load(dir.path(), "n1").unwrap_err();
        assert_eq!(said.len(), DIAGNOSTICS_MAX + 1);
        assert!(said[0].is_error());
        assert_eq!(said[DIAGNOSTICS_MAX].message, "1001 more remarks are left out");
    }

    #[test]
    fn too_much_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("a.yaml")).unwrap();
        file.set_len(BYTES_MAX + 1).unwrap();
        assert_eq!(
            said(load(dir.path(), "n1"), dir.path()),
            ["a.yaml: error: cannot be read: the mesh file is larger than 32 MiB in all"]
        );
    }
}
