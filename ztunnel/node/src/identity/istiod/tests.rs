//! An authority behind real connections, which answers as it is told.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::timeout;
use x509_parser::prelude::FromDer;
use ztunnel_tests::ca::Answer;
use ztunnel_tests::ca::Asked;
use ztunnel_tests::ca::Authority;
use ztunnel_tests::ca::Keys;
use ztunnel_tls::grpc::Roots;
use ztunnel_tls::grpc::Token;
use ztunnel_tls::testing::id;

use super::*;

const WHO: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn authority(name: &str) -> Authority {
    Authority::start(Keys::new(name), LOCAL).unwrap()
}

fn plane(address: SocketAddr, roots: Roots) -> grpc::Config {
    grpc::Config {
        address: address.to_string().parse().unwrap(),
        roots,
        alternate: None,
        token: Token::Literal("one".to_owned()),
        cluster: "Kubernetes".to_owned(),
        headers: vec![("x-team".parse().unwrap(), "mesh".parse().unwrap())],
    }
}

fn trusting(authority: &Authority) -> grpc::Config {
    plane(authority.address(), Roots::Pem(authority.keys().root_pem()))
}

fn client(planes: Vec<grpc::Config>) -> Istiod {
    Istiod::new(Config { planes, life: DAY, impersonate: true })
}

async fn ask(istiod: &Istiod) -> Result<Credentials, IssueError> {
    timeout(Duration::from_secs(30), istiod.issue(&id(WHO))).await.expect("an answer or an error")
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_istiod_expects() {
    let authority = authority("root");
    let istiod = client(vec![trusting(&authority)]);
    let credentials = ask(&istiod).await.unwrap();
    assert_eq!(credentials.identity(), &id(WHO));
    assert_eq!(credentials.chain().len(), 2, "leaf and intermediate, not the root");
    assert_eq!(credentials.roots().len(), 1);
    let other = ask(&istiod).await.unwrap();
    assert_ne!(credentials.serial(), other.serial());

    let asked = authority.asked();
    let [Asked { authorization, cluster, team, impersonated, validity, csr }, again] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert_eq!(authorization.as_deref(), Some("Bearer one"));
    assert_eq!(cluster.as_deref(), Some("Kubernetes"));
    assert_eq!(team.as_deref(), Some("mesh"));
    assert_eq!(impersonated.as_deref(), Some(WHO));
    assert_eq!(*validity, 86400);
    assert_ne!(csr, &again.csr, "a new key each time");

    let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes()).unwrap();
    assert_eq!(pem.label, "CERTIFICATE REQUEST");
    let (_, request) =
        x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents).unwrap();
    let info = &request.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    assert_eq!(
        info.subject_pki.algorithm.parameters.as_ref().unwrap().as_oid().unwrap().to_id_string(),
        "1.2.840.10045.3.1.7",
        "P-256"
    );
    let extensions: Vec<_> = info
        .iter_attributes()
        .flat_map(|attribute| match attribute.parsed_attribute() {
            x509_parser::cri_attributes::ParsedCriAttribute::ExtensionRequest(requested) => {
                requested.extensions.clone()
            }
            _ => vec![],
        })
        .collect();
    let [extension] = &extensions[..] else { panic!("{extensions:?}") };
    assert!(extension.critical);
    let x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) =
        extension.parsed_extension()
    else {
        panic!("{extension:?}");
    };
    assert_eq!(names.general_names, [x509_parser::extensions::GeneralName::URI(WHO)]);
}

#[tokio::test]
async fn a_workload_that_asks_for_itself_impersonates_nobody() {
    let authority = authority("root");
    let config = Config { planes: vec![trusting(&authority)], life: DAY, impersonate: false };
    ask(&Istiod::new(config)).await.unwrap();
    assert_eq!(authority.asked()[0].impersonated, None);
}

#[tokio::test]
async fn answers_that_cannot_be_used_say_why() {
    let (authority, other) = (authority("root"), Keys::new("other"));
    let istiod = client(vec![trusting(&authority)]);
    for (answer, expected) in [
        (Answer::NoRoot, "no root certificate was given"),
        (Answer::Nothing, "no root certificate was given"),
        (Answer::OtherRoot(other.root_pem()), "does not lead to the given roots"),
        (
            Answer::Identity("spiffe://cluster.local/ns/shop/sa/other"),
            "got one of spiffe://cluster.local/ns/shop/sa/other",
        ),
        (Answer::OtherKey, "the private key does not fit"),
        (Answer::Garbage, "certificate 0 of the chain cannot be read"),
        (
            Answer::Refuse(Code::Unauthenticated, "no\nway"),
            "\"no way\" (Unauthenticated): it does not accept the token",
        ),
        (Answer::Refuse(Code::PermissionDenied, ""), "CA_TRUSTED_NODE_ACCOUNTS"),
        (Answer::Refuse(Code::InvalidArgument, "ttl"), "SECRET_TTL"),
        (Answer::Refuse(Code::Unimplemented, ""), "see CA_ADDRESS"),
        (Answer::Refuse(Code::Unavailable, "busy"), "cannot be reached"),
    ] {
        authority.answer(answer.clone());
        let error = told(&ask(&istiod).await.unwrap_err());
        assert!(error.contains(expected), "{answer:?}: {error:?} does not say {expected:?}");
    }
    authority.answer(Answer::Issue);
    ask(&istiod).await.unwrap();
}

