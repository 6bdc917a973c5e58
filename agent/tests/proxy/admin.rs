//! The admin server: what it answers, and to whom.

use std::net::TcpStream;

use crate::support::{Agent, Upstream, is_open, read_all};

/// As many connections as it has at a time (admin.rs).
const PLACES: usize = 128;

fn agent() -> Agent {
    Agent::start(Upstream::new().address())
}

#[test]
fn there_are_three_paths() {
    let agent = agent();
    for path in ["/livez", "/readyz", "/metrics", "/livez?verbose"] {
        assert_eq!(agent.get(path).0, 200, "{path}");
    }
    for path in ["/", "/live", "/livez/", "/metrics/x", "/debug/pprof", "/%6civez"] {
        let (status, text) = agent.get(path);
        assert_eq!(status, 404, "{path}");
        assert!(text.contains("/livez, /readyz and /metrics"), "{text}");
    }
}

#[test]
fn they_can_only_be_read() {
    let agent = agent();
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "WHATEVER"] {
        for path in ["/livez", "/readyz", "/metrics", "/quitquitquit"] {
            assert_eq!(agent.ask(method, path).0, 405, "{method} {path}");
        }
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(agent.ask("HEAD", path), (200, String::new()), "{path}");
    }
    assert_eq!(agent.ask("HEAD", "/"), (404, String::new()));
}

/// Each may be silent for 2 s. Whoever comes meanwhile waits, and is answered.
#[test]
fn connections_that_say_nothing_lose_their_places() {
    let agent = agent();
    let silent: Vec<TcpStream> = (0..PLACES).map(|_| agent.admin()).collect();
    assert_eq!(agent.get("/livez"), (200, "ok\n".to_owned()));
    assert!(!silent.iter().all(is_open), "more than {PLACES} have a place");
    for mut stream in silent {
        let said = read_all(&mut stream).unwrap();
        assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 408"), "{said:?}");
    }
}
