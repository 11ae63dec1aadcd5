//! Values that are valid because they exist. Nothing here knows HTTP or SQL.

use uuid::Uuid;

mod email;
mod session;
mod task;
mod time;
mod user;

pub(crate) use email::Email;
pub(crate) use session::Session;
pub(crate) use task::{Completion, Description, NewTask, Task, TaskChange, Title};
pub(crate) use time::Time;
pub(crate) use user::User;

/// An id as this API writes it; ids are compared as text, so no other spelling is one.
pub(crate) fn id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    let mut buffer = Uuid::encode_buffer();
    (id.hyphenated().encode_lower(&mut buffer) == text).then_some(id)
}

/// Why a value was refused: a code for programs and a sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// A stable, lower-case word: `too_long`, `required` …
    pub(crate) code: &'static str,
    /// What is wrong, naming the value and its bound.
    pub(crate) detail: &'static str,
}

impl Refusal {
    pub(crate) const fn new(code: &'static str, detail: &'static str) -> Self {
        Self { code, detail }
    }
}
