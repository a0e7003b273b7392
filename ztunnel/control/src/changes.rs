//! What of a mesh file's versions is carried out, and when.
//!
//! Between [`crate::watch`], which loads every version, and whoever carries versions out: one with
//! errors is not, one that looks as if everything were gone waits ([`ztunnel_mesh::source::loss`]), and of both it is told why.

use std::path::Path;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio::time::sleep_until;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::source::loss::Caution;
use ztunnel_mesh::source::loss::Census;
use ztunnel_mesh::source::loss::Change;
use ztunnel_mesh::source::loss::Verdict;
use ztunnel_mesh::source::status::REMEDY;
use ztunnel_mesh::source::status::Reload;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::source::status::Trouble;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::file;
use ztunnel_objects::file::Loaded;
use ztunnel_objects::file::Place;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

use crate::watch;
use crate::watch::Updates;

type Load = Result<Loaded, Vec<Diagnostic>>;
type Answer = oneshot::Sender<Result<String, String>>;

/// The versions of a mesh file that are to be carried out.
pub struct Changes {
    place: Place,
    updates: Updates,
    wishes: mpsc::Receiver<Reload>,
    /// A load that somebody wished for, whether by force, and who waits for what comes of it.
    wished: Option<(JoinHandle<Load>, bool, Answer)>,
    /// After the version that was returned last it is to be said that everything else is meant, too.
    confirmed: bool,
    /// Of the version in force.
    census: Census,
    /// Of the first version; it cannot change while the daemon runs.
    trust_domain: TrustDomain,
    caution: Caution<Loaded>,
    source: Source,
}

/// What is to be done next.
#[derive(Debug)]
pub enum Next {
    /// Carry this version out.
    Apply(Box<Loaded>),
    /// What was in doubt otherwise is meant as well.
    Confirmed,
}

enum Woken {
    Update(Option<Load>),
    Wish(Reload),
    Wished(Load),
    Again,
}

impl Changes {
    /// Watches a mesh file until `signal` says that the process ends, and returns its first version besides; `None`
    /// where the process ends already. How it stands is told to `source`.
    pub async fn open(
        place: Place,
        wishes: mpsc::Receiver<Reload>,
        source: Source,
        signal: Signal,
    ) -> Result<Option<(Self, Loaded)>, Vec<Diagnostic>> {
        let mut updates = watch::watch(place.clone(), signal);
        let Some(loaded) = updates.next().await.transpose()? else { return Ok(None) };
        let changes = Self {
            place,
            updates,
            wishes,
            wished: None,
            confirmed: false,
            census: loaded.census.clone(),
            trust_domain: loaded.mesh.trust_domain().clone(),
            caution: Caution::default(),
            source,
        };
        changes.source.applied();
        Ok(Some((changes, loaded)))
    }

    /// What is to be done next; `None` once the process ends. Cancel-safe.
    pub async fn next(&mut self) -> Option<Next> {
        if std::mem::take(&mut self.confirmed) {
            return Some(Next::Confirmed);
        }
        loop {
            let woken = self.woken().await;
            let now = Instant::now();
            let next = match woken {
                Woken::Update(None) => return None,
                Woken::Update(Some(load)) => self.judge(load, now),
                Woken::Again => {
                    let census = &self.census;
                    let again = |loaded: &Loaded| Change::between(census, &loaded.census, is_gone);
                    let loaded = self.caution.again(again, now);
                    self.tell(loaded.is_some(), false);
                    loaded
                }
                Woken::Wish(Reload { force, answer }) => {
                    let place = self.place.clone();
                    let load = shutdown::spawn(async move { watch::load(&place).await });
                    self.wished = Some((load, force, answer));
                    continue;
                }
                Woken::Wished(load) => {
                    let Some((_, force, answer)) = self.wished.take() else { continue };
                    let loaded = self.judge(load, now);
                    let doubted = if force { self.caution.confirm() } else { None };
                    if doubted.is_some() {
                        self.source.applied();
                    }
                    let outcome = self.outcome();
                    let confirmed = force && outcome.is_ok();
                    // Whoever wished may be gone.
                    let _gone = answer.send(outcome);
                    match loaded.or(doubted) {
                        Some(loaded) => {
                            self.confirmed = confirmed;
                            Some(loaded)
                        }
                        None if confirmed => return Some(Next::Confirmed),
                        None => None,
                    }
                }
            };
            if let Some(loaded) = next {
                self.census = loaded.census.clone();
                return Some(Next::Apply(Box::new(loaded)));
            }
        }
    }

