//! The `serve` command: opens sockets and the database, serves until a signal arrives, and shuts
//! down.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use listenfd::ListenFd;
use log::{error, info, warn};
use sd_notify::NotifyState;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::db::{Database, Endpoint, ServerInfo};
use crate::embedded_postgres::{self, Postgres};
use crate::http::handlers::meta;
use crate::http::server;
use crate::http::state::AppState;
use crate::shutdown::ShutdownSignals;
use crate::telemetry::logging::logfmt_value;
use crate::telemetry::metrics::Metrics;

/// The error of a command: one line for the operator.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

pub(crate) const CASE_SENSITIVE: &str = "search is case-sensitive beyond ASCII: this server has neither ICU nor \
    a UTF-8 locale whose rules the function fold_case could use";

/// How long to wait for the database before logging the addresses, which should come last.
const QUICK_START: Duration = Duration::from_secs(1);

/// Serves the API until a signal arrives or the database turns out to be unusable.
pub(crate) async fn serve(config: Config) -> Result<(), BoxError> {
    let listeners = listen(config.listen_addr).await?;
    let addresses = listeners.iter().map(TcpListener::local_addr);
    let addresses: Vec<SocketAddr> = addresses.collect::<io::Result<_>>()?;
    let metrics_listener = match config.metrics_addr {
        Some(address) => Some(bind("METRICS_ADDR", address).await?),
        None => None,
    };
    let stop = CancellationToken::new();
    let mut shutdown = ShutdownSignals::listen()?;
    let metrics = Metrics::new();
    meta::declare_responses(&metrics)?;
    // Creating or recovering an embedded PostgreSQL takes a while. Dropping the future stops it.
    let opened = tokio::select! {
        opened = open(&config, metrics.clone()) => opened?,
        () = shutdown.recv() => return Ok(()),
    };
    let app = AppState::new(config, &opened.secret, opened.database.clone(), metrics)?;
    let mut serving = tokio::spawn(server::serve(listeners, app.clone(), stop.clone()));
    if let Some(listener) = metrics_listener {
        info!("metrics at http://{}/metrics", listener.local_addr()?);
        tokio::spawn(server::serve_metrics(listener, app.clone()));
    }
    notify(NotifyState::Ready);
    let watchdog = tokio::spawn(watchdog(app.clone()));

    let result = tokio::select! {
        error = wait_for_database(&opened, &addresses) => Err(error),
        ended = &mut serving => Err(format!("the server ended unexpectedly: {ended:?}").into()),
        () = shutdown.recv() => Ok(()),
    };
    notify(NotifyState::Stopping);
    watchdog.abort();
    stop.cancel();
    let deadline = Instant::now() + server::SHUTDOWN_TIMEOUT;
    if !serving.is_finished()
        && let Err(error) = serving.await
    {
        error!("the server failed during shutdown: {error}");
    }
    if let Some(mailer) = &app.mail {
        mailer.drain(deadline).await;
    }
    app.limited_log.end_window();
    if let Some(postgres) = opened.postgres {
        postgres.stop().await;
    }
    if result.is_ok() {
        info!("stopped");
    }
    result
}

struct OpenDatabase {
    database: Database,
    postgres: Option<Postgres>,
    secret: SecretString,
    /// Where the data is, for the log.
    location: String,
}

/// Starts the embedded PostgreSQL, or prepares to connect to the server that the settings name.
async fn open(config: &Config, metrics: Arc<Metrics>) -> Result<OpenDatabase, BoxError> {
    let (endpoint, location, postgres) = match &config.server {
        Some(server) => {
            let sslmode = server.sslmode.unwrap_or_default();
            let location = format!("{} (sslmode {sslmode})", server.location);
            (server.clone(), location, None)
        }
        None => {
            let postgres = Postgres::start(&config.data_dir).await?;
            let (data_dir, version) = (postgres.data_dir(), postgres.version());
            let location = format!("{} (embedded PostgreSQL {version})", data_dir.display());
            let endpoint = Endpoint::embedded(postgres.config(), data_dir)?;
            (endpoint, location, Some(postgres))
        }
    };
    let secret = match (&config.jwt_secret, &postgres) {
        (Some(secret), _) => secret.clone(),
        (None, Some(postgres)) => embedded_postgres::jwt_secret(postgres.data_dir())?.into(),
        (None, None) => return Err("JWT_SECRET is required with DATABASE_URL".into()),
    };
    Ok(OpenDatabase {
        database: Database::new(endpoint, config.db_pool_size, metrics),
        postgres,
        secret,
        location,
    })
}

/// Waits until the database is ready, and logs the addresses and the location of the data. Returns
/// only if the database can never be used.
async fn wait_for_database(opened: &OpenDatabase, addresses: &[SocketAddr]) -> BoxError {
    let mut ready = pin!(opened.database.wait_until_ready(None));
    let in_time = timeout(QUICK_START, ready.as_mut()).await;
    match &in_time {
        Ok(Ok(server)) => log_server_info(server),
        Ok(Err(error)) => return error.clone().into(),
        Err(_) => {}
    }
    for address in addresses {
        info!("listening on http://{address}");
        info!("documentation at http://{address}/docs");
    }
    info!("data in {}", opened.location);
    if in_time.is_err() {
        match ready.await {
            Ok(server) => log_server_info(&server),
            Err(error) => return error.into(),
        }
    }
    std::future::pending().await
}

fn log_server_info(server: &ServerInfo) {
    info!(
        "database ready postgres_version={} migrations_applied={}",
        logfmt_value(&server.version),
        server.migrations_applied
    );
    if !server.search_ignores_case {
        warn!("{CASE_SENSITIVE}");
    }
}

/// The sockets that systemd passed, or else a new one.
async fn listen(address: SocketAddr) -> Result<Vec<TcpListener>, BoxError> {
    let mut passed = ListenFd::from_env();
    let mut listeners = Vec::new();
    // Taking a socket sets close-on-exec, so that PostgreSQL does not inherit it.
    while let Some(listener) = passed
        .take_tcp_listener(listeners.len())
        .map_err(|error| format!("cannot use a socket that systemd passed: {error}"))?
    {
        listener.set_nonblocking(true)?;
        listeners.push(TcpListener::from_std(listener)?);
    }
    if listeners.is_empty() {
        listeners.push(bind("LISTEN_ADDR", address).await?);
    }
    Ok(listeners)
}

async fn bind(variable: &str, address: SocketAddr) -> Result<TcpListener, BoxError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| format!("cannot listen on {address} ({variable}): {error}").into())
}

/// Notifies systemd, if it runs the service.
fn notify(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!("cannot notify systemd: {error}");
    }
}

/// Reports to systemd's watchdog as long as the service responds to its own requests.
async fn watchdog(app: Arc<AppState>) {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    loop {
        match timeout(period / 4, server::check_health(&app)).await {
            Ok(Ok(())) => notify(NotifyState::Watchdog),
            Ok(Err(error)) => error!("health check failed: {error}"),
            Err(_) => error!("health check timed out"),
        }
        sleep(period / 4).await;
    }
}
