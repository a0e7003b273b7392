//! The file of the cache: a snapshot, and what changed since, in records of which each vouches for all before it.
//!
//! ```text
//! file    magic (8 bytes, the last is the version of the format) | length | scope | check | record …
//! record  length | body | check
//! body    1 kind | length | name | length | version | resource     it is there
//!         2 kind | length | name                                   it is gone
//!         3                                                        what came since the last such mark belongs together
//! ```
//!
//! Lengths and checks have four bytes, least first. A check is the CRC-32 of all that was written before it but the
//! checks (with them it would always come to the same), so that no part can be taken away, repeated or moved without
//! notice. What comes up to the first mark is the snapshot.
//!
//! What is damaged is ignored, and all that follows it: what was there at an earlier mark is the mesh as it was then.
//! With a damaged snapshot there is no such mesh, and nothing is read: without one of its policies, a mesh would
//! allow what it does not.

use std::collections::HashMap;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::BufWriter;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use bytes::Bytes;
use crc32fast::Hasher;
use ztunnel_proto::Any;
use ztunnel_proto::discovery::Resource;

use crate::xds::session::Kind;

const MAGIC: [u8; 8] = *b"ztmesh\0\x01";
/// The largest file that is read or written. Ten times what the largest clusters have.
pub(super) const FILE_MAX: u64 = 512 * 1024 * 1024;
/// Changes that are appended before the file is written anew, if the snapshot is smaller than that.
const APPENDED_MIN: u64 = 1024 * 1024;

const PUT: u8 = 1;
const REMOVED: u8 = 2;
const MARK: u8 = 3;

/// What a resource is called, among all.
pub(super) type Name = (Kind, Box<str>);
/// The newest states: of what is there version and bytes, of what is gone nothing.
pub(super) type Batch = HashMap<Name, Option<(Box<str>, Bytes)>>;

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("cannot be read")]
    Io(#[from] io::Error),
    #[error("is not this proxy's: {0}")]
    Foreign(&'static str),
    #[error("is damaged")]
    Damaged,
    #[error("was good {0} hours ago, which is too long")]
    Expired(u64),
}

/// What is in a file.
#[derive(Debug)]
pub(super) struct Scan {
    /// Where what is there is. Sorted: it is read from the front.
    live: Vec<(Kind, Place)>,
    /// The last mark's end.
    pub(super) end: u64,
    /// There is more, which is ignored.
    pub(super) torn: bool,
}

/// Where the body of a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    at: u64,
    length: usize,
}

/// Opens what is at `path`, if it may be believed.
pub(super) fn open(path: &Path) -> Result<File, Unusable> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(Unusable::Foreign("it is no file"));
    }
    // Who can write it decides who may talk to whom.
    if about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o022 != 0 {
        return Err(Unusable::Foreign("others may have written it"));
    }
    if about.len() > FILE_MAX {
        return Err(Unusable::Foreign("it is too large"));
    }
    Ok(file)
}

/// Looks through the first `end` bytes of a file of `scope`.
pub(super) fn scan(file: &File, scope: &str, end: u64) -> Result<Scan, Unusable> {
    let mut reader = Reader::new(file, end.min(FILE_MAX));
    let mut start = [0; MAGIC.len() + 4];
    let foreign = |what| move |error| if is_end(&error) { Unusable::Foreign(what) } else { error.into() };
    reader.take(&mut start).map_err(foreign("it has no header"))?;
    if start[..MAGIC.len()] != MAGIC {
        return Err(Unusable::Foreign("another format"));
    }
    let mut theirs = vec![0; scope.len()];
    let length = start.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if length as usize != scope.len() {
        return Err(Unusable::Foreign("another scope"));
    }
    reader.take(&mut theirs).map_err(foreign("it has no header"))?;
    if theirs != scope.as_bytes() {
        return Err(Unusable::Foreign("another scope"));
    }
    if !reader.check().map_err(foreign("it has no header"))? {
        return Err(Unusable::Damaged);
    }
    let mut live: HashMap<Name, Place> = HashMap::new();
    let mut since = Vec::new();
    let mut mark = None;
    let torn = loop {
        match reader.record() {
            Ok(Some(Record::Put(name, place))) => since.push((name, Some(place))),
            Ok(Some(Record::Removed(name))) => since.push((name, None)),
            Ok(Some(Record::Mark)) => {
                for (name, place) in since.drain(..) {
                    match place {
                        Some(place) => live.insert(name, place),
                        None => live.remove(&name),
                    };
                }
                mark = Some(reader.at);
            }
            Ok(None) => break !since.is_empty(),
            Err(error) if is_end(&error) => break true,
            Err(error) => return Err(error.into()),
        }
    };
    let end = mark.ok_or(Unusable::Damaged)?;
    let mut live: Vec<_> = live.into_iter().map(|((kind, _), place)| (kind, place)).collect();
    live.sort_unstable_by_key(|(_, place)| *place);
    Ok(Scan { live, end, torn })
}

