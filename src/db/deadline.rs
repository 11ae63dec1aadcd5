//! Deadlines of database work.

use std::time::Duration;

use tokio::time::Instant;

/// Limits all database work of a request, counted from the end of its body: acquiring connections
/// and running statements.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Limits a request that hashes passwords, including the wait for other attempts on the account and
/// for a hashing thread. A full hash queue takes 4 s to drain.
pub(crate) const PASSWORD_REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Limits an operator's command. The export of 100,000 long tasks has 150 MB.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);
/// Limits the check whether an access token is revoked, which precedes reading the body.
pub(crate) const AUTHENTICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The time after which no further statement is sent, and the limit of a single statement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline {
    at: Instant,
    statement_timeout: Duration,
}

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        (Instant::now() + timeout).into()
    }

    /// The deadline of an operator's command, whose statements may take as long.
    pub(crate) fn of_command() -> Self {
        Self {
            statement_timeout: COMMAND_TIMEOUT,
            ..Self::after(COMMAND_TIMEOUT)
        }
    }

    pub(crate) fn at(self) -> Instant {
        self.at
    }

    pub(super) fn statement_timeout(self) -> Duration {
        self.statement_timeout
    }
}

impl From<Instant> for Deadline {
    /// Requests that hash passwords have more time, but their individual statements do not.
    fn from(at: Instant) -> Self {
        Self {
            at,
            statement_timeout: REQUEST_TIMEOUT,
        }
    }
}
