//! Errors of statements, and whether the connection can be used again.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::sync::Arc;

use tokio_postgres::Error;
use tokio_postgres::error::{Severity, SqlState};

/// The result of a statement.
pub(crate) type Result<T, E = DbError> = std::result::Result<T, E>;

/// Why a statement failed. Nothing was changed, except possibly after `ConnectionLost`.
#[derive(Clone, Debug)]
pub(crate) enum DbError {
    /// The statement was not sent or was rolled back; another attempt may succeed.
    Transient(String),
    /// The connection was lost while the statement ran: whether it took effect is unknown.
    ConnectionLost(String),
    /// The database is unavailable, or was too slow.
    Unavailable(String),
    /// All connections are in use and the queue for them is too long.
    Overloaded,
    /// The server rejected the statement.
    Refused(Arc<Error>),
}

impl DbError {
    /// Whether the server rejected the statement with this SQLSTATE.
    pub(super) fn is(&self, state: &SqlState) -> bool {
        matches!(self, Self::Refused(error) if error.code() == Some(state))
    }

    /// Classifies an error, and says whether its connection can be used again.
    pub(super) fn classify(error: Error) -> (Self, bool) {
        if !is_connection_error(&error) {
            return (Self::Refused(Arc::new(error)), true);
        }
        let reason = error_message(&error);
        // The server sends these for one statement and keeps the session.
        let is_rollback = has_class(&error, &["40"]) && !is_outcome_unknown(&error);
        if is_rollback {
            return (Self::Transient(reason), true);
        }
        if has_class(&error, &["53", "57014", "55P03"]) {
            return (Self::Unavailable(reason), true);
        }
        // An ERROR rolls the statement back; a FATAL ends the session, and the statement may have
        // been committed.
        let severity = error.as_db_error().and_then(|db| db.parsed_severity());
        match severity {
            Some(Severity::Error) if !is_outcome_unknown(&error) => {
                (Self::Transient(reason), false)
            }
            _ => (Self::ConnectionLost(reason), false),
        }
    }
}

impl std::error::Error for DbError {}

impl fmt::Display for DbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transient(reason) | Self::ConnectionLost(reason) | Self::Unavailable(reason) => {
                f.write_str(reason)
            }
            Self::Overloaded => f.write_str("all connections are in use"),
            Self::Refused(error) => f.write_str(&error_message(error)),
        }
    }
}

/// The message of an error with its cause; `Display` of a server's error is only "db error".
pub(crate) fn error_message(error: &Error) -> String {
    match (error.as_db_error(), error.source()) {
        // Omits the detail and the hint, which may quote a row.
        (Some(db), _) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// Whether the server or the network failed rather than the statement: the same statement may
/// succeed on another connection or later.
pub(super) fn is_connection_error(error: &Error) -> bool {
    // Operator intervention, lock and idle timeouts, connection exceptions, insufficient resources
    // (such as disk space), system errors, a read-only standby, a lost prepared statement, and
    // transactions that were rolled back.
    const CLASSES: &[&str] = &[
        "57", "55P03", "25P03", "08", "53", "58", "25006", "26000", "40",
    ];
    match error.code() {
        Some(_) => has_class(error, CLASSES),
        None => {
            error.is_closed()
                || error
                    .source()
                    .is_some_and(|source| source.is::<io::Error>())
        }
    }
}

/// Whether the SQLSTATE is one of these codes or belongs to one of these classes.
fn has_class(error: &Error, classes: &[&str]) -> bool {
    let code = error.code().map_or("", SqlState::code);
    classes.iter().any(|class| code.starts_with(class))
}

/// Whether the server reports that it does not know the outcome of the statement.
fn is_outcome_unknown(error: &Error) -> bool {
    has_class(error, &["40003", "08007"])
}
