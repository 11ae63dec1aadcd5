//! Values that are valid because they exist. Nothing here knows HTTP or SQL.

use uuid::Uuid;

mod email;
mod session;
mod task;
mod timestamp;
mod user;

pub(crate) use email::Email;
pub(crate) use session::{MAX_ACCESS_TTL, Session, TokenLifetimes};
pub(crate) use task::{Completion, Description, NewTask, Task, TaskChange, Title};
pub(crate) use timestamp::Rfc3339;
pub(crate) use user::User;

/// An id as this API writes it; ids are compared as text, so no other spelling is one.
pub(crate) fn parse_id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    let mut buffer = Uuid::encode_buffer();
    (id.hyphenated().encode_lower(&mut buffer) == text).then_some(id)
}

/// Why a value was refused: a code for programs and a sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValidationError {
    /// A stable, lower-case word: `too_long`, `required` …
    pub(crate) code: &'static str,
    /// What is wrong, naming the value and its bound.
    pub(crate) detail: &'static str,
}

impl ValidationError {
    pub(crate) const fn new(code: &'static str, detail: &'static str) -> Self {
        Self { code, detail }
    }
}
