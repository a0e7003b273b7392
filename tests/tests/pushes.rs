//! What istiod pushes comes in parts: in its own order, in another, in pieces. Who is allowed before and after notices
//! nothing of it, and who is not gets through at no moment.

mod common;

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use common::in_testbed_that;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use ztunnel_proto::security::{self, Authorization};
use ztunnel_proto::workload;
use ztunnel_tests::istiod::{self, ADDRESS, AUTHORIZATION, Change};
use ztunnel_tests::mesh::MESHED;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::peer::load::Load;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::scenarios::outage::nothing_in_clear;
use ztunnel_tests::testbed::istio::{Istio, behind, service};
use ztunnel_tests::testbed::{BOTH, HTTP, On, SERVICE_IPS, Testbed, http, http_refused, lines_at, refused};

fn under_istio(name: &str, act: impl FnOnce(&mut Testbed, &mut Istio) -> Result<String>) {
    in_testbed_that(name, Testbed::under_istio, |testbed, istio| {
        let told = act(testbed, istio)?;
        for on in BOTH {
            testbed.agent(on)?.check()?;
        }
        Ok(told)
    });
}

/// A policy about those of this account.
fn about(name: &str, scope: security::Scope, action: security::Action, account: &str) -> Authorization {
    let exact = security::string_match::MatchType::Exact(format!("cluster.local/ns/demo/sa/{account}"));
    let principals = vec![security::StringMatch { match_type: Some(exact) }];
    let matching = security::Match { principals, ..security::Match::default() };
    Authorization {
        name: name.to_owned(),
        namespace: MESHED.to_owned(),
        scope: scope.into(),
        action: action.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matching] }] }],
        ..Authorization::default()
    }
}

/// What istiod makes of a namespace that is STRICT.
fn strict() -> Authorization {
    let presence = security::string_match::MatchType::Presence(());
    let anybody = vec![security::StringMatch { match_type: Some(presence) }];
    let matching = security::Match { not_principals: anybody, ..security::Match::default() };
    Authorization {
        name: "istio_converted_static_strict".to_owned(),
        namespace: "istio-system".to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matching] }] }],
        ..Authorization::default()
    }
}

const STRICT: &str = "istio-system/istio_converted_static_strict";

/// The server, which names these policies.
fn server(testbed: &Testbed, policies: &[&str]) -> Change {
    let authorization_policies = policies.iter().map(|name| (*name).to_owned()).collect();
    Change::workload(workload::Workload { authorization_policies, ..istiod::workload(&testbed.server) })
}

/// One mesh after another. In all of them the client is allowed, and the other pod is not.
fn meshes(testbed: &Testbed) -> Vec<Vec<Change>> {
    use security::Action::{Allow, Deny};
    use security::Scope::{Namespace, WorkloadSelector};
    vec![
        // A first policy with a selector takes the place of one for the namespace.
        vec![
            server(testbed, &["demo/p"]),
            Change::policy(about("p", WorkloadSelector, Allow, "client")),
            Change::remove(AUTHORIZATION, "demo/all"),
        ],
        // Another one takes its place, and the namespace becomes STRICT.
        vec![
            server(testbed, &["demo/q", STRICT]),
            Change::policy(about("q", WorkloadSelector, Deny, "other")),
            Change::policy(strict()),
            Change::remove(AUTHORIZATION, "demo/p"),
        ],
        // The same policy loses its selector.
        vec![
            server(testbed, &[]),
            Change::policy(about("q", Namespace, Deny, "other")),
            Change::remove(AUTHORIZATION, STRICT),
        ],
        // As in the beginning.
        vec![
            Change::policy(about("all", Namespace, Allow, "client")),
            Change::remove(AUTHORIZATION, "demo/q"),
        ],
    ]
}

/// How a set of changes is sent.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Workloads and services in one response, policies in another.
    Istiods,
    /// The other way round.
    PoliciesFirst,
    /// Somehow, in pieces.
    Scattered(u64),
}

fn pieces(changes: &[Change], order: Order) -> Vec<Vec<Change>> {
    let (policies, others): (Vec<_>, Vec<_>) = changes.iter().cloned().partition(Change::is_policy);
    match order {
        Order::Istiods => vec![others, policies],
        Order::PoliciesFirst => vec![policies, others],
        Order::Scattered(seed) => {
            let mut random = SmallRng::seed_from_u64(seed);
            let mut all = changes.to_vec();
            all.shuffle(&mut random);
            let mut pieces = vec![Vec::new()];
            for change in all {
                if random.random() {
                    pieces.push(Vec::new());
                }
                pieces.last_mut().into_iter().for_each(|piece: &mut Vec<Change>| piece.push(change.clone()));
            }
            pieces
        }
    }
}

