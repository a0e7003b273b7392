//! The subcommands that do one thing and end.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::api::Setting;
use crate::app::CONTROL_SOCKET;
use crate::app::version;
use crate::capture;
use crate::config::env::Settings;
use crate::config::raw::Output;
use crate::config::resolved::Places;
use crate::identity::kept;
use crate::standalone::diagnostic::Diagnostic;
use crate::standalone::file;

/// Why an uninstallation does not happen.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// It would put everything back.
    #[error("a daemon serves this node (it answers at {0}); stop it first")]
    Running(String),
    /// Something could not be removed.
    #[error("not everything is removed")]
    Capture(#[from] capture::uninstall::UninstallError),
    /// The keys are still there.
    #[error("the kept certificates at {0} are not removed")]
    Certificates(String, #[source] std::io::Error),
    /// Standard output is closed.
    #[error("cannot print")]
    Print(#[from] std::io::Error),
}

/// Prints what is wrong with a mesh file and what `node` would do with it. The exit status: 1 for errors.
pub fn check(mesh: &Path, node: &str) -> std::io::Result<u8> {
    let mut out = std::io::stdout().lock();
    match file::load(mesh, node) {
        Ok(loaded) => {
            print(&mut out, &loaded.warnings)?;
            writeln!(
                out,
                "{}: {} workloads, {} services, {} policies; node {node} captures {} pods",
                mesh.display(),
                loaded.mesh.workloads().len(),
                loaded.mesh.services_len(),
                loaded.mesh.policies().len(),
                loaded.pods.len(),
            )?;
            for pod in &loaded.pods {
                writeln!(out, "  {}/{} in {}", pod.namespace, pod.name, pod.netns.display())?;
            }
            Ok(0)
        }
        Err(diagnostics) => {
            print(&mut out, &diagnostics)?;
            Ok(1)
        }
    }
}

fn print(out: &mut impl Write, diagnostics: &[Diagnostic]) -> std::io::Result<()> {
    diagnostics.iter().try_for_each(|diagnostic| writeln!(out, "{diagnostic}"))
}

/// Prints what Istio's environment says; what of it has no effect, on standard error.
pub fn config(settings: &Settings, output: Output) -> std::io::Result<()> {
    for warning in &settings.warnings {
        writeln!(std::io::stderr(), "{warning}")?;
    }
    let shown: Vec<Setting> = settings.shown.iter().map(Setting::from).collect();
    let mut out = std::io::stdout().lock();
    match output {
        Output::Text => write!(out, "{}", table(&shown)),
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &shown)?;
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

/// Removes everything from the kernel, and the kept certificates, and says what that was.
pub fn uninstall(places: &Places, cert_cache: Option<&Path>) -> Result<(), UninstallError> {
    let socket = places.run_dir.join(CONTROL_SOCKET);
    if UnixStream::connect(&socket).is_ok() {
        return Err(UninstallError::Running(socket.display().to_string()));
    }
    if let Some(path) = cert_cache {
        kept::remove(path)
            .map_err(|error| UninstallError::Certificates(path.display().to_string(), error))?;
    }
    let removed = capture::uninstall::uninstall(&places.capture)?;
    writeln!(std::io::stdout(), "{removed}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
