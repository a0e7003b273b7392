//! What goes over the link, and who vouched for it.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use crate::certificates::{Signer, let_in};
use crate::poll::PATIENCE;
use crate::process::Log;
use crate::testbed::{On, Testbed, http};
use crate::wire::{HBONE_PORT, tunnels_only};

/// Nothing but TLS 1.3 on the link.
pub const ONLY_TLS: Scenario = Scenario {
    name: "between the nodes there is only TLS 1.3 to port 15008; the payload is never seen in clear",
    run: |testbed| {
        let marker = marker();
        let watch = testbed.watch_link("only-tls")?;
        let mut requests = 0;
        for address in testbed.server.addresses() {
            for _ in 0..10 {
                let answer = http(&testbed.client.place, address, &format!("?marker={marker}"))?;
                ensure!(answer.body.contains(&marker), "the marker did not come back: {}", answer.body);
                requests += 1;
            }
        }
        let packets = watch.finish()?;
        let seen = packets.with_marker(&marker);
        ensure!(seen == 0, "{seen} packets carry the payload in clear");
        let tunnels = tunnels_only(&packets)?;
        // The same look at a connection outside the mesh shows that the capture would have seen it.
        let control = testbed.watch_link("only-tls-control")?;
        http(&testbed.outsider.place, testbed.outside.v4.into(), &format!("?marker={marker}"))?;
        let control = control.finish()?.with_marker(&marker);
        ensure!(control > 0, "the capture does not see what is in clear");
        Ok(format!(
            "{requests} requests and answers with marker {marker}: {} packets, all of port 15008, {} tunnels, {} \
             encrypted records, every ServerHello chose TLS 1.3; the marker in 0 of them (in {control} of a connection \
             outside the mesh)",
            tunnels.packets, tunnels.streams, tunnels.encrypted
        ))
    },
};

/// The identities in the access logs of both sides.
pub const IDENTITIES: Scenario = Scenario {
    name: "each side presented and verified a SPIFFE identity; one that a stranger signed is refused",
    run: |testbed| {
        let (source, destination) = (testbed.setting(On::A).log(), testbed.setting(On::B).log());
        let marks = (source.mark(), destination.mark());
        http(&testbed.client.place, testbed.server.v4.into(), "")?;
        let out = outbound_line(&source, marks.0, "client", "server")?;
        let inward = inbound_line(&destination, marks.1, "client", "server")?;
        let refusals = strangers_are_refused(testbed)?;
        Ok(format!(
            "node-a verified {}; node-b verified {}; {refusals}",
            field(&out, "dst.identity").unwrap_or_default(),
            field(&inward, "src.identity").unwrap_or_default()
        ))
    },
};

/// Shows node-b's daemon certificates with the same identity, from where nobody captures: it must look at who signed
/// them. The first, of the mesh's own root, shows that this way of looking would see somebody let in.
fn strangers_are_refused(testbed: &Testbed) -> Result<String> {
    let claimed = identity("client");
    let to = SocketAddr::from((testbed.server.v4, HBONE_PORT));
    let look = |own| testbed.outsider.place.netns.enter(|| let_in(to, own));
    look(Some(Signer::of_mesh(&testbed.setting(On::B).state)?.sign(&[&claimed])?))
        .context("a certificate of the mesh's root was refused")?;
    let mut said = Vec::new();
    for (what, own) in [
        ("the same identity under a root of a stranger's", Some(Signer::stranger()?.sign(&[&claimed])?)),
        ("no certificate", None),
    ] {
        match look(own) {
            Ok(()) => bail!("{what} was let in"),
            Err(error) => said.push(format!("{what}: {}", error.root_cause())),
        }
    }
    Ok(format!("refused: {}", said.join("; ")))
}

/// The destination's access log line of a connection between these service accounts.
pub fn inbound_line(log: &Log, mark: usize, client: &str, server: &str) -> Result<String> {
    line(log, mark, "inbound", client, server)
}

/// The same of the source.
pub fn outbound_line(log: &Log, mark: usize, client: &str, server: &str) -> Result<String> {
    line(log, mark, "outbound", client, server)
}

fn line(log: &Log, mark: usize, direction: &str, client: &str, server: &str) -> Result<String> {
    let [source, destination] = [client, server].map(identity);
    let what = format!("direction {direction}, {source} → {destination}");
    log.wait_line(mark, PATIENCE, &what, |line| {
        field(line, "direction") == Some(direction)
            && field(line, "src.identity") == Some(&source)
            && field(line, "dst.identity") == Some(&destination)
    })
}

/// The SPIFFE identity of a service account of the demo.
pub fn identity(service_account: &str) -> String {
    format!("spiffe://cluster.local/ns/demo/sa/{service_account}")
}

/// The value of `key=` in a log line, without its quotes.
pub fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let mut rest = line;
    loop {
        let at = rest.find(key)?;
        let before = rest[..at].chars().next_back();
        let after = &rest[at + key.len()..];
        match after.strip_prefix('=') {
            Some(value) if before.is_none_or(char::is_whitespace) => {
                return match value.strip_prefix('"') {
                    Some(quoted) => quoted.split('"').next(),
                    None => value.split_whitespace().next(),
                };
            }
            _ => rest = after,
        }
    }
}

/// A text that occurs nowhere else.
pub fn marker() -> String {
    format!("marker-{:016x}", rand::random::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_an_access_log_line_are_found() {
        let line = "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:4242 \
                    src.workload=\"a-1\" dst.hbone_addr=10.0.0.2:80 dst.addr=10.0.0.2:15008 direction=\"inbound\"";
        assert_eq!(field(line, "src.addr"), Some("10.0.0.1:4242"));
        assert_eq!(field(line, "src.workload"), Some("a-1"));
        assert_eq!(field(line, "dst.addr"), Some("10.0.0.2:15008"));
        assert_eq!(field(line, "direction"), Some("inbound"));
        assert_eq!(field(line, "addr"), None);
        assert_eq!(field(line, "error"), None);
    }
}
