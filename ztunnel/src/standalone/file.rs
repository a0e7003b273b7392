//! Reads a mesh file: a directory of YAML files, or one of them.
//!
//! The only place that opens these files. Bounds how much it reads. What the objects in them mean is
//! [`crate::standalone::translate`]'s business.

use std::fs;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use crate::enrol::pod::LocalPod;
use crate::mesh::index::Mesh;
use crate::standalone::decode::Collector;
use crate::standalone::diagnostic::Diagnostic;
use crate::standalone::translate;
use crate::standalone::translate::Options;

/// What a mesh file says to one node.
#[derive(Debug)]
pub struct Loaded {
    /// The whole mesh.
    pub mesh: Mesh,
    /// The pods of this node that are to be captured.
    pub pods: Vec<LocalPod>,
    /// What was understood, but perhaps not meant.
    pub warnings: Vec<Diagnostic>,
}

/// How much all files together may hold. A pod as `kubectl` prints it takes some 5 KiB.
const BYTES_MAX: u64 = 64 << 20;

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
    let (objects, mut diagnostics) = collector.finish();
    let options = Options { node: node.to_owned() };
    let translation = translate::translate(&objects, &options);
    diagnostics.extend(translation.diagnostics);
    diagnostics.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
    if diagnostics.iter().any(Diagnostic::is_error) {
        return Err(diagnostics);
    }
    Ok(Loaded { mesh: translation.mesh, pods: translation.pods, warnings: diagnostics })
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
        let hint = "for a mesh without anything, write an empty one";
        return collector.report(Diagnostic::error(&name, 0, message).hint(hint));
    }
    let mut left = BYTES_MAX;
    for file in files {
        let name = display(&file);
        match read_text(&file, left) {
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
pub(crate) fn is_mesh_file(name: &Path) -> bool {
    let extension = name.extension().and_then(|extension| extension.to_str());
    !is_hidden(name) && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Editors keep their own files so, and Kubernetes the versions of a mounted ConfigMap.
fn is_hidden(name: &Path) -> bool {
    name.as_os_str().as_encoded_bytes().starts_with(b".")
}

fn read_text(file: &Path, bytes_max: u64) -> io::Result<String> {
    // Asked before it is opened: opening a pipe would wait for its writer.
    let metadata = fs::metadata(file)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    fs::File::open(file)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
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

fn display(path: &Path) -> Arc<str> {
    Arc::from(path.display().to_string())
}
