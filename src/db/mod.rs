//! The database: one pool, its bounds, and what happens when it does not answer.
//!
//! *Reads gather, writes go alone.* The two reads that everybody makes all the time, one task and
//! a short page of the newest, travel with whatever else of their kind is asked at the same moment
//! (`gather`). Every statement has a connection to itself until it is answered: what shared one with
//! a write would wait for its fsync, and what travels together gains nothing by sharing.

mod batch;
mod connect;
mod deadline;
mod isolation;
mod migrations;
mod pool;
pub(crate) mod purge;
mod retry;
pub(crate) mod sessions;
mod statements;
pub(crate) mod tasks;
pub(crate) mod tls;
pub mod url;
pub(crate) mod users;

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use log::{info, warn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::telemetry::metrics::Metrics;
pub use connect::{Endpoint, FatalError, Pooler, ServerInfo};
pub use deadline::Deadline;
pub(crate) use deadline::{AUTHENTICATION_TIMEOUT, PASSWORD_REQUEST_TIMEOUT, REQUEST_TIMEOUT};
use isolation::Isolation;
use pool::{Connection, Pool, Pooled};
use retry::Repeat;
use statements::Sql;

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// The part of it that getting a connection may take, connecting and preparing included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A query that takes this long makes us ask whether the database is there at all.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// A queue for connections that has stood this long is no burst any more …
const QUEUE_TARGET: Duration = Duration::from_millis(500);
/// … and whoever joins it then waits no longer than this before being shed ("controlled delay":
/// a standing queue makes everybody late and nothing faster).
const QUEUE_SHED_AFTER: Duration = Duration::from_millis(50);
/// Searches at a time, so that nobody's searches take the pool.
const MAX_SEARCHES: usize = 5;

/// How long the server has to confirm that it has canceled a statement.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no result from the database. Nothing was changed, except after `Lost`.
#[derive(Clone, Debug)]
pub(crate) enum DbError {
    /// Rolled back or not sent; another attempt may succeed.
    Transient(String),
    /// The connection was lost while the statement ran: whether it was executed is unknown.
    ConnectionLost(String),
    /// The database is unavailable, or was too slow.
    Unavailable(String),
    /// All connections are busy and have been for too long.
    Overloaded,
    /// It refused the statement.
    Refused(Arc<tokio_postgres::Error>),
}

impl fmt::Display for DbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transient(reason) | Self::ConnectionLost(reason) | Self::Unavailable(reason) => {
                f.write_str(reason)
            }
            Self::Overloaded => f.write_str("all connections are busy"),
            Self::Refused(error) => f.write_str(&error_message(error)),
        }
    }
}

impl DbError {
    /// Whether the statement broke this constraint-like rule.
    fn is(&self, state: &SqlState) -> bool {
        matches!(self, Self::Refused(error) if error.code() == Some(state))
    }
}

/// An error of tokio-postgres with its cause: it prints only "db error" by itself.
pub(crate) fn error_message(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), error.source()) {
        // Not the detail or the hint: they may quote a row.
        (Some(db), _) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// Whether the server or the way to it failed, rather than the statement: the same may do better
/// on another connection or a little later.
fn is_connection_error(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        // Operator intervention, connection exceptions, no resources (a full disk is one), a
        // standby, a forgotten prepared statement, a transaction that has to be repeated.
        // A limit that somebody set on statements or locks is one of them.
        Some(code) => [
            "57", "55P03", "25P03", "08", "53", "58", "25006", "26000", "40",
        ]
        .iter()
        .any(|class| code.code().starts_with(class)),
        None => {
            error.is_closed()
                || error
                    .source()
                    .is_some_and(|source| source.is::<std::io::Error>())
        }
    }
}

/// Whether the server rolled the statement back and may accept it the next time: SQLSTATE class 40.
fn is_rollback(error: &tokio_postgres::Error) -> bool {
    let code = error.code().filter(|code| code.code().starts_with("40"));
    code.is_some() && !is_unknown(error)
}

