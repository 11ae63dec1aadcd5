//! `/api/v1/auth`: registration, login, refresh and logout.

use hyper::StatusCode;
use serde::Serialize;
use uuid::Uuid;

use crate::config::EmailVerification;
use crate::db::sessions::{self, SessionState};
use crate::db::users;
use crate::domain::{Email, User};
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::handlers::credentials::{log_in, new_password, read_attempt};
use crate::http::handlers::mail::{register_pending, send_verification};
use crate::http::response::{self, Response};
use crate::telemetry::labels::{LoginFailure, RevocationReason, TokenRejection};

/// The token response of RFC 6749 section 5.1, with the user added.
#[derive(Serialize)]
struct TokenResponse<'a> {
    access_token: String,
    token_type: &'static str,
    expires_in: u64,
    refresh_token: String,
    refresh_expires_in: u64,
    user: &'a User,
}

/// `POST /api/v1/auth/register`
pub(crate) async fn register(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response> {
    let app = context.app;
    if !app.config.registration_open {
        return Err(Error::RegistrationClosed);
    }
    let mut fields = read_attempt(body).await?;
    let email = fields.required_string("/email");
    let email = fields.parse("/email", email, Email::parse);
    let password = new_password(&mut fields, "/password");
    let (email, password) = fields.finish_with(email.zip(password))?;
    let db = context.password_queries();
    let hash = app
        .passwords
        .hash(password, email.as_str(), context.hash_client());
    let hash = hash.await?;
    if let Some(mailer) = &app.mail
        && app.config.email_verification == EmailVerification::Required
    {
        return register_pending(context, mailer, &email, &hash).await;
    }
    let session = context.new_session();
    let user = users::register(db, &email, &hash, &session).await?;
    let user = user.ok_or(Error::EmailTaken)?;
    send_verification(context, &email).await;
    let response = token_response(context, StatusCode::CREATED, &user, session.state())?;
    Ok(response::with_location(response, "/api/v1/auth/me".into()))
}

/// `POST /api/v1/auth/login`
pub(crate) async fn login(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response> {
    let app = context.app;
    let mut fields = read_attempt(body).await?;
    let email = fields.required_string("/email");
    let password = fields.required_string("/password");
    let (email, password) = fields.finish_with(email.zip(password))?;
    let Ok(email) = Email::parse(&email) else {
        // No account can have this address, but the response must take as long as for others.
        let client = context.hash_client();
        app.passwords.verify(&password, None, client).await?;
        return Err(Error::InvalidCredentials(LoginFailure::InvalidEmail));
    };
    context.email.get_or_init(|| email.clone());
    let session = context.new_session();
    let user = log_in(context, &email, &password, &session).await?;
    app.metrics.record_login();
    token_response(context, StatusCode::OK, &user, session.state())
}

/// `POST /api/v1/auth/refresh`
pub(crate) async fn refresh(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response> {
    let app = context.app;
    let mut fields = read_attempt(body).await?;
    let token = fields.required_string("/refresh_token");
    let token = fields.finish_with(token)?;
    let claims = app.tokens.verify_refresh(&token);
    let claims = claims.map_err(Error::InvalidRefreshToken)?;
    let (db, lifetimes) = (context.queries(), app.config.lifetimes);
    let network = context.network().to_string();
    let refreshed =
        sessions::refresh(db, claims.sid, claims.generation, lifetimes, &network).await?;
    if let Some((user, session)) = refreshed {
        return token_response(context, StatusCode::OK, &user, session);
    }
    // Either the session has ended, or the token was used before and may have been stolen.
    if !sessions::end_reused(db, claims.sid, claims.generation).await? {
        return Err(Error::InvalidRefreshToken(TokenRejection::RevokedSession));
    }
    app.record_revoked(RevocationReason::ReusedRefreshToken, &[claims.sid]);
    let reason = TokenRejection::ReusedRefreshToken;
    Err(Error::InvalidRefreshToken(reason))
}

/// `POST /api/v1/auth/logout`
pub(crate) async fn logout(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response> {
    let ended = match context.bearer_token()? {
        Some(token) => end_by_access_token(context, token).await?,
        None => end_by_refresh_token(context, body).await?,
    };
    if let Some(session) = ended {
        let reason = RevocationReason::Logout;
        context.app.record_revoked(reason, &[session]);
    }
    Ok(response::no_content())
}

/// Ends the session of an access token, which may have expired. Returns the session unless it had
/// already ended.
async fn end_by_access_token(context: &RequestContext<'_>, token: &str) -> Result<Option<Uuid>> {
    let claims = context.app.tokens.verify_expired_access(token)?;
    let (user_id, sid, epoch) = (claims.user_id, claims.sid, claims.epoch);
    let ended = sessions::end(context.queries(), user_id, sid, epoch).await?;
    Ok(ended.then_some(sid))
}

/// Ends the session of the refresh token in the body. Returns the session unless it had already
/// ended.
async fn end_by_refresh_token(
    context: &RequestContext<'_>,
    body: Body<'_>,
) -> Result<Option<Uuid>> {
    let mut fields = body.optional_json_object().await?;
    if !fields.contains("/refresh_token") {
        return Err(Error::MissingToken);
    }
    let token = fields.required_string("/refresh_token");
    let token = fields.finish_with(token)?;
    // RFC 7009 section 2.2: an invalid token counts as revoked.
    let Ok(claims) = context.app.tokens.verify_refresh(&token) else {
        return Ok(None);
    };
    let (sid, generation) = (claims.sid, claims.generation);
    let ended = sessions::end_by_refresh_token(context.queries(), sid, generation).await?;
    Ok(ended.then_some(sid))
}

/// Responds with new tokens of a session.
pub(super) fn token_response(
    context: &RequestContext<'_>,
    status: StatusCode,
    user: &User,
    session: SessionState,
) -> Result<Response> {
    let issuer = &context.app.tokens;
    let body = TokenResponse {
        access_token: issuer.issue_access(user, session.id, session.epoch)?,
        token_type: "bearer",
        expires_in: context.app.config.lifetimes.access.as_secs(),
        refresh_token: issuer.issue_refresh(session.id, session.generation)?,
        refresh_expires_in: session.expires_in.round() as u64,
        user,
    };
    response::json(status, &body)
}