#[tokio::test]
async fn all_roots_of_the_last_element_are_taken_and_clocks_are_the_worker_s_to_judge() {
    let (authority, other) = (authority("root"), Keys::new("other"));
    let istiod = client(vec![trusting(&authority)]);
    authority.answer(Answer::TwoRoots(other.root_pem()));
    let credentials = ask(&istiod).await.unwrap();
    assert_eq!(credentials.roots().len(), 2);
    // Whoever looks at the certificates sees both.
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let shown = credentials.root_certificates();
    let both = [authority.keys().root_pem(), other.root_pem()].map(|pem| der(&pem));
    assert!(shown.len() == 2 && both.iter().all(|root| shown.contains(root)), "{shown:?}");
    authority.answer(Answer::Between(-7200, -3600));
    assert!(ask(&istiod).await.unwrap().not_after() < SystemTime::now());
    authority.answer(Answer::Between(3600, 7200));
    assert!(ask(&istiod).await.unwrap().not_before() > SystemTime::now());
}

#[tokio::test]
async fn the_next_address_is_asked_when_one_is_away_and_stayed_with() {
    let (mut first, second) = (authority("first"), authority("second"));
    let istiod = client(vec![trusting(&first), trusting(&second)]);
    let asked = |authority: &Authority| authority.asked().len();
    ask(&istiod).await.unwrap();
    assert_eq!((asked(&first), asked(&second)), (1, 0));
    first.stop();
    ask(&istiod).await.unwrap();
    first.restart().unwrap();
    ask(&istiod).await.unwrap();
    assert_eq!((asked(&first), asked(&second)), (0, 2));
    // A no is an answer: nobody else is asked.
    second.answer(Answer::Refuse(Code::PermissionDenied, "no"));
    assert!(matches!(ask(&istiod).await, Err(IssueError::Refused { .. })));
    assert_eq!((asked(&first), asked(&second)), (0, 1));
    second.answer(Answer::Refuse(Code::Unavailable, "draining"));
    ask(&istiod).await.unwrap();
    assert_eq!((asked(&first), asked(&second)), (1, 1));
    // It hangs: another is asked beside it.
    first.answer(Answer::Hang);
    second.answer(Answer::Issue);
    ask(&istiod).await.unwrap();
    assert_eq!((asked(&first), asked(&second)), (1, 1));
}

#[tokio::test]
async fn an_authority_that_is_slow_is_asked_once_and_its_answer_counts() {
    let authority = authority("root");
    authority.answer(Answer::After(Duration::from_secs(6)));
    let istiod = client(vec![trusting(&authority)]);
    ask(&istiod).await.unwrap();
    assert_eq!(authority.asked().len(), 1);
}

#[tokio::test]
async fn of_two_authorities_that_are_slow_the_first_answer_counts() {
    let (slow, slower) = (authority("slow"), authority("slower"));
    slow.answer(Answer::After(Duration::from_secs(6)));
    slower.answer(Answer::Hang);
    let istiod = client(vec![trusting(&slow), trusting(&slower)]);
    let credentials = ask(&istiod).await.unwrap();
    assert_eq!(credentials.identity(), &id(WHO));
    assert_eq!((slow.asked().len(), slower.asked().len()), (1, 1));
    // It is stayed with.
    slow.answer(Answer::Issue);
    ask(&istiod).await.unwrap();
    assert_eq!((slow.asked().len(), slower.asked().len()), (1, 0));
}

#[tokio::test]
async fn an_authority_that_comes_back_or_changes_its_root_is_connected_to_anew() {
    let dir = tempfile::tempdir().unwrap();
    let roots = dir.path().join("root-cert.pem");
    let mut authority = authority("root");
    let address = authority.address();
    std::fs::write(&roots, authority.keys().root_pem()).unwrap();
    let istiod = client(vec![plane(address, Roots::File(roots.clone()))]);
    ask(&istiod).await.unwrap();
    authority.stop();
    assert!(matches!(ask(&istiod).await, Err(IssueError::Unreachable(_))));
    authority.restart().unwrap();
    ask(&istiod).await.unwrap();

    drop(authority);
    let authority = Authority::start(Keys::new("new root"), address).unwrap();
    let error = told(&ask(&istiod).await.unwrap_err());
    assert!(error.contains("cannot be reached"), "{error}");
    std::fs::write(&roots, authority.keys().root_pem()).unwrap();
    ask(&istiod).await.unwrap();
}

#[tokio::test]
async fn a_control_plane_nobody_vouches_for_gets_no_token() {
    let authority = authority("root");
    let istiod = client(vec![plane(authority.address(), Roots::Pem(Keys::new("other").root_pem()))]);
    let error = ask(&istiod).await.unwrap_err();
    assert!(told(&error).contains("UnknownIssuer"), "{}", told(&error));
    assert!(authority.asked().is_empty());
    let none = ask(&client(vec![])).await.unwrap_err();
    assert!(matches!(none, IssueError::Refused { .. }), "{none:?}");
}

#[tokio::test]
async fn peers_certified_by_it_accept_each_other() {
    let authority = authority("root");
    let istiod = Arc::new(client(vec![trusting(&authority)]));
    let (one, other) = (ask(&istiod).await.unwrap(), ask(&istiod).await.unwrap());
    let outcome = ztunnel_tls::testing::handshake(one.client_config(&[id(WHO)]), other.server_config());
    outcome.client.unwrap();
    outcome.server.unwrap();
}
