//! Shows on this machine what the daemon does. `cargo xtask demo` builds this and becomes it.
#![expect(clippy::print_stdout, reason = "a report goes to standard output")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use xtask::arguments::Demo;
use ztunnel_tests::enclosure;
use ztunnel_tests::scenarios::{DEMO, Row};
use ztunnel_tests::testbed::{HTTP, Options, SERVICE_IPS, Testbed};
use ztunnel_tests::topology::{Pod, in_url};

#[derive(Debug, Serialize)]
struct Report {
    passed: usize,
    failed: usize,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    run(&Demo::parse()).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Demo) -> Result<ExitCode> {
    if arguments.down {
        match enclosure::take_down_standing()? {
            0 => println!("nothing is standing"),
            _ => println!("taken down"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.keep {
        enclosure::take_down_standing().context("what an earlier demo has left standing")?;
    }
    // From here on in a child process, beside whatever else runs on this machine.
    enclosure::enter().context("cannot make an enclosure for the demo")?;
    let mut rows = Vec::new();
    let options = Options { keep: arguments.keep, talk: true };
    let kept = show(options, arguments.json, &mut rows)?;
    let failed = rows.iter().filter(|row| !row.ok).count();
    let report = Report { passed: rows.len() - failed, failed, rows };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("\n{} of {} lines hold", report.passed, report.rows.len());
        kept.iter().for_each(|hints| println!("\n{hints}"));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs all scenarios; returns what to try next when everything is left standing.
fn show(options: Options, json: bool, rows: &mut Vec<Row>) -> Result<Option<String>> {
    let mut add = |row: Row| {
        if !json {
            println!("{} {}\n    {}", if row.ok { "ok  " } else { "FAIL" }, row.name, row.evidence);
        }
        rows.push(row);
    };
    let mut testbed = Testbed::start(options).context("cannot set the scene")?;
    // The last line is about what is left, and there is none when everything is.
    let lines = if options.keep { DEMO.len() } else { DEMO.len() + 1 };
    for (number, scenario) in DEMO.iter().enumerate() {
        testbed.say(&format!("{} of {lines}: {}", number + 1, scenario.name));
        let mut row = scenario.row(&mut testbed);
        if let Err(error) = testbed.reset() {
            row.ok = false;
            row.evidence += &format!("; and after that: {error:#}");
        }
        add(row);
    }
    if options.keep {
        let hints = hints(&testbed);
        let entrance = testbed.leave_standing()?;
        return Ok(Some(format!(
            "Still standing, in namespaces of its own. As root, enter them with a shell:\n  {entrance}\n{hints}"
        )));
    }
    let name = "after the demo nothing is left on the machine".to_owned();
    add(match testbed.end() {
        Ok(compared) => Row { name, ok: true, evidence: compared.to_string() },
        Err(error) => Row { name, ok: false, evidence: format!("{error:#}") },
    });
    Ok(None)
}

/// A mesh file in one line, for a shell.
const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
    metadata: {name: strict, namespace: demo}, spec: {mtls: {mode: STRICT}}}";

fn hints(testbed: &Testbed) -> String {
    let prefix = testbed.run.prefix();
    let server = testbed.server.v4;
    // Not `ip netns exec`, which hides the control groups and the BPF file system behind a mount of its own.
    let inside = |name: &str| format!("nsenter --net=/run/netns/{prefix}-{name}");
    let in_pod = |pod: &Pod| {
        let procs = pod.place.cgroup.procs();
        format!("sh -c 'echo $$ > {}; exec {}", procs.display(), inside(&pod.name))
    };
    let client = in_pod(&testbed.client);
    let outsider = in_pod(&testbed.outsider);
    let node = inside(&testbed.a.name);
    format!(
        "and in it try:
  # from a pod in the mesh, to the server, its IPv6 address, and the service
  {client} curl -s http://{server}:{HTTP}/'
  {client} curl -s -g http://{v6}:{HTTP}/'
  {client} curl -s http://{service}/'
  # from a pod outside the mesh
  {outsider} curl -sS -m 5 http://{server}:{HTTP}/'
  # the same once plaintext is refused
  echo '{STRICT}' > {mesh}/strict.yaml; sleep 1
  {outsider} curl -sS -m 5 http://{server}:{HTTP}/'
  tail -n 1 {logs}/daemon-node-b.log; rm {mesh}/strict.yaml
  # what goes over the link
  {node} tcpdump -n -i link0 port 15008
  # metrics of a daemon
  {node} curl -s localhost:15020/metrics
  # both daemons' logs
  tail {logs}/daemon-node-*.log
Take it down, which ends that shell: cargo xtask demo --down",
        v6 = in_url(testbed.server.v6.into()),
        service = SERVICE_IPS[0],
        mesh = testbed.mesh.path().display(),
        logs = testbed.run.path("logs").display(),
    )
}
