//! Retries: which failures are worth another attempt, and when it is made.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{DbError, Queries, State};

const FIRST_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(250);

/// What may be sent again after its connection was lost. A statement that was rolled back always is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// A read.
    Read,
    /// A write that changes something each time it runs: never.
    Never,
    /// A write that makes rows under ids of ours: a second run finds what the first has made.
    Insert,
}

/// The pauses between attempts: each is chosen at random from an interval that doubles up to a
/// maximum, so that what failed together does not come back together.
struct Backoff(Duration);

impl Backoff {
    fn next(&mut self) -> Duration {
        let longest = self.0;
        self.0 = MAX_BACKOFF.min(longest * 2);
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

impl Queries<'_> {
    /// Runs `attempt` until it succeeds, fails for good, or the deadline leaves no time for more.
    pub(super) async fn retry<T, F: Future<Output = Result<T, DbError>>>(
        &self,
        repeat: Repeat,
        attempt: impl Fn() -> F,
    ) -> Result<T, DbError> {
        let mut backoff = Backoff(FIRST_BACKOFF);
        // What an insert has failed with that may have been made all the same.
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
            let pause = backoff.next();
            let is_up = match unknown {
                None => self.database.is_up(),
                // Worth waiting for: the next attempt tells what became of this one.
                Some(_) => self.is_up_by_deadline().await,
            };
            if !is_up || Instant::now() + pause >= self.deadline.at() {
                return Err(unknown.unwrap_or(error));
            }
            sleep(pause).await;
        }
    }

    async fn is_up_by_deadline(&self) -> bool {
        let mut state = self.database.0.state.subscribe();
        let up = state.wait_for(|state| *state == State::Up);
        timeout_at(self.deadline.at(), up).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_maximum_and_differ() {
        let mut backoff = Backoff(FIRST_BACKOFF);
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(pauses[0] <= FIRST_BACKOFF);
        assert!(
            pauses[10..]
                .iter()
                .all(|pause| (MAX_BACKOFF / 2..=MAX_BACKOFF).contains(pause))
        );
        assert!(pauses[10..].windows(2).any(|two| two[0] != two[1]));
    }
}
