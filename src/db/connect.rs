//! First contact with a database: is it one that we can work with, and what is it like?

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bb8::ManageConnection as _;
use bb8_postgres::PostgresConnectionManager;
use jiff::Timestamp;
use log::info;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Connection, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls::{self, Verification};
use super::url::DatabaseUrl;
use super::{error_message, is_connection_error, migrations};

type Stream = <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream;

/// PostgreSQL 13, as `server_version_num` has it: the oldest that its makers kept up when this was
/// written.
const MIN_SERVER_VERSION: i32 = 130_000;
/// Connecting, and what one asks at the door.
const CONTACT_BOUND: Duration = Duration::from_secs(5);
/// How often a long migration, or the wait for another instance's, leaves a line in the log.
const MIGRATION_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// After a migration could not lock a table, queries that queued behind it get this long.
const TABLE_LOCK_BACKOFF: Duration = Duration::from_secs(2);

/// Where the database is and how to speak to it.
#[derive(Clone)]
pub struct Endpoint {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
    place: String,
    /// The beginning of an error: the variable to mend and the address.
    subject: String,
    /// Whether somebody's pooler may stand in between.
    direct: bool,
}

/// What a database is like.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// Its version, as it prints it.
    pub version: String,
    /// Whether the connection to it, or to the pooler before it, is encrypted.
    pub tls: bool,
    /// How many migrations were applied, or are due.
    pub migrations: usize,
    /// Whether searches ignore the case of letters beyond ASCII, as far as is known.
    pub search_ignores_case: bool,
    /// Seconds by which its clock is ahead of ours.
    pub clock_difference: f64,
    /// Whether a transaction pooler stands in between.
    pub pooler: Pooler,
}

/// What stands between us and the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooler {
    /// Nothing that changes backends between transactions.
    None,
    /// A transaction pooler that knows prepared statements.
    Transaction,
}

/// Why we cannot work with this database, however long we wait: one line for the operator.
#[derive(Debug)]
pub struct FatalError(pub(super) String);

impl fmt::Display for FatalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FatalError {}

/// What stood in the way of a first contact.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// It may pass.
    Transient(String),
    /// It will not.
    Fatal(FatalError),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transient(reason) => f.write_str(reason),
            Self::Fatal(refusal) => refusal.fmt(f),
        }
    }
}

impl ConnectError {
    fn from(error: tokio_postgres::Error) -> Self {
        let text = error_message(&error);
        if is_final(&error) {
            Self::Fatal(FatalError(format!("the database refuses us: {text}")))
        } else {
            Self::Transient(text)
        }
    }

    fn refused(reason: impl Into<String>) -> Self {
        Self::Fatal(FatalError(reason.into()))
    }

    fn about(self, subject: &str) -> Self {
        match self {
            Self::Fatal(FatalError(reason)) => Self::refused(format!("{subject}: {reason}")),
            away => away,
        }
    }
}

/// Whether waiting mends this: a wrong password, a missing database, a certificate that is not
/// trusted, a schema that cannot be made are there to stay.
fn is_final(error: &tokio_postgres::Error) -> bool {
    if let Some(code) = error.code() {
        // XX000 is what a proxy in between says that has troubles of its own.
        return !is_connection_error(error) && *code != SqlState::INTERNAL_ERROR;
    }
    let text = error.to_string();
    // tokio-postgres tells these kinds apart by their text alone.
    let handshake = text.starts_with("error performing TLS handshake");
    let cut_off = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|error| error.kind() != io::ErrorKind::InvalidData);
    // "Invalid configuration" is what a server that asks for a password meets where the URL has none.
    let unauthenticated = ["authentication error", "invalid configuration"];
    (handshake && !cut_off) || unauthenticated.iter().any(|kind| text.starts_with(kind))
}

impl Endpoint {
    /// A server that `DATABASE_URL` names.
    pub fn server(url: &DatabaseUrl) -> Result<Self, String> {
        Ok(Self {
            config: url.config().clone(),
            tls: url.tls()?,
            place: url.display(),
            subject: format!("DATABASE_URL ({})", url.display()),
            direct: false,
        })
    }

    /// The service's own server, whose data is at `place`.
    pub fn private(config: tokio_postgres::Config, place: &Path) -> Result<Self, String> {
        Ok(Self {
            config,
            tls: tls::connector(Verification::None, None)?,
            place: place.display().to_string(),
            subject: format!("the private PostgreSQL in {}", place.display()),
            direct: true,
        })
    }

