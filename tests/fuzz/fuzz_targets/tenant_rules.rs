//! Rules for tenants, and a request that they are asked about: rules up to an empty line, the target, headers.

#![no_main]

use coalmine_agent::tenant::{Found, Head, Header, find};
use coalmine_proto::{
    names::TenantName,
    rule::{MAX_RULES, Rule, parse_list},
};
use libfuzzer_sys::fuzz_target;

/// A request's head, one line for the target and one for each header.
struct Lines<'a> {
    target: &'a [u8],
    headers: Vec<(Vec<u8>, &'a [u8])>,
}

impl<'a> Lines<'a> {
    fn read(text: &'a [u8]) -> Self {
        let mut lines = text.split(|byte| *byte == b'\n');
        let target = lines.next().unwrap_or_default();
        let headers = lines.filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let (name, value) = line.split_at(colon);
            Some((name.to_ascii_lowercase(), value[1..].trim_ascii()))
        });
        Self {
            target,
            headers: headers.collect(),
        }
    }
}

impl Head for Lines<'_> {
    fn header(&self, name: &str) -> Header<'_> {
        let named = self.headers.iter().filter(|(other, _)| other == name.as_bytes());
        Header::of(named.map(|(_, value)| *value))
    }

    fn host(&self) -> Header<'_> {
        self.header("host")
    }

    fn target(&self) -> &[u8] {
        self.target
    }
}

fuzz_target!(|data: &[u8]| {
    let at = data.windows(2).position(|two| two == b"\n\n");
    let (rules, head) = match at {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (data, &[][..]),
    };
    let Ok(text) = std::str::from_utf8(rules) else {
        return;
    };
    for text in text.split_whitespace() {
        match text.parse::<Rule>() {
            // What is written is read as the same.
            Ok(rule) => assert_eq!(rule.to_string().parse::<Rule>().as_ref(), Ok(&rule)),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let Ok(rules) = parse_list([text]) else {
        return;
    };
    assert!(rules.len() <= MAX_RULES);
    let head = Lines::read(head);
    let found = find(&rules, &head);
    if let Found::Name(name) = &found {
        TenantName::parse(name.as_bytes()).unwrap();
    }
    // The first that applies decides, whatever the others are.
    let mut each = rules.iter().map(|rule| find(std::slice::from_ref(rule), &head));
    let first = each.find(|found| *found != Found::Missing);
    assert_eq!(first.unwrap_or(Found::Missing), found);
});
