use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Barrier;
use std::thread;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::server::ParsedCertificate;
use tempfile::TempDir;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;

const WORKLOAD: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn open(dir: &Path) -> Result<Authority, AuthorityError> {
    Authority::open(dir, "node-1", &TrustDomain::default())
}

fn id() -> SpiffeId {
    WORKLOAD.parse().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

fn message(result: Result<Authority, AuthorityError>) -> String {
    result.err().expect("the authority was opened").to_string()
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

#[test]
fn a_leaf_says_what_it_should_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let now = SystemTime::now();
    let credentials = open(dir.path()).unwrap().issue_at(&id(), now).unwrap();
    assert_eq!(credentials.chain().len(), 2);
    let (_, leaf) = X509Certificate::from_der(&credentials.chain()[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI(WORKLOAD)]);
    let uses = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(uses.server_auth && uses.client_auth && !uses.any && uses.other.is_empty());
    assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1, "digitalSignature alone");
    assert!(!leaf.is_ca());
    assert_eq!(leaf.validity().not_before.timestamp(), seconds(now - SKEW));
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(now + LEAF_LIFE));
    assert_eq!(leaf.raw_serial().len(), 16);
    let algorithm = leaf.public_key().algorithm.parameters.as_ref().unwrap().as_oid().unwrap();
    assert_eq!(algorithm.to_id_string(), "1.2.840.10045.3.1.7", "P-256");
}

#[test]
fn every_certificate_has_a_serial_and_key_of_its_own() {
    let dir = TempDir::new().unwrap();
    let authority = open(dir.path()).unwrap();
    let [one, two] = [(); 2].map(|()| authority.issue_at(&id(), SystemTime::now()).unwrap());
    assert_ne!(one.serial(), two.serial());
    let keys = [&one, &two].map(|credentials| {
        let (_, leaf) = X509Certificate::from_der(&credentials.chain()[0]).unwrap();
        leaf.public_key().raw.to_vec()
    });
    assert_ne!(keys[0], keys[1]);
}

#[test]
fn the_intermediate_is_the_nodes_and_may_sign_leaves_only() {
    let dir = TempDir::new().unwrap();
    let credentials = open(dir.path()).unwrap().issue_at(&id(), SystemTime::now()).unwrap();
    let (_, intermediate) = X509Certificate::from_der(&credentials.chain()[1]).unwrap();
    let name = intermediate.subject().iter_common_name().next().unwrap().as_str().unwrap();
    assert_eq!(name, "node-1");
    let constraints = intermediate.basic_constraints().unwrap().unwrap().value;
    assert!(constraints.ca);
    assert_eq!(constraints.path_len_constraint, Some(0));
}

#[test]
fn the_intermediate_is_replaced_before_it_would_cut_a_leaf_short() {
    let dir = TempDir::new().unwrap();
    let authority = open(dir.path()).unwrap();
    let day = Duration::from_secs(24 * 60 * 60);
    let issue = |after: u32| authority.issue_at(&id(), SystemTime::now() + after * day).unwrap();
    let (first, later, last) = (issue(0), issue(27), issue(29));
    assert_eq!(first.chain()[1], later.chain()[1]);
    assert_ne!(later.chain()[1], last.chain()[1]);
    assert!(last.not_after() > SystemTime::now() + 30 * day - SKEW);
}

#[test]
fn an_intermediate_of_a_clock_that_was_ahead_is_replaced_once_it_is_right() {
    let dir = TempDir::new().unwrap();
    let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 60 * 60));
    let authority = open(dir.path()).unwrap();
    // So far ahead that the intermediate was made anew then.
    let ahead = authority.issue_at(&id(), now + 29 * day).unwrap();
    assert!(ahead.validity().is_ahead(now));
    let right = authority.issue_at(&id(), now).unwrap();
    assert!(right.validity().holds_at(now), "{:?}", right.validity());
    assert_ne!(ahead.chain()[1], right.chain()[1]);
}

