//! What a container image of the daemon holds.

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
