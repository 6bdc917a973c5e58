//! Where the application's metrics are: `--pool-scrape`.

use std::{fmt, str::FromStr};

use http::{HeaderValue, Uri, uri::PathAndQuery};

/// Where most applications have them.
const DEFAULT_PATH: &str = "/metrics";

/// `http://HOST[:PORT][/PATH]`; the path is `/metrics` unless one is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrapeUrl {
    host: String,
    port: u16,
    /// As in the header `host`.
    authority: HeaderValue,
    path: PathAndQuery,
}

// === impl ScrapeUrl ===

impl ScrapeUrl {
    /// Name or address, without the brackets of IPv6, and port.
    pub(super) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    pub(super) fn authority(&self) -> &HeaderValue {
        &self.authority
    }

    pub(super) fn path(&self) -> &PathAndQuery {
        &self.path
    }
}

impl FromStr for ScrapeUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a URL, as in http://127.0.0.1:8080/metrics");
        let uri: Uri = text.parse().map_err(|_| bad())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                let text = "TLS to the application's metrics is not supported; use http:// in the pod";
                return Err(text.to_owned());
            }
            _ => return Err(bad()),
        }
        let authority = uri.authority().ok_or_else(bad)?;
        let (whole, host) = (authority.as_str(), authority.host());
        if whole.contains('@') {
            return Err("a user name in the URL of the metrics is not supported".to_owned());
        }
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if whole == host => 80,
            None => return Err(bad()),
        };
        let name = host.trim_start_matches('[').trim_end_matches(']');
        if name.is_empty() || port == 0 {
            return Err(bad());
        }
        let path = match uri.path_and_query() {
            // What is parsed has a path even where none was written.
            _ if text.len() == "http://".len() + whole.len() => PathAndQuery::from_static(DEFAULT_PATH),
            Some(path) if path.as_str().starts_with('/') => path.clone(),
            _ => return Err(bad()),
        };
        Ok(Self {
            host: name.to_owned(),
            port,
            authority: HeaderValue::from_str(whole).map_err(|_| bad())?,
            path,
        })
    }
}

impl fmt::Display for ScrapeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = self.authority.to_str().unwrap_or_default();
        write!(f, "http://{authority}{}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed() {
        for (text, address, shown) in [
            (
                "http://127.0.0.1:8080/metrics",
                ("127.0.0.1", 8080),
                "http://127.0.0.1:8080/metrics",
            ),
            ("http://app", ("app", 80), "http://app/metrics"),
            ("http://app/", ("app", 80), "http://app/"),
            ("http://[::1]:9/a?b=c", ("::1", 9), "http://[::1]:9/a?b=c"),
        ] {
            let url: ScrapeUrl = text.parse().unwrap();
            assert_eq!(
                (url.address(), url.to_string().as_str()),
                (address, shown),
                "{text}"
            );
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        for text in [
            "",
            "127.0.0.1:8080/metrics",
            "/metrics",
            "http://",
            "http:///metrics",
            "http://app:99999/metrics",
            "http://app:x/metrics",
            "http://app:0/metrics",
            "http://:8080/metrics",
            "http://app?x",
            "ftp://app/metrics",
        ] {
            let error = text.parse::<ScrapeUrl>().unwrap_err();
            assert!(
                error.contains("as in http://127.0.0.1:8080/metrics"),
                "{text}: {error}"
            );
        }
        let error = "https://app/metrics".parse::<ScrapeUrl>().unwrap_err();
        assert!(error.contains("use http://"), "{error}");
        let error = "http://me:secret@app/metrics".parse::<ScrapeUrl>().unwrap_err();
        assert!(
            error.contains("a user name") && !error.contains("secret"),
            "{error}"
        );
    }
}
