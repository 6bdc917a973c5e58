//! The tables that header blocks refer to: the static one and what both dynamic ones have in common
//! (RFC 7541, section 2.3 and appendix A).

use std::collections::VecDeque;

/// The size of an entry without its name and value (RFC 7541, section 4.1).
pub(super) const ENTRY_OVERHEAD: usize = 32;

/// The size of a table that nobody has changed (RFC 9113, section 6.5.2).
pub(super) const DEFAULT_SIZE: usize = 4096;

/// Names and values, from index 1 on (RFC 7541, appendix A).
static STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// The name and value of an index, if it is one of the static table.
pub(super) fn statics(index: usize) -> Option<(&'static str, &'static str)> {
    STATIC.get(index.checked_sub(1)?).copied()
}

/// What a dynamic table keeps of a field.
pub(super) trait Entry {
    /// The size of the whole field (RFC 7541, section 4.1), whatever is kept of it.
    fn size(&self) -> usize;
}

/// A dynamic table. It takes no memory before something is put in.
#[derive(Debug)]
pub(super) struct Dynamic<E> {
    /// The newest is the first.
    entries: VecDeque<E>,
    size: usize,
    max_size: usize,
}

impl<E> Default for Dynamic<E> {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            size: 0,
            max_size: DEFAULT_SIZE,
        }
    }
}

impl<E: Entry> Dynamic<E> {
    /// The entry of an index; the first is the one after those of the static table.
    pub(super) fn get(&self, index: usize) -> Option<&E> {
        self.entries.get(index.checked_sub(STATIC.len() + 1)?)
    }

    pub(super) fn oldest(&self) -> Option<&E> {
        self.entries.back()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut E> {
        self.entries.iter_mut()
    }

    /// Evicts what has to go for an entry of this size. False if the entry is larger than the table, which
    /// is empty then (RFC 7541, section 4.4).
    pub(super) fn make_room(&mut self, size: usize) -> bool {
        self.shrink(self.max_size.saturating_sub(size));
        size <= self.max_size
    }

    /// Adds an entry for which there is room.
    pub(super) fn push(&mut self, entry: E) {
        self.size = self.size.saturating_add(entry.size());
        self.entries.push_front(entry);
    }

    pub(super) fn max_size(&self) -> usize {
        self.max_size
    }

    pub(super) fn resize(&mut self, max_size: usize) {
        self.max_size = max_size;
        self.shrink(max_size);
    }

    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        self.entries.capacity().saturating_mul(size_of::<E>())
    }

    /// The sum of the entries' sizes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.size
    }

    fn shrink(&mut self, size: usize) {
        while self.size > size
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size = self.size.saturating_sub(oldest.size());
        }
    }
}
