//! The file of certificate revocation lists, loaded again whenever it changes.
//!
//! A file that can no longer be read or understood leaves the last good lists in force, and that is said and
//! counted. As long as there was never a good one no peer is accepted: somebody asked for lists to be looked in.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;
use ztunnel_runtime::files;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_tls::revocation::Lists;
use ztunnel_tls::revocation::Unusable;
use ztunnel_tls::trust::Revocation;
use ztunnel_tls::trust::Trust;

/// How often the file is looked at. It is loaded once it has stayed the same for so long: whoever writes it should
/// be done.
const LOOK: Duration = Duration::from_millis(500);
/// A file of lists is not larger: what is was named by mistake.
const FILE_MAX: u64 = 64 << 20;

/// What is told of the file.
#[derive(Debug, Default)]
pub struct Status {
    /// How often it changed and could not be used.
    failures: AtomicU64,
}

impl Status {
    /// How often the file changed and could not be used.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}

/// Loads the lists for the first time. Blocks for file access.
pub fn open(path: &Path) -> Revocation {
    match load(path) {
        Ok(lists) => Revocation::Lists(Arc::new(lists)),
        Err(error) => {
            tracing::error!(
                path = %path.display(), %error,
                "no certificate revocation list: no peer is accepted until there is one"
            );
            Revocation::Missing(Arc::new(error))
        }
    }
}

/// Loads the lists at `path` into `trust` again whenever they change, until `signal` says that the process ends.
pub fn watch(path: PathBuf, trust: Trust, mut signal: Signal) -> Arc<Status> {
    let status = Arc::new(Status::default());
    let counted = Arc::clone(&status);
    let watching = async move {
        let path: Arc<Path> = Arc::from(path);
        // Loaded before this watch began: what changed since shows in the first look.
        let (mut seen, mut loaded) = (None, None);
        loop {
            let now = look(&path).await;
            // Twice the same, and not what is loaded: it is finished.
            if seen.as_ref() == Some(&now) && loaded.as_ref() != Some(&now) {
                reload(&path, &trust, &counted).await;
                loaded = Some(now.clone());
            }
            seen = Some(now);
            sleep(LOOK).await;
        }
    };
    shutdown::spawn(async move {
        tokio::select! {
            () = watching => {}
            () = signal.closing() => {}
        }
    });
    status
}

async fn reload(path: &Arc<Path>, trust: &Trust, status: &Status) {
    let file = Arc::clone(path);
    let loading = spawn_blocking(move || load(&file)).await;
    match loading.unwrap_or_else(|error| Err(Unusable::Unreadable(error.to_string()))) {
        Ok(lists) => {
            if let Revocation::Lists(held) = trust.revocation()
                && *held == lists
            {
                return;
            }
            let (count, entries) = (lists.len(), lists.entries());
            tracing::info!(path = %path.display(), lists = count, revoked = entries, "certificate revocation lists loaded");
            trust.revoke(lists);
        }
        Err(error) => {
            status.failures.fetch_add(1, Ordering::Relaxed);
            let consequence = match trust.revocation() {
                Revocation::Lists(_) => "the last good lists stay in force",
                Revocation::Off | Revocation::Missing(_) => "no peer is accepted until there is a good one",
            };
            tracing::error!(
                path = %path.display(), %error, consequence,
                "the certificate revocation lists cannot be used"
            );
        }
    }
}

fn load(path: &Path) -> Result<Lists, Unusable> {
    let bytes = files::read(path, FILE_MAX).map_err(|error| Unusable::Unreadable(error.to_string()))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(Unusable::Unreadable(format!("it is larger than {} MiB", FILE_MAX >> 20)));
    }
    Lists::parse(&bytes)
}

/// The file as `stat` shows it, symbolic links followed: a ConfigMap is replaced by swapping one above it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp(Option<(u64, u64, u64, i64, i64)>);

async fn look(path: &Arc<Path>) -> Stamp {
    let path = Arc::clone(path);
    let stat = move || {
        let file = std::fs::metadata(&path).ok()?;
        Some((file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec()))
    };
    Stamp(spawn_blocking(stat).await.ok().flatten())
}

#[cfg(test)]
mod tests;
