//! The control group of the pod or the container, of both versions: the kernel's
//! `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/`.
//!
//! ```text
//!                  version 2, below /sys/fs/cgroup        version 1, below /sys/fs/cgroup/CONTROLLER
//! processor        cpu.stat: usage_usec                   cpuacct: cpuacct.usage (ns)
//! its limit        cpu.max: quota and period (us)         cpu: cpu.cfs_quota_us, cpu.cfs_period_us
//! memory           memory.current                         memory: memory.usage_in_bytes
//! less             memory.stat: inactive_file             memory: memory.stat: total_inactive_file
//! its limit        memory.max                             memory: memory.limit_in_bytes
//! ```

use std::path::{Path, PathBuf};

use super::{Usage, text};

/// No limit of memory, in version 1, is the highest number of whole pages.
const UNLIMITED_BYTES: u64 = 1 << 62;

/// A control group whose figures can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    version: Version,
    owner: Owner,
    /// The agent's own group, as it is named in `/proc/self/cgroup`.
    own: String,
    /// Where the figures are, below the mount; empty for the mount itself.
    path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Whose the group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Pod,
    Container,
    Machine,
}

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the group.
    Inside,
    /// In another container of the same pod.
    Sibling,
    Elsewhere,
}

// === impl Group ===

impl Group {
    /// The narrowest group that is not the agent's alone, of what is mounted below the root.
    pub(super) fn find(root: &Path) -> Option<Self> {
        let mount = root.join("sys/fs/cgroup");
        let version = if mount.join("cgroup.controllers").exists() {
            Version::V2
        } else {
            Version::V1
        };
        let base = version.base(&mount);
        if !base.is_dir() {
            return None;
        }
        let membership = text(&root.join("proc/self/cgroup"))?;
        let own = version.path_in(&membership)?.to_owned();
        let is_mounted = |path: &str| base.join(path.trim_start_matches('/')).is_dir();
        let (owner, path) = match pod_of(&own) {
            Some(pod) if is_mounted(pod) => (Owner::Pod, pod.to_owned()),
            // What is mounted is the agent's own group: it names itself "/", or by a path outside.
            _ if own == "/" || !is_mounted(&own) => (version.owner_of_mount(&base), String::new()),
            _ => (Owner::Machine, String::new()),
        };
        Some(Self {
            version,
            owner,
            own,
            path,
        })
    }

    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// Where a process is, by the text of its `/proc/PID/cgroup`.
    pub(super) fn place(&self, membership: &str) -> Place {
        let Some(path) = self.version.path_in(membership) else {
            return Place::Elsewhere;
        };
        if self.owner == Owner::Pod {
            return if is_within(path, &self.path) {
                Place::Inside
            } else {
                Place::Elsewhere
            };
        }
        // A name space shows what is outside by the way to it.
        if path.starts_with("/..") {
            return match path.strip_prefix("/../") {
                Some(beside) if !beside.starts_with("..") => Place::Sibling,
                _ => Place::Elsewhere,
            };
        }
        let above = self.own.rsplit_once('/').map_or("", |(above, _)| above);
        if is_within(path, &self.own) {
            Place::Inside
        } else if !above.is_empty() && is_within(path, above) {
            Place::Sibling
        } else {
            Place::Elsewhere
        }
    }

    /// What the group uses.
    pub(super) fn usage(&self, root: &Path) -> Usage {
        let mount = root.join("sys/fs/cgroup");
        match self.version {
            Version::V1 => self.usage_v1(&mount),
            Version::V2 => usage_v2(&self.below(&mount)),
        }
    }

    fn usage_v1(&self, mount: &Path) -> Usage {
        // Two controllers may be mounted together, and each alone is a link then, or is not there.
        let of = |controller: &str| {
            let alone = self.below(&mount.join(controller));
            if alone.is_dir() {
                alone
            } else {
                self.below(&mount.join("cpu,cpuacct"))
            }
        };
        let cpu = of("cpu");
        let memory = self.below(&mount.join("memory"));
        let quota = number(&cpu.join("cpu.cfs_quota_us"));
        let period = number(&cpu.join("cpu.cfs_period_us"));
        let limit = number(&memory.join("memory.limit_in_bytes"));
        Usage {
            cpu_us: number(&of("cpuacct").join("cpuacct.usage")).map(|ns| ns / 1_000),
            cpu_limit_milli: milli(quota, period),
            memory_bytes: working_set(&memory, "memory.usage_in_bytes", "total_inactive_file"),
            memory_limit_bytes: limit.filter(|limit| *limit < UNLIMITED_BYTES).unwrap_or(0),
        }
    }

    fn below(&self, base: &Path) -> PathBuf {
        base.join(self.path.trim_start_matches('/'))
    }
}

/// The pod's group of those that a container is in: `pod` and the pod's identity, or with systemd
/// `kubepods-`, the class, `-pod`, the identity and `.slice`.
fn pod_of(own: &str) -> Option<&str> {
    let is_pod = |name: &str| {
        let of_systemd = name
            .strip_suffix(".slice")
            .is_some_and(|name| name.starts_with("kubepods") && name.contains("-pod"));
        of_systemd || (name.starts_with("pod") && name.len() > "pod".len())
    };
    if !own.contains("kubepods") || own.contains("/..") {
        return None;
    }
    let pod = own.split('/').find(|name| is_pod(name))?;
    let end = own.find(&format!("/{pod}"))? + 1 + pod.len();
    own.get(..end)
}

