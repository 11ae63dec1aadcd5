//! What the binary can be told to do.

use std::io::{self, BufRead, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use listenfd::ListenFd;
use log::{error, info, warn};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::auth::password;
use crate::config::{Config, DatabaseSource, Secret, TokenLifetimes};
use crate::db::users::{self, LockoutKey};
use crate::db::{Database, Deadline, Endpoint, Pooler, REQUEST_TIMEOUT, ServerInfo};
use crate::domain::Email;
use crate::embedded_postgres;
use crate::http::handlers::meta;
use crate::http::server;
use crate::http::state::AppState;
use crate::shutdown::ShutdownSignals;
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;

/// A command of the binary.
#[derive(Debug)]
pub enum Command {
    /// Serve the API.
    Serve,
    /// Apply the migrations that are due, and end.
    Migrate,
    /// Show the settings and look at the database.
    Check,
    /// Give an account a new password and end its sessions.
    SetPassword(String),
    /// Print the help.
    Help,
    /// Print the version.
    Version,
}

/// A command waits this long for a database that is not there; a migration may take longer.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

const CASE_SENSITIVE: &str = "search is case-sensitive beyond ASCII: this server has neither ICU nor a UTF-8 locale \
    whose rules the function fold_case could use";

/// One line for the operator.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

const HELP: &str = "\
todo-api: a multi-user todo back end over HTTP and PostgreSQL

usage: todo-api [COMMAND]

  serve                serve the API (the default)
  migrate              apply the migrations that are due
  check                show the settings, reach the database, say what it found
  set-password EMAIL   give an account a new password and end its sessions
  --help, --version

environment (each of the first three also as NAME_FILE or a systemd credential):
  DATABASE_URL            postgres://…; without it, a private PostgreSQL in DATA_DIR
  JWT_SECRET              32 bytes or more; required with DATABASE_URL
  JWT_SECRET_PREVIOUS     the secret before, still verified
  DATA_DIR                .todo-api
  PGSSLROOTCERT           a private CA for DATABASE_URL
  LISTEN_ADDR             127.0.0.1:8000
  METRICS_ADDR            off
  CORS_ORIGINS            none; comma separated, like https://app.example.com
  TRUSTED_PROXIES         none; comma separated addresses or CIDR blocks
  DB_POOL_SIZE            20; 1 to 20
  REGISTRATION            open; or closed
  AUTH_RATE_PER_MINUTE    300 from one address; 0 is off
  BCRYPT_COST             12; 10 to 16
  ACCESS_TOKEN_TTL        86400 seconds
  REFRESH_TOKEN_IDLE_TTL  2592000 seconds
  REFRESH_TOKEN_MAX_TTL   7776000 seconds
  REFRESH_TOKEN_GRACE           10 seconds
  RUST_LOG                info; access=debug adds a line for each request";

/// Runs a command to its end.
pub fn run(command: Command) -> Result<ExitCode, BoxError> {
    match command {
        Command::Help => print(HELP)?,
        Command::Version => print(&format!("todo-api {}", env!("CARGO_PKG_VERSION")))?,
        Command::Serve => {
            let config = Config::from_env()?;
            logging::init(&config.log_filter);
            Runtime::new()?.block_on(serve(config))?;
        }
        Command::Migrate => {
            let config = Config::from_env()?;
            logging::init(&config.log_filter);
            Runtime::new()?.block_on(migrate(config))?;
        }
        Command::SetPassword(email) => {
            let config = Config::from_env()?;
            logging::init(&config.log_filter);
            Runtime::new()?.block_on(set_password(config, &email))?;
        }
        Command::Check => return Runtime::new()?.block_on(check(Config::from_env()?)),
    }
    Ok(ExitCode::SUCCESS)
}

/// A database that is there, or will be.
struct OpenDatabase {
    database: Database,
    postgres: Option<embedded_postgres::Postgres>,
    secret: Secret,
    /// Where the data is, for people.
    place: String,
}

/// Starts the private PostgreSQL, or makes ready to reach the server that the settings name.
async fn open(config: &Config, metrics: Arc<Metrics>) -> Result<OpenDatabase, BoxError> {
    match &config.store {
        DatabaseSource::Private(directory) => {
            let postgres = embedded_postgres::Postgres::start(directory).await?;
            let secret = private_secret(config, directory)?;
            let place = format!(
                "{} (private PostgreSQL {})",
                postgres.data_dir().display(),
                postgres.version()
            );
            let database = Database::new(
                Endpoint::private(postgres.config(), postgres.data_dir())?,
                config.db_pool_size,
                metrics,
            );
            Ok(OpenDatabase {
                database,
                postgres: Some(postgres),
                secret,
                place,
            })
        }
        DatabaseSource::Server(url) => {
            let target =
                Endpoint::server(url).map_err(|reason| format!("DATABASE_URL {reason}"))?;
            let secret = config
                .jwt_secret
                .clone()
                .ok_or("JWT_SECRET is required with DATABASE_URL")?;
            let place = format!("{} (sslmode {})", url.display(), url.sslmode());
            Ok(OpenDatabase {
                database: Database::new(target, config.db_pool_size, metrics),
                postgres: None,
                secret,
                place,
            })
        }
    }
}

fn private_secret(config: &Config, directory: &Path) -> Result<Secret, BoxError> {
    match &config.jwt_secret {
        Some(secret) => Ok(secret.clone()),
        None => Ok(Secret::from(embedded_postgres::jwt_secret(directory)?)),
    }
}

async fn serve(config: Config) -> Result<(), BoxError> {
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
    // Making or recovering a private PostgreSQL can take a while; giving it up tells it to end.
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
    notify(&[NotifyState::Ready]);
    let watchdog = tokio::spawn(watchdog(app));

    let wait_for_database = wait_for_database(&opened, &addresses);
    let refused = tokio::select! {
        refused = wait_for_database => refused,
        ended = &mut serving => Some(format!("the server ended: {ended:?}").into()),
        () = shutdown.recv() => None,
    };
    notify(&[NotifyState::Stopping]);
    watchdog.abort();
    stop.cancel();
    if !serving.is_finished()
        && let Err(error) = serving.await
    {
        error!("the server ended badly: {error}");
    }
    if let Some(postgres) = opened.postgres {
        postgres.stop().await;
    }
    match refused {
        Some(refusal) => Err(refusal),
        None => {
            info!("stopped");
            Ok(())
        }
    }
}

/// Brings the database up behind the listener that is open already, and tells a newcomer where
/// everything is. Ends only where the database will not have us.
async fn wait_for_database(opened: &OpenDatabase, addresses: &[SocketAddr]) -> Option<BoxError> {
    let mut arriving = std::pin::pin!(opened.database.wait_until_ready(None));
    // Most databases are there; the lines for people come last.
    let prompt = timeout(Duration::from_secs(1), arriving.as_mut()).await;
    if let Ok(result) = &prompt {
        match result {
            Ok(found) => report(found),
            Err(refusal) => return Some(refusal.to_string().into()),
        }
    }
    for address in addresses {
        info!("listening on http://{address}");
        info!("documentation at http://{address}/docs");
    }
    info!("data in {}", opened.place);
    if prompt.is_err() {
        match arriving.await {
            Ok(found) => report(&found),
            Err(refusal) => return Some(refusal.to_string().into()),
        }
    }
    std::future::pending().await
}

fn report(found: &ServerInfo) {
    info!(
        "database ready: PostgreSQL {}, {} migrations applied",
        found.version, found.migrations
    );
    if !found.search_ignores_case {
        warn!("{CASE_SENSITIVE}");
    }
}

/// All sockets that systemd passed, else one of our own.
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

fn notify(states: &[NotifyState]) {
    // Without systemd there is nobody to tell.
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot notify systemd: {error}");
    }
}

