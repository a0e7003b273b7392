//! The mesh as it was received, on a disk: a daemon that starts while the control plane is away serves from it.
//!
//! A file of responses, one after the other, each with its length and checksum. What is read is what a control plane
//! said, and goes the same way; a part that is missing at the end, or in the middle because the disk was slow, leaves an
//! older mesh whose versions the control plane is told, so that it sends what is missing.
//!
//! A file is written anew when it has grown to twice of what it needs, under another name first. Who finds that the
//! name is another daemon's by now writes no more.

use std::collections::HashMap;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::BufReader;
use std::io::BufWriter;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::SystemTime;

use flate2::Crc;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::prost::Message;

use crate::xds::client::MESSAGE_MAX;

/// The first bytes. Other ones are another version's, or nothing of ours.
const MAGIC: &[u8] = b"ztunnel mesh 1\n";
/// A file that is smaller is not written anew.
const ANEW_FROM: u64 = 4 << 20;
/// Responses on their way to the disk. Further ones are not kept, which the next daemon makes good.
const WAITING: usize = 64;

/// Reads a file from its start.
#[derive(Debug)]
pub(super) struct Kept {
    file: BufReader<File>,
    /// When it was written last: the mesh was the control plane's then.
    pub(super) at: SystemTime,
}

impl Kept {
    /// Opens the file at `path`, which must be of the mesh that `of` names. Nothing if there is none.
    pub(super) fn open(path: &Path, of: &str) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let at = file.metadata()?.modified()?;
        let mut file = BufReader::new(file);
        let mut magic = vec![0; MAGIC.len()];
        file.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not a mesh that this version kept",
            ));
        }
        let mut kept = Self { file, at };
        match kept.piece()? {
            Some(named) if named == of.as_bytes() => Ok(Some(kept)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is of another mesh")),
        }
    }

    /// The next response; nothing at the end, or where the rest cannot be read.
    pub(super) fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        match self.piece() {
            Ok(Some(bytes)) => DeltaDiscoveryResponse::decode(bytes.as_slice()).ok(),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "the rest of the kept mesh cannot be read");
                None
            }
        }
    }

    fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut head = [0; 8];
        match self.file.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let [a, b, c, d, e, f, g, h] = head;
        let (length, sum) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
        if length as usize > MESSAGE_MAX {
            return Err(damaged());
        }
        let mut bytes = Vec::new();
        self.file.by_ref().take(length.into()).read_to_end(&mut bytes)?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        if bytes.len() != length as usize || crc.sum() != sum {
            return Err(damaged());
        }
        Ok(Some(bytes))
    }
}

/// What goes to the disk.
#[derive(Debug)]
enum Entry {
    /// This was received.
    Response(DeltaDiscoveryResponse),
    /// The mesh is still the control plane's.
    Current,
}

/// Keeps what is received.
#[derive(Debug)]
pub(super) struct Keeper {
    entries: mpsc::SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Keeper {
    /// Keeps at `path`, beginning with what is there, if it is of the mesh that `of` names. The thread ends with the
    /// keeper.
    pub(super) fn start(path: PathBuf, of: String) -> io::Result<Self> {
        let (entries, waiting) = mpsc::sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let failed = Arc::clone(&lost);
        let _thread = std::thread::Builder::new().name("mesh-cache".to_owned()).spawn(move || {
            let result = Log::anew(&path, &of).and_then(|mut log| log.keep(&waiting));
            if let Err(error) = result {
                failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, path = %path.display(), "the mesh is not kept any more");
            }
        })?;
        Ok(Self { entries, lost })
    }

