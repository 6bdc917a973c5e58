//! Tests of the rules at work.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use proptest::prelude::*;

use super::*;

struct Fake<'a> {
    headers: &'a [(&'a str, &'a str)],
    target: &'a str,
}

impl Head for Fake<'_> {
    fn header(&self, name: &str) -> Header<'_> {
        let named = self.headers.iter().filter(|(n, _)| *n == name);
        Header::of(named.map(|(_, value)| value.as_bytes()))
    }

    fn host(&self) -> Header<'_> {
        self.header("host")
    }

    fn target(&self) -> &[u8] {
        self.target.as_bytes()
    }
}

/// What is expected: a name, invalid, or missing.
type Expected<'a> = Result<&'a str, bool>;
const INVALID: Expected<'static> = Err(true);
const MISSING: Expected<'static> = Err(false);

#[track_caller]
fn check(rules: &[&str], headers: &[(&str, &str)], target: &str, expected: Expected<'_>) {
    let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    let head = Fake { headers, target };
    let found = find(&rules, &head);
    let expected = match expected {
        Ok(name) => Found::Name(Name::Borrowed(name)),
        Err(true) => Found::Invalid,
        Err(false) => Found::Missing,
    };
    assert_eq!(found, expected);
}

/// What no name may be, as values of a header.
const HOSTILE: [&str; 9] = [
    "a b",
    "a\0b",
    "a\r\nb",
    "tenänt",
    "\u{202e}acme",
    "__none__",
    "__overflow__",
    "a,b",
    "<script>",
];

#[test]
fn headers_have_tenants() {
    let rule = &["header:X-Tenant-Id"][..];
    check(rule, &[("x-tenant-id", "acme")], "/", Ok("acme"));
    check(rule, &[("x-tenant-id", "Acme")], "/", Ok("Acme"));
    check(rule, &[], "/", MISSING);
    check(rule, &[("x-tenant-id", "")], "/", MISSING);
    check(
        rule,
        &[("x-tenant-id", &"a".repeat(128))],
        "/",
        Ok(&"a".repeat(128)),
    );
    check(rule, &[("x-tenant-id", &"a".repeat(200))], "/", INVALID);
    for value in HOSTILE {
        check(rule, &[("x-tenant-id", value)], "/", INVALID);
    }
    let [a, b] = [("x-tenant-id", "a"), ("x-tenant-id", "b")];
    check(rule, &[a, a], "/", Ok("a"));
    check(rule, &[a, b], "/", INVALID);
    check(rule, &[a, ("x-tenant-id", "")], "/", INVALID);
}

#[test]
fn hosts_have_tenants() {
    let rule = &["host:{tenant}.api.example.com"][..];
    check(rule, &[("host", "acme.api.example.com:8080")], "/", Ok("acme"));
    check(rule, &[("host", "ACME.Api.example.com")], "/", Ok("acme"));
    check(rule, &[("host", "a.b.api.example.com")], "/", MISSING);
    check(rule, &[("host", ".api.example.com")], "/", INVALID);
    check(rule, &[("host", "a\0b.api.example.com")], "/", INVALID);
    check(rule, &[("host", "__none__.api.example.com")], "/", INVALID);
    check(rule, &[("host", "example.com")], "/", MISSING);
    check(rule, &[("host", "")], "/", MISSING);
    check(
        &["host:{tenant}.api.example.com|regex=t-(.+)"],
        &[("host", "T-Acme.api.example.com")],
        "/",
        Ok("acme"),
    );
}

#[test]
fn paths_have_tenants() {
    let rule = &["path:/t/{tenant}/"][..];
    check(rule, &[], "/t/acme/x?y=/t/z/", Ok("acme"));
    check(rule, &[], "/t/acme?x", Ok("acme"));
    check(rule, &[], "/t/acme#/t/z/", Ok("acme"));
    check(rule, &[], "http://h/t/acme/x", Ok("acme"));
    check(rule, &[], "http://h?/t/acme/x", MISSING);
    check(rule, &[], "/t/", INVALID);
    check(rule, &[], "/u/acme/", MISSING);
    check(rule, &[], "*", MISSING);
    check(rule, &[], "h:443", MISSING);
    check(&["path:/t/{tenant}/v1"], &[], "/t/acme/v2", MISSING);
    // What is coded is read, but must be a name then.
    check(rule, &[], "/t/%61c%6De/", Ok("acme"));
    check(rule, &[], "/t/a+b/", Ok("a+b"));
    for target in [
        "/t/ac%20me/",
        "/t/%00/",
        "/t/%c3%a4/",
        "/t/%ff/",
        "/t/a%2Fb/",
        "/t/a%2fb/",
        "/t/%/",
        "/t/%4/",
        "/t/%zz/",
        "/t/%+1/",
        "/t/%5f%5fnone__/",
        "/t/./",
        "/t/../",
        "/t/%2e%2E/",
    ] {
        check(rule, &[], target, INVALID);
    }
}

