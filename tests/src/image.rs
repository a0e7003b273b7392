//! A process in a container of the daemon's image, as Istio's chart asks for it.

use std::ffi::OsStr;
use std::path::Path;

pub use xtask::contents::{PROGRAMS, assemble};

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
