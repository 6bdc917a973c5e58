//! What a pod says about its agent in annotations, and what the injector says for all pods that do not.
//!
//! | annotation, after `coalmine.dev/` | value | by default |
//! |---|---|---|
//! | `port` | name or number of the application's port | the only TCP port that containers declare |
//! | `service` | name of the service | the label `app.kubernetes.io/name` |
//! | `version` | its version | the label `app.kubernetes.io/version` |
//! | `tenant` | rules as of `--tenant`, with white space between them | none |
//! | `pool-port` | port of the application's database; 0 for none | the agent's |
//! | `pool-scrape` | `http://` URL of the application's metrics | none |
//! | `idle-timeout`, `drain` | `500ms`, `30s`, `5m` or `1h` | the agent's |
//! | `proxy-protocol` | `true` or `false` | `false` |
//! | `max-connections`, `max-tenants` | number | the agent's |
//! | `cpu-request`, `memory-request` | amount | `10m`, `16Mi` |
//! | `cpu-limit`, `memory-limit` | amount | none, `192Mi` |

use std::collections::BTreeMap;

use coalmine_proto::{names::check_name, rule};
use serde_json::{Map, Value};

use super::{Refusal, quantity, shown};

/// What the names of our labels and annotations begin with.
pub(super) const PREFIX: &str = "coalmine.dev/";

/// The annotation that says what was injected.
pub(super) const INJECTED: &str = "coalmine.dev/injected";

/// Longest duration that the agent takes, in milliseconds.
const MAX_DURATION_MS: u64 = 3_600_000;

/// What can be set for a pod, each by an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Setting {
    /// The application's port.
    Port,
    /// The service that is measured.
    Service,
    /// Its version.
    Version,
    /// Where a request's tenant stands.
    Tenant,
    /// The port of the application's database.
    PoolPort,
    /// Where the application's metrics are.
    PoolScrape,
    /// How long a connection may be silent.
    IdleTimeout,
    /// Whether the application is told the client's address.
    ProxyProtocol,
    /// Most connections at a time.
    MaxConnections,
    /// Most tenants that are told apart.
    MaxTenants,
    /// Longest wait for requests to end.
    Drain,
    /// CPU that is kept free for the agent.
    CpuRequest,
    /// Most CPU.
    CpuLimit,
    /// Memory that is kept free for the agent.
    MemoryRequest,
    /// Most memory.
    MemoryLimit,
}

/// The settings of one pod: its own, and the injector's for the rest. All are checked.
#[derive(Debug)]
pub(super) struct Chosen(BTreeMap<Setting, String>);

// === impl Setting ===

impl Setting {
    /// All settings, in the order in which they are listed everywhere.
    pub const ALL: [Self; 15] = [
        Self::Port,
        Self::Service,
        Self::Version,
        Self::Tenant,
        Self::PoolPort,
        Self::PoolScrape,
        Self::IdleTimeout,
        Self::ProxyProtocol,
        Self::MaxConnections,
        Self::MaxTenants,
        Self::Drain,
        Self::CpuRequest,
        Self::CpuLimit,
        Self::MemoryRequest,
        Self::MemoryLimit,
    ];

