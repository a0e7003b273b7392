//! Another ztunnel-compatible program, one on each node, as a node agent would start and feed it.
//!
//! The program reads the mesh from a local file and signs its own certificates (`FAKE_CA`, which test builds have). We
//! play the node agent: iptables rules in the pods (without the ones for DNS), and for each pod one `AddWorkload` with
//! its network namespace over the ZDS socket. The rules are in place before the program starts, so that nothing passes
//! around it.

use std::fs::{self, File};
use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use ztunnel_tests::mesh::MESHED;
use ztunnel_tests::process::Process;
use ztunnel_tests::topology::{Node, Pod};

use super::site::Site;

/// How long the program may take to connect and for each answer; an agent closes the connection then.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What istio-cni sets in a pod, without DNS.
const RULES: &str = "*mangle
-A PREROUTING -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
-A PREROUTING -s 169.254.7.127 -p tcp -j ACCEPT
-A PREROUTING ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A OUTPUT -d 169.254.7.127 -p tcp -j ACCEPT
-A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
";

/// A running program and the agent's end of its socket. The program ends first.
#[derive(Debug)]
pub(crate) struct Agent {
    proxy: Process,
    /// Kept open: the program takes its end for the agent's.
    _connection: Socket,
}

impl Agent {
    /// The program.
    pub(crate) fn proxy(&mut self) -> &mut Process {
        &mut self.proxy
    }
}

/// Writes what the programs know of the mesh; returns the file. JSON is YAML too.
pub(crate) fn mesh_file(site: &Site) -> Result<PathBuf> {
    let workload = |pod: &Pod| {
        json!({
            "uid": format!("Kubernetes//Pod/{MESHED}/{}", pod.name),
            "name": pod.name,
            "namespace": MESHED,
            "serviceAccount": pod.name,
            "trustDomain": "cluster.local",
            "node": pod.node,
            "workloadIps": [pod.v4],
            "protocol": "HBONE",
            "services": {},
        })
    };
    let workloads = [&site.client, &site.near, &site.server].map(workload);
    let mesh = json!({ "workloads": workloads });
    let path = site.run.path("state").join("peer-mesh.yaml");
    fs::write(&path, serde_json::to_vec_pretty(&mesh)?)?;
    Ok(path)
}

/// Redirects all pods. Until a program listens in a pod, its connections are refused.
pub(crate) fn redirect(site: &Site) -> Result<()> {
    let path = site.run.path("state").join("iptables.rules");
    fs::write(&path, RULES)?;
    for pod in [&site.client, &site.near, &site.server] {
        redirect_pod(pod, &path).with_context(|| format!("redirecting pod {}", pod.name))?;
    }
    Ok(())
}

fn redirect_pod(pod: &Pod, rules: &Path) -> Result<()> {
    let output = pod.place.run("iptables-restore", &[&rules.display().to_string()])?;
    ensure!(output.status.success(), "iptables-restore: {}", String::from_utf8_lossy(&output.stderr).trim());
    let netns = &pod.place.netns;
    netns.ip(&["rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"])?;
    netns.ip(&["route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"])?;
    // Closed connections would soon fill the table of connections in a load of new ones.
    netns.set_sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")
}

/// Starts the program of a node and hands its pods to it; they are redirected already.
pub(crate) fn start(site: &Site, node: &Node, pods: &[&Pod], program: &Path, mesh: &Path) -> Result<Agent> {
    let path = site.run.path("state").join(format!("zds-{}.sock", node.name));
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.bind(&SockAddr::unix(&path)?).with_context(|| format!("cannot bind {}", path.display()))?;
    socket.listen(4)?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut command = node.place.command(program)?;
    command
        .env("NODE_NAME", &node.name)
        .env("LOCAL_XDS_PATH", mesh)
        .env("XDS_ADDRESS", "")
        .env("FAKE_CA", "true")
        .env("INPOD_UDS", &path)
        .env("PROXY_MODE", "shared")
        .env("ISTIO_META_DNS_CAPTURE", "false");
    let mut proxy = node.place.start(&format!("peer-{}", node.name), command)?;
    match admit(&socket, pods) {
        Ok(connection) => Ok(Agent { proxy, _connection: connection }),
        Err(error) => {
            proxy.must_run()?;
            Err(error.context(format!("the peer's program said: {}", proxy.log().tail(3))))
        }
    }
}

