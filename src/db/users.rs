//! Statements on accounts and login failures.

use tokio_postgres::Row;
use uuid::Uuid;

use super::lease::Params;
use super::retry::Repeat;
use super::sessions::{NewSession, SessionState};
use super::statements::Sql;
use super::{Queries, Result, user};
use crate::domain::{Account, Email, Rfc3339, TokenLifetimes, User};

/// The data needed to verify the password of a login.
pub(crate) struct LoginRecord {
    pub(crate) account: Option<StoredAccount>,
    pub(crate) is_disabled: bool,
    /// The password hash of a registration that waits for its verification.
    pub(crate) pending_hash: Option<String>,
    /// Seconds until the lockout ends; 0 or less if there is no lockout.
    pub(crate) retry_after_secs: f64,
}

/// An account, or a registration that waits for its verification. Tokens in mails are bound to its state.
pub(crate) struct StoredAccount {
    pub(crate) id: Uuid,
    pub(crate) email: String,
    pub(crate) hash: String,
    pub(crate) is_verified: bool,
    pub(crate) is_pending: bool,
}

/// Reads an account from a row. Returns `None` if the row stands for an unknown address.
pub(super) fn stored_account(row: &Row) -> Option<StoredAccount> {
    Some(StoredAccount {
        id: row.get::<_, Option<Uuid>>("id")?,
        email: row.get("email"),
        hash: row.get("password_hash"),
        is_verified: row.get("email_verified"),
        is_pending: row.get("is_pending"),
    })
}

/// The key under which failed attempts are counted.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct LockoutKey {
    account: String,
    network: String,
}

impl LockoutKey {
    /// The key for logins with this address from this network, whether or not there is an account.
    pub(crate) fn login(email: &Email, network: String) -> Self {
        Self {
            account: email.as_str().to_owned(),
            network,
        }
    }

    /// The key for password confirmations of an authenticated user, from any network.
    pub(crate) fn authenticate(user_id: Uuid) -> Self {
        Self {
            account: user_id.to_string(),
            network: "session".to_owned(),
        }
    }
}

pub(crate) struct PasswordChange {
    pub(crate) user: User,
    pub(crate) ended: Vec<Uuid>,
    /// The session that was kept, if any. If it has ended in the meantime, nothing was changed.
    pub(crate) kept: Option<SessionState>,
}

/// Creates an account with its first session. Returns `None` if the address is taken.
pub(crate) async fn register(
    db: Queries<'_>,
    email: &Email,
    hash: &str,
    session: &NewSession,
) -> Result<Option<User>> {
    let id = Uuid::now_v7();
    let params: Params = &[
        &id,
        &email.as_str(),
        &hash,
        &session.id,
        &session.idle,
        &session.user_agent,
        &session.network,
    ];
    let rows = db.insert(Sql::UsersRegister, params).await?;
    match rows.first() {
        Some(row) => Ok(Some(user(row))),
        // The address is taken, or the first attempt of a retried insert took effect.
        None => get(db, id).await,
    }
}

/// Reads an account. Returns `None` if it was deleted.
pub(crate) async fn get(db: Queries<'_>, id: Uuid) -> Result<Option<User>> {
    let rows = db.read(Sql::UsersGet, &[&id]).await?;
    Ok(rows.first().map(user))
}

pub(crate) async fn for_login(db: Queries<'_>, key: &LockoutKey) -> Result<LoginRecord> {
    let params: Params = &[&key.account, &key.network];
    let rows = db.read(Sql::UsersForLogin, params).await?;
    let row = rows.first();
    Ok(LoginRecord {
        account: row.and_then(stored_account),
        is_disabled: row.is_some_and(|row| row.get("is_disabled")),
        pending_hash: row.and_then(|row| row.get("pending_hash")),
        retry_after_secs: retry_after_secs(&rows),
    })
}

/// Reads the account of an authenticated user, and the seconds until the lockout of confirmations ends.
/// Returns `None` if the account was deleted.
pub(crate) async fn for_password_check(
    db: Queries<'_>,
    id: Uuid,
) -> Result<Option<(StoredAccount, f64)>> {
    let rows = db.read(Sql::UsersForPasswordCheck, &[&id]).await?;
    let account = rows.first().and_then(stored_account);
    Ok(account.map(|account| (account, retry_after_secs(&rows))))
}

