//! The processes that the agent can see, and their open files.

use std::{fs, path::Path};

use super::{
    cgroup::{Group, Place},
    text,
};

/// Most processes that are looked at; a pod has a few.
const MOST: usize = 200;

/// Most open files that are counted one by one, for each process: the windows wait meanwhile.
const MOST_FILES: usize = 4_096;

/// Since this version of Linux, the size of a process' directory of files is their number.
const COUNTED_SINCE: (u32, u32) = (6, 2);

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
    let is_counted = release(root) >= COUNTED_SINCE;
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
        let open_files = open_files(&process.join("fd"), is_counted);
        seen.open_files = seen.open_files.saturating_add(open_files);
    }
    seen
}

/// The machine's open files: the first number of `/proc/sys/fs/file-nr`.
pub(super) fn all_open_files(root: &Path) -> u64 {
    let text = text(&root.join("proc/sys/fs/file-nr")).unwrap_or_default();
    let first = text.split_ascii_whitespace().next();
    first.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// The open files of a process. Where the kernel counts them, it does so for processes of every user; else the entries
/// of the directory are counted, which another user's does not show.
fn open_files(directory: &Path, is_counted: bool) -> u64 {
    if is_counted && let Ok(directory) = fs::metadata(directory) {
        return directory.len();
    }
    fs::read_dir(directory).map_or(0, |entries| entries.take(MOST_FILES).count() as u64)
}

/// The first two numbers of the kernel's version; zeros where it is not known.
fn release(root: &Path) -> (u32, u32) {
    let text = text(&root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use super::*;

    /// A process that waits for input has the files that it began with, once it has read its libraries.
    #[test]
    fn the_kernels_count_is_the_number_of_entries() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let files = format!("/proc/{}/fd", child.id());
        let is_counted = release(Path::new("/")) >= COUNTED_SINCE;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let listed = open_files(Path::new(&files), false);
            let counted = open_files(Path::new(&files), is_counted);
            if listed >= 3 && counted == listed {
                break;
            }
            assert!(Instant::now() < deadline, "{counted} counted, {listed} listed");
            std::thread::yield_now();
        }
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
