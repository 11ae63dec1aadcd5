//! Domain types. Types with a `parse` function are valid by construction. This module does not
//! depend on HTTP or SQL.

use uuid::Uuid;

mod email;
mod session;
mod task;
mod timestamp;
mod user;

pub(crate) use email::Email;
pub(crate) use session::{MAX_ACCESS_TTL, Session, TokenLifetimes};
pub(crate) use task::{Completion, DeletedTask, Description, NewTask, Task, TaskChange, Title};
pub(crate) use timestamp::Rfc3339;
pub(crate) use user::{Account, User};

/// Parses an id in the spelling that the API uses: a UUID in lower case with hyphens. Clients
/// compare ids as text, so other spellings of the same UUID are rejected.
pub(crate) fn parse_id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    let mut buffer = Uuid::encode_buffer();
    (id.hyphenated().encode_lower(&mut buffer) == text).then_some(id)
}

/// Why a value is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValidationError {
    /// A stable code for clients, such as `too_long`.
    pub(crate) code: &'static str,
    /// A message for people that names the field and its limit.
    pub(crate) detail: &'static str,
}

impl ValidationError {
    pub(crate) const fn new(code: &'static str, detail: &'static str) -> Self {
        Self { code, detail }
    }
}
