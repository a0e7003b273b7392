//! A certificate authority that speaks istiod's protocol and answers as it is told: well, badly, or not at all.
//!
//! It runs on a thread of its own, so that it can be asked from anywhere.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::SystemTime;

use hyper::server::conn::http2;
use hyper_util::rt::TokioExecutor;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::CertificateRevocationListParams;
use rcgen::CertificateSigningRequestParams;
use rcgen::CertifiedIssuer;
use rcgen::DistinguishedName;
use rcgen::DnType;
use rcgen::ExtendedKeyUsagePurpose;
use rcgen::IsCa;
use rcgen::KeyIdMethod;
use rcgen::KeyPair;
use rcgen::KeyUsagePurpose;
use rcgen::RevokedCertParams;
use rcgen::SanType;
use rcgen::SerialNumber;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use ztunnel_proto::auth::IstioCertificateRequest;
use ztunnel_proto::auth::IstioCertificateResponse;
use ztunnel_proto::auth::istio_certificate_service_server::IstioCertificateService;
use ztunnel_proto::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use ztunnel_proto::prost_types::value::Kind;

const HOUR: Duration = Duration::from_secs(3600);

/// What the authority does with a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// What was asked for: leaf, intermediate, root.
    Issue,
    /// The same with two roots in the last element, the second of another authority (PEM).
    TwoRoots(String),
    /// Nothing, for ever.
    Hang,
    /// What was asked for, after so long.
    After(Duration),
    /// This status.
    Refuse(Code, &'static str),
    /// A leaf, and nothing else.
    NoRoot,
    /// Not even that.
    Nothing,
    /// The root of this other authority (PEM) behind a chain of this one.
    OtherRoot(String),
    /// A certificate of somebody else.
    Identity(&'static str),
    /// A certificate of another key.
    OtherKey,
    /// A certificate that lies between these times, in seconds from now.
    Between(i64, i64),
    /// Text that is no PEM.
    Garbage,
}

/// What was asked.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The header `authorization`.
    pub authorization: Option<String>,
    /// The header `clusterid`.
    pub cluster: Option<String>,
    /// The further header `x-team`, as an operator may configure one.
    pub team: Option<String>,
    /// For whom, by the metadata.
    pub impersonated: Option<String>,
    /// For how many seconds.
    pub validity: i64,
    /// The signing request.
    pub csr: String,
}

/// Who holds a token.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Its own identity: what it gets without asking for another one.
    pub identity: String,
    /// In whose names it may ask, too: a node proxy in those of the pods on its node, anybody else in nobody's.
    pub impersonates: Vec<String>,
}

struct State {
    answer: Answer,
    /// By token. While it is empty everybody gets what is asked for.
    callers: BTreeMap<String, Caller>,
    asked: Vec<Asked>,
    /// For whom certificates were made, and which: PEM.
    issued: Vec<(Option<String>, String)>,
}

/// The roots of an authority, and its key.
pub struct Keys {
    root: CertifiedIssuer<'static, KeyPair>,
    intermediate: CertifiedIssuer<'static, KeyPair>,
}

impl Keys {
    /// New ones. `name` tells roots apart in messages.
    pub fn new(name: &str) -> Arc<Self> {
        let key = || KeyPair::generate().expect("a key can be made");
        let root = CertifiedIssuer::self_signed(signing(name), key()).expect("a root can be made");
        let intermediate = CertifiedIssuer::signed_by(signing(&format!("{name} below")), key(), &root)
            .expect("the root may sign");
        Arc::new(Self { root, intermediate })
    }

    /// The root certificate.
    pub fn root_pem(&self) -> String {
        self.root.pem()
    }

