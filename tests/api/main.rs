//! The promises of the service, each kept by the real program on a real PostgreSQL.
//!
//! One binary: its tests share one private PostgreSQL, and each has a database of its own there.
//! With `TEST_DATABASE_URL` they use that server instead; its user must be allowed to make databases.

// A test that cannot go on has failed; unwrap says so as well as anything.
#![allow(clippy::unwrap_used)]

mod harness;

// Coming up, staying up, going down.
mod commands;
mod connections;
mod database_url;
mod embedded_postgres;
mod migrations;
mod purge;
mod startup;

// What the API promises.
mod acceptance;
mod cors;
mod explain;
mod http;
mod idempotency;
mod metrics;
mod openapi;
mod pages;
mod preconditions;
mod read_batching;
mod smuggling;
mod sql;
mod tasks;
mod unread_bodies;
mod validation;

// Who may do what.
mod auth;
mod hashing;
mod isolation;
mod lockout;
mod log;
mod login_enumeration;
mod password_change;
mod passwords;
mod races;
mod refresh;
mod revocations;
mod session_limit;
mod sessions;
mod throttling;
mod tokens;

// Faults, overload, several instances.
mod faults;
mod fuzz;
