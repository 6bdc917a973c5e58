//! What can be hit: the calls of one thread that touch the data directory, read from a trace.

use std::collections::{BTreeMap, BTreeSet};

/// Calls that change something, or open it for that.
pub(super) const CHANGE: [&str; 20] = [
    "openat",
    "mkdir",
    "mkdirat",
    "write",
    "writev",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "ftruncate",
    "fallocate",
    "chmod",
    "fchmod",
    "fchmodat",
];

/// Calls that only look.
pub(super) const LOOK: [&str; 9] = [
    "read",
    "pread64",
    "getdents64",
    "statx",
    "newfstatat",
    "fstat",
    "statfs",
    "flock",
    "close",
];

/// Which thread is hit, and at what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Begin,
    Mend,
    Log,
    Evidence,
    Windows,
}

impl Target {
    pub(super) const ALL: [Self; 5] = [Self::Begin, Self::Mend, Self::Log, Self::Evidence, Self::Windows];

    /// The thread's name; none for the main one.
    pub(super) fn thread(self) -> Option<&'static str> {
        match self {
            Self::Begin | Self::Mend => None,
            Self::Log | Self::Evidence => Some("ledger"),
            Self::Windows => Some("windows"),
        }
    }

    /// Whether a call is to be hit that is about these paths under the data directory.
    fn wants(self, paths: &[&str]) -> bool {
        paths.iter().any(|path| match self {
            Self::Begin | Self::Mend => true,
            Self::Log | Self::Windows => !path.starts_with("/evidence"),
            Self::Evidence => path.starts_with("/evidence"),
        })
    }

    /// Whether strace sees only the paths of the recording.
    pub(super) fn is_narrow(self) -> bool {
        matches!(self, Self::Log | Self::Windows)
    }
}

/// The calls of a target that touch the data directory, by their numbers.
pub(super) struct Aim {
    pub(super) target: Target,
    /// What strace may see, relative to the directory; everything if this is empty.
    pub(super) paths: BTreeSet<String>,
    /// The numbers of each call, in order.
    pub(super) hits: BTreeMap<String, Vec<u64>>,
}

impl Aim {
    /// Reads a recording.
    pub(super) fn read(target: Target, trace: &str, data: &str) -> Self {
        let (mut paths, mut hits) = (BTreeSet::new(), BTreeMap::<String, Vec<u64>>::new());
        let mut numbers = BTreeMap::new();
        for (call, touched) in calls(trace, data) {
            let wanted = target.wants(&touched);
            if target.is_narrow() {
                if !wanted {
                    continue;
                }
                paths.extend(touched.iter().map(|path| (*path).to_owned()));
            }
            let number = numbers.entry(call).or_insert(0);
            *number += 1;
            if wanted {
                hits.entry(call.to_owned()).or_default().push(*number);
            }
        }
        // After the first one the thread also writes to wake the runtime, now and then.
        if target == Target::Evidence
            && let Some(writes) = hits.get_mut("write")
        {
            writes.truncate(1);
        }
        Self { target, paths, hits }
    }
}

/// The calls of a trace, each with the paths under the data directory that it is about, relative to it.
fn calls<'t>(trace: &'t str, data: &str) -> Vec<(&'t str, Vec<&'t str>)> {
    let read = |line: &'t str| {
        let (call, rest) = line.split_once('(')?;
        let parts = rest.split(['<', '>', '"']);
        let under = |part: &'t str| {
            part.strip_prefix(data)
                .filter(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let known = CHANGE.contains(&call) || LOOK.contains(&call);
        known.then(|| (call, parts.filter_map(under).collect()))
    };
    trace.lines().filter_map(read).collect()
}
