//! The command line: its arguments, and the commands other than `serve`.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use lexopt::Arg::{Long, Short, Value};
use tokio::runtime::Runtime;

use crate::auth::hasher::hash_new_password;
use crate::config::{self, Config};
use crate::db::users::{self, LockoutKey};
use crate::db::{Database, Deadline, Endpoint, REQUEST_TIMEOUT, ServerInfo};
use crate::domain::{Email, TokenLifetimes};
use crate::embedded_postgres::{self, Postgres};
use crate::serve::{BoxError, CASE_SENSITIVE, serve};
use crate::shutdown::ShutdownSignals;
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;

/// How long a command waits for a database that is unavailable. Migrations may take longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

const USAGE: &str = "\
todo-api: a multi-user todo back end over HTTP and PostgreSQL

usage: todo-api [COMMAND]

  serve                serve the API (default)
  migrate              apply the migrations that are due
  check                print the settings and inspect the database
  set-password EMAIL   set an account's password and revoke its sessions
  --help, --version

environment (secrets also in the file that <NAME>_FILE names, or as systemd credential):
";

/// Runs the command given by the arguments. Exits with status 2 if there is no such command.
pub fn run() -> ExitCode {
    logging::set_panic_hook();
    if let Err(error) = embedded_postgres::become_child() {
        logging::print_fatal(&format!("cannot run PostgreSQL: {error}"));
        return ExitCode::FAILURE;
    }
    let words = match parse_args() {
        Ok(words) => words,
        Err(error) => return usage_error(&error.to_string()),
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    execute(&words).unwrap_or_else(|error| {
        logging::print_fatal(&error.to_string());
        ExitCode::FAILURE
    })
}

/// Returns the command and its arguments. The options `--help` and `--version` count as commands.
fn parse_args() -> Result<Vec<String>, lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let mut words = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(vec!["--help".into()]),
            Short('V') | Long("version") => return Ok(vec!["--version".into()]),
            Value(word) => words.push(word.into_string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok(words)
}

fn usage_error(error: &str) -> ExitCode {
    logging::print_fatal(&format!("{error}; see todo-api --help"));
    ExitCode::from(2)
}

fn execute(words: &[&str]) -> Result<ExitCode, BoxError> {
    match words {
        ["--help"] => print(&format!("{USAGE}{}", config::help()))?,
        ["--version"] => print(concat!("todo-api ", env!("CARGO_PKG_VERSION")))?,
        ["check"] => return Runtime::new()?.block_on(check(&Config::from_env()?)),
        [] | ["serve"] => Runtime::new()?.block_on(serve(config_and_log()?))?,
        ["migrate"] => Runtime::new()?.block_on(migrate(&config_and_log()?))?,
        ["set-password", email] => {
            Runtime::new()?.block_on(set_password(&config_and_log()?, email))?;
        }
        ["set-password"] => return Ok(usage_error("set-password requires an e-mail address")),
        _ => {
            return Ok(usage_error(&format!(
                "unknown command “{}”",
                words.join(" ")
            )));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn config_and_log() -> Result<Config, BoxError> {
    let config = Config::from_env()?;
    logging::init(&config.log_filter);
    Ok(config)
}

/// The database that the settings name; `None` if it is an embedded PostgreSQL that is not running.
fn running_endpoint(config: &Config) -> Result<Option<Endpoint>, BoxError> {
    if config.server.is_some() {
        return Ok(config.server.clone());
    }
    let running = embedded_postgres::running_config(&config.data_dir)?;
    let endpoint = running.map(|running| Endpoint::embedded(running, &config.data_dir));
    Ok(endpoint.transpose()?)
}

/// Runs `work` on the database. If the embedded PostgreSQL is not running, starts it and stops it
/// afterwards, but never creates a cluster.
async fn with_database<T>(
    config: &Config,
    work: impl AsyncFnOnce(&Database, ServerInfo) -> Result<T, BoxError>,
) -> Result<T, BoxError> {
    let mut shutdown = ShutdownSignals::listen()?;
    let (endpoint, postgres) = tokio::select! {
        opened = open(config) => opened?,
        () = shutdown.recv() => return Err("interrupted".into()),
    };
    let database = Database::new(endpoint, 1, Metrics::new());
    let work = async {
        let server = database.wait_until_ready(Some(CONNECT_TIMEOUT)).await?;
        work(&database, server).await
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

async fn open(config: &Config) -> Result<(Endpoint, Option<Postgres>), BoxError> {
    if let Some(endpoint) = running_endpoint(config)? {
        return Ok((endpoint, None));
    }
    let data_dir = &config.data_dir;
    if !embedded_postgres::has_cluster(data_dir) {
        return Err(format!(
            "there is no database in DATA_DIR {}, and DATABASE_URL is not set: \
             the first `todo-api serve` creates one",
            data_dir.display()
        )
        .into());
    }
    let postgres = Postgres::start(data_dir).await?;
    let endpoint = Endpoint::embedded(postgres.config(), data_dir)?;
    Ok((endpoint, Some(postgres)))
}

async fn migrate(config: &Config) -> Result<(), BoxError> {
    let applied = with_database(config, async |_, server| Ok(server.migrations_applied)).await?;
    print(&format!("{applied} migrations applied"))
}

async fn set_password(config: &Config, email: &str) -> Result<(), BoxError> {
    let email = Email::parse(email).map_err(|error| error.detail)?;
    let password = read_new_password()?;
    let hash = hash_new_password(&password, email.as_str(), config.bcrypt_cost)?;
    let revoked = with_database(config, async |database, _| {
        replace_password(database, &email, &hash, config.lifetimes).await
    })
    .await?;
    print(&format!("password set, {revoked} sessions revoked"))
}

async fn replace_password(
    database: &Database,
    email: &Email,
    new_hash: &str,
    lifetimes: TokenLifetimes,
) -> Result<usize, BoxError> {
    let location = database.location();
    let failed = |error| format!("cannot set the password in {location}: {error}");
    let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
    let key = LockoutKey::login(email, String::new());
    let record = users::for_login(db, &key).await.map_err(failed)?;
    let (id, hash) = record
        .account
        .ok_or_else(|| format!("there is no account with this address in {location}"))?;
    // A lockout would reject the change.
    users::clear_failures(db, id).await.map_err(failed)?;
    let change = users::change_password(db, id, &hash, new_hash, None, lifetimes).await;
    let change = change
        .map_err(failed)?
        .ok_or("the password was changed concurrently; nothing was done")?;
    Ok(change.ended.len())
}

/// Prompts for the password twice on a terminal; otherwise reads it from the first line of standard
/// input.
fn read_new_password() -> Result<String, BoxError> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Ok(stdin.lines().next().transpose()?.unwrap_or_default());
    }
    let password = rpassword::prompt_password("New password: ")?;
    if rpassword::prompt_password("Repeat the password: ")? != password {
        return Err("the passwords differ; nothing was changed".into());
    }
    Ok(password)
}

/// Prints the settings and the state of the database. Fails if `serve` could not use the database.
async fn check(config: &Config) -> Result<ExitCode, BoxError> {
    print(&config.report.join("\n"))?;
    let Some(endpoint) = running_endpoint(config)? else {
        let version = embedded_postgres::dry_run(&config.data_dir).await?;
        print(&format!(
            "embedded PostgreSQL {version} in {}: not running (`todo-api serve` starts it)",
            config.data_dir.display()
        ))?;
        return Ok(ExitCode::SUCCESS);
    };
    print(&format!("database {}", endpoint.location))?;
    match endpoint.inspect(false).await {
        Ok(server) => print_server_info(&server).map(|()| ExitCode::SUCCESS),
        Err(error) => print(&format!("  cannot be used: {error}")).map(|()| ExitCode::FAILURE),
    }
}

fn print_server_info(server: &ServerInfo) -> Result<(), BoxError> {
    let tls = if server.tls { "in use" } else { "not in use" };
    let search = match server.search_ignores_case {
        true => "search ignores case",
        false => CASE_SENSITIVE,
    };
    let pooler = match server.has_pooler {
        true => "transaction mode, with prepared statements",
        false => "none detected",
    };
    print(&format!(
        "  PostgreSQL {}\n  TLS {tls}\n  migrations due: {}\n  {search}\n  clock difference {:.3} s\n  pooler {pooler}",
        server.version, server.migrations_due, server.clock_difference
    ))
}

/// Prints to standard output. A closed pipe is not an error: `check | head -1` closes it.
fn print(text: &str) -> Result<(), BoxError> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(()),
    }
}
