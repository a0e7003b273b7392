//! What happens to an operator: files that are cut, ports that are taken, daemons that do not answer.

mod common;

use std::fs;
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{act_in, in_testbed, in_testbed_that};
use nix::sys::signal::Signal;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::process::sh;
use ztunnel_tests::testbed::{On, Options, Testbed, Traces, http};
use ztunnel_tests::topology::Pod;
use ztunnel_tests::wire::tunnels_only;

/// Longer than a change that is doubtful waits until it is carried out.
const LONGER: Duration = Duration::from_secs(5);

/// A mesh file as a ConfigMap is mounted: the file is a symbolic link through one that is swapped.
struct ConfigMap {
    dir: PathBuf,
    version: u32,
}

impl ConfigMap {
    fn create(dir: PathBuf, text: &str) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let mut map = Self { dir, version: 0 };
        symlink("..data/mesh.yaml", map.dir.join("mesh.yaml"))?;
        map.swap(text)?;
        Ok(map)
    }

    /// The file behind the links.
    fn file(&self) -> PathBuf {
        self.dir.join("..data/mesh.yaml")
    }

    /// As kubelet does it.
    fn swap(&mut self, text: &str) -> Result<()> {
        self.version += 1;
        let version = format!("..version-{}", self.version);
        fs::create_dir(self.dir.join(&version))?;
        fs::write(self.dir.join(&version).join("mesh.yaml"), text)?;
        let aside = self.dir.join("..data_tmp");
        symlink(&version, &aside)?;
        Ok(fs::rename(aside, self.dir.join("..data"))?)
    }
}

