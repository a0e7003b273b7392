//! Certificates from an authority that speaks `istio.v1.auth.IstioCertificateService`: istiod's, or one in its place.
//!
//! Every request makes a new key, which never leaves the process. The node asks in the name of its workloads
//! (impersonation): the authority lets it if its token is of a trusted account and the workload is on its node.

use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::future::FutureExt;
use futures_util::stream::FuturesUnordered;
use futures_util::stream::StreamExt;
use parking_lot::Mutex;
use rcgen::CertificateParams;
use rcgen::DistinguishedName;
use rcgen::KeyPair;
use rcgen::PKCS_ECDSA_P256_SHA256;
use rcgen::SanType;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::Instant;
use tokio::time::sleep;
use tonic::Code;
use tonic::Extensions;
use tonic::Request;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_proto::auth::IstioCertificateRequest;
use ztunnel_proto::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use ztunnel_proto::prost_types;
use ztunnel_tls::ca::CertificateAuthority;
use ztunnel_tls::ca::IssueError;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::configs::InvalidCredentials;
use ztunnel_tls::grpc;
use ztunnel_tls::grpc::Connector;
use ztunnel_tls::grpc::ControlPlane;

/// When the next address is asked as well, so that it has its turn before those who ask give up. The call before goes
/// on beside it: an authority that is slow is asked once, however slow it is.
const BESIDE_AFTER: Duration = Duration::from_secs(4);
/// An answer is not larger: a chain and its roots are some kilobytes.
const ANSWER_MAX: usize = 1 << 20;

/// How the authority is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where it is: the first that answers is stayed with until it does not.
    pub planes: Vec<grpc::Config>,
    /// How long certificates are to be valid (`SECRET_TTL`).
    pub life: Duration,
    /// Whether the token is the node's, who asks for its workloads (`PROXY_MODE=shared`), and not the workload's own.
    pub impersonate: bool,
}

/// An authority somewhere else.
pub struct Istiod {
    planes: Vec<Plane>,
    /// The one that answered last.
    current: AtomicUsize,
    life: Duration,
    impersonate: bool,
}

struct Plane {
    control: ControlPlane,
    /// Made anew when the roots of the control plane change.
    channel: Mutex<Option<(Connector, Channel)>>,
}

impl Istiod {
    /// Connects when it is first asked.
    pub fn new(config: Config) -> Self {
        let plane = |config| Plane { control: ControlPlane::new(config), channel: Mutex::default() };
        Self {
            planes: config.planes.into_iter().map(plane).collect(),
            current: AtomicUsize::new(0),
            life: config.life,
            impersonate: config.impersonate,
        }
    }

    async fn certify(&self, identity: &SpiffeId) -> Result<Credentials, IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let request = self.request(identity, &key)?;
        let chain = self.ask(request).await?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        credentials(identity, &chain, key)
    }

    fn request(&self, identity: &SpiffeId, key: &KeyPair) -> Result<IstioCertificateRequest, IssueError> {
        let mut params = CertificateParams::default();
        // No subject, so that the one alternative name is critical (RFC 5280, section 4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().map_err(signing)?)];
        let csr = params.serialize_request(key).and_then(|csr| csr.pem()).map_err(signing)?;
        let impersonated = || {
            let value = prost_types::value::Kind::StringValue(identity.to_string());
            let value = prost_types::Value { kind: Some(value) };
            prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
        };
        Ok(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.life.as_secs()).unwrap_or(i64::MAX),
            metadata: self.impersonate.then(impersonated),
        })
    }

    /// Asks one address, and the next when that one cannot be reached or takes its time, until one answers, yes or no.
    /// Each is asked once. How long all that may take is for the caller to say.
    async fn ask(&self, request: IstioCertificateRequest) -> Result<Vec<String>, IssueError> {
        let (first, count) = (self.current.load(Ordering::Relaxed), self.planes.len());
        let mut last = IssueError::Refused { reason: "no address of an authority is configured".to_owned() };
        let mut left = (0..count).map(|turn| (first + turn) % count);
        let call = |index: usize| {
            let request = request.clone();
            async move { (index, self.planes[index].call(request).await) }
        };
        let mut calls = FuturesUnordered::new();
        let mut beside = pin!(sleep(BESIDE_AFTER));
        loop {
            if calls.is_empty() {
                let Some(index) = left.next() else { return Err(last) };
                calls.push(call(index));
                beside.as_mut().reset(Instant::now() + BESIDE_AFTER);
            }
            let more = left.len() > 0;
            tokio::select! {
                Some((index, answer)) = calls.next() => match answer {
                    Err(error @ IssueError::Unreachable(_)) => {
                        if count > 1 {
                            let address = self.planes[index].control.address();
                            tracing::debug!(%address, %error, "asking the next authority");
                        }
                        self.current.store((index + 1) % count, Ordering::Relaxed);
                        last = error;
                    }
                    answered => {
                        self.current.store(index, Ordering::Relaxed);
                        return answered;
                    }
                },
                () = &mut beside, if more => {
                    if let Some(index) = left.next() {
                        let address = self.planes[index].control.address();
                        tracing::debug!(%address, "the authority takes its time: asking the next one as well");
                        calls.push(call(index));
                    }
                    beside.as_mut().reset(Instant::now() + BESIDE_AFTER);
                }
            }
        }
    }
}

