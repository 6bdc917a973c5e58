//! Closes windows at the wall clock's whole multiples of their length.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};

use crate::recorder::{Recorder, Sealed, Settings};

/// A window that could not be closed in time, because the machine slept, is not made longer than this.
const LONGEST_MS: u64 = 60_000;

/// Closes windows and hands them over.
#[derive(Debug)]
pub(crate) struct Sealer {
    window_ms: u64,
    /// Start of the open window.
    start_ms: u64,
    windows: mpsc::Sender<Sealed>,
    settings: watch::Receiver<Arc<Settings>>,
}

/// Has settings put in force at the next border, unless they are those that were handed over last: each session brings
/// them again. They are compared here, on the control thread, so that the data thread is not kept with what is known.
pub(crate) fn hand_over(to: &watch::Sender<Arc<Settings>>, settings: Settings) {
    let is_known = **to.borrow() == settings;
    if !is_known {
        to.send_replace(Arc::new(settings));
    }
}

impl Sealer {
    pub(crate) fn new(
        window: Duration,
        now_ms: u64,
        windows: mpsc::Sender<Sealed>,
        settings: watch::Receiver<Arc<Settings>>,
    ) -> Self {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(LONGEST_MS).max(1);
        Self {
            window_ms,
            start_ms: now_ms - now_ms % window_ms,
            windows,
            settings,
        }
    }

    /// How long to wait for the next border. The clock may be set meanwhile, so never long.
    pub(crate) fn wait(&self, now_ms: u64) -> Duration {
        let border = self.start_ms.saturating_add(self.window_ms);
        let ms = border.saturating_sub(now_ms).clamp(1, self.window_ms);
        Duration::from_millis(ms)
    }

    /// Closes the open window if a border has passed.
    pub(crate) fn tick(&mut self, recorder: &mut Recorder, now_ms: u64) {
        let border = now_ms - now_ms % self.window_ms;
        let length_ms = match border.checked_sub(self.start_ms) {
            Some(0) => return,
            Some(length_ms) => length_ms.min(LONGEST_MS - LONGEST_MS % self.window_ms),
            // The clock was set back: what was counted so far is one window.
            None => self.window_ms,
        };
        let start_ms = if border < self.start_ms {
            self.start_ms
        } else {
            border - length_ms
        };
        // While the other thread takes no windows, the open one simply becomes longer. One place is left for the last.
        if self.windows.capacity() < 2 {
            return;
        }
        let Ok(place) = self.windows.try_reserve() else {
            return;
        };
        let length = u32::try_from(length_ms).unwrap_or(u32::MAX);
        let window = recorder.seal(start_ms, length);
        if self.settings.has_changed().unwrap_or(false) {
            // The control thread may hand over others while these take effect.
            let settings = Arc::clone(&self.settings.borrow_and_update());
            recorder.apply(settings);
        }
        self.start_ms = border;
        place.send(recorder.sealed(window));
    }

    /// Closes the last window, wherever its border is.
    pub(crate) fn finish(mut self, recorder: &mut Recorder, now_ms: u64) {
        self.tick(recorder, now_ms);
        let length_ms = now_ms.saturating_sub(self.start_ms).clamp(1, LONGEST_MS);
        let window = recorder.seal(self.start_ms, u32::try_from(length_ms).unwrap_or(u32::MAX));
        if self.windows.try_send(recorder.sealed(window)).is_err() {
            tracing::error!("the last window could not be handed over; its requests are lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use coalmine_proto::names::TenantName;

    use super::*;

    #[test]
    fn windows_end_at_whole_multiples() {
        let (windows, mut sealed) = mpsc::channel(8);
        let (push, settings) = watch::channel(Arc::new(Settings::default()));
        let mut sealer = Sealer::new(Duration::from_secs(1), 5_300, windows, settings);
        let mut recorder = Recorder::new(Vec::new(), 10);
        assert_eq!(sealer.wait(5_300), Duration::from_millis(700));
        sealer.tick(&mut recorder, 5_999);
        let third = Arc::new(Settings {
            version: 3,
            ..Settings::default()
        });
        push.send_replace(third.clone());
        for now_ms in [6_000, 6_001, 9_200, 4_000, 5_000, 200_500] {
            sealer.tick(&mut recorder, now_ms);
        }
        sealer.finish(&mut recorder, 200_800);
        let mut seen = Vec::new();
        while let Ok(next) = sealed.try_recv() {
            let window = next.window;
            seen.push((window.start_unix_ms, window.length_ms, window.config_version));
        }
        assert_eq!(seen[0], (5_000, 1_000, 0));
        assert_eq!(seen[1], (6_000, 3_000, 3));
        assert_eq!(seen[2], (9_000, 1_000, 3), "the clock was set back");
        assert_eq!(seen[3], (4_000, 1_000, 3));
        assert_eq!(seen[4], (140_000, 60_000, 3), "the machine slept");
        assert_eq!(seen[5], (200_000, 800, 3));
        // The channel and the recorder have these, and no copies of their own.
        assert_eq!(Arc::strong_count(&third), 3);
    }

    #[test]
    fn settings_that_are_known_are_not_handed_over_again() {
        let limits = |version, limit_us| Settings {
            version,
            by_tenant: [(TenantName::parse(b"acme").unwrap(), limit_us)].into(),
            ..Settings::default()
        };
        let (push, mut settings) = watch::channel(Arc::new(Settings::default()));
        for (next, is_news) in [
            (Settings::default(), false),
            (limits(1, 350_000), true),
            (limits(1, 350_000), false),
            // An aggregator may change them without another version.
            (limits(1, 250_000), true),
            (limits(2, 250_000), true),
        ] {
            hand_over(&push, next.clone());
            assert_eq!(settings.has_changed().unwrap(), is_news, "{next:?}");
            assert_eq!(**settings.borrow_and_update(), next);
        }
    }

    #[test]
    fn a_window_stays_open_while_nobody_takes_windows() {
        let (windows, mut sealed) = mpsc::channel(2);
        let (_push, settings) = watch::channel(Arc::new(Settings::default()));
        let mut sealer = Sealer::new(Duration::from_secs(1), 0, windows, settings);
        let mut recorder = Recorder::new(Vec::new(), 10);
        sealer.tick(&mut recorder, 1_000);
        sealer.tick(&mut recorder, 2_000);
        assert_eq!(sealed.try_recv().unwrap().window.length_ms, 1_000);
        sealer.tick(&mut recorder, 3_000);
        let window = sealed.try_recv().unwrap().window;
        assert_eq!((window.start_unix_ms, window.length_ms), (1_000, 2_000));
    }

    #[test]
    fn the_last_window_has_a_place_although_nobody_takes_windows() {
        let (windows, mut sealed) = mpsc::channel(2);
        let (_push, settings) = watch::channel(Arc::new(Settings::default()));
        let mut sealer = Sealer::new(Duration::from_secs(1), 0, windows, settings);
        let mut recorder = Recorder::new(Vec::new(), 10);
        for now_ms in [1_000, 2_000, 3_000] {
            sealer.tick(&mut recorder, now_ms);
        }
        sealer.finish(&mut recorder, 3_500);
        assert_eq!(sealed.try_recv().unwrap().window.length_ms, 1_000);
        let last = sealed.try_recv().unwrap().window;
        assert_eq!((last.start_unix_ms, last.length_ms), (1_000, 2_500));
    }
}
