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
pub mod command;
mod conditional;
pub mod config;
mod connection;
mod connection_table;
mod content_type;
mod cors;
pub mod db;
pub mod embedded_postgres;
mod error;
mod guard;
mod handler;
mod labels;
pub mod logging;
pub mod metrics;
mod model;
mod origin;
mod request;
mod response;
mod router;
pub mod server;
mod shutdown;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;
use uuid::Uuid;

use auth::password::Passwords;
use auth::revocations::Revocations;
use auth::throttle::{
    Addresses, KeyedPermit, KeyedSemaphore, MAX_CONCURRENT_LOGINS, client_network,
};
use auth::token::Tokens;
use config::{Config, Secret};
use cors::Cors;
use db::sessions::{ALL_EPOCHS, Revocation};
use db::sweep::Sweeper;
use db::users::{LockoutKey, NewSession};
use db::{Database, Deadline};
use error::Error;
use handler::pages;
use labels::RevocationCause;
use logging::Complaints;
use metrics::Metrics;

/// What every handler can reach.
pub struct App {
    config: Config,
    database: Database,
    tokens: Tokens,
    revocations: Arc<Revocations>,
    passwords: Passwords,
    login_slots: KeyedSemaphore<LockoutKey>,
    addresses: Addresses,
    cors: Cors,
    metrics: Arc<Metrics>,
    complaints: Complaints,
    sweeper: Arc<Sweeper>,
    large_answers: Arc<Semaphore>,
    large_by_user: KeyedSemaphore<Uuid>,
    stopping: AtomicBool,
}

/// How long ago a database that is awake has answered somebody.
const AWAKE: Duration = Duration::from_secs(1);

/// Large answers that are not read yet; at a MiB each, what they may take of the memory …
const LARGE_ANSWERS: usize = 128;
/// … and how many of them one user may leave unread.
const LARGE_ANSWERS_PER_USER: usize = 4;

/// A place among the large answers of all and of one user.
type LargePlace = (OwnedSemaphorePermit, KeyedPermit<Uuid>);

impl App {
    /// Everything in its place; the error is one line for the operator.
    pub fn new(
        config: Config,
        secret: &Secret,
        database: Database,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, String> {
        let lifetimes = config.lifetimes;
        let tokens = Tokens::new(
            secret,
            config.jwt_secret_previous.as_ref(),
            lifetimes.access,
        )
        .map_err(|error| format!("cannot use the JWT secret: {error:?}"))?;
        let passwords = Passwords::new(config.bcrypt_cost, metrics.clone())
            .map_err(|error| format!("cannot start the hashing threads: {error}"))?;
        pages::declare_responses(&metrics)
            .map_err(|error| format!("the OpenAPI document is no JSON: {error}"))?;
        Ok(Arc::new(Self {
            tokens,
            passwords,
            revocations: Arc::default(),
            login_slots: KeyedSemaphore::new(MAX_CONCURRENT_LOGINS),
            addresses: Addresses::new(config.auth_rate_per_minute),
            cors: Cors::new(&config.cors_origins),
            complaints: Complaints::default(),
            sweeper: Arc::default(),
            large_answers: Arc::new(Semaphore::new(LARGE_ANSWERS)),
            large_by_user: KeyedSemaphore::new(LARGE_ANSWERS_PER_USER),
            stopping: AtomicBool::new(false),
            database,
            metrics,
            config,
        }))
    }

    /// From now on answers close their connections, and `/readyz` sends clients elsewhere.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn new_session<'a>(&self, user_agent: Option<&'a str>, client: IpAddr) -> NewSession<'a> {
        let idle = self.config.lifetimes.refresh_idle.as_secs_f64();
        NewSession {
            id: Uuid::now_v7(),
            idle,
            user_agent,
            network: client_network(client).to_string(),
        }
    }

    /// Waits for a place for one more large answer to this user.
    async fn place_for_large(
        &self,
        user_id: Uuid,
        deadline: Deadline,
    ) -> Result<LargePlace, Error> {
        let turn = self.large_by_user.acquire(user_id, deadline).await?;
        let place = self.large_answers.clone().acquire_owned();
        match timeout_at(deadline.at(), place).await {
            Ok(Ok(place)) => Ok((place, turn)),
            _ => Err(Error::Overloaded),
        }
    }

    /// Sessions that this instance has just ended: their access tokens are refused here at once.
    fn ended(&self, cause: RevocationCause, sessions: &[Uuid]) {
        let revocations = sessions.iter().map(|session_id| Revocation {
            session_id: *session_id,
            before_epoch: ALL_EPOCHS,
        });
        self.revocations.insert(revocations);
        self.metrics.count_revoked(cause, sessions.len());
    }

    /// Sweeps old rows in the wake of a request that the database has answered, now and then: one
    /// that is asleep is not woken for it.
    fn sweep_if_due(&self) {
        if !self.database.answered_within(AWAKE) || !self.sweeper.is_due() {
            return;
        }
        let (sweeper, database) = (self.sweeper.clone(), self.database.clone());
        tokio::spawn(async move { sweeper.sweep(&database).await });
    }
}

/// How thoroughly the tests try what parses a client's bytes: as many cases as `FUZZ_CASES` says.
#[cfg(test)]
fn fuzz() -> proptest::test_runner::Config {
    let cases = std::env::var("FUZZ_CASES").ok();
    proptest::test_runner::Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(2000),
        failure_persistence: None,
        ..Default::default()
    }
}
