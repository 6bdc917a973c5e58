//! Tests of what windows are measured as.

use std::{ffi::OsString, fs, path::PathBuf};

use coalmine_proto::names::Arm;
use tempfile::TempDir;

use super::*;
use crate::{config::Command, recorder::Recorder};

/// Windows of an agent whose pod has labels, and who was started as the baseline of v1.
struct Pod {
    directory: TempDir,
    recorder: Recorder,
    windows: mpsc::Sender<Sealed>,
    measured: Measured,
}

impl Pod {
    fn new(arm: &str, version: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        label(&directory, arm, version);
        let (windows, sealed) = mpsc::channel(8);
        let measured = Measured::new(&config(Some(file(&directory))), sealed);
        Self {
            directory,
            recorder: Recorder::new(Vec::new(), 10),
            windows,
            measured,
        }
    }

    /// The labels change, and are looked at.
    fn label(&mut self, arm: &str, version: &str) {
        label(&self.directory, arm, version);
        self.measured.look();
    }

    /// A border passes.
    fn close(&mut self) {
        let window = self.recorder.seal(0, 1_000);
        self.windows.try_send(self.recorder.sealed(window)).unwrap();
    }

    /// What the window that has waited longest was measured as.
    fn take(&mut self) -> (Arm, String) {
        let sealed = self.measured.sealed.try_recv().unwrap();
        let (_, build) = self.measured.measured(sealed);
        (build.arm, build.version.clone())
    }

    #[track_caller]
    fn takes(&mut self, expected: &[(Arm, &str)]) {
        for (arm, version) in expected {
            assert_eq!(self.take(), (*arm, (*version).to_owned()));
        }
    }
}

fn file(directory: &TempDir) -> PathBuf {
    directory.path().join("labels")
}

fn label(directory: &TempDir, arm: &str, version: &str) {
    let text = format!("app.kubernetes.io/version=\"{version}\"\ncoalmine.dev/arm=\"{arm}\"\n");
    fs::write(file(directory), text).unwrap();
}

fn config(labels_file: Option<PathBuf>) -> Config {
    let arguments = [
        "coalmine-agent",
        "--aggregator=http://a:1",
        "--service=shop",
        "--version=v1",
        "--arm=baseline",
    ];
    match Command::parse(arguments.map(OsString::from)) {
        Ok(Command::Run(mut config)) => {
            config.labels_file = labels_file;
            *config
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_change_holds_from_the_next_border_on() {
    let mut pod = Pod::new("canary", "v2");
    pod.close();
    pod.close();
    pod.label("baseline", "v2");
    // Two waited, and the third was open.
    pod.close();
    pod.close();
    let canary = (Arm::Canary, "v2");
    pod.takes(&[canary, canary, canary, (Arm::Baseline, "v2")]);
    pod.label("baseline", "v3");
    pod.close();
    pod.close();
    pod.takes(&[(Arm::Baseline, "v2"), (Arm::Baseline, "v3")]);
}

#[test]
fn what_is_taken_back_before_the_border_never_held() {
    let mut pod = Pod::new("canary", "v2");
    pod.label("baseline", "v2");
    pod.label("canary", "v2");
    pod.close();
    pod.close();
    pod.takes(&[(Arm::Canary, "v2"); 2]);
    pod.label("baseline", "v2");
    pod.label("baseline", "v3");
    pod.close();
    pod.close();
    pod.takes(&[(Arm::Canary, "v2"), (Arm::Baseline, "v3")]);
}

#[test]
fn a_second_change_waits_for_the_first_where_windows_wait() {
    let mut pod = Pod::new("canary", "v1");
    pod.label("canary", "v2");
    // The border at which v2 begins to hold.
    pod.close();
    pod.label("canary", "v3");
    pod.close();
    pod.takes(&[(Arm::Canary, "v1"), (Arm::Canary, "v2")]);
    pod.measured.look();
    pod.close();
    pod.close();
    pod.takes(&[(Arm::Canary, "v2"), (Arm::Canary, "v3")]);
}

#[test]
fn without_labels_the_agent_is_what_it_was_started_as() {
    let (_windows, sealed) = mpsc::channel(1);
    let config = config(None);
    let mut measured = Measured::new(&config, sealed);
    assert_eq!(*measured.build(), config.build());
    measured.look();
    assert!(measured.coming.is_none());
}
