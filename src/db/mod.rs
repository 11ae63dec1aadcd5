//! The database: a small facade over a pool of connections.
//!
//! [`Queries`] runs a statement of `sql/` with the deadline of its request; the modules of the
//! tables are built on it. No two statements share a connection, because one would wait for the
//! commit of the other. Hot reads and writes are batched (`batch`, `task_writes`).
//!
//! Imports point one way: tables → task_writes → batch → retry → lease → connections → pool,
//! keyed_semaphore → health → sockets, inspect → url → connect → tls.

mod batch;
mod connect;
mod connections;
mod deadline;
mod error;
mod health;
mod inspect;
mod isolation;
pub(crate) mod keyed_semaphore;
mod lease;
mod list_watch;
pub(crate) mod lists;
pub(crate) mod mail;
mod migrations;
pub(crate) mod new_tasks;
mod pool;
pub(crate) mod purge;
mod retry;
pub(crate) mod sessions;
mod sockets;
mod statements;
pub(crate) mod task_changes;
mod task_writes;
pub(crate) mod tasks;
pub(crate) mod tls;
mod url;
pub(crate) mod users;

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::domain::{Rfc3339, User};
use crate::telemetry::metrics::Metrics;
use batch::{BatchQuery, Batcher};
pub(crate) use connect::Endpoint;
use connections::Connections;
pub(crate) use deadline::{
    AUTHENTICATION_TIMEOUT, Deadline, PASSWORD_REQUEST_TIMEOUT, REQUEST_TIMEOUT,
};
use error::Result;
pub(crate) use error::{DbError, error_message};
pub(crate) use inspect::ServerInfo;
use lease::{Lease, Params};
pub(crate) use list_watch::ListWatcher;
use list_watch::WatchedLists;
use lists::GetRevision;
use new_tasks::CreateTask;
use retry::Repeat;
use sockets::CONNECT_TIMEOUT;
use statements::Sql;
use task_changes::{DeleteTask, UpdateTask};
use tasks::{GetTask, ListNewest};

/// The database counts as ready without a round trip if it has responded within this time.
const READY_WITHIN: Duration = Duration::from_secs(5);

/// The database. Clones share the pool.
#[derive(Clone)]
pub(crate) struct Database {
    connections: Arc<Connections>,
    batchers: Arc<Batchers>,
    watched_lists: Arc<WatchedLists>,
}

/// The queues of the batched queries.
#[derive(Default)]
struct Batchers {
    get: Batcher<GetTask>,
    list_newest: Batcher<ListNewest>,
    revision: Batcher<GetRevision>,
    create: Batcher<Arc<CreateTask>>,
    update: Batcher<Arc<UpdateTask>>,
    delete: Batcher<Arc<DeleteTask>>,
}

impl Database {
    /// A database that is not connected yet; see `wait_until_ready`.
    pub(crate) fn new(endpoint: Endpoint, pool_size: u32, metrics: Arc<Metrics>) -> Self {
        Self {
            connections: Arc::new(Connections::new(endpoint, pool_size, metrics)),
            batchers: Arc::default(),
            watched_lists: Arc::default(),
        }
    }

    pub(crate) fn with_deadline(&self, deadline: Deadline) -> Queries<'_> {
        Queries {
            database: self,
            deadline,
        }
    }

    /// The address of the server and the name of the database, without a password.
    pub(crate) fn location(&self) -> &str {
        &self.connections.health.endpoint.location
    }

    /// Returns once the database accepts queries and the schema is current. Fails if waiting cannot
    /// help, or after `give_up_after`.
    pub(crate) async fn wait_until_ready(
        &self,
        give_up_after: Option<Duration>,
    ) -> Result<ServerInfo, String> {
        let info = self
            .connections
            .health
            .wait_until_ready(give_up_after)
            .await?;
        // Opens a connection before the first request needs one.
        let database = self.clone();
        tokio::spawn(async move { database.ping(REQUEST_TIMEOUT).await });
        Ok(info)
    }

    /// Whether the database responded when it was last used.
    pub(crate) fn is_up(&self) -> bool {
        self.connections.health.is_up()
    }

    /// Whether the database responds. Makes a round trip if the last response is not recent.
    pub(crate) async fn is_ready(&self) -> bool {
        let health = &self.connections.health;
        self.is_up()
            && (health.has_responded_within(READY_WITHIN)
                || self.ping(CONNECT_TIMEOUT).await.is_ok())
    }

    async fn ping(&self, timeout: Duration) -> Result<()> {
        let deadline = Deadline::after(timeout);
        self.connections
            .acquire(deadline)
            .await?
            .ping(deadline)
            .await
    }

    /// Whether the database is up and has responded within this time.
    pub(crate) fn has_responded_within(&self, time: Duration) -> bool {
        self.connections.health.has_responded_within(time)
    }

    /// How many connections the pool has, and how many of them are idle.
    pub(crate) fn connection_counts(&self) -> (u32, u32) {
        let state = self.connections.pool.state();
        (state.connections, state.idle_connections)
    }
}

/// The database with the deadline of one request.
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

    /// Runs a read. Retries it if its connection is lost.
    async fn read(self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>> {
        self.query(Repeat::Read, sql, params).await
    }

    /// Runs a query together with others of its kind.
    async fn batch<Q: BatchQuery>(self, batcher: &Batcher<Q>, query: Q) -> Result<Vec<Row>> {
        let connections = &self.database.connections;
        batcher.submit(connections, self.deadline, query).await
    }

    /// Runs a read that may scan all rows of this user. The number of concurrent searches is
    /// limited.
    async fn search(self, user_id: Uuid, sql: Sql, params: Params<'_>) -> Result<Vec<Row>> {
        let connections = &self.database.connections;
        let _permit = connections.acquire_search(user_id, self.deadline).await?;
        self.query(Repeat::Read, sql, params).await
    }

    /// Runs a write. Does not retry it if its connection is lost.
    async fn write(self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>> {
        self.query(Repeat::Never, sql, params).await
    }

    /// Runs a write that inserts rows under ids that the caller chose. Retries it if its connection
    /// is lost; the retry finds the rows if the first attempt inserted them.
    async fn insert(self, sql: Sql, params: Params<'_>) -> Result<Vec<Row>> {
        self.query(Repeat::Insert(None), sql, params).await
    }

    /// Like `write`, but returns how many rows the statement changed.
    async fn execute(self, sql: Sql, params: Params<'_>) -> Result<u64> {
        let execute =
            |mut lease: Lease| async move { lease.execute(self.deadline, sql, params).await };
        self.run(Repeat::Never, execute).await
    }

    async fn query(self, repeat: Repeat, sql: Sql, params: Params<'_>) -> Result<Vec<Row>> {
        let query = |mut lease: Lease| async move { lease.query(self.deadline, sql, params).await };
        self.run(repeat, query).await
    }

    async fn run<T, F: Future<Output = Result<T>>>(
        self,
        repeat: Repeat,
        statements: impl Fn(Lease) -> F,
    ) -> Result<T> {
        let Self { database, deadline } = self;
        let connections = &database.connections;
        let attempt = || async { statements(connections.acquire(deadline).await?).await };
        // On the heap, so that idle connections of clients keep no room for it.
        Box::pin(connections.retry(deadline, repeat, attempt)).await
    }
}

/// Reads an account from a row.
fn user(row: &Row) -> User {
    User {
        id: row.get("id"),
        email: row.get("email"),
        email_verified: row.get("email_verified"),
        created_at: Rfc3339(row.get("created_at")),
        updated_at: Rfc3339(row.get("updated_at")),
    }
}
