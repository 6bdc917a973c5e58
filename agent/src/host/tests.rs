//! Trees of files as the kernel shows them in a pod, in a container and on a machine.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::*;

/// A directory with the files of a kernel.
struct Tree(TempDir);

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            tree.write(path, text);
        }
        tree
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A process in this group, with so many open files.
    fn process(&self, pid: u32, membership: &str, files: usize) {
        self.write(&format!("proc/{pid}/cgroup"), membership);
        fs::create_dir_all(self.root().join(format!("proc/{pid}/fd"))).unwrap();
        for file in 0..files {
            self.write(&format!("proc/{pid}/fd/{file}"), "");
        }
    }
}

/// Reads a second after the last look.
fn read(host: &mut Host) -> v1::HostContext {
    let now = host.looked.unwrap() + Duration::from_secs(1);
    let mut context = v1::HostContext {
        in_flight: 7,
        ..v1::HostContext::default()
    };
    host.read_at(now, &mut context);
    assert_eq!(context.in_flight, 7, "what is not the host's is left alone");
    context.in_flight = 0;
    context
}

/// `memory.stat` of Linux 6.18, shortened.
const MEMORY_STAT: &str = "anon 94691328\nfile 1311801344\nkernel 9060352\nshmem 9084928\n\
    inactive_anon 94691328\nactive_anon 1654784\ninactive_file 690843648\nactive_file 611872768\n";

fn v2(base: &str) -> Vec<(String, String)> {
    let files = [
        ("cgroup.events", "populated 1\nfrozen 0\n"),
        (
            "cpu.stat",
            "usage_usec 5000000\nuser_usec 4000000\nsystem_usec 1000000\nnr_periods 0\n",
        ),
        ("cpu.max", "150000 100000\n"),
        ("memory.current", "1422200832\n"),
        ("memory.stat", MEMORY_STAT),
        ("memory.max", "2147483648\n"),
    ];
    let files = files.map(|(name, text)| (format!("sys/fs/cgroup{base}/{name}"), text.to_owned()));
    files.into_iter().collect()
}

fn borrowed(files: &[(String, String)]) -> Vec<(&str, &str)> {
    files.iter().map(|(path, text)| (&path[..], &text[..])).collect()
}

fn expected() -> v1::HostContext {
    v1::HostContext {
        cpu_us: 250_000,
        cpu_limit_milli: 1_500,
        memory_bytes: 1_422_200_832 - 690_843_648,
        memory_limit_bytes: 2 << 30,
        open_files: 7,
        ..v1::HostContext::default()
    }
}

#[test]
fn a_container_that_is_shared_with_the_application_has_its_figures() {
    let tree = Tree::new(&borrowed(&v2("")));
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    tree.write("proc/self/cgroup", "0::/\n");
    tree.process(1, "0::/\n", 3);
    tree.process(7, "0::/\n", 4);
    let mut host = Host::at(tree.root());
    tree.write("sys/fs/cgroup/cpu.stat", "usage_usec 5250000\n");
    assert_eq!(read(&mut host), expected());

    // Within a second, what was seen; then the time since.
    let soon = host.looked.unwrap() + Duration::from_millis(10);
    tree.write("sys/fs/cgroup/cpu.stat", "usage_usec 5260000\n");
    let mut context = v1::HostContext::default();
    host.read_at(soon, &mut context);
    let unchanged = v1::HostContext {
        cpu_us: 0,
        ..expected()
    };
    assert_eq!(context, unchanged);
    assert_eq!(read(&mut host).cpu_us, 10_000);

    // A counter that goes back, and one that is not there for a while.
    tree.write("sys/fs/cgroup/cpu.stat", "usage_usec 100\n");
    assert_eq!(read(&mut host).cpu_us, 0);
    fs::remove_file(tree.root().join("sys/fs/cgroup/cpu.stat")).unwrap();
    assert_eq!(read(&mut host).cpu_us, 0);
    tree.write("sys/fs/cgroup/cpu.stat", "usage_usec 9000000\n");
    assert_eq!(read(&mut host).cpu_us, 0);

    // Without limits.
    tree.write("sys/fs/cgroup/cpu.max", "max 100000\n");
    tree.write("sys/fs/cgroup/memory.max", "max\n");
    let context = read(&mut host);
    assert_eq!((context.cpu_limit_milli, context.memory_limit_bytes), (0, 0));
}

