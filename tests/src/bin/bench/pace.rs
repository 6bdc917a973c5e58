//! Clients that send at a constant rate, whether answers come or not.
//!
//! A request's latency counts from when it should have been sent, so that a target which stalls is charged for all the
//! requests that had to wait, and not only for those that were under way (coordinated omission). The sending thread sleeps
//! in ppoll(2), whose timeout is exact to the microsecond where the runtime's timers have milliseconds.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    num::NonZeroU64,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    thread::set_current_timer_slack,
};

use crate::load::{HEAD_ROOM, PATIENCE, Shape, is_whole};

/// All connections to one target; requests take them in turn.
#[derive(Debug)]
pub(crate) struct Pace {
    connections: Vec<Connection>,
    requests: Arc<[Vec<u8>]>,
    /// Indices of the connections that have something to read.
    ready: Vec<usize>,
}

/// How long the requests of a slice took, the shortest first.
#[derive(Debug)]
pub(crate) struct Latencies(Vec<Duration>);

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    read: usize,
    whole: Option<usize>,
    /// The requests that are not answered, by when they should have been sent; the first is under way.
    due: VecDeque<Due>,
}

#[derive(Debug, Clone, Copy)]
struct Due {
    at: Instant,
    /// The request's number in the slice.
    number: usize,
}

// === impl Pace ===

impl Pace {
    /// Opens the connections.
    pub(crate) fn open(target: SocketAddr, shape: Shape) -> anyhow::Result<Self> {
        let connection = |_| Connection::open(target, shape.answer_bytes);
        let connections: anyhow::Result<Vec<_>> = (0..shape.connections.max(1)).map(connection).collect();
        Ok(Self {
            connections: connections?,
            requests: shape.requests(),
            ready: Vec::new(),
        })
    }

    /// Sends so many requests a second for a while, and waits for all answers. It blocks the thread.
    pub(crate) fn run(&mut self, rate: u32, length: Duration) -> anyhow::Result<Latencies> {
        // By default a sleeping thread may be woken 50 us late, so that wake-ups are joined.
        set_current_timer_slack(NonZeroU64::new(1))?;
        let latencies = self.send(rate, length);
        set_current_timer_slack(None)?;
        let mut latencies = latencies?;
        latencies.sort_unstable();
        Ok(Latencies(latencies))
    }

    fn send(&mut self, rate: u32, length: Duration) -> anyhow::Result<Vec<Duration>> {
        let apart = Duration::from_secs(1) / rate.max(1);
        let count = ((length.as_secs_f64() * f64::from(rate)) as u32).max(1);
        let mut latencies = Vec::with_capacity(count as usize);
        let begun = Instant::now();
        let deadline = begun + length + PATIENCE;
        let mut next = 0;
        while latencies.len() < count as usize {
            while next < count && begun + apart * next <= Instant::now() {
                let due = Due {
                    at: begun + apart * next,
                    number: next as usize,
                };
                let place = due.number % self.connections.len();
                self.connections[place].is_due(due, &self.requests)?;
                next += 1;
            }
            let until = if next < count {
                begun + apart * next
            } else {
                deadline
            };
            self.wait(until)?;
            for place in self.ready.drain(..) {
                if let Some(latency) = self.connections[place].on_readable(&self.requests)? {
                    latencies.push(latency);
                }
            }
            ensure!(Instant::now() < deadline, "an answer does not come");
        }
        Ok(latencies)
    }

    /// Waits until there is something to read, but no longer than this.
    fn wait(&mut self, until: Instant) -> anyhow::Result<()> {
        let all = self.connections.iter();
        let mut files: Vec<_> = all
            .map(|connection| PollFd::new(&connection.stream, PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
        match poll(&mut files, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => bail!("the answers cannot be waited for: {error}"),
        }
        let ready = files.iter().enumerate();
        let ready = ready.filter(|(_, file)| !file.revents().is_empty());
        self.ready.extend(ready.map(|(place, _)| place));
        Ok(())
    }
}

// === impl Connection ===

impl Connection {
    fn open(target: SocketAddr, answer_bytes: usize) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(target)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            buffer: vec![0; HEAD_ROOM + answer_bytes],
            read: 0,
            whole: None,
            due: VecDeque::new(),
        })
    }

    /// A request is due; it waits if another is under way.
    fn is_due(&mut self, due: Due, requests: &[Vec<u8>]) -> anyhow::Result<()> {
        self.due.push_back(due);
        if self.due.len() == 1 {
            self.send(due, requests)?;
        }
        Ok(())
    }

    fn send(&mut self, due: Due, requests: &[Vec<u8>]) -> anyhow::Result<()> {
        let request = &requests[due.number % requests.len()];
        let written = self.stream.write(request)?;
        ensure!(written == request.len(), "a request is not taken whole");
        Ok(())
    }

    /// Reads what there is. An answer that is complete gives its latency and lets the next request go.
    fn on_readable(&mut self, requests: &[Vec<u8>]) -> anyhow::Result<Option<Duration>> {
        match self.stream.read(&mut self.buffer[self.read..]) {
            Ok(0) => bail!("the connection was closed within an answer"),
            Ok(more) => self.read += more,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        if !is_whole(&self.buffer[..self.read], &mut self.whole)? {
            return Ok(None);
        }
        let now = Instant::now();
        self.read = 0;
        let answered = self.due.pop_front();
        if let Some(next) = self.due.front().copied() {
            self.send(next, requests)?;
        }
        Ok(answered.map(|due| now.saturating_duration_since(due.at)))
    }
}

// === impl Latencies ===

impl Latencies {
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The latency that this share of the requests does not exceed, in microseconds.
    pub(crate) fn quantile_us(&self, share: f64) -> f64 {
        let rank = (self.0.len() as f64 * share).ceil() as usize;
        let latency = self.0.get(rank.max(1) - 1).or(self.0.last());
        latency.map_or(0.0, |latency| latency.as_secs_f64() * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let latencies = Latencies((1..=1000).map(Duration::from_micros).collect());
        for (share, us) in [
            (0.5, 500.0),
            (0.99, 990.0),
            (0.999, 999.0),
            (1.0, 1000.0),
            (0.0, 1.0),
        ] {
            assert!((latencies.quantile_us(share) - us).abs() < 1e-6, "{share}");
        }
        assert_eq!(Latencies(Vec::new()).quantile_us(0.5), 0.0);
    }
}
