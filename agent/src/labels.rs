//! The labels of the pod, as a volume of the downward API has them in a file, and the build that they name.
//!
//! ```text
//! app.kubernetes.io/version="v2"
//! coalmine.dev/arm="canary"
//! ```
//!
//! One label a line, its value quoted as Go does it (`strconv.Quote`). Labels are changed on pods that run, and
//! then the kubelet puts another file into the place of this one.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    str::Chars,
};

use coalmine_proto::names::{ARM_LABEL, Arm, check_name};

use crate::{config::Config, window::Build};

/// Labels and their names are short, and a pod has few; the API server takes no more than this of all metadata.
const MAX_BYTES: usize = 256 << 10;

/// Follows the labels of the pod.
#[derive(Debug)]
pub(crate) struct Labels {
    path: PathBuf,
    /// Names the version; none where it does not follow the labels.
    version_label: Option<String>,
    /// What holds where the labels name nothing that can be used.
    start: Build,
    /// What was found at the last look: nothing is said twice of the same.
    found: Option<Result<Vec<u8>, String>>,
}

// === impl Labels ===

impl Labels {
    /// Those that the configuration names; none if it names none.
    pub(crate) fn of(config: &Config) -> Option<Self> {
        Some(Self {
            path: config.labels_file.clone()?,
            version_label: config.version_label.clone(),
            start: config.build(),
            found: None,
        })
    }

    /// Looks into the file; gives the build that it names, if the file is another than at the last look. One that
    /// cannot be read, or only in part, names none: what holds goes on to hold.
    pub(crate) fn look(&mut self) -> Option<Build> {
        let found = read_small(&self.path, MAX_BYTES);
        if self.found.as_ref() == Some(&found) {
            return None;
        }
        let build = match &found {
            Ok(bytes) => parse(bytes).map(|labels| self.build_of(&labels)),
            Err(why) => Err(why.clone()),
        };
        self.found = Some(found);
        if let Err(why) = &build {
            tracing::warn!(
                file = %self.path.display(),
                why,
                "the pod's labels cannot be read; arm and version stay as they are; check --labels-file"
            );
        }
        build.ok()
    }

    fn build_of(&self, labels: &BTreeMap<&str, String>) -> Build {
        let label = |name: &str| labels.get(name).map(String::as_str);
        let arm = Arm::of_labels(label).unwrap_or_else(|| Err("is missing".to_owned()));
        let version = self.version_label.as_ref().map_or_else(
            || self.start.version.clone(),
            |label| {
                let version = named(labels, label).map(str::to_owned);
                or_start(label, version, self.start.version.clone())
            },
        );
        Build {
            arm: or_start(ARM_LABEL, arm, self.start.arm),
            version,
        }
    }
}

/// The value of a label, which must be a name.
fn named<'l>(labels: &'l BTreeMap<&str, String>, label: &str) -> Result<&'l str, String> {
    let value = labels.get(label).ok_or("is missing")?;
    check_name(value.as_bytes()).map_err(|why| why.to_string())
}

/// What a label says, or else what the agent was started with.
fn or_start<T>(label: &str, said: Result<T, String>, start: T) -> T {
    said.unwrap_or_else(|why| {
        tracing::warn!(
            label,
            why,
            "a label of the pod cannot be used; what the agent was started with holds"
        );
        start
    })
}

/// All bytes of a small file that somebody else writes; an error says what is wrong with it.
pub(crate) fn read_small(path: &Path, max_bytes: usize) -> Result<Vec<u8>, String> {
    let cannot = |error: io::Error| format!("{} cannot be read: {error}", path.display());
    // To open a named pipe would be to wait for somebody who writes into it.
    if !fs::metadata(path).map_err(cannot)?.is_file() {
        return Err(format!("{} is no file", path.display()));
    }
    let more_than_all = u64::try_from(max_bytes).unwrap_or(u64::MAX).saturating_add(1);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(cannot)?;
    file.take(more_than_all).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() > max_bytes {
        return Err(format!("{} has more than {max_bytes} bytes", path.display()));
    }
    Ok(bytes)
}

/// All labels; an error says where the text is not what the downward API writes. Then none of it is used: what is
/// missing in a part may be in the rest.
fn parse(bytes: &[u8]) -> Result<BTreeMap<&str, String>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    let mut labels = BTreeMap::new();
    for (number, line) in text.split('\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let number = number.saturating_add(1);
        let (key, value) = label(line).ok_or_else(|| format!("line {number} is not KEY=\"VALUE\""))?;
        if labels.insert(key, value).is_some() {
            return Err(format!("line {number} has a key that was there before"));
        }
    }
    Ok(labels)
}

fn label(line: &str) -> Option<(&str, String)> {
    let (key, quoted) = line.split_once('=')?;
    if key.is_empty() {
        return None;
    }
    Some((key, unquoted(quoted)?))
}

/// What strconv.Quote has put into quotes; none if it did not write this.
fn unquoted(quoted: &str) -> Option<String> {
    let mut rest = quoted.strip_prefix('"')?.strip_suffix('"')?.chars();
    let mut value = Vec::with_capacity(quoted.len());
    while let Some(next) = rest.next() {
        match next {
            '"' => return None,
            '\\' => unescape(&mut rest, &mut value)?,
            other => push(other, &mut value),
        }
    }
    // Bytes that were no text are escaped one by one; no name has such.
    Some(String::from_utf8_lossy(&value).into_owned())
}

/// Takes what follows a backslash.
fn unescape(rest: &mut Chars<'_>, value: &mut Vec<u8>) -> Option<()> {
    let byte = match rest.next()? {
        '\\' => b'\\',
        '"' => b'"',
        'n' => b'\n',
        't' => b'\t',
        'r' => b'\r',
        'a' => 0x07,
        'b' => 0x08,
        'v' => 0x0b,
        'f' => 0x0c,
        'x' => u8::try_from(hex(rest, 2)?).ok()?,
        'u' => return unescape_char(rest, 4, value),
        'U' => return unescape_char(rest, 8, value),
        _ => return None,
    };
    value.push(byte);
    Some(())
}

/// Takes the number of a character.
fn unescape_char(rest: &mut Chars<'_>, digits: usize, value: &mut Vec<u8>) -> Option<()> {
    push(char::from_u32(hex(rest, digits)?)?, value);
    Some(())
}

/// A number of so many hexadecimal digits, at most eight.
fn hex(rest: &mut Chars<'_>, digits: usize) -> Option<u32> {
    (0..digits).try_fold(0_u32, |number, _| {
        let digit = rest.next()?.to_digit(16)?;
        Some((number << 4) | digit)
    })
}

fn push(next: char, value: &mut Vec<u8>) {
    value.extend_from_slice(next.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests;
