//! The first contact with a database: checks that the service can use it, and migrates it.

use std::pin::pin;
use std::time::Duration;

use futures_util::TryFutureExt;
use jiff::Timestamp;
use log::info;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::connect::{ConnectError, Endpoint, with_timeout};
use super::migrations;

/// PostgreSQL 13, in the form of `server_version_num`.
const MIN_SERVER_VERSION: i32 = 130_000;
/// The interval of log messages during a long migration, or while another instance migrates.
const MIGRATION_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The pause after a migration could not lock a table. Meanwhile, the queries that queued behind it
/// run.
const TABLE_LOCK_BACKOFF: Duration = Duration::from_secs(2);

/// Information about a database server.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ServerInfo {
    pub(crate) version: String,
    /// Whether the connection to the server, or to a pooler in front of it, is encrypted.
    pub(crate) tls: bool,
    pub(crate) migrations_due: usize,
    /// How many migrations were applied during this contact.
    #[serde(skip)]
    pub(crate) migrations_applied: usize,
    /// Whether searches ignore the case of letters beyond ASCII; true until the schema exists.
    pub(crate) search_ignores_case: bool,
    /// Seconds by which the server's clock is ahead of this machine's.
    pub(crate) clock_difference: f64,
    /// Whether connections go through a transaction pooler that supports prepared statements.
    pub(crate) has_pooler: bool,
}

impl Endpoint {
    /// Inspects the database and, if `migrates`, applies the migrations that are due.
    pub(crate) async fn inspect(&self, migrates: bool) -> Result<ServerInfo, ConnectError> {
        let info = async {
            let mut client = self.contact().await?;
            let mut info = inspect_server(self, &client).await?;
            if migrates && info.migrations_due > 0 {
                info.migrations_applied = migrate(&mut client).await?;
                info.migrations_due = 0;
            }
            if info.migrations_due == 0 {
                const SQL: &str = "select fold_case('äбσς') = 'ÄБΣΣ' as works";
                let row = with_timeout(client.query_typed_one(SQL, &[])).await?;
                info.search_ignores_case = row.get("works");
            }
            Ok(info)
        };
        let subject = match self.sslmode {
            Some(_) => format!("DATABASE_URL ({})", self.location),
            None => format!("the embedded PostgreSQL in {}", self.location),
        };
        info.await.map_err(|error| match error {
            ConnectError::Fatal(reason) => ConnectError::Fatal(format!("{subject}: {reason}")),
            transient => transient,
        })
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
        return Err(ConnectError::Fatal(format!(
            "the database is PostgreSQL {version}; 13 or later is required"
        )));
    }
    let encoding: String = row.get("encoding");
    if encoding != "UTF8" {
        return Err(ConnectError::Fatal(format!(
            "the database has the encoding {encoding}; UTF8 is required"
        )));
    }
    let migrations_due = with_timeout(migrations::due(client)).await?;
    // Assumes that the server read its clock halfway between sending and receiving.
    let now = (sent_at.as_microsecond() + received_at.as_microsecond()) as f64 / 2e6;
    Ok(ServerInfo {
        version,
        tls: row.get("tls"),
        clock_difference: row.get::<_, f64>("now") - now,
        migrations_due,
        migrations_applied: 0,
        search_ignores_case: true,
        has_pooler: endpoint.sslmode.is_some() && detect_pooler(endpoint, client).await?,
    })
}

/// Detects a transaction pooler, which gives the backend that one connection has just used to the
/// next connection. Behind a pooler, a statement that was prepared on one backend must work on
/// another.
async fn detect_pooler(endpoint: &Endpoint, first: &Client) -> Result<bool, ConnectError> {
    const SQL: &str = "select pg_backend_pid() as pid";
    let second = endpoint.contact().await?;
    let detected = async {
        let prepared = first.prepare(SQL).await?;
        let before: i32 = first.query_one(&prepared, &[]).await?.get("pid");
        second.batch_execute("begin").await?;
        let used: i32 = second.query_typed_one(SQL, &[]).await?.get("pid");
        if used == before {
            first.query_one(&prepared, &[]).await?;
        }
        Ok(used == before)
    };
    with_timeout(detected.map_err(|error: tokio_postgres::Error| {
        match error.code() {
            Some(&SqlState::INVALID_SQL_STATEMENT_NAME | &SqlState::DUPLICATE_PSTATEMENT) => {
                ConnectError::Fatal(
                    "the address leads to a transaction pooler that does not support prepared \
                 statements (PgBouncer before 1.21): use the direct address, session mode, or a \
                 newer pooler"
                        .into(),
                )
            }
            _ => error.into(),
        }
    }))
    .await
}

/// Applies the migrations that are due, without a timeout; TCP detects a server that vanishes.
async fn migrate(client: &mut Client) -> Result<usize, ConnectError> {
    let started = Instant::now();
    let mut migrations = pin!(migrations::apply(client));
    let applied = loop {
        match timeout(MIGRATION_LOG_INTERVAL, migrations.as_mut()).await {
            Ok(applied) => break applied,
            Err(_) => info!(
                "still migrating the schema, or waiting for another instance to do so, after {} s",
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
