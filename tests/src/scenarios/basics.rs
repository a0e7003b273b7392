//! Client and server can talk, and neither notices the mesh.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::testbed::{Answer, SERVICE_IPS, curl, http};
use crate::topology::{Pod, in_url};

/// Both address families, and the addresses both sides see.
pub const BOTH_FAMILIES: Scenario = Scenario {
    name: "client → server works over IPv4 and IPv6; each side sees the other's real address",
    run: |testbed| {
        let mut evidence = Vec::new();
        for address in testbed.server.addresses() {
            let answer = http(&testbed.client.place, address, "")?;
            sees_client(&answer, &testbed.client, address)?;
            ensure!(answer.remote == address.to_string(), "the client's socket shows {}", answer.remote);
            evidence.push(format!("server saw {}, client's socket shows {}", answer.local, answer.remote));
        }
        Ok(evidence.join("; "))
    },
};

/// A service's cluster IP.
pub const SERVICE: Scenario = Scenario {
    name: "a service's cluster IP works over IPv4 and IPv6",
    run: |testbed| {
        let mut evidence = Vec::new();
        for cluster_ip in cluster_ips()? {
            let answer = curl(&testbed.client.place, &[&format!("http://{}/", in_url(cluster_ip))])?;
            sees_client(&answer, &testbed.client, cluster_ip)?;
            ensure!(answer.remote == cluster_ip.to_string(), "the client's socket shows {}", answer.remote);
            evidence.push(format!("http://{}/ answered by {}", in_url(cluster_ip), answer.body));
        }
        Ok(evidence.join("; "))
    },
};

/// The cluster IPs of the service `server`.
pub fn cluster_ips() -> Result<[IpAddr; 2]> {
    let [v4, v6] = SERVICE_IPS;
    Ok([v4.parse().context("the IPv4 cluster IP")?, v6.parse().context("the IPv6 cluster IP")?])
}

/// Checks that the server saw the client's own address of the right family.
pub fn sees_client(answer: &Answer, client: &Pod, dialled: IpAddr) -> Result<()> {
    let own: IpAddr = if dialled.is_ipv4() { client.v4.into() } else { client.v6.into() };
    ensure!(
        answer.body.contains(&format!("client={own} ")),
        "the server saw another client: {}",
        answer.body
    );
    Ok(())
}
