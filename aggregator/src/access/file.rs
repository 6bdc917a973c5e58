//! The file of tokens, and what a token looks like.
//!
//! ```text
//! # a comment
//! SHA-256 NAME SCOPES SERVICES [until=TIME]
//!
//! SHA-256   of the token, 64 hexadecimal digits
//! NAME      who has it; stands in records as the actor
//! SCOPES    gate, rollout, override, audit; with commas
//! SERVICES  names with commas; * stands for any characters
//! TIME      when it stops being good (RFC 3339)
//! ```
//!
//! A token is `cmt_` and 32 random bytes in base64url. Nothing else is taken for one, so that none can be guessed.
//! Errors never repeat a word of a line, which may be a token in the wrong place.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    io::{self, Read as _},
    path::Path,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use coalmine_judge::chain::Hash;
use coalmine_proto::names::check_name;
use jiff::Timestamp;

use super::Scope;

/// Most bytes of a file of tokens.
const MAX_FILE_BYTES: usize = 1 << 20;

/// Most tokens of a file.
const MAX_TOKENS: usize = 10_000;

/// How a token begins.
const PREFIX: &str = "cmt_";

/// How many random bytes a token has, and how many characters they are.
const TOKEN_BYTES: usize = 32;
const TOKEN_CHARACTERS: usize = 43;

/// Who presents no token; no token has this name.
const ANONYMOUS: &str = "anonymous";

/// Stands for any characters in a service's name.
const ANY: char = '*';

/// What whoever has a token may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Who has it.
    pub(crate) name: Arc<str>,
    /// What it is good for.
    pub(crate) scopes: BTreeSet<Scope>,
    /// For which services, as patterns.
    pub(crate) services: Vec<String>,
    /// When it stops being good.
    pub(crate) until: Option<Timestamp>,
}

impl Grant {
    /// That of whoever presents no token: for every service, for ever.
    pub(super) fn anonymous(scopes: BTreeSet<Scope>) -> Self {
        Self {
            name: ANONYMOUS.into(),
            scopes,
            services: vec![ANY.to_string()],
            until: None,
        }
    }

    pub(crate) fn has_expired(&self, now_ms: u64) -> bool {
        // A moment before 1970 is over in any case.
        let end = |until: Timestamp| u64::try_from(until.as_millisecond()).unwrap_or(0);
        self.until.is_some_and(|until| end(until) <= now_ms)
    }

    pub(super) fn is_for(&self, service: &str) -> bool {
        self.services.iter().any(|pattern| matches(pattern, service))
    }
}

/// A token of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its line, from 1.
    pub(crate) line: usize,
    /// The token's hash.
    pub(crate) hash: Hash,
    /// What it is good for.
    pub(crate) grant: Grant,
}

/// The line of the file.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Grant {
            name,
            scopes,
            services,
            until,
        } = &self.grant;
        write!(f, "{} {name} {} {}", self.hash, join(scopes), join(services))?;
        match until {
            Some(until) => write!(f, " until={until}"),
            None => Ok(()),
        }
    }
}

/// Writes a list as the file has it.
pub(crate) fn join<T: ToString>(list: impl IntoIterator<Item = T>) -> String {
    let words: Vec<_> = list.into_iter().map(|word| word.to_string()).collect();
    words.join(",")
}

/// Makes a token.
pub(crate) fn make() -> Result<String, getrandom::Error> {
    let mut secret = [0; TOKEN_BYTES];
    getrandom::fill(&mut secret)?;
    Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret)))
}

/// Whether this has the form of a token.
pub(super) fn is_token(text: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    text.strip_prefix(PREFIX)
        .is_some_and(|secret| secret.len() == TOKEN_CHARACTERS && secret.bytes().all(is_digit))
}

/// Reads a file of tokens whole, if it is not too large.
pub(crate) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = File::open(path)?;
    file.take(MAX_FILE_BYTES as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MAX_FILE_BYTES {
        return Err(io::Error::other(format!(
            "it has more than {MAX_FILE_BYTES} bytes"
        )));
    }
    Ok(text)
}

