//! One function per route: parse, one database call, respond.

pub(crate) mod account;
pub(crate) mod auth;
pub(crate) mod changes;
mod credentials;
pub(crate) mod mail;
pub(crate) mod meta;
mod page;
pub(crate) mod sessions;
pub(crate) mod static_files;
pub(crate) mod tasks;
