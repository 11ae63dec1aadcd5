//! A secure multi-user todo back end over HTTP and PostgreSQL.
//!
//! # Modules
//!
//! | Module | Contents |
//! |---|---|
//! | [`cli`] | the commands; `serve` wires the service, `shutdown` receives signals |
//! | `http` | everything between a connection and a handler, and the handlers; see below |
//! | `config` | the table of settings |
//! | `mail` | sends mail over SMTP |
//! | `auth` | tokens, tags and cursors of lists, passwords and their hashing, revoked sessions, rate limits |
//! | `error` | everything that can go wrong; `problem` describes it to clients |
//! | `db` | connection pool, retries and batching; the queries of each table; migrations; purging |
//! | `domain` | values that are valid by construction, such as an e-mail address or a title |
//! | [`embedded_postgres`] | the PostgreSQL server that runs when `DATABASE_URL` is unset |
//! | `telemetry` | logging and metrics |
//!
//! Imports point down this table. `domain`, `embedded_postgres` and `telemetry` import no other
//! module of the crate.
//!
//! # How a request is processed
//!
//! 1. `http::server` accepts the connection. `http::timeout_io` wraps its socket, and
//!    `http::framing` scans the request's head before hyper parses it.
//! 2. `http::service` creates the request context and calls the router. When the handler returns,
//!    it turns an error into a response and a log line.
//! 3. `http::router` finds the route, the handler and its guard.
//! 4. `http::middleware` verifies the access token, and that the path belongs to its user, before
//!    the body is read.
//! 5. `http::handlers` has one function per route: it parses the request, runs one database query
//!    and returns a response.
//! 6. `db` runs a statement from `sql/` on a pooled connection. Reads and writes of tasks that arrive
//!    at the same time share one statement.

// A failed `unwrap` fails the test, as it should.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod auth;
pub mod cli;
mod config;
mod db;
mod domain;
pub mod embedded_postgres;
mod error;
mod http;
mod mail;
mod problem;
mod serve;
mod shutdown;
mod telemetry;

/// Settings of the property tests. `FUZZ_CASES` sets the number of cases.
#[cfg(test)]
fn proptest_config() -> proptest::test_runner::Config {
    let cases = std::env::var("FUZZ_CASES").ok();
    proptest::test_runner::Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(2000),
        failure_persistence: None,
        ..Default::default()
    }
}
