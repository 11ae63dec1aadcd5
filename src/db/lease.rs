//! A connection that is checked out of the pool, and the statements that run on it.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use log::warn;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row};

use super::admission::Admission;
use super::connect::Endpoint;
use super::deadline::{Deadline, REQUEST_TIMEOUT};
use super::error::{DbError, Result, error_message};
use super::health::{Health, Interrupted};
use super::isolation::{self, Isolation};
use super::pool::{self, CONNECT_TIMEOUT, ConnectionManager, Pool, PooledConnection, Registry};
use super::statements::Sql;
use crate::telemetry::metrics::Metrics;

pub(super) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A statement that runs this long triggers a check that the database still responds.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// How long to wait for the server to confirm that it has canceled a statement.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// Hands out connections: the pool with its admission, health and metrics.
pub(super) struct Connections {
    pub(super) endpoint: Endpoint,
    pub(super) health: Arc<Health>,
    pub(super) admission: Admission,
    pub(super) pool: Pool,
    registry: Arc<Registry>,
    isolation: Arc<Isolation>,
    metrics: Arc<Metrics>,
}

impl Connections {
    pub(super) fn new(endpoint: Endpoint, max_sockets: u32, metrics: Arc<Metrics>) -> Self {
        let registry = Arc::new(Registry::new(max_sockets));
        let isolation = Arc::<Isolation>::default();
        let health = Arc::new(Health::new(endpoint.clone(), registry.clone()));
        let probe = health.clone();
        let manager = ConnectionManager {
            endpoint: endpoint.clone(),
            registry: registry.clone(),
            isolation: isolation.clone(),
            on_failure: Box::new(move |reason| probe.start_probe(reason)),
        };
        Self {
            admission: Admission::new(
                max_sockets,
                registry.clone(),
                health.clone(),
                metrics.clone(),
            ),
            pool: pool::build(manager, max_sockets),
            endpoint,
            health,
            registry,
            isolation,
            metrics,
        }
    }

    /// Checks out a connection.
    pub(super) async fn acquire(self: &Arc<Self>, deadline: Deadline) -> Result<Lease> {
        let pool_timeout = Instant::now() + CONNECT_TIMEOUT;
        let until = deadline.at().min(pool_timeout);
        if !self.health.is_up_after_startup(until).await {
            return Err(DbError::Unavailable("the database is down".into()));
        }
        // Observed on drop, so failed waits are counted as well.
        let _timer = self.metrics.db_acquire_duration.start_timer();
        let permit = self.admission.acquire(until).await?;
        match self.health.while_up(until, self.pool.get_owned()).await {
            Ok(Ok(connection)) => Ok(Lease {
                connections: self.clone(),
                connection,
                _permit: permit,
                in_flight: false,
            }),
            Err(Interrupted::Down) => Err(DbError::Unavailable("the database went down".into())),
            // A request with less time left than the pool's timeout says nothing about the
            // database.
            Err(Interrupted::TimedOut) if until < pool_timeout => Err(DbError::Unavailable(
                "the deadline passed before a connection was available".into(),
            )),
            _ => {
                let reason = "no connection could be opened within 2 s";
                self.health.start_probe(reason.into());
                Err(DbError::Transient(reason.into()))
            }
        }
    }
}

/// A connection for exclusive use. Dropping it returns the connection to the pool, or closes it if
/// a statement or a transaction is unfinished.
pub(crate) struct Lease {
    connections: Arc<Connections>,
    connection: PooledConnection,
    /// Released after the connection is back in the pool: fields drop in this order.
    _permit: OwnedSemaphorePermit,
    /// Whether a statement or a transaction is unfinished.
    in_flight: bool,
}

