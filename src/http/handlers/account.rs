//! `/api/v1/auth/me` and `/api/v1/auth/password`: the signed-in user's account.

use hyper::StatusCode;
use log::info;

use crate::db::sessions::Revocation;
use crate::db::users;
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::handlers::auth::token_response;
use crate::http::handlers::credentials::{
    MAX_ATTEMPTS, new_password, read_attempt, verify_current_password,
};
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::{RevocationReason, TokenRejection};

/// `GET /api/v1/auth/me`
pub(crate) async fn me(context: &RequestContext<'_>, user: AuthenticatedUser) -> Result<Response> {
    let user = users::get(context.queries(), user.id).await?;
    let user = user.ok_or(Error::InvalidToken(TokenRejection::NoSuchUser))?;
    response::json(StatusCode::OK, &user)
}

/// `DELETE /api/v1/auth/me`
pub(crate) async fn delete_me(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    let mut fields = read_attempt(body).await?;
    let password = fields.required_string("/password");
    let password = fields.finish_with(password)?;
    let db = context.password_queries();
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    for _ in 0..MAX_ATTEMPTS {
        let account = verify_current_password(context, &user, &password).await?;
        if let Some(ended) = users::delete(db, user.id, Some(&account.hash)).await? {
            app.record_revoked(RevocationReason::AccountDeleted, &ended);
            info!("account deleted user_id={}", user.id);
            return Ok(response::no_content());
        }
    }
    Err(Error::WrongPassword)
}

/// `PUT /api/v1/auth/password`
pub(crate) async fn change_password(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    let mut fields = read_attempt(body).await?;
    let current = fields.required_string("/current_password");
    let new = new_password(&mut fields, "/new_password");
    let (current, new) = fields.finish_with(current.zip(new))?;
    let (db, lifetimes) = (context.password_queries(), app.config.lifetimes);
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    for _ in 0..MAX_ATTEMPTS {
        let account = verify_current_password(context, &user, &current).await?;
        let (client, keep) = (context.hash_client(), Some(user.session));
        let hash = app.passwords.hash(new.clone(), &account.email, client);
        let (hash, verified) = (hash.await?, Some(account.hash.as_str()));
        let change = users::change_password(db, user.id, verified, &hash, keep, None, lifetimes);
        if let Some(change) = change.await.map_err(Error::from_non_idempotent)? {
            let ended = Error::InvalidToken(TokenRejection::RevokedSession);
            let session = change.kept.ok_or(ended)?;
            app.record_revoked(RevocationReason::PasswordChanged, &change.ended);
            app.revocations.insert([Revocation {
                session_id: session.id,
                before_epoch: session.epoch,
            }]);
            return token_response(context, StatusCode::OK, &change.user, session);
        }
    }
    Err(Error::WrongPassword)
}
