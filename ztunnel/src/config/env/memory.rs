//! How much memory there is for what connections and tunnels hold.

use std::fs;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use crate::config::env::reader::Reader;
use crate::config::origin::Origin;

const NAME: &str = "ZTUNNEL_BUFFER_MEMORY";

/// The other half is for the program, the mesh, and what an allocator needs besides what it was asked for.
const LIMIT_PART: u64 = 2;

/// Where nothing is said about this process, as a part of the machine's memory, and at most.
const MACHINE_PART: u64 = 4;
const MACHINE_MAX: u64 = 1 << 30;

/// With less there is no serving anybody.
const MIN: u64 = 16 << 20;

/// Among more control groups than this a process does not look for its own.
const GROUPS_MAX: usize = 20_000;

/// How a size is said.
const ACCEPTED: &str = "use a number of bytes of at least 16Mi, such as 256Mi or 268435456";

/// What is used unless it is said: half of the memory limit of the control group the process is in, or without one a
/// quarter of the machine's memory, a gibibyte at most.
pub(in crate::config) fn default() -> usize {
    let own = |name| fs::read_to_string(Path::new("/proc/self").join(name)).unwrap_or_default();
    let limit = limit(&own("cgroup"), &own("mountinfo"), std::process::id());
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
/// they are, of the process that sees itself as `pid`.
fn limit(cgroup: &str, mountinfo: &str, pid: u32) -> Option<u64> {
    let mut least = None;
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (kind, file) = match controllers {
            "" => ("cgroup2", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => ("cgroup", "memory.limit_in_bytes"),
            _ => continue,
        };
        for (root, mount) in mounts(mountinfo, kind) {
            let Some(group) = group(Path::new(path), &root, &mount, pid) else { continue };
            for group in group.ancestors().take_while(|group| group.starts_with(&mount)) {
                let said = fs::read_to_string(group.join(file)).ok();
                let said = said.and_then(|text| text.trim().parse::<u64>().ok());
                // "max", or in the older hierarchy about as much as a number holds.
                let limit = said.filter(|bytes| *bytes < 1 << 60);
                least = least.into_iter().chain(limit).min();
            }
        }
    }
    least
}

/// What of a hierarchy is mounted, and where. Of the older ones that of the memory.
fn mounts(mountinfo: &str, kind: &str) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    mountinfo.lines().filter_map(move |line| {
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

/// The directory of the group `path` at `mount`, where the hierarchy is seen from `root` on. Both paths are told as from
/// the root of the process's cgroup namespace. A container that has one and sees the host's groups all the same has its
/// root somewhere below the mount, and is told how deep, and not where: there it looks for itself.
fn group(path: &Path, root: &Path, mount: &Path, pid: u32) -> Option<PathBuf> {
    if root.starts_with("/..") {
        let depth = root.components().filter(|step| *step == Component::ParentDir).count();
        // What is beside its own groups is nothing to it.
        let above = root.components().count() == depth + 1;
        let own = path.strip_prefix("/").unwrap_or(path);
        return above.then(|| find(mount, depth, own, pid)).flatten();
    }
    let within = path.strip_prefix(root).unwrap_or_else(|_| Path::new(""));
    Some(mount.join(within))
}

/// The group `own` below a directory that is `depth` below `mount`, with this process in it. Of processes of other
/// namespaces the kernel tells no number.
fn find(mount: &Path, depth: usize, own: &Path, pid: u32) -> Option<PathBuf> {
    let (mut level, mut seen) = (vec![mount.to_owned()], 0);
    for _ in 0..depth {
        let mut below = Vec::new();
        for entry in level.iter().filter_map(|group| fs::read_dir(group).ok()).flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                seen += 1;
                below.push(entry.path());
            }
            if seen > GROUPS_MAX {
                return None;
            }
        }
        level = below;
    }
    let holds = |group: &PathBuf| {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        processes.lines().any(|line| line.parse() == Ok(pid))
    };
    level.into_iter().map(|group| group.join(own)).find(holds)
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

    /// A hierarchy in which these files are.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = dir.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        dir
    }

    /// As process 7; `@` is where the hierarchy is.
    fn check(cgroup: &str, mountinfo: &str, files: &[(&str, &str)], expected: Option<u64>) {
        let dir = tree(files);
        let mountinfo = mountinfo.replace('@', &dir.path().display().to_string());
        assert_eq!(limit(cgroup, &mountinfo, 7), expected, "{cgroup:?} of {mountinfo}");
    }

    #[test]
    fn the_least_limit_of_all_groups_holds() {
        let two = "30 23 0:26 / @ rw - cgroup2 cgroup2 rw";
        let pod = [
            ("kube/pod/c/memory.max", "max\n"),
            ("kube/pod/memory.max", "268435456\n"),
            ("kube/memory.max", "536870912\n"),
        ];
        check("0::/kube/pod/c", two, &pod, Some(256 << 20));
        check("0::/", two, &[("memory.max", "1048576")], Some(1 << 20));
        check("0::/elsewhere", two, &[], None);
        let one = "31 23 0:27 /docker/1 @/memory ro - cgroup cgroup rw,memory\n\
                   32 23 0:28 /docker/1 @/pids ro - cgroup cgroup rw,pids";
        let files = [
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
            ("memory/x/memory.limit_in_bytes", "1048576"),
        ];
        check("4:memory:/docker/1/x\n3:pids:/docker/1\n", one, &files, Some(1 << 20));
        check("4:memory:/docker/1\n", one, &files, None);
        check("garbage", "garbage", &[], None);
    }

    #[test]
    fn a_container_that_sees_the_groups_of_the_host_finds_its_own() {
        let own = "kubepods.slice/pod1/c1";
        let limited = |root: &str, file: &str| {
            vec![
                (format!("{root}{own}/{file}"), "268435456\n"),
                (format!("{root}{own}/cgroup.procs"), "7\n12\n"),
                // Others' limits are less, and of others' processes no number is told.
                (format!("{root}kubepods.slice/pod1/c2/{file}"), "1048576\n"),
                (format!("{root}kubepods.slice/pod1/c2/cgroup.procs"), "0\n0\n"),
                (format!("{root}kubepods.slice/pod2/c1/{file}"), "1048576\n"),
                (format!("{root}kubepods.slice/pod2/c1/cgroup.procs"), "77\n"),
                (format!("{root}system.slice/x/y/z/cgroup.procs"), "7\n"),
            ]
        };
        let check_all = |cgroup: &str, mountinfo: &str, files: &[(String, &str)], expected| {
            let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), *text)).collect();
            check(cgroup, mountinfo, &files, expected);
        };
        let found = Some(256 << 20);
        // Version 2, without a cgroup namespace and with one.
        let two = limited("", "memory.max");
        check_all(&format!("0::/{own}"), "30 23 0:26 / @ rw - cgroup2 cgroup2 rw", &two, found);
        let above = "30 23 0:26 /../../.. @ rw - cgroup2 cgroup2 rw";
        check_all("0::/", above, &two, found);
        // Its own are mounted there, too, and the host's over them.
        check_all("0::/", &format!("29 23 0:26 / @ rw - cgroup2 cgroup2 rw\n{above}"), &two, found);
        // In a group of its own below; and the pod is limited as well.
        let mut deeper = two.clone();
        deeper.push((format!("{own}/init/cgroup.procs"), "7\n"));
        deeper.push(("kubepods.slice/pod1/memory.max".to_owned(), "134217728\n"));
        check_all("0::/init", above, &deeper, Some(128 << 20));
        // Somebody else's groups, and none with this process.
        check_all("0::/", "30 23 0:26 /../../c2 @ rw - cgroup2 cgroup2 rw", &two, None);
        check_all("0::/", "30 23 0:26 /.. @ rw - cgroup2 cgroup2 rw", &two, None);
        // Version 1, and both beside each other.
        let one = limited("memory/", "memory.limit_in_bytes");
        let mounted = "31 23 0:27 /../../.. @/memory ro - cgroup cgroup rw,memory";
        check_all("4:memory:/\n3:pids:/\n", mounted, &one, found);
        let hybrid = format!("30 23 0:26 /../../.. @/unified rw - cgroup2 cgroup2 rw\n{mounted}");
        check_all("4:memory:/\n0::/\n", &hybrid, &one, found);
        let plain = hybrid.replace("/../../..", "/");
        check_all(&format!("4:memory:/{own}\n0::/{own}\n"), &plain, &one, found);
    }
}
