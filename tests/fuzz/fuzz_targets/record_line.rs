//! Lines of the decision log. What a reader accepts a writer would have written, and what it refuses leaves it as it
//! was.

#![no_main]

use coalmine_fuzz::HERE;
use coalmine_judge::chain::{Chain, Hash};
use libfuzzer_sys::fuzz_target;

/// Puts in what only the log knows, so that lines may be left out, doubled and moved.
fn complete(line: &[u8], chain: &Chain) -> Vec<u8> {
    let Ok(line) = std::str::from_utf8(line) else {
        return line.to_vec();
    };
    let prev = format!("\"prev\":\"{}\"", chain.head().unwrap_or(Hash::ZERO));
    let seq = format!("\"seq\":{}", chain.size());
    line.replace(&format!("\"prev\":\"{HERE}\""), &prev)
        .replace(&format!("\"seq\":{HERE}"), &seq)
        .into_bytes()
}

fuzz_target!(|data: &[u8]| {
    let (mut read, mut written) = (Chain::default(), Chain::default());
    for line in data.split(|byte| *byte == b'\n') {
        let line = complete(line, &read);
        match read.accept(&line) {
            Ok(record) => {
                assert_eq!(record.to_line().as_bytes(), line);
                assert_eq!(read.head(), Some(Hash::leaf(&line)));
                let (again, text, _) = written
                    .append(&record.log, record.time_ms, record.body.clone())
                    .unwrap();
                assert_eq!(text.as_bytes(), line);
                assert_eq!(again, record);
            }
            Err(error) => assert_eq!(error.seq, read.size()),
        }
        assert_eq!(read.checkpoint(), written.checkpoint());
        assert_eq!(read.keys(), written.keys());
    }
});