/// What is in a mesh directory, as one file.
fn whole(directory: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    // Namespaces come before pods.
    files.sort();
    let texts: Result<Vec<String>, _> = files.iter().map(fs::read_to_string).collect();
    Ok(texts?.join("---\n"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// For a while both pods are captured, and what the client sends goes through the mesh.
fn nothing_is_released(testbed: &Testbed, pods: &[&Pod], how_long: Duration) -> Result<u32> {
    let until = Instant::now() + how_long;
    let mut asked = 0;
    while Instant::now() < until {
        for pod in pods {
            ensure!(Traces::look(&pod.place.netns)?.is_captured(), "{} is released", pod.name);
        }
        http(&testbed.client.place, testbed.server.v4.into(), "")?;
        asked += 1;
    }
    Ok(asked)
}

fn wait_ready_again(testbed: &Testbed, on: On) -> Result<()> {
    eventually(PATIENCE, || {
        let said = testbed.setting(on).readiness()?;
        ensure!(said.trim() == "ready", "{said}");
        Ok(())
    })
}

#[test]
fn what_looks_as_if_everything_were_gone_releases_no_pod() {
    let prepare = |testbed: &mut Testbed| {
        let map = ConfigMap::create(testbed.run.path("configmap"), &whole(testbed.mesh.path())?)?;
        testbed.read_mesh_from(On::A, map.dir.clone());
        Ok(map)
    };
    in_testbed_that("everything gone", prepare, |testbed, map| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let pods = [&client, &server];
        let text = fs::read_to_string(map.file())?;
        let first_pod = text.find("kind: Pod").context("no pod in the mesh")?;
        let boundary = text[..first_pod].rfind("---").context("no document before it")?;
        let watch = testbed.watch_link("everything-gone")?;
        let mut asked = 0;
        // Of the file: emptied, cut between two objects, cut within one.
        for cut in [0, boundary, first_pod + 200] {
            fs::write(map.file(), &text[..cut])?;
            asked += nothing_is_released(testbed, &pods, LONGER).with_context(|| format!("cut at {cut}"))?;
            let readiness = testbed.setting(On::A).readiness()?;
            ensure!(readiness.starts_with("ready, with the mesh as it was"), "cut at {cut}: {readiness}");
            fs::write(map.file(), &text)?;
            wait_ready_again(testbed, On::A)?;
        }
        // In two steps, as a shell's `>` does it, and by swaps.
        fs::write(map.file(), "")?;
        asked += nothing_is_released(testbed, &pods, Duration::from_millis(300))?;
        fs::write(map.file(), &text)?;
        map.swap(&text)?;
        fs::rename(map.dir.join("..data"), map.dir.join("..gone"))?;
        asked += nothing_is_released(testbed, &pods, Duration::from_millis(200))?;
        fs::rename(map.dir.join("..gone"), map.dir.join("..data"))?;
        map.swap(&text)?;
        asked += nothing_is_released(testbed, &pods, LONGER)?;
        wait_ready_again(testbed, On::A)?;
        // Of the directory that the other node reads: emptied for a moment, and for good.
        let (directory, aside) = (testbed.mesh.path().to_owned(), testbed.run.path("aside"));
        for how_long in [Duration::from_millis(200), LONGER] {
            fs::rename(&directory, &aside)?;
            fs::create_dir(&directory)?;
            asked += nothing_is_released(testbed, &pods, how_long).context("the directory is empty")?;
            fs::remove_dir(&directory)?;
            fs::rename(&aside, &directory)?;
        }
        // Half of it: the objects of pods are gone, and their network namespaces are not.
        fs::create_dir_all(&aside)?;
        let is_pod = |path: &PathBuf| path.to_string_lossy().contains("/pod-");
        let files: Vec<PathBuf> =
            fs::read_dir(&directory)?.flatten().map(|entry| entry.path()).filter(is_pod).collect();
        for file in &files {
            fs::rename(file, aside.join(file.file_name().context("a name")?))?;
        }
        asked += nothing_is_released(testbed, &pods, LONGER).context("without the objects of pods")?;
        for file in &files {
            fs::rename(aside.join(file.file_name().context("a name")?), file)?;
        }
        wait_ready_again(testbed, On::B)?;
        let packets = watch.finish()?;
        tunnels_only(&packets)?;
        Ok(format!("{asked} requests through the mesh meanwhile, nothing in clear"))
    });
}

#[test]
fn what_is_held_is_said_and_carried_out_by_force() {
    in_testbed("held", |testbed| {
        let client = testbed.client.clone();
        let setting = testbed.setting(On::A).clone();
        let before = fs::read_to_string(testbed.mesh.path().join("pod-client.yaml"))?;
        // One pod of many goes without a word, though its object is only missing.
        testbed.mesh.remove("pod-client")?;
        eventually(PATIENCE, || {
            ensure!(!Traces::look(&client.place.netns)?.is_captured(), "{} is captured still", client.name);
            Ok(())
        })?;
        testbed.mesh.write("pod-client", &before)?;
        eventually(PATIENCE, || {
            ensure!(Traces::look(&client.place.netns)?.is_captured(), "{} is not captured yet", client.name);
            Ok(())
        })?;
        wait_ready_again(testbed, On::A)?;

        for pod in testbed.meshed() {
            testbed.mesh.remove(&format!("pod-{}", pod.name))?;
        }
        let readiness = eventually(PATIENCE, || {
            let readiness = setting.readiness()?;
            ensure!(readiness.contains("is held"), "{readiness}");
            Ok(readiness)
        })?;
        ensure!(
            readiness.contains("4 of 4 pods") && readiness.contains("ztunnel reload --force"),
            "{readiness}"
        );
        let metrics = setting.metrics()?;
        ensure!(metrics.contains("ztunnel_source_refused{state=\"held\"} 1"), "{metrics}");
        let shown = setting.command(&["show", "policies"])?;
        ensure!(said(&shown).starts_with("Not in force: "), "{}", said(&shown));
        ensure!(setting.log().text().contains("is held"), "the log does not say it");

        let unforced = setting.command(&["reload"])?;
        ensure!(!unforced.status.success() && said(&unforced).contains("is held"), "{}", said(&unforced));
        ensure!(Traces::look(&client.place.netns)?.is_captured(), "released without force");
        for on in [On::A, On::B] {
            let forced = testbed.setting(on).command(&["reload", "--force"])?;
            ensure!(forced.status.success(), "{}", said(&forced));
        }
        for pod in testbed.meshed() {
            eventually(PATIENCE, || {
                ensure!(!Traces::look(&pod.place.netns)?.is_captured(), "{} is captured still", pod.name);
                Ok(())
            })?;
        }
        wait_ready_again(testbed, On::A)?;
        let again = setting.command(&["reload"])?;
        ensure!(again.status.success(), "{}", said(&again));
        Ok(readiness)
    });
}

#[test]
fn a_start_with_fewer_pods_leaves_the_others_closed() {
    in_testbed("earlier pods", |testbed| {
        let (client, other) = (testbed.client.clone(), testbed.other.clone());
        testbed.kill_daemon(On::A)?;
        // What is left of the mesh while the daemon is away: one of three pods of the node.
        for pod in [&client, &other] {
            testbed.mesh.remove(&format!("pod-{}", pod.name))?;
        }
        let watch = testbed.watch_link("earlier-pods")?;
        testbed.start_daemon(On::A)?;
        let setting = testbed.setting(On::A).clone();
        eventually(PATIENCE, || {
            let readiness = setting.readiness()?;
            ensure!(readiness.contains("an earlier daemon captured is held"), "{readiness}");
            Ok(())
        })?;
        ensure!(Traces::look(&client.place.netns)?.is_captured(), "the client is released");
        ensure!(http(&client.place, testbed.server.v4.into(), "").is_err(), "the client is open");
        // The one that is named still goes through the mesh.
        http(&testbed.near.place, testbed.server.v4.into(), "")?;
        tunnels_only(&watch.finish()?)?;
        let forced = setting.command(&["reload", "--force"])?;
        ensure!(forced.status.success(), "{}", said(&forced));
        eventually(PATIENCE, || {
            ensure!(!Traces::look(&client.place.netns)?.is_captured(), "the client is captured still");
            Ok(())
        })?;
        wait_ready_again(testbed, On::A)?;
        Ok("closed until it was confirmed".to_owned())
    });
}

#[test]
fn a_rejected_change_is_said_everywhere() {
    in_testbed("rejected", |testbed| {
        testbed.mesh.write("broken", "kind: [")?;
        let setting = testbed.setting(On::A).clone();
        let readiness = eventually(PATIENCE, || {
            let readiness = setting.readiness()?;
            ensure!(readiness.contains("is rejected") && readiness.contains("broken.yaml"), "{readiness}");
            Ok(readiness)
        })?;
        let metrics = setting.metrics()?;
        ensure!(metrics.contains("ztunnel_source_refused{state=\"rejected\"} 1"), "{metrics}");
        let shown = said(&setting.command(&["show"])?);
        ensure!(shown.starts_with("Not in force: "), "{shown}");
        ensure!(!setting.command(&["reload", "--force"])?.status.success(), "errors were forced");
        testbed.mesh.remove("broken")?;
        wait_ready_again(testbed, On::A)?;
        Ok(readiness)
    });
}

#[test]
fn a_start_that_fails_leaves_the_node_as_it_was() {
    let testbed = Testbed::without_daemons(Options::default());
    act_in(testbed, "busy port", |testbed| {
        let client = testbed.client.clone();
        let setting = testbed.setting(On::A).clone();
        let before = Traces::look(&client.place.netns)?;
        // Somebody who does not share it.
        let taken = testbed.a.place.netns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 15020))?))?;
        let fails = || -> Result<String> {
            let mut daemon = setting.start()?;
            let mark = daemon.process().log().mark();
            ensure!(daemon.ended().is_err(), "it started");
            Ok(setting.log().since(mark.saturating_sub(4096)))
        };
        let text = fails()?;
        ensure!(text.contains("15020") && text.contains("--metrics-addr"), "{text}");
        ensure!(Traces::look(&client.place.netns)? == before, "the pod is not as it was");
        ensure!(!setting.pins.exists() || fs::read_dir(&setting.pins)?.next().is_none(), "pins are left");
        // It fails late, when pods have been captured already: nobody may put a socket there.
        drop(taken);
        fs::create_dir_all(&setting.meeting)?;
        let obstacle = setting.meeting.join("control.sock");
        fs::create_dir(&obstacle)?;
        fs::write(obstacle.join("in the way"), "")?;
        fails()?;
        ensure!(
            Traces::look(&client.place.netns)? == before,
            "the pod is not as it was after a late failure"
        );
        http(&client.place, testbed.outside.v4.into(), "").context("the client is cut off")?;
        fs::remove_dir_all(&obstacle)?;
        // Where a daemon was before, what it captured stays captured.
        testbed.start_daemons()?;
        testbed.kill_daemon(On::A)?;
        let taken = testbed.a.place.netns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 15021))?))?;
        fails()?;
        ensure!(Traces::look(&client.place.netns)?.is_captured(), "the pod was released");
        ensure!(http(&client.place, testbed.server.v4.into(), "").is_err(), "the pod is open");
        drop(taken);
        testbed.start_daemon(On::A)?;
        eventually(PATIENCE, || http(&client.place, testbed.server.v4.into(), ""))?;
        Ok(text.lines().last().unwrap_or_default().to_owned())
    });
}

