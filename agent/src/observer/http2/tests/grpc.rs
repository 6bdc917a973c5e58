//! Tests of gRPC calls: where the outcome stands, deadlines, conversations, and binary metadata.

use super::*;

/// A call of gRPC that goes on, with further fields.
fn begin_call(stream: u32, tenant: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let fields = [("content-type", "application/grpc"), ("te", "trailers")];
    post(stream, tenant, &[&fields[..], more].concat())
}

fn call(stream: u32, tenant: &str) -> Vec<u8> {
    [begin_call(stream, tenant, &[]), data(stream, END_STREAM, 7)].concat()
}

#[test]
fn grpc_outcomes_stand_in_the_trailers() {
    let end = |status: &str| -> Vec<Vec<u8>> {
        let head = headers(1, 0, &[(":status", "200"), ("content-type", "application/grpc")]);
        vec![
            head,
            data(1, 0, 12),
            headers(1, END_STREAM, &[("grpc-status", status)]),
        ]
    };
    for (code, outcome) in [
        ("0", Success),
        ("5", ClientError),
        ("14", ServerError),
        ("99", ServerError),
        ("x", ServerError),
        ("", ServerError),
    ] {
        check(&[q(&[call(1, "a")]), a(&end(code))], &[("a", outcome)], None);
    }
    // A call that is no gRPC does not look at it.
    check(&[q(&[get(1, "a")]), a(&end("14"))], &[("a", Success)], None);
}

#[test]
fn grpc_answers_without_a_body() {
    let only = |status, code| headers(1, END_STREAM, &[(":status", status), ("grpc-status", code)]);
    for (answer, outcome) in [
        (only("200", "0"), Success),
        (only("200", "3"), ClientError),
        (only("200", "8"), ServerError),
        (status(1, END_STREAM, "200"), ServerError),
        // Other statuses are those of what stands in front of the service, or of a service that speaks no
        // gRPC (grpc/doc/http-grpc-status-mapping.md).
        (status(1, END_STREAM, "400"), ServerError),
        (status(1, END_STREAM, "401"), ClientError),
        (status(1, END_STREAM, "403"), ClientError),
        (status(1, END_STREAM, "404"), ServerError),
        (status(1, END_STREAM, "302"), ServerError),
        (status(1, END_STREAM, "503"), ServerError),
        (only("503", "0"), ServerError),
        (only("404", "0"), ServerError),
        (only("404", "5"), ClientError),
        (only("401", "14"), ServerError),
    ] {
        check(&[q(&[call(1, "a")]), a(&[answer])], &[("a", outcome)], None);
    }
    // Without trailers the call has no status, which is UNKNOWN.
    let answer = a(&[status(1, 0, "200"), data(1, END_STREAM, 9)]);
    check(&[q(&[call(1, "a")]), answer], &[("a", ServerError)], None);
}

#[test]
fn a_conversation_has_no_latency() {
    let request = q(&[begin_call(1, "a", &[]), data(1, 0, 9)]);
    let head = status(1, 0, "200");
    let end = headers(1, END_STREAM, &[("grpc-status", "0")]);
    let is_stream = |events: &[On]| {
        let (notes, _) = check(events, &[("a", Success)], None);
        notes.times[0].is_stream
    };
    assert!(is_stream(&[
        request.clone(),
        a(&[head.clone(), data(1, 0, 9)]),
        q(&[data(1, END_STREAM, 9)]),
        a(&[data(1, 0, 9), end.clone()]),
    ]));
    // An answer without a body is none, nor what comes after the whole request, nor what is no call.
    let only = headers(1, END_STREAM, &[(":status", "200"), ("grpc-status", "0")]);
    assert!(!is_stream(&[request.clone(), a(&[only])]));
    assert!(!is_stream(&[
        request,
        q(&[data(1, END_STREAM, 9)]),
        a(&[head.clone(), data(1, 0, 9), end]),
    ]));
    let plain = q(&[post(1, "a", &[])]);
    assert!(!is_stream(&[plain, a(&[head, data(1, END_STREAM, 9)])]));
}

