//! The command line: its arguments, and the commands other than `serve`.

mod accounts;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use lexopt::Arg::{self, Long, Short};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::config::{self, Config};
use crate::db::{Database, Endpoint, ServerInfo};
use crate::embedded_postgres::{self, Postgres};
use crate::mail;
use crate::serve::{BoxError, CASE_SENSITIVE, serve};
use crate::shutdown::ShutdownSignals;
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;

/// How long a command waits for a database that is unavailable. Migrations may take longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

const USAGE: &str = "\
todo-api: a multi-user todo back end over HTTP and PostgreSQL

usage: todo-api [COMMAND]

  serve                    serve the API (default)
  migrate                  apply the migrations that are due
  check                    print the settings and inspect the database
  user list                list the accounts
  user show EMAIL          show an account
  user export EMAIL        print everything that is stored about a person, as JSON
  user disable EMAIL       refuse logins and revoke the sessions; `user enable EMAIL` undoes it
  user delete EMAIL        delete an account and its tasks
  user set-password EMAIL  set the password and revoke the sessions
  --json                   print JSON, with `check` and `user`
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
    let (words, json) = match parse_args() {
        Ok(arguments) => arguments,
        Err(error) => return usage_error(&error.to_string()),
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let runtime = Runtime::new().map_err(BoxError::from);
    let executed = runtime.and_then(|runtime| runtime.block_on(execute(&words, json)));
    executed.unwrap_or_else(|error| {
        logging::print_fatal(&error.to_string());
        ExitCode::FAILURE
    })
}

/// Returns the command and its arguments, and whether `--json` was given. The options `--help` and
/// `--version` count as commands.
fn parse_args() -> Result<(Vec<String>, bool), lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let (mut words, mut json) = (Vec::new(), false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok((vec!["--help".into()], json)),
            Short('V') | Long("version") => return Ok((vec!["--version".into()], json)),
            Long("json") => json = true,
            Arg::Value(word) => words.push(word.into_string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok((words, json))
}

fn usage_error(error: &str) -> ExitCode {
    logging::print_fatal(&format!("{error}; see todo-api --help"));
    ExitCode::from(2)
}

async fn execute(words: &[&str], json: bool) -> Result<ExitCode, BoxError> {
    match words {
        ["check"] => return check(&Config::from_env()?, json).await,
        ["user", "list"] => return accounts::list(&config_and_log()?, json).await,
        [
            "user",
            command @ ("show" | "export" | "disable" | "enable" | "delete" | "set-password"),
            email,
        ] => return accounts::run(&config_and_log()?, command, email, json).await,
        ["user", ..] => {
            let error = "`user` requires a command and, unless it is `list`, an e-mail address";
            return Ok(usage_error(error));
        }
        _ if json => return Ok(usage_error("this command does not support --json")),
        ["--help"] => print(&format!("{USAGE}{}", config::help()))?,
        ["--version"] => {
            let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("COMMIT"));
            print(&format!("todo-api {version} ({commit})"))?;
        }
        [] | ["serve"] => serve(config_and_log()?).await?,
        ["migrate"] => migrate(&config_and_log()?).await?,
        _ => {
            let error = format!("unknown command “{}”", words.join(" "));
            return Ok(usage_error(&error));
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

/// Prints the settings and the state of the database and of mail. Fails if `serve` could not use one of
/// them.
async fn check(config: &Config, json: bool) -> Result<ExitCode, BoxError> {
    let print_unless_json = |text: &str| if json { Ok(()) } else { print(text) };
    for line in &config.report {
        print_unless_json(&line.to_string())?;
    }
    let (database, text) = match check_database(config).await {
        Err(error) if json => (json!({"error": error.to_string()}), String::new()),
        checked => checked?,
    };
    print_unless_json(&text)?;
    let (mail, text) = check_mail(config).await;
    print_unless_json(&text)?;
    let is_usable = database["error"].is_null() && mail["error"].is_null();
    if json {
        let document = json!({"settings": config.report, "database": database, "mail": mail});
        print(&document.to_string())?;
    }
    Ok(match is_usable {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Returns the state of the database, as JSON and as text.
async fn check_database(config: &Config) -> Result<(Value, String), BoxError> {
    let Some(endpoint) = running_endpoint(config)? else {
        let version = embedded_postgres::dry_run(&config.data_dir).await?;
        let data_dir = config.data_dir.display().to_string();
        let text = format!(
            "embedded PostgreSQL {version} in {data_dir}: not running (`todo-api serve` starts it)"
        );
        let database = json!({"location": data_dir, "running": false, "version": version});
        return Ok((database, text));
    };
    let location = &endpoint.location;
    let (mut database, state) = match endpoint.inspect(false).await {
        Ok(server) => (serde_json::to_value(&server)?, describe_server(&server)),
        Err(error) => (
            json!({"error": error.to_string()}),
            format!("cannot be used: {error}"),
        ),
    };
    database["location"] = json!(location);
    Ok((database, format!("database {location}\n  {state}")))
}

fn describe_server(server: &ServerInfo) -> String {
    let search = match server.search_ignores_case {
        true => "search ignores case",
        false => CASE_SENSITIVE,
    };
    let pooler = match server.has_pooler {
        true => "transaction mode, with prepared statements",
        false => "none detected",
    };
    format!(
        "PostgreSQL {}\n  TLS {}\n  migrations due: {}\n  {search}\n  clock difference {:.3} s\n  pooler {pooler}",
        server.version,
        describe_tls(server.tls),
        server.migrations_due,
        server.clock_difference
    )
}

fn describe_tls(is_used: bool) -> &'static str {
    if is_used { "in use" } else { "not in use" }
}

/// Connects to the mail server, greets it and authenticates. Returns the result as JSON, which is null
/// if there is no mail server, and as text.
async fn check_mail(config: &Config) -> (Value, String) {
    let Some(mail) = &config.mail else {
        let text = "no mail: SMTP_URL is not set (it also needs MAIL_FROM and PUBLIC_URL)";
        return (Value::Null, text.into());
    };
    let (server, login) = (mail.server.location(), mail.server.has_credentials());
    let error = match timeout(mail::ATTEMPT_TIMEOUT, mail.server.connect()).await {
        Ok(Ok(connection)) => {
            let tls = connection.is_encrypted();
            mail::quit(connection).await;
            let login_state = if login { "accepted" } else { "not needed" };
            let tls_state = describe_tls(tls);
            let text = format!("mail server {server}\n  TLS {tls_state}\n  login {login_state}");
            return (json!({"server": server, "tls": tls, "login": login}), text);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "timed out".to_owned(),
    };
    let text = format!("mail server {server}\n  cannot be used: {error}");
    (json!({"server": server, "error": error}), text)
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
