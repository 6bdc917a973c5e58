//! How long the body of a request may take: one that comes byte by byte holds its place and is given up.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    BoxError,
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse, Response},
};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use crate::faces::problem::Problem;

/// How long a body may take.
const BODY_WITHIN: Duration = Duration::from_secs(10);

/// Answers a request whose body does not come in time with 408, whatever its route makes of the half.
pub(super) async fn in_time(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let is_late = Arc::new(AtomicBool::new(false));
    let request = request.map(|body| Body::new(Timed::new(body, BODY_WITHIN, Arc::clone(&is_late))));
    let response = next.run(request).await;
    if is_late.load(Ordering::Relaxed) {
        let detail = format!("the body did not come whole within {} s", BODY_WITHIN.as_secs());
        return Problem::new(StatusCode::REQUEST_TIMEOUT, detail).into_response();
    }
    response
}

/// A body that fails when its time is over.
struct Timed {
    body: Body,
    end: Pin<Box<Sleep>>,
    is_late: Arc<AtomicBool>,
}

impl Timed {
    fn new(body: Body, within: Duration, is_late: Arc<AtomicBool>) -> Self {
        Self {
            body,
            end: Box::pin(sleep(within)),
            is_late,
        }
    }
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let timed = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut timed.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        }
        ready!(timed.end.as_mut().poll(context));
        timed.is_late.store(true, Ordering::Relaxed);
        Poll::Ready(Some(Err("the body takes too long".into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use futures_util::{StreamExt as _, stream};

    use super::*;

    #[tokio::test]
    async fn a_body_that_does_not_end_is_given_up() {
        let half = stream::iter([Ok::<_, BoxError>(Bytes::from_static(b"half"))]);
        let never = Body::from_stream(half.chain(stream::pending()));
        for (body, within, is_given_up) in [
            (Body::from("whole"), Duration::ZERO, false),
            (never, Duration::ZERO, true),
        ] {
            let is_late = Arc::new(AtomicBool::new(false));
            let timed = Body::new(Timed::new(body, within, Arc::clone(&is_late)));
            let read = to_bytes(timed, usize::MAX).await;
            assert_eq!(read.is_err(), is_given_up, "{read:?}");
            assert_eq!(is_late.load(Ordering::Relaxed), is_given_up);
        }
    }
}
