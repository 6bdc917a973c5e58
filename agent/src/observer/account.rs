//! What the observers of a thread hold in memory, all together.
//!
//! Each connection has a bound of its own, but many that reach theirs at once (heads that never end, thousands of
//! streams) would be too much. So what a connection holds beyond a little counts against one limit for all, and a
//! connection that would exceed it is not followed any more.

use std::cell::Cell;

/// What a connection may hold in any case, in bytes: more than a busy one of HTTP/2 needs.
const EACH: usize = 16 * 1024;

/// What all connections of the thread may hold beyond that.
const ALL: usize = 32 * 1024 * 1024;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// What one connection holds beyond [`EACH`].
#[derive(Debug, Default)]
pub(super) struct Account {
    counted: usize,
}

impl Account {
    /// Notes what the connection holds now; false if it is more than there is room for.
    pub(super) fn note(&mut self, bytes: usize) -> bool {
        let bytes = bytes.saturating_sub(EACH);
        if bytes == self.counted {
            return true;
        }
        let grows = bytes > self.counted;
        let held = HELD.get().saturating_sub(self.counted).saturating_add(bytes);
        HELD.set(held);
        self.counted = bytes;
        !grows || held <= ALL
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.note(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_is_always_allowed_and_much_only_to_some() {
        let mut first = Account::default();
        assert!(first.note(EACH + ALL));
        let (mut second, mut third) = (Account::default(), Account::default());
        assert!(second.note(EACH));
        assert!(!third.note(EACH + 1));
        assert!(third.note(EACH), "less is no more");
        drop(first);
        assert!(third.note(EACH + ALL));
        assert!(!second.note(EACH + 1));
        drop((second, third));
        assert_eq!(HELD.get(), 0);
    }
}