#[test]
fn a_caller_that_gives_up_at_its_deadline_got_no_answer_in_time() {
    // Each event comes a thousand nanoseconds after the one before.
    let given_up = |request: Vec<u8>, outcome| {
        let (notes, _) = check(&[q(&[request]), q(&[reset(1, 8)])], &[("a", outcome)], None);
        assert_eq!(notes.times[0].total_ns, 1000);
    };
    for (timeout, outcome) in [
        ("1000n", Timeout),
        ("1u", Timeout),
        ("1066n", Timeout),
        ("1067n", ClientAbort),
        ("1m", ClientAbort),
        ("1S", ClientAbort),
        ("1 u", ClientAbort),
        ("", ClientAbort),
    ] {
        given_up(begin_call(1, "a", &[("grpc-timeout", timeout)]), outcome);
    }
    given_up(begin_call(1, "a", &[]), ClientAbort);
    // The field says nothing about what is no call.
    given_up(post(1, "a", &[("grpc-timeout", "1n")]), ClientAbort);
    // Also in the middle of an answer, but not once that is complete, nor by the server.
    let request = q(&[begin_call(1, "a", &[("grpc-timeout", "2u")])]);
    let reset_by_client = q(&[reset(1, 8)]);
    let begun = a(&[status(1, 0, "200"), data(1, 0, 9)]);
    check(
        &[request.clone(), begun, reset_by_client.clone()],
        &[("a", Timeout)],
        None,
    );
    let whole = a(&[headers(
        1,
        END_STREAM,
        &[(":status", "200"), ("grpc-status", "0")],
    )]);
    check(
        &[request.clone(), whole, reset_by_client],
        &[("a", Success)],
        None,
    );
    let pause = q(&[data(1, 0, 9)]);
    check(
        &[request, pause, a(&[reset(1, 8)])],
        &[("a", UpstreamReset)],
        None,
    );
}

#[test]
fn binary_metadata_is_accepted_where_the_server_takes_it() {
    // grpc/proposal/G1-true-binary-metadata.md: the setting, and a value as it is behind a byte 0.
    let setting = |value| a(&[frame(SETTINGS, 0, 0, &[0xfe, 3, 0, 0, 0, value])]);
    let request = |name, value| q(&[post(1, "a", &[(name, value)]), data(1, END_STREAM, 1)]);
    let ok = a(&[status(1, END_STREAM, "200")]);
    let malformed = |events: &[On]| {
        let (notes, _) = check(events, &[], None);
        assert_eq!((notes.malformed, notes.tenants.len()), (1, 0));
    };
    let binary = request("x-bin", "\0a\r\n\0");
    check(&[setting(1), binary.clone(), ok.clone()], &[("a", Success)], None);
    malformed(&[binary.clone(), ok.clone()]);
    malformed(&[setting(0), binary.clone(), ok.clone()]);
    malformed(&[setting(2), binary.clone(), ok.clone()]);
    malformed(&[setting(1), request("x-bin", "a\0"), ok.clone()]);
    malformed(&[setting(1), request("x", "\0a"), ok.clone()]);
    // What was accepted once may come again by its place in the table: 62 is the newest entry.
    let kept = [&[0x40_u8, 5][..], b"x-bin", &[3], b"\0a\n"].concat();
    let again = |stream, field: &[u8]| {
        let fields = block(&[&POST[..], &[("t", "a")]].concat());
        frame(
            HEADERS,
            END_STREAM | END_HEADERS,
            stream,
            &[&fields[..], field].concat(),
        )
    };
    let answers = a(&[status(1, END_STREAM, "200"), status(3, END_STREAM, "200")]);
    check(
        &[setting(1), q(&[again(1, &kept), again(3, &[0xbe])]), answers],
        &[("a", Success), ("a", Success)],
        None,
    );
}
