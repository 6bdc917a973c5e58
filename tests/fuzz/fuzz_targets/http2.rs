//! Connections that speak HTTP/2 with prior knowledge, or pretend to: every request that begins ends once, how bytes
//! are cut into pieces changes nothing, and memory is bounded.

#![no_main]

use coalmine_agent::observer::{Http2, Observer};
use coalmine_fuzz::connection::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check::<Http2>(data);
    check::<Observer>(data);
});
