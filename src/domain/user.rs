use serde::Serialize;
use uuid::Uuid;

use super::Rfc3339;

/// Somebody with an account, as they see themselves.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct User {
    /// UUIDv7.
    pub(crate) id: Uuid,
    /// Trimmed and in lower case.
    pub(crate) email: String,
    /// When the account was made.
    pub(crate) created_at: Rfc3339,
    /// When the password was last changed, or the account made.
    pub(crate) updated_at: Rfc3339,
}
