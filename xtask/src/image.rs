//! Makes a container image of the daemon, without a container engine.
//!
//! One layer with the daemon, the shared objects it is linked to and the authorities of this machine, in an archive that
//! is an OCI image layout and `docker load`'s format at once. The same sources and machine make the same bytes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use xtask::contents::{PROGRAMS, assemble};
use xtask::places::target;

use crate::run::{Profile, build, is_root};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// `cargo xtask image`
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What the image is called when it is loaded
    #[arg(long, default_value = concat!("ztunnel:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// Where the archive goes [default: target/ztunnel-image.tar]
    #[arg(long)]
    output: Option<PathBuf>,
    /// A daemon that is built already, instead of building it
    #[arg(long)]
    daemon: Option<PathBuf>,
}

/// The command.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let daemon = match &arguments.daemon {
        Some(path) => path.clone(),
        None => build(Profile::Release)?,
    };
    let output = arguments.output.clone().unwrap_or_else(|| target().join("ztunnel-image.tar"));
    let folder = target().join("image");
    remove(&folder)?;
    assemble(&folder, &[&daemon])?;
    if is_root() {
        let said = try_out(&folder)?;
        println!("in the image: {said}");
    } else {
        println!("not tried out: that takes root");
    }
    let layer = layer(&folder)?;
    let tag = tagged(&arguments.tag);
    write(&output, &tag, &layer)?;
    remove(&folder)?;
    println!("{} is {tag} ({:.1} MiB)", output.display(), layer.len() as f64 / (1 << 20) as f64);
    println!(
        "docker load -i, podman load -i, ctr images import, kind load image-archive or skopeo copy oci-archive: take it"
    );
    Ok(ExitCode::SUCCESS)
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The daemon starts there, with nothing of this machine around it.
fn try_out(root: &Path) -> Result<String> {
    let daemon = Path::new("/").join(PROGRAMS).join("ztunnel");
    let mut command = Command::new("chroot");
    command.arg(root).arg(daemon).arg("version").env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = command.output().context("cannot run chroot")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

/// The files as an archive: sorted, of user 0 and of no time.
fn layer(root: &Path) -> Result<Vec<u8>> {
    let mut paths = Vec::new();
    list(root, &mut paths)?;
    paths.sort();
    let mut archive = Builder::new(Vec::new());
    for path in paths {
        let name = path.strip_prefix(root)?;
        let metadata = path.metadata()?;
        let folder = metadata.is_dir();
        let mode = match (folder, metadata.permissions().mode() & 0o100 != 0) {
            // Where everybody writes.
            (true, _) if name == Path::new("tmp") => 0o1777,
            (true, _) | (false, true) => 0o755,
            (false, false) => 0o644,
        };
        let bytes = if folder { Vec::new() } else { std::fs::read(&path)? };
        append(
            &mut archive,
            name,
            mode,
            if folder { EntryType::Directory } else { EntryType::Regular },
            &bytes,
        )?;
    }
    Ok(archive.into_inner()?)
}

fn list(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

fn append<W: Write>(
    archive: &mut Builder<W>,
    name: &Path,
    mode: u32,
    kind: EntryType,
    bytes: &[u8],
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_data(&mut header, name, bytes)?;
    Ok(())
}

/// Bytes of an image, which are named by their digest.
struct Blob<'a> {
    kind: &'static str,
    digest: String,
    bytes: &'a [u8],
}

impl<'a> Blob<'a> {
    fn new(kind: &'static str, bytes: &'a [u8]) -> Result<Self> {
        Ok(Self { kind, digest: sha256(bytes)?, bytes })
    }

    /// How others refer to it.
    fn descriptor(&self) -> Value {
        json!({"mediaType": self.kind, "digest": format!("sha256:{}", self.digest), "size": self.bytes.len()})
    }

    fn place(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }
}

/// By coreutils' program: whatever `xtask` depends on is compiled before it says a word.
fn sha256(bytes: &[u8]) -> Result<String> {
    let mut program = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run sha256sum")?;
    // It says nothing before its input has ended.
    program.stdin.take().context("sha256sum has no input")?.write_all(bytes)?;
    let output = program.wait_with_output()?;
    let said = String::from_utf8(output.stdout)?;
    let digest = said.split_whitespace().next().unwrap_or_default();
    ensure!(output.status.success() && digest.len() == 64, "sha256sum: {}, {said:?}", output.status);
    Ok(digest.to_owned())
}

fn write(output: &Path, tag: &str, layer: &[u8]) -> Result<()> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let layer = Blob::new(LAYER, layer)?;
    let config = serde_json::to_vec(&json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": [format!("/{PROGRAMS}/ztunnel")],
            "Cmd": ["proxy"],
            "WorkingDir": "/",
            "User": "0",
            "Env": [format!("PATH=/{PROGRAMS}")],
            "Labels": {
                "org.opencontainers.image.title": "ztunnel",
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                "org.opencontainers.image.licenses": "Apache-2.0",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)]},
    }))?;
    let config = Blob::new(CONFIG, &config)?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }))?;
    let manifest = Blob::new(MANIFEST, &manifest)?;
    let mut described = manifest.descriptor();
    described["annotations"] = json!({
        "org.opencontainers.image.ref.name": tag.rsplit_once(':').map_or("latest", |(_, version)| version),
        "io.containerd.image.name": full_name(tag),
    });
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [described],
    }))?;
    // What docker reads; the layout above is for everything else.
    let legacy = serde_json::to_vec(&json!([{
        "Config": config.place(),
        "RepoTags": [tag],
        "Layers": [layer.place()],
    }]))?;
    let file = File::create(output).with_context(|| format!("cannot write {}", output.display()))?;
    let mut archive = Builder::new(BufWriter::new(file));
    for folder in ["blobs", "blobs/sha256"] {
        append(&mut archive, Path::new(folder), 0o755, EntryType::Directory, &[])?;
    }
    for (name, bytes) in [
        (config.place(), config.bytes),
        (layer.place(), layer.bytes),
        (manifest.place(), manifest.bytes),
        ("index.json".to_owned(), &*index),
        ("manifest.json".to_owned(), &*legacy),
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#),
    ] {
        append(&mut archive, Path::new(&name), 0o644, EntryType::Regular, bytes)?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

/// The name with its version: `latest` if none is named.
fn tagged(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains(':') { name.to_owned() } else { format!("{name}:latest") }
}

/// The tag with the registry that is meant when none is named.
fn full_name(tag: &str) -> String {
    match tag.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => tag.to_owned(),
        Some(_) => format!("docker.io/{tag}"),
        None => format!("docker.io/library/{tag}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_what_its_manifests_name() {
        let folder = tempfile::tempdir().expect("a directory");
        let root = folder.path().join("root");
        assemble(&root, &[Path::new("/bin/true")]).expect("assembled");
        let bytes = layer(&root).expect("a layer");
        assert_eq!(bytes, layer(&root).expect("a layer"), "two of the same differ");
        let output = folder.path().join("image.tar");
        write(&output, "registry.test/ztunnel:1", &bytes).expect("written");
        let mut files = std::collections::HashMap::new();
        let mut archive = tar::Archive::new(File::open(&output).expect("an archive"));
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").display().to_string();
            let mut content = Vec::new();
            std::io::copy(&mut entry, &mut content).expect("content");
            files.insert(name, content);
        }
        let json = |bytes: &[u8]| -> Value { serde_json::from_slice(bytes).expect("JSON") };
        let named = |descriptor: &Value| -> &Vec<u8> {
            let digest = descriptor["digest"].as_str().and_then(|text| text.strip_prefix("sha256:"));
            let content = &files[&format!("blobs/sha256/{}", digest.expect("a digest"))];
            assert_eq!(sha256(content).expect("sha256sum"), digest.expect("a digest"));
            assert_eq!(Some(content.len() as u64), descriptor["size"].as_u64());
            content
        };
        let index = json(&files["index.json"]);
        let manifest = json(named(&index["manifests"][0]));
        let config = json(named(&manifest["config"]));
        assert_eq!(named(&manifest["layers"][0]), &bytes);
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let legacy = json(&files["manifest.json"]);
        assert_eq!(legacy[0]["RepoTags"][0], "registry.test/ztunnel:1");
        for path in [&legacy[0]["Config"], &legacy[0]["Layers"][0]] {
            assert!(files.contains_key(path.as_str().expect("a path")));
        }
    }

    #[test]
    fn digests_are_those_of_the_standard() {
        let digest = sha256(b"abc").expect("sha256sum");
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_name_without_a_version_is_the_latest() {
        assert_eq!(tagged("host:5000/ztunnel"), "host:5000/ztunnel:latest");
        assert_eq!(tagged("host:5000/ztunnel:1"), "host:5000/ztunnel:1");
    }

    #[test]
    fn a_tag_gets_the_registry_that_is_meant() {
        for (tag, full) in [
            ("ztunnel:1", "docker.io/library/ztunnel:1"),
            ("me/ztunnel:1", "docker.io/me/ztunnel:1"),
            ("registry.test/ztunnel:1", "registry.test/ztunnel:1"),
            ("localhost/ztunnel:1", "localhost/ztunnel:1"),
            ("host:5000/ztunnel:1", "host:5000/ztunnel:1"),
        ] {
            assert_eq!(full_name(tag), full);
        }
    }
}
