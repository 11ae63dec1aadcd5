//! The first contact with a database: checks that the service can use it, and migrates it.

use std::pin::pin;
use std::time::Duration;

use jiff::Timestamp;
use log::info;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::connect::{ConnectError, Endpoint, with_timeout};
use super::migrations;

/// PostgreSQL 13, in the form of `server_version_num`.
const MIN_SERVER_VERSION: i32 = 130_000;
/// How often a long migration, or the wait for another instance's, is logged.
const MIGRATION_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// After a migration could not lock a table. Queries that queued behind it run meanwhile.
const TABLE_LOCK_BACKOFF: Duration = Duration::from_secs(2);

/// What is known about a database server.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// The server's version as text.
    pub version: String,
    /// Whether the connection to the server, or to a pooler in front of it, is encrypted.
    pub tls: bool,
    /// How many migrations the database lacks.
    pub migrations_due: usize,
    /// How many migrations were applied during this contact.
    pub migrations_applied: usize,
    /// Whether searches ignore the case of letters beyond ASCII; true until the schema exists.
    pub search_ignores_case: bool,
    /// Seconds by which the server's clock is ahead.
    pub clock_difference: f64,
    /// Whether connections go through a transaction pooler.
    pub pooler: Pooler,
}

/// What is between the service and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooler {
    /// Nothing that changes the backend between transactions.
    None,
    /// A transaction pooler that supports prepared statements.
    Transaction,
}

impl Endpoint {
    /// Inspects the database and applies the migrations that are due.
    pub(crate) async fn connect_and_migrate(&self) -> Result<ServerInfo, ConnectError> {
        let info = async {
            let client = self.contact().await?;
            let mut info = inspect_server(self, &client).await?;
            if info.migrations_due > 0 {
                info.migrations_applied = migrate(&client).await?;
                info.migrations_due = 0;
                info.search_ignores_case = search_ignores_case(&client).await?;
            }
            Ok(info)
        };
        info.await
            .map_err(|error: ConnectError| error.with_subject(&self.subject))
    }

    /// Inspects the database and changes nothing.
    pub(crate) async fn inspect(&self) -> Result<ServerInfo, ConnectError> {
        let info = async { inspect_server(self, &self.contact().await?).await };
        info.await
            .map_err(|error| error.with_subject(&self.subject))
    }
}

async fn inspect_server(endpoint: &Endpoint, client: &Client) -> Result<ServerInfo, ConnectError> {
    const SQL: &str = "select current_setting('server_version_num')::integer as version_number,
            current_setting('server_version') as version,
            coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false) as tls,
            extract(epoch from clock_timestamp())::float8 as now,
            current_setting('server_encoding') as encoding";
    let sent_at = Timestamp::now();
    let row = with_timeout(client.query_typed_one(SQL, &[])).await?;
    let received_at = Timestamp::now();
    let version: String = row.get("version");
    if row.get::<_, i32>("version_number") < MIN_SERVER_VERSION {
        return Err(ConnectError::fatal(format!(
            "the database is PostgreSQL {version}; 13 or later is required"
        )));
    }
    let encoding: String = row.get("encoding");
    if encoding != "UTF8" {
        return Err(ConnectError::fatal(format!(
            "the database has the encoding {encoding}; UTF8 is required"
        )));
    }
    let migrations_due = with_timeout(migrations::due(client)).await?;
    // The server read its clock about halfway between the two.
    let now = (sent_at.as_microsecond() + received_at.as_microsecond()) as f64 / 2e6;
    Ok(ServerInfo {
        version,
        tls: row.get("tls"),
        clock_difference: row.get::<_, f64>("now") - now,
        migrations_due,
        migrations_applied: 0,
        search_ignores_case: migrations_due > 0 || search_ignores_case(client).await?,
        pooler: match endpoint.is_embedded {
            true => Pooler::None,
            false => detect_pooler(endpoint, client).await?,
        },
    })
}

/// Detects a transaction pooler, which gives the backend that one connection has just used to the
/// next connection. Behind one, a statement prepared on one backend has to work on another.
async fn detect_pooler(endpoint: &Endpoint, first: &Client) -> Result<Pooler, ConnectError> {
    const SQL: &str = "select pg_backend_pid() as pid";
    let second = endpoint.contact().await?;
    let detected = async {
        let prepared = first.prepare(SQL).await?;
        let before: i32 = first.query_one(&prepared, &[]).await?.get("pid");
        second.batch_execute("begin").await?;
        let used: i32 = second.query_typed_one(SQL, &[]).await?.get("pid");
        if used != before {
            return Ok(Pooler::None);
        }
        first.query_one(&prepared, &[]).await?;
        Ok(Pooler::Transaction)
    };
    let detected = async {
        detected
            .await
            .map_err(|error| match is_prepared_statement_lost(&error) {
                true => ConnectError::fatal(
                    "the address leads to a transaction pooler that does not support prepared \
                 statements (PgBouncer before 1.21): use the direct address, session mode, or a \
                 newer pooler",
                ),
                false => error.into(),
            })
    };
    with_timeout(detected).await
}

fn is_prepared_statement_lost(error: &tokio_postgres::Error) -> bool {
    let code = error.code();
    code == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
        || code == Some(&SqlState::DUPLICATE_PSTATEMENT)
}

/// Applies the migrations that are due, without a timeout; TCP detects a server that vanishes.
async fn migrate(client: &Client) -> Result<usize, ConnectError> {
    let started = Instant::now();
    let mut migrations = pin!(migrations::apply(client));
    let applied = loop {
        match timeout(MIGRATION_LOG_INTERVAL, migrations.as_mut()).await {
            Ok(applied) => break applied,
            Err(_) => info!(
                "migrating the schema, or waiting for another instance to do so: {} s so far",
                started.elapsed().as_secs()
            ),
        }
    };
    match applied {
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            sleep(TABLE_LOCK_BACKOFF).await;
            Err(ConnectError::Transient(
                "a migration needs a table that another transaction has locked".into(),
            ))
        }
        applied => Ok(applied?),
    }
}

async fn search_ignores_case(client: &Client) -> Result<bool, ConnectError> {
    let query = client.query_typed_one("select fold_case('äбσς') = 'ÄБΣΣ' as works", &[]);
    Ok(with_timeout(query).await?.get("works"))
}