/// How damage is told: what should be there is not.
fn is_end(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
}

impl Scan {
    /// Reads what is there, by kind.
    pub(super) fn resources(&self, file: &File) -> Result<[Vec<Resource>; 2], Unusable> {
        let mut all = [Vec::new(), Vec::new()];
        for (kind, place) in &self.live {
            let body = Bytes::from(self.body(file, *place)?);
            let ((_, name), rest) = split_name(&body).ok_or(Unusable::Damaged)?;
            let (version, value) = split(rest).ok_or(Unusable::Damaged)?;
            let version = str::from_utf8(version).map_err(|_| Unusable::Damaged)?.to_owned();
            let any = Any { type_url: kind.type_url().to_owned(), value: body.slice_ref(value) };
            let name = name.into_string();
            all[*kind as usize].push(Resource { name, version, resource: Some(any), ..Resource::default() });
        }
        Ok(all)
    }

    fn body(&self, file: &File, place: Place) -> io::Result<Vec<u8>> {
        let mut body = vec![0; place.length];
        file.read_exact_at(&mut body, place.at)?;
        Ok(body)
    }
}

enum Record {
    Put(Name, Place),
    Removed(Name),
    Mark,
}

/// Reads and checks from the front.
struct Reader<'a> {
    inner: BufReader<At<'a>>,
    at: u64,
    end: u64,
    chain: Hasher,
    body: Vec<u8>,
}

/// Reads a file without its cursor, which is the writer's.
struct At<'a>(&'a File, u64);

impl Read for At<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read_at(into, self.1)?;
        self.1 += read as u64;
        Ok(read)
    }
}

impl<'a> Reader<'a> {
    fn new(file: &'a File, end: u64) -> Self {
        let inner = BufReader::with_capacity(64 * 1024, At(file, 0));
        Self { inner, at: 0, end, chain: Hasher::new(), body: Vec::new() }
    }

    fn take(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.take_unchained(into)?;
        self.chain.update(into);
        Ok(())
    }

    fn take_unchained(&mut self, into: &mut [u8]) -> io::Result<()> {
        if into.len() as u64 > self.end - self.at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.inner.read_exact(into)?;
        self.at += into.len() as u64;
        Ok(())
    }

    fn number(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.take(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Whether the check that comes next is that of all before it.
    fn check(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 4];
        self.take_unchained(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes) == self.chain.clone().finalize())
    }

    /// The next record, or nothing at the end.
    fn record(&mut self) -> io::Result<Option<Record>> {
        if self.at == self.end || self.inner.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let damaged = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let length = self.number()? as usize;
        if length as u64 > self.end - self.at {
            return Err(damaged());
        }
        let place = Place { at: self.at, length };
        let mut body = std::mem::take(&mut self.body);
        body.resize(length, 0);
        self.take(&mut body)?;
        if !self.check()? {
            return Err(damaged());
        }
        let record = match body.first() {
            Some(&PUT) => split_name(&body).map(|(name, _)| Record::Put(name, place)),
            Some(&REMOVED) => split_name(&body).map(|(name, _)| Record::Removed(name)),
            Some(&MARK) => Some(Record::Mark),
            _ => None,
        };
        self.body = body;
        record.map(Some).ok_or_else(damaged)
    }
}

/// What follows a length, and the rest.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

fn split_name(body: &[u8]) -> Option<(Name, &[u8])> {
    let kind = *Kind::ALL.get(usize::from(*body.get(1)?))?;
    let (name, rest) = split(&body[2..])?;
    Some(((kind, Box::from(str::from_utf8(name).ok()?)), rest))
}

/// A file that is written.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) file: File,
    chain: Hasher,
    /// How long it is.
    pub(super) length: u64,
    /// How long it was when it was new.
    snapshot: u64,
}