/// Whether a path is the directory or below it.
fn is_within(path: &str, directory: &str) -> bool {
    let rest = path.strip_prefix(directory.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn usage_v2(group: &Path) -> Usage {
    let stat = text(&group.join("cpu.stat")).unwrap_or_default();
    let max = text(&group.join("cpu.max")).unwrap_or_default();
    let mut max = max.split_ascii_whitespace().map(|number| number.parse().ok());
    let (quota, period) = (max.next().flatten(), max.next().flatten());
    Usage {
        cpu_us: field(&stat, "usage_usec"),
        cpu_limit_milli: milli(quota, period),
        memory_bytes: working_set(group, "memory.current", "inactive_file"),
        // Without a limit, it is "max".
        memory_limit_bytes: number(&group.join("memory.max")).unwrap_or(0),
    }
}

/// Thousandths of a core, or 0 for no limit.
fn milli(quota: Option<u64>, period: Option<u64>) -> u64 {
    let milli = quota.zip(period).and_then(|(quota, period)| {
        let thousands = quota.saturating_mul(1_000);
        thousands.checked_div(period)
    });
    milli.unwrap_or(0)
}

/// Memory without the files that nobody has used for long, which the kernel takes back first: what the
/// kubelet calls the working set.
fn working_set(group: &Path, current: &str, inactive: &str) -> u64 {
    let stat = text(&group.join("memory.stat")).unwrap_or_default();
    let inactive = field(&stat, inactive).unwrap_or(0);
    number(&group.join(current)).unwrap_or(0).saturating_sub(inactive)
}

/// The number that a line gives after its name.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.trim().parse().ok()
}

// === impl Version ===

impl Version {
    /// Where the groups of processes are, of several hierarchies that of memory.
    fn base(self, mount: &Path) -> PathBuf {
        match self {
            Self::V1 => mount.join("memory"),
            Self::V2 => mount.to_owned(),
        }
    }

    /// Whose the mounted group is. Some files are only in the root of all groups, or only elsewhere.
    fn owner_of_mount(self, base: &Path) -> Owner {
        let is_root = match self {
            Self::V1 => base.join("release_agent").exists(),
            Self::V2 => !base.join("cgroup.events").exists(),
        };
        if is_root { Owner::Machine } else { Owner::Container }
    }

    /// The path in a `/proc/PID/cgroup`: lines of a number, controllers and a path, with colons between.
    fn path_in(self, membership: &str) -> Option<&str> {
        membership.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let is_this = match self {
                Self::V1 => controllers.split(',').any(|name| name == "memory"),
                Self::V2 => controllers.is_empty(),
            };
            (is_this && path.starts_with('/')).then_some(path)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_found_by_name() {
        // The paths of cgroupfs and of systemd, as the kubelet makes them.
        for (own, pod) in [
            ("/kubepods/pod1b2c/4d5e", Some("/kubepods/pod1b2c")),
            (
                "/kubepods/burstable/pod1b2c/4d5e",
                Some("/kubepods/burstable/pod1b2c"),
            ),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1b2c_3d.slice/cri-containerd-4d5e.scope",
                Some("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1b2c_3d.slice"),
            ),
            (
                "/kubelet/kubepods.slice/kubepods-pod1b.slice/crio-4d.scope/container",
                Some("/kubelet/kubepods.slice/kubepods-pod1b.slice"),
            ),
            ("/", None),
            ("/docker/4d5e", None),
            ("/user.slice/podman.scope", None),
            ("/kubepods/burstable", None),
            ("/../../kubepods/pod1b2c/4d5e", None),
        ] {
            assert_eq!(pod_of(own), pod, "{own}");
        }
    }

    fn group(owner: Owner, own: &str, path: &str) -> Group {
        Group {
            version: Version::V2,
            owner,
            own: own.to_owned(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn processes_are_placed() {
        use Place::{Elsewhere, Inside, Sibling};
        let named = group(Owner::Container, "/", "");
        let visible = group(Owner::Container, "/kubepods/pod1/aa", "");
        let pod = group(Owner::Pod, "/kubepods/pod1/aa", "/kubepods/pod1");
        for (group, path, place) in [
            (&named, "/", Inside),
            (&named, "/init.scope", Inside),
            (&named, "/../bb", Sibling),
            (&named, "/../cri-containerd-bb.scope", Sibling),
            (&named, "/../../pod2/cc", Elsewhere),
            (&named, "/..", Elsewhere),
            (&visible, "/kubepods/pod1/aa", Inside),
            (&visible, "/kubepods/pod1/aab", Sibling),
            (&visible, "/kubepods/pod1/bb", Sibling),
            (&visible, "/kubepods/pod11/bb", Elsewhere),
            (&visible, "/", Elsewhere),
            (&pod, "/kubepods/pod1/bb", Inside),
            (&pod, "/kubepods/pod11/bb", Elsewhere),
            (&pod, "/", Elsewhere),
        ] {
            assert_eq!(group.place(&format!("0::{path}\n")), place, "{group:?}: {path}");
        }
        assert_eq!(named.place("garbage"), Elsewhere);
    }

    #[test]
    fn limits_are_thousandths_of_a_core() {
        for (quota, period, expected) in [
            (Some(150_000), Some(100_000), 1_500),
            (Some(u64::MAX), Some(1), u64::MAX),
            (Some(1), Some(0), 0),
            (None, Some(100_000), 0),
            (Some(1), None, 0),
        ] {
            assert_eq!(milli(quota, period), expected);
        }
    }
}
