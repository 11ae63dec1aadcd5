//! Values that are valid because they exist. Nothing here knows HTTP or SQL.

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
