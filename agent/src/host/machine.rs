//! What the whole machine or certain processes use, as the system counts it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use super::Usage;

/// Reads the system's figures.
#[derive(Debug)]
pub(super) struct Machine {
    system: System,
    looked: Option<Instant>,
    /// Processor time since the first look.
    cpu_us: u64,
    /// Processor time of each process at the last look. None before the first.
    processes: Option<HashMap<u32, Spent>>,
}

/// What a process has spent.
#[derive(Debug, Clone, Copy)]
struct Spent {
    /// When it started, which tells it from another with the same number.
    started: u64,
    cpu_ms: u64,
}

// === impl Machine ===

impl Machine {
    pub(super) fn new() -> Option<Self> {
        match System::new() {
            Ok(system) => Some(Self {
                system,
                looked: None,
                cpu_us: 0,
                processes: None,
            }),
            Err(error) => {
                tracing::warn!(?error, "what the machine uses cannot be read, and is not shown");
                None
            }
        }
    }

    /// What the whole machine uses; its size is the limit.
    pub(super) fn whole(&mut self, now: Instant) -> Usage {
        self.system.refresh_cpu_usage();
        self.system
            .refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let cores = self.system.cpus().len();
        let busy_cores = f64::from(self.system.global_cpu_usage()) / 100.0 * cores as f64;
        // The conversion ends at both ends of the range.
        let busy_us = (busy_cores * self.since(now).as_secs_f64() * 1e6) as u64;
        self.cpu_us = self.cpu_us.saturating_add(busy_us);
        let total = self.system.total_memory();
        Usage {
            cpu_us: Some(self.cpu_us),
            cpu_limit_milli: (cores as u64).saturating_mul(1_000),
            memory_bytes: total.saturating_sub(self.system.available_memory()),
            memory_limit_bytes: total,
        }
    }

    /// What these processes use together.
    pub(super) fn of(&mut self, pids: &[u32], now: Instant) -> Usage {
        let since = self.since(now);
        let before = self.processes.take();
        self.refresh(pids, before.as_ref());
        let (mut memory_bytes, mut spent_ms) = (0_u64, 0_u64);
        let mut processes = HashMap::with_capacity(pids.len());
        for pid in pids {
            let Some(process) = self.system.process(Pid::from_u32(*pid)) else {
                continue;
            };
            memory_bytes = memory_bytes.saturating_add(process.memory());
            let spent = Spent {
                started: process.start_time(),
                cpu_ms: process.accumulated_cpu_time(),
            };
            if let Some(before) = &before {
                let is_young = process.run_time() <= since.as_secs().saturating_add(1);
                spent_ms = spent_ms.saturating_add(spent.since(before.get(pid), is_young));
            }
            processes.insert(*pid, spent);
        }
        self.processes = Some(processes);
        self.cpu_us = self.cpu_us.saturating_add(spent_ms.saturating_mul(1_000));
        Usage {
            cpu_us: Some(self.cpu_us),
            memory_bytes,
            ..Usage::default()
        }
    }

    /// Reads these processes, and forgets those of before that have ended.
    fn refresh(&mut self, pids: &[u32], before: Option<&HashMap<u32, Spent>>) {
        let gone = before.into_iter().flat_map(HashMap::keys);
        let gone = gone.filter(|pid| !pids.contains(pid));
        let pids: Vec<Pid> = pids.iter().chain(gone).map(|pid| Pid::from_u32(*pid)).collect();
        let kind = ProcessRefreshKind::nothing()
            .with_cpu()
            .with_memory()
            .without_tasks();
        self.system
            .refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, kind);
    }

    /// The time since the last look.
    fn since(&mut self, now: Instant) -> Duration {
        let before = self.looked.replace(now);
        before.map_or(Duration::ZERO, |before| now.saturating_duration_since(before))
    }
}

// === impl Spent ===

impl Spent {
    /// What was spent since the last look. All of it where the process started after; none where it was
    /// only not among those that were looked at.
    fn since(self, before: Option<&Self>, is_young: bool) -> u64 {
        match before {
            Some(before) if before.started == self.started => self.cpu_ms.saturating_sub(before.cpu_ms),
            _ if is_young => self.cpu_ms,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn the_machine_has_memory_and_cores() {
        let mut machine = Machine::new().unwrap();
        let usage = machine.whole(Instant::now());
        assert!(usage.memory_bytes > 0 && usage.memory_bytes < usage.memory_limit_bytes);
        assert!(usage.cpu_limit_milli >= 1_000);
        assert_eq!(usage.cpu_us, Some(0), "what was before is not counted");
    }

    #[test]
    fn the_machines_time_is_added_up() {
        let mut machine = Machine::new().unwrap();
        let start = Instant::now();
        machine.whole(start);
        let mut work = 0_u64;
        loop {
            for number in 0..1_000_000_u64 {
                work = std::hint::black_box(work ^ number);
            }
            let now = Instant::now();
            let usage = machine.whole(now);
            let limit = u128::from(usage.cpu_limit_milli);
            let most = limit * (now - start).as_micros() / 1_000 + limit;
            assert!(u128::from(usage.cpu_us.unwrap()) <= most, "{usage:?}");
            if usage.cpu_us > Some(0) {
                break;
            }
            assert!(now < start + Duration::from_secs(60), "{usage:?}");
        }
    }

    #[test]
    fn processes_are_added_up() {
        let mut machine = Machine::new().unwrap();
        // There is none with the highest number (PID_MAX_LIMIT is 4,194,304).
        let pids = [process::id(), 4_194_305];
        let start = Instant::now();
        let first = machine.of(&pids, start);
        assert!(first.memory_bytes > 0);
        assert_eq!(first.cpu_us, Some(0));
        let mut work = 0_u64;
        let deadline = start + Duration::from_secs(60);
        loop {
            // The system counts in steps of 10 ms.
            for number in 0..1_000_000_u64 {
                work = std::hint::black_box(work ^ number);
            }
            let usage = machine.of(&pids, Instant::now());
            if usage.cpu_us > Some(0) {
                assert_eq!(usage.cpu_limit_milli, 0);
                break;
            }
            assert!(Instant::now() < deadline, "{usage:?}");
        }
    }

    #[test]
    fn processes_that_have_ended_are_forgotten() {
        let mut machine = Machine::new().unwrap();
        let mut child = process::Command::new("sleep").arg("60").spawn().unwrap();
        machine.of(&[child.id()], Instant::now());
        assert_eq!(machine.system.processes().len(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        machine.of(&[], Instant::now());
        assert!(machine.system.processes().is_empty());
    }

    #[test]
    fn only_what_was_spent_since_counts() {
        let spent = |started, cpu_ms| Spent { started, cpu_ms };
        let now = spent(5, 100);
        assert_eq!(now.since(Some(&spent(5, 70)), false), 30);
        assert_eq!(now.since(Some(&spent(5, 170)), false), 0);
        assert_eq!(
            now.since(Some(&spent(4, 70)), true),
            100,
            "another with its number"
        );
        assert_eq!(now.since(None, true), 100);
        assert_eq!(now.since(None, false), 0);
    }
}