    /// For a program that takes part in the mesh by itself, as `identity`: the chain and the key, as PEM.
    pub fn for_peer(&self, identity: &str) -> (String, String) {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.try_into().expect("an identity is ASCII"))];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = SystemTime::now();
        (params.not_before, params.not_after) =
            ((now - Duration::from_secs(120)).into(), (now + HOUR).into());
        let certificate = params.signed_by(&key, &self.intermediate).expect("the intermediate may sign");
        (certificate.pem() + &self.intermediate.pem(), key.serialize_pem())
    }

    /// For a server of the control plane: a certificate for `localhost` (127.0.0.1) and istiod's name.
    pub fn serving(&self) -> ServerConfig {
        let key = KeyPair::generate().expect("a key can be made");
        let names = vec!["localhost".to_owned(), "istiod.istio-system.svc".to_owned()];
        let mut params = CertificateParams::new(names).expect("the names are host names");
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        let certificate = params.signed_by(&key, &self.root).expect("the root may sign");
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("the provider has suites")
                .with_no_client_auth()
                .with_single_cert(vec![certificate.into()], key)
                .expect("key and certificate fit");
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

fn signing(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A running authority. It stops when dropped.
pub struct Authority {
    keys: Arc<Keys>,
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Authority {
    /// Listens on `address` (port 0: any) and issues what it is asked for.
    pub fn start(keys: Arc<Keys>, address: SocketAddr) -> io::Result<Self> {
        let state = Arc::new(Mutex::new(State {
            answer: Answer::Issue,
            callers: BTreeMap::new(),
            asked: Vec::new(),
            issued: Vec::new(),
        }));
        let mut authority = Self { keys, address, state, running: None };
        authority.restart()?;
        Ok(authority)
    }

    /// Closes every connection, and listens again at the same address.
    pub fn restart(&mut self) -> io::Result<()> {
        self.stop();
        let listener = std::net::TcpListener::bind(self.address)?;
        listener.set_nonblocking(true)?;
        self.address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let service = Service { keys: Arc::clone(&self.keys), state: Arc::clone(&self.state) };
        let tls = Arc::new(self.keys.serving());
        let serving = move || {
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("the runtime has I/O");
                tokio::select! {
                    () = serve(listener, tls, service) => {}
                    _ = stopped => {}
                }
            });
        };
        self.running = Some((stop, std::thread::spawn(serving)));
        Ok(())
    }

    /// Closes every connection and listens no more.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            // A panic was reported by the thread itself.
            let _ended = thread.join();
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its roots.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// From now on it answers so.
    pub fn answer(&self, answer: Answer) {
        lock(&self.state).answer = answer;
    }

    /// Knows the holder of this token. Once it knows one it decides as istiod does: others get nothing, and the
    /// identity in a certificate is what the caller has or may ask for, whatever the signing request says.
    pub fn admit(&self, token: &str, caller: Caller) {
        lock(&self.state).callers.insert(token.to_owned(), caller);
    }

    /// A revocation list, as PEM, that names every certificate made so far for these identities.
    pub fn revoking(&self, identities: &[&str]) -> String {
        let named =
            |whom: &Option<String>| identities.iter().any(|identity| whom.as_deref() == Some(*identity));
        let serials: Vec<SerialNumber> = lock(&self.state)
            .issued
            .iter()
            .filter(|(whom, _)| named(whom))
            .filter_map(|(_, pem)| serial(pem))
            .collect();
        self.keys.revoking(serials)
    }

    /// What it was asked since it was last said.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut lock(&self.state).asked)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock()
}

async fn serve(listener: tokio::net::TcpListener, tls: Arc<ServerConfig>, service: Service) {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    // They end with it.
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (acceptor, service) = (acceptor.clone(), service.clone());
        connections.spawn(async move {
            // A client that breaks the handshake off is one of the cases.
            let Ok(socket) = acceptor.accept(socket).await else { return };
            let service = TowerToHyperService::new(IstioCertificateServiceServer::new(service));
            let _broken = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(socket), service)
                .await;
        });
    }
}