#[test]
fn a_pod_that_cannot_answer_its_node_is_named_beforehand_and_in_the_log() {
    let testbed = Testbed::without_daemons(Options::default());
    act_in(testbed, "no route", |testbed| {
        let client = testbed.client.clone();
        let setting = testbed.setting(On::A).clone();
        let file = testbed.run.path("no-route.yaml");
        let netns = client.place.netns.name();
        let text = format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: demo, labels: {{istio.io/dataplane-mode: ambient}}}}}}\n\
             ---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: client\n  namespace: demo\n  annotations:\n    \
             ztunnel.io/netns: {netns}\nstatus: {{podIPs: [{{ip: {}}}, {{ip: \"{}\"}}]}}\n",
            client.v4, client.v6
        );
        fs::write(&file, text)?;
        let path = file.display().to_string();
        let check = || setting.command(&["check", "--strict", "--mesh", &path]);
        let before = check()?;
        ensure!(before.status.success(), "{}", said(&before));
        let default = sh("ip", &["-n", netns, "route", "show", "default"])?;
        sh("ip", &["-n", netns, "route", "del", "default"])?;
        let found = check()?;
        let text = said(&found);
        ensure!(!found.status.success(), "{text}");
        ensure!(text.contains("no-route.yaml:9") && text.contains("no route to 169.254.7.127"), "{text}");
        ensure!(!text.contains("fd16:"), "it has a route of the other family: {text}");
        // Nor is it passed over in silence by the daemon.
        let mark = setting.log().mark();
        testbed.start_daemon(On::A)?;
        let line = setting.log().wait_line(mark, PATIENCE, "the warning", |line| {
            line.contains("the pod has no route") && line.contains("169.254.7.127")
        })?;
        ensure!(line.contains("client"), "{line}");
        let mut route = vec!["-n", netns, "route", "add"];
        route.extend(default.split_whitespace());
        sh("ip", &route)?;
        testbed.kill_daemon(On::A)?;
        testbed.start_daemons()?;
        Ok(line)
    });
}

#[test]
fn a_daemon_that_does_not_answer_is_named() {
    in_testbed("stopped", |testbed| {
        let setting = testbed.setting(On::A).clone();
        let daemon = testbed.daemon(On::A)?;
        daemon.process().signal(Signal::SIGSTOP);
        let pid = daemon.process().pid();
        let shown = setting.command(&["show"]);
        let log = setting.command(&["log"]);
        testbed.daemon(On::A)?.process().signal(Signal::SIGCONT);
        for output in [shown?, log?] {
            let text = said(&output);
            ensure!(!output.status.success(), "{text}");
            ensure!(text.contains(&format!("process {pid}")) && text.contains("kill -CONT"), "{text}");
        }
        Ok("named with what to do".to_owned())
    });
}

#[test]
fn a_check_names_pods_that_will_not_be_captured_as_meant() {
    in_testbed("check", |testbed| {
        let setting = testbed.setting(On::A).clone();
        // It looks for network namespaces where it is the node itself that is checked.
        let host = String::from_utf8(setting.place.run("uname", &["-n"])?.stdout)?;
        let host = host.trim();
        let mesh = testbed.run.path("checked");
        fs::create_dir_all(&mesh)?;
        let pod = |name: &str, namespace: &str, netns: &str, ip: u8| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {name}\n  \
                 annotations:\n    ztunnel.io/netns: {netns}\nspec:\n  nodeName: {host}\nstatus:\n  podIP: \
                 10.80.9.{ip}\n"
            )
        };
        let there = testbed.client.place.netns.name();
        for name in ["namespace-demo", "namespace-plain"] {
            fs::copy(testbed.mesh.path().join(format!("{name}.yaml")), mesh.join(format!("{name}.yaml")))?;
        }
        let check = |strict: bool| {
            let path = mesh.display().to_string();
            let mut arguments = vec!["check", &path, "--node", host];
            arguments.extend(strict.then_some("--strict"));
            setting.command(&arguments)
        };
        fs::write(mesh.join("a.yaml"), pod("right", "demo", there, 1))?;
        let right = check(true)?;
        ensure!(right.status.success() && !said(&right).contains("warning"), "{}", said(&right));
        fs::write(mesh.join("b.yaml"), pod("lost", "demo", "nowhere-at-all", 2))?;
        let lost = check(false)?;
        let words = said(&lost);
        ensure!(lost.status.success(), "a warning is no error: {words}");
        let warning = words.lines().find(|line| line.contains("nowhere-at-all")).context("not seen")?;
        ensure!(
            warning.contains("b.yaml:8: warning")
                && warning.contains("demo/lost")
                && warning.contains("does not exist"),
            "{warning}"
        );
        ensure!(!check(true)?.status.success(), "--strict lets it pass");
        fs::remove_file(mesh.join("b.yaml"))?;
        // Somebody meant it to be captured, and it is not in the mesh.
        fs::write(mesh.join("c.yaml"), pod("stray", "plain", there, 3))?;
        let stray = said(&check(false)?);
        let warning = stray.lines().find(|line| line.contains("plain/stray")).context("not seen")?;
        ensure!(warning.contains("c.yaml:8: warning") && warning.contains("is not in the mesh"), "{warning}");
        ensure!(!check(true)?.status.success(), "--strict lets it pass");
        Ok(warning.to_owned())
    });
}