impl Log {
    /// Puts a new file in the place of what is at `path`: what is in `base`, with `batch`. What is there afterwards is
    /// the whole of it, on the disk, or what was there before.
    pub(super) fn create(
        path: &Path,
        scope: &str,
        base: Option<(&File, &Scan)>,
        batch: &Batch,
    ) -> Result<Self, Unusable> {
        let next = beside(path);
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&next)?;
        let made = Self::fill(file, scope, base, batch).and_then(|log| {
            log.file.sync_all()?;
            fs::rename(&next, path)?;
            let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
            File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
            Ok(log)
        });
        if made.is_err() {
            let _is_gone = fs::remove_file(&next);
        }
        made
    }

    fn fill(file: File, scope: &str, base: Option<(&File, &Scan)>, batch: &Batch) -> Result<Self, Unusable> {
        let mut writer = Writer::new(&file, Hasher::new(), 0);
        writer.put(&MAGIC)?;
        writer.length(scope.len())?;
        writer.put(scope.as_bytes())?;
        writer.check()?;
        if let Some((old, scan)) = base {
            for (_, place) in &scan.live {
                let body = scan.body(old, *place)?;
                let (name, _) = split_name(&body).ok_or(Unusable::Damaged)?;
                if !batch.contains_key(&name) {
                    writer.record(&[&body])?;
                }
            }
        }
        let there = batch.iter().filter(|(_, state)| state.is_some());
        for (name, state) in there {
            writer.state(name, state)?;
        }
        let (chain, length) = writer.mark()?;
        Ok(Self { file, chain, length, snapshot: length })
    }

    /// Appends `batch`. Not waited for the disk: when the machine fails, what is there may end at an earlier mark. When
    /// it fails, what is appended later would not be found.
    pub(super) fn append(&mut self, batch: &Batch) -> io::Result<()> {
        let mut writer = Writer::new(&self.file, self.chain.clone(), self.length);
        batch.iter().try_for_each(|(name, state)| writer.state(name, state))?;
        (self.chain, self.length) = writer.mark()?;
        Ok(())
    }

    /// Whether so much was appended that a new file is due.
    pub(super) fn is_long(&self) -> bool {
        self.length - self.snapshot > self.snapshot.max(APPENDED_MIN)
    }

    /// Whether another file is in its place: another process has begun to write.
    pub(super) fn is_replaced(&self, path: &Path) -> io::Result<bool> {
        let (ours, there) = (self.file.metadata()?, fs::symlink_metadata(path)?);
        Ok((ours.dev(), ours.ino()) != (there.dev(), there.ino()))
    }
}

/// Where a new file is made.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

struct Writer<'a> {
    inner: BufWriter<&'a File>,
    chain: Hasher,
    at: u64,
}

impl<'a> Writer<'a> {
    fn new(file: &'a File, chain: Hasher, at: u64) -> Self {
        Self { inner: BufWriter::with_capacity(64 * 1024, file), chain, at }
    }

    fn put_unchained(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        if self.at > FILE_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.inner.write_all(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chain.update(bytes);
        self.put_unchained(bytes)
    }

    fn length(&mut self, length: usize) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.put(&length.to_le_bytes())
    }

    fn check(&mut self) -> io::Result<()> {
        let check = self.chain.clone().finalize();
        self.put_unchained(&check.to_le_bytes())
    }

    fn record(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.length(parts.iter().map(|part| part.len()).sum())?;
        parts.iter().try_for_each(|part| self.put(part))?;
        self.check()
    }

    fn state(&mut self, (kind, name): &Name, state: &Option<(Box<str>, Bytes)>) -> io::Result<()> {
        let length = |text: &str| u32::try_from(text.len()).map(u32::to_le_bytes);
        let long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let named = length(name).map_err(long)?;
        match state {
            None => self.record(&[&[REMOVED, *kind as u8], &named, name.as_bytes()]),
            Some((version, value)) => {
                let versioned = length(version).map_err(long)?;
                let start = [PUT, *kind as u8];
                self.record(&[&start, &named, name.as_bytes(), &versioned, version.as_bytes(), value])
            }
        }
    }

    fn mark(mut self) -> io::Result<(Hasher, u64)> {
        self.record(&[&[MARK]])?;
        self.inner.flush()?;
        Ok((self.chain, self.at))
    }
}
