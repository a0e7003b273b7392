//! Loads a mesh file again whenever it changes.
//!
//! Looks at names, inodes, sizes and times a few times a second. That costs less than it seems and sees what
//! change notifications do not: a swapped symbolic link above the files, a directory that is removed and made
//! again, another node's write to a shared file system, an overflown queue. Does not know what a mesh file
//! says, and keeps no last good one: whoever receives an error simply does not apply it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio::time::sleep;

use crate::shutdown;
use crate::shutdown::Signal;
use crate::standalone::diagnostic::Diagnostic;
use crate::standalone::file;
use crate::standalone::file::Loaded;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// For how long files must stay as they are before they are read: whoever writes several files, or one in
/// several steps, should be done.
const SETTLE: Duration = Duration::from_millis(100);

/// After this time they are read though they still change, so that a change applies within a second even
/// if something else writes without end.
const SETTLE_MAX: Duration = Duration::from_millis(500);

const _: () = assert!(LOOK.as_millis() + SETTLE_MAX.as_millis() + SETTLE.as_millis() < 1000);

/// What became of a mesh file, load by load.
#[derive(Debug)]
pub struct Updates(mpsc::Receiver<Result<Loaded, Vec<Diagnostic>>>);

impl Updates {
    /// The next load: at first what the files say now, then once for each change. On an error the last good
    /// load stays in force. `None` once the process ends.
    ///
    /// While nobody asks, changes are joined: at most one load waits here and one, the latest, behind it.
    pub async fn next(&mut self) -> Option<Result<Loaded, Vec<Diagnostic>>> {
        self.0.recv().await
    }
}

/// Watches the mesh file at `path` as the node named `node` (see [`file::load`]), until `signal` says that the
/// process ends. Runs on the runtime of the caller; reads on its blocking threads.
pub fn watch(path: PathBuf, node: String, signal: Signal) -> Updates {
    let (sender, receiver) = mpsc::channel(1);
    let _task = shutdown::spawn(run(Arc::from(path), Arc::from(node), signal, sender));
    Updates(receiver)
}

async fn run(
    path: Arc<Path>,
    node: Arc<str>,
    mut signal: Signal,
    sender: mpsc::Sender<Result<Loaded, Vec<Diagnostic>>>,
) {
    let mut applied = look(&path).await;
    let mut pending = Some(load(&path, &node).await);
    loop {
        tokio::select! {
            permit = sender.reserve(), if pending.is_some() => match permit {
                Ok(permit) => if let Some(update) = pending.take() { permit.send(update) },
                Err(_) => return,
            },
            () = sleep(LOOK) => {
                if look(&path).await != applied {
                    applied = settled(&path).await;
                    pending = Some(load(&path, &node).await);
                }
            }
            () = sender.closed() => return,
            () = signal.closing() => return,
        }
    }
}

/// Waits until the files stay as they are, but not for long.
async fn settled(path: &Arc<Path>) -> Stamp {
    let deadline = Instant::now() + SETTLE_MAX;
    let mut before = look(path).await;
    loop {
        sleep(SETTLE).await;
        let after = look(path).await;
        if after == before || Instant::now() >= deadline {
            return after;
        }
        before = after;
    }
}

async fn load(path: &Arc<Path>, node: &Arc<str>) -> Result<Loaded, Vec<Diagnostic>> {
    let (owned, node) = (Arc::clone(path), Arc::clone(node));
    let loading = spawn_blocking(move || file::load(&owned, &node));
    loading.await.unwrap_or_else(|error| {
        let name = Arc::from(path.display().to_string());
        Err(vec![Diagnostic::error(&name, 0, format!("reading it failed: {error}"))])
    })
}

/// What a look at the files shows. Two that are the same mean that nothing was written in between.
#[derive(Debug, PartialEq, Eq)]
struct Stamp(Vec<(OsString, Option<File>)>);

