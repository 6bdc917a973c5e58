//! What is read and what is refused, with the places and words of Prometheus 2.42 (from `promtool check rules`).

use proptest::prelude::*;

use super::*;

fn accepted(source: &str) -> Expression {
    parse(source).unwrap_or_else(|refusal| panic!("{source}: {refusal:?}"))
}

fn selector(source: &str) -> Selector {
    match accepted(source) {
        Expression::Selector(selector) => selector,
        other => panic!("{source} is {other:?}"),
    }
}

fn refused(source: &str) -> String {
    match parse(source) {
        Err(Refusal::Malformed(why)) => why,
        other => panic!("{source} is {other:?}"),
    }
}

/// Whether a selector means a series with these labels.
fn means(source: &str, labels: &[(&str, &'static str)]) -> bool {
    let value_of = |label: &str| {
        let found = labels.iter().find(|(name, _)| *name == label);
        Some(found.map_or("", |(_, value)| *value))
    };
    selector(source).matches(value_of)
}

#[test]
fn numbers_are_read_as_prometheus_reads_them() {
    for (source, value) in [
        ("1", 1.0),
        (" 1 # one", 1.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1_000.0),
        ("1E-3", 0.001),
        ("0x1F", 31.0),
        ("0X1e", 30.0),
        ("010", 8.0),
        ("08", 8.0),
        ("010.5", 10.5),
        ("0", 0.0),
        ("-1", -1.0),
        ("+1", 1.0),
        ("--1", 1.0),
        ("- + 1", -1.0),
        ("Inf", f64::INFINITY),
        ("+inf", f64::INFINITY),
        ("-INF", f64::NEG_INFINITY),
        ("99999999999999999999", 1e20),
    ] {
        assert!(
            matches!(accepted(source), Expression::Number(found) if found == value),
            "{source}"
        );
        let vector = format!("vector( {source}\n)");
        assert!(
            matches!(accepted(&vector), Expression::Vector(found) if found == value),
            "{vector}"
        );
    }
    assert!(matches!(accepted("NaN"), Expression::Number(value) if value.is_nan()));
    assert!(matches!(accepted("vector (nan)"), Expression::Vector(value) if value.is_nan()));
}

#[test]
fn selectors_have_four_operators_and_three_quotes() {
    let labels = [(NAME, "up"), ("a", "b")];
    for source in [
        "up",
        "up{}",
        "up { a = \"b\" , }",
        "{__name__=\"up\"}",
        "{__name__=\"up\",a='b'}",
        "up{a=`b`}",
        "up{a=\"\\x62\"}",
        "up{a=\"\\142\"}",
        "up{a='\\u0062'}",
        "up{a=\"\\U00000062\"}",
        "up{a!=\"c\"}",
        "up{a=~\"b|c\"}",
        "up{a=~\".*\"}",
        "up{a!~\"c.*\"}",
        "up{none=\"\"}",
        "up{none!=\"x\",none=~\"\"}",
        "up\n{\n# a comment, \"}\n a=\"b\"\n}",
    ] {
        assert!(means(source, &labels), "{source}");
    }
    for source in [
        "down",
        "up{a=\"B\"}",
        "up{a=\"b\",a=\"c\"}",
        "up{a!=\"b\"}",
        // The whole value must match.
        "up{a=~\"\"}",
        "up{a=~\"bb|c\"}",
        "up{a!~\".\"}",
        "up{none!=\"\"}",
        "up{a=\"b\\n\"}",
        "up{a=`\\x62`}",
    ] {
        assert!(!means(source, &labels), "{source}");
    }
    let escaped = [("a", "\u{7}\u{8}\t\n\u{b}\u{c}\r\\\"'é")];
    assert!(means(r#"{a="\a\b\t\n\v\f\r\\\"'\xc3\xa9"}"#, &escaped));
    assert!(means(r#"{a='\a\b\t\n\v\f\r\\"\'é'}"#, &escaped));
    // Anchors hold all of the alternatives.
    assert!(!means("{a=~\"b|c\"}", &[("a", "bx")]));
    assert!(!means("{a=~\"b|c\"}", &[("a", "xc")]));
}

#[test]
fn a_selector_says_what_a_label_must_be() {
    let found = selector("up{a=\"\",a=\"b\",c=~\"d\",e!=\"f\"}");
    assert_eq!(found.name(), Some("up"));
    assert_eq!(found.only("a"), Some("b"));
    for label in ["c", "e", "g"] {
        assert_eq!(found.only(label), None, "{label}");
    }
    assert_eq!(found.to_string(), "up{a=\"\",a=\"b\",c=~\"d\",e!=\"f\"}");
    assert_eq!(selector("up").to_string(), "up");
    assert_eq!(selector("{__name__=~\"up\"}").name(), None);
    assert_eq!(selector("{__name__=~\"up\"}").to_string(), "{__name__=~\"up\"}");
}

/// All of it as Prometheus says it.
#[test]
fn bad_syntax_is_refused_in_the_words_of_prometheus() {
    for (source, why) in [
        ("", "1:1: parse error: no expression found in input"),
        (" # only this", "1:1: parse error: no expression found in input"),
        ("up{", "1:4: parse error: unexpected end of input inside braces"),
        ("up{a", "1:5: parse error: unexpected end of input inside braces"),
        ("up{a=", "1:6: parse error: unexpected end of input inside braces"),
        (
            "up{a=\"b\"",
            "1:9: parse error: unexpected end of input inside braces",
        ),
        (
            "up{a=\"b\",",
            "1:10: parse error: unexpected end of input inside braces",
        ),
        ("up{a=\"b", "1:6: parse error: unterminated quoted string"),
        ("up{a=\"b\n\"}", "1:6: parse error: unterminated quoted string"),
        ("up{a=`b", "1:6: parse error: unterminated raw string"),
        (
            "up{,}",
            "1:4: parse error: unexpected \",\" in label matching, expected identifier or \"}\"",
        ),
        (
            "up{a=\"b\" c=\"d\"}",
            "1:10: parse error: unexpected identifier \"c\" in label matching, expected \",\" or \"}\"",
        ),
        (
            "up{a=b}",
            "1:6: parse error: unexpected identifier \"b\" in label matching, expected string",
        ),
        (
            "up{a>\"b\"}",
            "1:5: parse error: unexpected character inside braces: '>'",
        ),
        (
            "up{a=\"\\q\"}",
            "1:6: parse error: unknown escape sequence U+0071 'q'",
        ),
        (
            "up{a='\\\"'}",
            "1:6: parse error: unknown escape sequence U+0022 '\"'",
        ),
        (
            "up{a=\"\\400\"}",
            "1:6: parse error: escape sequence is an invalid Unicode code point",
        ),
        (
            "up{a=\"\\ud800\"}",
            "1:6: parse error: escape sequence is an invalid Unicode code point",
        ),
        (
            "{}",
            "1:1: parse error: vector selector must contain at least one non-empty matcher",
        ),
        (
            "{a=\"\"}",
            "1:1: parse error: vector selector must contain at least one non-empty matcher",
        ),
        (
            "{a=~\".*\"}",
            "1:1: parse error: vector selector must contain at least one non-empty matcher",
        ),
        (
            "up{__name__=\"x\"}",
            "1:1: parse error: metric name must not be set twice: \"up\" or \"x\"",
        ),
        ("1_000", "1:1: parse error: bad number or duration syntax: \"1\""),
        ("vector(1", "1:9: parse error: unclosed left parenthesis"),
        ("up up", "1:4: parse error: unexpected identifier \"up\""),
        ("inf{}", "1:4: parse error: unexpected \"{\""),
        ("up\n  up", "2:3: parse error: unexpected identifier \"up\""),
        (
            "up{a=\"\u{fc}\"} x",
            "1:12: parse error: unexpected identifier \"x\"",
        ),
    ] {
        assert_eq!(refused(source), why, "{source}");
    }
}

#[test]
fn whatever_else_is_refused_where_it_is() {
    for (source, place) in [
        ("rate(up[5m])", "1:1: "),
        ("sum by (a) (up)", "1:5: "),
        ("up[5m]", "1:3: "),
        ("up offset 5m", "1:4: "),
        ("up @ 1", "1:4: "),
        ("up == 1", "1:4: "),
        ("1 + 1", "1:3: "),
        ("-up", "1:2: "),
        ("(1)", "1:1: "),
        ("\"text\"", "1:1: "),
        ("time()", "1:1: "),
        ("vector()", "1:8: "),
        ("vector(1,2)", "1:9: "),
        ("vector(up)", "1:8: "),
        ("vector(vector(1))", "1:8: "),
        ("vector(-", "1:9: "),
        ("5m", "1:1: "),
        ("0x", "1:1: "),
        ("1e", "1:1: "),
        ("1e400", "1:1: "),
        ("0xffffffffffffffff", "1:1: "),
        (".", "1:1: "),
        ("a.b", "1:2: "),
        (")", "1:1: "),
        ("\u{fc}", "1:1: "),
        ("up{a=\"b\"}}", "1:10: "),
        ("up{a!\"b\"}", "1:5: "),
        ("up{a}", "1:5: "),
        ("up{1=\"b\"}", "1:4: "),
        ("up{\u{e9}=\"b\"}", "1:4: "),
        ("up{a=\"\\", "1:6: "),
        ("up{a=\"\\x", "1:6: "),
        ("up{a=\"\\xg1\"}", "1:6: "),
        ("up{a=\"\\\u{e9}\"}", "1:6: "),
        ("up{a=\"\\xff\"}", "1:6: "),
        ("up{a=~\"(\"}", "1:4: "),
        ("up{b=\"\",a=~\"a)|(b\"}", "1:9: "),
        ("up{a=~\"(?:(?:(?:a{99}){99}){99})\"}", "1:4: "),
    ] {
        let why = refused(source);
        assert!(why.starts_with(place), "{source}: {why}");
        assert!(why.contains("parse error: "), "{source}: {why}");
    }
}

/// Labels that all series of a rollout share are looked at once, and the others for each.
#[test]
fn of_a_label_without_a_value_nothing_is_asked() {
    let found = selector("up{service=\"checkout\",tenant=~\"a.*\"}");
    let matches =
        |name: Option<&'static str>, service: Option<&'static str>, tenant: Option<&'static str>| {
            found.matches(|label| match label {
                NAME => name,
                "service" => service,
                _ => tenant,
            })
        };
    assert!(matches(None, Some("checkout"), None));
    assert!(!matches(None, Some("search"), None));
    assert!(matches(Some("up"), None, Some("acme")));
    assert!(!matches(Some("up"), None, Some("")));
    assert!(!matches(Some("down"), None, Some("acme")));
    assert!(matches(None, None, None));
}

#[test]
fn sizes_are_bounded() {
    assert!(refused(&" ".repeat(MAX_BYTES + 1)).contains("at most 4096"));
    let matchers = |count: usize| format!("up{{{}}}", "a=\"\",".repeat(count));
    assert!(means(&matchers(MAX_MATCHERS), &[(NAME, "up")]));
    assert!(refused(&matchers(MAX_MATCHERS + 1)).contains("at most 32 matchers"));
    let nested = format!("up{{a=~\"{}{}\"}}", "(".repeat(1_000), ")".repeat(1_000));
    assert!(refused(&nested).starts_with("1:4: "));
    let patterns = |count: usize| format!("up{{{}}}", "a=~\"\",b!~\"x\",".repeat(count));
    assert!(means(&patterns(MAX_PATTERNS / 2), &[(NAME, "up")]));
    assert!(
        refused(&patterns(MAX_PATTERNS / 2 + 1))
            .starts_with("1:30: parse error: a selector has at most 4 patterns")
    );
    let pattern = |length: usize| format!("up{{a=~\"{}\"}}", "x".repeat(length));
    assert!(!means(&pattern(100), &[(NAME, "up")]));
    assert!(refused(&pattern(400)).starts_with("1:4: parse error: error parsing regexp: "));
    // Signs and blanks are a loop and no recursion.
    let signs = "-".repeat(4_000);
    assert!(matches!(accepted(&format!("{signs}1")), Expression::Number(value) if value == 1.0));
}

/// Two of Flagger's own, as it sends them: with white space collapsed.
#[test]
fn the_metrics_of_a_mesh_are_known_as_such() {
    for source in [
        "sum( rate( istio_requests_total{ reporter=\"destination\", response_code!~\"5.*\" }[1m] ) ) / sum( rate( \
         istio_requests_total{ reporter=\"destination\" }[1m] ) ) * 100",
        "histogram_quantile( 0.99, sum( rate( envoy_cluster_upstream_rq_time_bucket{ envoy_cluster_name=~\"x\" }[1m] ) \
         ) by (le) )",
    ] {
        assert_eq!(parse(source).unwrap_err(), Refusal::OfAMesh, "{source}");
    }
    // A metric of that name is no reason.
    assert_eq!(
        selector("istio_requests_total").name(),
        Some("istio_requests_total")
    );
    assert!(refused("rate(up[5m])").contains("cannot be computed"));
}

#[test]
fn match_takes_a_selector_and_nothing_else() {
    assert_eq!(parse_selector(" up{a=\"b\"}").unwrap().name(), Some("up"));
    assert_eq!(parse_selector("{__name__=~\"u.\"}").unwrap().name(), None);
    for source in ["", "1", "vector(1)", "up 1", "{}", "(up)"] {
        parse_selector(source).unwrap_err();
    }
}

/// Text that is nearly an expression more often than noise is.
fn nearly() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("up".to_owned()),
        Just("vector(".to_owned()),
        Just("{".to_owned()),
        Just("}".to_owned()),
        Just("a=\"b\"".to_owned()),
        Just("a=~'".to_owned()),
        Just("\\u00".to_owned()),
        Just("\\".to_owned()),
        Just(",".to_owned()),
        Just("0x".to_owned()),
        Just("-1e".to_owned()),
        Just("é\n".to_owned()),
        ".{0,3}",
    ];
    prop::collection::vec(pieces, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn every_text_is_read_or_refused_with_a_reason(source in prop_oneof![any::<String>(), nearly()]) {
        match parse(&source) {
            Err(Refusal::Malformed(why)) => prop_assert!(!why.is_empty()),
            Err(Refusal::OfAMesh) => prop_assert!(source.contains("rate")),
            Ok(Expression::Number(_) | Expression::Vector(_)) => {}
            Ok(Expression::Selector(selector)) => prop_assert!(!selector.to_string().is_empty()),
        }
        // What means every series is no selector.
        if let Ok(found) = parse_selector(&source) {
            prop_assert!(!found.matches(|_| Some("")));
        }
    }
}
