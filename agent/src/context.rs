//! What is known of the pod beside its requests, put into each window that was closed: the application's
//! pools, its connections to the database, and what the pod uses of its machine.
//!
//! All of it is read on the control thread, mostly within milliseconds; a kernel that does not answer is given
//! up after tenths of a second and then left alone for long, and a scrape is under way by itself.

use std::sync::Arc;

use crate::{
    config::Config,
    host::Host,
    pool::{PoolRow, Pools},
    sockets::Sockets,
    window::Window,
};

/// Reads what is known of the pod.
#[derive(Debug)]
pub(crate) struct Context {
    pools: Arc<Pools>,
    sockets: Option<Sockets>,
    host: Host,
    /// Requests that ended since pools were read.
    requests: u64,
}

impl Context {
    /// Of the pod in which this process runs.
    pub(crate) fn new(config: &Config, pools: Arc<Pools>) -> Self {
        Self {
            pools,
            sockets: Sockets::new(config.pool_port).ok(),
            host: Host::new(),
            requests: 0,
        }
    }

    /// Adds to a window what was read since the one before.
    pub(crate) fn add_to(&mut self, window: &mut Window) {
        window.pools = self.take_pools(window.sums().requests);
        self.host.read(&mut window.host);
        window.host.database = self.sockets.as_mut().and_then(|sockets| sockets.read().ok());
    }

    /// What the pools did since they were read before, at the end of a window with so many requests. Where
    /// acquires are not counted, requests stand for them, those of windows without a scrape too: the waits are
    /// from the same time.
    fn take_pools(&mut self, requests: u64) -> Vec<PoolRow> {
        self.requests = self.requests.saturating_add(requests);
        let mut pools = self.pools.take();
        if !pools.is_empty() {
            let requests = std::mem::take(&mut self.requests);
            pools.iter_mut().for_each(|pool| pool.estimate(requests));
        }
        pools
    }
}

#[cfg(test)]
mod tests {
    use coalmine_proto::pool::MAX_POOLS;

    use super::*;
    use crate::pool::read;

    fn context() -> Context {
        Context {
            pools: Arc::default(),
            sockets: None,
            host: Host::new(),
            requests: 0,
        }
    }

    fn scrape(context: &Context, text: &str) {
        context.pools.add(&read(text.as_bytes(), &[]));
    }

    #[test]
    fn names_that_come_and_go_between_two_windows_are_bounded_and_no_event_is_lost() {
        let mut context = context();
        let text = |letter: char, waits: u64| {
            let lines = (0..MAX_POOLS)
                .map(|n| format!("go_sql_wait_count_total{{db_name=\"{letter}{n:02}\"}} {waits}\n"));
            lines.collect::<String>()
        };
        for letter in ['a', 'b'] {
            scrape(&context, &text(letter, 1));
        }
        assert_eq!(context.take_pools(0).len(), MAX_POOLS);
        scrape(&context, &text('a', 3));
        scrape(&context, &text('b', 4));
        let rows = context.take_pools(0);
        assert_eq!(rows.len(), MAX_POOLS);
        let waits = rows.iter().map(|row| row.waits);
        assert_eq!(waits.sum::<u64>(), (2 + 3) * MAX_POOLS as u64);
        assert_eq!((rows[0].waits, rows[0].name.as_str()), (2, "a00"));
        let last = &rows[MAX_POOLS - 1];
        assert_eq!(last.waits, 2 + 3 * MAX_POOLS as u64);
        assert_eq!(last.name, "a63");
    }

    #[test]
    fn requests_of_all_windows_since_the_last_scrape_stand_for_acquires() {
        let mut context = context();
        let waits = |waits: u64| format!("go_sql_wait_count_total{{db_name=\"a\"}} {waits}\n");
        let taken = |context: &mut Context, requests| {
            let rows = context.take_pools(requests);
            let rows = rows
                .iter()
                .map(|row| (row.acquires, row.waits, row.acquires_estimated));
            rows.collect::<Vec<_>>()
        };
        assert!(taken(&mut context, 1_000).is_empty());
        scrape(&context, &waits(500));
        assert_eq!(
            taken(&mut context, 10),
            [(Some(0), 0, true)],
            "a new pool has counted before anyone looked"
        );
        // Two windows pass without a scrape.
        assert!(taken(&mut context, 20).is_empty());
        assert!(taken(&mut context, 30).is_empty());
        scrape(&context, &waits(540));
        assert_eq!(taken(&mut context, 50), [(Some(100), 40, true)]);
        scrape(&context, &waits(543));
        assert_eq!(taken(&mut context, 5), [(Some(5), 3, true)]);
        scrape(&context, &waits(550));
        assert_eq!(
            taken(&mut context, 5),
            [(Some(7), 7, true)],
            "who waited has asked"
        );
        // What is counted needs nobody to stand for it.
        scrape(&context, "bb8_get_started 10\nbb8_get_waited 1\n");
        taken(&mut context, 9);
        scrape(&context, "bb8_get_started 17\nbb8_get_waited 2\n");
        assert_eq!(taken(&mut context, 900), [(Some(7), 1, false)]);
    }
}