    /// Keeps a response. Does not wait.
    pub(super) fn response(&self, response: DeltaDiscoveryResponse) {
        if self.entries.try_send(Entry::Response(response)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The mesh is still the control plane's.
    pub(super) fn current(&self) {
        // One that is not written is followed by others.
        let _full = self.entries.try_send(Entry::Current);
    }

    /// Responses that were not kept.
    pub(super) fn lost(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost)
    }
}

/// A file that is written to.
struct Log {
    path: PathBuf,
    of: String,
    file: BufWriter<File>,
    inode: u64,
    size: u64,
    /// Its size when it was written anew.
    needed: u64,
}

impl Log {
    /// Writes what the file at `path` has to a new one in its place: of each resource the last word.
    fn anew(path: &Path, of: &str) -> io::Result<Self> {
        let fresh = path.with_extension(format!("{:08x}", rand::random::<u32>()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        let written = Self::write_anew(path, of, &fresh, file);
        if written.is_err() {
            // It is of no use; what was there stays.
            let _left = std::fs::remove_file(&fresh);
        }
        written
    }

    fn write_anew(path: &Path, of: &str, fresh: &Path, file: File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        let (path, of) = (path.to_owned(), of.to_owned());
        let mut log = Self { path, of, file: BufWriter::new(file), inode, size: 0, needed: 0 };
        log.file.write_all(MAGIC)?;
        let of = log.of.clone().into_bytes();
        log.piece(&of)?;
        let mut at = None;
        if let Ok(Some(mut old)) = Kept::open(&log.path, &log.of) {
            let mut last = HashMap::new();
            let mut number = 0_usize;
            while let Some(response) = old.next() {
                let DeltaDiscoveryResponse { type_url, resources, removed_resources, .. } = response;
                for name in resources.into_iter().map(|resource| resource.name).chain(removed_resources) {
                    last.insert((type_url.clone(), name), number);
                }
                number += 1;
            }
            at = Some(old.at);
            let mut number = 0_usize;
            let mut again = Kept::open(&log.path, &log.of)?;
            while let Some(mut response) = again.as_mut().and_then(Kept::next) {
                let type_url = response.type_url.clone();
                response.removed_resources.clear();
                response
                    .resources
                    .retain(|resource| last.get(&(type_url.clone(), resource.name.clone())) == Some(&number));
                number += 1;
                if !response.resources.is_empty() {
                    log.piece(&response.encode_to_vec())?;
                }
            }
        }
        log.file.flush()?;
        log.file.get_ref().sync_data()?;
        if let Some(at) = at {
            // Being written anew does not make it newer.
            log.file.get_ref().set_modified(at)?;
        }
        std::fs::rename(fresh, &log.path)?;
        log.needed = log.size;
        Ok(log)
    }

    fn keep(&mut self, waiting: &mpsc::Receiver<Entry>) -> io::Result<()> {
        while let Ok(entry) = waiting.recv() {
            match entry {
                Entry::Response(response) => {
                    self.piece(&response.encode_to_vec())?;
                    self.file.flush()?;
                }
                Entry::Current => self.file.get_ref().set_modified(SystemTime::now())?,
            }
            if self.size > ANEW_FROM.max(2 * self.needed) {
                if std::fs::metadata(&self.path).map_or(true, |found| found.ino() != self.inode) {
                    tracing::debug!("another daemon keeps the mesh now");
                    return Ok(());
                }
                *self = Self::anew(&self.path, &self.of)?;
                self.file.get_ref().set_modified(SystemTime::now())?;
            }
        }
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Ok(length) = u32::try_from(bytes.len()) else { return Ok(()) };
        let mut crc = Crc::new();
        crc.update(bytes);
        self.file.write_all(&length.to_le_bytes())?;
        self.file.write_all(&crc.sum().to_le_bytes())?;
        self.file.write_all(bytes)?;
        self.size += u64::from(length) + 8;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ztunnel_proto::discovery::Resource;

    use super::*;

    fn response(names: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |name: &&str| Resource { name: (*name).to_owned(), ..Resource::default() };
        DeltaDiscoveryResponse {
            type_url: "t".to_owned(),
            resources: names.iter().map(resource).collect(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn names(path: &Path) -> Vec<String> {
        let mut kept = Kept::open(path, "mine").unwrap().unwrap();
        std::iter::from_fn(|| kept.next())
            .flat_map(|response| response.resources)
            .map(|resource| resource.name)
            .collect()
    }

    fn written(path: &Path, responses: &[DeltaDiscoveryResponse]) {
        let mut log = Log::anew(path, "mine").unwrap();
        for response in responses {
            log.piece(&response.encode_to_vec()).unwrap();
        }
        log.file.flush().unwrap();
    }

    #[test]
    fn what_was_kept_is_read_and_written_anew_without_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.cache");
        assert!(Kept::open(&path, "mine").unwrap().is_none());
        written(&path, &[response(&["a", "b"], &[]), response(&["a", "c"], &["b"])]);
        assert_eq!(names(&path), ["a", "b", "a", "c"]);
        Log::anew(&path, "mine").unwrap();
        assert_eq!(names(&path), ["a", "c"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_mesh_of_somebody_else_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.cache");
        written(&path, &[response(&["a"], &[])]);
        assert!(Kept::open(&path, "other").is_err());
        std::fs::write(&path, "something else entirely").unwrap();
        assert!(Kept::open(&path, "mine").is_err());
        std::fs::write(&path, "").unwrap();
        assert!(Kept::open(&path, "mine").is_err());
        // What cannot be read is replaced.
        written(&path, &[response(&["b"], &[])]);
        assert_eq!(names(&path), ["b"]);
    }

    #[test]
    fn a_torn_or_damaged_file_gives_what_was_before_the_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.cache");
        written(&path, &[response(&["a"], &[]), response(&["b"], &[])]);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..12 {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(names(&path), ["a"], "{cut} bytes cut");
        }
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(names(&path), ["a"]);
    }

    #[test]
    fn a_keeper_keeps_and_gives_way_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.cache");
        let mut first = Log::anew(&path, "mine").unwrap();
        let second = Log::anew(&path, "mine").unwrap();
        // The first one has grown, and finds that the name is not its own.
        let (entries, waiting) = mpsc::sync_channel(4);
        first.size = 2 * ANEW_FROM;
        entries.send(Entry::Response(response(&["late"], &[]))).unwrap();
        drop(entries);
        first.keep(&waiting).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), second.inode);
        assert!(names(&path).is_empty());
    }
}
