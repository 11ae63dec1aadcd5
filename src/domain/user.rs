use serde::Serialize;
use uuid::Uuid;

use super::Rfc3339;

/// An account, as shown to the operator.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Account {
    pub(crate) id: Uuid,
    pub(crate) email: String,
    pub(crate) email_verified: bool,
    pub(crate) created_at: Rfc3339,
    pub(crate) updated_at: Rfc3339,
    /// `None` if the account is enabled.
    pub(crate) disabled_at: Option<Rfc3339>,
    /// The last registration, login or refresh, up to an hour earlier than it was; `None` if it is
    /// more than 30 days ago.
    pub(crate) last_used_at: Option<Rfc3339>,
    /// The end of the longest lockout, if there is one.
    pub(crate) locked_until: Option<Rfc3339>,
    pub(crate) sessions: i64,
    pub(crate) tasks: i32,
}

/// A user, as returned to the user.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct User {
    pub(crate) id: Uuid,
    /// A normalized [`Email`](super::Email).
    pub(crate) email: String,
    /// Whether the user has proved to own the address.
    pub(crate) email_verified: bool,
    pub(crate) created_at: Rfc3339,
    /// The time of the last change of the password or the address, or of the registration.
    pub(crate) updated_at: Rfc3339,
}