#[test]
fn nothing_outlives_the_root() {
    let dir = TempDir::new().unwrap();
    let now = SystemTime::now();
    let authority = open(dir.path()).unwrap();
    let end = authority.root.not_after();
    let hour = Duration::from_secs(3600);
    let last = authority.issue_at(&id(), end - hour).unwrap();
    assert_eq!(last.not_after(), end);
    let error = authority.issue_at(&id(), end).unwrap_err();
    assert!(error.to_string().contains("the root certificate has expired"), "{error}");
    assert!(end > now + Duration::from_secs(3600 * 24 * 3649), "ten years");
    let expired = Authority::open_at(dir.path(), "node-1", &TrustDomain::default(), end);
    assert!(message(expired).contains("has expired (is this node's clock right?)"));
}

#[test]
fn key_and_directory_are_the_owners_alone() {
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("state");
    open(&dir).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("root-key.pem")), 0o600);
    assert_eq!(mode(&dir.join("root-cert.pem")), 0o644);
    let mut files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["root-cert.pem", "root-key.pem", "root.lock"]);
}

#[test]
fn a_key_or_directory_open_to_others_is_refused() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).unwrap();
    let key = dir.path().join("root-key.pem");
    for bits in [0o640, 0o604, 0o660, 0o601] {
        fs::set_permissions(&key, fs::Permissions::from_mode(bits)).unwrap();
        let text = message(open(dir.path()));
        assert!(text.contains(&format!("chmod 600 {}", key.display())), "{text}");
    }
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
    open(dir.path()).expect("a key that not even its owner may write is fine");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let text = message(open(dir.path()));
    assert!(text.contains(&format!("chmod go-w {}", dir.path().display())), "{text}");
}

#[test]
fn a_restart_keeps_the_root_and_renews_the_intermediate() {
    let dir = TempDir::new().unwrap();
    let (before, after) = (open(dir.path()).unwrap(), open(dir.path()).unwrap());
    assert_eq!(before.root.certificate(), after.root.certificate());
    let [one, two] = [&before, &after].map(|ca| ca.issue_at(&id(), SystemTime::now()).unwrap());
    assert_ne!(one.chain()[1], two.chain()[1]);
    assert!(vouches(&before, &two) && vouches(&after, &one));
}

/// Whether the roots of `authority` vouch for `credentials`.
fn vouches(authority: &Authority, credentials: &Credentials) -> bool {
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(&credentials.chain()[0]).unwrap(),
        &authority.roots,
        &credentials.chain()[1..],
        rustls::pki_types::UnixTime::now(),
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all,
    )
    .is_ok()
}