#[test]
fn an_uninstallation_without_privileges_is_an_error() {
    in_testbed("uninstall", |testbed| {
        let setting = testbed.setting(On::A).clone();
        testbed.kill_daemon(On::A)?;
        let pins = setting.pins.display().to_string();
        let binary = ztunnel_tests::binaries::daemon()?.display().to_string();
        let plain = format!("setpriv --reuid 65534 --clear-groups {binary} uninstall --pin-dir {pins}");
        let plain = setting.place.run("sh", &["-c", &plain])?;
        ensure!(!plain.status.success() && said(&plain).contains("root"), "{}", said(&plain));
        ensure!(Traces::look(&testbed.client.place.netns)?.is_captured(), "it removed something");
        testbed.start_daemon(On::A)?;
        Ok(said(&plain))
    });
}

#[test]
fn slow_connections_do_not_starve_the_nodes_probes() {
    in_testbed("starved probes", |testbed| {
        let setting = testbed.setting(On::A).clone();
        // From a pod, by the way its traffic takes to the node: many that say nothing.
        let node: std::net::IpAddr = "10.80.0.1".parse()?;
        let attacker = testbed.outside.clone();
        let held = attacker.place.netns.enter(|| {
            let mut held = Vec::new();
            for port in [15021, 15020] {
                for _ in 0..600 {
                    let limit = Duration::from_secs(2);
                    if let Ok(stream) = TcpStream::connect_timeout(&(node, port).into(), limit) {
                        held.push(stream);
                    }
                }
            }
            Ok(held)
        })?;
        ensure!(held.len() > 300, "only {} connections reach the node", held.len());
        let begun = Instant::now();
        for _ in 0..20 {
            setting.readiness()?;
            setting.metrics()?;
        }
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(10), "20 probes and scrapes took {took:?}");
        Ok(format!("{} slow connections, 20 probes and scrapes in {took:?}", held.len()))
    });
}
