//! How much memory there is for what connections and tunnels hold.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use crate::config::env::reader::Origin;
use crate::config::env::reader::Reader;

const NAME: &str = "ZTUNNEL_BUFFER_MEMORY";

/// The other half is for the program, the mesh, and what an allocator needs besides what it was asked for.
const LIMIT_PART: u64 = 2;

/// Where nothing is said about this process, as a part of the machine's memory, and at most.
const MACHINE_PART: u64 = 4;
const MACHINE_MAX: u64 = 1 << 30;

/// With less there is no serving anybody.
const MIN: u64 = 16 << 20;

/// How a size is said.
const ACCEPTED: &str = "use a number of bytes of at least 16Mi, such as 256Mi or 268435456";

/// What is used unless it is said: half of the memory limit of the control group the process is in, or without one a
/// quarter of the machine's memory, a gibibyte at most.
pub(in crate::config) fn default() -> usize {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let own = |name| fs::read_to_string(Path::new("/proc/self").join(name)).unwrap_or_default();
    let limit = limit(&own("cgroup"), &own("mountinfo"), read);
    let machine =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text)).unwrap_or(MACHINE_MAX);
    share(limit, machine)
}

/// A number of bytes, with or without a unit as in Kubernetes.
fn parse(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes >= MIN)?;
    usize::try_from(bytes).ok()
}

/// As a flag.
pub(in crate::config) fn flag(text: &str) -> Result<usize, String> {
    parse(text).ok_or_else(|| ACCEPTED.to_owned())
}

/// As Istio's environment says it, or doesn't.
pub(super) fn read(reader: &mut Reader<'_>) -> usize {
    let (bytes, origin) = match reader.set(NAME) {
        Some(text) => match parse(text) {
            Some(bytes) => (bytes, Origin::Environment),
            None => {
                reader.refuse(NAME, text, ACCEPTED);
                (default(), Origin::Environment)
            }
        },
        None => (default(), Origin::Machine),
    };
    reader.show(NAME, bytes, origin);
    bytes
}

fn share(limit: Option<u64>, machine: u64) -> usize {
    let bytes = match limit {
        Some(limit) => limit.min(machine) / LIMIT_PART,
        None => (machine / MACHINE_PART).min(MACHINE_MAX),
    };
    usize::try_from(bytes.max(MIN)).unwrap_or(usize::MAX)
}

fn total(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(kilobytes.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
}

/// The least of the limits that hold for the control groups of /proc/self/cgroup, where /proc/self/mountinfo says
/// they are.
fn limit(cgroup: &str, mountinfo: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut least = None;
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (kind, file) = match controllers {
            "" => ("cgroup2", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => ("cgroup", "memory.limit_in_bytes"),
            _ => continue,
        };
        let Some((root, mount)) = mount(mountinfo, kind) else { continue };
        let within = Path::new(path).strip_prefix(&root).unwrap_or_else(|_| Path::new(""));
        let within = within.strip_prefix("/").unwrap_or(within);
        for group in mount.join(within).ancestors().take_while(|group| group.starts_with(&mount)) {
            let said = read(&group.join(file)).and_then(|text| text.trim().parse::<u64>().ok());
            // "max", or in the older hierarchy about as much as a number holds.
            let limit = said.filter(|bytes| *bytes < 1 << 60);
            least = least.into_iter().chain(limit).min();
        }
    }
    least
}

/// What of a hierarchy is mounted, and where. Of the older ones that of the memory.
fn mount(mountinfo: &str, kind: &str) -> Option<(PathBuf, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        let (place, what) = line.split_once(" - ")?;
        let mut what = what.split(' ');
        let (fstype, options) = (what.next()?, what.nth(1).unwrap_or_default());
        if fstype != kind || (kind == "cgroup" && !options.split(',').any(|option| option == "memory")) {
            return None;
        }
        let mut place = place.split(' ').skip(3);
        Some((PathBuf::from(place.next()?), PathBuf::from(place.next()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_with_its_unit() {
        for (text, bytes) in [
            ("268435456", Some(268_435_456)),
            ("256Mi", Some(268_435_456)),
            (" 2Gi ", Some(2 << 30)),
            ("100M", Some(100_000_000)),
            ("15Mi", None),
            ("256MB", None),
            ("Mi", None),
            ("-5", None),
            ("99999999999999Gi", None),
        ] {
            assert_eq!(parse(text), bytes, "{text}");
        }
    }

    #[test]
    fn half_of_the_limit_or_a_quarter_of_the_machine() {
        assert_eq!(share(Some(256 << 20), 8 << 30), 128 << 20);
        assert_eq!(share(None, 2 << 30), 512 << 20);
        assert_eq!(share(None, 64 << 30), 1 << 30);
        assert_eq!(share(Some(8 << 30), 2 << 30), 1 << 30, "a limit that is none");
        assert_eq!(share(Some(1 << 20), 8 << 30), 16 << 20);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       1024 kB\n"), Some(1 << 20));
    }

    #[test]
    fn the_least_limit_of_all_groups_holds() {
        let check = |cgroup: &str, mountinfo: &str, files: &[(&str, &str)], expect| {
            let read = |path: &Path| {
                files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned())
            };
            assert_eq!(limit(cgroup, mountinfo, read), expect, "{cgroup}");
        };
        let two = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        let pod = [
            ("/sys/fs/cgroup/kube/pod/c/memory.max", "max\n"),
            ("/sys/fs/cgroup/kube/pod/memory.max", "268435456\n"),
            ("/sys/fs/cgroup/kube/memory.max", "536870912\n"),
        ];
        check("0::/kube/pod/c", two, &pod, Some(256 << 20));
        check("0::/", two, &[("/sys/fs/cgroup/memory.max", "1048576")], Some(1 << 20));
        check("0::/elsewhere", two, &[], None);
        let one = "31 23 0:27 /docker/1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
                   32 23 0:28 /docker/1 /sys/fs/cgroup/pids ro - cgroup cgroup rw,pids";
        let files = [
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1048576"),
        ];
        check("4:memory:/docker/1/x\n3:pids:/docker/1\n", one, &files, Some(1 << 20));
        check("4:memory:/docker/1\n", one, &files, None);
        check("garbage", "garbage", &[], None);
    }
}
