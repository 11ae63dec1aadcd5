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

use super::connections::Connections;
use super::deadline::Deadline;
use super::error::{DbError, Result, error_message};
use super::isolation;
use super::pool::PooledConnection;
use super::sockets::CONNECT_TIMEOUT;
use super::statements::Sql;

pub(super) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A statement that runs this long triggers a check that the database still responds.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// How long to wait for the server to confirm that it has canceled a statement.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

impl Connections {
    pub(super) async fn acquire(self: &Arc<Self>, deadline: Deadline) -> Result<Lease> {
        let pool_timeout = Instant::now() + CONNECT_TIMEOUT;
        let until = deadline.at().min(pool_timeout);
        if !self.health.is_up_after_startup(until).await {
            return Err(DbError::Unavailable("the database is down".into()));
        }
        // Observed on drop, so failed waits are counted as well.
        let _timer = self.metrics.db_acquire_duration.start_timer();
        let permit = self.acquire_permit(until).await?;
        match timeout_at(until, self.health.while_up(self.pool.get_owned())).await {
            Ok(Some(Ok(connection))) => Ok(Lease {
                connections: self.clone(),
                connection,
                _permit: permit,
                in_flight: false,
            }),
            Ok(None) => Err(DbError::Unavailable("the database went down".into())),
            // A request with less time left than the pool's timeout says nothing about the
            // database.
            Err(_) if until < pool_timeout => Err(DbError::Unavailable(
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
        let query = connection
            .client
            .query(&connection.statements[sql as usize], params);
        // On the heap, so that idle connections of clients keep no room for it.
        self.run_isolated(deadline, Box::pin(query)).await
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
            .client
            .execute(&connection.statements[sql as usize], params);
        self.run_isolated(deadline, Box::pin(query)).await
    }

    pub(super) async fn ping(&mut self, deadline: Deadline) -> Result<()> {
        let connection = self.connection.clone();
        self.run(deadline, connection.client.check_connection())
            .await
    }

    /// Opens a transaction. A lease that is dropped before `end` closes its connection.
    pub(super) async fn begin(&mut self, deadline: Deadline) -> Result<()> {
        self.batch_execute(deadline, isolation::BEGIN).await?;
        self.in_flight = true;
        Ok(())
    }

    pub(super) async fn end(mut self, deadline: Deadline, commits: bool) -> Result<()> {
        let text = if commits { "commit" } else { "rollback" };
        self.batch_execute(deadline, text).await?;
        self.in_flight = false;
        Ok(())
    }

    async fn batch_execute(&mut self, deadline: Deadline, text: &str) -> Result<()> {
        let connection = self.connection.clone();
        self.run(deadline, connection.client.batch_execute(text))
            .await
    }

    async fn run_isolated<T>(
        &mut self,
        deadline: Deadline,
        statement: impl Future<Output = Result<T, Error>>,
    ) -> Result<T> {
        let connection = self.connection.clone();
        let explicit = !self.in_flight && self.connections.isolation.is_explicit();
        let statement = isolation::read_committed(explicit, &connection.client, statement);
        self.run(deadline, statement).await
    }

    /// Sends a statement unless the deadline has passed. The future sends it when first polled.
    async fn run<T>(
        &mut self,
        deadline: Deadline,
        statement: impl Future<Output = Result<T, Error>>,
    ) -> Result<T> {
        if Instant::now() >= deadline.at() {
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
        let health = &self.connections.health;
        let started = Instant::now();
        let _timer = self.connections.metrics.db_query_duration.start_timer();
        let until = deadline.at().min(started + deadline.statement_timeout());
        let probe_at = started + PROBE_AFTER;
        let mut statement = pin!(statement);
        if let Ok(result) = timeout_at(until.min(probe_at), &mut statement).await {
            return Ok(result);
        }
        // A statement that starts with less time left is late for other reasons.
        if probe_at <= until {
            health.start_probe("a statement is slow".into());
        }
        let interrupted = match timeout_at(until, health.while_up(&mut statement)).await {
            Ok(Some(result)) => return Ok(result),
            interrupted => interrupted,
        };
        self.cancel_and_evict();
        if interrupted.is_ok() {
            return Err(DbError::ConnectionLost("the database went down".into()));
        }
        timeout(CANCEL_TIMEOUT, statement).await.map_err(|_| {
            // If the network failed, connections opened at the same time may be dead as well.
            health.sockets.evict_unresponsive_since(started);
            DbError::ConnectionLost("a statement timed out".into())
        })
    }

    fn handle_error(&self, error: Error) -> DbError {
        match error.code() {
            Some(&SqlState::T_R_SERIALIZATION_FAILURE) => {
                let reason = error_message(&error);
                self.connections.isolation.require_transactions(&reason);
            }
            Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => warn!(
                "the database does not know a prepared statement; a transaction pooler may not support prepared statements (PgBouncer before 1.21)"
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
        let endpoint = &self.connections.health.endpoint;
        endpoint.cancel(&self.connection.client);
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
