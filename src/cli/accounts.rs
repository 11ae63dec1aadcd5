//! The commands `user …`, with which an operator manages accounts.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use log::info;
use serde_json::{Value, json};

use super::{print, with_database};
use crate::auth::hasher::hash_new_password;
use crate::config::Config;
use crate::db::{Deadline, Queries, users};
use crate::domain::{Account, Email, Rfc3339, TokenLifetimes};
use crate::serve::BoxError;
use crate::telemetry::logging;

/// The exit status if there is no account with the address.
const NO_SUCH_ACCOUNT: u8 = 3;
/// The number of accounts that one query of `user list` reads.
const PAGE_SIZE: usize = 1000;

/// Runs a command on the account with this address.
pub(super) async fn run(
    config: &Config,
    command: &str,
    email: &str,
    json: bool,
) -> Result<ExitCode, BoxError> {
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
        let db = database.with_deadline(Deadline::of_command());
        let executed = execute(db, command, &email, &new_hash, config.lifetimes, json).await;
        match executed.map_err(|error| format!("`user {command}` failed in {location}: {error}"))? {
            true => Ok(ExitCode::SUCCESS),
            false => {
                let error = format!("there is no account with this address in {location}");
                logging::print_fatal(&error);
                Ok(ExitCode::from(NO_SUCH_ACCOUNT))
            }
        }
    })
    .await
}

/// Executes a command. Returns whether there is an account with this address.
async fn execute(
    db: Queries<'_>,
    command: &str,
    email: &Email,
    new_hash: &str,
    lifetimes: TokenLifetimes,
    json: bool,
) -> Result<bool, BoxError> {
    let accounts = users::accounts(db, email.as_str(), 1).await?;
    let Some(account) = accounts.iter().find(|found| found.email == email.as_str()) else {
        return Ok(false);
    };
    let id = account.id;
    let (change, ended) = match command {
        "show" => return show(account, json).map(|()| true),
        "export" => {
            let Some(document) = users::export(db, id).await? else {
                return Ok(false);
            };
            return print(&document).map(|()| true);
        }
        "disable" => ("account disabled", users::set_disabled(db, id, true).await?),
        "enable" => ("account enabled", users::set_disabled(db, id, false).await?),
        "delete" => ("account deleted", users::delete(db, id, None).await?),
        _ => {
            let change = users::change_password(db, id, None, new_hash, None, None, lifetimes);
            ("password set", change.await?.map(|change| change.ended))
        }
    };
    let Some(ended) = ended.map(|ended| ended.len()) else {
        return Ok(false);
    };
    info!("{change} user_id={id} sessions_revoked={ended}");
    print(&match json {
        true => json!({"user_id": id, "sessions_revoked": ended}).to_string(),
        false => format!("{change}, {ended} sessions revoked"),
    })?;
    Ok(true)
}

/// Prints one line for each account: columns, or a JSON object.
pub(super) async fn list(config: &Config, json: bool) -> Result<ExitCode, BoxError> {
    with_database(config, async |database, _| {
        if !json {
            print("CREATED     LAST USED   SESSIONS    TASKS  STATE     EMAIL")?;
        }
        let mut from = String::new();
        loop {
            let db = database.with_deadline(Deadline::of_command());
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
                _ => return Ok(ExitCode::SUCCESS),
            }
        }
    })
    .await
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
fn show(account: &Account, json: bool) -> Result<(), BoxError> {
    let account = serde_json::to_value(account)?;
    if json {
        return print(&account.to_string());
    }
    for (name, value) in account.as_object().into_iter().flatten() {
        let value = match value {
            Value::Null => "-".into(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        print(&format!("{name:<16}{value}"))?;
    }
    Ok(())
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
