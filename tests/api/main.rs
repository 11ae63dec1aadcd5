//! Integration tests: they run the real program against a real PostgreSQL.
//!
//! All tests are one binary and share an embedded PostgreSQL. Tests that use only users they create
//! share a server (`Server::shared`); the others have a server and a database of their own. With
//! `TEST_DATABASE_URL` they use that PostgreSQL instead; its user must be able to create databases.

#![allow(clippy::unwrap_used)]

mod harness;

// Startup, the database, shutdown.
mod commands;
mod connections;
mod database_url;
mod embedded_postgres;
mod migrations;
mod purge;
mod startup;

// The API.
mod acceptance;
mod accounts;
mod client_ids;
mod conditional_lists;
mod cors;
mod explain;
mod http;
mod idempotency;
mod list_waits;
mod metrics;
mod openapi;
mod pages;
mod preconditions;
mod quotas;
mod read_batching;
mod revisions;
mod smuggling;
mod sql;
mod tasks;
mod unread_bodies;
mod validation;
mod write_batching;

// Authentication and authorization.
mod auth;
mod hashing;
mod isolation;
mod lockout;
mod log;
mod login_enumeration;
mod mail;
mod mail_delivery;
mod password_change;
mod passwords;
mod races;
mod refresh;
mod revocations;
mod session_limit;
mod sessions;
mod throttling;
mod tokens;

// Faults, overload, several instances, arbitrary input.
mod faults;
mod fuzz;
