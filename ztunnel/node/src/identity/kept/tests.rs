use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use futures_util::future::FutureExt;
use tempfile::TempDir;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_tls::ca::CertificateAuthority;
use ztunnel_tls::ca::IssueError;
use ztunnel_tls::testing::Pki;
use ztunnel_tls::testing::id;
use ztunnel_tls::trust::Trust;

use super::*;
use crate::identity::worker;

const HOUR: Duration = Duration::from_secs(3600);

/// Certifies for so long.
struct Near(Pki, Duration);

impl CertificateAuthority for Near {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        let now = SystemTime::now();
        std::future::ready(Ok(self.0.credentials(identity, now - HOUR, now + self.1))).boxed()
    }
}

fn who() -> SpiffeId {
    id("spiffe://td.example/ns/shop/sa/a")
}

fn file(bytes: &[u8], mode: u32) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("certificates");
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    (dir, path)
}

fn held() -> Zeroizing<Vec<u8>> {
    let now = SystemTime::now();
    inheritance::encode(&[Arc::new(Pki::new().credentials(&who(), now - HOUR, now + HOUR))])
}

async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let within = tokio::time::timeout(Duration::from_secs(60), async {
        while !is_so() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(within.await.is_ok(), "{what}");
}

#[test]
fn only_a_file_that_is_its_owner_s_alone_is_believed() {
    for (mode, good) in
        [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false), (0o602, false)]
    {
        let (_dir, path) = file(&held(), mode);
        assert_eq!(load(&path).is_ok(), good, "{mode:o}");
    }
    let (dir, path) = file(&held(), 0o600);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(load(&link).is_err(), "a link");
    assert!(load(dir.path()).is_err(), "a directory");
    assert!(load(&dir.path().join("none")).unwrap().is_empty());
    let torn = &held()[..100];
    let (_dir, path) = file(torn, 0o600);
    assert!(matches!(load(&path), Err(Unusable::Damaged(_))));
}

#[test]
fn a_file_of_others_is_not_believed() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (_dir, path) = file(&held(), 0o600);
    std::os::unix::fs::chown(&path, Some(1), None).unwrap();
    assert!(matches!(load(&path), Err(Unusable::Foreign(_))));
}

#[tokio::test]
async fn what_can_be_used_is_kept_for_the_owner_alone_and_goes_with_its_workload() {
    let (trigger, signal) = shutdown::channel();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("certificates");
    // An interrupted write of another daemon is in nobody's way.
    fs::write(beside(&path), "torn").unwrap();
    let identities = worker::start(Arc::new(Near(Pki::new(), HOUR)), Trust::default(), signal.clone());
    let keeping = keep(path.clone(), identities.clone(), signal);
    identities.retain([who()].into());
    eventually("the certificate is kept", || load(&path).is_ok_and(|held| held.len() == 1)).await;
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(load(&path).unwrap()[0].serial(), identities.current(&who()).unwrap().serial());
    identities.retain([].into());
    eventually("the file has gone", || !path.exists()).await;
    identities.retain([who()].into());
    eventually("the certificate is kept again", || load(&path).is_ok_and(|held| held.len() == 1)).await;
    // What a daemon that drains knows no longer counts.
    trigger.drain();
    keeping.await.unwrap();
    identities.retain([].into());
    assert!(path.exists());
    remove(&path).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    remove(&path).unwrap();
}
