//! Certificates in a file, so that a daemon that starts after a crash while the authority is away has some. Only where
//! an operator asks for it: otherwise no key is ever on a disk.
//!
//! The file holds private keys. It is its owner's alone, and believed only if nobody else can have read or written it;
//! what is in it is checked as if the authority had sent it. It holds what can be used now and nothing else: what ends
//! or is forgotten leaves it, and with the last certificate the file goes. A new file is on the disk before it takes the
//! place of the old one.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use zeroize::Zeroizing;
use ztunnel_runtime::shutdown;
use ztunnel_tls::configs::Credentials;

use crate::identity::inheritance;
use crate::identity::worker::Identities;

/// More than the certificates of all pods a node can have.
const SIZE_MAX: u64 = 32 << 20;
/// How long changes are gathered before they are written together.
const GATHER: Duration = Duration::from_secs(1);
/// How often it is looked whether something in the file has ended.
const LOOK: Duration = Duration::from_secs(60);
/// Until what could not be written is tried again: after one failure, and after many.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Somebody else may have had a hand in it.
    #[error("{0}")]
    Foreign(&'static str),
    /// It is not as it was written.
    #[error(transparent)]
    Damaged(#[from] inheritance::Unreadable),
}

/// What the file at `path` holds, whether it can be used now or not; nothing if there is none.
pub fn load(path: &Path) -> Result<Vec<Credentials>, Unusable> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened?,
    };
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(Unusable::Foreign("it is no file"));
    }
    // It makes this node whoever its certificates name.
    if about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        return Err(Unusable::Foreign(
            "others may have read or written it: it must be its owner's alone (chmod 600)",
        ));
    }
    if about.len() > SIZE_MAX {
        return Err(Unusable::Foreign("it is too large"));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(about.len()).unwrap_or(0)));
    file.take(SIZE_MAX).read_to_end(&mut bytes)?;
    Ok(inheritance::decode(&bytes)?)
}

/// Keeps in the file at `path` what `identities` can use, from now on until the drain begins: then the file is the next
/// daemon's. Nothing is written any more once the task has ended.
pub fn keep(path: PathBuf, identities: Identities, mut signal: shutdown::Signal) -> JoinHandle<()> {
    let keeping = async move {
        let (mut changes, mut retry) = (identities.changes(), RETRY.0);
        let mut kept: Option<Vec<String>> = None;
        loop {
            changes.borrow_and_update();
            let held = identities.usable();
            let serials = held.iter().map(|held| held.serial().to_owned()).collect();
            if kept.as_ref() == Some(&serials) {
                if !changed(&mut changes).await {
                    return;
                }
                continue;
            }
            let bytes = (!held.is_empty()).then(|| inheritance::encode(&held));
            let to = path.clone();
            let written = spawn_blocking(move || match bytes {
                Some(bytes) => write(&to, &bytes),
                None => remove(&to),
            });
            match written.await.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
                Ok(()) => {
                    (kept, retry) = (Some(serials), RETRY.0);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, again_in = ?retry, "cannot keep the certificates");
                    sleep(retry).await;
                    retry = (retry * 2).min(RETRY.1);
                }
            }
        }
    };
    shutdown::spawn(async move {
        tokio::select! {
            () = keeping => {}
            () = signal.draining() => {}
        }
    })
}

/// Waits until it is time to look again. False where nothing more will change.
async fn changed(changes: &mut watch::Receiver<()>) -> bool {
    tokio::select! {
        changed = changes.changed() => if changed.is_err() {
            return false;
        },
        () = sleep(LOOK) => {}
    }
    sleep(GATHER).await;
    true
}

/// Removes the file, and what an interrupted write has left beside it.
pub fn remove(path: &Path) -> io::Result<()> {
    [path, &beside(path)].into_iter().try_for_each(|path| match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = beside(path);
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut new = OpenOptions::new();
    new.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let made = new.open(&next).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&next, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()
    });
    if made.is_err() {
        let _is_gone = fs::remove_file(&next);
    }
    made
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

#[cfg(test)]
mod tests;
