//! What follows from the Secret: nothing, another certificate, or another CA; in an order in which no admission fails.
//!
//! API servers trust the CAs that are in the webhook configuration, some of them as it was a while ago. So another CA
//! comes in two steps. First the Secret holds old and new CA, and the certificate is still the old CA's:
//!
//! ```text
//! ca.crt  the new CA, then the old one     ca.key  of the new CA
//! tls.crt signed by the old CA             tls.key of tls.crt
//! ```
//!
//! Once both CAs have been in the webhook configuration for [`SETTLED`], the new CA signs. The old one stays in
//! `ca.crt` for [`RETIRED`] after that, and never beyond its own end. Where no certificate is usable there is nothing to
//! wait for, and the new CA signs at once. A Secret that somebody has emptied is no such case while this process still
//! has the certificate that it serves.

use std::collections::BTreeMap;

use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::authority::{Authority, Leaf, read_key};

/// The Secret's data, by key.
pub(super) type Data = BTreeMap<String, Vec<u8>>;

/// The keys of the Secret: the webhook's certificate and its key, the CAs (newest first), the newest CA's key.
pub(super) const LEAF: &str = "tls.crt";
pub(super) const LEAF_KEY: &str = "tls.key";
pub(super) const AUTHORITIES: &str = "ca.crt";
pub(super) const AUTHORITY_KEY: &str = "ca.key";

/// A CA is in the webhook configuration for so many seconds before a certificate of it is served: 10 minutes.
pub(super) const SETTLED: u64 = 600;

/// For so many seconds after another CA has signed, the one before is still trusted: a day.
pub(super) const RETIRED: u64 = 24 * 3_600;

/// Most CAs that are kept at a time.
const MAX_AUTHORITIES: usize = 4;

/// Most sections of `ca.crt` that are read.
const MAX_SECTIONS: usize = 16;

/// What is to be done with the Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    /// All is well, or there is something to wait for.
    Keep,
    /// The certificate that this process serves is written back.
    PutBack(Reason),
    /// The newest CA signs another certificate.
    RenewLeaf(Reason),
    /// Another CA is made; it signs at once only where no certificate is usable.
    RenewAll(Reason),
    /// CAs are left out that nobody needs any more.
    Retire,
}

/// Why something is renewed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Reason {
    #[error("the Secret is empty")]
    Empty,
    #[error("ca.crt holds no certificate of a CA")]
    AuthorityUnreadable,
    #[error("the newest CA in ca.crt has expired, or is not valid yet")]
    AuthorityOver,
    #[error("the newest CA in ca.crt was not made by this program")]
    AuthorityForeign,
    #[error("ca.key is not the key of the newest CA in ca.crt")]
    AuthorityKey,
    #[error("the CA is past two thirds of its life")]
    AuthorityOld,
    #[error("tls.crt holds no certificate")]
    LeafUnreadable,
    #[error("tls.key is not the key of the certificate in tls.crt")]
    LeafKey,
    #[error("the certificate in tls.crt, or its CA, has expired or is not valid yet")]
    LeafOver,
    #[error("the certificate in tls.crt is not one that a CA in ca.crt has signed for a server")]
    LeafUnsigned,
    #[error("the certificate in tls.crt is not for {0}")]
    LeafNames(String),
    #[error("the certificate is past two thirds of its life")]
    LeafOld,
    #[error("the new CA has been in the webhook configuration for long enough")]
    Settled,
}

/// What is to be done with the webhook configuration, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Publication {
    /// The mark on the Secret, which says since when the newest CA is published, is taken away.
    Unmark,
    /// The CAs are written into the configuration.
    Publish,
    /// The Secret is marked.
    Mark,
}

/// What the Secret holds, as far as it is usable; and what this process adds to it.
pub(super) struct Holding {
    /// Those that hold now, newest first.
    authorities: Vec<Authority>,
    /// The key of the newest one; or why it must not sign.
    signing: Result<KeyPair, Reason>,
    leaf: Result<Leaf, Reason>,
    /// Why the certificate is not the Secret's but the one that this process serves.
    restored: Option<Reason>,
    /// Whether the Secret holds CAs that do not hold now.
    has_expired: bool,
}

impl Holding {
    /// Reads the Secret's data. `served` is what this process serves.
    pub(super) fn read(data: &Data, served: Option<&Leaf>, names: &[String], now: u64) -> Self {
        let found: Vec<Authority> = CertificateDer::pem_slice_iter(field(data, AUTHORITIES))
            .take(MAX_SECTIONS)
            .filter_map(|section| Authority::read(&section.ok()?))
            .collect();
        let signing = signing_key(data, found.first(), now);
        let mut authorities = found.clone();
        authorities.retain(|authority| authority.holds(now));
        let has_expired = authorities.len() < found.len();
        let own = Leaf::read(field(data, LEAF), field(data, LEAF_KEY), &authorities, names, now);
        let (leaf, restored) = match (own, served) {
            (Err(reason), Some(served)) if served.check(names, now).is_ok() => {
                if !authorities.contains(served.signer()) {
                    authorities.push(served.signer().clone());
                }
                (Ok(served.clone()), Some(reason))
            }
            (own, _) => (own, None),
        };
        Self {
            authorities,
            signing,
            leaf,
            restored,
            has_expired,
        }
    }

