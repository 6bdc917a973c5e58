//! What a message may say of the application's connection pools. A batch that says more is refused.

/// Most pools of a window.
pub const MAX_POOLS: usize = 64;

/// Longest name of a pool, in bytes of printable ASCII.
pub const MAX_NAME_BYTES: usize = 128;

/// Most events or connections of one pool in a window.
pub const MAX_COUNT: u64 = 1 << 32;

/// Longest time that the callers of one pool can have waited in a window, all together, in nanoseconds: 36 years.
pub const MAX_WAIT_NS: u64 = 1 << 60;
