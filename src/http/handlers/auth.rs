//! `/api/v1/auth`: accounts and the tokens that stand for them.

use hyper::StatusCode;
use log::info;
use serde::Serialize;

use crate::auth::login_limits::client_network;
use crate::auth::password::{check_length, normalize};
use crate::db::sessions::{self, Revocation, SessionState};
use crate::db::users::{self, LockoutKey, NewSession};
use crate::domain::{Email, User};
use crate::error::{AuthError, Error};
use crate::http::context::{Body, JsonFields, RequestContext};
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::{LoginFailure, RevocationReason, TokenRejection};

/// How often an attempt is checked because the hash changed while it was checked: once more for
/// another login that renewed it, and once to spare. A lockout that begins meanwhile shows as well.
const MAX_ATTEMPTS: usize = 3;

/// The token response of RFC 6749 section 5.1 with the user beside it.
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
pub(crate) async fn register(
    context: &RequestContext<'_>,
    body: Body<'_>,
) -> Result<Response, Error> {
    context.app.ip_limiter.check(context.client)?;
    if !context.app.config.registration_open {
        return Err(Error::RegistrationClosed);
    }
    let mut fields = body.json_object().await?;
    let email = fields.required_string("/email");
    let email = fields.parse("/email", email, Email::parse);
    let password = new_password(&mut fields, "/password");
    let (email, password) = fields.finish_with(email.zip(password))?;
    let deadline = context.password_deadline();
    let hash = context
        .app
        .passwords
        .hash(password, email.as_str(), "/password", deadline)
        .await?;
    let user_agent = context.user_agent();
    let session = context
        .app
        .new_session(user_agent.as_deref(), context.client);
    let user = users::register(context.password_queries(), &email, &hash, &session).await?;
    let user = user.ok_or(Error::EmailTaken)?;
    let response = tokens(context, StatusCode::CREATED, &user, session.state())?;
    Ok(response::with_location(response, "/api/v1/auth/me".into()))
}

