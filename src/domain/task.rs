use std::sync::LazyLock;

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::Serialize;
use uuid::{ContextV7, Uuid, Variant, Version};

use super::{Rfc3339, ValidationError, parse_id};

/// The title of a task: 1 to 200 code points without NUL, trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Title(String);

impl Title {
    pub(crate) fn parse(text: &str) -> Result<Self, ValidationError> {
        const LENGTH: &str = "title must have 1 to 200 characters";
        const NUL: &str = "title must not contain the character NUL";
        let title = text.trim();
        match title.is_empty() {
            true => Err(ValidationError::new("too_short", LENGTH)),
            false => check_text(title, 200, LENGTH, NUL).map(|()| Self(title.to_owned())),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The description of a task: at most 1000 code points without NUL, not trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description(String);

impl Description {
    pub(crate) fn parse(text: &str) -> Result<Self, ValidationError> {
        const LENGTH: &str = "description must have at most 1000 characters";
        const NUL: &str = "description must not contain the character NUL";
        check_text(text, 1000, LENGTH, NUL).map(|()| Self(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks that a text has no NUL and at most `max` code points, the unit of `varchar(max)`.
fn check_text(
    text: &str,
    max: usize,
    too_long: &'static str,
    nul: &'static str,
) -> Result<(), ValidationError> {
    if text.len() > max && text.chars().nth(max).is_some() {
        return Err(ValidationError::new("too_long", too_long));
    }
    match text.contains('\0') {
        true => Err(ValidationError::new("invalid_character", nul)),
        false => Ok(()),
    }
}

/// A task, as returned to its owner. Its texts are borrowed (`&str`) if it is part of a page.
#[derive(Clone, Debug)]
pub(crate) struct Task<T = String> {
    /// UUIDv7; sorts by `created_at`.
    pub(crate) id: Uuid,
    pub(crate) user_id: Uuid,
    pub(crate) title: T,
    pub(crate) description: Option<T>,
    pub(crate) completed: bool,
    /// The time that the id encodes.
    pub(crate) created_at: Rfc3339,
    /// The version of the task: increases with every change.
    pub(crate) updated_at: Rfc3339,
}

impl<T: AsRef<str>> Task<T> {
    /// Appends the task as JSON. Ids, times and keys are written without a search for characters to escape,
    /// which would double the time for a page.
    pub(crate) fn write_json(&self, json: &mut Vec<u8>) -> serde_json::Result<()> {
        json.extend_from_slice(b"{\"id\":\"");
        write_id(self.id, json);
        json.extend_from_slice(b"\",\"user_id\":\"");
        write_id(self.user_id, json);
        json.extend_from_slice(b"\",\"title\":");
        serde_json::to_writer(&mut *json, self.title.as_ref())?;
        json.extend_from_slice(b",\"description\":");
        let description = self.description.as_ref().map(AsRef::as_ref);
        serde_json::to_writer(&mut *json, &description)?;
        let completed: &[u8] = if self.completed { b"true" } else { b"false" };
        for part in [b",\"completed\":", completed, b",\"created_at\":\""] {
            json.extend_from_slice(part);
        }
        self.created_at.write(json);
        json.extend_from_slice(b"\",\"updated_at\":\"");
        self.updated_at.write(json);
        json.extend_from_slice(b"\"}");
        Ok(())
    }
}

fn write_id(id: Uuid, json: &mut Vec<u8>) {
    let mut buffer = Uuid::encode_buffer();
    json.extend_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes());
}

/// A task that was deleted.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct DeletedTask {
    pub(crate) id: Uuid,
    pub(crate) deleted_at: Rfc3339,
}

#[derive(Clone, Debug)]
pub(crate) struct NewTask {
    pub(crate) title: Title,
    pub(crate) description: Option<Description>,
    pub(crate) completed: bool,
}

impl NewTask {
    /// Returns a new id and the time that it encodes. The time is read once, in microseconds, so
    /// that ids sort in the order of creation.
    pub(crate) fn new_id() -> (Uuid, Rfc3339) {
        static CLOCK: LazyLock<Mutex<ContextV7>> =
            LazyLock::new(|| Mutex::new(ContextV7::new().with_additional_precision()));
        // The time is read under the lock, so that a later call returns a greater id.
        let clock = CLOCK.lock();
        let micros = Timestamp::now().as_microsecond().max(0);
        let (seconds, nanos) = (
            micros as u64 / 1_000_000,
            (micros % 1_000_000) as u32 * 1000,
        );
        let id = Uuid::new_v7(uuid::Timestamp::from_unix(&*clock, seconds, nanos));
        let now = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH);
        (id, Rfc3339(now))
    }

    pub(crate) fn into_task(self, user_id: Uuid, id: Uuid, created_at: Rfc3339) -> Task {
        Task {
            id,
            user_id,
            title: self.title.0,
            description: self.description.map(|description| description.0),
            completed: self.completed,
            created_at,
            updated_at: created_at,
        }
    }

    /// Parses an id that a client chose, and returns it with the time that it encodes.
    pub(crate) fn parse_id(text: &str) -> Result<(Uuid, Rfc3339), ValidationError> {
        const MAX_AGE: SignedDuration = SignedDuration::from_hours(90 * 24);
        const MAX_AHEAD: SignedDuration = SignedDuration::from_mins(5);
        let time_of = |id: &Uuid| {
            // RFC 9562 section 5.7: the first 48 bits are milliseconds.
            let time = Timestamp::from_millisecond((id.as_u128() >> 80) as i64).ok()?;
            let age = Timestamp::now().duration_since(time);
            let is_valid = id.get_version() == Some(Version::SortRand)
                && id.get_variant() == Variant::RFC4122
                && (-MAX_AHEAD..=MAX_AGE).contains(&age);
            is_valid.then_some(time)
        };
        parse_id(text)
            .and_then(|id| Some((id, Rfc3339(time_of(&id)?))))
            .ok_or(ValidationError::new(
                "invalid_value",
                "id must be a UUID of version 7 in lower case, whose time is at most 90 days ago \
                 and at most 5 minutes ahead",
            ))
    }
}

/// The changes to a task. Fields that are `None` keep their value.
#[derive(Clone, Debug, Default)]
pub(crate) struct TaskChange {
    pub(crate) title: Option<Title>,
    /// `Some(None)` removes the description.
    pub(crate) description: Option<Option<Description>>,
    pub(crate) completed: Option<Completion>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    Set(bool),
    Toggle,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_ids_and_times_increase() {
        let created: Vec<_> = (0..10_000).map(|_| NewTask::new_id()).collect();
        let increases = |pair: &[(Uuid, Rfc3339)]| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1;
        assert!(created.windows(2).all(increases));
    }
}
