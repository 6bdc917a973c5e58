//! The token that is shown to the aggregator.

use std::path::Path;

use tonic::metadata::AsciiMetadataValue;

use crate::labels::read_small;

/// Tokens of service accounts have about 1 KiB.
const MAX_BYTES: usize = 16 << 10;

/// The token in a file, as the value of `authorization`. It is read anew each time: it is replaced before it expires.
/// An error says what is wrong, and nothing of the token.
pub(super) fn read(path: &Path) -> Result<AsciiMetadataValue, String> {
    let bytes = read_small(path, MAX_BYTES)?;
    let token = bytes.trim_ascii();
    if token.is_empty() {
        return Err(format!("{} is empty", path.display()));
    }
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(format!("{} is not one word of visible ASCII", path.display()));
    }
    let value = [&b"Bearer "[..], token].concat();
    let mut value = AsciiMetadataValue::try_from(value)
        .map_err(|_| format!("{} cannot be sent as a header", path.display()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOlsiY29hbG1pbmUiXX0.c2lnbmF0dXJl-_~+/=";

    #[test]
    fn a_token_is_trimmed_and_marked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        for text in [TOKEN.to_owned(), format!(" {TOKEN}\r\n\n")] {
            fs::write(&path, text).unwrap();
            let value = read(&path).unwrap();
            assert_eq!(value.to_str().unwrap(), format!("Bearer {TOKEN}"));
            assert!(value.is_sensitive());
            assert!(!format!("{value:?}").contains(TOKEN), "{value:?}");
        }
        let longest = "t".repeat(MAX_BYTES);
        fs::write(&path, &longest).unwrap();
        assert!(read(&path).unwrap().to_str().unwrap().ends_with(&longest));
    }

    #[test]
    fn what_is_no_token_is_refused_and_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        assert!(read(&path).unwrap_err().contains("token cannot be read"));
        for (bytes, part) in [
            (b" \n".to_vec(), "is empty"),
            (b"secret two".to_vec(), "visible ASCII"),
            (b"secret\nx-other: 1".to_vec(), "visible ASCII"),
            (b"secret\x00".to_vec(), "visible ASCII"),
            (b"secret\x7f".to_vec(), "visible ASCII"),
            ("secret\u{e9}".into(), "visible ASCII"),
            (b"secret".repeat(MAX_BYTES), "has more than 16384 bytes"),
        ] {
            fs::write(&path, bytes).unwrap();
            let why = read(&path).unwrap_err();
            assert!(why.contains(part), "{why}");
            assert!(!why.contains("secret"), "{why}");
        }
        assert!(read(directory.path()).unwrap_err().contains("is no file"));
    }
}
