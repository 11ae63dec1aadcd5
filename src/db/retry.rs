//! Retries with backoff: which failures are retried, and when.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::deadline::Deadline;
use super::error::{DbError, Result};
use super::lease::Connections;

const MIN_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(250);

/// Whether a statement may run again after its connection was lost. A statement that was rolled
/// back may always run again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// A read, which may run again.
    Read,
    /// A write that may not run again, because a second run would change something else.
    Never,
    /// A write that may run again, because it inserts rows under IDs chosen by the caller. A second
    /// run finds the rows of the first.
    Insert,
}

/// Exponential backoff with jitter, so that requests that failed together do not retry together.
struct Backoff(Duration);

impl Backoff {
    fn next(&mut self) -> Duration {
        let longest = self.0;
        self.0 = MAX_BACKOFF.min(longest * 2);
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

impl Connections {
    /// Calls `attempt` until it succeeds or fails permanently, or until the deadline leaves no time
    /// for another attempt.
    pub(super) async fn retry<T, F: Future<Output = Result<T>>>(
        &self,
        deadline: Deadline,
        repeat: Repeat,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T> {
        let mut backoff = Backoff(MIN_BACKOFF);
        // The error of an insert that may have taken effect.
        let mut unknown = None;
        loop {
            let error = match attempt().await {
                Err(error @ DbError::Transient(_)) => error,
                Err(error @ DbError::ConnectionLost(_)) if repeat != Repeat::Never => error,
                Err(error @ (DbError::Unavailable(_) | DbError::Overloaded))
                    if unknown.is_some() =>
                {
                    error
                }
                result => return result,
            };
            if repeat == Repeat::Insert && matches!(error, DbError::ConnectionLost(_)) {
                unknown = Some(error.clone());
            }
            let is_up = match unknown {
                None => self.health.is_up(),
                // Waiting is worthwhile, because only another attempt can determine the outcome.
                Some(_) => self.health.wait_until_up(deadline.at()).await,
            };
            let pause = backoff.next();
            if !is_up || Instant::now() + pause >= deadline.at() {
                return Err(unknown.unwrap_or(error));
            }
            sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_its_maximum_with_jitter() {
        let mut backoff = Backoff(MIN_BACKOFF);
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(pauses[0] <= MIN_BACKOFF);
        let settled = &pauses[10..];
        let range = MAX_BACKOFF / 2..=MAX_BACKOFF;
        assert!(settled.iter().all(|pause| range.contains(pause)));
        assert!(settled.windows(2).any(|two| two[0] != two[1]));
    }
}
