//! What looks like «everything is gone» is not believed at once: one rule for whatever says which pods there are.
//!
//! A mesh file that is written anew is empty for a moment, a full disk cuts it, a directory is emptied before it is
//! filled, an agent that has just started knows no pod yet. Carried out at once, each of them would release pods in
//! clear. So a version of the mesh is compared with the one in force ([`Change::between`]) and judged
//! ([`Change::judge`]), by what is known of each pod that would leave:
//!
//! * it is **gone**: its network namespace does not exist any more. Nothing of it can be sent in clear;
//! * it is **told** to leave: it is named, with a label of its own, an end, or another node;
//! * its **namespace** is told to leave: that and the pod are there, and the namespace has the label no more;
//! * it is **missing**: it is not named any more, or too little is left of it.
//!
//! | what leaves | then |
//! |---|---|
//! | nothing, or only what is gone or told to | at once |
//! | less than half, and of other nodes | at once |
//! | less than half, missing or by its namespace's label, and of this node | once it has been so for [`STABLE`]; at once from a source that is complete |
//! | most, by the label of namespaces, or missing from a source that is complete | once it has been so for [`STABLE`] |
//! | most, missing | held, until it is confirmed by force or the source says otherwise |
//! | any, missing or by its namespace's label, and of a file only the end is missing, or the newline at the end | held likewise |
//! | whatever, as a file holds nothing any more, its end mark is gone, or it ends in the middle of a line | held likewise |
//! | two policies or more, and most of them | once it has been so for [`STABLE`] |
//!
//! *Most* is more than what stays, over all nodes: of two pods one may go. A source is *complete* where it says so
//! itself: see [`Census::complete`]. While a version waits or is held, the one in force stays so, all of it.
//!
//! A file that is *cut* is a file with fewer objects to those who read it, also where the cut goes through an object: it
//! may take a label, an annotation or half of a policy with it. It is recognised by what was there before: what is left
//! is its beginning ([`Outline`]). A person may also have deleted what is at the end, so a file that ends with a whole
//! line is held only where that would release pods. Of one that is written anew and cut at the same time, only the
//! missing newline tells.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::addr::PodUid;
use crate::source::loss::outline::Cut;
use crate::source::loss::outline::Outline;

pub mod outline;

/// How long what is doubtful has to stay as it is.
pub const STABLE: Duration = Duration::from_secs(3);

/// A source that changes all the time is not waited for longer than this.
const STABLE_MAX: Duration = Duration::from_secs(15);

/// How often a version that waits or is held is judged again: pods that were in doubt may be gone by then.
const AGAIN: Duration = Duration::from_secs(1);

/// How many pods a reason names.
const NAMED_MAX: usize = 3;

/// What a source says of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stance {
    /// It is in the mesh, and to be captured here, in this network namespace.
    Here(PathBuf),
    /// It is in the mesh, on another node.
    Elsewhere,
    /// It is not in the mesh, by a word of its own: a label, its end.
    Told,
    /// It is not, as its namespace has no label that puts it in.
    ByNamespace,
    /// It is named, and the rest is too little to tell.
    Unclear,
}

/// A file of the source.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileCensus {
    /// How many objects it holds.
    pub objects: usize,
    /// It says itself that it holds none: an empty list.
    pub empty_list: bool,
    /// It ends with YAML's end mark of a document, `...`.
    pub marked: bool,
    /// What its text is recognised by.
    pub outline: Outline,
}

/// What one version of a source names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Census {
    /// Every pod it names, by its namespace and name.
    pub pods: BTreeMap<Arc<str>, (PodUid, Stance)>,
    /// The policies, by kind, namespace and name.
    pub policies: BTreeSet<Arc<str>>,
    /// The files it was read from.
    pub files: BTreeMap<Arc<str>, FileCensus>,
    /// Nothing can have been cut off it: one file that ends with a mark, that is JSON, or a list as `kubectl` prints
    /// it; or an empty list, and no pod anywhere.
    pub complete: bool,
}

/// Why a pod would leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It does not exist any more.
    Gone,
    /// The source tells it to.
    Told,
    /// The source tells its namespace to.
    ByNamespace,
    /// The source names it no more.
    Missing,
}

/// What would change between two versions, as far as it may be an accident.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// The pods that would leave without being gone or told to: by their namespaces' labels.
    pub by_namespace: Vec<Arc<str>>,
    /// And because they are missing.
    pub missing: Vec<Arc<str>>,
    /// How many of all these are of this node.
    pub here: usize,
    /// How many pods stay.
    pub stay: usize,
    /// How many policies would be no more, and how many stay.
    pub policies: (usize, usize),
    /// Files that seem to be cut off.
    pub cut: Vec<Arc<str>>,
    /// The new version is complete.
    pub complete: bool,
}

/// What is to be done with a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is carried out.
    Apply,
    /// It is carried out once it has stayed so for a while.
    Wait,
    /// It is carried out when it is confirmed.
    Hold,
}

