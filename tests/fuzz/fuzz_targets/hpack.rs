//! Header blocks of HTTP/2, in frames that are right: a client's open a stream each, the application's answer the
//! oldest. A block in one frame and in several must be read as the same.

#![no_main]

use std::collections::VecDeque;

use coalmine_agent::observer::Http2;
use coalmine_fuzz::connection::{Deed, Side, Turn, frame, read, whole};
use libfuzzer_sys::fuzz_target;

/// The largest frame that a peer takes unasked (RFC 9113, section 4.2).
const MAX_FRAME_BYTES: usize = 16_384;

/// What both sides begin with: the client's preface (RFC 9113, section 3.4), and SETTINGS without a setting.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Most parts of a block.
const MOST_PARTS: usize = 4;

/// The block in frames of so many bytes, but not too many frames.
fn frames(stream: u32, block: &[u8], each: usize) -> Vec<u8> {
    let each = each.max(block.len().div_ceil(MOST_PARTS)).max(1);
    let mut parts: VecDeque<&[u8]> = block.chunks(each).collect();
    let first = parts.pop_front().unwrap_or_default();
    let end = |is_last: bool| if is_last { END_HEADERS } else { 0 };
    let mut bytes = frame(HEADERS, END_STREAM | end(parts.is_empty()), stream, first);
    while let Some(part) = parts.pop_front() {
        bytes.extend(frame(CONTINUATION, end(parts.is_empty()), stream, part));
    }
    bytes
}

fn connection(blocks: &[Turn<'_>], each: usize) -> Vec<(Side, Vec<u8>)> {
    let mut all = vec![
        (Side::Client, PREFACE.to_vec()),
        (Side::Application, SETTINGS.to_vec()),
    ];
    let (mut next, mut open) = (1, VecDeque::new());
    for (side, deed) in blocks {
        let Deed::Sends(block) = deed else {
            continue;
        };
        let block = &block[..block.len().min(MAX_FRAME_BYTES)];
        let stream = match side {
            Side::Client => {
                open.push_back(next);
                next += 2;
                Some(next - 2)
            }
            Side::Application => open.pop_front(),
        };
        if let Some(stream) = stream {
            all.push((*side, frames(stream, block, each)));
        }
    }
    all
}

fuzz_target!(|data: &[u8]| {
    let Some((seed, blocks)) = read(data) else {
        return;
    };
    let said = |each: usize| {
        let connection = connection(&blocks, each);
        let turns: Vec<Turn<'_>> = connection
            .iter()
            .map(|(side, bytes)| (*side, Deed::Sends(bytes)))
            .collect();
        whole::<Http2>(&turns)
    };
    assert_eq!(said(MAX_FRAME_BYTES), said(1 + seed as usize % 64));
});
