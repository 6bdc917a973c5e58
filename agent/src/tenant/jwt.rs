//! Reads a claim of a JSON Web Token (RFC 7519) without verifying the token.
//!
//! Whether a token is genuine is for the application to say, whose keys the agent does not have. A forged token
//! is counted for the tenant that it names, until the application has refused it, as a forged header is.
//!
//! A token is `header.payload.signature`, each in base64url without padding (RFC 7515, section 3.1). Only the
//! payload is decoded; it must be a JSON object. An encrypted token, of five parts, cannot be read.

use std::{borrow::Cow, fmt};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::{Header, Seen};

/// Longest token that is read, in bytes: about what servers allow for all headers together.
const MAX_TOKEN_BYTES: usize = 8 << 10;

/// The claim of this name, or of these names within each other, of the token in a header.
pub(super) fn claim(names: &[String], header: &str, value: Header<'_>) -> Seen<'static> {
    let value = match value {
        Header::Missing => return Seen::Missing,
        Header::Value(value) => value,
        Header::Differing => return Seen::Invalid,
    };
    let token = match bearer(value) {
        Some(token) => token,
        // Another scheme, which has no token.
        None if header == "authorization" => return Seen::Missing,
        None => value.trim_ascii(),
    };
    if token.is_empty() {
        return Seen::Missing;
    }
    match read(names, token) {
        Some(Some(name)) if !name.is_empty() => Seen::Value(Cow::Owned(name.into_bytes())),
        Some(_) => Seen::Missing,
        None => Seen::Invalid,
    }
}

/// What follows the scheme `Bearer` (RFC 6750, section 2.1), whose case does not matter.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(b"bearer".len())?;
    let is_bearer = scheme.eq_ignore_ascii_case(b"bearer") && (token.is_empty() || token.starts_with(b" "));
    is_bearer.then(|| token.trim_ascii())
}

/// The claim of a token; none if it cannot be read, nothing in it if it is not there.
fn read(names: &[String], token: &[u8]) -> Option<Option<String>> {
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let mut parts = token.split(|b| *b == b'.');
    let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let mut json = serde_json::Deserializer::from_slice(&json);
    let claim = Claim(names).deserialize(&mut json).ok()?;
    json.end().ok()?;
    Some(claim)
}

/// Reads what these names lead to, and passes over all else. None is `null` or not there.
struct Claim<'n>(&'n [String]);

impl Claim<'_> {
    /// A value that is no object: the end of the way, and nowhere else.
    fn end<E: Error>(&self, value: String) -> Result<Option<String>, E> {
        if self.0.is_empty() {
            Ok(Some(value))
        } else {
            Err(E::custom("a claim that should be an object is none"))
        }
    }
}

impl<'de> DeserializeSeed<'de> for Claim<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Option<String>, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Claim<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a whole number, or an object on the way there")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Option<String>, M::Error> {
        let Some((wanted, rest)) = self.0.split_first() else {
            return Err(M::Error::custom("the claim is an object"));
        };
        let mut found = None;
        let mut was_there = false;
        while let Some(name) = map.next_key::<String>()? {
            if name != *wanted {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            // Readers differ in which of the two they take.
            if was_there {
                return Err(M::Error::custom("a claim stands twice"));
            }
            was_there = true;
            found = map.next_value_seed(Claim(rest))?;
        }
        Ok(found)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Option<String>, E> {
        self.end(value.to_owned())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Option<String>, E> {
        self.end(value.to_string())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Option<String>, E> {
        self.end(value.to_string())
    }

    fn visit_unit<E: Error>(self) -> Result<Option<String>, E> {
        Ok(None)
    }
}
