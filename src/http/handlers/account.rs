//! `/api/v1/auth/me` and `/api/v1/auth/password`: the signed-in user's account.

use hyper::StatusCode;
use log::info;

use crate::db::sessions::Revocation;
use crate::db::users;
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::handlers::auth::token_response;
use crate::http::handlers::credentials::{MAX_ATTEMPTS, new_password, verify_current_password};
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
    app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let password = fields.required_string("/password");
    let password = fields.finish_with(password)?;
    let db = context.password_queries();
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    for _ in 0..MAX_ATTEMPTS {
        let (_, hash) = verify_current_password(context, &user, &password).await?;
        if let Some(ended) = users::delete(db, user.id, &hash).await? {
            let reason = RevocationReason::AccountDeleted;
            app.record_revoked(reason, &ended);
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
    app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let current = fields.required_string("/current_password");
    let new = new_password(&mut fields, "/new_password");
    let (current, new) = fields.finish_with(current.zip(new))?;
    let (db, lifetimes) = (context.password_queries(), app.config.lifetimes);
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    for _ in 0..MAX_ATTEMPTS {
        let (email, verified) = verify_current_password(context, &user, &current).await?;
        let hash = app
            .passwords
            .hash(new.clone(), &email, context.hash_client())
            .await?;
        let keep = Some(user.session);
        let change = users::change_password(db, user.id, &verified, &hash, keep, false, lifetimes);
        if let Some(change) = change.await? {
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