/// Whether the server itself says that it does not know what became of the statement.
fn is_unknown(error: &tokio_postgres::Error) -> bool {
    [
        SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN,
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
    ]
    .iter()
    .any(|code| error.code() == Some(code))
}

/// Whether a connection that met this error is still good.
fn connection_survives(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else {
        return false;
    };
    is_rollback(error)
        || ["53", "57014", "55P03"]
            .iter()
            .any(|class| code.code().starts_with(class))
}

/// Whether the database answers, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not reached yet, or its schema is not ours yet.
    Starting,
    /// It answers.
    Up,
    /// It does not; one task of ours asks until it does.
    Down,
}

/// The database, for everybody.
#[derive(Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    endpoint: Endpoint,
    pool: Pool,
    /// As many as connections, first come first served: the pool itself lets newcomers overtake.
    places: Arc<Semaphore>,
    searches: Arc<Semaphore>,
    state: watch::Sender<State>,
    probing: AtomicBool,
    epoch: Instant,
    /// Milliseconds since `epoch`: when the database last answered.
    answered: AtomicU64,
    /// Milliseconds since `epoch`: when somebody last got a connection without waiting.
    unhindered: AtomicU64,
    isolation: Arc<Isolation>,
    batchers: tasks::Batchers,
    metrics: Arc<Metrics>,
}

