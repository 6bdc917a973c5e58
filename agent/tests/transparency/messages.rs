//! Messages of HTTP/1.

/// An answer that leaves the connection open.
pub(crate) const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// An answer after which the application closes.
pub(crate) const OK_AND_CLOSE: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";

/// An answer with an error of the service.
pub(crate) const FAILED: &[u8] = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n";

/// A request of a tenant, without a body.
pub(crate) fn get(tenant: &str) -> Vec<u8> {
    request("GET / HTTP/1.1", &[&format!("X-Tenant: {tenant}")], b"")
}

/// A request with a Host and these headers.
pub(crate) fn request(line: &str, headers: &[&str], body: impl AsRef<[u8]>) -> Vec<u8> {
    message(&format!("{line}\r\nHost: h"), headers, body)
}

/// An answer with these headers.
pub(crate) fn answer(status: &str, headers: &[&str], body: impl AsRef<[u8]>) -> Vec<u8> {
    message(&format!("HTTP/1.1 {status}"), headers, body)
}

fn message(start: &str, headers: &[&str], body: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = format!("{start}\r\n").into_bytes();
    for header in headers {
        bytes.extend_from_slice(format!("{header}\r\n").as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body.as_ref());
    bytes
}

/// A body in chunks of these sizes, with extensions and a trailer.
pub(crate) fn chunked(sizes: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, size) in sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
        let extension = if number % 2 == 0 {
            ""
        } else {
            ";name=\"value\";other"
        };
        bytes.extend_from_slice(format!("{size:x}{extension}\r\n").as_bytes());
        bytes.extend_from_slice(&filling(*size));
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\nTrailer-A: b\r\ngrpc-status: 0\r\n\r\n");
    bytes
}

/// So many bytes of a body, which look like messages in places.
pub(crate) fn filling(count: usize) -> Vec<u8> {
    const PATTERN: &[u8] =
        b"GET / HTTP/1.1\r\nX-Tenant: evil\r\n\r\n\x00\xffHTTP/1.1 500 No\r\n\r\n0\r\n\r\n";
    PATTERN.iter().copied().cycle().take(count).collect()
}
