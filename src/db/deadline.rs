//! Deadlines of database work.

use std::time::Duration;

use tokio::time::Instant;

/// Limits all database work of a request, counted from the end of its body: acquiring connections
/// and running statements.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Limits a request that hashes passwords, including the wait for other attempts on the account and
/// for a hashing thread. A full hash queue takes 4 s to drain.
pub(crate) const PASSWORD_REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Limits the check whether an access token is revoked, which precedes reading the body.
pub(crate) const AUTHENTICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The time after which no further statement is sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout)
    }

    pub(crate) fn at(self) -> Instant {
        self.0
    }
}

impl From<Instant> for Deadline {
    fn from(at: Instant) -> Self {
        Self(at)
    }
}
