//! One function a route: parse, one call to the database, respond.

pub(crate) mod auth;
pub(crate) mod pages;
pub(crate) mod sessions;
pub(crate) mod tasks;

use uuid::Uuid;

/// An id as this API writes it; ids are compared as text, so no other spelling is one.
fn id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    let mut buffer = Uuid::encode_buffer();
    (id.hyphenated().encode_lower(&mut buffer) == text).then_some(id)
}
