//! One function a route: parse, one call to the database, respond.

pub(crate) mod auth;
pub(crate) mod meta;
pub(crate) mod sessions;
pub(crate) mod tasks;
