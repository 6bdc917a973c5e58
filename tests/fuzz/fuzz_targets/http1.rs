//! Connections that speak HTTP/1, or pretend to: every request that begins ends once, and how bytes are cut into
//! pieces changes nothing, nor whether the observer sees the bytes of bodies.

#![no_main]

use coalmine_agent::observer::{Http1, Observer};
use coalmine_fuzz::connection::{check, check_unseen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check::<Http1>(data);
    check::<Observer>(data);
    check_unseen(data);
});
