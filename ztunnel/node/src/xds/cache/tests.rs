//! What a file says after what was written, and after what was done to it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::xds::cache::file::Scan;
use crate::xds::cache::file::open;
use crate::xds::cache::file::scan;

const SCOPE: &str = "cluster-1";

/// By kind and name what is there: version and bytes.
type Contents = BTreeMap<(usize, String), (String, Vec<u8>)>;

/// What becomes of a resource: its version and bytes.
type Change<'a> = (Kind, &'a str, Option<(&'a str, &'a [u8])>);

fn batch(changes: &[Change<'_>]) -> Batch {
    let state = |it: &(&str, &[u8])| (Box::from(it.0), Bytes::copy_from_slice(it.1));
    changes.iter().map(|(kind, name, it)| ((*kind, Box::from(*name)), it.as_ref().map(state))).collect()
}

fn read(path: &Path) -> Result<(Contents, Scan), Unusable> {
    let file = open(path)?;
    let scan = scan(&file, SCOPE, file.metadata()?.len())?;
    let resources = scan.resources(&file)?;
    let mut contents = Contents::new();
    for (kind, resources) in Kind::ALL.into_iter().zip(resources) {
        for it in resources {
            let any = it.resource.expect("a resource");
            assert_eq!(any.type_url, kind.type_url());
            contents.insert((kind as usize, it.name), (it.version, any.value.to_vec()));
        }
    }
    Ok((contents, scan))
}

fn written(changes: &[(Kind, &str, &str, &[u8])]) -> Contents {
    let one =
        |it: &(Kind, &str, &str, &[u8])| ((it.0 as usize, it.1.to_owned()), (it.2.into(), it.3.to_vec()));
    changes.iter().map(one).collect()
}

fn writer(path: &Path) -> Writer {
    Writer {
        shared: Arc::default(),
        path: path.to_owned(),
        scope: SCOPE.to_owned(),
        counts: Arc::default(),
        base: None,
        log: None,
        given_up: false,
    }
}

use Kind::Address as A;
use Kind::Authorization as P;

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh");
    let mut first = writer(&path);
    assert!(first.load().is_none());
    let nothing = &[][..];
    first
        .write(&batch(&[
            (A, "a", Some(("1", b"x"))),
            (A, "b", Some(("", nothing))),
            (P, "a", Some(("1", b"p"))),
        ]))
        .unwrap();
    first.write(&batch(&[(A, "a", None), (A, "b", Some(("2", b"y"))), (P, "unknown", None)])).unwrap();
    let expected = written(&[(A, "b", "2", b"y"), (P, "a", "1", b"p")]);
    let (contents, scan) = read(&path).unwrap();
    assert_eq!((contents, scan.torn), (expected, false));
    // The next process goes on from there, in a file of its own.
    let mut second = writer(&path);
    let stored = second.load().unwrap();
    assert_eq!(stored.resources.each_ref().map(Vec::len), [1, 1]);
    assert!(stored.age < Duration::from_secs(60));
    second.write(&batch(&[(A, "c", Some(("1", b"z"))), (P, "a", None)])).unwrap();
    let expected = written(&[(A, "b", "2", b"y"), (A, "c", "1", b"z")]);
    assert_eq!(read(&path).unwrap().0, expected);
    // The first one sees that, and lets it be.
    first.write(&batch(&[(A, "d", Some(("1", b"z")))])).unwrap();
    assert_eq!(read(&path).unwrap().0, expected);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn what_was_good_long_ago_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh");
    let mut first = writer(&path);
    first.write(&batch(&[(A, "a", Some(("1", b"x")))])).unwrap();
    let confirmed = |ago: Duration| {
        File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now() - ago).unwrap();
    };
    confirmed(AGE_MAX - Duration::from_secs(60));
    assert!(writer(&path).load().is_some());
    confirmed(AGE_MAX + Duration::from_secs(60));
    assert!(writer(&path).load().is_none());
}

#[test]
fn a_storm_does_not_make_the_file_grow_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh");
    let mut writer = writer(&path);
    let large = vec![7; 100_000];
    let names: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    for round in 0..200 {
        writer.write(&batch(&[(A, &names[round % 10], Some((&round.to_string(), &large)))])).unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 4_000_000);
    }
    let (contents, _) = read(&path).unwrap();
    let versions: Vec<&str> = contents.values().map(|(version, _)| version.as_str()).collect();
    assert_eq!(versions, ["190", "191", "192", "193", "194", "195", "196", "197", "198", "199"]);
}

#[test]
fn what_could_not_be_written_is_written_later() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let path = missing.join("mesh");
    let mut writer = writer(&path);
    let first = batch(&[(A, "a", Some(("1", b"x")))]);
    assert!(writer.write(&first).is_err());
    fs::create_dir(&missing).unwrap();
    writer.write(&first).unwrap();
    // Somebody took it away.
    fs::remove_dir_all(&missing).unwrap();
    let second = batch(&[(A, "b", Some(("1", b"y")))]);
    assert!(writer.write(&second).is_err());
    fs::create_dir(&missing).unwrap();
    writer.write(&second).unwrap();
    assert_eq!(read(&path).unwrap().0, written(&[(A, "a", "1", b"x"), (A, "b", "1", b"y")]));
}