#[test]
fn paths_that_servers_read_differently_have_no_tenant() {
    let rule = &["path:/t/{tenant}/"][..];
    for target in [
        "/t/acme/../evil/x",
        "/t/acme/./x",
        "/t/acme/x/..",
        "/t/acme/x/.",
        "/x/../t/acme/",
        "/./t/acme/",
        "/x/y/z/../..",
        "http://h/x/../t/acme/",
        "/t/acme/%2e%2E/evil/",
        "/t/acme/.%2e/evil/",
        "/t/acme/..;x=y/evil/",
        "/t/acme/..%2fevil/",
        "/t/acme/x%2F..%2F..%2Fevil/",
        "/t/acme/..\\evil/",
        "/t/acme/x\\..%5cevil",
        "//t/acme/",
        "/t//acme/",
        "//h/t/acme/",
        "//",
        "/t\\acme/",
        "/\\t/acme/",
        "/t/evil\\acme/",
        "/t%2facme/",
        "/t%5Cacme/",
        "/t/evil%5cacme/",
        "/%74/acme/",
        "/t;x=y/acme/",
    ] {
        check(rule, &[], target, INVALID);
    }
    check(&["path:/t/{tenant}/", "fixed:rest"], &[], "/x/../t/a", INVALID);
    // What is left can be read in one way, or does not matter to the rule.
    for target in [
        "/t/acme/x//y/a%2Fb/c\\d/e;f=g",
        "/t/acme//",
        "/t/acme/.../..x/x../.x/x.y",
        "/t/acme/?x=/../",
        "/t/acme/%252e%252e/",
        "/t/acme/%/",
    ] {
        check(rule, &[], target, Ok("acme"));
    }
    for target in ["/", "/u//acme/", "/u/%2F/", "/%75/acme/", "/u;x/acme/"] {
        check(rule, &[], target, MISSING);
    }
    // What stands behind the tenant is compared too.
    let version = &["path:/t/{tenant}/v1"][..];
    check(version, &[], "/t/acme/v1/x//y", Ok("acme"));
    check(version, &[], "/t/acme/v2//v1", MISSING);
    for target in ["/t/acme//v1", "/t//acme/v1", "/t/acme/%761/", "/t/acme%2Fv1"] {
        check(version, &[], target, INVALID);
    }
    // A rule may say itself what is coded.
    check(&["path:/a%2Fb/{tenant}/"], &[], "/a%2Fb/acme/", Ok("acme"));
}

#[test]
fn queries_have_tenants() {
    let rule = &["query:tenant"][..];
    check(rule, &[], "/x?tenant=acme", Ok("acme"));
    check(rule, &[], "/x?a=b&tenant=acme&c", Ok("acme"));
    check(rule, &[], "http://h/x?tenant=acme#y", Ok("acme"));
    check(rule, &[], "/x?%74enant=acm%65", Ok("acme"));
    check(rule, &[], "/x?tenant=a%2Fb", Ok("a/b"));
    check(rule, &[], "/x?tenant=acme&tenant=%61cme", Ok("acme"));
    for target in [
        "/x",
        "/x?",
        "/x?tenant",
        "/x?tenant=",
        "/x?tenants=acme",
        "/tenant=acme",
        "/x#?tenant=acme",
        "/x?Tenant=acme",
        "/x?a%=b&%zz",
    ] {
        check(rule, &[], target, MISSING);
    }
    for target in [
        "/x?tenant=a&tenant=b",
        "/x?tenant=&tenant=a",
        "/x?tenant=a+b",
        "/x?tenant=%",
        "/x?tenant=%0",
        "/x?tenant=%00",
        "/x?tenant=%C3%A4",
        "/x?tenant=a&tenant=%g0",
        "/x?tenant=a;tenant=b",
        "/x?tenant=__none__",
    ] {
        check(rule, &[], target, INVALID);
    }
    let long = format!("/x?tenant={}", "a".repeat(200));
    check(rule, &[], &long, INVALID);
    check(&["query:f[t]"], &[], "/x?f%5Bt%5D=acme", Ok("acme"));
}

