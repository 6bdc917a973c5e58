//! Who an agent is: what it presents when its session begins, and what that lets it say.

use std::{collections::BTreeMap, path::Path};

use coalmine_judge::chain::Hash;

use crate::{
    book::Introduction,
    kubernetes::tokens::{NotBelieved, Reviewer},
};

/// Most bytes of a file of tokens.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Stands for every service in a file of tokens.
const ANY: &str = "*";

/// How agents are told apart from whoever else reaches the port.
#[derive(Debug)]
pub(crate) enum Identity {
    /// By the tokens of their pods, which the cluster vouches for; a service's may be in this namespace only.
    Cluster(Reviewer, BTreeMap<String, String>),
    /// By tokens that somebody has given out.
    Tokens(Tokens),
}

/// Tokens that somebody has given out, as the hashes of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tokens(BTreeMap<Hash, String>);

impl Identity {
    /// Whether whoever presents this may speak for the agent.
    pub(crate) async fn check(&self, token: Option<&str>, who: &Introduction) -> Result<(), NotBelieved> {
        let Some(token) = token else {
            let why = "it presents no token; give the agent its --token-file";
            return Err(NotBelieved::Refused(why.to_owned()));
        };
        let presenter = match self {
            Self::Tokens(tokens) => {
                let checked = tokens.check(token, &who.service);
                return checked.map_err(NotBelieved::Refused);
            }
            Self::Cluster(reviewer, namespaces) => {
                let presenter = reviewer.review(token).await?;
                let only = namespaces.get(&who.service);
                if only.is_some_and(|only| *only != presenter.namespace) {
                    let (service, only) = (&who.service, only.map_or("", String::as_str));
                    let why = format!("it is that of {presenter}, and {service} is measured in {only} only");
                    return Err(NotBelieved::Refused(why));
                }
                presenter
            }
        };
        let why = match &presenter.pod {
            Some(pod) if pod.uid == who.instance => return Ok(()),
            Some(_) => format!(
                "its token is that of {presenter}, and it says that it is {}",
                who.instance
            ),
            None => format!("its token, of {presenter}, is bound to no pod; mount a projected one"),
        };
        Err(NotBelieved::Refused(why))
    }
}

impl Tokens {
    /// Reads a file with a line for each token: the SHA-256 of the token in hexadecimal, and the service whose agents
    /// have it, or `*`.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let place = path.display();
        let told = |error: std::io::Error| format!("cannot read the tokens {place}: {error}");
        if std::fs::metadata(path).map_err(told)?.len() > MAX_FILE_BYTES {
            return Err(format!(
                "{place}: a file of tokens has at most {MAX_FILE_BYTES} bytes"
            ));
        }
        let text = std::fs::read_to_string(path).map_err(told)?;
        Self::parse(&text).map_err(|(line, problem)| format!("{place}:{line}: {problem}"))
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut tokens = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<_> = line.split_whitespace().collect();
            let (hash, service) = match words[..] {
                [] => continue,
                [hash, service] => (hash, service),
                _ => {
                    let problem = "a line has the SHA-256 of a token in hexadecimal, and a service or *";
                    return Err((number, problem.to_owned()));
                }
            };
            let hash = hash.to_ascii_lowercase().parse::<Hash>().map_err(|_| {
                let problem = "the first word is not 64 hexadecimal digits, as `sha256sum` prints them";
                (number, problem.to_owned())
            })?;
            if tokens.insert(hash, service.to_owned()).is_some() {
                return Err((number, "the same token stands here twice".to_owned()));
            }
        }
        if tokens.is_empty() {
            return Err((1, "there is no token, so no agent could connect".to_owned()));
        }
        Ok(Self(tokens))
    }

    fn check(&self, token: &str, service: &str) -> Result<(), String> {
        match self.0.get(&Hash::of(token.as_bytes())) {
            None => Err("its token is not known".to_owned()),
            Some(owner) if owner == ANY || owner == service => Ok(()),
            Some(owner) => Err(format!(
                "its token is for agents of {owner}, and it measures {service}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of `abc`, from FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_token_is_for_its_service() {
        let tokens = Tokens::parse(&format!("# of the shop\n\n{ABC} checkout # since May\n")).unwrap();
        assert_eq!(tokens.check("abc", "checkout"), Ok(()));
        assert!(tokens.check("abc", "cart").unwrap_err().contains("checkout"));
        assert!(tokens.check("abd", "checkout").unwrap_err().contains("not known"));
        let all = Tokens::parse(&format!("{ABC} *")).unwrap();
        assert_eq!(all.check("abc", "cart"), Ok(()));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_line() {
        for (text, line, says) in [
            ("", 1, "no token"),
            ("\nabc checkout", 2, "64 hexadecimal"),
            (ABC, 1, "a service or *"),
            (&format!("{ABC} a b"), 1, "a service or *"),
            (&format!("{ABC} a\n{ABC} b"), 2, "twice"),
            (&format!("{}ü {}", &ABC[..62], "a"), 1, "64 hexadecimal"),
        ] {
            let (found, problem) = Tokens::parse(text).unwrap_err();
            assert_eq!(found, line, "{text}");
            assert!(problem.contains(says), "{text}: {problem}");
        }
    }
}
