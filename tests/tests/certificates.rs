//! Certificates from an authority that speaks istiod's protocol, for two nodes at once.

mod common;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::in_testbed_that;
use ztunnel_tests::ca::{Answer, Authority, Keys};
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::poll::{PATIENCE, eventually, throughout};
use ztunnel_tests::testbed::{On, Testbed, http, lines_at};

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/demo/sa/server";
/// The first node's address on the link, and istiod's port.
const ADDRESS: ([u8; 4], u16) = ([10, 80, 0, 1], 15012);

/// Starts an authority on the first node, and has both daemons ask it, with these further arguments.
fn authority(testbed: &mut Testbed, further: &[&str]) -> Result<Authority> {
    let address = SocketAddr::from(ADDRESS);
    let authority = testbed.a.place.netns.enter(|| Ok(Authority::start(Keys::new("root"), address)?))?;
    let files = testbed.run.path("control-plane");
    std::fs::create_dir_all(&files)?;
    std::fs::write(files.join("root-cert.pem"), authority.keys().root_pem())?;
    std::fs::write(files.join("istio-token"), "a-token")?;
    let file = |name: &str| files.join(name).display().to_string();
    let (address, roots, token) = (format!("https://{address}"), file("root-cert.pem"), file("istio-token"));
    let mut arguments = vec!["--ca-address", &address, "--ca-root", &roots, "--ca-token", &token];
    arguments.extend(["--ca-alt-hostname", "istiod.istio-system.svc"]);
    arguments.extend_from_slice(further);
    testbed.start_with(&arguments.into_iter().map(str::to_owned).collect::<Vec<_>>());
    Ok(authority)
}

#[test]
fn pods_talk_with_certificates_of_an_authority_like_istiod() {
    in_testbed_that(
        "certificates of an authority like istiod's",
        |testbed| authority(testbed, &[]),
        |testbed, authority| {
            let asked = authority.asked();
            for identity in [CLIENT, SERVER] {
                let asked = asked.iter().find(|asked| asked.impersonated.as_deref() == Some(identity));
                let asked = asked.with_context(|| format!("{identity} was not asked for"))?;
                ensure!(
                    asked.authorization.as_deref() == Some("Bearer a-token"),
                    "{:?}",
                    asked.authorization
                );
                ensure!(asked.cluster.as_deref() == Some("Kubernetes"), "{:?}", asked.cluster);
                ensure!(asked.validity == 86400, "{}", asked.validity);
            }
            let log = testbed.setting(On::B).log();
            let mark = log.mark();
            http(&testbed.client.place, testbed.server.v4.into(), "")?;
            let line =
                log.wait_line(mark, PATIENCE, "the client's identity", |line| line.contains(CLIENT))?;
            ensure!(line.contains(SERVER), "{line}");
            // It is away and says nothing at all: what is open and what is new goes on.
            authority.answer(Answer::Hang);
            http(&testbed.client.place, testbed.server.v4.into(), "").context("while it hangs")?;
            authority.stop();
            http(&testbed.client.place, testbed.server.v6.into(), "").context("while it is away")?;
            // And a daemon that is replaced meanwhile leaves its certificates to the next.
            for on in [On::A, On::B] {
                testbed.restart_daemon(on, false)?;
                http(&testbed.client.place, testbed.server.v4.into(), "")
                    .with_context(|| format!("after a restart on {on:?} while it is away"))?;
            }
            Ok(format!("{} certificates asked for; {CLIENT} and {SERVER} met", asked.len()))
        },
    );
}

#[test]
fn a_revoked_certificate_cuts_what_is_open_and_a_new_one_is_fetched() {
    in_testbed_that(
        "revocation",
        |testbed| {
            let list = testbed.run.path("ca-crl.pem");
            let authority =
                authority(testbed, &["--crl", &list.display().to_string(), "--compliance-policy", "pqc"])?;
            std::fs::write(&list, authority.revoking(&[]))?;
            Ok(authority)
        },
        |testbed, authority| {
            let log = testbed.setting(On::B).log();
            let to = lines_at(testbed.server.v4);
            let mut revoked = Held::open(&testbed.client.place, to)?;
            let mut other = Held::open(&testbed.other.place, to)?;
            let mark = log.mark();
            std::fs::write(testbed.run.path("ca-crl.pem"), authority.revoking(&[CLIENT]))?;
            eventually(PATIENCE, || match revoked.say() {
                Ok(_) => bail!("still answered"),
                Err(_) => Ok(()),
            })?;
            let line = log.wait_line(mark, PATIENCE, "the reason", |line| {
                line.contains("connection complete") && line.contains("certificate of the peer was revoked")
            })?;
            other.say().context("nobody has revoked it")?;
            let counted = |metrics: &str, name: &str| {
                let mut lines = metrics.lines().filter(|line| line.starts_with(name));
                lines.any(|line| line.contains("destination") && !line.ends_with(" 0"))
            };
            eventually(PATIENCE, || {
                let metrics = testbed.setting(On::B).metrics()?;
                ensure!(counted(&metrics, "istio_crl_policy_rejections_total"), "{metrics}");
                ensure!(metrics.contains("response_flags=\"CERT_REVOKED\""), "{metrics}");
                let untracked = "istio_crl_untracked_connections_total{reporter=\"destination\"} 0\n";
                ensure!(metrics.contains(untracked), "{metrics}");
                Ok(())
            })?;
            // The client's own node has noticed as well, and has another certificate.
            eventually(PATIENCE, || http(&testbed.client.place, testbed.server.v4.into(), ""))?;
            // A torn file: what was revoked stays so, and peers go on.
            let mark = log.mark();
            std::fs::write(testbed.run.path("ca-crl.pem"), "torn")?;
            log.wait_line(mark, PATIENCE, "the last good", |line| {
                line.contains("the last good lists stay in force")
            })?;
            other.say().context("under the last good list")?;
            let readiness = testbed.setting(On::B).readiness()?;
            Ok(format!("{}; readiness {:?}", line.trim(), readiness.trim()))
        },
    );
}