#[test]
fn what_others_may_have_written_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh");
    let reason = |path: &Path| match read(path) {
        Err(Unusable::Foreign(reason)) => reason,
        other => panic!("{other:?}"),
    };
    writer(&path).write(&batch(&[(A, "a", Some(("1", b"x")))])).unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
    assert_eq!(reason(&path), "others may have written it");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    read(&path).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(read(&link), Err(Unusable::Io(_))));
    assert_eq!(reason(folder.path()), "it is no file");
    let large = folder.path().join("large");
    File::create(&large).unwrap().set_len(file::FILE_MAX + 1).unwrap();
    assert_eq!(reason(&large), "it is too large");
    let with = |at: usize, byte: u8| {
        let mut other = bytes.clone();
        other[at] = byte;
        let path = folder.path().join("other");
        fs::write(&path, other).unwrap();
        reason(&path)
    };
    assert_eq!(with(7, 2), "another format");
    assert_eq!(with(8, 1), "another scope");
    assert_eq!(with(12, b'C'), "another scope");
    fs::write(&path, b"").unwrap();
    assert_eq!(reason(&path), "it has no header");
}

#[test]
fn the_thread_writes_what_it_is_given_and_keeps_what_it_cannot_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing").join("mesh");
    let counts = Arc::new(Counts::default());
    let (cache, stored) = Cache::open(path.clone(), SCOPE.to_owned(), Arc::clone(&counts)).unwrap();
    assert!(stored.blocking_recv().unwrap().is_none());
    let one = |name: &str, version: &str| Accepted {
        name: Box::from(name),
        resource: Some((Box::from(version), Bytes::from_static(b"x"))),
    };
    cache.note(A, vec![one("a", "1"), one("b", "1")]);
    cache.settle();
    while counts.cache_writes(false) == 0 {
        thread::yield_now();
    }
    // What comes later is newer, and part of the next write.
    cache.note(A, vec![one("b", "2")]);
    fs::create_dir(path.parent().unwrap()).unwrap();
    cache.settle();
    while counts.cache_writes(true) == 0 {
        thread::yield_now();
    }
    assert_eq!(read(&path).unwrap().0, written(&[(A, "a", "1", b"x"), (A, "b", "2", b"x")]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to a file: what is read is what was there at the last mark before the damage, or nothing.
    #[test]
    fn any_damage_leaves_an_earlier_mesh_or_none(
        batches in prop::collection::vec(
            prop::collection::vec((0..2usize, 0..6u8, prop::option::of(prop::collection::vec(any::<u8>(), 0..12))), 0..8),
            1..6,
        ),
        at in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        what in 0..5u8,
        noise in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mesh");
        let mut states = Vec::new();
        let mut contents = Contents::new();
        let mut log: Option<Log> = None;
        for changes in batches {
            let mut batch = Batch::new();
            for (kind, name, value) in changes {
                let key = (kind, format!("n{name}"));
                match &value {
                    Some(value) => contents.insert(key.clone(), ("v".to_owned(), value.clone())),
                    None => contents.remove(&key),
                };
                let state = value.map(|value| (Box::from("v"), Bytes::from(value)));
                batch.insert((Kind::ALL[kind], key.1.into_boxed_str()), state);
            }
            match &mut log {
                Some(log) => log.append(&batch).unwrap(),
                None => log = Some(Log::create(&path, SCOPE, None, &batch).unwrap()),
            }
            states.push((fs::metadata(&path).unwrap().len() as usize, contents.clone()));
        }
        let sound = fs::read(&path).unwrap();
        let (at, to) = (at.index(sound.len()), to.index(sound.len()));
        let (at, to) = (at.min(to), at.max(to));
        let mut damaged = sound.clone();
        match what {
            0 => damaged.truncate(at),
            1 => { damaged.drain(at..to); }
            2 => { damaged.splice(at..(at + noise.len()).min(sound.len()), noise); }
            3 => { damaged.splice(at..at, sound[at..to].to_vec()); }
            _ => damaged[at] = damaged[at].wrapping_add(noise.len() as u8),
        }
        fs::write(&path, &damaged).unwrap();
        let same = sound.iter().zip(&damaged).take_while(|(a, b)| a == b).count();
        let expected = states.iter().rev().find(|(end, _)| *end <= same);
        match (read(&path), expected) {
            (Ok((contents, scan)), Some((end, expected))) => {
                prop_assert_eq!(&contents, expected);
                prop_assert_eq!((scan.end as usize, scan.torn), (*end, damaged.len() > *end));
            }
            (Err(Unusable::Foreign(_) | Unusable::Damaged), None) => {}
            (found, expected) => prop_assert!(false, "{:?} in place of {:?}", found, expected),
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), header in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mesh");
        Log::create(&path, SCOPE, None, &Batch::new()).unwrap();
        let mut all = if header { fs::read(&path).unwrap()[..8 + 4 + SCOPE.len() + 4].to_vec() } else { Vec::new() };
        all.extend(bytes);
        fs::write(&path, all).unwrap();
        prop_assert!(read(&path).is_err());
    }
}