impl Database {
    /// A database that nobody has asked yet; `bring_up` makes it ready.
    pub fn new(endpoint: Endpoint, pool_size: u32, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new_cyclic(|inner: &std::sync::Weak<Inner>| {
            let inner = inner.clone();
            let failed = move |reason| {
                if let Some(inner) = inner.upgrade() {
                    Database(inner).start_probe(reason);
                }
            };
            let isolation = Arc::<Isolation>::default();
            Inner {
                pool: pool::build(
                    endpoint.clone(),
                    pool_size,
                    CONNECT_TIMEOUT,
                    isolation.clone(),
                    failed,
                ),
                isolation,
                endpoint,
                places: Arc::new(Semaphore::new(pool::request_capacity(pool_size) as usize)),
                searches: Arc::new(Semaphore::new(MAX_SEARCHES.min(pool_size as usize))),
                state: watch::Sender::new(State::Starting),
                probing: AtomicBool::new(false),
                epoch: Instant::now(),
                answered: AtomicU64::new(0),
                unhindered: AtomicU64::new(0),
                batchers: tasks::Batchers::default(),
                metrics,
            }
        }))
    }

    /// The database for work that has to be done by then.
    pub(crate) fn with_deadline(&self, deadline: Deadline) -> Queries<'_> {
        Queries {
            database: self,
            deadline,
        }
    }

    /// Where it is, without a password.
    pub(crate) fn location(&self) -> &str {
        self.0.endpoint.place()
    }

    /// Waits until the database answers and has our schema, with a line now and then. An error is
    /// one that waiting does not mend, or that no contact came about within `patience`.
    pub async fn wait_until_ready(
        &self,
        patience: Option<Duration>,
    ) -> Result<ServerInfo, FatalError> {
        let begun = Instant::now();
        let mut told = None;
        loop {
            let reason = match self.0.endpoint.connect_and_migrate().await {
                Ok(found) => {
                    self.0.state.send_replace(State::Up);
                    self.answered();
                    // The first request finds a connection; if this one fails it makes its own.
                    let database = self.clone();
                    tokio::spawn(async move {
                        database.ask(Deadline::after(REQUEST_TIMEOUT)).await.ok()
                    });
                    return Ok(found);
                }
                Err(connect::ConnectError::Fatal(refusal)) => return Err(refusal),
                Err(connect::ConnectError::Transient(reason)) => reason,
            };
            self.0.state.send_replace(State::Down);
            if patience.is_some_and(|patience| begun.elapsed() > patience) {
                let place = self.0.endpoint.place();
                return Err(FatalError(format!(
                    "cannot use the database at {place}: {reason}"
                )));
            }
            if told.is_none_or(|at: Instant| at.elapsed() > Duration::from_secs(10)) {
                warn!(
                    "waiting for the database at {}: {reason}",
                    self.0.endpoint.place()
                );
                told = Some(Instant::now());
            }
            sleep(Duration::from_millis(250)).await;
        }
    }

    /// Whether the database answers: by what was last seen of it, else by asking it, at most
    /// every five seconds.
    pub(crate) async fn is_ready(&self) -> bool {
        if *self.0.state.borrow() != State::Up {
            return false;
        }
        let since = self
            .millis()
            .saturating_sub(self.0.answered.load(Ordering::Relaxed));
        if since < 5000 {
            return true;
        }
        self.ask(Deadline::after(CONNECT_TIMEOUT)).await.is_ok()
    }

    /// One round trip over a connection of the pool.
    async fn ask(&self, deadline: Deadline) -> Result<(), DbError> {
        let mut lease = self.acquire(deadline).await?;
        lease
            .run(deadline, |link| async move {
                link.client().check_connection().await
            })
            .await
    }

    /// A connection to keep until it is answered.
    async fn acquire(&self, deadline: Deadline) -> Result<Lease, DbError> {
        let (place, pooled) = self.checkout(deadline).await?;
        Ok(Lease {
            database: self.clone(),
            connection: Some((place, pooled)),
            search: None,
            in_flight: false,
        })
    }

    async fn checkout(
        &self,
        deadline: Deadline,
    ) -> Result<(OwnedSemaphorePermit, Pooled), DbError> {
        let started = Instant::now();
        let patience = started + CONNECT_TIMEOUT;
        let bound = deadline.at().min(patience);
        let mut state = self.0.state.subscribe();
        if *state.borrow() == State::Starting {
            // Whether the database is there is known in a moment: a request that waited in the
            // socket until we started must not be refused for being early.
            let known = state.wait_for(|state| *state != State::Starting);
            timeout_at(bound, known).await.ok();
        }
        if *state.borrow() != State::Up {
            return Err(DbError::Unavailable("the database is away".into()));
        }
        // Observed when dropped: whoever waited in vain counts, too.
        let _wait = self.0.metrics.db_acquire_duration.start_timer();
        let place = self.place(started, bound).await?;
        let pooled = tokio::select! {
            biased;
            pooled = self.0.pool.get_owned() => pooled,
            _ = state.wait_for(|state| *state == State::Down) => {
                return Err(DbError::Unavailable("the database went away".into()));
            }
            () = sleep_until(bound) => Err(bb8::RunError::TimedOut),
        };
        match pooled {
            Ok(pooled) => Ok((place, pooled)),
            // The request was late already: that says nothing about the database.
            Err(bb8::RunError::TimedOut) if bound < patience => {
                Err(DbError::Unavailable("no connection in time".into()))
            }
            Err(error) => {
                let reason = format!("no connection: {error}");
                self.start_probe(reason.clone());
                Err(DbError::Transient(reason))
            }
        }
    }

    /// A turn at the pool, in the order of arrival.
    async fn place(&self, now: Instant, bound: Instant) -> Result<OwnedSemaphorePermit, DbError> {
        if let Ok(place) = self.0.places.clone().try_acquire_owned() {
            self.0
                .unhindered
                .store(self.millis_at(now), Ordering::Relaxed);
            return Ok(place);
        }
        let _waiting = self.0.metrics.db_pool_waiter();
        let since = self
            .millis_at(now)
            .saturating_sub(self.0.unhindered.load(Ordering::Relaxed));
        let stands = Duration::from_millis(since) > QUEUE_TARGET;
        let patience = match stands {
            // Connections are on their way: to a database that wakes up or is far away that takes
            // longer than any queue should stand.
            _ if self.0.pool.is_connecting() => CONNECT_TIMEOUT,
            true => QUEUE_SHED_AFTER,
            false => QUEUE_TARGET,
        };
        let mut state = self.0.state.subscribe();
        tokio::select! {
            biased;
            place = self.0.places.clone().acquire_owned() => {
                place.map_err(|_| DbError::Unavailable("the service is stopping".into()))
            }
            _ = state.wait_for(|state| *state == State::Down) => {
                Err(DbError::Unavailable("the database went away".into()))
            }
            () = sleep_until(bound.min(now + patience)) => Err(DbError::Overloaded),
        }
    }

    /// Waits for a result until the deadline, and no longer than the database is there. At the
    /// deadline the statement is canceled; what became of it then is known unless the server does
    /// not respond at all.
    async fn answer<T>(
        &self,
        deadline: Deadline,
        link: &Arc<Connection>,
        query: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, DbError> {
        let started = Instant::now();
        let _query_time = self.0.metrics.db_query_duration.start_timer();
        // A request that hashes passwords has more time, but no statement has.
        let ends = deadline.at().min(started + REQUEST_TIMEOUT);
        let suspicious = started + PROBE_AFTER;
        let mut query = pin!(query);
        let result = match timeout_at(ends.min(suspicious), &mut query).await {
            Ok(result) => result,
            Err(_) => {
                // One that had less time than that was late before it was sent.
                if suspicious <= ends {
                    self.start_probe("a query takes long".into());
                }
                let mut state = self.0.state.subscribe();
                let in_time = tokio::select! {
                    biased;
                    result = &mut query => Some(result),
                    _ = state.wait_for(|state| *state == State::Down) => {
                        self.abandon(link);
                        return Err(DbError::ConnectionLost("the database went away".into()));
                    }
                    () = sleep_until(ends) => None,
                };
                match in_time {
                    Some(result) => result,
                    None => {
                        self.abandon(link);
                        let Ok(result) = timeout(CANCEL_TIMEOUT, &mut query).await else {
                            // If it was the connection that failed, those opened with it may have.
                            self.0.pool.evict_unresponsive_since(started);
                            return Err(DbError::ConnectionLost("a query ran out of time".into()));
                        };
                        result
                    }
                }
            }
        };
        match result {
            Ok(value) => {
                self.answered();
                link.answered();
                Ok(value)
            }
            Err(error) => Err(self.failure(link, error)),
        }
    }

    /// What a failed statement means for its connection and for the request.
    fn failure(&self, link: &Connection, error: tokio_postgres::Error) -> DbError {
        if !is_connection_error(&error) {
            return DbError::Refused(Arc::new(error));
        }
        let reason = error_message(&error);
        match error.code() {
            Some(&SqlState::T_R_SERIALIZATION_FAILURE) => {
                self.0.isolation.is_not_read_committed(&reason);
            }
            Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => warn!(
                "the database forgot a prepared statement: is there a transaction pooler in between that does not know them (PgBouncer before 1.21)?"
            ),
            _ => {}
        }
        if connection_survives(&error) {
            return match is_rollback(&error) {
                true => DbError::Transient(reason),
                false => DbError::Unavailable(reason),
            };
        }
        link.evict();
        // An error ends the statement; a fatal one ends the connection, whatever the statement did.
        let severity = error
            .as_db_error()
            .and_then(|error| error.parsed_severity());
        match severity {
            Some(Severity::Error) if !is_unknown(&error) => DbError::Transient(reason),
            _ => DbError::ConnectionLost(reason),
        }
    }

    /// Cancels what runs on this connection. It is not used again: the request to cancel may reach
    /// the server late, and would cancel the next statement.
    fn abandon(&self, link: &Connection) {
        link.evict();
        self.0.endpoint.cancel(link.client());
    }

    fn answered(&self) {
        self.0.answered.store(self.millis(), Ordering::Relaxed);
    }

    fn millis(&self) -> u64 {
        self.millis_at(Instant::now())
    }

    fn millis_at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.0.epoch).as_millis() as u64
    }

    /// Asks whether the database is there, unless somebody does already; if it is not, says so
    /// to everybody and goes on asking until it is.
    fn start_probe(&self, reason: String) {
        if *self.0.state.borrow() != State::Up || self.0.probing.swap(true, Ordering::AcqRel) {
            return;
        }
        let database = self.clone();
        tokio::spawn(async move {
            if let Err(cause) = database.confirm_down().await {
                let reason = format!("{cause} ({reason})");
                database.wait_for_recovery(&reason).await;
            } else {
                database.0.probing.store(false, Ordering::Release);
            }
        });
    }

    /// One connection that fails may be chance; three in a row while nobody else has an answer, or
    /// one that hangs, is not.
    async fn confirm_down(&self) -> Result<(), String> {
        let begun = self.millis();
        let mut cause = String::new();
        for _ in 0..3 {
            match timeout(CONNECT_TIMEOUT, self.probe()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => cause = error,
                Err(_) => return Err("no answer with_timeout 2 s".into()),
            }
            if self.0.answered.load(Ordering::Relaxed) > begun {
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err(cause)
    }

    /// A connection beside the pool's, for which the bound on sockets leaves room, and one round
    /// trip. Where there is no room after all, that says nothing of the database.
    async fn probe(&self) -> Result<(), String> {
        let socket = timeout(PROBE_AFTER, self.0.pool.socket()).await;
        let Ok(_socket) = socket else {
            return Ok(());
        };
        self.0
            .endpoint
            .ping()
            .await
            .map_err(|error| error_message(&error))
    }

    async fn wait_for_recovery(&self, reason: &str) {
        let lost = Instant::now();
        warn!("database lost: {reason}");
        self.0.state.send_replace(State::Down);
        self.0.pool.evict_all();
        while !matches!(timeout(REQUEST_TIMEOUT, self.probe()).await, Ok(Ok(()))) {
            sleep(Duration::from_millis(250)).await;
        }
        self.answered();
        // First: whoever sees it up may have to suspect it again.
        self.0.probing.store(false, Ordering::Release);
        self.0.state.send_replace(State::Up);
        info!(
            "database found again after {:.1} s",
            lost.elapsed().as_secs_f64()
        );
    }

    /// Whether the database has answered somebody within this time: it is awake.
    pub(crate) fn answered_within(&self, time: Duration) -> bool {
        // An answer may come between the two looks.
        let answered = self.0.answered.load(Ordering::Relaxed);
        let since = self.millis().saturating_sub(answered);
        self.is_up() && Duration::from_millis(since) < time
    }

    fn is_up(&self) -> bool {
        *self.0.state.borrow() == State::Up
    }

    /// Connections of the pool: all of them, and those that nobody holds.
    pub(crate) fn connections(&self) -> (u32, u32) {
        let state = self.0.pool.state();
        (state.connections, state.idle_connections)
    }
}

/// The database with the deadline of the work that is about to be done on it.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    database: &'a Database,
    deadline: Deadline,
}

