//! The webhook's CA and the certificates that it signs: how they are made, read and checked.
//!
//! Nothing here asks for the time: it is an argument, in seconds since the Unix epoch. Keys are ECDSA P-256.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_judge::chain::Hash;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::{
    RootCertStore,
    client::{verify_server_cert_signed_by_trust_anchor, verify_server_name},
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};
use x509_parser::{asn1_rs::Tag, certificate::X509Certificate, parse_x509_certificate};

use super::plan::Reason;
use crate::clock;

const HOUR: u64 = 3_600;

/// How long a CA holds: 10 years.
pub(super) const AUTHORITY_LIFE: u64 = 3_650 * 24 * HOUR;

/// How long a certificate of the webhook holds.
pub(super) const LEAF_LIFE: u64 = 90 * 24 * HOUR;

/// Certificates begin so long before they are made, since clocks differ.
pub(super) const BACKDATED: u64 = HOUR;

/// The end of the year 9999, after which no certificate can end.
const LAST_SECOND: u64 = 253_402_300_799;

/// The name in the webhook's certificate; clients look at its alternative names only.
const LEAF_NAME: &str = "coalmine webhook";

/// A CA: its certificate, and what is needed of it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Authority {
    der: CertificateDer<'static>,
    /// Its common name; none where the subject has another form than those that are made here.
    name: Option<String>,
    public_key: Vec<u8>,
    span: Span,
}

/// A certificate of the webhook with its key, and the CA that has signed it.
#[derive(Clone)]
pub(super) struct Leaf {
    der: CertificateDer<'static>,
    key_pem: String,
    span: Span,
    signer: Authority,
}

/// From when to when a certificate holds.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Span {
    from: u64,
    to: u64,
}

impl Span {
    fn of(certificate: &X509Certificate<'_>) -> Self {
        let validity = certificate.validity();
        Self {
            from: u64::try_from(validity.not_before.timestamp()).unwrap_or(0),
            to: u64::try_from(validity.not_after.timestamp()).unwrap_or(0),
        }
    }

    fn write(self, params: &mut CertificateParams) -> Result<(), String> {
        if self.from > self.to || self.to > LAST_SECOND {
            return Err("the clock is so wrong that no certificate can be made; set it".to_owned());
        }
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(self.from);
        params.not_after = epoch + Duration::from_secs(self.to);
        Ok(())
    }

    fn holds(self, now: u64) -> bool {
        self.from <= now && now < self.to
    }

    fn is_past_two_thirds(self, now: u64) -> bool {
        let life = self.to.saturating_sub(self.from);
        now >= self.to.saturating_sub(life / 3)
    }
}

impl Authority {
    /// Makes a CA.
    pub(super) fn make(now: u64) -> Result<(Self, KeyPair), String> {
        let name = format!(
            "coalmine webhook CA {}",
            clock::rfc3339(now.saturating_mul(1_000))
        );
        let key = KeyPair::generate().map_err(|error| failed("a key", &error))?;
        let mut params = authority_params(&name);
        let span = Span {
            from: now.saturating_sub(BACKDATED),
            to: now.saturating_add(AUTHORITY_LIFE),
        };
        span.write(&mut params)?;
        let made = params.self_signed(&key).map_err(|error| failed("a CA", &error))?;
        let authority = Self::read(made.der()).ok_or("the CA that was made cannot be read")?;
        Ok((authority, key))
    }

    /// Reads a certificate; none if it is not that of a CA.
    pub(super) fn read(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = parse_x509_certificate(der).ok()?;
        certificate.is_ca().then(|| Self {
            der: der.clone().into_owned(),
            name: plain_name(&certificate),
            public_key: public_key(&certificate),
            span: Span::of(&certificate),
        })
    }

    /// Signs a certificate for these names.
    pub(super) fn issue(&self, key: &KeyPair, names: &[String], now: u64) -> Result<Leaf, String> {
        let name = self
            .name
            .as_deref()
            .ok_or("the CA was not made by this program")?;
        let leaf_key = KeyPair::generate().map_err(|error| failed("a key", &error))?;
        let mut params = CertificateParams::new(names.to_vec())
            .map_err(|error| format!("a name of the webhook cannot stand in a certificate: {error}"))?;
        params.distinguished_name = distinguished_name(LEAF_NAME);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let span = Span {
            from: now.saturating_sub(BACKDATED),
            to: now.saturating_add(LEAF_LIFE).min(self.span.to),
        };
        span.write(&mut params)?;
        let issuer_params = authority_params(name);
        let made = params
            .signed_by(&leaf_key, &Issuer::from_params(&issuer_params, key))
            .map_err(|error| failed("the webhook's certificate", &error))?;
        let leaf = Leaf {
            der: made.der().clone(),
            key_pem: leaf_key.serialize_pem(),
            span,
            signer: self.clone(),
        };
        match leaf.check(names, now) {
            Ok(()) => Ok(leaf),
            Err(reason) => Err(format!(
                "the webhook's certificate was made and is not usable: {reason}"
            )),
        }
    }

