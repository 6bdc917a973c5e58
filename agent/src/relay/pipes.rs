//! Pipes through which long bodies go from one socket to the other inside the kernel.
//!
//! They are few and shared: a connection has one only while bytes are in it. Where none is to be had, or
//! the kernel does not splice, bytes are copied.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use rustix::{
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};
use tokio::net::TcpStream;

/// Most pipes of a thread.
const MAX_PIPES: usize = 64;

/// What a pipe is asked to take: an answer of 64 KiB with its head. By itself it takes 64 KiB (pipe(7)).
const PIPE_BYTES: usize = 128 * 1024;

/// The pipes that nobody is using.
#[derive(Debug)]
pub(crate) struct Pipes {
    most: usize,
    free: RefCell<Vec<Pipe>>,
    /// Pipes that exist.
    open: Rc<Cell<usize>>,
    is_refused: Cell<bool>,
}

/// A pipe, and how much is in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    open: Rc<Cell<usize>>,
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.open.set(self.open.get().saturating_sub(1));
    }
}

impl Pipes {
    /// None yet; for one in eight of so many connections there may be one.
    pub(crate) fn new(max_connections: usize) -> Self {
        Self {
            most: (max_connections / 8).min(MAX_PIPES),
            free: RefCell::default(),
            open: Rc::default(),
            is_refused: Cell::new(false),
        }
    }

    /// An empty pipe, if there is one.
    pub(super) fn take(&self) -> Option<Pipe> {
        if self.is_refused.get() {
            return None;
        }
        if let Some(free) = self.free.borrow_mut().pop() {
            return Some(free);
        }
        if self.open.get() >= self.most {
            return None;
        }
        match pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
            Ok((read, write)) => {
                if let Err(error) = fcntl_setpipe_size(&write, PIPE_BYTES) {
                    tracing::debug!(%error, "a pipe stays as small as it is");
                }
                self.open.set(self.open.get() + 1);
                Some(Pipe {
                    read,
                    write,
                    held: 0,
                    open: self.open.clone(),
                })
            }
            Err(error) => {
                tracing::debug!(%error, "no pipe; long bodies are copied");
                None
            }
        }
    }

    /// Takes an empty pipe back.
    pub(super) fn give_back(&self, pipe: Pipe) {
        self.free.borrow_mut().push(pipe);
    }

    /// Whether the error says that this kernel does not splice between sockets. Then no pipe is given any more.
    pub(super) fn is_refusal(&self, error: &io::Error) -> bool {
        let refused = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM];
        let is_refused = Errno::from_io_error(error).is_some_and(|errno| refused.contains(&errno));
        if is_refused && !self.is_refused.replace(true) {
            tracing::info!(%error, "this kernel does not splice between sockets; long bodies are copied");
            self.free.borrow_mut().clear();
        }
        is_refused
    }
}

impl Pipe {
    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Takes bytes of the socket, at most so many; none at its end.
    pub(super) fn fill(&mut self, from: &TcpStream, most: u64) -> io::Result<usize> {
        let most = usize::try_from(most).map_or(PIPE_BYTES, |most| most.min(PIPE_BYTES));
        let moved = move_bytes(from, &self.write, most);
        if let Ok(count) = &moved {
            self.held += *count;
        }
        moved
    }

    /// Gives bytes to the socket.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let count = move_bytes(&self.read, to, self.held)?;
        self.held = self.held.saturating_sub(count);
        match count {
            0 => Err(io::ErrorKind::WriteZero.into()),
            count => Ok(count),
        }
    }
}

fn move_bytes(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    loop {
        match splice(&from, None, &to, None, most, flags) {
            Err(Errno::INTR) => {}
            moved => return Ok(moved?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_splicing_is_refused_no_pipe_is_given_any_more() {
        let pipes = Pipes::new(64);
        let (free, busy) = (pipes.take().unwrap(), pipes.take().unwrap());
        pipes.give_back(free);
        assert!(!pipes.is_refusal(&Errno::CONNRESET.into()));
        assert!(pipes.is_refusal(&Errno::INVAL.into()));
        // One that was in use then comes back later.
        pipes.give_back(busy);
        assert!(pipes.take().is_none());
    }
}
