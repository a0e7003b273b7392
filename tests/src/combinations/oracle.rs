//! What must be seen of a connection: decides, and touches nothing.

use std::net::{IpAddr, SocketAddr};

use super::axes::{Combination, End, Mesh, Path, Server, no_connection};
use crate::peer::script::{Came, Report};
use crate::scenarios::tunnel::field;

/// How much later than without a mesh something may be: what is at once there is so here, on a machine that does other
/// things too. A proxy that gives up does so after ten seconds.
const LATER_MS: u64 = 7_000;

/// What is known of a connection that was played.
#[derive(Debug)]
pub(super) struct Played<'a> {
    pub(super) combination: &'a Combination,
    pub(super) client: &'a Report,
    /// None: nobody came, or nobody was to be there.
    pub(super) server: Option<&'a Report>,
    /// The same without a mesh.
    pub(super) reference: &'a [Option<Report>; 2],
    /// What the client dials, where it is no name.
    pub(super) dialled: Option<SocketAddr>,
    pub(super) client_ip: IpAddr,
    /// Whom the server is to see.
    pub(super) seen_ip: IpAddr,
    pub(super) server_at: SocketAddr,
}

/// What does not hold: one finding each, `<kind>: <what was seen>`.
pub(super) fn judge(played: &Played<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let it = played.combination;
    let client = played.client;
    if it.mesh == Mesh::DeniedMeanwhile {
        if !matches!(client.came, Came::Broken | Came::Refused | Came::ClosedEarly) || client.after_ms == 0 {
            found.push(format!("a denied connection went on: {client:?}"));
        }
        return found;
    }
    if no_connection(it) && !matches!(it.server, Server::ClosedPort | Server::Gone) {
        if client.came != Came::Refused {
            found.push(format!("was to be refused and came {:?}: {client:?}", client.came));
        }
        if let Some(server) = played.server {
            found.push(format!("a refused connection reached the server: {server:?}"));
        }
        late(&mut found, client, 0);
        return found;
    }
    let [Some(expected), expected_server] = played.reference else {
        return vec!["no reference: it was not played".to_owned()];
    };
    // A proxy between them has only one way to say that nobody is there, and a waypoint, which says yes before it knows,
    // may also say so by an end.
    let refused = |came| match came {
        Came::Unreachable => Came::Refused,
        Came::ClosedEarly if it.path == Path::Waypoint && no_connection(it) => Came::Refused,
        came => came,
    };
    if refused(client.came) != refused(expected.came) {
        found.push(format!("the client came {:?} instead of {:?}: {client:?}", client.came, expected.came));
    }
    late(&mut found, client, expected.after_ms);
    if no_connection(it) {
        return found;
    }
    compare(&mut found, "client", client, expected);
    match (played.server, expected_server) {
        (Some(server), Some(expected)) => {
            if server.came != expected.came {
                found.push(format!(
                    "the server came {:?} instead of {:?}: {server:?}",
                    server.came, expected.came
                ));
            }
            compare(&mut found, "server", server, expected);
            addresses(&mut found, played, server);
        }
        (None, Some(_)) => found.push(format!("nobody came to the server: {client:?}")),
        (_, None) => found.push("no reference: its server was not played".to_owned()),
    }
    found
}

fn late(found: &mut Vec<String>, report: &Report, expected_ms: u64) {
    if report.after_ms > expected_ms + LATER_MS {
        found.push(format!("late: after {} ms instead of {expected_ms}: {report:?}", report.after_ms));
    }
}

fn compare(found: &mut Vec<String>, who: &str, seen: &Report, expected: &Report) {
    if seen.end != expected.end {
        found.push(format!("the {who} saw the end {:?} instead of {:?}: {seen:?}", seen.end, expected.end));
    }
    if !seen.equal || (seen.sent, seen.received) != (expected.sent, expected.received) {
        found.push(format!("the {who} has other bytes: {seen:?} instead of {expected:?}"));
    }
}

fn addresses(found: &mut Vec<String>, played: &Played<'_>, server: &Report) {
    let ip = |address: Option<SocketAddr>| address.map(|address| address.ip().to_canonical());
    let client = played.client;
    if ip(client.local) != Some(played.client_ip) {
        found.push(format!("the client has another address: {:?}", client.local));
    }
    if let Some(dialled) = played.dialled
        && client.remote != Some(dialled)
    {
        found.push(format!("the client sees another server: {:?} instead of {dialled}", client.remote));
    }
    if ip(server.remote) != Some(played.seen_ip) {
        found.push(format!(
            "the server sees another client: {:?} instead of {}",
            server.remote, played.seen_ip
        ));
    }
    if server.local != Some(played.server_at) {
        found.push(format!(
            "the server has another address: {:?} instead of {}",
            server.local, played.server_at
        ));
    }
}

/// What a line of the access log must have beside its addresses.
pub(super) fn line(
    it: &Combination,
    direction: &str,
    client: &Report,
    line: &str,
    server: &str,
) -> Vec<String> {
    let mut found = Vec::new();
    let number = |key| field(line, key).and_then(|value| value.parse::<usize>().ok());
    let through = client.came == Came::Through;
    if through && it.server != Server::Restarting {
        let (sent, received) = match direction {
            "outbound" => (client.sent, client.received),
            _ => (client.received, client.sent),
        };
        if (number("bytes_sent"), number("bytes_recv")) != (Some(sent), Some(received)) {
            found.push(format!(
                "a {direction} line has other bytes: {sent} sent, {received} received; {line}"
            ));
        }
        let in_order = !matches!(it.end, End::ClientReset | End::ServerReset);
        if in_order && field(line, "error").is_some() {
            found.push(format!("an {direction} line has an error, and there was none: {line}"));
        }
    }
    // To a waypoint there was a connection: what came of it behind it knows only the server's side.
    let knows = it.path != Path::Waypoint || direction == "inbound";
    if !through && no_connection(it) && knows && field(line, "error").is_none() {
        found.push(format!("an {direction} line does not say why: {line}"));
    }
    if through && it.server_in_mesh() && it.client_in_mesh() && field(line, "dst.workload") != Some(server) {
        found.push(format!("an {direction} line does not name the server: {line}"));
    }
    if field(line, "duration").is_none() {
        found.push(format!("an {direction} line has no duration: {line}"));
    }
    found
}
