//! The rules by which a node agent redirects a pod's traffic and its DNS, and lets the node's probes pass: istio-cni's.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;
use crate::topology::{Node, Pod};

/// What the rules are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `iptables-nft-restore`
    IptablesNft,
    /// `iptables-legacy-restore`
    IptablesLegacy,
    /// `nft`
    Nft,
}

/// The addresses under which probes arrive in pods.
pub const PROBES: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// The rules in a pod, for one family.
fn in_pod(loopback: &str, probe: &str) -> String {
    format!(
        "*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_PRERT -s {probe} -p tcp -j ACCEPT
-A ISTIO_OUTPUT -d {probe} -p tcp -j ACCEPT
-A ISTIO_PRERT ! -d {loopback} -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d {loopback} -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
"
    )
}

/// The same, for nftables and both families.
fn in_pod_nft() -> String {
    let [v4, v6] = PROBES;
    format!(
        "table inet istio-ambient-nat {{
  chain prerouting {{ type nat hook prerouting priority -100; policy accept; jump istio-prerouting; }}
  chain output {{ type nat hook output priority -100; policy accept; jump istio-output; }}
  chain istio-prerouting {{
    meta l4proto tcp ip saddr {v4} accept
    meta l4proto tcp ip6 saddr {v6} accept
    ip daddr != 127.0.0.1 tcp dport != 15008 meta mark and 0xfff != 0x539 redirect to :15006
    ip6 daddr != ::1 tcp dport != 15008 meta mark and 0xfff != 0x539 redirect to :15006
  }}
  chain istio-output {{
    meta l4proto tcp ip daddr {v4} accept
    meta l4proto tcp ip6 daddr {v6} accept
    oifname != lo udp dport 53 meta mark and 0xfff != 0x539 redirect to :15053
    ip daddr != 127.0.0.1 tcp dport 53 meta mark and 0xfff != 0x539 redirect to :15053
    ip6 daddr != ::1 tcp dport 53 meta mark and 0xfff != 0x539 redirect to :15053
    meta l4proto tcp meta mark and 0xfff == 0x111 accept
    oifname lo ip daddr != 127.0.0.1 accept
    oifname lo ip6 daddr != ::1 accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark and 0xfff != 0x539 redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 meta mark and 0xfff != 0x539 redirect to :15001
  }}
}}
table inet istio-ambient-mangle {{
  chain prerouting {{ type filter hook prerouting priority -150; policy accept; jump istio-prerouting; }}
  chain output {{ type route hook output priority -150; policy accept; jump istio-output; }}
  chain istio-prerouting {{ meta mark and 0xfff == 0x539 ct mark set ct mark and 0xfffff000 or 0x111; }}
  chain istio-output {{ ct mark and 0xfff == 0x111 meta mark set ct mark; }}
}}
table inet istio-ambient-raw {{
  chain prerouting {{ type filter hook prerouting priority -300; policy accept; jump istio-prerouting; }}
  chain output {{ type filter hook output priority -300; policy accept; jump istio-output; }}
  chain istio-prerouting {{ udp sport 53 meta mark and 0xfff != 0x539 ct zone set 1; }}
  chain istio-output {{ udp dport 53 meta mark and 0xfff == 0x539 ct zone set 1; }}
}}
"
    )
}

/// The two commands a rule or route of each family is made with.
const FAMILIES: [(&str, &str); 2] = [("-4", "0.0.0.0/0"), ("-6", "::/0")];

/// Redirects a pod's traffic, as the agent does before it tells the daemon of the pod.
pub fn pod(pod: &Pod, backend: Backend) -> Result<()> {
    let netns = &pod.place.netns;
    for (family, all) in FAMILIES {
        netns.ip(&[family, "rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"])?;
        netns.ip(&[family, "route", "add", "local", all, "dev", "lo", "table", "100"])?;
    }
    let [v4, v6] = PROBES;
    match backend {
        Backend::Nft => inside(netns, "nft", &["-f", "-"], &in_pod_nft()),
        Backend::IptablesNft | Backend::IptablesLegacy => {
            let kind = if backend == Backend::IptablesNft { "nft" } else { "legacy" };
            // Legacy tables have one lock for all namespaces.
            let restore = |program: &str, rules: &str| {
                inside(netns, &format!("{program}-{kind}-restore"), &["--noflush", "--wait"], rules)
            };
            restore("iptables", &in_pod("127.0.0.1/32", v4))?;
            restore("ip6tables", &in_pod("::1/128", v6))
        }
    }
}

/// Takes all of that back, as the agent does before it tells the daemon that a pod has left.
pub fn release(pod: &Pod, backend: Backend) -> Result<()> {
    let netns = &pod.place.netns;
    match backend {
        Backend::Nft => {
            let tables =
                ["nat", "mangle", "raw"].map(|table| format!("delete table inet istio-ambient-{table}\n"));
            inside(netns, "nft", &["-f", "-"], &tables.concat())?;
        }
        Backend::IptablesNft | Backend::IptablesLegacy => {
            let kind = if backend == Backend::IptablesNft { "nft" } else { "legacy" };
            for program in ["iptables", "ip6tables"] {
                let empty = "*nat\nCOMMIT\n*mangle\nCOMMIT\n*raw\nCOMMIT\n";
                inside(netns, &format!("{program}-{kind}-restore"), &["--wait"], empty)?;
            }
        }
    }
    undo(pod)
}

/// Takes back what [`pod`] has added to rules and routes. The tables go with the namespace.
pub fn undo(pod: &Pod) -> Result<()> {
    let netns = &pod.place.netns;
    for (family, all) in FAMILIES {
        netns.ip(&[family, "rule", "del", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"])?;
        netns.ip(&[family, "route", "del", "local", all, "dev", "lo", "table", "100"])?;
    }
    Ok(())
}

/// Lets the node's own connections to these pods pass as probes.
pub fn probes(node: &Node, pods: &[&Pod], backend: Backend) -> Result<()> {
    let netns = &node.place.netns;
    let kind = if backend == Backend::IptablesLegacy { "legacy" } else { "nft" };
    for (index, (program, family)) in [("iptables", "inet"), ("ip6tables", "inet6")].into_iter().enumerate() {
        let set = format!("istio-inpod-probes-v{}", [4, 6][index]);
        let mut sets = format!("create {set} hash:ip family {family} comment\n");
        for pod in pods {
            sets += &format!("add {set} {} comment \"{}\"\n", pod.addresses()[index], crate::agent::uid(pod));
        }
        inside(netns, "ipset", &["restore"], &sets)?;
        let rules = format!(
            "*nat
:ISTIO_POSTRT - [0:0]
-I POSTROUTING 1 -j ISTIO_POSTRT
-A ISTIO_POSTRT -m owner --socket-exists -p tcp -m set --match-set {set} dst -j SNAT --to-source {}
COMMIT
",
            PROBES[index]
        );
        inside(netns, &format!("{program}-{kind}-restore"), &["--noflush", "--wait"], &rules)?;
    }
    Ok(())
}

fn inside(netns: &Netns, program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns.name(), program]).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = crate::process::spawn(command).with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}: {said}\n{input}", output.status);
    Ok(())
}