    /// The setting's name: that of its annotation, after `coalmine.dev/`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Service => "service",
            Self::Version => "version",
            Self::Tenant => "tenant",
            Self::PoolPort => "pool-port",
            Self::PoolScrape => "pool-scrape",
            Self::IdleTimeout => "idle-timeout",
            Self::ProxyProtocol => "proxy-protocol",
            Self::MaxConnections => "max-connections",
            Self::MaxTenants => "max-tenants",
            Self::Drain => "drain",
            Self::CpuRequest => "cpu-request",
            Self::CpuLimit => "cpu-limit",
            Self::MemoryRequest => "memory-request",
            Self::MemoryLimit => "memory-limit",
        }
    }

    /// The setting with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.as_str() == name)
    }

    /// Checks a value. An error goes on from the setting's name, and says what to write instead.
    pub fn check(self, value: &str) -> Result<(), String> {
        match self {
            Self::Port => port(value),
            Self::Service | Self::Version => named(value),
            Self::Tenant => rule::parse_list([value])
                .map(drop)
                .map_err(|error| format!("cannot be read: {error}")),
            Self::PoolPort => number(value, 0, u32::from(u16::MAX)),
            Self::PoolScrape => metrics_url(value),
            Self::IdleTimeout | Self::Drain => duration(value),
            Self::ProxyProtocol if matches!(value, "true" | "false") => Ok(()),
            Self::ProxyProtocol => Err(format!("is {}; say true or false", shown(value))),
            Self::MaxConnections => number(value, 1, u32::MAX),
            Self::MaxTenants => number(value, 1, 1_000_000),
            Self::CpuRequest | Self::CpuLimit | Self::MemoryRequest | Self::MemoryLimit => {
                quantity::parse(value).map(drop)
            }
        }
    }

    /// The names of all, for a sentence.
    pub(super) fn list() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    const fn by_default(self) -> Option<&'static str> {
        match self {
            Self::CpuRequest => Some("10m"),
            Self::MemoryRequest => Some("16Mi"),
            // What it takes at its own limits, with peers that do not read: docs/agent.md.
            Self::MemoryLimit => Some("192Mi"),
            _ => None,
        }
    }
}

// === impl Chosen ===

impl Chosen {
    /// Reads the annotations of a pod.
    pub(super) fn read(
        annotations: Option<&Map<String, Value>>,
        defaults: &BTreeMap<Setting, String>,
    ) -> Result<Self, Refusal> {
        let mut chosen = defaults.clone();
        for (key, value) in annotations.into_iter().flatten() {
            let Some(name) = key.strip_prefix(PREFIX).filter(|_| key != INJECTED) else {
                continue;
            };
            // A setting that is spelt wrongly must not be passed over in silence.
            let setting = Setting::named(name).ok_or_else(|| Refusal::UnknownSetting(name.to_owned()))?;
            let value = value.as_str().ok_or_else(|| Refusal::BadSetting {
                setting,
                why: "is not text; put the value in quotes".to_owned(),
            })?;
            chosen.insert(setting, value.to_owned());
        }
        for (&setting, value) in &chosen {
            setting
                .check(value)
                .map_err(|why| Refusal::BadSetting { setting, why })?;
        }
        let chosen = Self(chosen);
        chosen.fits(Setting::CpuRequest, Setting::CpuLimit)?;
        chosen.fits(Setting::MemoryRequest, Setting::MemoryLimit)?;
        Ok(chosen)
    }

    pub(super) fn get(&self, setting: Setting) -> Option<&str> {
        let given = self.0.get(&setting).map(String::as_str);
        given.or(setting.by_default())
    }

    /// An amount of CPU or memory, in billionths.
    pub(super) fn amount(&self, setting: Setting) -> Option<u128> {
        self.get(setting).and_then(|text| quantity::parse(text).ok())
    }

    /// The API server takes no pod that asks for more than its own limit.
    fn fits(&self, request: Setting, limit: Setting) -> Result<(), Refusal> {
        let (Some(wanted), Some(most)) = (self.get(request), self.get(limit)) else {
            return Ok(());
        };
        if self.amount(request) <= self.amount(limit) {
            return Ok(());
        }
        let (limit, most) = (limit.as_str(), shown(most));
        Err(Refusal::BadSetting {
            setting: request,
            why: format!("is {}, more than the {limit} of {most}; set both", shown(wanted)),
        })
    }
}

/// A number, or a name that a port can have (RFC 6335, section 5.1, in lower case).
fn port(value: &str) -> Result<(), String> {
    let is_number = value.parse::<u16>().is_ok_and(|number| number > 0);
    let may_be_named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let is_name = (1..=15).contains(&value.len())
        && value.bytes().all(may_be_named)
        && value.bytes().any(|b| b.is_ascii_lowercase());
    if is_number || is_name {
        return Ok(());
    }
    Err(format!(
        "is {}; give the name or the number of a port",
        shown(value)
    ))
}

