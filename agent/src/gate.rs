//! Tells all connections when the agent stops, and knows when the last has gone.
//!
//! A connection registers its task's waker once and reads a plain cell each time it runs, so that
//! stopping costs nothing before it happens.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    task::{Context, Waker},
};

use tokio::sync::Notify;

/// How far stopping has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Connections are served.
    Open,
    /// Connections end when no request is under way.
    Draining,
    /// Connections end now.
    Closed,
}

/// The gate that all connections of a thread pass.
#[derive(Debug)]
pub struct Gate {
    stage: Cell<Stage>,
    next: Cell<u64>,
    roll_calls: Cell<u32>,
    wakers: RefCell<HashMap<u64, Option<Waker>>>,
    left: Notify,
}

/// A connection inside the gate.
#[derive(Debug)]
pub struct Ticket {
    key: u64,
    is_watching: bool,
    /// Roll calls that it has answered.
    answered: u32,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Self {
            stage: Cell::new(Stage::Open),
            next: Cell::new(0),
            roll_calls: Cell::new(0),
            wakers: RefCell::default(),
            left: Notify::new(),
        }
    }

    /// How far stopping has come.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// Moves on and wakes all connections.
    pub fn advance(&self, stage: Stage) {
        self.stage.set(stage.max(self.stage.get()));
        self.wake();
    }

    fn wake(&self) {
        for waker in self.wakers.borrow().values().flatten() {
            waker.wake_by_ref();
        }
    }

    /// A connection begins.
    pub fn enter(&self) -> Ticket {
        let key = self.next.get();
        self.next.set(key.wrapping_add(1));
        self.wakers.borrow_mut().insert(key, None);
        Ticket {
            key,
            is_watching: false,
            answered: self.roll_calls.get(),
        }
    }

    /// Wakes all connections, so that each can see whether it has been silent for too long. One clock for all
    /// takes the place of a timer for each.
    pub fn call_roll(&self) {
        self.roll_calls.set(self.roll_calls.get().wrapping_add(1));
        self.wake();
    }

    /// Whether there was a roll call that this connection has not answered; this is its answer.
    pub fn is_roll_call(&self, ticket: &mut Ticket) -> bool {
        let calls = self.roll_calls.get();
        std::mem::replace(&mut ticket.answered, calls) != calls
    }

    /// The stage; the task is woken when it changes. A ticket must stay with one task.
    pub fn watch(&self, ticket: &mut Ticket, cx: &Context<'_>) -> Stage {
        if !ticket.is_watching {
            ticket.is_watching = true;
            let waker = Some(cx.waker().clone());
            self.wakers.borrow_mut().insert(ticket.key, waker);
        }
        self.stage.get()
    }

    /// The connection is over.
    pub fn leave(&self, ticket: &Ticket) {
        self.wakers.borrow_mut().remove(&ticket.key);
        self.left.notify_waiters();
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.wakers.borrow().len()
    }

    /// Waits until fewer connections than this are open.
    pub async fn below(&self, limit: usize) {
        loop {
            let left = self.left.notified();
            if self.open() < limit {
                return;
            }
            left.await;
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}
