//! Watches one stream to its end.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use coalmine_proto::names::Outcome;
use http::{HeaderMap, StatusCode, header};
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::{
    observer::{Sink, TenantId},
    proxy::Proxy,
};

/// A request that has begun. Dropped before its end, the client has gone away.
pub(super) struct Flight {
    proxy: Rc<Proxy>,
    tenant: TenantId,
    started_ns: u64,
    has_ended: bool,
}

/// Where a request's outcome stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// In the status.
    Http,
    /// In `grpc-status`, which is a trailer, or a header of an answer without a body.
    Grpc,
}

/// The body of an answer.
pub(super) struct Observed {
    inner: Incoming,
    kind: Kind,
    status: StatusCode,
    /// None once the answer is complete.
    flight: Option<Flight>,
}

// === impl Flight ===

impl Flight {
    pub(super) fn new(proxy: Rc<Proxy>, tenant: TenantId) -> Self {
        let started_ns = proxy.now_ns();
        Self {
            proxy,
            tenant,
            started_ns,
            has_ended: false,
        }
    }

    pub(super) fn end(mut self, outcome: Outcome) {
        self.record(outcome);
    }

    /// The request never had a chance to be sent, and not because of the application.
    pub(super) fn forget(mut self) {
        self.has_ended = true;
        self.proxy.recorder.borrow_mut().forget(self.tenant);
    }

    fn record(&mut self, outcome: Outcome) {
        self.has_ended = true;
        let latency_ns = self.proxy.now_ns().saturating_sub(self.started_ns);
        self.proxy
            .recorder
            .borrow_mut()
            .end(self.tenant, outcome, latency_ns);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.has_ended {
            self.record(Outcome::ClientAbort);
        }
    }
}

// === impl Kind ===

impl Kind {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let content_type = headers.get(header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
        if content_type.is_some_and(|value| value.starts_with(b"application/grpc")) {
            Self::Grpc
        } else {
            Self::Http
        }
    }

    /// The outcome of an answer that is complete, with its trailers, or its headers if it has no body.
    fn outcome(self, status: StatusCode, last: Option<&HeaderMap>) -> Outcome {
        if self == Self::Http || status != StatusCode::OK {
            return Outcome::of_http_status(status.as_u16());
        }
        let code = last.and_then(|headers| headers.get("grpc-status"));
        let code = code.and_then(|value| value.to_str().ok()?.parse().ok());
        // An answer without a status is UNKNOWN to the caller.
        Outcome::of_grpc_status(code.unwrap_or(2))
    }
}

// === impl Observed ===

impl Observed {
    pub(super) fn new(inner: Incoming, kind: Kind, head: &http::response::Parts, flight: Flight) -> Self {
        let mut new = Self {
            inner,
            kind,
            status: head.status,
            flight: Some(flight),
        };
        if new.inner.is_end_stream() {
            new.complete(Some(&head.headers));
        }
        new
    }

    fn complete(&mut self, last: Option<&HeaderMap>) {
        if let Some(flight) = self.flight.take() {
            flight.end(self.kind.outcome(self.status, last));
        }
    }
}

impl Body for Observed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            None => self.complete(None),
            Some(Ok(frame)) if frame.is_trailers() => self.complete(frame.trailers_ref()),
            Some(Ok(_)) if self.inner.is_end_stream() => self.complete(None),
            Some(Ok(_)) => {}
            Some(Err(_)) => {
                if let Some(flight) = self.flight.take() {
                    flight.end(Outcome::UpstreamReset);
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(kind: Kind, status: u16, grpc_status: Option<&str>, expected: Outcome) {
        let mut last = HeaderMap::new();
        if let Some(code) = grpc_status {
            last.insert("grpc-status", code.parse().unwrap());
        }
        let status = StatusCode::from_u16(status).unwrap();
        assert_eq!(kind.outcome(status, Some(&last)), expected);
    }

    #[test]
    fn outcomes_stand_in_the_status_or_in_the_trailers() {
        check(Kind::Http, 200, None, Outcome::Success);
        check(Kind::Http, 503, None, Outcome::ServerError);
        check(Kind::Http, 200, Some("14"), Outcome::Success);
        check(Kind::Grpc, 200, Some("0"), Outcome::Success);
        check(Kind::Grpc, 200, Some("5"), Outcome::ClientError);
        check(Kind::Grpc, 200, Some("14"), Outcome::ServerError);
        check(Kind::Grpc, 200, Some("x"), Outcome::ServerError);
        check(Kind::Grpc, 200, None, Outcome::ServerError);
        check(Kind::Grpc, 503, None, Outcome::ServerError);
        check(Kind::Grpc, 404, None, Outcome::ClientError);
    }
}