    /// What follows. `published` is since when the newest CA has been in the webhook configuration, where known.
    pub(super) fn plan(&self, published: Option<u64>, now: u64) -> Plan {
        if let Err(reason) = &self.signing {
            return Plan::RenewAll(reason.clone());
        }
        let leaf = match &self.leaf {
            Ok(leaf) => leaf,
            Err(reason) => return Plan::RenewLeaf(reason.clone()),
        };
        if self.is_changing() {
            let settled = published
                .and_then(|since| now.checked_sub(since))
                .is_some_and(|age| age >= SETTLED);
            if settled {
                return Plan::RenewLeaf(Reason::Settled);
            }
            if let Some(reason) = &self.restored {
                return Plan::PutBack(reason.clone());
            }
        } else if let Some(reason) = &self.restored {
            return Plan::RenewLeaf(reason.clone());
        } else if leaf.is_past_two_thirds(now) {
            return Plan::RenewLeaf(Reason::LeafOld);
        }
        let mut authorities = self.authorities.iter();
        if self.has_expired
            || authorities.any(|authority| is_needless(authority, leaf, &self.authorities, now))
        {
            return Plan::Retire;
        }
        Plan::Keep
    }

    /// What the Secret is to hold under our keys once a plan is carried out.
    pub(super) fn carried_out(self, plan: &Plan, names: &[String], now: u64) -> Result<Data, String> {
        let Self {
            mut authorities,
            mut signing,
            leaf,
            ..
        } = self;
        if matches!(plan, Plan::RenewAll(_)) {
            let (authority, key) = Authority::make(now)?;
            authorities.insert(0, authority);
            signing = Ok(key);
        }
        let key = signing.map_err(|reason| reason.to_string())?;
        let newest = authorities.first().ok_or("there is no CA")?;
        let leaf = match leaf {
            Ok(leaf) if !matches!(plan, Plan::RenewLeaf(_)) => leaf,
            _ => newest.issue(&key, names, now)?,
        };
        let kept = authorities.iter().enumerate().filter(|(at, authority)| {
            let fits = *at + 1 < MAX_AUTHORITIES || *authority == leaf.signer();
            fits && !is_needless(authority, &leaf, &authorities, now)
        });
        let bundle: String = kept.map(|(_, authority)| authority.pem()).collect();
        Ok(BTreeMap::from([
            (LEAF.to_owned(), leaf.pem().into_bytes()),
            (LEAF_KEY.to_owned(), leaf.key_pem().as_bytes().to_vec()),
            (AUTHORITIES.to_owned(), bundle.into_bytes()),
            (AUTHORITY_KEY.to_owned(), key.serialize_pem().into_bytes()),
        ]))
    }

    /// What is to be done with the webhook configuration; `current` says that it has the CAs already.
    pub(super) fn publication(&self, current: bool, published: Option<u64>) -> Vec<Publication> {
        match (current, self.is_changing()) {
            (true, true) if published.is_none() => vec![Publication::Mark],
            (true, _) => Vec::new(),
            (false, false) => vec![Publication::Publish],
            // The waiting begins anew: API servers may have seen the configuration without the new CA.
            (false, true) if published.is_some() => {
                vec![Publication::Unmark, Publication::Publish, Publication::Mark]
            }
            (false, true) => vec![Publication::Publish, Publication::Mark],
        }
    }

    /// The certificate to serve.
    pub(super) fn leaf(&self) -> Option<&Leaf> {
        self.leaf.as_ref().ok()
    }

    /// What API servers must trust, in PEM.
    pub(super) fn bundle(&self) -> String {
        self.authorities.iter().map(Authority::pem).collect()
    }

    /// The mark that says since when the newest CA is in the webhook configuration.
    pub(super) fn mark(&self, now: u64) -> String {
        let newest = self.authorities.first().map(Authority::fingerprint);
        format!("{now} {}", newest.unwrap_or_default())
    }

    /// Reads a mark; none if it is about another CA, or lies ahead.
    pub(super) fn published(&self, mark: Option<&str>, now: u64) -> Option<u64> {
        let (since, fingerprint) = mark?.split_once(' ')?;
        let since = since.parse::<u64>().ok().filter(|since| *since <= now)?;
        (self.authorities.first()?.fingerprint() == fingerprint).then_some(since)
    }

    /// Whether the certificate is still that of an older CA.
    fn is_changing(&self) -> bool {
        self.leaf()
            .is_some_and(|leaf| self.authorities.first() != Some(leaf.signer()))
    }
}

/// The key of the newest CA, if that CA may sign.
fn signing_key(data: &Data, newest: Option<&Authority>, now: u64) -> Result<KeyPair, Reason> {
    let keys = [LEAF, LEAF_KEY, AUTHORITIES, AUTHORITY_KEY];
    if keys.iter().all(|key| field(data, key).is_empty()) {
        return Err(Reason::Empty);
    }
    let newest = newest.ok_or(Reason::AuthorityUnreadable)?;
    if !newest.holds(now) {
        return Err(Reason::AuthorityOver);
    }
    if !newest.can_sign() {
        return Err(Reason::AuthorityForeign);
    }
    let key = read_key(field(data, AUTHORITY_KEY)).filter(|key| newest.has_key(key));
    let key = key.ok_or(Reason::AuthorityKey)?;
    if newest.is_past_two_thirds(now) {
        return Err(Reason::AuthorityOld);
    }
    Ok(key)
}

/// Whether an older CA has signed nothing that may still be served.
fn is_needless(authority: &Authority, leaf: &Leaf, authorities: &[Authority], now: u64) -> bool {
    authority != leaf.signer()
        && authorities.first() == Some(leaf.signer())
        && leaf.issued().saturating_add(RETIRED) <= now
}

fn field<'a>(data: &'a Data, key: &str) -> &'a [u8] {
    data.get(key).map(Vec::as_slice).unwrap_or_default()
}