/// Tells systemd's watchdog that we live, as long as we answer ourselves.
async fn watchdog(app: Arc<AppState>) {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    loop {
        match timeout(period / 4, server::check_health(&app)).await {
            Ok(Ok(())) => notify(&[NotifyState::Watchdog]),
            Ok(Err(error)) => error!("the service does not answer itself: {error}"),
            Err(_) => error!("the service does not answer itself in time"),
        }
        sleep(period / 4).await;
    }
}

/// Runs `work` on the database of a command that does not serve. Never creates a cluster; an
/// embedded PostgreSQL that does not run yet is started and stopped again.
async fn with_database<T>(
    config: &Config,
    work: impl AsyncFnOnce(&Database, ServerInfo) -> Result<T, BoxError>,
) -> Result<T, BoxError> {
    let mut shutdown = ShutdownSignals::listen()?;
    let (target, postgres) = tokio::select! {
        connected = connect(config) => connected?,
        () = shutdown.recv() => return Err("interrupted".into()),
    };
    let database = Database::new(target, 1, Metrics::new());
    let work = async {
        let found = database.wait_until_ready(Some(COMMAND_TIMEOUT)).await?;
        work(&database, found).await
    };
    let result = tokio::select! {
        result = work => result,
        () = shutdown.recv() => Err("interrupted".into()),
    };
    if let Some(postgres) = postgres {
        postgres.stop().await;
    }
    result
}

