//! Statements on sessions and on what ended of them.

use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use super::statements::Sql;
use super::users::{NewSession, user};
use super::{DbError, Queries};
use crate::domain::{Rfc3339, Session, TokenLifetimes, User};

/// What the tokens of a session are made from.
pub(crate) struct SessionState {
    pub(crate) id: Uuid,
    /// Of its newest refresh token.
    pub(crate) generation: i32,
    /// The generation that its last change of password started with, 0 without one.
    pub(crate) epoch: i32,
    /// Seconds until it idles out.
    pub(crate) expires_in: f64,
}

/// The tokens of a session that belong to epochs before this one are revoked.
pub(crate) struct Revocation {
    pub(crate) session_id: Uuid,
    pub(crate) before_epoch: i32,
}

/// After every epoch.
pub(crate) const ALL_EPOCHS: i32 = i32::MAX;

/// The oldest transaction that was open at a read, and when the server that said so had started.
pub(crate) type Cursor = (i64, Timestamp);

/// Makes a session for somebody whose password was verified, and keeps `hash` from now on. Returns
/// the sessions that ended for there are too many, too; `None` if the password was changed or the
/// account deleted meanwhile.
pub(crate) async fn sign_in(
    db: Queries<'_>,
    id: Uuid,
    verified: &str,
    hash: &str,
    session: &NewSession,
) -> Result<Option<(User, Vec<Uuid>)>, DbError> {
    let rows = db
        .write(
            Sql::SessionsSignIn,
            &[
                &id,
                &verified,
                &hash,
                &session.id,
                &session.idle,
                &session.user_agent,
                &session.network,
            ],
        )
        .await?;
    Ok(rows.first().map(|row| (user(row), row.get("ended_ids"))))
}

/// Uses a refresh token of this generation from this network. Returns whose it is and what the
/// next tokens are made from; `None` if it is not good any more.
pub(crate) async fn refresh(
    db: Queries<'_>,
    id: Uuid,
    generation: i32,
    lifetimes: TokenLifetimes,
    network: &str,
) -> Result<Option<(User, SessionState)>, DbError> {
    let rows = db
        .write(
            Sql::SessionsRefresh,
            &[
                &id,
                &generation,
                &lifetimes.refresh_grace.as_secs_f64(),
                &lifetimes.refresh_idle.as_secs_f64(),
                &lifetimes.refresh_max.as_secs_f64(),
                &network,
            ],
        )
        .await?;
    let state = |row: &Row| SessionState {
        id,
        generation: row.get("generation"),
        epoch: row.get("epoch"),
        expires_in: row.get("expires_in"),
    };
    Ok(rows.first().map(|row| (user(row), state(row))))
}

/// Ends the session of a refresh token that was used before; whether there was one.
pub(crate) async fn end_reused(
    db: Queries<'_>,
    id: Uuid,
    generation: i32,
) -> Result<bool, DbError> {
    let rows = db
        .write(Sql::SessionsEndReused, &[&id, &generation])
        .await?;
    Ok(!rows.is_empty())
}

/// Ends the session that a refresh token belongs to, unless the token is of an earlier epoch;
/// whether there was one.
pub(crate) async fn end_by_refresh_token(
    db: Queries<'_>,
    id: Uuid,
    generation: i32,
) -> Result<bool, DbError> {
    let rows = db
        .write(Sql::SessionsEndByRefreshToken, &[&id, &generation])
        .await?;
    Ok(!rows.is_empty())
}

/// The sessions of a user that are alive, newest first.
pub(crate) async fn list(
    db: Queries<'_>,
    user_id: Uuid,
    current: Uuid,
) -> Result<Vec<Session>, DbError> {
    let rows = db.read(Sql::SessionsList, &[&user_id]).await?;
    let session = |row: &Row| {
        let id = row.get(0);
        Session {
            id,
            user_agent: row.get(1),
            created_at: Rfc3339(row.get(2)),
            last_used_at: Rfc3339(row.get(3)),
            expires_at: Rfc3339(row.get(4)),
            current: id == current,
        }
    };
    Ok(rows.iter().map(session).collect())
}

/// Ends one session of a user, unless its tokens up to this epoch are revoked already; whether
/// there was one.
pub(crate) async fn end(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    epoch: i32,
) -> Result<bool, DbError> {
    let rows = db.write(Sql::SessionsEnd, &[&user_id, &id, &epoch]).await?;
    Ok(!rows.is_empty())
}

/// Ends every session of a user but one; gives those that ended.
pub(crate) async fn end_others(
    db: Queries<'_>,
    user_id: Uuid,
    stays: Uuid,
) -> Result<Vec<Uuid>, DbError> {
    let rows = db
        .write(Sql::SessionsEndOthers, &[&user_id, &stays])
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What was revoked since a read of this cursor, and the cursor for the next one.
pub(crate) async fn revoked_since(
    db: Queries<'_>,
    since: Option<Cursor>,
) -> Result<(Vec<Revocation>, Option<Cursor>), DbError> {
    let (cursor, server_started) = since.unzip();
    let rows = db
        .read(Sql::RevocationsSince, &[&cursor, &server_started])
        .await?;
    let revocation = |row: &Row| {
        Some(Revocation {
            session_id: row.get::<_, Option<Uuid>>("session_id")?,
            before_epoch: row.get("before_epoch"),
        })
    };
    let next = rows
        .first()
        .map(|row| (row.get("cursor"), row.get("server_started_at")));
    Ok((rows.iter().filter_map(revocation).collect(), next))
}
