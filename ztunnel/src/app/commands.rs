//! The subcommands that do one thing and end.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::app::CONTROL_SOCKET;
use crate::capture;
use crate::config::resolved::Places;
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

/// Prints whether capture works here. The exit status: 1 if it does not.
pub fn selftest(config: &capture::Config) -> std::io::Result<u8> {
    let verdict = capture::selftest::self_test(config);
    writeln!(std::io::stdout(), "{verdict}")?;
    Ok(u8::from(!verdict.works))
}

/// Removes everything from the kernel and says what that was.
pub fn uninstall(places: &Places) -> Result<(), UninstallError> {
    let socket = places.run_dir.join(CONTROL_SOCKET);
    if UnixStream::connect(&socket).is_ok() {
        return Err(UninstallError::Running(socket.display().to_string()));
    }
    let removed = capture::uninstall::uninstall(&places.capture)?;
    writeln!(std::io::stdout(), "{removed}")?;
    Ok(())
}
