//! What is refused: databases that do not fit, statements that would change what is recorded, servers that are not who
//! they should be.

use std::{fs, net::TcpListener, path::Path};

use coalmine_tests::{
    components::Aggregator,
    eventually,
    postgres::{DATABASE, Postgres, SUPERUSER, WITH_PASSWORD, psql},
};

use super::{OWNER, READER, WRITER, audits, database, ends, make_schema, migrate, serve};

/// A password, which no error may show.
const PASSWORD: &str = "open-sesame";

/// Exit code where what was asked for makes no sense, and where something else is not as it should be.
const USAGE: i32 = 64;
const FAILED: i32 = 1;

/// The aggregator does not start with a database, and says all of this.
fn refuses(aggregator: &Aggregator, url: &str, more: &[&str], code: i32, says: &[&str]) {
    let mut arguments = serve(aggregator, url);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let directory = aggregator.data.parent().unwrap();
    let (found, said) = ends(directory, &arguments);
    assert_eq!(found, Some(code), "{url}: {said}");
    for part in says {
        assert!(said.contains(part), "{url}: does not say {part:?}: {said}");
    }
    assert!(!said.contains("panicked") && !said.contains(PASSWORD), "{said}");
}

/// An aggregator with a directory of its own.
fn aggregator(directory: &Path, name: &str) -> Aggregator {
    let own = directory.join(name);
    fs::create_dir(&own).unwrap();
    Aggregator::prepare(&own)
}

#[test]
fn a_database_that_does_not_fit_is_refused_with_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut postgres = Postgres::start(path);
    let plain = postgres.url(SUPERUSER, DATABASE);
    let server = aggregator(path, "server");

    refuses(&server, "http://127.0.0.1/", &[], USAGE, &["--postgres"]);
    refuses(
        &server,
        &plain,
        &[],
        FAILED,
        &["run `coalmine-aggregator migrate`"],
    );

    // With the schema it starts, and a second time the schema is there already.
    make_schema(path, &postgres);
    let (code, said) = migrate(path, &postgres.url(OWNER, DATABASE));
    assert_eq!(code, Some(0), "{said}");
    postgres.query(&format!(
        "CREATE ROLE {WITH_PASSWORD} LOGIN PASSWORD '{PASSWORD}' IN ROLE coalmine_writer"
    ));
    let with = |password: &str| {
        let user = format!("{WITH_PASSWORD}:{password}");
        postgres.url(&user, DATABASE)
    };
    let mut server = server.with_arguments(&["--postgres", &with(PASSWORD)]);
    server.launch();
    server.terminate();

    // Somebody else's schema is left alone.
    postgres.query(
        "INSERT INTO refinery_schema_history (version, name, applied_on, checksum)
         VALUES (9999, 'later', '2100-01-01T00:00:00Z', '1')",
    );
    refuses(&server, &plain, &[], FAILED, &["9999", "newer"]);
    let (code, said) = migrate(path, &plain);
    assert_eq!(code, Some(FAILED), "{said}");
    postgres.query("DELETE FROM refinery_schema_history WHERE version = 9999");

    // The log is there, and its key is not.
    let keyless = aggregator(path, "keyless");
    refuses(&keyless, &plain, &[], FAILED, &["key", "no other key"]);

    // Neither whoever does not know the password may serve, nor whoever may only read.
    refuses(&server, &with("guess"), &[], FAILED, &["password", WITH_PASSWORD]);
    refuses(
        &server,
        &postgres.url(READER, DATABASE),
        &[],
        FAILED,
        &["permission denied"],
    );

    // The error names the place, and not the password.
    let (away, port) = (with(PASSWORD), postgres.address.port().to_string());
    postgres.stop_immediate();
    refuses(&server, &away, &[], FAILED, &["database", &port]);
    let (code, said) = migrate(path, &away);
    assert_eq!(code, Some(FAILED), "{said}");
    assert!(said.contains(&port) && !said.contains(PASSWORD), "{said}");
}

