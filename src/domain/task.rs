use std::sync::{LazyLock, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use uuid::{ContextV7, Uuid};

use super::{Rfc3339, ValidationError};

/// What a task is called: 1 to 200 code points, none of them NUL, no white space at the ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Title(String);

impl Title {
    /// Cuts the white space at the ends, then checks the bounds.
    pub(crate) fn parse(text: &str) -> Result<Self, ValidationError> {
        let title = text.trim();
        if title.is_empty() {
            return Err(ValidationError::new(
                "too_short",
                "title must have 1 to 200 characters",
            ));
        }
        if longer_than(title, 200) {
            return Err(ValidationError::new(
                "too_long",
                "title must have 1 to 200 characters",
            ));
        }
        if title.contains('\0') {
            return Err(ValidationError::new(
                "invalid_character",
                "title must not contain the character NUL",
            ));
        }
        Ok(Self(title.to_owned()))
    }

    /// The title as it is stored.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// More words on a task: up to 1000 code points, none of them NUL, kept as they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description(String);

impl Description {
    /// Checks the bounds.
    pub(crate) fn parse(text: &str) -> Result<Self, ValidationError> {
        if longer_than(text, 1000) {
            return Err(ValidationError::new(
                "too_long",
                "description must have at most 1000 characters",
            ));
        }
        if text.contains('\0') {
            return Err(ValidationError::new(
                "invalid_character",
                "description must not contain the character NUL",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The description as it is stored.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a text has more than `max` code points: what `varchar(max)` would refuse.
fn longer_than(text: &str, max: usize) -> bool {
    text.len() > max && text.chars().nth(max).is_some()
}

/// A task of somebody's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Task {
    /// UUIDv7; its order is the order of `created_at`.
    pub(crate) id: Uuid,
    /// The owner.
    pub(crate) user_id: Uuid,
    /// 1 to 200 code points.
    pub(crate) title: String,
    /// Up to 1000 code points.
    pub(crate) description: Option<String>,
    /// Whether it is done.
    pub(crate) completed: bool,
    /// The instant that the id carries.
    pub(crate) created_at: Rfc3339,
    /// Moves at every change, and never backwards: the version of the task.
    pub(crate) updated_at: Rfc3339,
}

/// What a new task is made of.
#[derive(Clone, Debug)]
pub(crate) struct NewTask {
    /// Its name.
    pub(crate) title: Title,
    /// More words, if any.
    pub(crate) description: Option<Description>,
    /// Whether it is done from the start.
    pub(crate) completed: bool,
}

impl NewTask {
    /// An id for a new task and the instant that it carries. Both come from one reading of the
    /// clock, finer than a millisecond, so that the order of ids is the order of creation.
    pub(crate) fn new_id() -> (Uuid, Rfc3339) {
        static CLOCK: LazyLock<Mutex<ContextV7>> =
            LazyLock::new(|| Mutex::new(ContextV7::new().with_additional_precision()));
        // The clock is read under the lock: whoever reads it later gets the greater id.
        let clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let micros = Timestamp::now().as_microsecond().max(0);
        let (seconds, nanos) = (
            micros as u64 / 1_000_000,
            (micros % 1_000_000) as u32 * 1000,
        );
        let id = Uuid::new_v7(uuid::Timestamp::from_unix(&*clock, seconds, nanos));
        let now = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH);
        (id, Rfc3339(now))
    }
}

/// What a change of a task asks for; what is `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct TaskChange {
    /// A new name.
    pub(crate) title: Option<Title>,
    /// A new description, or none any more.
    pub(crate) description: Option<Option<Description>>,
    /// What becomes of `completed`.
    pub(crate) completed: Option<Completion>,
}

/// What a change does to `completed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Make it this.
    Set(bool),
    /// Make it what it is not.
    Toggle,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_counted_in_code_points_after_trimming() {
        assert!(Title::parse(&"😀".repeat(200)).is_ok());
        assert!(Title::parse(&"😀".repeat(201)).is_err());
        assert_eq!(Title::parse("\u{2003} x \u{a0}").unwrap().as_str(), "x");
        assert!(Title::parse(" \u{3000}").is_err());
        assert!(Title::parse("a\0b").is_err());
    }

    #[test]
    fn an_empty_description_is_kept() {
        assert_eq!(Description::parse("").unwrap().as_str(), "");
        assert!(Description::parse(&"é".repeat(1000)).is_ok());
        assert!(Description::parse(&"é".repeat(1001)).is_err());
    }

    #[test]
    fn ids_sort_as_they_were_made() {
        let made: Vec<_> = (0..10_000).map(|_| NewTask::new_id()).collect();
        assert!(
            made.windows(2)
                .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1)
        );
    }
}
