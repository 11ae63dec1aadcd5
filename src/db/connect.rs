//! Connects to the server, and distinguishes transient failures from permanent ones.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Connection, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::{error_message, is_connection_error};
use super::tls::{self, Verification};

type Stream = <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream;

/// Applies to each step of the first contact with a server: connecting, or running a query.
const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long delivering a cancel request may take.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// A server and how to connect to it.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(super) config: tokio_postgres::Config,
    pub(super) tls: MakeRustlsConnect,
    /// The server address and database name without a password, or the data directory.
    pub(crate) location: String,
    /// The `sslmode` of `DATABASE_URL`. `None` for the embedded PostgreSQL, which has no pooler in
    /// front of it.
    pub(crate) sslmode: Option<&'static str>,
}

/// Why the first contact with a database failed, as one line for the operator.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// Another attempt may succeed.
    Transient(String),
    /// Another attempt will not succeed.
    Fatal(String),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Transient(reason) | Self::Fatal(reason)) = self;
        f.write_str(reason)
    }
}

impl From<tokio_postgres::Error> for ConnectError {
    fn from(error: tokio_postgres::Error) -> Self {
        let message = error_message(&error);
        match is_fatal(&error) {
            true => Self::Fatal(format!("the database rejects the connection: {message}")),
            false => Self::Transient(message),
        }
    }
}

/// Returns whether retrying is pointless: a wrong password, a missing database, an untrusted
/// certificate, or a schema that cannot be created.
fn is_fatal(error: &tokio_postgres::Error) -> bool {
    if let Some(code) = error.code() {
        // Proxies report their own failures as XX000.
        return !is_connection_error(error) && *code != SqlState::INTERNAL_ERROR;
    }
    let text = error.to_string();
    // tokio-postgres exposes these kinds of error only in their text.
    let is_handshake = text.starts_with("error performing TLS handshake");
    let is_cut_off = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|error| error.kind() != io::ErrorKind::InvalidData);
    // If the server requires a password and the URL has none, the error is "invalid configuration".
    let authentication = ["authentication error", "invalid configuration"];
    (is_handshake && !is_cut_off) || authentication.iter().any(|kind| text.starts_with(kind))
}

impl Endpoint {
    pub(crate) fn embedded(
        config: tokio_postgres::Config,
        data_dir: &Path,
    ) -> Result<Self, String> {
        Ok(Self {
            config,
            tls: tls::connector(Verification::None, None)?,
            location: data_dir.display().to_string(),
            sslmode: None,
        })
    }

    /// Opens a connection. The caller must poll the returned connection.
    pub(super) async fn connect(
        &self,
    ) -> Result<(Client, Connection<Socket, Stream>), tokio_postgres::Error> {
        self.config.connect(self.tls.clone()).await
    }

    /// Opens a connection outside the pool. It is closed when the client is dropped.
    async fn connect_unpooled(&self) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = self.connect().await?;
        // Errors are reported to the client's statements.
        tokio::spawn(async move { connection.await.ok() });
        Ok(client)
    }

    /// Like `connect_unpooled`, but with a timeout, for the first contact.
    pub(super) async fn contact(&self) -> Result<Client, ConnectError> {
        with_timeout(self.connect_unpooled()).await
    }

    /// Opens a connection and makes one round trip.
    pub(super) async fn ping(&self) -> Result<(), tokio_postgres::Error> {
        self.connect_unpooled().await?.check_connection().await
    }

    /// Asks the server to cancel the statement of this connection, without waiting for the result.
    pub(super) fn cancel(&self, client: &Client) {
        let (token, tls) = (client.cancel_token(), self.tls.clone());
        tokio::spawn(timeout(CANCEL_TIMEOUT, async move {
            token.cancel_query(tls).await
        }));
    }
}

/// Applies the timeout for one step of the first contact.
pub(super) async fn with_timeout<T, E: Into<ConnectError>>(
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, ConnectError> {
    match timeout(CONTACT_TIMEOUT, step).await {
        Ok(result) => result.map_err(E::into),
        Err(_) => Err(ConnectError::Transient("no response within 5 s".into())),
    }
}
