//! Who may do what, for each way of configuring it.

use super::*;

const NOW_MS: u64 = 1_800_000_000_000;

fn settings(tokens: Option<&Path>, anonymous: &[Scope]) -> Settings {
    Settings {
        tokens: tokens.map(Path::to_owned),
        anonymous: anonymous.to_vec(),
        rate_limit: 2_000,
    }
}

/// A token, the same each time.
fn token(letter: &str) -> String {
    format!("cmt_{}", letter.repeat(43))
}

fn line(token: &str, rest: &str) -> String {
    format!("{} {rest}\n", Hash::of(token.as_bytes()))
}

/// A program at this address, that names the aggregator as one beside it does.
fn from(text: &str) -> Sender {
    Sender {
        peer: Some(text.parse().unwrap()),
        may_be_near: true,
    }
}

/// Where nothing is known of who sends.
const NOWHERE: Sender = Sender {
    peer: None,
    may_be_near: true,
};

/// What a caller without a token may do.
fn scopes(access: &Arc<Access>, sender: Sender) -> Vec<Scope> {
    let caller = access.caller(None, sender, NOW_MS).unwrap();
    assert_eq!(caller.name(), "anonymous");
    let may = |scope: &Scope| caller.may(*scope, "checkout").is_ok();
    Scope::ALL.into_iter().filter(may).collect()
}

#[test]
fn without_a_token_it_depends_on_what_is_configured_and_on_the_peer() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    std::fs::write(&file, line(&token("a"), "ci gate *")).unwrap();
    let (all, gate, none): (&[Scope], &[Scope], &[Scope]) = (&Scope::ALL, &[Scope::Gate], &[]);
    for (tokens, anonymous, local, elsewhere) in [
        (None, none, all, none),
        (None, gate, all, gate),
        (Some(&*file), none, none, none),
        (Some(&*file), gate, gate, gate),
    ] {
        let access = Access::open(&settings(tokens, anonymous)).unwrap();
        let told = format!("{tokens:?} {anonymous:?}");
        for peer in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(scopes(&access, from(peer)), local, "{told} {peer}");
            let page = Sender {
                may_be_near: false,
                ..from(peer)
            };
            assert_eq!(scopes(&access, page), elsewhere, "{told} {peer}");
        }
        for peer in ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "0.0.0.0"] {
            assert_eq!(scopes(&access, from(peer)), elsewhere, "{told} {peer}");
        }
        assert_eq!(scopes(&access, NOWHERE), elsewhere, "{told}");
    }
}

