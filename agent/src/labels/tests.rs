//! Tests of the pod's labels.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const VERSION_LABEL: &str = "app.kubernetes.io/version";

#[track_caller]
fn parsed(text: &str) -> Vec<(String, String)> {
    let labels = parse(text.as_bytes()).unwrap_or_else(|why| panic!("{text:?}: {why}"));
    let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value));
    labels.collect()
}

#[test]
fn what_the_downward_api_writes_is_read() {
    for (text, labels) in [
        ("", &[][..]),
        ("a=\"1\"", &[("a", "1")]),
        ("a=\"1\"\n", &[("a", "1")]),
        ("a=\"\"\nb=\"2\"", &[("a", ""), ("b", "2")]),
        (
            "app.kubernetes.io/version=\"v2.0\"\ncoalmine.dev/arm=\"canary\"",
            &[
                ("app.kubernetes.io/version", "v2.0"),
                ("coalmine.dev/arm", "canary"),
            ],
        ),
        // The first "=" ends the key; quotes within a value are escaped.
        (r#"a="b=\"c\"=d""#, &[("a", r#"b="c"=d"#)]),
        (r#"a="\\n\n\t\r""#, &[("a", "\\n\n\t\r")]),
        (r#"a="\a\b\v\f\x7f\x00""#, &[("a", "\x07\x08\x0b\x0c\x7f\x00")]),
        (
            "a=\"\\u00e9\\u200B\\U0001f600 \u{e9}\"",
            &[("a", "\u{e9}\u{200b}\u{1f600} \u{e9}")],
        ),
        (r#"a="\xff""#, &[("a", "\u{fffd}")]),
        (r#"a="\xc3\xa9""#, &[("a", "\u{e9}")]),
    ] {
        let expected = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        assert_eq!(parsed(text), expected.collect::<Vec<_>>(), "{text:?}");
    }
}

#[test]
fn what_it_does_not_write_is_refused_whole() {
    for (text, part) in [
        ("a", "line 1 is not"),
        ("a=", "line 1 is not"),
        ("a=b", "line 1 is not"),
        ("a=\"", "line 1 is not"),
        ("a=\"b", "line 1 is not"),
        ("a=b\"", "line 1 is not"),
        ("a='b'", "line 1 is not"),
        ("=\"b\"", "line 1 is not"),
        ("a=\"b\" ", "line 1 is not"),
        ("a=\"b\"\r\n", "line 1 is not"),
        ("a=\"b\"c\"", "line 1 is not"),
        ("a=\"\\\"", "line 1 is not"),
        ("a=\"\\q\"", "line 1 is not"),
        ("a=\"\\'\"", "line 1 is not"),
        ("a=\"\\101\"", "line 1 is not"),
        ("a=\"\\x4\"", "line 1 is not"),
        ("a=\"\\x+4\"", "line 1 is not"),
        ("a=\"\\u12\"", "line 1 is not"),
        ("a=\"\\ud800\"", "line 1 is not"),
        ("a=\"\\U00110000\"", "line 1 is not"),
        ("a=\"\\Uffffffff\"", "line 1 is not"),
        ("a=\"1\"\n\n# b\n", "line 3 is not"),
        ("a=\"1\"\nb=\"2\"\na=\"1\"", "line 3 has a key"),
    ] {
        let why = parse(text.as_bytes()).unwrap_err();
        assert!(why.contains(part), "{text:?}: {why}");
    }
    assert_eq!(parse(b"a=\"\xff\"").unwrap_err(), "it is not UTF-8");
}

/// A volume of the downward API: the file is a link to one behind another link, which is replaced.
struct Volume {
    directory: TempDir,
    written: u32,
}

impl Volume {
    fn new(text: &str) -> Self {
        let mut volume = Self {
            directory: tempfile::tempdir().unwrap(),
            written: 0,
        };
        volume.write(text.as_bytes());
        symlink("..data/labels", volume.labels()).unwrap();
        volume
    }

    fn labels(&self) -> PathBuf {
        self.directory.path().join("labels")
    }

    fn write(&mut self, bytes: &[u8]) {
        self.written += 1;
        let name = format!("..{}", self.written);
        let own = self.directory.path().join(&name);
        fs::create_dir(&own).unwrap();
        fs::write(own.join("labels"), bytes).unwrap();
        let next = self.directory.path().join("..data_tmp");
        symlink(&name, &next).unwrap();
        fs::rename(next, self.directory.path().join("..data")).unwrap();
    }

    /// Started as the baseline of v1.
    fn follow(&self) -> Labels {
        Labels {
            path: self.labels(),
            version_label: Some(VERSION_LABEL.to_owned()),
            start: build(Arm::Baseline, "v1"),
            found: None,
        }
    }
}

#[test]
fn a_version_that_follows_no_label_stays() {
    let volume = Volume::new(&text("canary", "v2"));
    let mut labels = Labels {
        version_label: None,
        ..volume.follow()
    };
    assert_eq!(labels.look(), Some(build(Arm::Canary, "v1")));
}

fn build(arm: Arm, version: &str) -> Build {
    Build {
        arm,
        version: version.to_owned(),
    }
}

fn text(arm: &str, version: &str) -> String {
    format!("{VERSION_LABEL}={version:?}\n{ARM_LABEL}={arm:?}\nother=\"x y\"")
}

#[test]
fn a_file_says_something_once_until_it_changes() {
    let mut volume = Volume::new(&text("canary", "v2"));
    let mut labels = volume.follow();
    assert_eq!(labels.look(), Some(build(Arm::Canary, "v2")));
    assert_eq!(labels.look(), None);
    volume.write(text("baseline", "v2").as_bytes());
    assert_eq!(labels.look(), Some(build(Arm::Baseline, "v2")));
    assert_eq!(labels.look(), None);
    volume.write(text("baseline", "v2").as_bytes());
    assert_eq!(labels.look(), None, "another file, and the same in it");
}

#[test]
fn what_the_agent_was_started_with_holds_where_a_label_is_of_no_use() {
    let long = "v".repeat(129);
    let mut volume = Volume::new("");
    let mut labels = volume.follow();
    assert_eq!(labels.look(), Some(build(Arm::Baseline, "v1")));
    for (content, expected) in [
        (text("canary", ""), build(Arm::Canary, "v1")),
        (text("canary", "v 2"), build(Arm::Canary, "v1")),
        (text("canary", &long), build(Arm::Canary, "v1")),
        (text("", "v2"), build(Arm::Baseline, "v2")),
        (text("green", "v2"), build(Arm::Baseline, "v2")),
        (text("Canary", "v3"), build(Arm::Baseline, "v3")),
        (format!("{ARM_LABEL}=\"canary\""), build(Arm::Canary, "v1")),
        (format!("{VERSION_LABEL}=\"v4\""), build(Arm::Baseline, "v4")),
    ] {
        volume.write(content.as_bytes());
        assert_eq!(labels.look(), Some(expected), "{content:?}");
    }
}

#[test]
fn a_file_that_cannot_be_read_changes_nothing() {
    let mut volume = Volume::new(&text("canary", "v2"));
    let mut labels = volume.follow();
    assert!(labels.look().is_some());
    let mut large = text("baseline", "v3").into_bytes();
    large.resize(MAX_BYTES + 1, b'\n');
    for bytes in [
        &b"garbage"[..],
        format!("{ARM_LABEL}=\"base").as_bytes(),
        &b"\xff"[..],
        &large[..],
    ] {
        volume.write(bytes);
        assert_eq!(labels.look(), None);
    }
    fs::remove_file(volume.labels()).unwrap();
    assert_eq!(labels.look(), None);
    let why = labels.found.as_ref().unwrap().as_ref().unwrap_err();
    assert!(why.contains("labels cannot be read"), "{why}");
    fs::create_dir(volume.labels()).unwrap();
    assert_eq!(labels.look(), None);
    let why = labels.found.as_ref().unwrap().as_ref().unwrap_err();
    assert!(why.ends_with("is no file"), "{why}");
    // As large as it may be.
    fs::remove_dir(volume.labels()).unwrap();
    large.truncate(MAX_BYTES);
    fs::write(volume.labels(), &large).unwrap();
    assert_eq!(labels.look(), Some(build(Arm::Baseline, "v3")));
}