/// One file as `stat` shows it, symbolic links followed.
#[derive(Debug, PartialEq, Eq)]
struct File {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Changes with every write, even if the time of modification is set back.
    changed: (i64, i64),
}

async fn look(path: &Arc<Path>) -> Stamp {
    let path = Arc::clone(path);
    // A look that failed is like one that showed nothing: the load that follows says why.
    spawn_blocking(move || stamp(&path)).await.unwrap_or(Stamp(Vec::new()))
}

fn stamp(path: &Path) -> Stamp {
    let stat = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some(File {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    };
    let mut files: Vec<(OsString, Option<File>)> = match fs::read_dir(path) {
        Ok(entries) => entries
            .filter_map(|entry| Some(entry.ok()?.file_name()))
            .filter(|name| file::is_mesh_file(Path::new(name)))
            .map(|name| {
                let file = stat(&path.join(&name));
                (name, file)
            })
            .collect(),
        Err(_) => vec![(path.as_os_str().to_owned(), stat(path))],
    };
    files.sort_by(|(a, _), (b, _)| a.cmp(b));
    Stamp(files)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tokio::time::timeout;

    use super::*;

    fn pod(name: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: none}}}}}}\n"
        )
    }

    /// The next load's pods, or what was said. Waits longer than a busy machine takes.
    async fn next(updates: &mut Updates) -> Result<Vec<String>, Vec<String>> {
        let update = timeout(Duration::from_secs(20), updates.next()).await.expect("an update");
        match update.expect("the watch goes on") {
            Ok(loaded) => Ok(loaded.mesh.workloads().map(|workload| workload.name.to_string()).collect()),
            Err(said) => Err(said.iter().map(|diagnostic| diagnostic.message.clone()).collect()),
        }
    }

    fn pods(names: &[&str]) -> Result<Vec<String>, Vec<String>> {
        Ok(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[tokio::test]
    async fn changes_are_loaded_and_slips_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, pod("a")).unwrap();
        let (trigger, signal) = shutdown::channel();
        let mut updates = watch(dir.path().to_owned(), "n1".to_owned(), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));

        fs::write(&file, pod("b")).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["b"]), "written in place");

        let other = dir.path().join(".a.yaml.new");
        fs::write(&other, pod("c")).unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["c"]), "renamed over, as editors do");

        fs::write(&file, "kind: [").unwrap();
        let said = next(&mut updates).await.unwrap_err();
        assert!(said[0].starts_with("not YAML"), "{said:?}");

        fs::write(&file, pod("d")).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["d"]), "after a slip");

        fs::remove_dir_all(dir.path()).unwrap();
        let said = next(&mut updates).await.unwrap_err();
        assert!(said[0].starts_with("cannot be read"), "{said:?}");

        fs::create_dir(dir.path()).unwrap();
        fs::write(&file, pod("e")).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["e"]), "made again");

        trigger.close();
        assert!(updates.next().await.is_none());
    }

    #[tokio::test]
    async fn a_swapped_symbolic_link_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        for (version, name) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("pods.yaml"), pod(name)).unwrap();
        }
        symlink("..1", dir.path().join("..data")).unwrap();
        symlink("..data/pods.yaml", dir.path().join("pods.yaml")).unwrap();
        let (_trigger, signal) = shutdown::channel();
        let mut updates = watch(dir.path().to_owned(), "n1".to_owned(), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));
        symlink("..2", dir.path().join("..data_tmp")).unwrap();
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["b"]));
    }

    #[tokio::test]
    async fn after_several_writes_the_last_one_holds() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, pod("a")).unwrap();
        let (_trigger, signal) = shutdown::channel();
        let mut updates = watch(file.clone(), "n1".to_owned(), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));
        fs::write(&file, pod("b")).unwrap();
        fs::write(&file, pod("c")).unwrap();
        // As a rule both are one change, but a busy machine may let them be two.
        while next(&mut updates).await != pods(&["c"]) {}
    }
}