async fn connect(
    config: &Config,
) -> Result<(Endpoint, Option<embedded_postgres::Postgres>), BoxError> {
    let directory = match &config.store {
        DatabaseSource::Server(url) => {
            let target =
                Endpoint::server(url).map_err(|reason| format!("DATABASE_URL {reason}"))?;
            return Ok((target, None));
        }
        DatabaseSource::Private(directory) => directory,
    };
    if let Some(running) = embedded_postgres::running_config(directory)? {
        return Ok((Endpoint::private(running, directory)?, None));
    }
    if !embedded_postgres::has_cluster(directory) {
        return Err(format!(
            "there is no database in DATA_DIR {}, and DATABASE_URL is not set: \
             the first `todo-api serve` creates one",
            directory.display()
        )
        .into());
    }
    let postgres = embedded_postgres::Postgres::start(directory).await?;
    Ok((
        Endpoint::private(postgres.config(), directory)?,
        Some(postgres),
    ))
}

async fn migrate(config: Config) -> Result<(), BoxError> {
    let applied = with_database(&config, async |_, found| Ok(found.migrations)).await?;
    print(&format!("{applied} migrations applied"))
}

async fn set_password(config: Config, email: &str) -> Result<(), BoxError> {
    let email = Email::parse(email).map_err(|refusal| refusal.detail)?;
    let hash =
        password::hash_new_password(&prompt_password()?, email.as_str(), config.bcrypt_cost)?;
    let revoked = with_database(&config, async |database, _| {
        replace_password(database, &email, &hash, config.lifetimes).await
    });
    print(&format!("password set; {} sessions ended", revoked.await?))
}

async fn replace_password(
    database: &Database,
    email: &Email,
    new: &str,
    lifetimes: TokenLifetimes,
) -> Result<usize, BoxError> {
    let location = database.location();
    let failed = |error| format!("the database at {location} did not take it: {error}");
    let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
    let key = LockoutKey::login(email, String::new());
    let record = users::for_login(db, &key).await.map_err(failed)?;
    let (id, hash) = record
        .account
        .ok_or_else(|| format!("there is no account with this address in {location}"))?;
    // Otherwise somebody who guesses could keep the operator from it.
    users::clear_failures(db, id).await.map_err(failed)?;
    let change = users::change_password(db, id, &hash, new, None, lifetimes).await;
    let change = change
        .map_err(failed)?
        .ok_or("the password was changed meanwhile; nothing was done")?;
    Ok(change.ended.len())
}

/// A password from the terminal, not shown, twice; or the first line of what is piped in.
fn prompt_password() -> Result<String, BoxError> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return read_line();
    }
    let shown = tcgetattr(&stdin)?;
    let mut hidden = shown.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
    let answers = prompt("new password: ").and_then(|first| Ok((first, prompt("again: ")?)));
    tcsetattr(&stdin, OptionalActions::Flush, &shown)?;
    let (first, second) = answers?;
    if first == second {
        Ok(first)
    } else {
        Err("the two are not the same; nothing was changed".into())
    }
}

fn prompt(text: &str) -> Result<String, BoxError> {
    let mut terminal = io::stderr();
    write!(terminal, "{text}")?;
    let line = read_line();
    writeln!(terminal)?;
    line
}

fn read_line() -> Result<String, BoxError> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// `todo-api check`: 0 where a start would go well, 1 where not.
async fn check(config: Config) -> Result<ExitCode, BoxError> {
    let settings = config.report.iter().map(|setting| {
        format!(
            "{:<24} {:<28} {}",
            setting.name, setting.value, setting.source
        )
    });
    print(&settings.collect::<Vec<_>>().join("\n"))?;
    let target = match &config.store {
        DatabaseSource::Private(directory) => match embedded_postgres::running_config(directory)? {
            Some(running) => Endpoint::private(running, directory)?,
            None => {
                let version = embedded_postgres::dry_run(directory).await?;
                print(&format!(
                    "embedded PostgreSQL {version} in {}: not running, `todo-api serve` starts it",
                    directory.display()
                ))?;
                return Ok(ExitCode::SUCCESS);
            }
        },
        DatabaseSource::Server(url) => {
            Endpoint::server(url).map_err(|reason| format!("DATABASE_URL {reason}"))?
        }
    };
    print(&format!("database {}", target.place()))?;
    match target.inspect().await {
        Ok(found) => {
            print(&describe(&found))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(trouble) => {
            print(&format!("  cannot be used: {trouble}"))?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn describe(found: &ServerInfo) -> String {
    let tls = if found.tls { "in use" } else { "not in use" };
    let search = match found.search_ignores_case {
        true => "search ignores case",
        false => CASE_SENSITIVE,
    };
    let pooler = match found.pooler {
        Pooler::None => "none seen",
        Pooler::Transaction => "transaction mode, with prepared statements",
    };
    format!(
        "  PostgreSQL {}\n  TLS {tls}\n  migrations due: {}\n  {search}\n  clock difference {:.3} s\n  pooler {pooler}",
        found.version, found.migrations, found.clock_difference
    )
}

/// Prints lines to standard output. A reader that has seen enough, as in `check | head -1`, is no error.
fn print(text: &str) -> Result<(), BoxError> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(()),
    }
}
