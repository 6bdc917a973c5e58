//! `coalmine judge`: the same input gives the same bytes, whatever the build.

use std::{fs, process::Command};

use coalmine_judge::{
    chain::Hash,
    evidence::{ArmCounts, Coverage, Latency, OverSla, TenantWindow, Window},
};
use coalmine_proto::{histogram::Histogram, names::TenantName};
use coalmine_tests::{
    components::POLICY,
    process::{debug_program, release_program, repository},
};

/// Forty windows of twelve tenants, one of which fails from the tenth window on.
fn windows() -> String {
    let mut state = 42_u64;
    let mut next = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut text = String::new();
    for number in 1..=40 {
        let mut rows = Vec::new();
        for tenant in 0..12 {
            let mut arm = |requests: u64, error_permille: u64| {
                let mut histogram = Histogram::new();
                let (mut errors, mut over) = (0, 0);
                for _ in 0..requests {
                    let us = 1_000 + next(20_000) + if next(500) == 0 { 400_000 } else { 0 };
                    over += u64::from(us > 350_000);
                    errors += u64::from(next(1_000) < error_permille);
                    histogram.record(us * 1_000);
                }
                let over_sla = Some(OverSla {
                    limit_us: 350_000,
                    count: over,
                });
                ArmCounts {
                    requests,
                    errors,
                    latency: Some(Latency { histogram, over_sla }),
                }
            };
            let requests = 300 / (tenant + 1);
            let faulty = tenant == 5 && number >= 10;
            let canary = arm(requests / 5, if faulty { 150 } else { 1 });
            let baseline = arm(requests, 1);
            rows.push(TenantWindow {
                tenant: TenantName::parse(format!("tenant-{tenant:02}").as_bytes()).unwrap(),
                canary,
                baseline,
            });
        }
        let agents = |n| Coverage {
            expected: n,
            reported: n,
        };
        let window = Window {
            number,
            start_ms: 1_700_000_000_000 + number * 1_000,
            len_ms: 1_000,
            canary: agents(1),
            baseline: agents(2),
            rows,
            pool: Vec::new(),
        };
        text.push_str(&window.to_json());
        text.push('\n');
    }
    text
}

#[test]
fn debug_and_release_judge_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (policy, input) = (
        directory.path().join("sla.yaml"),
        directory.path().join("windows.jsonl"),
    );
    fs::write(&policy, POLICY).unwrap();
    fs::write(&input, windows()).unwrap();
    let judge = |program: std::path::PathBuf| {
        let mut command = Command::new(program);
        command
            .args(["judge", "--max-windows", "180", "--policy"])
            .arg(&policy)
            .arg(&input);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let debug = judge(debug_program("coalmine"));
    let release = judge(release_program("coalmine"));
    assert!(debug == release, "debug and release differ");
    assert_eq!(debug.lines().count(), 40);
    let last = debug.lines().last().unwrap();
    assert!(
        last.starts_with(r#"{"window":40,"verdict":"ROLLBACK","score_ppm":"#),
        "{last}"
    );
    assert!(
        last.contains(r#""halted":true"#) && last.contains(r#"{"unit":"tenant:tenant-05","metric":"#),
        "{last}"
    );

    let golden = repository().join("tests/golden/judge.sha256");
    let digest = format!("{}\n", Hash::of(debug.as_bytes()));
    let wanted = fs::read_to_string(&golden).unwrap_or_default();
    if wanted.is_empty() {
        fs::write(&golden, &digest).unwrap();
        panic!("{} was missing and has been written", golden.display());
    }
    assert_eq!(
        digest, wanted,
        "judge-fx/1 no longer gives the bytes that it gave"
    );
}
