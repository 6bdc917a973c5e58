//! The webhook's certificate as it is at present, and the files that it may come from.
//!
//! It is replaced while connections come: each is shown the one of its moment. What cannot be used never takes the
//! place of what can.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use coalmine_judge::chain::Hash;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::io::AsyncReadExt as _;

use crate::clock;

/// Most bytes of a chain, and of a key: what a Secret can have.
const MAX_PEM_BYTES: usize = 1 << 20;

/// How often the files are read anew because one of them was replaced meanwhile.
const MAX_READS: u32 = 3;

/// The webhook's certificate as it is at present; connections that come use it.
pub(crate) struct Certificate {
    current: RwLock<Option<Current>>,
}

/// A chain with its key, known to belong together.
struct Current {
    key: Arc<CertifiedKey>,
    /// Seconds since the Unix epoch.
    expires: u64,
}

/// A certificate and its key in two files, which somebody else keeps.
#[derive(Debug)]
pub(super) struct Files {
    chain: PathBuf,
    key: PathBuf,
    /// What was found last: the hashes of both, or why they could not be read.
    found: Option<Result<(Hash, Hash), String>>,
}

// === impl Certificate ===

impl Certificate {
    /// None yet: handshakes fail.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            current: RwLock::new(None),
        })
    }

    /// Takes a chain and its key, PEM; what is not usable is refused and the one before stays.
    pub(crate) fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<(), String> {
        let read = Current::read(chain_pem, key_pem)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(read);
        Ok(())
    }

    /// When it expires, seconds since the Unix epoch; none while there is none.
    pub(crate) fn expires(&self) -> Option<u64> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(|current| current.expires)
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _asked: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(|current| Arc::clone(&current.key))
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("expires", &self.expires())
            .finish_non_exhaustive()
    }
}

// === impl Current ===

impl Current {
    fn read(chain_pem: &str, key_pem: &str) -> Result<Self, String> {
        if chain_pem.len() > MAX_PEM_BYTES || key_pem.len() > MAX_PEM_BYTES {
            return Err(format!(
                "the certificate or its key has more than {MAX_PEM_BYTES} bytes"
            ));
        }
        // What the parsers say is not passed on: it may quote all of the text, and of a key that must not be.
        let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain: Vec<CertificateDer<'static>> =
            chain.map_err(|_| "the certificate is not in PEM form".to_owned())?;
        let leaf = chain
            .first()
            .ok_or("there is no certificate in PEM form where it should be")?;
        let expires = expiry(leaf)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| "there is no private key in PEM form where it should be".to_owned())?;
        let key = rustls::crypto::ring::default_provider()
            .key_provider
            .load_private_key(key)
            .map_err(|error| format!("the private key cannot be used: {error}"))?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => "the private key is not that of the certificate".to_owned(),
            error => format!("the certificate cannot be used: {error}"),
        })?;
        Ok(Self {
            key: Arc::new(key),
            expires,
        })
    }
}

/// When a certificate ends (its notAfter), seconds since the Unix epoch.
fn expiry(certificate: &CertificateDer<'_>) -> Result<u64, String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate.as_ref())
        .map_err(|_| "the certificate is not one of X.509".to_owned())?;
    Ok(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0))
}

// === impl Files ===

impl Files {
    pub(super) fn new(chain: PathBuf, key: PathBuf) -> Self {
        Self {
            chain,
            key,
            found: None,
        }
    }

    /// Reads the files, and has the certificate replaced if they are others than before. Says whether the replacement
    /// was taken; nothing if there was none. What is wrong is logged once.
    pub(super) async fn look(&mut self, certificate: &Certificate) -> Option<bool> {
        let read = self.read().await;
        let found = match &read {
            Ok((chain, key)) => Ok((Hash::of(chain.as_bytes()), Hash::of(key.as_bytes()))),
            Err(problem) => Err(problem.clone()),
        };
        if self.found.as_ref() == Some(&found) {
            return None;
        }
        self.found = Some(found);
        let file = self.chain.display();
        match read.and_then(|(chain, key)| certificate.replace(&chain, &key)) {
            Ok(()) => {
                let expires = certificate.expires().unwrap_or_default();
                let expires = clock::rfc3339(expires.saturating_mul(1_000));
                tracing::info!(%file, expires, "the webhook has its certificate");
                Some(true)
            }
            Err(problem) => {
                tracing::warn!(%file, problem, "the webhook's certificate is not taken; the one before stays");
                Some(false)
            }
        }
    }

    /// Both files as they were at one time: they are replaced one after the other, or both with their directory.
    async fn read(&self) -> Result<(String, String), String> {
        let mut chain = read_file(&self.chain).await?;
        for _ in 0..MAX_READS {
            let key = read_file(&self.key).await?;
            let again = read_file(&self.chain).await?;
            if again == chain {
                return Ok((chain, key));
            }
            chain = again;
        }
        Err(format!("{} changes while it is read", self.chain.display()))
    }
}

async fn read_file(path: &Path) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    // One byte more shows that there is more.
    let most = u64::try_from(MAX_PEM_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    let mut text = String::new();
    file.take(most).read_to_string(&mut text).await.map_err(failed)?;
    Ok(text)
}
