//! Loads a mesh file again whenever it changes.
//!
//! A change is seen by names, inodes, sizes and times of all files. Whether it is worth while to look at all of them is
//! asked a few times a second: something is announced in the directory (inotify), or the directory is another one or
//! has other entries, as after the swap of a symbolic link above it. Not everything is announced (another node's
//! write to a shared file system, a write to what a symbolic link points to), so they are looked at every few
//! seconds anyway, and always if there are symbolic links among them. Does not know what a mesh file says, and
//! keeps no last good one: whoever receives an error simply does not apply it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::AddWatchFlags;
use nix::sys::inotify::InitFlags;
use nix::sys::inotify::Inotify;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio::time::sleep;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::file;
use ztunnel_objects::file::Loaded;
use ztunnel_objects::file::Place;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

/// How often it is asked whether there may be a change.
const LOOK: Duration = Duration::from_millis(200);

/// How many times in a row the files are not looked at when there seems to be none.
const UNANNOUNCED: u32 = 25;

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

/// Watches a mesh file (see [`file::load`]), until `signal` says that the process ends. Runs on the runtime of the
/// caller; reads on its blocking threads.
pub fn watch(place: Place, signal: Signal) -> Updates {
    let (sender, receiver) = mpsc::channel(1);
    let _task = shutdown::spawn(run(place, signal, sender));
    Updates(receiver)
}

async fn run(place: Place, mut signal: Signal, sender: mpsc::Sender<Result<Loaded, Vec<Diagnostic>>>) {
    let watched = Arc::new(Mutex::new(Watched::new(Arc::from(place.path.as_path()))));
    let mut applied = look(&watched).await;
    let mut pending = Some(load(&place).await);
    loop {
        tokio::select! {
            permit = sender.reserve(), if pending.is_some() => match permit {
                Ok(permit) => if let Some(update) = pending.take() { permit.send(update) },
                Err(_) => return,
            },
            () = sleep(LOOK) => {
                if glance(&watched).await.is_some_and(|seen| seen != applied) {
                    applied = settled(&watched).await;
                    pending = Some(load(&place).await);
                }
            }
            () = sender.closed() => return,
            () = signal.closing() => return,
        }
    }
}

/// Waits until the files stay as they are, but not for long.
async fn settled(watched: &Arc<Mutex<Watched>>) -> Stamp {
    let deadline = Instant::now() + SETTLE_MAX;
    let mut before = look(watched).await;
    loop {
        sleep(SETTLE).await;
        let after = look(watched).await;
        if after == before || Instant::now() >= deadline {
            return after;
        }
        before = after;
    }
}