    /// Where it is, without a password.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub(super) async fn connect(
        &self,
    ) -> Result<(Client, Connection<Socket, Stream>), tokio_postgres::Error> {
        self.config.connect(self.tls.clone()).await
    }

    /// A connection of its own and one round trip on it.
    pub(super) async fn ping(&self) -> Result<(), tokio_postgres::Error> {
        let manager = self.unpooled();
        let mut client = manager.connect().await?;
        manager.is_valid(&mut client).await
    }

    /// Asks the server to stop what it does on this connection; nobody waits for it.
    pub(super) fn cancel(&self, client: &Client) {
        let (token, tls) = (client.cancel_token(), self.tls.clone());
        tokio::spawn(timeout(Duration::from_secs(1), async move {
            token.cancel_query(tls).await
        }));
    }

    /// Connections outside of the pool, one at a time, closed when dropped.
    fn unpooled(&self) -> PostgresConnectionManager<MakeRustlsConnect> {
        PostgresConnectionManager::new(self.config.clone(), self.tls.clone())
    }

    /// A connection outside of the pool.
    async fn connect_unpooled(&self) -> Result<Client, ConnectError> {
        with_timeout(CONTACT_BOUND, self.unpooled().connect()).await
    }

    /// Looks at the database and applies the migrations that are due.
    pub(crate) async fn connect_and_migrate(&self) -> Result<ServerInfo, ConnectError> {
        let found = async {
            let client = self.connect_unpooled().await?;
            let mut found = self.inspect_server(&client).await?;
            if found.migrations > 0 {
                found.migrations = migrate(&client).await?;
                found.search_ignores_case = search_ignores_case(&client).await?;
            }
            Ok(found)
        };
        found
            .await
            .map_err(|trouble: ConnectError| trouble.about(&self.subject))
    }

    /// Looks at the database and changes nothing.
    pub(crate) async fn inspect(&self) -> Result<ServerInfo, ConnectError> {
        let found = async { self.inspect_server(&self.connect_unpooled().await?).await };
        found.await.map_err(|trouble| trouble.about(&self.subject))
    }

    async fn inspect_server(&self, client: &Client) -> Result<ServerInfo, ConnectError> {
        const QUESTION: &str = "select current_setting('server_version_num')::integer,
                current_setting('server_version'),
                coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false),
                extract(epoch from clock_timestamp())::float8,
                current_setting('server_encoding')";
        let asked = Timestamp::now();
        let row = with_timeout(CONTACT_BOUND, client.query_typed_one(QUESTION, &[])).await?;
        let answered = Timestamp::now();
        let (number, version, encoding): (i32, String, String) =
            (row.get(0), row.get(1), row.get(4));
        if number < MIN_SERVER_VERSION {
            return Err(ConnectError::refused(format!(
                "the database is PostgreSQL {version}; 13 or later is needed"
            )));
        }
        if encoding != "UTF8" {
            return Err(ConnectError::refused(format!(
                "the database has the encoding {encoding}; UTF8 is needed"
            )));
        }
        let migrations = with_timeout(CONTACT_BOUND, migrations::due(client)).await?;
        // Theirs was read half-way.
        let ours = (asked.as_microsecond() + answered.as_microsecond()) as f64 / 2e6;
        Ok(ServerInfo {
            version,
            tls: row.get(2),
            clock_difference: row.get::<_, f64>(3) - ours,
            migrations,
            search_ignores_case: migrations > 0 || search_ignores_case(client).await?,
            pooler: if self.direct {
                Pooler::None
            } else {
                self.pooler(client).await?
            },
        })
    }

    /// A connection keeps its backend, unless a transaction pooler stands in between: that hands
    /// the backend which one connection has just used to the next. If so, a statement prepared on
    /// one backend has to work on another.
    async fn pooler(&self, first: &Client) -> Result<Pooler, ConnectError> {
        let second = self.connect_unpooled().await?;
        let question = "select pg_backend_pid()";
        let compared = async {
            let prepared = first.prepare(question).await?;
            let before: i32 = first.query_one(&prepared, &[]).await?.get(0);
            second.batch_execute("begin").await?;
            let taken: i32 = second.query_typed_one(question, &[]).await?.get(0);
            if taken != before {
                return Ok(Pooler::None);
            }
            first.query_one(&prepared, &[]).await?;
            Ok(Pooler::Transaction)
        };
        match timeout(CONTACT_BOUND, compared).await {
            Ok(Err(error)) if lost_prepared_statement(&error) => Err(ConnectError::refused(
                "the address leads through a transaction pooler that does not know prepared statements \
                 (PgBouncer before 1.21): use the direct address, session mode, or a newer pooler",
            )),
            Ok(result) => result.map_err(ConnectError::from),
            Err(_) => Err(ConnectError::Transient("no answer with_timeout 5 s".into())),
        }
    }
}

/// Applies the migrations that are due, for as long as that takes: should the server vanish, TCP
/// notices.
async fn migrate(client: &Client) -> Result<usize, ConnectError> {
    let started = Instant::now();
    let mut applied = pin!(migrations::apply(client));
    let applied = loop {
        match timeout(MIGRATION_LOG_INTERVAL, applied.as_mut()).await {
            Ok(applied) => break applied,
            Err(_) => info!(
                "migrating the schema, or waiting for another instance that does: {} s so far",
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
        applied => applied.map_err(ConnectError::from),
    }
}

async fn search_ignores_case(client: &Client) -> Result<bool, ConnectError> {
    let row = client.query_typed_one("select fold_case('äбσς') = 'ÄБΣΣ'", &[]);
    Ok(with_timeout(CONTACT_BOUND, row).await?.get(0))
}

fn lost_prepared_statement(error: &tokio_postgres::Error) -> bool {
    let code = error.code();
    code == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
        || code == Some(&SqlState::DUPLICATE_PSTATEMENT)
}

async fn with_timeout<T>(
    bound: Duration,
    future: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, ConnectError> {
    match timeout(bound, future).await {
        Ok(result) => result.map_err(ConnectError::from),
        Err(_) => Err(ConnectError::Transient(format!(
            "no answer with_timeout {} s",
            bound.as_secs()
        ))),
    }
}