    async fn woken(&mut self) -> Woken {
        let wake = self.caution.wake();
        let again = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let is_wished = self.wished.is_some();
        let wished = async {
            match &mut self.wished {
                Some((load, ..)) => load.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            load = wished => Woken::Wished(load.unwrap_or_else(|error| {
                let name = file::display(&self.place.path);
                Err(vec![Diagnostic::error(&name, 0, format!("reading it failed: {error}"))])
            })),
            Some(wish) = self.wishes.recv(), if !is_wished => Woken::Wish(wish),
            update = self.updates.next() => Woken::Update(update),
            () = again => Woken::Again,
        }
    }

    /// The version, if it may be carried out now; tells why if not.
    fn judge(&mut self, load: Load, now: Instant) -> Option<Loaded> {
        let loaded = match load {
            Ok(loaded) if *loaded.mesh.trust_domain() == self.trust_domain => loaded,
            Ok(loaded) => {
                let (new, old) = (loaded.mesh.trust_domain(), &self.trust_domain);
                self.reject(vec![format!(
                    "its trust domain is {new} and not {old}: stop all daemons, remove the root of the old one from \
                     the state directory, and start them again"
                )]);
                return None;
            }
            Err(diagnostics) => {
                let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error());
                self.reject(errors.map(Diagnostic::to_string).collect());
                return None;
            }
        };
        let change = Change::between(&self.census, &loaded.census, is_gone);
        let loaded = self.caution.offer(loaded, change, now);
        self.tell(loaded.is_some(), true);
        loaded
    }

    fn reject(&mut self, reasons: Vec<String>) {
        // What was in doubt is not what the files say any more.
        self.caution.forget();
        for error in &reasons {
            tracing::error!(error, "the changed mesh file is not applied; the last good one stays in force");
        }
        self.source.refused(Trouble::Rejected, reasons, true);
    }

    fn tell(&self, applied: bool, new: bool) {
        match self.caution.doubt() {
            _ if applied => self.source.applied(),
            None => {}
            Some((change, verdict)) => {
                let trouble = match verdict {
                    Verdict::Hold => Trouble::Held,
                    Verdict::Apply | Verdict::Wait => Trouble::Waiting,
                };
                let reason = change.to_string();
                match trouble {
                    Trouble::Held if new => tracing::error!(
                        reason,
                        "the changed mesh file is held, and the last one stays in force; {REMEDY}"
                    ),
                    _ if new => {
                        tracing::warn!(reason, "the changed mesh file is applied if it stays so for a while")
                    }
                    _ => {}
                }
                self.source.refused(trouble, vec![reason], new);
            }
        }
    }

    fn outcome(&self) -> Result<String, String> {
        match self.source.refusal() {
            None => Ok("the mesh files are in force as they are".to_owned()),
            Some(refused) => Err(refused.to_string()),
        }
    }
}

