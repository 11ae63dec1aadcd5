//! The commands `user …`, with which an operator manages accounts.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use log::info;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{print, with_database};
use crate::auth::hasher::hash_new_password;
use crate::config::Config;
use crate::db::{Database, DbError, Deadline, Queries, REQUEST_TIMEOUT, users};
use crate::domain::{Account, Email, Rfc3339};
use crate::serve::BoxError;
use crate::telemetry::logging;

/// The commands that take an e-mail address.
const COMMANDS: [&str; 6] = [
    "show",
    "export",
    "disable",
    "enable",
    "delete",
    "set-password",
];
/// The exit status if there is no account with the address.
const NO_SUCH_ACCOUNT: u8 = 3;
/// The number of accounts that one query of `user list` reads.
const PAGE_SIZE: usize = 1000;

/// Whether these words are a command and its arguments.
pub(super) fn is_command(words: &[&str]) -> bool {
    match words {
        [command] => *command == "list",
        [command, _email] => COMMANDS.contains(command),
        _ => false,
    }
}

/// Runs the command that consists of these words.
pub(super) async fn run(config: &Config, words: &[&str], json: bool) -> Result<ExitCode, BoxError> {
    let &[command, email] = words else {
        with_database(config, async |database, _| list(database, json).await).await?;
        return Ok(ExitCode::SUCCESS);
    };
    let email = Email::parse(email).map_err(|error| error.detail)?;
    let new_hash = match command {
        "set-password" => {
            let password = read_new_password()?;
            hash_new_password(&password, email.as_str(), config.bcrypt_cost)?
        }
        _ => String::new(),
    };
    with_database(config, async |database, _| {
        let location = database.location();
        let failed = |error| format!("`user {command}` failed in {location}: {error}");
        let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
        let accounts = users::accounts(db, email.as_str(), 1)
            .await
            .map_err(failed)?;
        let Some(account) = accounts.iter().find(|found| found.email == email.as_str()) else {
            logging::print_fatal(&format!(
                "there is no account with this address in {location}"
            ));
            return Ok(ExitCode::from(NO_SUCH_ACCOUNT));
        };
        let id = account.id;
        let (change, ended) = match command {
            "show" => return show(account, json),
            "export" => {
                let document = users::export(db, id).await.map_err(failed)?;
                print(&document.unwrap_or_default())?;
                return Ok(ExitCode::SUCCESS);
            }
            "disable" => ("account disabled", users::set_disabled(db, id, true).await),
            "enable" => ("account enabled", users::set_disabled(db, id, false).await),
            "delete" => ("account deleted", delete(db, id).await),
            _ => (
                "password set",
                set_password(db, id, &new_hash, config).await,
            ),
        };
        let ended = ended.map_err(failed)?;
        let ended = ended
            .ok_or("the account was changed concurrently; nothing was done")?
            .len();
        info!("{change} user_id={id} sessions_revoked={ended}");
        print(&match json {
            true => json!({"user_id": id, "sessions_revoked": ended}).to_string(),
            false => format!("{change}, {ended} sessions revoked"),
        })?;
        Ok(ExitCode::SUCCESS)
    })
    .await
}

/// Clears the lockout of the user's confirmations, which would reject the change, and deletes the
/// account. Returns the sessions that ended.
async fn delete(db: Queries<'_>, id: Uuid) -> Result<Option<Vec<Uuid>>, DbError> {
    users::clear_failures(db, id).await?;
    match users::for_password_check(db, id).await? {
        Some(check) => users::delete(db, id, &check.hash).await,
        None => Ok(None),
    }
}

/// Replaces the password, which lifts all lockouts. Returns the sessions that ended.
async fn set_password(
    db: Queries<'_>,
    id: Uuid,
    new_hash: &str,
    config: &Config,
) -> Result<Option<Vec<Uuid>>, DbError> {
    let Some(check) = users::for_password_check(db, id).await? else {
        return Ok(None);
    };
    let lifetimes = config.lifetimes;
    let change =
        users::change_password(db, id, &check.hash, new_hash, None, false, lifetimes).await?;
    Ok(change.map(|change| change.ended))
}

/// Prints one line for each account: columns, or a JSON object.
async fn list(database: &Database, json: bool) -> Result<(), BoxError> {
    if !json {
        print("CREATED     LAST USED   SESSIONS    TASKS  STATE     EMAIL")?;
    }
    let mut from = String::new();
    loop {
        let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
        let page = users::accounts(db, &from, PAGE_SIZE as i64).await;
        let page = page.map_err(|error| format!("cannot list the accounts: {error}"))?;
        // Each page but the first begins with the last account of the page before.
        for account in page.iter().skip_while(|account| account.email == from) {
            print(&match json {
                true => serde_json::to_string(account)?,
                false => columns(account),
            })?;
        }
        match page.last() {
            Some(last) if page.len() == PAGE_SIZE => from.clone_from(&last.email),
            _ => return Ok(()),
        }
    }
}

fn columns(account: &Account) -> String {
    let date = |time: Rfc3339| time.0.strftime("%F").to_string();
    let (created, last_used) = (date(account.created_at), account.last_used_at.map(date));
    let state = match (account.disabled_at, account.locked_until) {
        (Some(_), _) => "disabled",
        (None, Some(_)) => "locked",
        (None, None) => "active",
    };
    let last_used = last_used.unwrap_or_else(|| "-".into());
    let (sessions, tasks, email) = (account.sessions, account.tasks, &account.email);
    format!("{created}  {last_used:<10}  {sessions:>8} {tasks:>8}  {state:<8}  {email}")
}

/// Prints an account: a line for each field, or a JSON object.
fn show(account: &Account, json: bool) -> Result<ExitCode, BoxError> {
    let account = serde_json::to_value(account)?;
    if json {
        print(&account.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in account.as_object().into_iter().flatten() {
        let value = match value {
            Value::Null => "-".into(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        print(&format!("{name:<14}{value}"))?;
    }
    Ok(ExitCode::SUCCESS)
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
