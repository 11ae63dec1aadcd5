//! Statements on accounts.

use tokio_postgres::Row;
use uuid::Uuid;

use super::retry::Repeat;
use super::sessions::SessionState;
use super::statements::Sql;
use super::{DbError, Queries};
use crate::domain::{Email, Rfc3339, TokenLifetimes, User};

/// What a login needs to know before the password is checked.
pub(crate) struct LoginRecord {
    /// The account and its hash, where there is one.
    pub(crate) account: Option<(Uuid, String)>,
    /// Seconds for which attempts are refused; 0 or less is none.
    pub(crate) retry_after_secs: f64,
}

/// What checking the password of somebody signed in needs.
pub(crate) struct PasswordCheck {
    pub(crate) email: String,
    pub(crate) hash: String,
    pub(crate) retry_after_secs: f64,
}

/// What failed attempts are counted by.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct LockoutKey {
    account: String,
    network: String,
}

impl LockoutKey {
    /// A login from this network, whether or not an account has the address.
    pub(crate) fn login(email: &Email, network: String) -> Self {
        Self {
            account: email.as_str().to_owned(),
            network,
        }
    }

    /// A signed-in user who confirms a change, from any network.
    pub(crate) fn authenticate(user_id: Uuid) -> Self {
        Self {
            account: user_id.to_string(),
            network: "session".to_owned(),
        }
    }
}

/// What a change of password did.
pub(crate) struct PasswordChange {
    pub(crate) user: User,
    pub(crate) ended: Vec<Uuid>,
    /// The session that was kept. If it was to be kept and is over, nothing was changed.
    pub(crate) kept: Option<SessionState>,
}

/// A session to be made.
pub(crate) struct NewSession {
    pub(crate) id: Uuid,
    /// Seconds until it idles out.
    pub(crate) idle: f64,
    pub(crate) user_agent: Option<String>,
    /// The client's network, which the account knows from then on.
    pub(crate) network: String,
}

impl NewSession {
    /// What its first tokens are made from.
    pub(crate) fn state(&self) -> SessionState {
        SessionState {
            id: self.id,
            generation: 1,
            epoch: 0,
            expires_in: self.idle,
        }
    }
}

/// Makes an account with its first session; `None` if the address is taken.
pub(crate) async fn register(
    db: Queries<'_>,
    email: &Email,
    hash: &str,
    session: &NewSession,
) -> Result<Option<User>, DbError> {
    let id = Uuid::now_v7();
    let rows = db
        .insert(
            Sql::UsersRegister,
            &[
                &id,
                &email.as_str(),
                &hash,
                &session.id,
                &session.idle,
                &session.user_agent,
                &session.network,
            ],
        )
        .await?;
    match rows.first() {
        Some(row) => Ok(Some(user(row))),
        // Taken, or made by the first run of a repeated insert.
        None => get(db, id).await,
    }
}

/// The account of a signed-in user; `None` if it is gone.
pub(crate) async fn get(db: Queries<'_>, id: Uuid) -> Result<Option<User>, DbError> {
    let rows = db.read(Sql::UsersGet, &[&id]).await?;
    Ok(rows.first().map(user))
}

/// What a login needs.
pub(crate) async fn for_login(db: Queries<'_>, key: &LockoutKey) -> Result<LoginRecord, DbError> {
    let rows = db
        .read(Sql::UsersForLogin, &[&key.account, &key.network])
        .await?;
    let id: Option<Uuid> = rows.first().and_then(|row| row.get("id"));
    Ok(LoginRecord {
        account: id.zip(rows.first().and_then(|row| row.get("password_hash"))),
        retry_after_secs: rows.first().map_or(0.0, |row| row.get("retry_after_secs")),
    })
}

/// What checking this user's password needs; `None` if the account is gone.
pub(crate) async fn for_password_check(
    db: Queries<'_>,
    id: Uuid,
) -> Result<Option<PasswordCheck>, DbError> {
    let rows = db.read(Sql::UsersForPasswordCheck, &[&id]).await?;
    Ok(rows.first().map(|row| PasswordCheck {
        email: row.get("email"),
        hash: row.get("password_hash"),
        retry_after_secs: row.get("retry_after_secs"),
    }))
}

/// Counts a wrong password. If a lockout began while it was being checked, it does not count, and
/// the seconds until the lockout ends come back; 0 otherwise.
pub(crate) async fn record_failure(db: Queries<'_>, key: &LockoutKey) -> Result<f64, DbError> {
    let (sql, params): (_, super::Params) =
        (Sql::LoginFailuresRecord, &[&key.account, &key.network]);
    let rows = db.write(sql, params).await?;
    Ok(rows.first().map_or(0.0, |row| row.get("retry_after_secs")))
}

/// Lifts every lockout of an account.
pub(crate) async fn clear_failures(db: Queries<'_>, id: Uuid) -> Result<u64, DbError> {
    db.execute(Sql::LoginFailuresClear, &[&id]).await
}

/// Replaces the hash that was verified, ends every session but `keep` and revokes the tokens of that
/// one, as one; `None` if the password was changed meanwhile.
///
/// Two statements, because the second has to see the sessions of a sign-in that the first waited
/// for.
pub(crate) async fn change_password(
    db: Queries<'_>,
    id: Uuid,
    verified: &str,
    hash: &str,
    keep: Option<Uuid>,
    lifetimes: TokenLifetimes,
) -> Result<Option<PasswordChange>, DbError> {
    let deadline = db.deadline;
    db.retry(Repeat::Never, || async {
        let mut lease = db.database.acquire(deadline).await?;
        lease.begin(deadline).await?;
        let changed = lease
            .query(deadline, Sql::UsersSetPassword, &[&id, &verified, &hash])
            .await?;
        let Some(user) = changed.first().map(user) else {
            return Ok(None);
        };
        let (idle, max) = (lifetimes.refresh_idle, lifetimes.refresh_max);
        let renewed = lease
            .query(
                deadline,
                Sql::SessionsRenew,
                &[&id, &keep, &idle.as_secs_f64(), &max.as_secs_f64()],
            )
            .await?;
        let Some(row) = renewed.first() else {
            return Ok(None);
        };
        let kept = keep
            .zip(row.get("generation"))
            .map(|(id, generation)| SessionState {
                id,
                generation,
                epoch: row.get("epoch"),
                expires_in: row.get("expires_in"),
            });
        let ended = row.get("ended_ids");
        if keep.is_none() || kept.is_some() {
            lease.commit(deadline).await?;
        }
        Ok(Some(PasswordChange { user, ended, kept }))
    })
    .await
}

/// Deletes an account with everything of it. Gives the sessions that ended; `None` if the
/// password was changed meanwhile.
pub(crate) async fn delete(
    db: Queries<'_>,
    id: Uuid,
    verified: &str,
) -> Result<Option<Vec<Uuid>>, DbError> {
    let rows = db.write(Sql::UsersDelete, &[&id, &verified]).await?;
    Ok(rows.first().map(|row| row.get(0)))
}

/// A user out of the first four columns: id, e-mail, and the two times.
pub(super) fn user(row: &Row) -> User {
    User {
        id: row.get(0),
        email: row.get(1),
        created_at: Rfc3339(row.get(2)),
        updated_at: Rfc3339(row.get(3)),
    }
}
