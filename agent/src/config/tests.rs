//! Tests of the configuration.

use super::*;

const GOOD: &[&str] = &[
    "coalmine-agent",
    "--aggregator=http://aggregator:7443",
    "--service=shop",
    "--version=v2",
    "--arm=canary",
];

fn parse(args: &[&str]) -> Result<Command, UsageError> {
    Command::parse(args.iter().map(OsString::from))
}

#[track_caller]
fn config(more: &[&str]) -> Config {
    match parse(&[GOOD, more].concat()).unwrap() {
        Command::Run(config) => *config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults_are_those_of_the_design() {
    let config = config(&["--instance=pod-1"]);
    assert_eq!(config.listen, "0.0.0.0:15080".parse().unwrap());
    assert_eq!(config.upstream, "127.0.0.1:8080".parse().unwrap());
    assert_eq!(config.admin, "127.0.0.1:15090".parse().unwrap());
    assert_eq!((config.service.as_str(), config.version.as_str()), ("shop", "v2"));
    assert_eq!((config.arm, config.instance.as_str()), (Arm::Canary, "pod-1"));
    assert_eq!(
        (config.window, config.drain),
        (Duration::from_secs(1), Duration::from_secs(20))
    );
    assert_eq!(config.connect_timeout, Duration::from_secs(5));
    assert_eq!((config.ring_bytes, config.max_tenants), (8 << 20, 20_000));
    assert_eq!(config.idle_timeout, Duration::from_secs(3600));
    assert_eq!((config.pool_port, config.proxy_protocol), (5432, false));
    assert_eq!((config.labels_file, config.token_file), (None, None));
    assert_eq!(config.version_label.as_deref(), Some("app.kubernetes.io/version"));
    assert_eq!((config.pool_scrape, config.pool_metrics), (None, Vec::new()));
}

#[test]
fn what_is_said_of_the_pods_files_is_taken() {
    let config = config(&[
        "--labels-file=/etc/coalmine/labels",
        "--token-file=/var/run/coalmine/token",
        "--version-label=",
    ]);
    assert_eq!(config.version_label, None);
    let labels = PathBuf::from("/etc/coalmine/labels");
    assert_eq!(config.labels_file, Some(labels));
    let token = PathBuf::from("/var/run/coalmine/token");
    assert_eq!(config.token_file, Some(token));
    let Err(error) = parse(&[GOOD, &["--token-file="]].concat()) else {
        panic!("no file has an empty name");
    };
    assert!(error.to_string().contains("--token-file"), "{error}");
}

#[test]
fn what_is_said_of_pools_and_clients_is_taken() {
    let config = config(&[
        "--idle-timeout=0s",
        "--proxy-protocol",
        "--pool-port=0",
        "--pool-scrape=http://127.0.0.1:9100/metrics",
        "--pool-metric=waits=a,used=b{state=busy}",
        "--pool-metric=max=c",
    ]);
    assert_eq!(config.idle_timeout, Duration::ZERO);
    assert_eq!((config.pool_port, config.proxy_protocol), (0, true));
    let url: ScrapeUrl = "http://127.0.0.1:9100/metrics".parse().unwrap();
    assert_eq!(config.pool_scrape, Some(url));
    let metrics: Vec<CustomMetric> = ["waits=a", "used=b{state=busy}", "max=c"]
        .map(|metric| metric.parse().unwrap())
        .into();
    assert_eq!(config.pool_metrics, metrics);
}

#[test]
fn tenant_rules_keep_their_order() {
    let rules = config(&[
        "--tenant=header:x-tenant path:/t/{tenant}/",
        "--tenant",
        "fixed:rest",
    ]);
    let kinds: Vec<Rule> = ["header:x-tenant", "path:/t/{tenant}/", "fixed:rest"]
        .map(|rule| rule.parse().unwrap())
        .into();
    assert_eq!(rules.tenant, kinds);
}

#[test]
fn the_version_flag_has_two_meanings() {
    let own = Command::Print(format!("coalmine-agent {}\n", env!("CARGO_PKG_VERSION")));
    for args in [&["a", "--version"][..], &["a", "-V"], &["a", "--agent-version"]] {
        assert_eq!(parse(args).unwrap(), own);
    }
    assert_eq!(config(&[]).version, "v2");
    assert!(matches!(parse(&["a", "--help"]), Ok(Command::Print(_))));
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    let good = |without: &str| -> Vec<&'static str> {
        let kept = GOOD
            .iter()
            .filter(|arg| without.is_empty() || !arg.starts_with(without));
        kept.copied().collect()
    };
    for (without, more, part) in [
        (
            "--service",
            &[][..],
            "--service is missing: give the service's name, or set COALMINE_AGENT_SERVICE",
        ),
        ("--aggregator", &[], "--aggregator is missing"),
        ("--version", &[], "--version is missing"),
        ("--arm", &[], "--arm is missing: give canary or baseline"),
        ("--arm", &["--arm=green"], "\"green\" is not an arm"),
        (
            "--aggregator",
            &["--aggregator=https://a:1"],
            "TLS to the aggregator is not supported yet",
        ),
        ("--aggregator", &["--aggregator=aggregator:7443"], "is not a URL"),
        ("", &["--instance=a b"], "has the character ' '"),
        ("", &["--window=5ms"], "a window has 10ms to 60s"),
        ("", &["--window=1"], "is not a duration"),
        ("", &["--ring=8MB"], "is not a size"),
        ("", &["--ring=1KiB"], "is not between 64KiB and 1GiB"),
        ("", &["--max-tenants=0"], "--max-tenants"),
        ("", &["--tenant=cookie:x"], "is not a rule"),
        (
            "",
            &["--tenant=fixed:a", "--tenant=header:x"],
            "no rule can follow",
        ),
        ("", &["--listen=here"], "give an IP address and a port"),
        ("", &["--upstream=8080"], "is not HOST:PORT"),
        (
            "",
            &["--listen=127.0.0.1:1", "--upstream=127.0.0.1:1"],
            "the agent's own --listen",
        ),
        ("", &["--listen=127.0.0.1:1", "--admin=127.0.0.1:1"], "are both"),
        (
            "",
            &["--pool-scrape=https://app/metrics"],
            "use http:// in the pod",
        ),
        ("", &["--pool-metric=wait=a"], "is no role"),
        ("", &["--log=xml"], "--log"),
        ("", &["--nonsense"], "--nonsense"),
        ("", &["stray"], "stray"),
    ] {
        let args = [&good(without), more].concat();
        let error = parse(&args).unwrap_err().to_string();
        assert!(error.contains(part), "{args:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
        assert!(error.ends_with("see coalmine-agent --help"), "{error}");
    }
}
