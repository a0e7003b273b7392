//! The subcommands that do one thing and end.

use std::io::ErrorKind;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;

use ztunnel_mesh::dump::Setting;
use ztunnel_node::capture;
use ztunnel_node::identity::kept;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::file::Place;
use ztunnel_objects::translate::NamedNetns;

use crate::app::meeting::CONTROL_SOCKET;
use crate::app::privileges;
use crate::app::privileges::Missing;
use crate::app::version;
use crate::config::raw::Output;
use crate::config::resolved::Places;

/// Where a daemon keeps the last mesh of its control plane, in the run directory.
const MESH_CACHE: &str = "mesh.cache";

/// Why an uninstallation does not happen.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// It would put everything back.
    #[error("a daemon serves this node (it answers at {0}); stop it first")]
    Running(String),
    /// It would find nothing, or could remove nothing.
    #[error(transparent)]
    Privileges(#[from] Missing),
    /// The pins cannot be looked at.
    #[error("cannot look at {0:?}: run as root (sudo)")]
    Look(PathBuf, #[source] std::io::Error),
    /// There are pins, but of another node.
    #[error("nothing is captured as node {node}, but as {}: name that with --node", others.join(", "))]
    OtherNode {
        /// The node that was named, or is called so.
        node: String,
        /// Those that there are.
        others: Vec<String>,
    },
    /// Something could not be removed.
    #[error("not everything is removed: what is left is as it was, so try again")]
    Capture(#[from] capture::uninstall::UninstallError),
    /// The keys are still there.
    #[error("the kept certificates at {0} are not removed")]
    Certificates(String, #[source] std::io::Error),
    /// Standard output is closed.
    #[error("cannot print")]
    Print(#[from] std::io::Error),
}

/// Prints what is wrong with a mesh file and what its node would do with it. `here`: this machine is that node, so that
/// the pods' network namespaces should be here. The exit status: 1 for errors.
pub fn check(place: &Place, here: bool) -> std::io::Result<u8> {
    let mut out = std::io::stdout().lock();
    let loaded = match place.load() {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            print(&mut out, &diagnostics)?;
            let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
            writeln!(out, "{}: {}", place.path.display(), counted(errors, "error"))?;
            return Ok(1);
        }
    };
    let found: Vec<Diagnostic> =
        if here { loaded.netns.iter().flat_map(wrong_here).collect() } else { Vec::new() };
    print(&mut out, &loaded.warnings)?;
    print(&mut out, &found)?;
    writeln!(
        out,
        "{}: {}, {}, {}; node {} captures {}",
        place.path.display(),
        counted(loaded.mesh.workloads().len(), "workload"),
        counted(loaded.mesh.services_len(), "service"),
        match loaded.mesh.policies().len() {
            1 => "1 policy".to_owned(),
            count => format!("{count} policies"),
        },
        place.node,
        counted(loaded.pods.len(), "pod"),
    )?;
    for pod in &loaded.pods {
        writeln!(out, "  {}/{} in {}", pod.namespace, pod.name, pod.netns.display())?;
    }
    Ok(u8::from(place.strict && !found.is_empty()))
}

/// What is wrong with a network namespace of this machine, as far as this process may look into it.
fn wrong_here(named: &NamedNetns) -> Vec<Diagnostic> {
    if is_absent(&named.netns) {
        return vec![named.absent()];
    }
    let unanswered = capture::host::unanswered_in(&named.netns, &named.addresses).unwrap_or_default();
    unanswered.into_iter().map(|probe| named.unanswered(probe)).collect()
}

/// That it cannot be looked at does not mean that it is not there.
fn is_absent(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn print(out: &mut impl Write, diagnostics: &[Diagnostic]) -> std::io::Result<()> {
    diagnostics.iter().try_for_each(|diagnostic| writeln!(out, "{diagnostic}"))
}

/// Prints what a daemon would use; what of it has no effect, on standard error.
pub fn config(settings: &[Setting], warnings: &[String], output: Output) -> std::io::Result<()> {
    for warning in warnings {
        writeln!(std::io::stderr(), "{warning}")?;
    }
    let mut out = std::io::stdout().lock();
    match output {
        Output::Text => write!(out, "{}", table(settings)),
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, settings)?;
            writeln!(out)
        }
    }
}

fn table(settings: &[Setting]) -> String {
    let width = |text: fn(&Setting) -> &str| {
        settings.iter().map(|setting| text(setting).chars().count()).max().unwrap_or_default()
    };
    let (names, origins) = (width(|setting| &setting.name), width(|setting| &setting.origin));
    let mut table = String::new();
    for Setting { name, value, origin } in settings {
        // Values may be long: they come last.
        let row = format!("{name:names$}  {origin:origins$}  {value}");
        table.extend([row.trim_end(), "\n"]);
    }
    table
}

/// Prints which build this is.
pub fn version() -> std::io::Result<()> {
    let known = version::version("unknown");
    let mut out = std::io::stdout().lock();
    writeln!(out, "ztunnel {}", known.version)?;
    writeln!(out, "revision {} ({})", known.git_revision, known.build_status)?;
    writeln!(out, "{} build, {}, {}", known.build_profile, known.rust_version, known.crypto_provider)
}

/// Prints whether capture works here. The exit status: 1 if it does not.
pub fn selftest(config: &capture::Config) -> std::io::Result<u8> {
    let verdict = capture::selftest::self_test(config);
    writeln!(std::io::stdout(), "{verdict}")?;
    Ok(u8::from(!verdict.works))
}

/// Removes everything from the kernel, and the kept certificates and meshes, and says what that was. `named`: --pin-dir was
/// given.
pub fn uninstall(places: &Places, named: bool, cert_cache: Option<&Path>) -> Result<(), UninstallError> {
    privileges::check()?;
    let socket = places.run_dir.join(CONTROL_SOCKET);
    if UnixStream::connect(&socket).is_ok() {
        return Err(UninstallError::Running(socket.display().to_string()));
    }
    let pins = &places.capture.pin_dir;
    let removed = match std::fs::metadata(pins) {
        Ok(_) => capture::uninstall::uninstall(&places.capture)?.to_string(),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(UninstallError::Look(pins.clone(), error));
        }
        Err(_) if named => format!("nothing is pinned at {}", pins.display()),
        Err(_) => {
            let others = others(pins);
            if !others.is_empty() {
                return Err(UninstallError::OtherNode { node: places.node.to_string(), others });
            }
            format!("nothing is captured here as node {}", places.node)
        }
    };
    if let Some(path) = cert_cache {
        kept::remove(path)
            .map_err(|error| UninstallError::Certificates(path.display().to_string(), error))?;
    }
    forget_meshes(&places.run_dir);
    writeln!(std::io::stdout(), "{removed}")?;
    Ok(())
}

/// Removes the last mesh that daemons kept here, and above, where one under a node agent keeps it, unless one serves.
fn forget_meshes(run_dir: &Path) {
    for dir in [Some(run_dir), run_dir.parent()].into_iter().flatten() {
        if UnixStream::connect(dir.join(CONTROL_SOCKET)).is_err() {
            let _absent = std::fs::remove_file(dir.join(MESH_CACHE));
        }
    }
}

/// Other nodes' pins beside these: this machine was a node by these names.
fn others(pins: &Path) -> Vec<String> {
    let beside = pins.parent().and_then(|parent| std::fs::read_dir(parent).ok());
    let names = beside.into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mesh_is_forgotten_where_no_daemon_is() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("n1");
        std::fs::create_dir(&run_dir).unwrap();
        let caches = [dir.path().join(MESH_CACHE), run_dir.join(MESH_CACHE)];
        for cache in &caches {
            std::fs::write(cache, "").unwrap();
        }
        let serving = std::os::unix::net::UnixListener::bind(dir.path().join(CONTROL_SOCKET)).unwrap();
        forget_meshes(&run_dir);
        assert!(caches[0].exists() && !caches[1].exists());
        drop(serving);
        forget_meshes(&run_dir);
        assert!(!caches[0].exists());
    }

    #[test]
    fn another_nodes_pins_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(others(&dir.path().join("n1")), Vec::<String>::new());
        std::fs::create_dir(dir.path().join("n2")).unwrap();
        assert_eq!(others(&dir.path().join("n1")), ["n2"]);
        let error = UninstallError::OtherNode { node: "n1".to_owned(), others: vec!["n2".to_owned()] };
        assert_eq!(error.to_string(), "nothing is captured as node n1, but as n2: name that with --node");
    }

    #[test]
    fn one_is_not_many() {
        assert_eq!([0, 1, 2].map(|count| counted(count, "pod")), ["0 pods", "1 pod", "2 pods"]);
    }

    #[test]
    fn settings_are_a_table() {
        let setting = |name: &str, value: &str, origin: &str| Setting {
            name: name.to_owned(),
            value: value.to_owned(),
            origin: origin.to_owned(),
        };
        let settings = [setting("CLUSTER_ID", "c1", "environment"), setting("NETWORK", "", "default")];
        assert_eq!(table(&settings), "CLUSTER_ID  environment  c1\nNETWORK     default\n");
    }
}