/// Whether a network namespace exists no more. One that cannot be looked at may well exist.
fn is_gone(netns: &Path) -> bool {
    std::fs::symlink_metadata(netns).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::Arc;

    use ztunnel_mesh::source::status::reloads;

    use super::*;

    /// A directory whose files are network namespaces, as far as that matters here, and a mesh file of pods in them.
    struct World {
        dir: tempfile::TempDir,
    }

    impl World {
        fn new(pods: &[&str]) -> Self {
            let world = Self { dir: tempfile::tempdir().unwrap() };
            fs::create_dir(world.dir.path().join("netns")).unwrap();
            for pod in pods {
                fs::write(world.netns(pod), "").unwrap();
            }
            world.write(pods);
            world
        }

        fn netns(&self, pod: &str) -> PathBuf {
            self.dir.path().join("netns").join(pod)
        }

        fn file(&self) -> PathBuf {
            self.dir.path().join("mesh.yaml")
        }

        fn place(&self) -> Place {
            Place { path: self.file(), node: Arc::from("n1"), strict: false }
        }

        fn write(&self, pods: &[&str]) {
            fs::write(self.file(), self.text(pods)).unwrap();
        }

        fn text(&self, pods: &[&str]) -> String {
            let namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: \
                             {istio.io/dataplane-mode: ambient}}}\n";
            let pod = |(place, name): (usize, &&str)| {
                let netns = self.netns(name);
                let netns = netns.display();
                format!(
                    "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{ztunnel.io/netns: \
                     {netns}, ztunnel.io/ips: 10.0.0.{}}}}}}}\n",
                    place + 1
                )
            };
            namespace.to_owned() + &pods.iter().enumerate().map(pod).collect::<String>()
        }
    }

    fn pods(next: Option<Next>) -> Vec<String> {
        let Some(Next::Apply(loaded)) = next else { panic!("{next:?}") };
        let mut names: Vec<_> = loaded.pods.iter().map(|pod| pod.name.to_string()).collect();
        names.sort_unstable();
        names
    }

    #[tokio::test]
    async fn an_emptied_file_changes_nothing_and_says_so() {
        let world = World::new(&["a", "b"]);
        let (_trigger, signal) = shutdown::channel();
        let (reloader, wishes) = reloads();
        let source = Source::default();
        let opened = Changes::open(world.place(), wishes, source.clone(), signal).await.unwrap();
        let (mut changes, first) = opened.unwrap();
        assert_eq!(first.pods.len(), 2);

        // What a shell does before it writes.
        fs::write(world.file(), "").unwrap();
        let told = shutdown::spawn({
            let reloader = reloader.clone();
            async move { (reloader.reload(false).await, reloader.reload(true).await) }
        });
        tokio::select! {
            next = changes.next() => panic!("{next:?}"),
            told = told => {
                let (unforced, forced) = told.unwrap();
                assert!(unforced.unwrap().is_err() && forced.unwrap().is_err());
            }
        }
        let refused = source.refusal().unwrap();
        assert_eq!(refused.trouble, Trouble::Rejected);
        assert!(refused.to_string().contains("is empty"), "{refused}");

        world.write(&["a", "b", "c"]);
        assert_eq!(pods(changes.next().await), ["a", "b", "c"]);
        assert_eq!(source.refusal(), None);
    }

    #[tokio::test]
    async fn a_file_without_its_pods_is_held_until_it_is_forced() {
        let world = World::new(&["a", "b"]);
        let (_trigger, signal) = shutdown::channel();
        let (reloader, wishes) = reloads();
        let source = Source::default();
        let opened = Changes::open(world.place(), wishes, source.clone(), signal).await.unwrap();
        let (mut changes, _) = opened.unwrap();

        world.write(&[]);
        let told =
            shutdown::spawn(async move { (reloader.reload(false).await, reloader.reload(true).await) });
        assert_eq!(pods(changes.next().await), Vec::<String>::new());
        let (unforced, forced) = told.await.unwrap();
        let unforced = unforced.unwrap().unwrap_err();
        assert!(unforced.contains("2 of 2 pods") && unforced.contains("--force"), "{unforced}");
        assert!(forced.unwrap().is_ok());
        assert_eq!(source.refusal(), None);
        assert!(source.tally().held > 0);
    }

    #[tokio::test]
    async fn a_file_of_which_only_the_end_is_missing_is_held_until_it_is_forced() {
        let world = World::new(&["a", "b", "c"]);
        let (_trigger, signal) = shutdown::channel();
        let (reloader, wishes) = reloads();
        let source = Source::default();
        let opened = Changes::open(world.place(), wishes, source.clone(), signal).await.unwrap();
        let (mut changes, _) = opened.unwrap();

        // One of three, and it still exists.
        world.write(&["a", "b"]);
        let told =
            shutdown::spawn(async move { (reloader.reload(false).await, reloader.reload(true).await) });
        assert_eq!(pods(changes.next().await), ["a", "b"]);
        let (unforced, forced) = told.await.unwrap();
        let unforced = unforced.unwrap().unwrap_err();
        assert!(unforced.contains("mesh.yaml seems to be cut off"), "{unforced}");
        assert!(unforced.contains("--force"), "{unforced}");
        assert!(forced.unwrap().is_ok());
    }

    #[tokio::test]
    async fn pods_that_are_gone_hold_nothing_up() {
        let world = World::new(&["a", "b"]);
        let (_trigger, signal) = shutdown::channel();
        let (_reloader, wishes) = reloads();
        let source = Source::default();
        let opened = Changes::open(world.place(), wishes, source.clone(), signal).await.unwrap();
        let (mut changes, _) = opened.unwrap();
        for pod in ["a", "b"] {
            fs::remove_file(world.netns(pod)).unwrap();
        }
        world.write(&[]);
        assert_eq!(pods(changes.next().await), Vec::<String>::new());
        assert_eq!(source.tally().held, 0);
    }
}