#[test]
fn an_authority_that_is_slow_is_asked_once_for_each_identity() {
    in_testbed_that(
        "an authority that takes six seconds for an answer",
        |testbed| {
            let authority = authority(testbed, &[])?;
            authority.answer(Answer::After(Duration::from_secs(6)));
            Ok(authority)
        },
        |testbed, authority| {
            let began = Instant::now();
            eventually(PATIENCE, || http(&testbed.client.place, testbed.server.v4.into(), ""))?;
            // Longer than any request took, so that a second one would be seen.
            throughout(Duration::from_secs(8), || {
                http(&testbed.client.place, testbed.server.v4.into(), "").map(drop)
            })?;
            let mut asked: Vec<_> = authority.asked().into_iter().map(|asked| asked.impersonated).collect();
            asked.sort();
            let (all, count) =
                (asked.len(), |who: &str| asked.iter().flatten().filter(|one| *one == who).count());
            ensure!(count(CLIENT) == 1 && count(SERVER) == 1, "{asked:?}");
            Ok(format!("{all} requests in all, each answered after 6 s; working after {:?}", began.elapsed()))
        },
    );
}

/// Has an authority on the first node answer again.
fn restart(testbed: &Testbed, authority: &mut Authority) -> Result<()> {
    testbed.a.place.netns.enter(|| Ok(authority.restart()?))
}

#[test]
fn a_crash_while_the_authority_is_away_is_told_and_costs_no_connection_on_the_node() {
    in_testbed_that(
        "a crash while the authority is away",
        |testbed| authority(testbed, &[]),
        |testbed, authority| {
            let kept = testbed.run.path("kept-certificates");
            let (to_near, to_far) = (testbed.near.v4.into(), testbed.server.v4.into());
            authority.stop();
            testbed.kill_daemon(On::A)?;
            let mut daemon = testbed.setting(On::A).start()?;
            let told = eventually(PATIENCE, || {
                let told = match testbed.setting(On::A).readiness() {
                    Ok(ready) => bail!("{ready}"),
                    Err(not_ready) => not_ready.to_string(),
                };
                ensure!(told.contains("not ready, none of"), "{told}");
                Ok(told)
            })?;
            ensure!(told.contains("cannot be reached"), "{told}");
            let answer = http(&testbed.client.place, to_near, "").context("to a pod of the node")?;
            ensure!(answer.body.contains(&format!("client={}", testbed.client.v4)), "{}", answer.body);
            ensure!(
                http(&testbed.client.place, to_far, "").is_err(),
                "another node was reached without a certificate"
            );
            restart(testbed, authority)?;
            daemon.wait_ready().context("once the authority is back")?;
            eventually(PATIENCE, || http(&testbed.client.place, to_far, ""))?;
            testbed.replace_daemon(On::A, daemon);

            // Who keeps them on a disk is not even told.
            let mut setting = testbed.setting(On::A).clone();
            setting.further.extend(["--cert-cache".to_owned(), kept.display().to_string()]);
            let mut next = setting.start()?;
            next.wait_ready()?;
            let mut first = testbed.replace_daemon(On::A, next).context("no first daemon")?;
            first.ended()?;
            eventually(PATIENCE, || {
                let about = std::fs::metadata(&kept)?;
                ensure!(about.permissions().mode() & 0o777 == 0o600, "{:o}", about.permissions().mode());
                Ok(())
            })?;
            authority.stop();
            testbed.kill_daemon(On::A)?;
            let mut daemon = setting.start()?;
            daemon.wait_ready().context("with kept certificates")?;
            testbed.replace_daemon(On::A, daemon);
            http(&testbed.client.place, to_far, "").context("with kept certificates")?;
            restart(testbed, authority)?;
            Ok(format!("{}; with --cert-cache ready at once", told.trim()))
        },
    );
}
