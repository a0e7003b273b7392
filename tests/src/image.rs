//! What a container image of the daemon holds, and a process in such a container as Istio's chart asks for it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Where a program is in an image.
pub const PROGRAMS: &str = "usr/local/bin";
/// Whom a client trusts that is told `SYSTEM`.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";
/// What a container runtime or the chart mounts.
const MOUNTED: [&str; 7] =
    ["dev", "proc", "sys", "tmp", "var/run/ztunnel", "var/run/secrets/istio", "var/run/secrets/tokens"];

/// Fills `root` with `programs`, the shared objects each is linked to, and what the C library and TLS look for.
/// Nothing else: no shell, no package manager.
pub fn assemble(root: &Path, programs: &[&Path]) -> Result<()> {
    for folder in MOUNTED {
        std::fs::create_dir_all(root.join(folder))?;
    }
    for program in programs {
        let name = program.file_name().with_context(|| format!("{} is no program", program.display()))?;
        copy(program, &root.join(PROGRAMS).join(name))?;
        for object in objects(program)? {
            copy(&object, &root.join(object.strip_prefix("/")?))?;
        }
    }
    let etc = root.join("etc");
    std::fs::create_dir_all(&etc)?;
    std::fs::write(etc.join("passwd"), "root:x:0:0:root:/:/sbin/nologin\n")?;
    std::fs::write(etc.join("nsswitch.conf"), "hosts: files dns\n")?;
    let authorities = Path::new("/").join(AUTHORITIES);
    if authorities.exists() {
        copy(&authorities, &root.join(AUTHORITIES))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to.parent().context("the root is no file")?)?;
    std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// The shared objects that `program` is linked to, the loader among them.
fn objects(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "ldd {}: {said}", program.display());
    let mut found = Vec::new();
    for line in said.lines() {
        // "libc.so.6 => /lib/…/libc.so.6 (0x…)", or the path alone: the loader.
        let mut words = line.split_whitespace();
        if let Some(path) = words.find(|word| word.starts_with('/')) {
            found.push(PathBuf::from(path));
        } else if line.contains("not found") {
            bail!("{} needs {}", program.display(), line.trim());
        }
    }
    Ok(found)
}

/// What has to be typed so that the program at the end of the words runs in an image: its root at `root`, which is
/// read-only, with only a new `/tmp` to write to and `shared` at the paths they have outside; user 0, group 1337 and
/// three capabilities. It keeps its process, network namespace and control group.
pub fn contained(root: &Path, secrets: &Path, shared: &[&Path]) -> Vec<String> {
    let mut script = String::from("set -e; root=$1; secrets=$2; shift 2; mount --bind \"$root\" \"$root\"\n");
    let mut words: Vec<String> = Vec::new();
    for path in shared {
        let path = path.display();
        script += &format!("mkdir -p \"$root{path}\"; mount --bind {path} \"$root{path}\"\n");
    }
    script += "mount --rbind /proc \"$root/proc\"; mount --rbind /dev \"$root/dev\"; mount -t tmpfs tmp \"$root/tmp\"\n\
        mount --bind \"$secrets\" \"$root/var/run/secrets\"; mount -o remount,bind,ro \"$root\"\n\
        exec chroot \"$root\" \"$@\"";
    let text = |value: &OsStr| value.to_string_lossy().into_owned();
    words.extend(["unshare", "--mount", "sh", "-c"].map(str::to_owned));
    words.extend([script, "contained".to_owned(), text(root.as_os_str()), text(secrets.as_os_str())]);
    let capabilities = "-all,+net_admin,+sys_admin,+net_raw";
    words.extend([
        format!("/{PROGRAMS}/setpriv"),
        format!("--bounding-set={capabilities}"),
        "--regid=1337".to_owned(),
        "--clear-groups".to_owned(),
        "--pdeathsig=KILL".to_owned(),
    ]);
    words
}