#[test]
fn no_order_of_pushes_cuts_who_is_allowed_or_lets_in_who_is_not() {
    under_istio("orders of pushes", |testbed, istio| {
        let (client, other) = (testbed.client.clone(), testbed.other.clone());
        let server = testbed.server.clone();
        istio.discovery.push(&[Change::policy(about(
            "all",
            security::Scope::Namespace,
            security::Action::Allow,
            "client",
        ))])?;
        eventually(PATIENCE, || http_refused(&other.place, server.v4.into()))?;
        let targets = server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut held = Held::open(&client.place, lines_at(server.v4))?;
        let mut allowed = Load::start(&client.place, 50, &targets)?;
        let mut denied = Load::start(&other.place, 20, &targets)?;
        let orders = [Order::Istiods, Order::PoliciesFirst].into_iter().chain((1..=4).map(Order::Scattered));
        let mut pushes = 0;
        for order in orders {
            for (at, changes) in meshes(testbed).into_iter().enumerate() {
                for piece in pieces(&changes, order) {
                    istio.discovery.push(&piece)?;
                    pushes += 1;
                }
                held.say().with_context(|| format!("mesh {at} in the order {order:?}"))?;
                allowed.goes_on(20)?;
                denied.goes_on(10)?;
            }
        }
        let (allowed, denied) = (allowed.finish()?, denied.finish()?);
        ensure!(allowed.failed.is_empty(), "of those that are allowed: {}", allowed.evidence());
        ensure!(denied.ok == 0 && denied.attempts > 0, "{} of those that are denied got through", denied.ok);
        Ok(format!("{pushes} pushes; allowed: {}; denied: {} attempts", allowed.evidence(), denied.attempts))
    });
}

#[test]
fn a_policy_that_comes_late_is_enforced_on_what_is_open() {
    under_istio("late policies", |testbed, istio| {
        let place = testbed.server.clone();
        let mut client = Held::open(&testbed.client.place, lines_at(place.v4))?;
        let mut other = Held::open(&testbed.other.place, lines_at(place.v4))?;
        let mut plain = Held::open(&testbed.outside.place, lines_at(place.v4))?;
        istio.discovery.push(&[server(testbed, &["demo/p", STRICT])])?;
        // Nothing is decided yet.
        for held in [&mut client, &mut other, &mut plain] {
            held.say().context("while the policy is missing")?;
        }
        let log = testbed.setting(On::B).log();
        let mark = log.mark();
        let only = about("p", security::Scope::WorkloadSelector, security::Action::Allow, "client");
        istio.discovery.push(&[Change::policy(only), Change::policy(strict())])?;
        for (held, who) in [(&mut other, "the other pod"), (&mut plain, "the plain client")] {
            eventually(PATIENCE, || match held.say() {
                Ok(_) => bail!("{who} is still answered"),
                Err(_) => Ok(()),
            })?;
        }
        let line = log.wait_line(mark, PATIENCE, "the cut", |line| line.contains("due to policy change"))?;
        client.say().context("allowed by the policy that came late")?;
        // One that never comes: in the end nobody is left, and nobody let in.
        istio.discovery.push(&[server(testbed, &["demo/p", "demo/never", STRICT])])?;
        http_refused(&testbed.client.place, place.v4.into())?;
        log.wait_line(mark, PATIENCE, "which is missing", |line| line.contains("demo/never"))?;
        eventually(PATIENCE, || match client.say() {
            Ok(_) => bail!("still answered"),
            Err(_) => Ok(()),
        })?;
        istio.discovery.push(&[server(testbed, &["demo/p", STRICT])])?;
        eventually(PATIENCE, || http(&testbed.client.place, place.v4.into(), ""))?;
        Ok(line.trim().to_owned())
    });
}

#[test]
fn what_is_rejected_is_not_dialled_in_clear() {
    under_istio("rejected resources", |testbed, istio| {
        let (client, pod) = (testbed.client.clone(), testbed.server.clone());
        let good = istiod::workload(&pod);
        let bad = workload::Workload {
            tunnel_protocol: workload::TunnelProtocol::LegacyIstioMtls.into(),
            ..good.clone()
        };
        let bad_service =
            workload::Service { waypoint: Some(workload::GatewayAddress::default()), ..service("shop") };
        // As if it had never been there, then a first version that is no good.
        istio.discovery.push(&[Change::remove(ADDRESS, &good.uid)])?;
        let watch = testbed.watch_link_for_clear("rejected")?;
        istio.discovery.push(&[Change::workload(bad), Change::service(bad_service)])?;
        let log = testbed.setting(On::A).log();
        let mark = log.mark();
        for address in pod.addresses() {
            http_refused(&client.place, address)?;
        }
        refused(&client.place, &[&format!("http://{}/", SERVICE_IPS[0])])?;
        nothing_in_clear(&watch.finish()?, &client, "secret")?;
        let line = log.wait_line(mark, PATIENCE, "why", |line| {
            line.contains("is not dialled, as it was rejected") && line.contains("LEGACY_ISTIO_MTLS")
        })?;
        let metrics = testbed.setting(On::A).metrics()?;
        ensure!(metrics.contains("ztunnel_xds_refused_resources 2"), "{metrics}");
        let (_, dump) = testbed.setting(On::A).ask("GET", "/config_dump")?;
        let dump: serde_json::Value = serde_json::from_slice(&dump)?;
        let shown = dump["refusedResources"].as_array().context("it is not shown")?;
        ensure!(shown.len() == 2, "{shown:?}");
        // The next daemon does not know better while istiod is away.
        istio.discovery.stop();
        testbed.kill_daemon(On::A)?;
        testbed.start_daemon(On::A)?;
        http_refused(&client.place, pod.v4.into())?;
        testbed.a.place.netns.enter(|| istio.discovery.restart())?;
        // Good versions.
        istio.discovery.push(&[Change::workload(behind(good, "shop")), Change::service(service("shop"))])?;
        eventually(PATIENCE, || http(&client.place, pod.v4.into(), ""))?;
        Ok(line.trim().to_owned())
    });
}