impl Change {
    /// From the version in force to another one. `is_gone` says whether a network namespace exists no more.
    pub fn between(before: &Census, after: &Census, is_gone: impl Fn(&Path) -> bool) -> Self {
        let mut change = Self { complete: after.complete, ..Self::default() };
        let captured: BTreeSet<&Path> = after.pods.values().filter_map(|(_, stance)| netns(stance)).collect();
        for (name, (_, stance)) in &before.pods {
            let here = netns(stance);
            if here.is_none() && *stance != Stance::Elsewhere {
                continue;
            }
            let now = after.pods.get(name).map(|(_, stance)| stance);
            let stays = match now {
                Some(Stance::Here(_)) => true,
                Some(Stance::Elsewhere) => here.is_none(),
                _ => false,
            };
            // Another pod in the same network namespace is as good.
            if stays || here.is_some_and(|netns| captured.contains(netns)) {
                change.stay += 1;
                continue;
            }
            change.leaves(name, now, here.is_some(), here.is_some_and(&is_gone));
        }
        let policies_stay = before.policies.intersection(&after.policies).count();
        change.policies = (before.policies.len() - policies_stay, policies_stay);
        let objects = |census: &Census| census.files.values().map(|file| file.objects).sum::<usize>();
        let fewer = objects(after) < objects(before);
        let releases = change.releases();
        let was_cut = |(name, now): (&Arc<str>, &FileCensus)| {
            let cut = before.files.get(name)?.was_cut(now, fewer, releases);
            cut.then(|| Arc::clone(name))
        };
        change.cut = after.files.iter().filter_map(was_cut).collect();
        change
    }

    /// From what an earlier daemon has captured on this node, of which only the uids are known.
    pub fn since_last_daemon(
        captured: impl IntoIterator<Item = PodUid>,
        now: &Census,
        is_gone: impl Fn(&PodUid) -> bool,
    ) -> Self {
        let named: BTreeMap<&PodUid, &Stance> =
            now.pods.values().map(|(uid, stance)| (uid, stance)).collect();
        let mut change = Self { complete: now.complete, ..Self::default() };
        for uid in captured {
            match named.get(&uid) {
                Some(Stance::Here(_)) => change.stay += 1,
                stance => change.leaves(&uid.0, stance.copied(), true, is_gone(&uid)),
            }
        }
        if change.releases() && !now.complete {
            // Of its beginning alone; JSON that is cut is none.
            let unended = now.files.iter().filter(|(_, file)| !file.outline.is_ended() && !file.marked);
            let yaml = unended.filter(|(name, _)| !name.ends_with(".json"));
            change.cut = yaml.map(|(name, _)| Arc::clone(name)).collect();
        }
        change
    }

    /// From the pods that are enrolled to a source's complete list of those that are to be.
    pub fn of_list<'a>(enrolled: impl IntoIterator<Item = &'a PodUid>, listed: &BTreeSet<PodUid>) -> Self {
        let mut change = Self { complete: true, ..Self::default() };
        for uid in enrolled {
            match listed.contains(uid) {
                true => change.stay += 1,
                false => change.leaves(&uid.0, None, true, false),
            }
        }
        change
    }

    fn leaves(&mut self, name: &Arc<str>, stance: Option<&Stance>, here: bool, gone: bool) {
        match why(stance, gone) {
            Why::Gone | Why::Told => {}
            Why::ByNamespace => {
                self.by_namespace.push(Arc::clone(name));
                self.here += usize::from(here);
            }
            Why::Missing => {
                self.missing.push(Arc::clone(name));
                self.here += usize::from(here);
            }
        }
    }

    /// Whether pods would leave of which nothing says that they are gone, or have to.
    fn releases(&self) -> bool {
        !self.missing.is_empty() || !self.by_namespace.is_empty()
    }

    /// The rule.
    pub fn judge(&self) -> Verdict {
        let most = self.missing.len() + self.by_namespace.len() > self.stay;
        let most_policies = self.policies.0 >= 2 && self.policies.0 > self.policies.1;
        let missing_most = most && !self.missing.is_empty();
        if !self.cut.is_empty() || (missing_most && !self.complete) {
            Verdict::Hold
        } else if most || most_policies || (self.here > 0 && !self.complete) {
            Verdict::Wait
        } else {
            Verdict::Apply
        }
    }

    /// What would be lost: as long as it is the same, the source has not changed its mind.
    fn lost(&self) -> BTreeSet<Arc<str>> {
        self.missing.iter().chain(&self.by_namespace).chain(&self.cut).cloned().collect()
    }
}

impl FileCensus {
    /// Whether this file seems to have been cut off, to what it is `now`; `fewer`: all files hold fewer objects now, so what
    /// is gone was not moved; `releases`: pods would be released.
    fn was_cut(&self, now: &Self, fewer: bool, releases: bool) -> bool {
        let emptied = self.objects > 0 && now.objects == 0 && !now.empty_list;
        let unmarked = self.marked && !now.marked;
        let beginning = match now.outline.is_cut_from(&self.outline) {
            Some(Cut::WithinLine) => true,
            Some(Cut::AfterLine) => releases,
            None => false,
        };
        (fewer && (emptied || unmarked)) || (beginning && !now.marked && !now.empty_list)
    }
}