#[test]
fn a_plain_sidecar_does_not_take_itself_for_the_pod() {
    let tree = Tree::new(&borrowed(&v2("")));
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    tree.write("proc/self/cgroup", "0::/\n");
    tree.process(1, "0::/\n", 3);
    let mut host = Host::at(tree.root());
    assert_eq!(read(&mut host), v1::HostContext::default());
    // With a shared name space of processes, the container is not the pod either.
    tree.process(9, "0::/../cri-containerd-4d5e.scope\n", 30);
    let context = v1::HostContext {
        open_files: 33,
        ..v1::HostContext::default()
    };
    assert_eq!(read(&mut host), context);
}

#[test]
fn processes_of_other_pods_are_not_looked_at() {
    let tree = Tree::new(&borrowed(&v2("")));
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    tree.write("proc/self/cgroup", "0::/\n");
    tree.process(20, "0::/\n", 3);
    tree.process(30, "0::/../../pod2/cc\n", 5);
    tree.write("proc/40/status", "Name: gone\n");
    let group = Group::find(tree.root()).unwrap();
    let seen = processes::look(tree.root(), &group);
    assert_eq!((seen.pids, seen.has_siblings), (vec![20], false));
    tree.process(50, "0::/../bb\n", 5);
    let mut seen = processes::look(tree.root(), &group);
    seen.pids.sort_unstable();
    assert_eq!((seen.pids, seen.has_siblings), (vec![20, 50], true));
    assert_eq!(seen.open_files, 8);
}

#[test]
fn open_files_are_listed_only_where_the_kernel_does_not_count_them() {
    let tree = Tree::new(&borrowed(&v2("")));
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    tree.write("proc/self/cgroup", "0::/\n");
    let group = Group::find(tree.root()).unwrap();
    let open_files = || processes::look(tree.root(), &group).open_files;
    // Of the one, the size is known and no entries are shown, as of another user's process.
    tree.write("proc/7/cgroup", "0::/\n");
    tree.write("proc/7/fd", &"f".repeat(70_000));
    for release in ["6.2.0\n", "6.18.44-generic\n", "7.0-rc1\n"] {
        tree.write("proc/sys/kernel/osrelease", release);
        assert_eq!(open_files(), 70_000, "{release}");
    }
    for release in ["6.1.176\n", "5.14.0-503.el9.x86_64\n", "4.19\n", "Linux\n", "\n"] {
        tree.write("proc/sys/kernel/osrelease", release);
        assert_eq!(open_files(), 0, "{release}");
    }
    // Of the other, so many are listed and no more.
    tree.process(8, "0::/\n", 4_100);
    assert_eq!(open_files(), 4_096);
}

#[test]
fn a_pods_group_is_found_where_the_hosts_groups_are_mounted() {
    let pod = "/kubepods.slice/kubepods-pod1b2c.slice";
    let mut files = v2(pod);
    // The container's own group says something else.
    let own = format!("sys/fs/cgroup{pod}/cri-containerd-aa.scope/memory.current");
    files.push((own, "1\n".to_owned()));
    let tree = Tree::new(&borrowed(&files));
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    let membership = format!("0::{pod}/cri-containerd-aa.scope\n");
    tree.write("proc/self/cgroup", &membership);
    tree.process(1, &membership, 3);
    tree.process(2, &format!("0::{pod}/cri-containerd-bb.scope\n"), 4);
    tree.process(3, "0::/kubepods.slice/kubepods-pod2.slice/x.scope\n", 40);
    let mut host = Host::at(tree.root());
    tree.write(&format!("sys/fs/cgroup{pod}/cpu.stat"), "usage_usec 5250000\n");
    assert_eq!(read(&mut host), expected());
}

/// The memberships of a container, with the first version.
const V1_MEMBERSHIP: &str =
    "12:memory:/docker/4d5e\n4:cpu,cpuacct:/docker/4d5e\n1:name=systemd:/docker/4d5e\n";

