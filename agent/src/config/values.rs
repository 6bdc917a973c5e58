//! The forms of values on the command line.

use std::{fmt, io, net::SocketAddr, str::FromStr, time::Duration};

use tokio::net::{TcpStream, lookup_host};

use crate::system;

/// Where the application is: an address, or a name that is looked up at each connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name and a port.
    Name(String, u16),
}

impl Target {
    /// Opens a connection.
    pub async fn connect(&self) -> io::Result<TcpStream> {
        match self {
            Self::Address(address) => TcpStream::connect(address).await,
            Self::Name(name, port) => connect_any(lookup_host((name.as_str(), *port)).await?).await,
        }
    }

    pub(super) fn is(&self, address: SocketAddr) -> bool {
        *self == Self::Address(address)
    }
}

/// Tries the addresses one after the other. Of several errors, one of the application counts more than
/// one of this side, such as that there is no IPv6.
async fn connect_any(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut why: Option<io::Error> = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) if why.as_ref().is_none_or(system::is_exhausted) => why = Some(error),
            Err(_) => {}
        }
    }
    Err(why.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let bad = || format!("{text:?} is not HOST:PORT, as in 127.0.0.1:8080");
        let (name, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port: u16 = port.parse().map_err(|_| bad())?;
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || port == 0 || !name.bytes().all(is_name) {
            return Err(bad());
        }
        Ok(Self::Name(name.to_owned(), port))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

/// `500ms`, `30s`, `5m` or `1h`; at most an hour.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let bad = || format!("{text:?} is not a duration, as in 500ms, 30s, 5m or 1h");
    let number: u64 = number.parse().map_err(|_| bad())?;
    let ms = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => return Err(bad()),
    };
    ms.filter(|ms| *ms <= 3_600_000)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is longer than an hour"))
}

/// `8MiB`, `512KiB` or a number of bytes.
pub(super) fn bytes(text: &str) -> Result<usize, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let bad = || format!("{text:?} is not a size, as in 8MiB, 512KiB or 65536");
    let number: usize = number.parse().map_err(|_| bad())?;
    let unit = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(bad()),
    };
    number
        .checked_mul(unit)
        .filter(|bytes| (65_536..=1 << 30).contains(bytes))
        .ok_or_else(|| format!("{text:?} is not between 64KiB and 1GiB"))
}

/// A URL that tonic can connect to without TLS.
pub(super) fn aggregator(text: &str) -> Result<String, String> {
    let uri: http::Uri = text
        .parse()
        .map_err(|_| format!("{text:?} is not a URL, as in http://HOST:7443"))?;
    match (uri.scheme_str(), uri.host(), uri.path()) {
        (Some("https"), _, _) => {
            Err("TLS to the aggregator is not supported yet; use http:// inside the cluster".to_owned())
        }
        (Some("http"), Some(host), "" | "/") if !host.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not a URL, as in http://HOST:7443")),
    }
}

/// An address to listen on.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let bad = |_| "give an IP address and a port, as in 127.0.0.1:15080".to_owned();
    text.parse().map_err(bad)
}
