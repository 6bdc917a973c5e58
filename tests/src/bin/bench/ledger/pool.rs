//! Threads on both cores: the log's writer must not share one with those who wait for it.

use std::{thread, time::Duration};

use anyhow::Context as _;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::cpu::Cores;

/// How long what is going on may take when the run is interrupted.
const PATIENCE: Duration = Duration::from_secs(10);

/// A runtime beside that of the bench, whose only thread keeps to one core.
#[derive(Debug)]
pub(super) struct Pool {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Pool {
    pub(super) fn new(cores: Cores) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(move || spread(cores))
            .enable_all()
            .build()?;
        Ok(Self {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }

    /// Where tasks can be put.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Does something that blocks.
    pub(super) async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let done = self.handle.spawn_blocking(work).await;
        done.context("what was measured has panicked")?
    }

    /// Does something that waits, and that may block as well.
    pub(super) async fn wait<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = anyhow::Result<T>> + 'static,
    {
        let handle = self.handle.clone();
        self.aside(move || handle.block_on(work())).await
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What it has started, such as a server, ends before this process does. Waiting for that is not allowed on
            // the thread of another runtime.
            let ending = thread::spawn(move || runtime.shutdown_timeout(PATIENCE));
            ending.join().ok();
        }
    }
}

/// Lets this thread use both cores. Where that is refused it keeps the one that it has.
fn spread(cores: Cores) {
    let mut set = CpuSet::new();
    set.set(cores.proxy);
    set.set(cores.load);
    sched_setaffinity(None, &set).ok();
}