#[test]
fn the_first_version_is_read() {
    for cpu in ["cpu,cpuacct/", "cpu/"] {
        let cpuacct = if cpu == "cpu/" { "cpuacct/" } else { cpu };
        let base = "sys/fs/cgroup/";
        let tree = Tree::new(&[("proc/self/cgroup", V1_MEMBERSHIP)]);
        tree.write(&format!("{base}{cpu}cpu.cfs_quota_us"), "150000\n");
        tree.write(&format!("{base}{cpu}cpu.cfs_period_us"), "100000\n");
        let usage = format!("{base}{cpuacct}cpuacct.usage");
        tree.write(&usage, "981658767974\n");
        let memory = format!("{base}memory/");
        tree.write(&format!("{memory}memory.usage_in_bytes"), "1422200832\n");
        tree.write(&format!("{memory}memory.limit_in_bytes"), "2147483648\n");
        let stat = "inactive_file 229376\ntotal_inactive_file 690843648\n";
        tree.write(&format!("{memory}memory.stat"), stat);
        tree.process(1, V1_MEMBERSHIP, 3);
        tree.process(2, V1_MEMBERSHIP, 4);
        let mut host = Host::at(tree.root());
        tree.write(&usage, "981908767974\n");
        assert_eq!(read(&mut host), expected(), "{cpu}");
        // The figures of a group without limits.
        tree.write(&format!("{base}{cpu}cpu.cfs_quota_us"), "-1\n");
        let unlimited = "9223372036854771712\n";
        tree.write(&format!("{memory}memory.limit_in_bytes"), unlimited);
        let context = read(&mut host);
        assert_eq!((context.cpu_limit_milli, context.memory_limit_bytes), (0, 0));
    }
}

#[test]
fn a_machines_groups_are_not_the_applications() {
    // The agent is a service of the machine, of either version.
    let service = "/system.slice/coalmine-agent.service";
    let second = Tree::new(&borrowed(&v2(service)));
    second.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    second.write("proc/self/cgroup", &format!("0::{service}\n"));
    let first = Tree::new(&[("sys/fs/cgroup/memory/release_agent", "\n")]);
    first.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1422200832\n");
    first.write("proc/self/cgroup", "4:memory:/\n0::/\n");
    for tree in [second, first] {
        tree.write("proc/sys/fs/file-nr", "701\t0\t2466170\n");
        tree.process(1, "0::/\n", 5);
        let group = Group::find(tree.root()).unwrap();
        assert_eq!(group.owner(), Owner::Machine);
        let context = v1::HostContext {
            open_files: 701,
            ..v1::HostContext::default()
        };
        assert_eq!(read(&mut Host::at(tree.root())), context);
    }
}

#[test]
fn nothing_and_garbage_are_nothing() {
    let empty = Tree::new(&[]);
    assert_eq!(read(&mut Host::at(empty.root())), v1::HostContext::default());
    let garbage = "\u{0}:::\n-1 99999999999999999999999 \n/../..";
    let files = v2("");
    let tree = Tree::new(&[]);
    for (path, _) in &files {
        tree.write(path, garbage);
    }
    tree.write("sys/fs/cgroup/cgroup.controllers", garbage);
    tree.process(1, "0::/\n", 1);
    tree.process(2, "0::/\n", 1);
    for membership in [garbage, "0::/\n", "0::", "", "0::/kubepods/pod1/../../../x\n"] {
        tree.write("proc/self/cgroup", membership);
        let context = read(&mut Host::at(tree.root()));
        assert_eq!(
            v1::HostContext {
                open_files: 0,
                ..context
            },
            v1::HostContext::default(),
            "{membership:?}"
        );
    }
    // A directory in the place of a file, and a file that is no text.
    fs::remove_file(tree.root().join("sys/fs/cgroup/cpu.stat")).unwrap();
    fs::create_dir(tree.root().join("sys/fs/cgroup/cpu.stat")).unwrap();
    fs::write(tree.root().join("sys/fs/cgroup/memory.current"), [0xff; 100]).unwrap();
    tree.write("proc/self/cgroup", "0::/\n");
    let context = read(&mut Host::at(tree.root()));
    assert_eq!((context.cpu_us, context.memory_bytes), (0, 0));
}

#[test]
fn this_host_is_read() {
    let mut host = Host::new();
    let before = host.source;
    let mut context = v1::HostContext::default();
    host.read_at(host.looked.unwrap() + SHORTEST, &mut context);
    assert_eq!(host.source, before);
    if before != Source::Nobody {
        assert!(context.memory_bytes > 0 && context.open_files > 0, "{context:?}");
    }
}
