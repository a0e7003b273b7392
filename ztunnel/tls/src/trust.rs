//! Whom this node's workloads trust: the roots of the mesh, and what was revoked.
//!
//! One [`Trust`] is shared by the credentials of all identities of the node, and asked at each handshake, so that a
//! new root or revocation list holds from the next handshake on, whatever credentials it is made with.
//!
//! # Replacing a root
//!
//! Every answer of the authority names roots. What is trusted is their union: a root that an answer names holds
//! from then on, and one that answers no longer name goes on being trusted for as long as a certificate issued under
//! it may live. So peers that were certified before and after the change accept each other on both sides of it, in
//! whatever order nodes learn of it. A root that must not be trusted a moment longer is taken away by stopping
//! the daemon and starting it again (not by a hand-over, which passes certificates on) or, without that, by a
//! revocation list that names the intermediates below it.
//!
//! # Revocation
//!
//! Every certificate of a peer's chain is looked up in the lists of its issuer; a chain of which no list speaks is
//! accepted, and lists past their `nextUpdate` stay in force, as no newer one can be more lenient by accident. Where
//! lists are asked for and none was ever good, no peer is accepted: [`Trust::revocation`] says why.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::CertRevocationListError;
use rustls::CertificateError;
use rustls::CommonState;
use rustls::OtherError;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::TrustAnchor;
use rustls::pki_types::UnixTime;
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerified;
use rustls::server::danger::ClientCertVerifier;
use tokio::sync::watch;
use webpki::KeyUsage;

use crate::provider::provider;
use crate::revocation::Lists;
use crate::revocation::Unusable;
use crate::verify::NoIdentity;
use crate::verify::NotAccepted;
use crate::verify::VerifiedPeer;
use crate::verify::verified_peer;

/// Which side of a connection a certificate is shown by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The peer dialled: this side reports as the destination.
    Client,
    /// The peer was dialled: this side reports as the source.
    Server,
}

impl Side {
    fn usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }
}

/// What is known of revoked certificates.
#[derive(Debug, Clone)]
pub enum Revocation {
    /// Nobody asked for it.
    Off,
    /// Lists are asked for, and there was never a good one: no peer is accepted.
    Missing(Arc<Unusable>),
    /// These are in force.
    Lists(Arc<Lists>),
}

/// Judges peers for all identities of the node. Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Trust(Arc<Shared>);

struct Shared {
    /// Written under `learning`.
    state: ArcSwap<State>,
    learning: Mutex<()>,
    /// Counts the changes of what is revoked.
    revoked: watch::Sender<u64>,
    /// Counts peers whose chain led to no known root.
    strangers: watch::Sender<u64>,
    /// Peers refused or cut off, those that dialled first.
    rejections: [AtomicU64; 2],
}

#[derive(Clone)]
struct State {
    roots: Arc<[Root]>,
    store: Arc<RootCertStore>,
    /// Of `store`; none as long as there is no root.
    clients: Option<Arc<dyn ClientCertVerifier>>,
    revocation: Revocation,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Root {
    anchor: TrustAnchor<'static>,
    /// When it goes; while answers name it, it stays.
    until: Option<SystemTime>,
}

/// What an answer of the authority changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learnt {
    /// Nothing.
    Known,
    /// These are the first roots.
    First,
    /// There is a root beside those that were trusted before.
    NewRoot,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.load();
        f.debug_struct("Trust")
            .field("roots", &state.roots.len())
            .field("revocation", &state.revocation)
            .finish_non_exhaustive()
    }
}

impl Default for Trust {
    /// Trusts nobody yet, and asks for no revocation list.
    fn default() -> Self {
        Self::new(Revocation::Off)
    }
}

impl Trust {
    /// Trusts nobody yet.
    pub fn new(revocation: Revocation) -> Self {
        let store = Arc::new(RootCertStore::empty());
        let state = State { roots: Arc::from([]), store, clients: None, revocation };
        Self(Arc::new(Shared {
            state: ArcSwap::from_pointee(state),
            learning: Mutex::default(),
            revoked: watch::Sender::new(0),
            strangers: watch::Sender::new(0),
            rejections: Default::default(),
        }))
    }

    /// Trusts exactly these roots.
    pub(super) fn of(roots: &RootCertStore) -> Self {
        let trust = Self::default();
        trust.learn(roots, SystemTime::UNIX_EPOCH, Duration::ZERO);
        trust
    }

