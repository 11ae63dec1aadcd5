use serde::Serialize;
use uuid::Uuid;

use super::Rfc3339;

/// One sign-in that is still good for a refresh.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Session {
    /// UUIDv7; the access token's `sid`.
    pub(crate) id: Uuid,
    /// The first 200 characters of the User-Agent that signed in.
    pub(crate) user_agent: Option<String>,
    /// When somebody signed in.
    pub(crate) created_at: Rfc3339,
    /// When it was last refreshed.
    pub(crate) last_used_at: Rfc3339,
    /// When it ends unless it is refreshed before.
    pub(crate) expires_at: Rfc3339,
    /// Whether the request that asks belongs to it.
    pub(crate) current: bool,
}