impl<'a> Queries<'a> {
    pub(crate) fn database(self) -> &'a Database {
        self.database
    }

    pub(crate) fn deadline(self) -> Deadline {
        self.deadline
    }

    /// Asks a question, again over a fresh connection if its own is lost.
    pub(crate) async fn read(&self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>, DbError> {
        self.query(Repeat::Read, sql, params).await
    }

    /// A question that reads all of somebody's rows: one of few at a time.
    pub(crate) async fn search(&self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>, DbError> {
        let place = timeout_at(
            self.deadline.at(),
            self.database.0.searches.clone().acquire_owned(),
        )
        .await;
        let Ok(Ok(place)) = place else {
            return Err(DbError::Overloaded);
        };
        let place = Arc::new(place);
        self.retry(Repeat::Read, || async {
            let mut lease = self.database.acquire(self.deadline).await?;
            lease.search = Some(place.clone());
            lease.query(self.deadline, sql, params).await
        })
        .await
    }

    /// Runs one statement that changes something; at most once.
    pub(crate) async fn write(&self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>, DbError> {
        self.query(Repeat::Never, sql, params).await
    }

    /// Runs one statement that inserts rows under ids of ours. If its connection is lost it runs
    /// again, and then finds the rows of the first run.
    pub(crate) async fn insert(&self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>, DbError> {
        self.query(Repeat::Insert, sql, params).await
    }

    /// Like `write`, where only the number of rows matters.
    pub(crate) async fn execute(&self, sql: Sql, params: Params<'_>) -> Result<u64, DbError> {
        self.retry(Repeat::Never, || async {
            let mut lease = self.database.acquire(self.deadline).await?;
            lease.execute(self.deadline, sql, params).await
        })
        .await
    }

    async fn query(
        &self,
        repeat: Repeat,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<Vec<Row>, DbError> {
        self.retry(repeat, || async {
            let mut lease = self.database.acquire(self.deadline).await?;
            lease.query(self.deadline, sql, params).await
        })
        .await
    }
}

/// A connection that nobody else uses meanwhile.
pub(crate) struct Lease {
    database: Database,
    /// Gone only in `drop`.
    connection: Option<(OwnedSemaphorePermit, Pooled)>,
    search: Option<Arc<OwnedSemaphorePermit>>,
    /// Whether a query or a transaction is under way.
    in_flight: bool,
}

impl Lease {
    async fn query(
        &mut self,
        deadline: Deadline,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<Vec<Row>, DbError> {
        let explicit = self.needs_transaction();
        self.run(deadline, |link| async move {
            let query = link.client().query(link.statement(sql), params);
            isolation::read_committed(explicit, link.client(), query).await
        })
        .await
    }

    async fn execute(
        &mut self,
        deadline: Deadline,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<u64, DbError> {
        let explicit = self.needs_transaction();
        self.run(deadline, |link| async move {
            let query = link.client().execute(link.statement(sql), params);
            isolation::read_committed(explicit, link.client(), query).await
        })
        .await
    }

    /// Whether a statement has to open a transaction to run in READ COMMITTED.
    fn needs_transaction(&self) -> bool {
        !self.in_flight && self.database.0.isolation.is_explicit()
    }

    async fn run<T, F>(
        &mut self,
        deadline: Deadline,
        query: impl FnOnce(Arc<Connection>) -> F,
    ) -> Result<T, DbError>
    where
        F: Future<Output = Result<T, tokio_postgres::Error>>,
    {
        let Some((_, pooled)) = &self.connection else {
            return Err(DbError::Unavailable("the connection is gone".into()));
        };
        if deadline.has_passed() {
            return Err(DbError::Unavailable("the deadline has passed".into()));
        }
        let link = pooled.link();
        let was_unfinished = std::mem::replace(&mut self.in_flight, true);
        let result = self
            .database
            .answer(deadline, &link, query(link.clone()))
            .await;
        self.in_flight = was_unfinished;
        result
    }

    /// Opens a transaction; until `commit` or `rollback` the connection is not given back.
    async fn begin(&mut self, deadline: Deadline) -> Result<(), DbError> {
        self.batch(deadline, isolation::BEGIN).await?;
        self.in_flight = true;
        Ok(())
    }

    async fn commit(mut self, deadline: Deadline) -> Result<(), DbError> {
        self.batch(deadline, "commit").await?;
        self.in_flight = false;
        Ok(())
    }

    async fn batch(&mut self, deadline: Deadline, text: &'static str) -> Result<(), DbError> {
        self.run(deadline, |link| async move {
            link.client().batch_execute(text).await
        })
        .await
    }
}

impl Drop for Lease {
    /// A client that went away left its query running: the connection goes back to the pool only
    /// when the answer is in, and without a transaction.
    fn drop(&mut self) {
        let Some((place, pooled)) = self.connection.take().filter(|_| self.in_flight) else {
            return;
        };
        let search = self.search.take();
        let endpoint = self.database.0.endpoint.clone();
        tokio::spawn(async move {
            let link = pooled.link();
            if !matches!(
                timeout(REQUEST_TIMEOUT, rollback(link.client())).await,
                Ok(Ok(()))
            ) {
                endpoint.cancel(link.client());
                link.evict();
            }
            drop((pooled, place, search));
        });
    }
}

/// Answered after all that was asked before it; harmless outside of a transaction.
async fn rollback(client: &Client) -> Result<(), tokio_postgres::Error> {
    client.batch_execute("rollback").await
}
