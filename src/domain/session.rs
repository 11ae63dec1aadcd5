use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::Rfc3339;

/// A session that has neither expired nor been revoked.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Session {
    /// UUIDv7; the `sid` claim of its access tokens.
    pub(crate) id: Uuid,
    /// The first 200 characters of the User-Agent header of the login.
    pub(crate) user_agent: Option<String>,
    pub(crate) created_at: Rfc3339,
    pub(crate) last_used_at: Rfc3339,
    pub(crate) expires_at: Rfc3339,
    pub(crate) current: bool,
}

/// The longest lifetime of an access token that can be configured. Revocations are kept as long.
pub(crate) const MAX_ACCESS_TTL: Duration = Duration::from_hours(24);

/// Lifetimes of tokens and sessions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenLifetimes {
    /// The lifetime of an access token, from its issue.
    pub(crate) access: Duration,
    /// The lifetime of a session, from its last refresh.
    pub(crate) refresh_idle: Duration,
    /// The lifetime of a session, from its login.
    pub(crate) refresh_max: Duration,
    /// How long a used refresh token still returns its successor.
    pub(crate) refresh_grace: Duration,
}
