//! The last good mesh on the disk: records of which each vouches for all before it.
//!
//! Whatever happened to the file, what is read is what was there at one of its marks, never a mixture; and of a file
//! that was only cut, it is the last mark that is left. Bytes as such are read too.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use arbitrary::Result;
use arbitrary::Unstructured;
use rustix::fs::MemfdFlags;
use ztunnel_node::fuzzing;

use crate::memory::bounded;
use crate::wire::few;
use crate::wire::pick;

const SCOPE: &str = "scope";

/// By kind and name: version and value.
type Contents = BTreeMap<(u8, String), (String, Vec<u8>)>;

static FILE: LazyLock<File> = LazyLock::new(|| {
    rustix::fs::memfd_create("mesh-cache", MemfdFlags::CLOEXEC).expect("there is memory").into()
});

fn load(bytes: &[u8]) -> Option<Contents> {
    FILE.set_len(0).and_then(|()| FILE.write_all_at(bytes, 0)).expect("there is memory");
    let read = bounded(bytes.len(), 32, || fuzzing::cached_mesh(&FILE, SCOPE));
    let resources = read.ok()?;
    let mut contents = Contents::new();
    for (kind, resource) in resources {
        let any = resource.resource.expect("each has its bytes");
        let there = contents.insert((kind, resource.name), (resource.version, any.value.to_vec()));
        assert!(there.is_none(), "each is there once");
    }
    Some(contents)
}

/// CRC-32, bit by bit.
fn check(bytes: &[u8]) -> u32 {
    let table = |byte: u32| (0..8).fold(byte, |sum, _| sum >> 1 ^ (0xedb8_8320 * (sum & 1)));
    !bytes.iter().fold(!0_u32, |sum, byte| sum >> 8 ^ table((sum ^ u32::from(*byte)) & 0xff))
}

/// A file as the writer makes it.
#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    /// What the checks are made of.
    checked: Vec<u8>,
    /// What there was at each mark, and where it ends.
    marks: Vec<(usize, Contents)>,
    now: Contents,
    /// There is a record that has nothing to do with the others.
    wild: bool,
}

impl Written {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.checked.extend_from_slice(bytes);
    }

    fn check(&mut self) {
        self.bytes.extend(check(&self.checked).to_le_bytes());
    }

    fn record(&mut self, body: &[u8]) {
        self.put(&(body.len() as u32).to_le_bytes());
        self.put(body);
        self.check();
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn write(u: &mut Unstructured<'_>) -> Result<Written> {
    let mut written = Written::default();
    written.put(b"ztmesh\0\x01");
    written.put(&text(SCOPE));
    written.check();
    for _ in 0..u.int_in_range(1..=16)? {
        let kind = u.int_in_range(0..=1_u8)?;
        let name = pick(u, &["a", "b", "", "shop/cart"])?.to_owned();
        match u.int_in_range(0..=8)? {
            0..=3 => {
                let (version, value) = (pick(u, &["1", ""])?.to_owned(), few(u, 8, |u| u.arbitrary())?);
                written.record(&[&[1, kind][..], &text(&name), &text(&version), &value].concat());
                written.now.insert((kind, name), (version, value));
            }
            4..=5 => {
                written.record(&[&[2, kind][..], &text(&name)].concat());
                written.now.remove(&(kind, name));
            }
            6..=7 => {
                written.record(&[3]);
                written.marks.push((written.bytes.len(), written.now.clone()));
            }
            _ => {
                // A record with the right check and anything in it: what comes behind it is not read.
                let body = u.arbitrary::<&[u8]>()?;
                written.record(body);
                written.wild = true;
                break;
            }
        }
    }
    Ok(written)
}

fn structured(u: &mut Unstructured<'_>) -> Result<()> {
    let written = write(u)?;
    let at_mark =
        |end: usize| written.marks.iter().rev().find(|(mark, _)| *mark <= end).map(|(_, contents)| contents);
    let whole = load(&written.bytes);
    // A record of anything may be a mark, or say something of any name.
    if !written.wild {
        assert_eq!(whole.as_ref(), at_mark(written.bytes.len()));
    }
    let good =
        if written.wild { written.marks.last().map_or(0, |(mark, _)| *mark) } else { written.bytes.len() };
    let end = u.int_in_range(0..=good)?;
    assert_eq!(load(&written.bytes[..end]).as_ref(), at_mark(end), "cut at {end}");
    let (at, by) = (u.int_in_range(0..=good.max(1) - 1)?, u.int_in_range(1..=255_u8)?);
    let mut bytes = written.bytes.clone();
    bytes[at] ^= by;
    assert_eq!(load(&bytes).as_ref(), at_mark(at), "another byte at {at}");
    Ok(())
}

/// Either a file as such, or one that is made of the bytes.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    match how % 4 {
        0 => {
            load(rest);
        }
        _ => {
            let _enough_bytes = structured(&mut Unstructured::new(rest));
        }
    }
}
