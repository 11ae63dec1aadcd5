//! Statements on sessions and on what ended of them.

use jiff::Timestamp;
use uuid::Uuid;

use super::statements::Sql;
use super::users::{NewSession, user};
use super::{Database, DbError, Deadline};
use crate::config::Lifetimes;
use crate::model::{Session, Time, User};

/// Makes a session for somebody whose password was verified, and keeps `hash` from now on;
/// `None` if the password was changed or the account deleted meanwhile.
pub(crate) async fn sign_in(
    db: &Database,
    deadline: Deadline,
    id: Uuid,
    verified: &str,
    hash: &str,
    session: &NewSession<'_>,
) -> Result<Option<User>, DbError> {
    let rows = db
        .write(
            deadline,
            Sql::SessionsSignIn,
            &[
                &id,
                &verified,
                &hash,
                &session.id,
                &session.idle,
                &session.user_agent,
            ],
        )
        .await?;
    Ok(rows.first().map(user))
}

/// Uses a refresh token of this generation. Gives whose it is and the seconds that the next one
/// is good for; `None` if it is not good any more.
pub(crate) async fn refresh(
    db: &Database,
    deadline: Deadline,
    id: Uuid,
    generation: i32,
    lifetimes: Lifetimes,
) -> Result<Option<(User, f64)>, DbError> {
    let rows = db
        .write(
            deadline,
            Sql::SessionsRefresh,
            &[
                &id,
                &generation,
                &lifetimes.refresh_grace.as_secs_f64(),
                &lifetimes.refresh_idle.as_secs_f64(),
                &lifetimes.refresh_max.as_secs_f64(),
            ],
        )
        .await?;
    Ok(rows.first().map(|row| (user(row), row.get(4))))
}

/// Ends the session of a refresh token that was used before; whether there was one.
pub(crate) async fn end_reused(
    db: &Database,
    deadline: Deadline,
    id: Uuid,
    generation: i32,
) -> Result<bool, DbError> {
    let rows = db
        .write(deadline, Sql::SessionsEndReused, &[&id, &generation])
        .await?;
    Ok(!rows.is_empty())
}

/// Ends the session that a refresh token belongs to; whether there was one.
pub(crate) async fn end_by_refresh_token(
    db: &Database,
    deadline: Deadline,
    id: Uuid,
) -> Result<bool, DbError> {
    let rows = db
        .write(deadline, Sql::SessionsEndByRefreshToken, &[&id])
        .await?;
    Ok(!rows.is_empty())
}

/// The sessions of a user that are alive, newest first.
pub(crate) async fn list(
    db: &Database,
    deadline: Deadline,
    user_id: Uuid,
    current: Uuid,
) -> Result<Vec<Session>, DbError> {
    let rows = db.read(deadline, Sql::SessionsList, &[&user_id]).await?;
    let session = |row: &tokio_postgres::Row| {
        let id = row.get(0);
        Session {
            id,
            user_agent: row.get(1),
            created_at: Time(row.get(2)),
            last_used_at: Time(row.get(3)),
            expires_at: Time(row.get(4)),
            current: id == current,
        }
    };
    Ok(rows.iter().map(session).collect())
}

/// Ends one session of a user; whether there was one.
pub(crate) async fn end(
    db: &Database,
    deadline: Deadline,
    user_id: Uuid,
    id: Uuid,
) -> Result<bool, DbError> {
    let rows = db
        .write(deadline, Sql::SessionsEnd, &[&user_id, &id])
        .await?;
    Ok(!rows.is_empty())
}

/// Ends every session of a user but one; gives those that ended.
pub(crate) async fn end_others(
    db: &Database,
    deadline: Deadline,
    user_id: Uuid,
    stays: Uuid,
) -> Result<Vec<Uuid>, DbError> {
    let rows = db
        .write(deadline, Sql::SessionsEndOthers, &[&user_id, &stays])
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What ended since the database's time `since`, and its time now.
pub(crate) async fn ended_since(
    db: &Database,
    deadline: Deadline,
    since: Option<Timestamp>,
) -> Result<(Vec<Uuid>, Option<Timestamp>), DbError> {
    let rows = db.read(deadline, Sql::RevocationsSince, &[&since]).await?;
    let ended = rows.iter().filter_map(|row| row.get(0)).collect();
    Ok((ended, rows.first().map(|row| row.get(1))))
}
