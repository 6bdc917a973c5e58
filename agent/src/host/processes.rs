//! The processes that the agent can see, and their open files.

use std::{fs, path::Path};

use super::{
    cgroup::{Group, Place},
    text,
};

/// Most processes that are looked at; a pod has a few.
const MOST: usize = 200;

/// Most open files that are counted one by one, for each process.
const MOST_FILES: usize = 65_536;

/// The processes of the pod, as far as they are seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) pids: Vec<u32>,
    /// Whether some are in other containers than the agent.
    pub(super) has_siblings: bool,
    pub(super) open_files: u64,
}

/// Looks for processes of the pod.
pub(super) fn look(root: &Path, group: &Group) -> Seen {
    let mut seen = Seen::default();
    let directory = root.join("proc");
    let Ok(entries) = fs::read_dir(&directory) else {
        return seen;
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(MOST) {
        let process = directory.join(pid.to_string());
        // It may have ended.
        let Some(membership) = text(&process.join("cgroup")) else {
            continue;
        };
        match group.place(&membership) {
            Place::Inside => {}
            Place::Sibling => seen.has_siblings = true,
            Place::Elsewhere => continue,
        }
        seen.pids.push(pid);
        seen.open_files = seen.open_files.saturating_add(open_files(&process.join("fd")));
    }
    seen
}

/// The machine's open files: the first number of `/proc/sys/fs/file-nr`.
pub(super) fn all_open_files(root: &Path) -> u64 {
    let text = text(&root.join("proc/sys/fs/file-nr")).unwrap_or_default();
    let first = text.split_ascii_whitespace().next();
    first.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// The entries of a process' directory of files. Another user's cannot be listed, but Linux 6.2 and later
/// gives their number as the directory's size.
fn open_files(directory: &Path) -> u64 {
    match fs::read_dir(directory) {
        Ok(entries) => entries.take(MOST_FILES).count() as u64,
        Err(_) => fs::metadata(directory).map_or(0, |directory| directory.len()),
    }
}