    pub(super) fn holds(&self, now: u64) -> bool {
        self.span.holds(now)
    }

    pub(super) fn is_past_two_thirds(&self, now: u64) -> bool {
        self.span.is_past_two_thirds(now)
    }

    /// Whether it has the form of those that are made here, so that what it signs names it rightly.
    pub(super) fn can_sign(&self) -> bool {
        self.name.is_some()
    }

    pub(super) fn has_key(&self, key: &KeyPair) -> bool {
        key.public_key_raw() == self.public_key
    }

    /// What tells it from every other CA: the SHA-256 of its certificate, in hexadecimal.
    pub(super) fn fingerprint(&self) -> String {
        Hash::of(&self.der).to_string()
    }

    pub(super) fn pem(&self) -> String {
        pem(&self.der)
    }
}

impl Leaf {
    /// Reads a certificate and its key, and finds the CA that has signed it.
    pub(super) fn read(
        chain: &[u8],
        key: &[u8],
        authorities: &[Authority],
        names: &[String],
        now: u64,
    ) -> Result<Self, Reason> {
        let der = CertificateDer::from_pem_slice(chain).map_err(|_| Reason::LeafUnreadable)?;
        let (_, certificate) = parse_x509_certificate(&der).map_err(|_| Reason::LeafUnreadable)?;
        let key = read_key(key).ok_or(Reason::LeafKey)?;
        if key.public_key_raw() != public_key(&certificate) {
            return Err(Reason::LeafKey);
        }
        let span = Span::of(&certificate);
        let key_pem = key.serialize_pem();
        let mut found = Reason::LeafUnsigned;
        for signer in authorities {
            let leaf = Self {
                der: der.clone(),
                key_pem: key_pem.clone(),
                span,
                signer: signer.clone(),
            };
            match leaf.check(names, now) {
                Ok(()) => return Ok(leaf),
                Err(Reason::LeafUnsigned) => {}
                Err(reason) => found = reason,
            }
        }
        Err(found)
    }

    /// Whether a client that trusts its CA takes it for each of these names.
    pub(super) fn check(&self, names: &[String], now: u64) -> Result<(), Reason> {
        if !self.span.holds(now) || !self.signer.holds(now) {
            return Err(Reason::LeafOver);
        }
        let parsed = ParsedCertificate::try_from(&self.der).map_err(|_| Reason::LeafUnreadable)?;
        let mut roots = RootCertStore::empty();
        roots
            .add(self.signer.der.clone())
            .map_err(|_| Reason::LeafUnsigned)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &roots,
            &[],
            UnixTime::since_unix_epoch(Duration::from_secs(now)),
            ring::default_provider().signature_verification_algorithms.all,
        )
        .map_err(|_| Reason::LeafUnsigned)?;
        for name in names {
            let server = ServerName::try_from(name.as_str());
            let server = server.map_err(|_| Reason::LeafNames(name.clone()))?;
            verify_server_name(&parsed, &server).map_err(|_| Reason::LeafNames(name.clone()))?;
        }
        Ok(())
    }

    pub(super) fn signer(&self) -> &Authority {
        &self.signer
    }

    pub(super) fn is_past_two_thirds(&self, now: u64) -> bool {
        self.span.is_past_two_thirds(now)
    }

    /// When it was made.
    pub(super) fn issued(&self) -> u64 {
        self.span.from.saturating_add(BACKDATED)
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.der == other.der && self.key_pem == other.key_pem
    }

    pub(super) fn pem(&self) -> String {
        pem(&self.der)
    }

    pub(super) fn key_pem(&self) -> &str {
        &self.key_pem
    }
}

/// Reads a key in PEM form.
pub(super) fn read_key(text: &[u8]) -> Option<KeyPair> {
    KeyPair::from_pem(std::str::from_utf8(text).ok()?).ok()
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn distinguished_name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// The common name of a subject that has nothing else, written as it is written here.
fn plain_name(certificate: &X509Certificate<'_>) -> Option<String> {
    let subject = certificate.subject();
    if subject.iter_attributes().count() != 1 {
        return None;
    }
    let name = subject.iter_common_name().next()?;
    let is_ours = name.attr_value().tag() == Tag::Utf8String;
    is_ours.then(|| name.as_str().ok().map(str::to_owned)).flatten()
}

fn public_key(certificate: &X509Certificate<'_>) -> Vec<u8> {
    certificate.public_key().subject_public_key.data.to_vec()
}

fn pem(der: &[u8]) -> String {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let encoded = STANDARD.encode(der);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

fn failed(what: &str, error: &rcgen::Error) -> String {
    format!("cannot make {what}: {error}")
}