/// Takes the program's connection, adds the pods one by one, and ends the snapshot.
fn admit(socket: &Socket, pods: &[&Pod]) -> Result<Socket> {
    let (connection, _) = socket.accept().context("it has not connected to the agent's socket")?;
    connection.set_read_timeout(Some(ANSWER_LIMIT))?;
    receive(&connection).context("its greeting")?;
    for pod in pods {
        let path = pod.place.netns.path();
        let netns = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        ask(&connection, &add_workload(&pod.name), Some(&netns))
            .with_context(|| format!("it refused pod {}", pod.name))?;
    }
    ask(&connection, &field(3, b""), None).context("it refused the end of the snapshot")?;
    Ok(connection)
}

/// Sends a request and waits for its acknowledgement.
fn ask(connection: &Socket, request: &[u8], netns: Option<&File>) -> Result<()> {
    let descriptors: Vec<i32> = netns.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = if netns.is_some() { &rights[..] } else { &[] };
    sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(request)], rights, MsgFlags::empty(), None)
        .context("cannot send")?;
    acknowledged(&receive(connection).context("no answer")?)
}

fn receive(mut connection: &Socket) -> Result<Vec<u8>> {
    // The protocol's limit for one message.
    let mut message = vec![0; 1024];
    let length = connection.read(&mut message)?;
    ensure!(length > 0, "it has closed the connection");
    message.truncate(length);
    Ok(message)
}

/// `WorkloadRequest { add: AddWorkload { uid, workload_info: { name, namespace, service_account } } }`
fn add_workload(name: &str) -> Vec<u8> {
    let info = [field(1, name.as_bytes()), field(2, MESHED.as_bytes()), field(3, name.as_bytes())].concat();
    field(1, &[field(1, format!("{name}-1").as_bytes()), field(2, &info)].concat())
}

/// `WorkloadResponse { ack: Ack { error } }`, where no error is success.
fn acknowledged(response: &[u8]) -> Result<()> {
    match response {
        [0x0a, 0x00] | [0x0a, 0x02, 0x0a, 0x00] => Ok(()),
        [0x0a, ..] => bail!("it answered: {}", String::from_utf8_lossy(&response[2..]).trim()),
        _ => bail!("it answered {response:?}"),
    }
}

/// A protobuf field of bytes, of less than 128 each: one byte of tag, one of length.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    const LENGTH_DELIMITED: u8 = 2;
    assert!(content.len() < 128, "names of pods here are short");
    let mut bytes = vec![number << 3 | LENGTH_DELIMITED, content.len() as u8];
    bytes.extend_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_pod_is_announced_as_the_protocol_says() {
        // 22 bytes of names; 10 of the uid, 2 and 22 of the names.
        let expected = b"\x0a\x22\x0a\x08client-1\x12\x16\x0a\x06client\x12\x04demo\x1a\x06client";
        assert_eq!(add_workload("client"), expected);
    }

    #[test]
    fn only_an_empty_acknowledgement_is_success() {
        assert!(acknowledged(b"\x0a\x00").is_ok());
        let refused = acknowledged(b"\x0a\x0a\x0a\x08no netns").expect_err("it has an error");
        assert!(refused.to_string().contains("no netns"), "{refused}");
        assert!(acknowledged(b"").is_err());
    }

    #[test]
    fn requests_carry_their_file_and_wait_for_the_answer() {
        let (agent, program) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).expect("a pair");
        let answers = std::thread::spawn(move || {
            let request = receive(&program).expect("a request");
            (&program).write_all(b"\x0a\x00").expect("the agent is there");
            request
        });
        let file = File::open("/proc/self/ns/net").expect("every process has one");
        ask(&agent, &add_workload("near"), Some(&file)).expect("it is acknowledged");
        assert_eq!(answers.join().expect("it ends"), add_workload("near"));
    }
}
