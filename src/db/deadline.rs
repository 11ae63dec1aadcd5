//! The deadline of a request's work.

use std::time::Duration;

use tokio::time::Instant;

/// The work of a request, counted from the end of its body: acquiring connections and all its
/// statements.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for a request that hashes passwords. It also covers the queue of the account and the
/// queue of the hashing threads, which takes 8 s to drain when it is full.
pub(crate) const PASSWORD_REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Checking whether an access token is revoked, before the body is read.
pub(crate) const AUTHENTICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The moment after which no further statement is sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline that lies this far ahead.
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout)
    }

    /// The moment itself.
    pub(crate) fn at(self) -> Instant {
        self.0
    }

    /// Whether it is too late to send a statement.
    pub(crate) fn has_passed(self) -> bool {
        Instant::now() >= self.0
    }
}

impl From<Instant> for Deadline {
    fn from(at: Instant) -> Self {
        Self(at)
    }
}