#[test]
fn a_refusal_says_what_to_do() {
    let open = |anonymous: &[Scope]| Access::open(&settings(None, anonymous)).unwrap();
    let refusal = |access: &Arc<Access>, scope| {
        let caller = access.caller(None, from("192.0.2.1"), NOW_MS).unwrap();
        caller.may(scope, "checkout").unwrap_err()
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    std::fs::write(&file, line(&token("a"), "ci gate *")).unwrap();
    let asks = Access::open(&settings(Some(&file), &[Scope::Gate])).unwrap();
    for (access, scope, says) in [
        (open(&[]), Scope::Gate, "give the aggregator --tokens"),
        (
            open(&[Scope::Gate]),
            Scope::Override,
            "give the aggregator --tokens",
        ),
        (asks, Scope::Override, "a token with the scope override"),
    ] {
        match refusal(&access, scope) {
            Denied::Unknown(problem) => assert!(problem.contains(says), "{problem}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_token_is_good_for_its_scopes_and_services_until_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let [ci, old] = ["a", "b"].map(token);
    let text =
        line(&ci, "ci gate,rollout checkout*,cart") + &line(&old, "old gate * until=2027-01-15T08:00:00Z");
    std::fs::write(&file, text).unwrap();
    let access = Access::open(&settings(Some(&file), &[])).unwrap();
    let caller = access.caller(Some(&ci), NOWHERE, NOW_MS).unwrap();
    assert_eq!(caller.name(), "ci");
    for (scope, service, says) in [
        (Scope::Gate, "checkout-eu", None),
        (Scope::Rollout, "cart", None),
        (Scope::Gate, "", None),
        (Scope::Override, "cart", Some("this needs override")),
        (Scope::Override, "", Some("this needs override")),
        (Scope::Gate, "basket", Some("is for checkout*,cart")),
    ] {
        match (caller.may(scope, service), says) {
            (Ok(()), None) => {}
            (Err(Denied::Forbidden(problem)), Some(says)) => {
                assert!(
                    problem.contains(says) && problem.contains("token ci"),
                    "{problem}"
                );
            }
            other => panic!("{scope} {service:?}: {other:?}"),
        }
    }
    // A service's name comes from outside, and is not repeated at any length.
    let denied = caller.may(Scope::Gate, &"x".repeat(60_000)).unwrap_err();
    assert!(denied.to_string().len() < 1_000);

    let by_body = caller.or_token(Some(&token("c"))).unwrap_err();
    assert!(
        matches!(by_body, Refusal::Denied(Denied::Unknown(_))),
        "{by_body:?}"
    );
    assert_eq!(caller.or_token(None).unwrap().name(), "ci");
    let anonymous = access.caller(None, NOWHERE, NOW_MS).unwrap();
    assert_eq!(anonymous.or_token(Some(&ci)).unwrap().name(), "ci");

    // 2027-01-15T08:00:00Z is NOW_MS.
    assert!(access.caller(Some(&old), NOWHERE, NOW_MS - 1).is_ok());
    for (token, says) in [
        (&*old, "the token old has expired at 2027-01-15T08:00:00Z"),
        (&*token("c"), "is not known"),
        ("", "is no token"),
        ("secret", "is no token"),
        (&*"x".repeat(100_000), "is no token"),
    ] {
        match access.caller(Some(token), from("127.0.0.1"), NOW_MS) {
            Err(Denied::Unknown(problem)) => assert!(problem.contains(says), "{problem}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_file_is_read_again_and_a_bad_one_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let problem = Access::open(&settings(Some(&file), &[])).unwrap_err();
    assert!(
        problem.contains(&file.display().to_string()) && problem.contains("coalmine token create"),
        "{problem}"
    );
    // Where it is said what everybody may do, it may come later.
    let access = Access::open(&settings(Some(&file), &[Scope::Gate])).unwrap();
    let [ci, cd] = ["a", "b"].map(token);
    let knows = |token: &str| access.caller(Some(token), NOWHERE, NOW_MS).is_ok();
    access.look();
    assert!(!knows(&ci));
    let write = |text: &str| {
        std::fs::write(&file, text).unwrap();
        access.look();
    };
    write(&line(&ci, "ci gate *"));
    assert!(knows(&ci));
    write("not a token\n");
    assert!(knows(&ci), "a bad file changes nothing");
    // As long as the one before.
    write(&line(&cd, "cd gate *"));
    assert!(knows(&ci) && !knows(&cd), "it may be half of a file");
    access.look();
    assert!(!knows(&ci) && knows(&cd));
    write("# nobody\n");
    assert!(knows(&cd));
    access.look();
    assert!(!knows(&cd), "the last one can be revoked");
    std::fs::remove_file(&file).unwrap();
    access.look();
    std::fs::write(&file, "not a token\n").unwrap();
    let problem = Access::open(&settings(Some(&file), &[Scope::Gate])).unwrap_err();
    assert!(problem.contains("tokens:1: a line has"), "{problem}");
}

#[test]
fn a_file_that_is_written_where_it_stands_takes_nobody_s_token() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let [ci, cd, more] = ["a", "b", "c"].map(token);
    let both = line(&ci, "ci gate *") + &line(&cd, "cd gate *");
    let all = both.clone() + &line(&more, "more gate *");
    std::fs::write(&file, &both).unwrap();
    let access = Access::open(&settings(Some(&file), &[])).unwrap();
    let caller = access.caller(Some(&cd), NOWHERE, NOW_MS).unwrap();
    let look_at = |text: &str| {
        std::fs::write(&file, text).unwrap();
        access.look();
    };
    let knows = |token: &str| access.caller(Some(token), NOWHERE, NOW_MS).is_ok();
    // Cut short in one place and another, each found once: never the same twice in a row.
    let first = line(&ci, "ci gate *");
    for text in ["", &first, &both, &first, "", &all] {
        look_at(text);
        assert!(knows(&ci) && knows(&cd), "{text}");
    }
    assert!(knows(&more), "what is added is taken at once");
    look_at(&first);
    assert!(caller.again().is_ok());
    access.look();
    assert!(knows(&ci) && !knows(&cd) && !knows(&more));
    assert!(
        matches!(caller.again(), Err(Denied::Unknown(_))),
        "it goes on with nothing"
    );
}

#[test]
fn a_token_is_one_caller_wherever_it_comes_from() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let ci = token("a");
    std::fs::write(&file, line(&ci, "ci gate *")).unwrap();
    let access = Access::open(&settings(Some(&file), &[])).unwrap();
    let key = |token: Option<&str>, peer| access.caller(token, from(peer), NOW_MS).unwrap().key();
    assert_eq!(key(Some(&ci), "192.0.2.1"), key(Some(&ci), "192.0.2.2"));
    assert_ne!(key(None, "192.0.2.1"), key(None, "192.0.2.2"));
    assert_ne!(key(Some(&ci), "192.0.2.1"), key(None, "192.0.2.1"));
}

#[test]
fn a_token_in_a_body_is_counted_like_one_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let [ci, cd] = ["a", "b"].map(token);
    std::fs::write(&file, line(&ci, "ci gate *") + &line(&cd, "cd gate *")).unwrap();
    let one_a_second = Settings {
        rate_limit: 1,
        ..settings(Some(&file), &[])
    };
    let access = Access::open(&one_a_second).unwrap();
    let anonymous = access.caller(None, from("192.0.2.1"), NOW_MS).unwrap();
    let has_to_wait = |token: &str, requests: u32| {
        (0..requests).any(|_| matches!(anonymous.or_token(Some(token)), Err(Refusal::TooFast(_))))
    };
    assert!(has_to_wait(&token("c"), 10 * UNKNOWN_A_SECOND), "nobody knows it");
    assert!(!has_to_wait(&ci, 1), "it is known, and not held up by that");
    assert!(has_to_wait(&ci, 10));
    assert!(!has_to_wait(&cd, 1), "each is counted alone");
}