fn named(value: &str) -> Result<(), String> {
    check_name(value.as_bytes())
        .map(drop)
        .map_err(|error| error.to_string())
}

fn number(value: &str, least: u32, most: u32) -> Result<(), String> {
    // Digits alone, though the agent's flags would take a sign.
    let is_plain = value.bytes().all(|b| b.is_ascii_digit());
    match value.parse::<u32>() {
        Ok(number) if is_plain && (least..=most).contains(&number) => Ok(()),
        _ => Err(format!(
            "is {}; give a number from {least} to {most}",
            shown(value)
        )),
    }
}

/// As the agent reads them.
fn duration(value: &str) -> Result<(), String> {
    let digits = value.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = value.split_at(digits);
    let unit = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let ms = number.parse::<u64>().ok().zip(unit);
    let ms = ms.and_then(|(number, unit)| number.checked_mul(unit));
    match ms {
        Some(ms) if ms <= MAX_DURATION_MS => Ok(()),
        _ => Err(format!(
            "is {}; give 500ms, 30s, 5m or the like, at most 1h",
            shown(value)
        )),
    }
}

/// As the agent reads it: clear text, and no user.
fn metrics_url(value: &str) -> Result<(), String> {
    let bad = "is not a URL as in http://127.0.0.1:9100/metrics";
    let uri: http::Uri = value.parse().map_err(|_| bad.to_owned())?;
    let authority = uri.authority().ok_or(bad)?;
    let has_port = match authority.port() {
        Some(port) => port.as_u16() != 0,
        None => authority.as_str() == authority.host(),
    };
    let host = authority.host().trim_matches(['[', ']']);
    let has_path = uri
        .path_and_query()
        .is_none_or(|path| path.as_str().starts_with('/'));
    let is_good = uri.scheme_str() == Some("http") && has_port && has_path && !host.is_empty();
    // Not quoted: what stands before an @ may be a password.
    if !is_good || authority.as_str().contains('@') {
        return Err(format!("{bad}, without TLS and without a user"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        for setting in Setting::ALL {
            assert_eq!(Setting::named(setting.as_str()), Some(setting));
        }
        assert_eq!(Setting::named("injected"), None);
        assert_eq!(Setting::named("Port"), None);
    }

    #[test]
    fn a_wrong_value_is_refused_with_a_word_on_the_right_one() {
        for (setting, value, part) in [
            (Setting::Port, "", "name or the number"),
            (Setting::Port, "0", "name or the number"),
            (Setting::Port, "65536", "name or the number"),
            (Setting::Port, "HTTP", "name or the number"),
            (Setting::Port, "a-name-too-long-", "name or the number"),
            (Setting::Service, "", "is empty"),
            (Setting::Version, "v 2", "has the character"),
            (Setting::Tenant, "cookie:tenant", "is not a rule"),
            (Setting::Tenant, "fixed:a header:b", "put it last"),
            (Setting::PoolPort, "65536", "from 0 to 65535"),
            (Setting::PoolPort, "+1", "from 0 to 65535"),
            (Setting::MaxTenants, "0", "from 1 to 1000000"),
            (Setting::MaxConnections, "0", "from 1 to"),
            (Setting::IdleTimeout, "1d", "at most 1h"),
            (Setting::IdleTimeout, "61m", "at most 1h"),
            (Setting::Drain, "20", "at most 1h"),
            (Setting::ProxyProtocol, "yes", "true or false"),
            (Setting::PoolScrape, "127.0.0.1:9100", "http://"),
            (
                Setting::PoolScrape,
                "https://127.0.0.1:9100/metrics",
                "without TLS",
            ),
            (Setting::PoolScrape, "http://app?x", "http://"),
            (Setting::PoolScrape, "http://app:0/metrics", "http://"),
            (Setting::MemoryLimit, "a lot", "192Mi"),
        ] {
            let error = setting.check(value).unwrap_err();
            assert!(error.contains(part), "{setting:?} {value}: {error}");
        }
        let error = Setting::PoolScrape
            .check("http://me:secret@app/metrics")
            .unwrap_err();
        assert!(!error.contains("secret") && error.contains("user"), "{error}");
    }
}
