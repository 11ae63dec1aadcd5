//! Retries with backoff: which failures are retried, and when.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::connections::Connections;
use super::deadline::Deadline;
use super::error::{DbError, Result};

const MIN_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(250);

/// Whether a statement may run again after its connection was lost. A statement that was rolled
/// back may always run again.
pub(super) enum Repeat {
    /// A read, which may run again.
    Read,
    /// A write that may not run again, because a second run would change something else.
    Never,
    /// A write that may run again, because it inserts rows under IDs chosen by the caller. A second
    /// run finds the rows of the first. Contains the error of a first run whose outcome is unknown.
    Insert(Option<DbError>),
}

impl Connections {
    /// Calls `attempt` until it succeeds or fails permanently, or until the deadline leaves no time
    /// for another attempt. The backoff is exponential.
    pub(super) async fn retry<T, F: Future<Output = Result<T>>>(
        &self,
        deadline: Deadline,
        repeat: Repeat,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T> {
        let mut backoff = MIN_BACKOFF;
        let may_repeat = !matches!(repeat, Repeat::Never);
        let is_insert = matches!(repeat, Repeat::Insert(_));
        // The error of an insert that may have taken effect.
        let mut unknown = match repeat {
            Repeat::Insert(error) => error,
            Repeat::Read | Repeat::Never => None,
        };
        loop {
            let error = match attempt().await {
                Err(error @ DbError::Transient(_)) => error,
                Err(error @ DbError::ConnectionLost(_)) if may_repeat => error,
                Err(error @ (DbError::Unavailable(_) | DbError::Overloaded))
                    if unknown.is_some() =>
                {
                    error
                }
                result => return result,
            };
            if is_insert && matches!(error, DbError::ConnectionLost(_)) {
                unknown = Some(error.clone());
            }
            let is_up = match unknown {
                None => self.health.is_up(),
                // Waiting is worthwhile, because only another attempt can determine the outcome.
                Some(_) => self.health.wait_until_up(deadline.at()).await,
            };
            // Jitter keeps requests that failed together from retrying together.
            let pause = backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
            backoff = MAX_BACKOFF.min(backoff * 2);
            if !is_up || Instant::now() + pause >= deadline.at() {
                return Err(unknown.unwrap_or(error));
            }
            sleep(pause).await;
        }
    }
}
