//! A secure multi-user todo back end over HTTP and PostgreSQL.
//!
//! A request's way through the house:
//!
//! 1. [`server`] accepts a connection; `connection` is its socket with a clock for everything that
//!    can take too long.
//! 2. `router` splits the path and matches it with the method: the whole API is one `match`.
//!    It is also where an error becomes an answer and, once, a line in the log.
//! 3. `guard` turns the bearer token into a signed-in user, before the body is read.
//! 4. `handler` has one function a route: parse (`request`, `content_type`,
//!    `conditional`), one call to the database,
//!    respond (`response`). `cors` adds what browsers of other origins need.
//! 5. `db` runs one statement out of `sql/` over a pool of at most 20 connections; reads that are
//!    asked at the same moment share one (`db::gather`). [`embedded_postgres`] is the server that the service runs itself
//!    when `DATABASE_URL` is unset.
//!
//! `auth` knows tokens, passwords, ended sessions and login rate limiting; `model` the values
//! that are valid because they exist; [`config`] every setting; `error` everything that can go
//! wrong; [`metrics`] what is counted, `labels` the reasons that log and metrics name; [`logging`] how a line looks. `main` reads the arguments,
//! [`command`] wires.
//!
//! Imports point one way: main → command → server → router → guard and handler → auth, request,
//! response → db → model. `db` knows no HTTP, only `router` names handlers, `model` and
//! `embedded_postgres` import nothing of ours.

// A test that cannot go on has failed; unwrap says so as well as anything.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod auth;
pub mod cli;
mod config;
pub mod db;
mod domain;
pub mod embedded_postgres;
mod error;
mod http;
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