fn netns(stance: &Stance) -> Option<&Path> {
    match stance {
        Stance::Here(netns) => Some(netns),
        Stance::Elsewhere | Stance::Told | Stance::ByNamespace | Stance::Unclear => None,
    }
}

fn why(stance: Option<&Stance>, gone: bool) -> Why {
    match stance {
        _ if gone => Why::Gone,
        // One that is named to be elsewhere is not here.
        Some(Stance::Told | Stance::Here(_) | Stance::Elsewhere) => Why::Told,
        Some(Stance::ByNamespace) => Why::ByNamespace,
        Some(Stance::Unclear) | None => Why::Missing,
    }
}

/// What is doubtful, in words.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost: Vec<_> = self.missing.iter().chain(&self.by_namespace).collect();
        if let Some(file) = self.cut.first() {
            write!(f, "{file} seems to be cut off")?;
            if lost.is_empty() {
                return Ok(());
            }
            f.write_str(": ")?;
        }
        if lost.is_empty() {
            return write!(
                f,
                "{} of {} policies would go",
                self.policies.0,
                self.policies.0 + self.policies.1
            );
        }
        let all = lost.len() + self.stay;
        let plural = if all == 1 { "" } else { "s" };
        write!(f, "{} of {all} pod{plural} would leave the mesh (", lost.len())?;
        for (place, name) in lost.iter().take(NAMED_MAX).enumerate() {
            write!(f, "{}{name}", if place == 0 { "" } else { ", " })?;
        }
        f.write_str(if lost.len() > NAMED_MAX { ", ...)" } else { ")" })?;
        if !self.missing.is_empty() {
            f.write_str(", and nothing says that they are to")?;
        }
        Ok(())
    }
}

/// A version that is not carried out yet.
#[derive(Debug)]
struct Doubted<T> {
    version: T,
    change: Change,
    verdict: Verdict,
    /// Since when it has been as it is, and since when there is doubt at all.
    since: Instant,
    begun: Instant,
    again: Instant,
}

/// Keeps what is in doubt until it may be carried out. Never reads the clock.
#[derive(Debug)]
pub struct Caution<T>(Option<Doubted<T>>);

impl<T> Default for Caution<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Caution<T> {
    /// Takes a new version, in place of the one that may be waiting; returns it if it may be carried out at once.
    pub fn offer(&mut self, version: T, change: Change, now: Instant) -> Option<T> {
        let verdict = change.judge();
        let before = self.0.take();
        if verdict == Verdict::Apply {
            return Some(version);
        }
        let same = before.as_ref().filter(|before| before.change.lost() == change.lost());
        let since = same.map_or(now, |before| before.since);
        let begun = before.as_ref().map_or(now, |before| before.begun);
        self.0 = Some(Doubted { version, change, verdict, since, begun, again: now });
        self.due(now)
    }

    /// Judges again what waits, as `change` sees it now; returns it if it may be carried out.
    pub fn again(&mut self, change: impl FnOnce(&T) -> Change, now: Instant) -> Option<T> {
        let doubted = self.0.as_mut()?;
        // That some of its pods are gone meanwhile does not begin the time anew.
        doubted.change = change(&doubted.version);
        doubted.verdict = doubted.change.judge();
        match doubted.verdict {
            Verdict::Apply => self.confirm(),
            Verdict::Wait | Verdict::Hold => self.due(now),
        }
    }

    fn due(&mut self, now: Instant) -> Option<T> {
        let due = |doubted: &mut Doubted<T>| {
            let stable = now >= doubted.since + STABLE || now >= doubted.begun + STABLE_MAX;
            doubted.again = now + AGAIN;
            doubted.verdict == Verdict::Wait && stable
        };
        self.0.take_if(due).map(|doubted| doubted.version)
    }

    /// When [`Self::again`] is due; `None` while nothing is in doubt.
    pub fn wake(&self) -> Option<Instant> {
        let doubted = self.0.as_ref()?;
        Some(match doubted.verdict {
            Verdict::Wait => doubted.again.min(doubted.since + STABLE),
            _ => doubted.again,
        })
    }

    /// It is meant: returns what was in doubt.
    pub fn confirm(&mut self) -> Option<T> {
        self.0.take().map(|doubted| doubted.version)
    }

    /// What is in doubt, to be brought up to date.
    pub fn version_mut(&mut self) -> Option<&mut T> {
        self.0.as_mut().map(|doubted| &mut doubted.version)
    }

    /// Forgets what was in doubt: the source says something else.
    pub fn forget(&mut self) {
        self.0 = None;
    }

    /// What is in doubt, and how it was judged.
    pub fn doubt(&self) -> Option<(&Change, Verdict)> {
        self.0.as_ref().map(|doubted| (&doubted.change, doubted.verdict))
    }
}

#[cfg(test)]
mod tests;
