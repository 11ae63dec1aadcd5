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
pub mod config;
pub mod db;
mod domain;
pub mod embedded_postgres;
mod error;
mod http;
mod labels;
mod shutdown;
pub mod telemetry;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;
use uuid::Uuid;

use auth::login_limits::{
    IpRateLimiter, KeyedPermit, KeyedSemaphore, MAX_CONCURRENT_LOGINS, client_network,
};
use auth::password::PasswordHasher;
use auth::revocations::Revocations;
use auth::token::TokenIssuer;
use config::{Config, Secret};
use db::purge::Purger;
use db::sessions::{ALL_EPOCHS, Revocation};
use db::users::{LockoutKey, NewSession};
use db::{Database, Deadline};
use error::Error;
use http::cors::Cors;
use http::handlers::meta;
use labels::RevocationCause;
use telemetry::logging::ThrottledLog;
use telemetry::metrics::Metrics;

/// What every handler can reach.
pub struct AppState {
    config: Config,
    database: Database,
    tokens: TokenIssuer,
    revocations: Arc<Revocations>,
    passwords: PasswordHasher,
    login_slots: KeyedSemaphore<LockoutKey>,
    ip_limiter: IpRateLimiter,
    cors: Cors,
    metrics: Arc<Metrics>,
    refusal_log: ThrottledLog,
    purger: Arc<Purger>,
    large_response_permits: Arc<Semaphore>,
    large_response_permits_per_user: KeyedSemaphore<Uuid>,
    shutting_down: AtomicBool,
}

/// How long ago a database that is awake has answered somebody.
const RECENTLY_RESPONDED: Duration = Duration::from_secs(1);

/// Large answers that are not read yet; at a MiB each, what they may take of the memory …
const LARGE_ANSWERS: usize = 128;
/// … and how many of them one user may leave unread.
const LARGE_ANSWERS_PER_USER: usize = 4;

/// A place among the large answers of all and of one user.
type LargeResponsePermit = (OwnedSemaphorePermit, KeyedPermit<Uuid>);

impl AppState {
    /// Everything in its place; the error is one line for the operator.
    pub fn new(
        config: Config,
        secret: &Secret,
        database: Database,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, String> {
        let lifetimes = config.lifetimes;
        let tokens = TokenIssuer::new(
            secret,
            config.jwt_secret_previous.as_ref(),
            lifetimes.access,
        )
        .map_err(|error| format!("cannot use the JWT secret: {error:?}"))?;
        let passwords = PasswordHasher::new(config.bcrypt_cost, metrics.clone())
            .map_err(|error| format!("cannot start the hashing threads: {error}"))?;
        meta::declare_responses(&metrics)
            .map_err(|error| format!("the OpenAPI document is no JSON: {error}"))?;
        Ok(Arc::new(Self {
            tokens,
            passwords,
            revocations: Arc::default(),
            login_slots: KeyedSemaphore::new(MAX_CONCURRENT_LOGINS),
            ip_limiter: IpRateLimiter::new(config.auth_rate_per_minute),
            cors: Cors::new(&config.cors_origins),
            refusal_log: ThrottledLog::default(),
            purger: Arc::default(),
            large_response_permits: Arc::new(Semaphore::new(LARGE_ANSWERS)),
            large_response_permits_per_user: KeyedSemaphore::new(LARGE_ANSWERS_PER_USER),
            shutting_down: AtomicBool::new(false),
            database,
            metrics,
            config,
        }))
    }

    /// From now on answers close their connections, and `/readyz` sends clients elsewhere.
    fn stop(&self) {
        self.shutting_down.store(true, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.shutting_down.load(Ordering::Relaxed)
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
    async fn acquire_large_response(
        &self,
        user_id: Uuid,
        deadline: Deadline,
    ) -> Result<LargeResponsePermit, Error> {
        let turn = self
            .large_response_permits_per_user
            .acquire(user_id, deadline)
            .await?;
        let place = self.large_response_permits.clone().acquire_owned();
        match timeout_at(deadline.at(), place).await {
            Ok(Ok(place)) => Ok((place, turn)),
            _ => Err(Error::Overloaded),
        }
    }

    /// Sessions that this instance has just ended: their access tokens are refused here at once.
    fn record_revoked(&self, cause: RevocationCause, sessions: &[Uuid]) {
        let revocations = sessions.iter().map(|session_id| Revocation {
            session_id: *session_id,
            before_epoch: ALL_EPOCHS,
        });
        self.revocations.insert(revocations);
        self.metrics.count_revoked(cause, sessions.len());
    }

    /// Sweeps old rows in the wake of a request that the database has answered, now and then: one
    /// that is asleep is not woken for it.
    fn spawn_purge_if_due(&self) {
        if !self.database.answered_within(RECENTLY_RESPONDED) || !self.purger.is_due() {
            return;
        }
        let (purger, database) = (self.purger.clone(), self.database.clone());
        tokio::spawn(async move { purger.purge(&database).await });
    }
}

/// How thoroughly the tests try what parses a client's bytes: as many cases as `FUZZ_CASES` says.
#[cfg(test)]
fn proptest_config() -> proptest::test_runner::Config {
    let cases = std::env::var("FUZZ_CASES").ok();
    proptest::test_runner::Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(2000),
        failure_persistence: None,
        ..Default::default()
    }
}