#[derive(Clone)]
struct Service {
    keys: Arc<Keys>,
    state: Arc<Mutex<State>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let asked = asked(&request);
        let csr = asked.csr.clone();
        let (answer, whom, decided) = {
            let mut state = lock(&self.state);
            let decided = identity(&state.callers, &asked);
            let whom = asked.impersonated.clone();
            state.asked.push(asked);
            (state.answer.clone(), whom, decided)
        };
        let decided = decided?;
        let (whom, decided) = (whom.or_else(|| decided.clone()), decided.as_deref());
        let (keys, root) = (&self.keys, self.keys.root_pem());
        let now = SystemTime::now();
        let (from, until) = (now - Duration::from_secs(120), now + 24 * HOUR);
        let below = keys.intermediate.pem();
        let cert_chain = match answer {
            Answer::Issue => vec![keys.certify(&csr, from, until, decided)?, below, root],
            Answer::TwoRoots(other) => vec![keys.certify(&csr, from, until, decided)?, below, root + &other],
            Answer::Hang => std::future::pending().await,
            Answer::After(time) => {
                tokio::time::sleep(time).await;
                vec![keys.certify(&csr, from, until, decided)?, below, root]
            }
            Answer::Refuse(code, message) => return Err(Status::new(code, message)),
            Answer::NoRoot => vec![keys.certify(&csr, from, until, decided)?],
            Answer::Nothing => vec![],
            Answer::OtherRoot(other) => vec![keys.certify(&csr, from, until, decided)?, below, other],
            Answer::Identity(other) => vec![keys.certify(&csr, from, until, Some(other))?, below, root],
            Answer::OtherKey => {
                let other = KeyPair::generate().map_err(internal)?;
                let mut params = CertificateParams::default();
                params.distinguished_name = DistinguishedName::new();
                params.subject_alt_names = CertificateSigningRequestParams::from_pem(&csr)
                    .map_err(internal)?
                    .params
                    .subject_alt_names;
                let csr = params.serialize_request(&other).and_then(|csr| csr.pem()).map_err(internal)?;
                vec![keys.certify(&csr, from, until, decided)?, below, root]
            }
            Answer::Between(from, until) => {
                let at = |offset: i64| {
                    let away = Duration::from_secs(offset.unsigned_abs());
                    if offset < 0 { now - away } else { now + away }
                };
                vec![keys.certify(&csr, at(from), at(until), decided)?, below, root]
            }
            Answer::Garbage => vec!["garbage".to_owned(), "more of it".to_owned()],
        };
        if let Some(leaf) = cert_chain.first() {
            lock(&self.state).issued.push((whom, leaf.clone()));
        }
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

fn asked(request: &Request<IstioCertificateRequest>) -> Asked {
    let header =
        |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let message = request.get_ref();
    let impersonated = message.metadata.as_ref().and_then(|metadata| {
        match metadata.fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
            Kind::StringValue(identity) => Some(identity.clone()),
            _ => None,
        }
    });
    Asked {
        authorization: header("authorization"),
        cluster: header("clusterid"),
        team: header("x-team"),
        impersonated,
        validity: message.validity_duration,
        csr: message.csr.clone(),
    }
}

/// Whose certificate a caller gets; none if the signing request decides.
fn identity(callers: &BTreeMap<String, Caller>, asked: &Asked) -> Result<Option<String>, Status> {
    if callers.is_empty() {
        return Ok(None);
    }
    let token = asked.authorization.as_deref().and_then(|header| header.strip_prefix("Bearer "));
    let caller = token.and_then(|token| callers.get(token));
    let Some(caller) = caller else { return Err(Status::unauthenticated("the token is nobody's")) };
    match &asked.impersonated {
        None => Ok(Some(caller.identity.clone())),
        Some(other) if caller.impersonates.contains(other) => Ok(Some(other.clone())),
        Some(other) => {
            let message = format!("{} may not ask in the name of {other}", caller.identity);
            Err(Status::permission_denied(message))
        }
    }
}

impl Keys {
    fn revoking(&self, serials: Vec<SerialNumber>) -> String {
        let now = SystemTime::now();
        let revoked = |serial_number| RevokedCertParams {
            serial_number,
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + HOUR).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.into_iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.intermediate).expect("the intermediate may sign lists");
        list.pem().expect("a list can be written")
    }

    /// The certificate a signing request asks for, or one of `other` instead.
    fn certify(
        &self,
        csr: &str,
        from: SystemTime,
        until: SystemTime,
        other: Option<&str>,
    ) -> Result<String, Status> {
        let mut csr = CertificateSigningRequestParams::from_pem(csr).map_err(internal)?;
        if let Some(other) = other {
            csr.params.subject_alt_names = vec![SanType::URI(other.try_into().map_err(internal)?)];
        }
        csr.params.not_before = from.into();
        csr.params.not_after = until.into();
        csr.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        csr.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = csr.signed_by(&self.intermediate).map_err(internal)?;
        Ok(certificate.pem())
    }
}

fn serial(pem: &str) -> Option<SerialNumber> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    Some(SerialNumber::from_slice(pem.parse_x509().ok()?.raw_serial()))
}

fn internal(error: rcgen::Error) -> Status {
    Status::invalid_argument(error.to_string())
}