/// A token with these claims.
fn token(claims: &str) -> String {
    let [header, claims] = [r#"{"alg":"none"}"#, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}.{claims}.c2lnbmF0dXJl")
}

#[test]
fn tokens_have_tenants() {
    // The token of RFC 7519, section 3.1.
    let example = "Bearer eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.\
        eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.\
        dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    check(&["jwt:iss"], &[("authorization", example)], "/", Ok("joe"));
    check(&["jwt:exp"], &[("authorization", example)], "/", Ok("1300819380"));
    check(&["jwt:sub"], &[("authorization", example)], "/", MISSING);
    let root = &["jwt:http://example.com/is_root"];
    check(root, &[("authorization", example)], "/", INVALID);

    let claims = |rule: &str, claims: &str, expected: Expected<'_>| {
        let bearer = format!("bearer  {}", token(claims));
        check(&[rule], &[("authorization", &bearer)], "/", expected);
    };
    claims(
        "jwt:org.id",
        r#"{"id":"x","org":{"name":"y","id":"acme"}}"#,
        Ok("acme"),
    );
    claims("jwt:org.id", r#"{"org.id":"acme"}"#, MISSING);
    claims("jwt:org.id", r#"{"org":null}"#, MISSING);
    claims("jwt:org.id", r#"{"org":{}}"#, MISSING);
    claims("jwt:org.id", r#"{"org":"acme"}"#, INVALID);
    claims("jwt:org.id", r#"{"org":["acme"]}"#, INVALID);
    claims("jwt:org", r#"{"org":{"id":"acme"}}"#, INVALID);
    claims("jwt:org", r#"{"org":["acme"]}"#, INVALID);
    claims("jwt:org", r#"{"org":-7}"#, Ok("-7"));
    claims(
        "jwt:org",
        r#"{"org":18446744073709551615}"#,
        Ok("18446744073709551615"),
    );
    claims("jwt:org", r#"{"org":18446744073709551616}"#, INVALID);
    claims("jwt:org", r#"{"org":1.5}"#, INVALID);
    claims("jwt:org", r#"{"org":true}"#, INVALID);
    claims("jwt:org", r#"{"org":null}"#, MISSING);
    claims("jwt:org", r#"{"org":""}"#, MISSING);
    claims("jwt:org", r#"{"o\u0072g":"\u0061cme"}"#, Ok("acme"));
    claims("jwt:org", r#"{"org":"a\u0000b"}"#, INVALID);
    claims("jwt:org", r#"{"org":"__none__"}"#, INVALID);
    claims("jwt:org", r#"{"org":"a","org":"b"}"#, INVALID);
    claims("jwt:org", r#"{"org":"a","org":"a"}"#, INVALID);
    claims("jwt:org", r#"{"org":"a"} x"#, INVALID);
    claims("jwt:org", r#"{"org":"a""#, INVALID);
    claims("jwt:org", r#"["org"]"#, INVALID);
    claims("jwt:org", "", INVALID);
    claims(
        "jwt:org|lower|regex=org_(.*)",
        r#"{"org":"ORG_Acme"}"#,
        Ok("acme"),
    );
    let deep = format!(
        r#"{{"deep":{}1{},"org":"acme"}}"#,
        "[".repeat(2000),
        "]".repeat(2000)
    );
    claims("jwt:org", &deep, Ok("acme"));
    let long = format!(r#"{{"org":"acme","rest":"{}"}}"#, "x".repeat(9000));
    claims("jwt:org", &long, INVALID);
}

#[test]
fn what_is_no_token_has_no_tenant() {
    let rule = &["jwt:org"][..];
    for (value, expected) in [
        ("", MISSING),
        ("Bearer", MISSING),
        ("Bearer ", MISSING),
        ("Basic YTpi", MISSING),
        ("Bearerx.y.z", MISSING),
        ("Bearer opaque", INVALID),
        ("Bearer a.b", INVALID),
        ("Bearer ..", INVALID),
        ("Bearer a.b.c.d.e", INVALID),
        ("Bearer a.!.c", INVALID),
        // {"org":"acme"} with padding, which a token does not have.
        ("Bearer a.eyJvcmciOiJhY21lIn0=.c", INVALID),
        ("Bearer a.eyJvcmciOiJhY21lIn0.c", Ok("acme")),
    ] {
        check(rule, &[("authorization", value)], "/", expected);
    }
    let [a, b] = ["a", "b"].map(|org| format!("Bearer {}", token(&format!(r#"{{"org":"{org}"}}"#))));
    check(
        rule,
        &[("authorization", &a), ("authorization", &b)],
        "/",
        INVALID,
    );
    // A header of its own has the token as it is, or as a bearer's.
    let bare = token(r#"{"org":"acme"}"#);
    let other = &["jwt:org@X-Token"][..];
    check(other, &[("x-token", &bare)], "/", Ok("acme"));
    check(other, &[("x-token", &a)], "/", Ok("a"));
    check(other, &[("authorization", &a)], "/", MISSING);
}

#[test]
fn options_work_in_their_order() {
    let x = |value: &'static str| [("x", value)];
    check(&["header:x|lower"], &x("AcMe"), "/", Ok("acme"));
    check(&["header:x|lower"], &x("A B"), "/", INVALID);
    check(&["header:x|regex=[a-z]+"], &x("acme"), "/", Ok("acme"));
    // What does not fit is not tried with the next rule.
    check(&["header:x|regex=[a-z]+", "fixed:rest"], &x("Acme"), "/", INVALID);
    check(&["header:x|regex=[a-z]+", "fixed:rest"], &[], "/", Ok("rest"));
    check(&["header:x|lower|regex=[a-z]+"], &x("ACME"), "/", Ok("acme"));
    check(
        &["header:x|regex=(?:t:)?([^;]*)(?:;.*)?"],
        &x("t:acme;é"),
        "/",
        Ok("acme"),
    );
    check(
        &["header:x|regex=(?:t:)?([^;]*)(?:;.*)?"],
        &x("t:;"),
        "/",
        INVALID,
    );
    check(&["header:x|regex=.*"], &x("__none__"), "/", INVALID);
    let long = "a".repeat(MAX_SHAPED_BYTES + 1);
    check(&["header:x|regex=(a).*"], &[("x", &long[1..])], "/", Ok("a"));
    check(&["header:x|regex=(a).*"], &[("x", &long)], "/", INVALID);
    check(&["query:t|regex=u-(.+)"], &[], "/?t=u%2D7", Ok("7"));
    check(&["path:/{tenant}|lower"], &[], "/%41cme", Ok("acme"));
    let capitals = "A".repeat(MAX_SHAPED_BYTES + 1);
    let lower = &["header:x|lower"][..];
    check(lower, &[("x", &capitals[..128])], "/", Ok(&"a".repeat(128)));
    check(lower, &[("x", &capitals[..129])], "/", INVALID);
    check(lower, &[("x", &capitals)], "/", INVALID);
}

#[test]
fn the_first_rule_that_applies_decides() {
    let rules = &["header:x-tenant", "query:t", "path:/t/{tenant}/", "fixed:rest"][..];
    check(rules, &[("x-tenant", "a")], "/t/b/?t=c", Ok("a"));
    check(rules, &[], "/t/b/?t=c", Ok("c"));
    check(rules, &[], "/t/b/", Ok("b"));
    check(rules, &[], "/", Ok("rest"));
    check(rules, &[("x-tenant", "a b")], "/t/b/", INVALID);
    check(rules, &[], "/t/b/?t=c+d", INVALID);
    check(&[], &[("x-tenant", "a")], "/", MISSING);
}

#[test]
fn a_name_that_stands_as_it_is_is_borrowed() {
    let headers = &[("host", "acme.example.com"), ("x", "acme")][..];
    let head = Fake {
        headers,
        target: "/t/acme/?tenant=acme",
    };
    for rule in [
        "header:x",
        "header:x|lower",
        "host:{tenant}.example.com",
        "path:/t/{tenant}/",
        "query:tenant",
        "fixed:acme",
    ] {
        let rules = [rule.parse::<Rule>().unwrap()];
        let found = find(&rules, &head);
        assert!(
            matches!(found, Found::Name(Name::Borrowed("acme"))),
            "{rule}: {found:?}"
        );
    }
}

proptest! {
    #[test]
    fn what_is_found_is_a_name(value in "[ -~\u{e4}]{0,40}", target in "[/?&=%+#:.a-c0-9t]{0,40}") {
        let headers = [("x", value.as_str()), ("host", value.as_str()), ("authorization", value.as_str())];
        let head = Fake { headers: &headers, target: &target };
        for rule in [
            "header:x|lower",
            "header:x|regex=.(.*)",
            "host:{tenant}",
            "path:/{tenant}/",
            "query:t",
            "jwt:a",
            "jwt:a@x",
        ] {
            let rules = [rule.parse::<Rule>().unwrap()];
            if let Found::Name(name) = find(&rules, &head) {
                prop_assert!(coalmine_proto::names::TenantName::parse(name.as_bytes()).is_ok());
            }
        }
    }
}