/// Loads it now, on a thread that may wait for a slow file system.
pub(super) async fn load(place: &Place) -> Result<Loaded, Vec<Diagnostic>> {
    let owned = place.clone();
    let loading = spawn_blocking(move || owned.load());
    loading.await.unwrap_or_else(|error| {
        let name = file::display(&place.path);
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

impl File {
    fn at(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

async fn look(watched: &Arc<Mutex<Watched>>) -> Stamp {
    // A look that failed is like one that showed nothing: the load that follows says why.
    blocking(watched, Watched::look).await.unwrap_or(Stamp(Vec::new()))
}

/// `None` if there seems to be no change.
async fn glance(watched: &Arc<Mutex<Watched>>) -> Option<Stamp> {
    blocking(watched, |watched| watched.gives_cause().then(|| watched.look())).await.unwrap_or_default()
}

/// On a thread that may wait for a slow file system.
async fn blocking<T: Send + 'static>(
    watched: &Arc<Mutex<Watched>>,
    work: impl FnOnce(&mut Watched) -> T + Send + 'static,
) -> Option<T> {
    let watched = Arc::clone(watched);
    spawn_blocking(move || work(&mut watched.lock())).await.ok()
}

/// The path, and what tells whether a look at the files is worth while.
struct Watched {
    path: Arc<Path>,
    /// Without it every look is one at the files.
    announcements: Option<Inotify>,
    /// The path itself, at the last look.
    top: Option<File>,
    /// Whether there were symbolic links: what they point to may be anywhere.
    links: bool,
    /// How many looks have been spared since.
    spared: u32,
}

impl Watched {
    fn new(path: Arc<Path>) -> Self {
        let announcements = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .inspect_err(|error| tracing::debug!(%error, "no inotify: the mesh files are polled"));
        Self { path, announcements: announcements.ok(), top: None, links: false, spared: 0 }
    }

    /// Whether there may be a change since the last look.
    fn gives_cause(&mut self) -> bool {
        let silent = self
            .announcements
            .as_ref()
            .is_some_and(|inotify| matches!(inotify.read_events(), Err(Errno::EAGAIN)));
        self.spared += 1;
        !silent || self.links || self.spared > UNANNOUNCED || File::at(&self.path) != self.top
    }

    fn look(&mut self) -> Stamp {
        let what = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        // Before the look, so that nothing is missed after it. Without a watch the change of the path's own stamp, or
        // the next look that is not spared, tells.
        let _unwatched = self.announcements.as_ref().map(|inotify| inotify.add_watch(&*self.path, what));
        self.spared = 0;
        self.top = File::at(&self.path);
        let mut links = false;
        let mut files: Vec<(OsString, Option<File>)> = match fs::read_dir(&self.path) {
            Ok(entries) => entries
                .filter_map(|entry| {
                    let entry = entry.ok()?;
                    let name = entry.file_name();
                    if !file::is_mesh_file(Path::new(&name)) {
                        return None;
                    }
                    links |= entry.file_type().map_or(true, |kind| kind.is_symlink());
                    let file = File::at(&entry.path());
                    Some((name, file))
                })
                .collect(),
            Err(_) => vec![(self.path.as_os_str().to_owned(), File::at(&self.path))],
        };
        self.links = links;
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        Stamp(files)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use tokio::time::timeout;

    use super::*;

    fn pod(name: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: none}}}}}}\n"
        )
    }

    fn place(path: PathBuf) -> Place {
        Place { path, node: Arc::from("n1"), strict: false }
    }

    /// The next load's pods, or what was said. Waits longer than a busy machine takes.
    async fn next(updates: &mut Updates) -> Result<Vec<String>, Vec<String>> {
        let update = timeout(Duration::from_secs(60), updates.next()).await.expect("an update");
        match update.expect("the watch goes on") {
            Ok(loaded) => Ok(loaded.mesh.workloads().map(|workload| workload.name.to_string()).collect()),
            Err(said) => Err(said.iter().map(|diagnostic| diagnostic.message.clone()).collect()),
        }
    }

    /// Writes it in one step: a load may come in the middle of several.
    fn put(path: &Path, text: &str) {
        let whole = path.with_file_name(".whole");
        fs::write(&whole, text).unwrap();
        fs::rename(&whole, path).unwrap();
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
        let mut updates = watch(place(dir.path().to_owned()), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));

        let mut open = fs::OpenOptions::new().write(true).open(&file).unwrap();
        std::io::Write::write_all(&mut open, pod("b").as_bytes()).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["b"]), "written in place");

        put(&file, &pod("c"));
        assert_eq!(next(&mut updates).await, pods(&["c"]), "renamed over, as editors do");

        put(&file, "kind: [");
        let said = next(&mut updates).await.unwrap_err();
        assert!(said[0].starts_with("not YAML"), "{said:?}");

        put(&file, &pod("d"));
        assert_eq!(next(&mut updates).await, pods(&["d"]), "after a slip");

        fs::remove_dir_all(dir.path()).unwrap();
        let said = next(&mut updates).await.unwrap_err();
        assert!(said[0].starts_with("cannot be read"), "{said:?}");

        fs::create_dir(dir.path()).unwrap();
        put(&file, &pod("e"));
        // It may have been seen while it was empty.
        while next(&mut updates).await != pods(&["e"]) {}

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
        let mut updates = watch(place(dir.path().to_owned()), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));
        symlink("..2", dir.path().join("..data_tmp")).unwrap();
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(next(&mut updates).await, pods(&["b"]));
    }

    #[test]
    fn files_are_looked_at_only_for_a_cause() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, pod("a")).unwrap();
        let mut watched = Watched::new(Arc::from(dir.path()));
        let before = watched.look();
        assert!(!watched.gives_cause());

        let mut open = fs::OpenOptions::new().append(true).open(&file).unwrap();
        std::io::Write::write_all(&mut open, b"# more\n").unwrap();
        assert!(watched.gives_cause(), "written in place");
        assert_ne!(watched.look(), before);
        assert!(!watched.gives_cause());

        fs::write(dir.path().join("b.yaml"), pod("b")).unwrap();
        assert!(watched.gives_cause(), "a new file");
        watched.look();
        fs::remove_dir_all(dir.path()).unwrap();
        fs::create_dir(dir.path()).unwrap();
        assert!(watched.gives_cause(), "another directory");
        watched.look();
        fs::write(&file, pod("c")).unwrap();
        assert!(watched.gives_cause(), "a file in it");
        watched.look();
        let causes = (0..2 * UNANNOUNCED).filter(|_| watched.gives_cause() && !watched.look().0.is_empty());
        assert_eq!(causes.count(), 1, "now and then without a cause");

        symlink(&file, dir.path().join("link.yaml")).unwrap();
        watched.look();
        assert!((0..10).all(|_| watched.gives_cause()), "what a link points to may be anywhere");
    }

    #[tokio::test]
    async fn after_several_writes_the_last_one_holds() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, pod("a")).unwrap();
        let (_trigger, signal) = shutdown::channel();
        let mut updates = watch(place(file.clone()), signal);
        assert_eq!(next(&mut updates).await, pods(&["a"]));
        fs::write(&file, pod("b")).unwrap();
        fs::write(&file, pod("c")).unwrap();
        // As a rule both are one change, but a busy machine may let them be two.
        while next(&mut updates).await != pods(&["c"]) {}
    }
}
