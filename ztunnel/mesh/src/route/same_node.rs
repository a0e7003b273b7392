//! Whether a connection that is to go through a tunnel leads to a pod of the same node. Pure: what was planned, and what is
//! known of the two pods, in. Which pods a node has is for the caller to know.

use std::net::IpAddr;
use std::net::SocketAddr;

use crate::model::addr::ClientAddr;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::identity::SpiffeId;

/// A connection that is to go through a tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Tunnelled<'a> {
    /// Where the application dialled from.
    pub client: ClientAddr,
    /// Whom the tunnel is to lead to.
    pub peer: HbonePeer,
    /// The identities acceptable of it.
    pub expect: &'a [SpiffeId],
    /// What it is to be asked for.
    pub target: SocketAddr,
}

/// Why a tunnel does not lead to a pod as the application's own connection would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    /// It would end elsewhere than at the pod: at a gateway before it, say.
    OtherEnd,
    /// What was dialled is not an address of the pod.
    OtherAddress,
    /// The pod is somebody else than was expected there.
    OtherIdentity,
    /// The application does not use an address of its own pod. Through a tunnel the pod's address is what the
    /// destination sees, whatever an application with the capability to do so has made up.
    ForeignSource,
    /// The application and the destination use different families, so the destination cannot see the
    /// application's own address.
    OtherFamily,
}

impl Tunnelled<'_> {
    /// Whether it would come out of the tunnel at the pod that has the addresses `destination` and, now, this `identity`,
    /// as the application's own: that of the pod that has the addresses `source`.
    pub fn leads_to(
        &self,
        source: &[IpAddr],
        destination: &[IpAddr],
        identity: &SpiffeId,
    ) -> Result<(), Elsewhere> {
        let (target, client) = (self.target.ip(), self.client.0.ip());
        if !self.ends_at_target() {
            return Err(Elsewhere::OtherEnd);
        }
        if !destination.contains(&target) {
            return Err(Elsewhere::OtherAddress);
        }
        if !self.expect.contains(identity) {
            return Err(Elsewhere::OtherIdentity);
        }
        if !source.contains(&client) {
            return Err(Elsewhere::ForeignSource);
        }
        if client.is_ipv4() != target.is_ipv4() {
            return Err(Elsewhere::OtherFamily);
        }
        Ok(())
    }

    /// Whether it leads back to the pod that has the addresses `source`, which has dialled a service, say, that it serves.
    pub fn leads_back(&self, source: &[IpAddr]) -> bool {
        self.ends_at_target() && source.contains(&self.target.ip())
    }

    /// Whether the tunnel is to end at what it is asked for, and not at something that stands before that.
    fn ends_at_target(&self) -> bool {
        self.peer.0.port() == HBONE_PORT && self.peer.0.ip() == self.target.ip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/test/sa/{name}").parse().unwrap()
    }

    fn ips<const N: usize>(all: [&str; N]) -> [IpAddr; N] {
        all.map(|ip| ip.parse().unwrap())
    }

    fn tunnelled<'a>(client: &str, peer: &str, target: &str, expect: &'a [SpiffeId]) -> Tunnelled<'a> {
        Tunnelled {
            client: ClientAddr(client.parse().unwrap()),
            peer: HbonePeer(peer.parse().unwrap()),
            expect,
            target: target.parse().unwrap(),
        }
    }

    #[test]
    fn only_what_would_come_out_of_the_tunnel_unchanged_leads_to_a_pod() {
        let (source, destination) = (ips(["10.0.0.1", "fd00::1"]), ips(["10.0.0.2", "fd00::2"]));
        let (server, other) = (id("server"), id("other"));
        let (one, both) = ([server.clone()], [other.clone(), server.clone()]);
        let (client, peer, target) = ("10.0.0.1:4000", "10.0.0.2:15008", "10.0.0.2:80");
        for (what, [client, peer, target], expect, identity, answer) in [
            ("the other pod", [client, peer, target], &one[..], &server, Ok(())),
            ("one of several identities", [client, peer, target], &both[..], &server, Ok(())),
            ("IPv6", ["[fd00::1]:4000", "[fd00::2]:15008", "[fd00::2]:80"], &one[..], &server, Ok(())),
            ("a gateway", [client, "10.0.0.9:15008", target], &one[..], &server, Err(Elsewhere::OtherEnd)),
            (
                "another HBONE port",
                [client, "10.0.0.2:15009", target],
                &one[..],
                &server,
                Err(Elsewhere::OtherEnd),
            ),
            (
                "not its address",
                [client, "10.0.0.3:15008", "10.0.0.3:80"],
                &one[..],
                &server,
                Err(Elsewhere::OtherAddress),
            ),
            ("somebody else by now", [client, peer, target], &one[..], &other, Err(Elsewhere::OtherIdentity)),
            ("nobody expected", [client, peer, target], &[][..], &server, Err(Elsewhere::OtherIdentity)),
            (
                "a made up source",
                ["10.0.0.7:4000", peer, target],
                &one[..],
                &server,
                Err(Elsewhere::ForeignSource),
            ),
            (
                "the server's own as source",
                ["10.0.0.2:4000", peer, target],
                &one[..],
                &server,
                Err(Elsewhere::ForeignSource),
            ),
            (
                "families",
                [client, "[fd00::2]:15008", "[fd00::2]:80"],
                &one[..],
                &server,
                Err(Elsewhere::OtherFamily),
            ),
        ] {
            let asked = tunnelled(client, peer, target, expect);
            assert_eq!(asked.leads_to(&source, &destination, identity), answer, "{what}");
        }
    }

    #[test]
    fn a_pod_is_led_back_to_by_its_own_address_alone() {
        let source = ips(["10.0.0.1", "fd00::1"]);
        let at = |peer, target| tunnelled("10.0.0.1:4000", peer, target, &[]).leads_back(&source);
        assert!(at("10.0.0.1:15008", "10.0.0.1:80"));
        assert!(at("[fd00::1]:15008", "[fd00::1]:80"));
        assert!(!at("10.0.0.2:15008", "10.0.0.2:80"), "another pod");
        // It is a waypoint or a gateway, which is asked for somebody else.
        assert!(!at("10.0.0.1:15008", "10.0.0.2:80"));
        assert!(!at("10.0.0.1:15009", "10.0.0.1:80"));
    }
}
