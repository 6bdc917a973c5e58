//! Closed windows, each with the build that it was measured as.
//!
//! The pod's labels are looked at each second. What they name holds from the next border on: the windows that wait
//! here and the open one were measured as before. So a request costs nothing, and a window has one build.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{config::Config, labels::Labels, recorder::Sealed, window::Build};

/// Between two looks at the labels.
const PERIOD: Duration = Duration::from_secs(1);

/// Takes closed windows from the data thread.
#[derive(Debug)]
pub(super) struct Measured {
    sealed: mpsc::Receiver<Sealed>,
    labels: Option<Labels>,
    next_look: Instant,
    /// Of the next window.
    build: Arc<Build>,
    coming: Option<Coming>,
}

/// A build that holds after so many windows.
#[derive(Debug)]
struct Coming {
    build: Build,
    after: usize,
}

impl Measured {
    /// Measured as the labels say now, or else as the agent was started.
    pub(super) fn new(config: &Config, sealed: mpsc::Receiver<Sealed>) -> Self {
        let mut labels = Labels::of(config);
        let build = labels.as_mut().and_then(Labels::look);
        let build = build.unwrap_or_else(|| config.build());
        Self {
            sealed,
            labels,
            next_look: Instant::now() + PERIOD,
            build: Arc::new(build),
            coming: None,
        }
    }

    /// What the next window is measured as.
    pub(super) fn build(&self) -> Arc<Build> {
        Arc::clone(&self.build)
    }

    /// The next window; none after the last. Nothing is lost if this is not waited for to the end.
    pub(super) async fn recv(&mut self) -> Option<(Sealed, Arc<Build>)> {
        loop {
            tokio::select! {
                biased;
                () = sleep_until(self.next_look), if self.labels.is_some() => self.look(),
                sealed = self.sealed.recv() => return Some(self.measured(sealed?)),
            }
        }
    }

    fn look(&mut self) {
        self.next_look = Instant::now() + PERIOD;
        // Those that wait, and the open one.
        let after = self.sealed.len().saturating_add(1);
        if self.coming.as_ref().is_some_and(|coming| coming.after < after) {
            // A border has passed since the last change, and that change is not in force here yet.
            return;
        }
        if let Some(build) = self.labels.as_mut().and_then(Labels::look) {
            self.coming = (build != *self.build).then_some(Coming { build, after });
        }
    }

    /// A window, and what it was measured as.
    fn measured(&mut self, sealed: Sealed) -> (Sealed, Arc<Build>) {
        let build = self.build();
        if let Some(mut coming) = self.coming.take() {
            coming.after = coming.after.saturating_sub(1);
            if coming.after == 0 {
                self.begin(coming.build);
            } else {
                self.coming = Some(coming);
            }
        }
        (sealed, build)
    }

    fn begin(&mut self, build: Build) {
        tracing::info!(
            arm = %build.arm,
            version = build.version,
            arm_before = %self.build.arm,
            version_before = self.build.version,
            "the pod's labels have changed; it is measured as another arm or version from now on"
        );
        self.build = Arc::new(build);
    }
}

#[cfg(test)]
mod tests;
