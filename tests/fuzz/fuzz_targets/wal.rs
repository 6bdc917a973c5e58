//! The write-ahead log of windows: as it comes, and as the payloads of frames whose lengths and checksums are right.

#![no_main]

use coalmine_aggregator::{
    book::{Book, Patience},
    ingest::Rebuild,
    store::{Entry, entries},
};
use coalmine_fuzz::{NOW_MS, frames};
use libfuzzer_sys::fuzz_target;

/// Puts payloads, with their lengths before them, into frames.
fn framed(mut data: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        for number in [length as u32, !(length as u32), crc32fast::hash(payload)] {
            all.extend(number.to_le_bytes());
        }
        all.extend(payload);
        data = rest;
    }
    all
}

fn read(bytes: &[u8]) -> (Vec<Entry>, Result<u64, String>) {
    let mut read = Vec::new();
    let whole = entries(bytes, |entry| read.push(entry));
    (read, whole)
}

fn check(bytes: &[u8]) {
    let (found, whole) = read(bytes);
    if let Ok(whole) = whole {
        // What is dropped at the end is not missed.
        let again = read(&bytes[..whole as usize]);
        assert_eq!(again, (found.clone(), Ok(whole)));
    }
    let written = frames(found.clone()).concat();
    assert_eq!(read(&written), (found.clone(), Ok(written.len() as u64)));
    let mut book = Book::new(Patience::default(), NOW_MS);
    let mut rebuild = Rebuild::default();
    for entry in found {
        rebuild.take(&mut book, entry, NOW_MS + 10_000);
    }
    book.disconnect_all(NOW_MS);
    book.image();
    book.evict(NOW_MS + 1_000_000, |_| None);
}

fuzz_target!(|data: &[u8]| {
    check(data);
    check(&framed(data));
});