    /// An answer of the authority named these roots, all there are. Those it no longer names go when `life`, that of
    /// a certificate, is over.
    pub fn learn(&self, named: &RootCertStore, now: SystemTime, life: Duration) -> Learnt {
        let _one_at_a_time = self.0.learning.lock();
        let before = self.0.state.load_full();
        let mut roots: Vec<Root> = before
            .roots
            .iter()
            .map(|root| Root {
                anchor: root.anchor.clone(),
                until: (!named.roots.contains(&root.anchor)).then(|| root.until.unwrap_or(now + life)),
            })
            .filter(|root| root.until.is_none_or(|until| now < until))
            .collect();
        let known = roots.len();
        for anchor in &named.roots {
            if !roots.iter().any(|root| root.anchor == *anchor) {
                roots.push(Root { anchor: anchor.clone(), until: None });
            }
        }
        let learnt = match (before.roots.is_empty(), roots.len() > known) {
            (_, false) => Learnt::Known,
            (true, true) => Learnt::First,
            (false, true) => Learnt::NewRoot,
        };
        if *roots == *before.roots {
            return learnt;
        }
        let store = RootCertStore { roots: roots.iter().map(|root| root.anchor.clone()).collect() };
        let store = Arc::new(store);
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(provider()))
            // Peers have one certificate to show, whatever roots are named: naming none makes a smaller handshake.
            .clear_root_hint_subjects()
            .build()
            .ok();
        let roots = Arc::from(roots);
        self.0.state.store(Arc::new(State { roots, store, clients, revocation: before.revocation.clone() }));
        learnt
    }

    /// These lists are in force from now on. Peers that are connected are judged again: [`Trust::revoked`].
    pub fn revoke(&self, lists: Lists) {
        let _one_at_a_time = self.0.learning.lock();
        let revocation = Revocation::Lists(Arc::new(lists));
        self.0.state.store(Arc::new(State { revocation, ..State::clone(&self.0.state.load()) }));
        self.0.revoked.send_modify(|version| *version += 1);
    }

    /// What is known of revoked certificates.
    pub fn revocation(&self) -> Revocation {
        self.0.state.load().revocation.clone()
    }

    /// Learns of changes of what is revoked.
    pub fn revocations(&self) -> watch::Receiver<u64> {
        self.0.revoked.subscribe()
    }

    /// Learns of peers whose chain leads to no known root: there may be a new one to ask the authority for.
    pub fn strangers(&self) -> watch::Receiver<u64> {
        self.0.strangers.subscribe()
    }

    /// The roots that vouch for peers.
    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.0.state.load().store)
    }

    /// Peers refused or cut off because a certificate of theirs was revoked, or because no list was there to look
    /// in.
    pub fn rejections(&self, shown_by: Side) -> u64 {
        self.0.rejections[shown_by as usize].load(Ordering::Relaxed)
    }

    /// [`verified_peer`], which remembers what the peer showed where revocation lists are asked for.
    pub fn verified_peer(&self, connection: &CommonState) -> Result<VerifiedPeer, NoIdentity> {
        let peer = verified_peer(connection)?;
        Ok(match self.0.state.load().revocation {
            Revocation::Off => peer,
            Revocation::Missing(_) | Revocation::Lists(_) => peer.showing(connection),
        })
    }

    pub(super) fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let state = self.0.state.load();
        let clients = state.clients.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        let verified = clients.verify_client_cert(leaf, intermediates, now);
        let verified = verified.inspect_err(|error| self.note_stranger(error))?;
        self.look_up(&state, leaf, intermediates, now, Side::Client)?;
        Ok(verified)
    }

    pub(super) fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let state = self.0.state.load();
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &state.store,
            intermediates,
            now,
            provider().signature_verification_algorithms.all,
        )
        .inspect_err(|error| self.note_stranger(error))?;
        self.look_up(&state, leaf, intermediates, now, Side::Server)
    }

    fn note_stranger(&self, error: &rustls::Error) {
        use CertificateError as Bad;
        // A root may come back under its old name with a new key: then it is the signature that is wrong.
        if let rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) = error {
            self.0.strangers.send_modify(|count| *count += 1);
        }
    }

    fn look_up(
        &self,
        state: &State,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        side: Side,
    ) -> Result<(), rustls::Error> {
        let looked_up = match &state.revocation {
            Revocation::Off => Ok(()),
            Revocation::Missing(_) => Err(NotAccepted::NoRevocationList.into()),
            Revocation::Lists(lists) => {
                lists.look_up(leaf, intermediates, &state.store, now, side.usage()).map_err(refused)
            }
        };
        if looked_up.is_err() {
            self.0.rejections[side as usize].fetch_add(1, Ordering::Relaxed);
        }
        looked_up
    }

    /// Whether a list in force names a certificate of this chain.
    pub fn names(&self, chain: &[CertificateDer<'_>], at: UnixTime, shown_by: Side) -> bool {
        let state = self.0.state.load();
        let Revocation::Lists(lists) = &state.revocation else { return false };
        let [leaf, intermediates @ ..] = chain else { return false };
        let looked_up = lists.look_up(leaf, intermediates, &state.store, at, shown_by.usage());
        matches!(looked_up, Err(webpki::Error::CertRevoked))
    }

    /// Waits until a list names a certificate that the peer showed; counts it then. For ever, where no lists are
    /// asked for.
    pub async fn revoked(&self, peer: &VerifiedPeer, shown_by: Side) {
        let Some(shown) = peer.shown() else { return std::future::pending().await };
        let mut changes = self.revocations();
        loop {
            // Marked as seen before it is looked up, so that no change falls between.
            changes.borrow_and_update();
            if self.names(&shown.chain, shown.at, shown_by) {
                self.0.rejections[shown_by as usize].fetch_add(1, Ordering::Relaxed);
                return;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// What a failed look-up is in a handshake.
fn refused(error: webpki::Error) -> rustls::Error {
    match error {
        webpki::Error::CertRevoked => CertificateError::Revoked.into(),
        webpki::Error::IssuerNotCrlSigner => CertRevocationListError::IssuerInvalidForCrl.into(),
        other => CertRevocationListError::Other(OtherError(Arc::new(other))).into(),
    }
}

#[cfg(test)]
mod tests;
