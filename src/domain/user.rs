use serde::Serialize;
use uuid::Uuid;

use super::Rfc3339;

/// A user, as returned to the user.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct User {
    pub(crate) id: Uuid,
    /// A normalized [`Email`](super::Email).
    pub(crate) email: String,
    pub(crate) created_at: Rfc3339,
    /// The time of the last password change, or of the registration.
    pub(crate) updated_at: Rfc3339,
}
