//! Waiting for what has to be recorded, but not without end: a database may be away.

use std::time::Duration;

use axum::http::StatusCode;
use tokio::time::timeout;

use super::problem::Problem;

/// How long a request waits for the decision log, if nothing else is said.
const WITHIN: Duration = Duration::from_secs(10);

/// What is said when it takes too long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    /// What cannot be done, as the beginning of a sentence.
    what: &'static str,
    /// What to do then: where nothing names the request, asking again may do it twice.
    advice: &'static str,
    within: Duration,
}

impl Waiting {
    pub(super) const fn new(what: &'static str, advice: &'static str) -> Self {
        Self {
            what,
            advice,
            within: WITHIN,
        }
    }

    /// The same, for a caller that waits so long at most.
    pub(super) const fn within(self, within: Duration) -> Self {
        Self { within, ..self }
    }

    /// It took too long.
    pub(super) fn over(self) -> Problem {
        let Self { what, advice, within } = self;
        let detail = format!(
            "{what} yet: the decision log has not answered within {} s; it may still be done, so {advice}",
            within.as_secs()
        );
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }
}

/// Does what is recorded on the way. A caller that goes away, or is told that it takes too long, leaves nothing half done.
pub(super) async fn recorded<T, E>(
    waiting: Waiting,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Problem>
where
    T: Send + 'static,
    E: Send + 'static,
    Problem: From<E>,
{
    match timeout(waiting.within, tokio::spawn(work)).await {
        Ok(Ok(done)) => Ok(done?),
        Ok(Err(error)) => Err(Problem::internal(waiting.what, &error)),
        Err(_) => Err(waiting.over()),
    }
}
