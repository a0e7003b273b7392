//! The file as operators and kubelet write it.

use std::fs;
use std::os::unix::fs::symlink;

use tokio::time::timeout;
use ztunnel_tls::testing::Leaf;
use ztunnel_tls::testing::Pki;

use super::*;

/// Waits for the next lists that are in force; longer than a busy machine takes.
async fn changed(changes: &mut tokio::sync::watch::Receiver<u64>, trust: &Trust) -> usize {
    timeout(Duration::from_secs(60), changes.changed()).await.expect("new lists").unwrap();
    let Revocation::Lists(lists) = trust.revocation() else { panic!("no lists") };
    lists.entries()
}

/// Writes it in one step: half a file would be a failure more.
fn put(path: &Path, text: impl AsRef<[u8]>) {
    let whole = path.with_extension("whole");
    fs::write(&whole, text).unwrap();
    fs::rename(&whole, path).unwrap();
}

async fn failed(status: &Status, times: u64) {
    let waiting = async {
        while status.failures() < times {
            sleep(LOOK / 10).await;
        }
    };
    timeout(Duration::from_secs(60), waiting).await.expect("a failure is counted");
}

#[tokio::test]
async fn changes_are_loaded_and_a_bad_file_leaves_the_last_good_lists_in_force() {
    let (dir, pki) = (tempfile::tempdir().unwrap(), Pki::new());
    let path = dir.path().join("ca-crl.pem");
    let (chain, _) = pki.certify(Leaf::of("spiffe://td.example/ns/shop/sa/a"));
    let missing = open(&path);
    assert!(matches!(missing, Revocation::Missing(_)), "{missing:?}");
    let trust = Trust::new(missing);
    let (trigger, signal) = shutdown::channel();
    let mut changes = trust.revocations();
    let status = watch(path.clone(), trust.clone(), signal);
    failed(&status, 1).await;

    put(&path, pki.revoking(&[]));
    assert_eq!(changed(&mut changes, &trust).await, 0);
    put(&path, pki.revoking(&[&chain[0]]));
    assert_eq!(changed(&mut changes, &trust).await, 1);

    for (times, bad) in [(2, "torn"), (3, "")] {
        put(&path, bad);
        failed(&status, times).await;
    }
    fs::remove_file(&path).unwrap();
    failed(&status, 4).await;
    assert!(matches!(trust.revocation(), Revocation::Lists(lists) if lists.entries() == 1));
    assert!(!changes.has_changed().unwrap());

    put(&path, [pki.revoking(&[&chain[0]]), pki.revoking_intermediate()].concat());
    assert_eq!(changed(&mut changes, &trust).await, 2);
    assert!(matches!(open(&path), Revocation::Lists(_)));
    trigger.close();
}

#[tokio::test]
async fn a_config_map_that_is_replaced_is_a_change() {
    let (dir, pki) = (tempfile::tempdir().unwrap(), Pki::new());
    let (chain, _) = pki.certify(Leaf::of("spiffe://td.example/ns/shop/sa/a"));
    for (version, lists) in [("..1", pki.revoking(&[])), ("..2", pki.revoking(&[&chain[0]]))] {
        fs::create_dir(dir.path().join(version)).unwrap();
        fs::write(dir.path().join(version).join("ca-crl.pem"), lists).unwrap();
    }
    symlink("..1", dir.path().join("..data")).unwrap();
    symlink("..data/ca-crl.pem", dir.path().join("ca-crl.pem")).unwrap();
    let path = dir.path().join("ca-crl.pem");
    let trust = Trust::new(open(&path));
    let (_trigger, signal) = shutdown::channel();
    let mut changes = trust.revocations();
    let _status = watch(path, trust.clone(), signal);
    symlink("..2", dir.path().join("..data_tmp")).unwrap();
    fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    assert_eq!(changed(&mut changes, &trust).await, 1);
}
