//! Statements on sessions and revocations.

use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use super::lease::Params;
use super::statements::Sql;
use super::{Queries, Result, user};
use crate::domain::{Rfc3339, Session, TokenLifetimes, User};

/// The state of a session as encoded in its tokens.
pub(crate) struct SessionState {
    pub(crate) id: Uuid,
    /// The generation of its newest refresh token.
    pub(crate) generation: i32,
    /// The first generation after the last password change, or 0 if there was none. Tokens of earlier
    /// generations are revoked.
    pub(crate) epoch: i32,
    /// Seconds until the session expires.
    pub(crate) expires_in: f64,
}

impl SessionState {
    pub(super) fn from_row(id: Uuid, row: &Row) -> Self {
        Self {
            id,
            generation: row.get("generation"),
            epoch: row.get("epoch"),
            expires_in: row.get("expires_in"),
        }
    }
}

pub(crate) struct NewSession {
    pub(crate) id: Uuid,
    /// Seconds of inactivity until the session expires.
    pub(crate) idle: f64,
    pub(crate) user_agent: Option<String>,
    /// The client's network, which is recorded for the account.
    pub(crate) network: String,
}

impl NewSession {
    /// The state of the session right after it is created.
    pub(crate) fn state(&self) -> SessionState {
        SessionState {
            id: self.id,
            generation: 1,
            epoch: 0,
            expires_in: self.idle,
        }
    }
}

/// A revocation of a session's tokens from before the given epoch.
pub(crate) struct Revocation {
    pub(crate) session_id: Uuid,
    pub(crate) before_epoch: i32,
}

/// Later than every epoch: revokes the whole session.
pub(crate) const ALL_EPOCHS: i32 = i32::MAX;

/// The oldest transaction that was open at the time of a read, and the start time of the server.
pub(crate) type Cursor = (i64, Timestamp);

/// Creates a session for a user whose password was verified against `verified`, and stores `hash`.
/// Returns the sessions that ended because the account had too many; `None` if the password was
/// changed, or the account deleted or disabled, concurrently.
pub(crate) async fn login(
    db: Queries<'_>,
    id: Uuid,
    verified: &str,
    hash: &str,
    session: &NewSession,
) -> Result<Option<(User, Vec<Uuid>)>> {
    let params: Params = &[
        &id,
        &verified,
        &hash,
        &session.id,
        &session.idle,
        &session.user_agent,
        &session.network,
    ];
    let rows = db.write(Sql::SessionsLogin, params).await?;
    Ok(rows.first().map(|row| (user(row), row.get("ended_ids"))))
}

/// Rotates a refresh token of this generation. Returns its user and the new state of the session,
/// or `None` if the token is no longer valid.
pub(crate) async fn refresh(
    db: Queries<'_>,
    id: Uuid,
    generation: i32,
    lifetimes: TokenLifetimes,
    network: &str,
) -> Result<Option<(User, SessionState)>> {
    let params: Params = &[
        &id,
        &generation,
        &lifetimes.refresh_grace.as_secs_f64(),
        &lifetimes.refresh_idle.as_secs_f64(),
        &lifetimes.refresh_max.as_secs_f64(),
        &network,
    ];
    let rows = db.write(Sql::SessionsRefresh, params).await?;
    let row = rows.first();
    Ok(row.map(|row| (user(row), SessionState::from_row(id, row))))
}

/// Ends the session of a refresh token that has already been used. Returns whether the session
/// existed.
pub(crate) async fn end_reused(db: Queries<'_>, id: Uuid, generation: i32) -> Result<bool> {
    let params: Params = &[&id, &generation];
    Ok(db.execute(Sql::SessionsEndReused, params).await? > 0)
}

/// Ends the session of a refresh token, unless the token belongs to an earlier epoch. Returns
/// whether a session ended.
pub(crate) async fn end_by_refresh_token(
    db: Queries<'_>,
    id: Uuid,
    generation: i32,
) -> Result<bool> {
    let params: Params = &[&id, &generation];
    Ok(db.execute(Sql::SessionsEndByRefreshToken, params).await? > 0)
}

/// Reads the active sessions of a user, newest first.
pub(crate) async fn list(db: Queries<'_>, user_id: Uuid, current: Uuid) -> Result<Vec<Session>> {
    let rows = db.read(Sql::SessionsList, &[&user_id]).await?;
    let session = |row: &Row| Session {
        id: row.get("id"),
        user_agent: row.get("user_agent"),
        created_at: Rfc3339(row.get("created_at")),
        last_used_at: Rfc3339(row.get("last_used_at")),
        expires_at: Rfc3339(row.get("expires_at")),
        current: row.get::<_, Uuid>("id") == current,
    };
    Ok(rows.iter().map(session).collect())
}

/// Ends one session of a user, unless its epoch is later than `epoch`. Returns whether it ended.
pub(crate) async fn end(db: Queries<'_>, user_id: Uuid, id: Uuid, epoch: i32) -> Result<bool> {
    let params: Params = &[&user_id, &id, &epoch];
    Ok(db.execute(Sql::SessionsEnd, params).await? > 0)
}

/// Ends every session of a user except `keep`, and returns the ended sessions.
pub(crate) async fn end_others(db: Queries<'_>, user_id: Uuid, keep: Uuid) -> Result<Vec<Uuid>> {
    let params: Params = &[&user_id, &keep];
    let rows = db.write(Sql::SessionsEndOthers, params).await?;
    Ok(rows.iter().map(|row| row.get("id")).collect())
}

/// Reads the revocations since an earlier read, and the cursor for the next read.
pub(crate) async fn revoked_since(
    db: Queries<'_>,
    since: Option<Cursor>,
) -> Result<(Vec<Revocation>, Option<Cursor>)> {
    let (cursor, server_started) = since.unzip();
    let params: Params = &[&cursor, &server_started];
    let rows = db.read(Sql::RevocationsSince, params).await?;
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