impl Lease {
    pub(super) async fn query(
        &mut self,
        deadline: Deadline,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<Vec<Row>> {
        let connection = self.connection.clone();
        let query = connection.client().query(connection.statement(sql), params);
        let explicit = self.needs_transaction();
        let query = isolation::read_committed(explicit, connection.client(), query);
        self.run(deadline, query).await
    }

    /// Like `query`, but returns how many rows the statement changed.
    pub(super) async fn execute(
        &mut self,
        deadline: Deadline,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<u64> {
        let connection = self.connection.clone();
        let query = connection
            .client()
            .execute(connection.statement(sql), params);
        let explicit = self.needs_transaction();
        let query = isolation::read_committed(explicit, connection.client(), query);
        self.run(deadline, query).await
    }

    /// Makes one round trip.
    pub(super) async fn ping(&mut self, deadline: Deadline) -> Result<()> {
        let connection = self.connection.clone();
        self.run(deadline, connection.client().check_connection())
            .await
    }

    /// Opens a transaction. It ends with `commit` or `rollback`; a lease that is dropped before
    /// that closes its connection.
    pub(super) async fn begin(&mut self, deadline: Deadline) -> Result<()> {
        self.batch_execute(deadline, isolation::BEGIN).await?;
        self.in_flight = true;
        Ok(())
    }

    pub(super) async fn commit(self, deadline: Deadline) -> Result<()> {
        self.end(deadline, "commit").await
    }

    pub(super) async fn rollback(self, deadline: Deadline) -> Result<()> {
        self.end(deadline, "rollback").await
    }

    async fn end(mut self, deadline: Deadline, text: &'static str) -> Result<()> {
        self.batch_execute(deadline, text).await?;
        self.in_flight = false;
        Ok(())
    }

    async fn batch_execute(&mut self, deadline: Deadline, text: &str) -> Result<()> {
        let connection = self.connection.clone();
        self.run(deadline, connection.client().batch_execute(text))
            .await
    }

    /// Whether a statement has to open a transaction to run in READ COMMITTED.
    fn needs_transaction(&self) -> bool {
        !self.in_flight && self.connections.isolation.is_explicit()
    }

    /// Sends a statement unless the deadline has passed. The future sends it when first polled.
    async fn run<T>(
        &mut self,
        deadline: Deadline,
        statement: impl Future<Output = Result<T, Error>>,
    ) -> Result<T> {
        if deadline.has_passed() {
            return Err(DbError::Unavailable("the deadline has passed".into()));
        }
        let was_in_flight = std::mem::replace(&mut self.in_flight, true);
        let result = self.await_response(deadline, statement).await;
        self.in_flight = was_in_flight;
        match result? {
            Ok(value) => {
                self.connections.health.record_response();
                self.connection.record_response();
                Ok(value)
            }
            Err(error) => Err(self.handle_error(error)),
        }
    }

    /// Waits for a result until the deadline, or until the database is considered down. At the
    /// deadline the statement is canceled; its outcome is then known unless the server does not
    /// respond at all.
    async fn await_response<T>(
        &self,
        deadline: Deadline,
        statement: impl Future<Output = Result<T, Error>>,
    ) -> Result<Result<T, Error>> {
        let Connections {
            health,
            registry,
            metrics,
            ..
        } = &*self.connections;
        let started = Instant::now();
        let _timer = metrics.db_query_duration.start_timer();
        // Requests that hash passwords have more time, but their individual statements do not.
        let until = deadline.at().min(started + REQUEST_TIMEOUT);
        let probe_at = started + PROBE_AFTER;
        let mut statement = pin!(statement);
        if let Ok(result) = timeout_at(until.min(probe_at), &mut statement).await {
            return Ok(result);
        }
        // A statement that starts with less time than that is late for other reasons.
        if probe_at <= until {
            health.start_probe("a statement is slow".into());
        }
        let interrupted = match health.while_up(until, &mut statement).await {
            Ok(result) => return Ok(result),
            Err(interrupted) => interrupted,
        };
        self.cancel_and_evict();
        match interrupted {
            Interrupted::Down => Err(DbError::ConnectionLost("the database went down".into())),
            Interrupted::TimedOut => timeout(CANCEL_TIMEOUT, statement).await.map_err(|_| {
                // If the network failed, connections opened at the same time may be dead as well.
                registry.evict_unresponsive_since(started);
                DbError::ConnectionLost("a statement timed out".into())
            }),
        }
    }

    fn handle_error(&self, error: Error) -> DbError {
        match error.code() {
            Some(&SqlState::T_R_SERIALIZATION_FAILURE) => {
                let reason = error_message(&error);
                self.connections.isolation.require_transactions(&reason);
            }
            Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => warn!(
                "the database does not know a prepared statement: is there a transaction pooler that does not support them (PgBouncer before 1.21)?"
            ),
            _ => {}
        }
        let (error, is_connection_usable) = DbError::classify(error);
        if !is_connection_usable {
            self.connection.evict();
        }
        error
    }

    /// Cancels the running statement. The connection is not reused: a cancel request that arrives
    /// late would cancel its next statement.
    fn cancel_and_evict(&self) {
        self.connection.evict();
        self.connections.endpoint.cancel(self.connection.client());
    }
}

impl Drop for Lease {
    /// Runs when the future waiting for the statement has been dropped.
    fn drop(&mut self) {
        if self.in_flight {
            self.cancel_and_evict();
        }
    }
}
