//! An enclosure with something of each kind in it, for who wants to see what is left of it.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::cgroup::{self, Cgroup};
use crate::enclosure;
use crate::netns::{self, Netns};
use crate::process::sh;

/// What the program does: enters, makes a namespace, a device and a group of this name and a process in that, says
/// `inside <own process id> <that of the other>, namespaces: <names>, groups: <names>`, and waits until standard input
/// ends.
pub fn enclosed(name: &str) -> Result<()> {
    enclosure::enter()?;
    Netns::create(name)?;
    sh("ip", &["link", "add", name, "type", "veth"])?;
    let group = Cgroup::create(name)?;
    // Does not die with us.
    let mut sleep = Command::new("sleep");
    let sleep =
        sleep.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    std::fs::write(group.procs(), sleep.id().to_string())?;
    let namespaces: Vec<String> = netns::named("").iter().map(|netns| netns.name().to_owned()).collect();
    let groups: Vec<String> = std::fs::read_dir(cgroup::root()?)?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    println!(
        "inside {} {}, namespaces: {}, groups: {}",
        std::process::id(),
        sleep.id(),
        namespaces.join(" "),
        groups.join(" ")
    );
    let _closed = std::io::stdin().read_to_end(&mut Vec::new());
    Ok(())
}