/// Reads the lines; else the number of a line, and what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Vec<Entry>, (usize, String)> {
    let (mut entries, mut names, mut hashes) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for (number, line) in (1..).zip(text.lines()) {
        let refuse = |problem: String| (number, problem);
        let Some(entry) = entry(number, line).map_err(refuse)? else {
            continue;
        };
        if let Some(first) = names.insert(Arc::clone(&entry.grant.name), number) {
            return Err(refuse(format!(
                "the name {} stands on line {first} too; give each token its own",
                entry.grant.name
            )));
        }
        if let Some(first) = hashes.insert(entry.hash, number) {
            return Err(refuse(format!("the same token stands on line {first} too")));
        }
        if entries.len() == MAX_TOKENS {
            return Err(refuse(format!("there are more than {MAX_TOKENS} tokens")));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(number: usize, line: &str) -> Result<Option<Entry>, String> {
    let line = line.split('#').next().unwrap_or_default();
    let words: Vec<_> = line.split_whitespace().collect();
    let (hash, name, scopes, services, end) = match words[..] {
        [] => return Ok(None),
        [hash, name, scopes, services] => (hash, name, scopes, services, None),
        [hash, name, scopes, services, end] => (hash, name, scopes, services, Some(end)),
        _ => {
            let problem = "a line has the SHA-256 of a token in hexadecimal, a name, scopes, services, and until=TIME \
                           if it ends";
            return Err(problem.to_owned());
        }
    };
    let hash = hash.to_ascii_lowercase().parse::<Hash>();
    let hash = hash.map_err(|_| "the first word is not 64 hexadecimal digits, as `sha256sum` prints them")?;
    let end = end.map(|end| {
        let time = end.strip_prefix("until=");
        time.ok_or_else(|| "the fifth word is not until=TIME".to_owned())
            .and_then(until)
    });
    let grant = Grant {
        name: self::name(name)?.into(),
        scopes: scopes.split(',').map(scope).collect::<Result<_, _>>()?,
        services: services.split(',').map(service).collect::<Result<_, _>>()?,
        until: end.transpose()?,
    };
    Ok(Some(Entry {
        line: number,
        hash,
        grant,
    }))
}

/// Reads the name of a token.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let name = check_name(text.as_bytes()).map_err(|error| format!("the name {error}"))?;
    if name == ANONYMOUS {
        return Err(format!(
            "the name {ANONYMOUS} is that of whoever presents no token"
        ));
    }
    Ok(name.to_owned())
}

fn scope(text: &str) -> Result<Scope, String> {
    Scope::parse(text).ok_or_else(|| format!("a scope is one of {}", join(Scope::ALL)))
}

/// Reads the name of a service, or a pattern.
pub(crate) fn service(text: &str) -> Result<String, String> {
    // The pattern is a name where its stars stand for characters.
    check_name(text.replace(ANY, "x").as_bytes())
        .map_err(|error| format!("the service {error}; * stands for any"))?;
    Ok(text.to_owned())
}

/// Reads when a token stops being good.
pub(crate) fn until(text: &str) -> Result<Timestamp, String> {
    text.parse::<Timestamp>()
        .map_err(|_| "the time is not written like 2027-01-01T00:00:00Z".to_owned())
}

/// Whether the name is one of those that the pattern stands for.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once(ANY) else {
        return pattern == name;
    };
    let (middle, last) = rest.rsplit_once(ANY).unwrap_or(("", rest));
    let inner = name.strip_prefix(first);
    let Some(mut inner) = inner.and_then(|inner| inner.strip_suffix(last)) else {
        return false;
    };
    // What stands between two stars is found as early as it can be, which leaves most for the others.
    middle.split(ANY).all(|part| match inner.split_once(part) {
        Some((_, after)) => {
            inner = after;
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of `abc`, from FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// SHA-256 of the message of FIPS 180-2, appendix B.2.
    const OTHER: &str = "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1";

    #[test]
    fn a_file_reads_back() {
        let text = format!(
            "# the shop\n\n{ABC} ci/checkout gate,rollout checkout*,cart until=2027-01-01T00:00:00Z\n\
             {} auditor audit * # since May\n",
            OTHER.to_ascii_uppercase()
        );
        let entries = parse(&text).unwrap();
        let [first, second] = &entries[..] else {
            panic!("{entries:?}");
        };
        assert_eq!((first.line, &*first.grant.name), (3, "ci/checkout"));
        assert_eq!(first.grant.scopes, BTreeSet::from([Scope::Gate, Scope::Rollout]));
        assert_eq!(first.grant.services, ["checkout*", "cart"]);
        assert_eq!(
            first.to_string(),
            format!("{ABC} ci/checkout gate,rollout checkout*,cart until=2027-01-01T00:00:00Z")
        );
        assert_eq!((second.line, second.grant.until), (4, None));
        assert_eq!(second.to_string(), format!("{OTHER} auditor audit *"));
        assert_eq!(parse("# nobody\n"), Ok(Vec::new()), "the last one may be revoked");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_line() {
        let name = "n".repeat(129);
        for (text, line, says) in [
            ("\nabc ci gate *".to_owned(), 2, "64 hexadecimal"),
            (ABC.to_owned(), 1, "a line has"),
            (format!("{ABC} ci gate"), 1, "a line has"),
            (format!("{ABC} ci gate * until=x more"), 1, "a line has"),
            (format!("{ABC} ci gate * 2027-01-01T00:00:00Z"), 1, "until=TIME"),
            (
                format!("{ABC} ci gate * until=2027-13-01"),
                1,
                "2027-01-01T00:00:00Z",
            ),
            (format!("{ABC} c,i gate *"), 1, "the name has the character"),
            (format!("{ABC} {name} gate *"), 1, "129 bytes long"),
            (format!("{ABC} anonymous gate *"), 1, "presents no token"),
            (format!("{ABC} ci gates *"), 1, "gate,rollout,override,audit"),
            (format!("{ABC} ci gate,, *"), 1, "gate,rollout,override,audit"),
            (format!("{ABC} ci GATE *"), 1, "gate,rollout,override,audit"),
            (format!("{ABC} ci gate cart,"), 1, "the service is empty"),
            (format!("{ABC} ci gate c?rt"), 1, "the service has the character"),
            (format!("{ABC} ci gate *\n{OTHER} ci gate *"), 2, "line 1 too"),
            (format!("{ABC} ci gate *\n\n{ABC} cd gate *"), 3, "same token"),
        ] {
            let (found, problem) = parse(&text).unwrap_err();
            assert_eq!(found, line, "{text}");
            assert!(problem.contains(says), "{text}: {problem}");
        }
        let many: String = (0..=MAX_TOKENS)
            .map(|number| format!("{} t{number} gate *\n", Hash::of(number.to_string().as_bytes())))
            .collect();
        let (line, problem) = parse(&many).unwrap_err();
        assert_eq!(line, MAX_TOKENS + 1);
        assert!(problem.contains("more than 10000"), "{problem}");
    }

    #[test]
    fn a_line_is_never_repeated_in_an_error() {
        let secret = make().unwrap();
        for line in [
            format!("{secret} ci gate *"),
            format!("{ABC} ci {secret} *"),
            format!("{ABC} ci gate * {secret}"),
            format!("{ABC} ci gate * until={secret}"),
        ] {
            let (_, problem) = parse(&line).unwrap_err();
            assert!(!problem.contains(&secret), "{problem}");
        }
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        std::fs::write(&path, "#".repeat(MAX_FILE_BYTES)).unwrap();
        assert_eq!(read(&path).unwrap().len(), MAX_FILE_BYTES);
        std::fs::write(&path, "#".repeat(MAX_FILE_BYTES + 1)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("more than 1048576"));
    }

    #[test]
    fn patterns() {
        for (pattern, name, wanted) in [
            ("checkout", "checkout", true),
            ("checkout", "checkout-eu", false),
            ("*", "checkout", true),
            ("checkout*", "checkout", true),
            ("checkout*", "checkout-eu", true),
            ("checkout*", "a-checkout", false),
            ("*-eu", "checkout-eu", true),
            ("*-eu", "checkout-eu-2", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a*bc*c", "abc", false),
            ("a*bc*c", "abcc", true),
            ("**", "x", true),
            ("*ab*ab*", "ab", false),
            ("*ab*ab*", "abab", true),
        ] {
            assert_eq!(matches(pattern, name), wanted, "{pattern} {name}");
        }
    }

    #[test]
    fn tokens_have_a_form() {
        let (one, two) = (make().unwrap(), make().unwrap());
        assert!(is_token(&one) && is_token(&two) && one != two);
        for other in [
            "",
            "abc",
            "cmt_",
            &one[..46],
            &format!("{one}a"),
            &one.replace("cmt_", "cmt-"),
        ] {
            assert!(!is_token(other), "{other}");
        }
        assert!(!is_token(&format!("cmt_{}", "ü".repeat(43))));
        assert!(!is_token(&format!("cmt_{}", "+".repeat(43))));
    }
}