#[test]
fn daemons_that_start_at_once_share_one_root() {
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("state");
    let barrier = Barrier::new(8);
    let authorities: Vec<_> = thread::scope(|scope| {
        let start = || {
            barrier.wait();
            open(&dir).unwrap()
        };
        // All are started before the first is waited for.
        let threads = [(); 8].map(|()| scope.spawn(start));
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let on_disk = CertificateDer::from_pem_file(dir.join("root-cert.pem")).unwrap();
    for authority in &authorities {
        assert_eq!(authority.root.certificate(), &on_disk);
        assert!(vouches(&authorities[0], &authority.issue_at(&id(), SystemTime::now()).unwrap()));
    }
}

#[test]
fn a_start_that_was_interrupted_is_finished() {
    let dir = TempDir::new().unwrap();
    let before = open(dir.path()).unwrap();
    let issued = before.issue_at(&id(), SystemTime::now()).unwrap();
    // After the key, before the certificate; and a leftover with bad permissions.
    fs::remove_file(dir.path().join("root-cert.pem")).unwrap();
    let leftover = dir.path().join("root-cert.pem.new");
    fs::write(&leftover, "half a cert").unwrap();
    fs::set_permissions(&leftover, fs::Permissions::from_mode(0o666)).unwrap();
    let after = open(dir.path()).unwrap();
    assert!(vouches(&after, &issued), "the same key signs under the same name");
    assert!(!leftover.exists());
    assert_eq!(mode(&dir.path().join("root-cert.pem")), 0o644);
}

#[test]
fn files_that_make_no_root_are_refused_and_left_alone() {
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    open(dir.path()).unwrap();
    open(other.path()).unwrap();
    let (key, certificate) = (dir.path().join("root-key.pem"), dir.path().join("root-cert.pem"));
    let (good_key, good_certificate) = (fs::read(&key).unwrap(), fs::read(&certificate).unwrap());
    let other_certificate = fs::read(other.path().join("root-cert.pem")).unwrap();

    let cases: [(&Path, &[u8], &str); 5] = [
        (&certificate, &other_certificate, "are not a pair"),
        (&certificate, b"", "holds no certificate"),
        (&certificate, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no readable"),
        (&key, b"", "holds no usable private key"),
        (&key, &good_certificate, "holds no usable private key"),
    ];
    for (path, content, expected) in cases {
        fs::write(path, content).unwrap();
        let text = message(open(dir.path()));
        assert!(text.contains(expected), "{text:?} does not say {expected:?}");
        assert!(text.contains("begin with a new root"), "{text}");
        assert_eq!(fs::read(path).unwrap(), content);
        fs::write(&key, &good_key).unwrap();
        fs::write(&certificate, &good_certificate).unwrap();
        open(dir.path()).expect("the good files are back");
    }
    fs::remove_file(&key).unwrap();
    assert!(message(open(dir.path())).contains("root-key.pem is missing, while root-cert.pem is there"));
    assert!(!key.exists());
}

#[test]
fn a_root_serves_the_trust_domain_it_names() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).unwrap();
    let other = TrustDomain::new("other.example").unwrap();
    let text = message(Authority::open(dir.path(), "node-1", &other));
    assert!(text.contains("of trust domain cluster.local, the mesh is of other.example"), "{text}");
}

#[test]
fn an_own_root_that_names_no_trust_domain_serves_any() {
    let dir = TempDir::new().unwrap();
    let now = SystemTime::now();
    let key = KeyPair::generate().unwrap();
    let write = |path_length: u8| {
        let params = authority("our company", path_length, now - SKEW, now + LEAF_LIFE);
        let certificate = params.self_signed(&key).unwrap();
        fs::write(dir.path().join("root-cert.pem"), certificate.pem()).unwrap();
        fs::write(dir.path().join("root-key.pem"), key.serialize_pem()).unwrap();
        fs::set_permissions(dir.path().join("root-key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    };
    write(1);
    let authority =
        Authority::open(dir.path(), "node-1", &TrustDomain::new("other.example").unwrap()).unwrap();
    let id: SpiffeId = "spiffe://other.example/ns/a/sa/b".parse().unwrap();
    assert_eq!(authority.issue_at(&id, now).unwrap().identity(), &id);
    write(0);
    assert!(message(open(dir.path())).contains("is not the certificate of a root that has intermediates"));
}

#[test]
fn further_certificates_beside_the_own_are_trusted() {
    let (old, new) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (old_ca, new_ca) = (open(old.path()).unwrap(), open(new.path()).unwrap());
    let [of_old, of_new] = [&old_ca, &new_ca].map(|ca| ca.issue_at(&id(), SystemTime::now()).unwrap());
    assert!(!vouches(&old_ca, &of_new));
    let [old_path, new_path] = [&old, &new].map(|dir| dir.path().join("root-cert.pem"));
    let both = fs::read_to_string(&old_path).unwrap() + &fs::read_to_string(new_path).unwrap();
    fs::write(&old_path, &both).unwrap();
    let reopened = open(old.path()).unwrap();
    assert_eq!(reopened.root.certificate(), old_ca.root.certificate());
    assert!(vouches(&reopened, &of_old) && vouches(&reopened, &of_new));
    assert_eq!(fs::read_to_string(old_path).unwrap(), both);
}
