//! `coalmine judge`: the same input gives the same bytes, whatever the build.

use std::{fs, process::Command};

use coalmine_judge::{
    chain::Hash,
    evidence::{ArmCounts, Coverage, Latency, OverSla, Pool, Probes, TenantWindow, Window},
};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, TenantName},
};
use coalmine_tests::process::{debug_program, release_program, repository, static_program};

/// Two hundred windows of twelve tenants with all that evidence can hold: errors, latencies, probes, pools, and agents
/// that are silent. `faulty` is slower, its requests and probes fail, and the pool is exhausted.
fn windows(faulty: bool) -> String {
    let mut state = 42_u64;
    let mut next = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut text = String::new();
    for number in 1..=200 {
        let mut rows = Vec::new();
        for tenant in 0..12 {
            let mut arm = |requests: u64, error_permille: u64, slower: u64| {
                let mut histogram = Histogram::new();
                let (mut errors, mut over) = (0, 0);
                for _ in 0..requests {
                    let us = 1_000
                        + next(20_000) * (100 + slower) / 100
                        + if next(500) == 0 { 400_000 } else { 0 };
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
                    probes: Probes {
                        checks: tenant % 3,
                        failed: (next(1_000) * (tenant % 3) / 999 * error_permille / 150).min(tenant % 3),
                    },
                }
            };
            let requests = 300 / (tenant + 1);
            let failing = faulty && tenant == 5 && number >= 150;
            let slower = if faulty && tenant == 0 { 40 } else { 0 };
            let canary = arm(requests / 5, if failing { 150 } else { 1 }, slower);
            let baseline = arm(requests, 1, 0);
            rows.push(TenantWindow {
                tenant: TenantName::parse(format!("tenant-{tenant:02}").as_bytes()).unwrap(),
                canary,
                baseline,
            });
        }
        let agents = |n| Coverage {
            expected: n,
            reported: n - u32::from(number % 41 == 0),
        };
        let waits = if faulty { next(30) } else { 0 };
        let pool = |arm, acquires, waits| Pool {
            arm,
            acquires,
            waits,
            timeouts: waits / 10,
            used: 5,
            max: 10,
            at_least: false,
            estimated: false,
            agents: None,
        };
        let window = Window {
            number,
            start_ms: 1_700_000_000_000 + number * 1_000,
            len_ms: 1_000,
            canary: agents(3),
            baseline: agents(9),
            rows,
            pool: vec![pool(Arm::Canary, 200, waits), pool(Arm::Baseline, 1_800, 1)],
            pods: None,
        };
        text.push_str(&window.to_json());
        text.push('\n');
    }
    text
}

/// A policy that asks for everything.
const ALL_OF_IT: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 10% }
  pool: { max_wait_rate: 1% }
  judge_window: 1s
  hold_deadline: 3m
  on_deadline: hold
  required: [errors, latency, pool]
tiers: { gold: { errors: { max_rate: 0.9% } } }
tenants:
  tenant-02: { tier: gold, labels: { region: eu } }
  tenant-05: { tier: gold, labels: { region: us } }
  tenant-07: { labels: { region: eu } }
rollout: { cohorts: [tier, region, tail], warm_up: 5s, min_coverage: { tenants: 50% } }
";

#[test]
fn every_build_judges_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let policy = directory.path().join("sla.yaml");
    fs::write(&policy, ALL_OF_IT).unwrap();
    let judge = |program: std::path::PathBuf| {
        let mut text = String::new();
        for faulty in [false, true] {
            let input = directory.path().join(format!("{faulty}.jsonl"));
            fs::write(&input, windows(faulty)).unwrap();
            let mut command = Command::new(&program);
            command
                .args(["judge", "--max-windows", "180", "--policy"])
                .arg(&policy)
                .arg(&input);
            let output = command.output().unwrap();
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{complaint}");
            text += &String::from_utf8(output.stdout).unwrap();
        }
        text
    };
    let debug = judge(debug_program("coalmine"));
    let release = judge(release_program("coalmine"));
    assert!(debug == release, "debug and release differ");
    match static_program("coalmine") {
        Some(program) => assert!(debug == judge(program), "debug and the static build differ"),
        None => println!("Rust has no musl target here: the static build is not compared"),
    }
    assert_eq!(debug.lines().count(), 400);
    for metric in [
        "errors/live",
        "errors/sla",
        "latency/live",
        "latency/sla",
        "pool",
        "probes",
        "gaps",
    ] {
        assert!(
            debug.contains(&format!("\"metric\":\"{metric}\"")),
            "nothing is said of {metric}"
        );
    }
    for unit in [
        "fleet",
        "cohort:tier:gold",
        "cohort:region:us",
        "tenant:tenant-05",
    ] {
        assert!(
            debug.contains(&format!("\"unit\":\"{unit}\"")),
            "nothing is said of {unit}"
        );
    }
    let last_of_healthy = debug.lines().nth(199).unwrap();
    assert!(
        last_of_healthy.starts_with(r#"{"window":200,"verdict":"APPROVE","score_ppm":"#),
        "{last_of_healthy}"
    );
    let last = debug.lines().last().unwrap();
    assert!(
        last.starts_with(r#"{"window":200,"verdict":"ROLLBACK","score_ppm":"#),
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