impl CertificateAuthority for Istiod {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        self.certify(identity).boxed()
    }

    fn life(&self) -> Option<Duration> {
        Some(self.life)
    }
}

impl Plane {
    async fn call(&self, request: IstioCertificateRequest) -> Result<Vec<String>, IssueError> {
        let headers = self.control.headers().map_err(unreachable)?;
        let request = Request::from_parts(MetadataMap::from_headers(headers), Extensions::default(), request);
        let mut client =
            IstioCertificateServiceClient::new(self.channel()?).max_decoding_message_size(ANSWER_MAX);
        match client.create_certificate(request).await {
            Ok(answer) => Ok(answer.into_inner().cert_chain),
            Err(status) => Err(refused(status)),
        }
    }

    fn channel(&self) -> Result<Channel, IssueError> {
        let connector = self.control.connector().map_err(unreachable)?;
        let mut held = self.channel.lock();
        match &*held {
            Some((made_with, channel)) if *made_with == connector => Ok(channel.clone()),
            _ => {
                let channel = grpc::channel(self.control.address(), connector.clone());
                *held = Some((connector, channel.clone()));
                Ok(channel)
            }
        }
    }
}

fn signing(error: rcgen::Error) -> IssueError {
    IssueError::Signing(Box::new(error))
}

fn unreachable(error: impl std::error::Error + Send + Sync + 'static) -> IssueError {
    IssueError::Unreachable(Box::new(error))
}

/// What the authority's no means, and what to do about it.
fn refused(status: Status) -> IssueError {
    let advice = match status.code() {
        Code::Unauthenticated => {
            "it does not accept the token: see that the file AUTH_TOKEN names is there, is for the audience istio-ca, \
             and is not past its end"
        }
        Code::PermissionDenied => {
            "this node may not ask for this identity: its service account must be one of istiod's \
             CA_TRUSTED_NODE_ACCOUNTS, its token bound to its pod, and a pod with the identity must run on the same \
             node; of a new pod istiod may only not have heard yet"
        }
        Code::InvalidArgument => "it does not accept the request: see that SECRET_TTL is not too long for it",
        Code::Unimplemented => "it is no certificate authority: see CA_ADDRESS",
        Code::FailedPrecondition | Code::NotFound | Code::OutOfRange | Code::AlreadyExists => "see its log",
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => return IssueError::Unreachable(Box::new(status)),
    };
    // The authority's words are for people, and somebody else's: on one line, and not without end.
    let said: String =
        status.message().chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    IssueError::Refused { reason: format!("{said:?} ({:?}): {advice}", status.code()) }
}

/// Makes credentials of an answer: the leaf, its intermediates, and in the last element all roots.
fn credentials(
    identity: &SpiffeId,
    chain: &[String],
    key: PrivateKeyDer<'static>,
) -> Result<Credentials, IssueError> {
    let Some((bundle, chain)) = chain.split_last().filter(|(_, chain)| !chain.is_empty()) else {
        return Err(InvalidCredentials::NoRoots.into());
    };
    let mut certificates = Vec::with_capacity(chain.len());
    for (index, pem) in chain.iter().enumerate() {
        let found = read(pem).map_err(|_| InvalidCredentials::Chain { index })?;
        if found.is_empty() {
            return Err(InvalidCredentials::Chain { index }.into());
        }
        certificates.extend(found);
    }
    let mut roots = RootCertStore::empty();
    let bundle = read(bundle).map_err(|_| InvalidCredentials::NoRoots)?;
    let all = bundle.len();
    // One that cannot be used is no reason to do without the others; that none is, is found out next.
    let used: Vec<_> = bundle.into_iter().filter(|root| roots.add(root.clone()).is_ok()).collect();
    if used.len() < all {
        let unused = all - used.len();
        tracing::warn!(unused, "some roots of the certificate authority cannot be used");
    }
    let credentials = Credentials::new(identity.clone(), certificates, key, roots.into())?;
    Ok(credentials.with_root_certificates(used.into()))
}

fn read(pem: &str) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect()
}

#[cfg(test)]
mod tests;