/// Counts a wrong password and returns 0. If a lockout began while the password was being verified,
/// does not count the attempt and returns the number of seconds until the lockout ends.
pub(crate) async fn record_failure(db: Queries<'_>, key: &LockoutKey) -> Result<f64> {
    let params: Params = &[&key.account, &key.network];
    let rows = db.write(Sql::LoginFailuresRecord, params).await?;
    Ok(retry_after_secs(&rows))
}

fn retry_after_secs(rows: &[Row]) -> f64 {
    rows.first().map_or(0.0, |row| row.get("retry_after_secs"))
}

/// Replaces the password hash, ends every session except `keep`, and revokes the tokens of `keep`, all
/// in one transaction. Without `keep` it is a reset, which also clears all lockouts. Returns `None` if
/// the hash is no longer `verified`, the address is no longer `proven_email`, or the account was deleted.
///
/// Two statements are needed because the second one must see the sessions of logins that the first
/// one waited for.
pub(crate) async fn change_password(
    db: Queries<'_>,
    id: Uuid,
    verified: Option<&str>,
    hash: &str,
    keep: Option<Uuid>,
    proven_email: Option<&str>,
    lifetimes: TokenLifetimes,
) -> Result<Option<PasswordChange>> {
    let deadline = db.deadline;
    db.run(Repeat::Never, |mut lease| async move {
        lease.begin(deadline).await?;
        let params: Params = &[&id, &verified, &hash, &keep.is_none(), &proven_email];
        let changed = lease.query(deadline, Sql::UsersSetPassword, params).await?;
        let Some(user) = changed.first().map(user) else {
            lease.end(deadline, false).await?;
            return Ok(None);
        };
        let idle = lifetimes.refresh_idle.as_secs_f64();
        let max = lifetimes.refresh_max.as_secs_f64();
        let params: Params = &[&id, &keep, &idle, &max];
        let renewed = lease.query(deadline, Sql::SessionsRenew, params).await?;
        let row = renewed.first();
        let kept = keep.zip(row).and_then(|(id, row)| {
            row.get::<_, Option<i32>>("generation")?;
            Some(SessionState::from_row(id, row))
        });
        lease
            .end(deadline, keep.is_none() || kept.is_some())
            .await?;
        let ended = row.map_or_else(Vec::new, |row| row.get("ended_ids"));
        Ok(Some(PasswordChange { user, ended, kept }))
    })
    .await
}

/// Deletes an account and everything that belongs to it. Returns the sessions that ended, or `None`
/// if the hash is no longer `verified` or the account was deleted.
pub(crate) async fn delete(
    db: Queries<'_>,
    id: Uuid,
    verified: Option<&str>,
) -> Result<Option<Vec<Uuid>>> {
    let rows = db.write(Sql::UsersDelete, &[&id, &verified]).await?;
    Ok(rows.first().map(|row| row.get("session_ids")))
}

/// Reads at most `limit` accounts in the order of their addresses, beginning with `email`.
pub(crate) async fn accounts(db: Queries<'_>, email: &str, limit: i64) -> Result<Vec<Account>> {
    let rows = db.read(Sql::UsersAccounts, &[&email, &limit]).await?;
    let account = |row: &Row| Account {
        id: row.get("id"),
        email: row.get("email"),
        email_verified: row.get("email_verified"),
        created_at: Rfc3339(row.get("created_at")),
        updated_at: Rfc3339(row.get("updated_at")),
        disabled_at: row.get::<_, Option<_>>("disabled_at").map(Rfc3339),
        last_used_at: row.get::<_, Option<_>>("last_used_at").map(Rfc3339),
        locked_until: row.get::<_, Option<_>>("locked_until").map(Rfc3339),
        sessions: row.get("sessions"),
        tasks: row.get("tasks"),
    };
    Ok(rows.iter().map(account).collect())
}

/// Disables an account and ends its sessions, or enables it. Returns the sessions that ended, or
/// `None` if the account was deleted.
pub(crate) async fn set_disabled(
    db: Queries<'_>,
    id: Uuid,
    disabled: bool,
) -> Result<Option<Vec<Uuid>>> {
    let rows = db.write(Sql::UsersSetDisabled, &[&id, &disabled]).await?;
    Ok(rows.first().map(|row| row.get("ended_ids")))
}

/// Reads everything that is stored about a user, as JSON. Returns `None` if the account was deleted.
pub(crate) async fn export(db: Queries<'_>, id: Uuid) -> Result<Option<String>> {
    let rows = db.read(Sql::UsersExport, &[&id]).await?;
    Ok(rows.first().map(|row| row.get("document")))
}
