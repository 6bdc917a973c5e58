//! CPU time of other processes and of this thread, and the cores that they run on.

use std::fs;

use anyhow::{Context as _, ensure};
use rustix::{
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_gettime},
};

/// The two cores that the run keeps apart; the same one when there is only one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cores {
    /// For what is measured.
    pub(crate) proxy: usize,
    /// For this process, and for what answers behind the proxies.
    pub(crate) load: usize,
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    total_ns: u64,
    user_ticks: u64,
    kernel_ticks: u64,
}

/// What a process has used in a span.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    /// Nanoseconds of CPU; exact.
    pub(crate) total_ns: f64,
    /// Share of it in user space, as the kernel's ticks fell; rough unless the span is of seconds.
    pub(crate) user_share: f64,
}

// === impl Cores ===

impl Cores {
    /// The first two cores that this process may use.
    pub(crate) fn choose() -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(None).context("cannot tell which cores may be used")?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let proxy = cores.next().context("no core may be used")?;
        Ok(Self {
            proxy,
            load: cores.next().unwrap_or(proxy),
        })
    }

    /// Keeps this thread, and what it starts, on one core.
    pub(crate) fn pin(self, core: usize) -> anyhow::Result<()> {
        pin(core)
    }

    /// Says how the work is divided.
    pub(crate) fn describe(self) -> String {
        if self.proxy == self.load {
            return format!(
                "There is one core only ({}): what is measured and what loads it share it.",
                self.proxy
            );
        }
        format!(
            "What is measured is pinned to core {} (sched_setaffinity), this process and the upstream to core {}.",
            self.proxy, self.load
        )
    }
}

/// Keeps this thread, and what it starts, on one core.
pub(crate) fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on core {core}"))
}

// === impl Usage ===

impl Usage {
    /// Reads what the threads of a process have used, from `/proc`.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let mut total_ns = 0;
        let tasks = format!("/proc/{pid}/task");
        for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {tasks}"))? {
            // A thread may end while it is looked at.
            let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
            let first = text.split_ascii_whitespace().next();
            total_ns += first.and_then(|ns| ns.parse().ok()).unwrap_or(0);
        }
        ensure!(total_ns > 0, "{tasks}/*/schedstat counts nothing on this kernel");
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The second field is the name, in brackets, and may contain anything.
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
        let ticks = |field: usize| -> anyhow::Result<u64> {
            let ticks = fields.split_ascii_whitespace().nth(field);
            Ok(ticks.context("/proc/PID/stat is too short")?.parse()?)
        };
        Ok(Self {
            total_ns,
            user_ticks: ticks(11)?,
            kernel_ticks: ticks(12)?,
        })
    }

    /// What was used since.
    pub(crate) fn since(self, before: Self) -> Used {
        let less = |after: u64, before: u64| after.saturating_sub(before) as f64;
        let user = less(self.user_ticks, before.user_ticks);
        let kernel = less(self.kernel_ticks, before.kernel_ticks);
        Used {
            total_ns: less(self.total_ns, before.total_ns),
            user_share: user / (user + kernel).max(1.0),
        }
    }
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> anyhow::Result<f64> {
    // The sum of its maps is exact; what the status says is up to a quarter of a MiB off since Linux 6.2.
    let exact = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    let exact = exact.ok().and_then(|text| kib_after(&text, "Rss:"));
    let kib = match exact {
        Some(kib) => kib,
        None => {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            kib_after(&status, "VmRSS:").context("/proc/PID/status has no VmRSS")?
        }
    };
    Ok(kib * 1024.0)
}

/// The number of the line that begins so.
fn kib_after(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Nanoseconds of CPU that this thread has used: what others do on the core does not count.
pub(crate) fn thread_ns() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}