#[test]
fn whoever_is_told_to_stop_while_it_starts_stops_in_order() {
    let directory = tempfile::tempdir().unwrap();
    // A database that never answers: the start waits for it.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    mute.set_nonblocking(true).unwrap();
    let url = format!("postgres://{WRITER}@{}/{DATABASE}", mute.local_addr().unwrap());
    let mut server = Aggregator::prepare(directory.path()).with_arguments(&["--postgres", &url]);
    server.spawn();
    let _asked = eventually("the database is asked", || mute.accept().ok());
    server.terminate();
    let log = fs::read_to_string(directory.path().join("aggregator.log")).unwrap();
    assert!(log.contains("stopping before it was ready"), "{log}");
}

#[test]
fn what_is_recorded_can_only_be_added_to() {
    let directory = tempfile::tempdir().unwrap();
    let postgres = database(directory.path());
    // No agent reports, and nobody waits for one for long.
    let url = postgres.url(WRITER, DATABASE);
    let arguments = ["--postgres", &url, "--grace-seconds", "1"];
    let mut server = Aggregator::prepare(directory.path()).with_arguments(&arguments);
    server.launch();
    let rollout = server.start_rollout();
    eventually("a decision is on record", || {
        let view = server.get(&format!("/v1/rollouts/{rollout}"));
        (view["recorded"] == true).then_some(())
    });

    let attempt = |user: &str, sql: &str| psql(&postgres.url(user, DATABASE), &[sql]);
    for (table, column) in [
        ("log_entry", "line"),
        ("evidence_blob", "bytes"),
        ("log_checkpoint", "note"),
    ] {
        let rows: u64 = postgres
            .value(&format!("SELECT count(*) FROM {table}"))
            .parse()
            .unwrap();
        assert!(rows > 0, "{table} has nothing to change");
        for sql in [
            format!("UPDATE {table} SET {column} = {column}"),
            format!("DELETE FROM {table}"),
            format!("TRUNCATE {table}"),
        ] {
            // The aggregator's and the reader's roles may not; the owner and the superuser meet the second fence.
            for user in [WRITER, READER] {
                let refusal = attempt(user, &sql).unwrap_err();
                assert!(refusal.contains("permission denied"), "{user}: {sql}: {refusal}");
            }
            for user in [OWNER, SUPERUSER] {
                let refusal = attempt(user, &sql).unwrap_err();
                assert!(refusal.contains("append-only"), "{user}: {sql}: {refusal}");
            }
        }
        let refusal = attempt(WRITER, &format!("DROP TABLE {table}")).unwrap_err();
        assert!(refusal.contains("must be owner"), "{refusal}");
        let refusal = attempt(READER, &format!("INSERT INTO {table} SELECT * FROM {table}")).unwrap_err();
        assert!(refusal.contains("permission denied"), "{refusal}");
    }

    let answer = server.post(&format!("/v1/rollouts/{rollout}/end"), &serde_json::json!({}));
    assert_eq!(answer.status, 200, "{}", answer.body);
    audits(directory.path(), &server, &postgres);
}

#[test]
fn a_server_is_believed_only_with_a_certificate_that_is_trusted_for_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (postgres, authority) = Postgres::start_tls(path);
    make_schema(path, &postgres);
    let server = aggregator(path, "server");
    let required = |host: &str, more: &str| {
        let port = postgres.address.port();
        format!("postgres://{WRITER}@{host}:{port}/{DATABASE}?sslmode=require{more}")
    };
    let good = required("127.0.0.1", "");
    let roots = authority.display().to_string();
    let trusting = ["--tls-ca", &roots];

    refuses(&server, &good, &[], FAILED, &["certificate"]);
    let elsewhere = required("elsewhere.test", "&hostaddr=127.0.0.1");
    refuses(&server, &elsewhere, &trusting, FAILED, &["certificate"]);
    let missing = path.join("missing.pem").display().to_string();
    refuses(
        &server,
        &good,
        &["--tls-ca", &missing],
        USAGE,
        &["--tls-ca", &missing],
    );
    let key = path.join("server.key").display().to_string();
    refuses(
        &server,
        &good,
        &["--tls-ca", &key],
        USAGE,
        &["--tls-ca", "no certificate"],
    );

    let mut server = server.with_arguments(&["--postgres", &good, "--tls-ca", &roots]);
    server.launch();
    let sessions = |with: &str| {
        postgres.value(&format!(
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = '{WRITER}' AND {with}"
        ))
    };
    assert_ne!(sessions("ssl"), "0");
    assert_eq!(sessions("NOT ssl"), "0");
    server.terminate();
}