/// `POST /api/v1/auth/login`
pub(crate) async fn login(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response, Error> {
    context.app.ip_limiter.check(context.client)?;
    let mut fields = body.json_object().await?;
    let credentials = fields
        .required_string("/email")
        .zip(fields.required_string("/password"));
    let (email, password) = fields.finish_with(credentials)?;
    let Ok(email) = Email::parse(&email) else {
        // No account can have it, but the answer takes as long.
        let deadline = context.password_deadline();
        context
            .app
            .passwords
            .verify(&password, None, deadline)
            .await?;
        return Err(Error::Unauthenticated(AuthError::Credentials(
            LoginFailure::InvalidEmail,
        )));
    };
    context.email.get_or_init(|| email.clone());
    let user_agent = context.user_agent();
    let session = context
        .app
        .new_session(user_agent.as_deref(), context.client);
    let user = sign_in(context, &email, &password, &session).await?;
    context.app.metrics.record_login();
    tokens(context, StatusCode::OK, &user, session.state())
}

async fn sign_in(
    context: &RequestContext<'_>,
    email: &Email,
    password: &str,
    session: &NewSession<'_>,
) -> Result<User, Error> {
    let deadline = context.password_deadline();
    let key = LockoutKey::login(email, session.network.clone());
    let _permit = context
        .app
        .login_slots
        .acquire(key.clone(), deadline)
        .await?;
    for _ in 0..MAX_ATTEMPTS {
        let record = users::for_login(context.password_queries(), &key).await?;
        check_lockout(record.retry_after_secs)?;
        let hash = record.account.as_ref().map(|(_, hash)| hash.as_str());
        let verdict = context
            .app
            .passwords
            .verify(password, hash, deadline)
            .await?;
        let reason = if hash.is_some() {
            LoginFailure::WrongPassword
        } else {
            LoginFailure::UnknownAccount
        };
        let Some((id, hash)) = record.account.filter(|_| verdict.matches) else {
            check_lockout(users::record_failure(context.password_queries(), &key).await?)?;
            return Err(Error::Unauthenticated(AuthError::Credentials(reason)));
        };
        let keep = verdict.rehashed.as_deref().unwrap_or(&hash);
        if let Some((user, ended)) =
            sessions::sign_in(context.password_queries(), id, &hash, keep, session).await?
        {
            context
                .app
                .record_revoked(RevocationReason::SessionLimit, &ended);
            return Ok(user);
        }
    }
    Err(Error::Unauthenticated(AuthError::Credentials(
        LoginFailure::PasswordChangedConcurrently,
    )))
}

/// `POST /api/v1/auth/refresh`
pub(crate) async fn refresh(
    context: &RequestContext<'_>,
    body: Body<'_>,
) -> Result<Response, Error> {
    context.app.ip_limiter.check(context.client)?;
    let mut fields = body.json_object().await?;
    let token = fields.required_string("/refresh_token");
    let token = fields.finish_with(token)?;
    let refused = |reason| Error::Unauthenticated(AuthError::RefreshToken(reason));
    let claims = context.app.tokens.verify_refresh(&token).map_err(refused)?;
    let lifetimes = context.app.config.lifetimes;
    let used = sessions::refresh(
        context.queries(),
        claims.sid,
        claims.generation,
        lifetimes,
        &client_network(context.client).to_string(),
    )
    .await?;
    let Some((user, session)) = used else {
        // Either its session is over, or it was used before: then somebody else has it, too.
        if !sessions::end_reused(context.queries(), claims.sid, claims.generation).await? {
            return Err(refused(TokenRejection::RevokedSession));
        }
        context
            .app
            .record_revoked(RevocationReason::ReusedRefreshToken, &[claims.sid]);
        return Err(refused(TokenRejection::ReusedRefreshToken));
    };
    tokens(context, StatusCode::OK, &user, session)
}

/// `POST /api/v1/auth/logout`
pub(crate) async fn logout(
    context: &RequestContext<'_>,
    body: Body<'_>,
) -> Result<Response, Error> {
    let refused = |reason| Error::Unauthenticated(AuthError::AccessToken(reason));
    if let Some(token) = context.bearer_token().map_err(refused)? {
        let claims = context
            .app
            .tokens
            .verify_expired_access(token)
            .map_err(refused)?;
        if sessions::end(context.queries(), claims.user_id, claims.sid, claims.epoch).await? {
            context
                .app
                .record_revoked(RevocationReason::Logout, &[claims.sid]);
        }
        return Ok(response::no_content());
    }
    let mut fields = body
        .optional_json_object()
        .await?
        .unwrap_or_else(JsonFields::empty);
    if !fields.contains("/refresh_token") {
        return Err(Error::Unauthenticated(AuthError::MissingToken));
    }
    let token = fields.required_string("/refresh_token");
    let token = fields.finish_with(token)?;
    // RFC 7009 section 2.2: a token that is none is as good as revoked.
    if let Ok(claims) = context.app.tokens.verify_refresh(&token)
        && sessions::end_by_refresh_token(context.queries(), claims.sid, claims.generation).await?
    {
        context
            .app
            .record_revoked(RevocationReason::Logout, &[claims.sid]);
    }
    Ok(response::no_content())
}

/// `GET /api/v1/auth/me`
pub(crate) async fn me(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    let user = users::get(context.queries(), user.id).await?;
    response::json(StatusCode::OK, &user.ok_or_else(no_such_user)?)
}

/// `DELETE /api/v1/auth/me`
pub(crate) async fn delete_me(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response, Error> {
    let mut fields = body.json_object().await?;
    let password = fields.required_string("/password");
    let password = fields.finish_with(password)?;
    for _ in 0..MAX_ATTEMPTS {
        let (_, hash) = verify_current_password(context, &user, &password).await?;
        let ended = users::delete(context.password_queries(), user.id, &hash).await?;
        if let Some(ended) = ended {
            context
                .app
                .record_revoked(RevocationReason::AccountDeleted, &ended);
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
) -> Result<Response, Error> {
    context.app.ip_limiter.check(context.client)?;
    let mut fields = body.json_object().await?;
    let current = fields.required_string("/current_password");
    let new = new_password(&mut fields, "/new_password");
    let (current, new) = fields.finish_with(current.zip(new))?;
    let deadline = context.password_deadline();
    for _ in 0..MAX_ATTEMPTS {
        let (email, verified) = verify_current_password(context, &user, &current).await?;
        let hash = context
            .app
            .passwords
            .hash(new.clone(), &email, "/new_password", deadline)
            .await?;
        let change = users::change_password(
            context.password_queries(),
            user.id,
            &verified,
            &hash,
            Some(user.session),
            context.app.config.lifetimes,
        );
        if let Some(change) = change.await? {
            let over = AuthError::AccessToken(TokenRejection::RevokedSession);
            let session = change.kept.ok_or(Error::Unauthenticated(over))?;
            context
                .app
                .record_revoked(RevocationReason::PasswordChanged, &change.ended);
            context.app.revocations.insert([Revocation {
                session_id: session.id,
                before_epoch: session.epoch,
            }]);
            return tokens(context, StatusCode::OK, &change.user, session);
        }
    }
    Err(Error::WrongPassword)
}

/// Checks the password of a signed-in user; returns their address and the hash it was checked
/// against. Wrong ones have a count of their own, which nobody without a token can raise.
async fn verify_current_password(
    context: &RequestContext<'_>,
    user: &AuthenticatedUser,
    password: &str,
) -> Result<(String, String), Error> {
    let deadline = context.password_deadline();
    let key = LockoutKey::authenticate(user.id);
    let _permit = context
        .app
        .login_slots
        .acquire(key.clone(), deadline)
        .await?;
    let check = users::for_password_check(context.password_queries(), user.id)
        .await?
        .ok_or_else(no_such_user)?;
    check_lockout(check.retry_after_secs)?;
    if !context
        .app
        .passwords
        .verify(password, Some(&check.hash), deadline)
        .await?
        .matches
    {
        check_lockout(users::record_failure(context.password_queries(), &key).await?)?;
        return Err(Error::WrongPassword);
    }
    Ok((check.email, check.hash))
}

fn no_such_user() -> Error {
    Error::Unauthenticated(AuthError::AccessToken(TokenRejection::NoSuchUser))
}

fn check_lockout(retry_after_secs: f64) -> Result<(), Error> {
    if retry_after_secs > 0.0 {
        return Err(Error::TooManyAttempts {
            retry_after: retry_after_secs.ceil() as u64,
            reason: LoginFailure::Throttled,
        });
    }
    Ok(())
}

/// A password that is to be kept, within the bounds; how guessable it is shows when it is hashed.
fn new_password(fields: &mut JsonFields, pointer: &'static str) -> Option<String> {
    let password = normalize(&fields.required_string(pointer)?);
    match check_length(&password, pointer) {
        Ok(()) => Some(password),
        Err(fault) => {
            fields.push_error(fault);
            None
        }
    }
}

fn tokens(
    context: &RequestContext<'_>,
    status: StatusCode,
    user: &User,
    session: SessionState,
) -> Result<Response, Error> {
    let tokens = &context.app.tokens;
    let body = TokenResponse {
        access_token: tokens.issue_access(user, session.id, session.epoch)?,
        token_type: "bearer",
        expires_in: context.app.config.lifetimes.access.as_secs(),
        refresh_token: tokens.issue_refresh(session.id, session.generation)?,
        refresh_expires_in: session.expires_in.round() as u64,
        user,
    };
    response::json(status, &body)
}
