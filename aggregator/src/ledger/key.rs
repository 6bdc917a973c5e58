//! The key that signs a log's checkpoints: made with the log, and never again.

use std::{io, path::Path};

use coalmine_judge::note::{Kind, SignerKey, VerifierKey};

use crate::disk::{self, DiskError};

/// Reads the key of a data directory; makes one if there is no log yet. `known` are the keys that the log names.
pub(super) fn open(data: &Path, log: &str, known: &[VerifierKey]) -> Result<SignerKey, DiskError> {
    let path = data.join("key");
    let refused = |problem: String| DiskError::Corrupt {
        path: path.clone(),
        problem,
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let key = SignerKey::parse(&text).map_err(|error| refused(error.to_string()))?;
            let verifier = key.verifier();
            if verifier.name() != log {
                return Err(refused(format!(
                    "is the key of {:?}, but the log is {log:?}",
                    verifier.name()
                )));
            }
            if !known.is_empty() && !known.contains(&verifier) {
                return Err(refused(format!(
                    "is {verifier}, which the log does not name as its key"
                )));
            }
            Ok(key)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && known.is_empty() => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed)
                .map_err(|error| DiskError::io("make the key in", &path, io::Error::other(error)))?;
            let key = SignerKey::from_seed(log, Kind::Ed25519, &seed);
            disk::replace_secret(&path, key.to_secret_text().as_bytes())
                .map_err(|error| DiskError::io("write", &path, error))?;
            tracing::info!(
                key = %key.verifier(),
                "a key was made that signs the decision log; keep this line elsewhere, for checking the log with it, and \
                 a backup of the key's file"
            );
            Ok(key)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(refused(
            "is missing, and a log that exists gets no other key unasked".to_owned(),
        )),
        Err(error) => Err(DiskError::io("read", &path, error)),
    }
}
