//! `/api/v1/auth`: accounts and the tokens that stand for them.

use hyper::StatusCode;
use log::info;
use serde::Serialize;

use crate::auth::password::{check_length, normalize};
use crate::auth::throttle::client_network;
use crate::db::sessions::{self, Revocation, SessionState};
use crate::db::users::{self, LockoutKey, NewSession};
use crate::error::{Error, Refused};
use crate::guard::SignedIn;
use crate::labels::{LoginFailure, RevocationCause, TokenRejection};
use crate::model::{Email, User};
use crate::request::{Body, Call, Members};
use crate::response::{self, Response};

/// How often an attempt is checked because the hash changed while it was checked: once more for
/// another login that renewed it, and once to spare. A lockout that begins meanwhile shows as well.
const MAX_ATTEMPTS: usize = 3;

/// The token response of RFC 6749 section 5.1 with the user beside it.
#[derive(Serialize)]
struct Tokens<'a> {
    access_token: String,
    token_type: &'static str,
    expires_in: u64,
    refresh_token: String,
    refresh_expires_in: u64,
    user: &'a User,
}

/// `POST /api/v1/auth/register`
pub(crate) async fn register(call: &Call<'_>, body: Body<'_>) -> Result<Response, Error> {
    call.app.addresses.check(call.client)?;
    if !call.app.config.registration_open {
        return Err(Error::RegistrationClosed);
    }
    let mut members = body.object().await?;
    let email = members.text("/email");
    let email = members.parse("/email", email, Email::parse);
    let password = new_password(&mut members, "/password");
    let (email, password) = members.end_with(email.zip(password))?;
    let deadline = call.password_deadline();
    let hash = call
        .app
        .passwords
        .hash(password, email.as_str(), "/password", deadline)
        .await?;
    let user_agent = call.user_agent();
    let session = call.app.new_session(user_agent.as_deref(), call.client);
    let user = users::register(&call.app.database, deadline, &email, &hash, &session).await?;
    let user = user.ok_or(Error::EmailTaken)?;
    let response = tokens(call, StatusCode::CREATED, &user, session.state())?;
    Ok(response::located(response, "/api/v1/auth/me".into()))
}

/// `POST /api/v1/auth/login`
pub(crate) async fn login(call: &Call<'_>, body: Body<'_>) -> Result<Response, Error> {
    call.app.addresses.check(call.client)?;
    let mut members = body.object().await?;
    let credentials = members.text("/email").zip(members.text("/password"));
    let (email, password) = members.end_with(credentials)?;
    let Ok(email) = Email::parse(&email) else {
        // No account can have it, but the answer takes as long.
        let deadline = call.password_deadline();
        call.app.passwords.verify(&password, None, deadline).await?;
        return Err(Error::Unauthenticated(Refused::Credentials(
            LoginFailure::InvalidEmail,
        )));
    };
    call.email.get_or_init(|| email.clone());
    let user_agent = call.user_agent();
    let session = call.app.new_session(user_agent.as_deref(), call.client);
    let user = sign_in(call, &email, &password, &session).await?;
    call.app.metrics.count_login();
    tokens(call, StatusCode::OK, &user, session.state())
}

async fn sign_in(
    call: &Call<'_>,
    email: &Email,
    password: &str,
    session: &NewSession<'_>,
) -> Result<User, Error> {
    let database = &call.app.database;
    let deadline = call.password_deadline();
    let key = LockoutKey::login(email, session.network.clone());
    let _permit = call.app.login_slots.acquire(key.clone(), deadline).await?;
    for _ in 0..MAX_ATTEMPTS {
        let record = users::for_login(database, deadline, &key).await?;
        check_lockout(record.retry_after_secs)?;
        let hash = record.account.as_ref().map(|(_, hash)| hash.as_str());
        let verdict = call.app.passwords.verify(password, hash, deadline).await?;
        let reason = if hash.is_some() {
            LoginFailure::WrongPassword
        } else {
            LoginFailure::UnknownAccount
        };
        let Some((id, hash)) = record.account.filter(|_| verdict.right) else {
            check_lockout(users::record_failure(database, deadline, &key).await?)?;
            return Err(Error::Unauthenticated(Refused::Credentials(reason)));
        };
        let keep = verdict.renewed.as_deref().unwrap_or(&hash);
        if let Some((user, ended)) =
            sessions::sign_in(database, deadline, id, &hash, keep, session).await?
        {
            call.app.ended(RevocationCause::SessionLimit, &ended);
            return Ok(user);
        }
    }
    Err(Error::Unauthenticated(Refused::Credentials(
        LoginFailure::PasswordChangedConcurrently,
    )))
}

/// `POST /api/v1/auth/refresh`
pub(crate) async fn refresh(call: &Call<'_>, body: Body<'_>) -> Result<Response, Error> {
    call.app.addresses.check(call.client)?;
    let mut members = body.object().await?;
    let token = members.text("/refresh_token");
    let token = members.end_with(token)?;
    let refused = |reason| Error::Unauthenticated(Refused::RefreshToken(reason));
    let claims = call.app.tokens.verify_refresh(&token).map_err(refused)?;
    let (database, lifetimes) = (&call.app.database, call.app.config.lifetimes);
    let used = sessions::refresh(
        database,
        call.deadline(),
        claims.sid,
        claims.generation,
        lifetimes,
        &client_network(call.client).to_string(),
    )
    .await?;
    let Some((user, session)) = used else {
        // Either its session is over, or it was used before: then somebody else has it, too.
        if !sessions::end_reused(database, call.deadline(), claims.sid, claims.generation).await? {
            return Err(refused(TokenRejection::RevokedSession));
        }
        call.app
            .ended(RevocationCause::ReusedRefreshToken, &[claims.sid]);
        return Err(refused(TokenRejection::ReusedRefreshToken));
    };
    tokens(call, StatusCode::OK, &user, session)
}

/// `POST /api/v1/auth/logout`
pub(crate) async fn logout(call: &Call<'_>, body: Body<'_>) -> Result<Response, Error> {
    let refused = |reason| Error::Unauthenticated(Refused::AccessToken(reason));
    let database = &call.app.database;
    if let Some(token) = call.bearer_token().map_err(refused)? {
        let claims = call
            .app
            .tokens
            .verify_expired_access(token)
            .map_err(refused)?;
        if sessions::end(
            database,
            call.deadline(),
            claims.user_id,
            claims.sid,
            claims.epoch,
        )
        .await?
        {
            call.app.ended(RevocationCause::Logout, &[claims.sid]);
        }
        return Ok(response::no_content());
    }
    let mut members = body.object_if_any().await?.unwrap_or_else(Members::none);
    if !members.has("/refresh_token") {
        return Err(Error::Unauthenticated(Refused::MissingToken));
    }
    let token = members.text("/refresh_token");
    let token = members.end_with(token)?;
    // RFC 7009 section 2.2: a token that is none is as good as revoked.
    if let Ok(claims) = call.app.tokens.verify_refresh(&token)
        && sessions::end_by_refresh_token(database, call.deadline(), claims.sid, claims.generation)
            .await?
    {
        call.app.ended(RevocationCause::Logout, &[claims.sid]);
    }
    Ok(response::no_content())
}

/// `GET /api/v1/auth/me`
pub(crate) async fn me(call: &Call<'_>, user: SignedIn) -> Result<Response, Error> {
    let user = users::get(&call.app.database, call.deadline(), user.id).await?;
    response::json(StatusCode::OK, &user.ok_or_else(no_such_user)?)
}

/// `DELETE /api/v1/auth/me`
pub(crate) async fn delete_me(
    call: &Call<'_>,
    user: SignedIn,
    body: Body<'_>,
) -> Result<Response, Error> {
    let mut members = body.object().await?;
    let password = members.text("/password");
    let password = members.end_with(password)?;
    for _ in 0..MAX_ATTEMPTS {
        let (_, hash) = confirm(call, &user, &password).await?;
        let ended =
            users::delete(&call.app.database, call.password_deadline(), user.id, &hash).await?;
        if let Some(ended) = ended {
            call.app.ended(RevocationCause::AccountDeleted, &ended);
            info!("account deleted user_id={}", user.id);
            return Ok(response::no_content());
        }
    }
    Err(Error::WrongPassword)
}

/// `PUT /api/v1/auth/password`
pub(crate) async fn change_password(
    call: &Call<'_>,
    user: SignedIn,
    body: Body<'_>,
) -> Result<Response, Error> {
    call.app.addresses.check(call.client)?;
    let mut members = body.object().await?;
    let current = members.text("/current_password");
    let new = new_password(&mut members, "/new_password");
    let (current, new) = members.end_with(current.zip(new))?;
    let deadline = call.password_deadline();
    for _ in 0..MAX_ATTEMPTS {
        let (email, verified) = confirm(call, &user, &current).await?;
        let hash = call
            .app
            .passwords
            .hash(new.clone(), &email, "/new_password", deadline)
            .await?;
        let change = users::change_password(
            &call.app.database,
            deadline,
            user.id,
            &verified,
            &hash,
            Some(user.session),
            call.app.config.lifetimes,
        );
        if let Some(change) = change.await? {
            let over = Refused::AccessToken(TokenRejection::RevokedSession);
            let session = change.kept.ok_or(Error::Unauthenticated(over))?;
            call.app
                .ended(RevocationCause::PasswordChanged, &change.ended);
            call.app.revocations.insert([Revocation {
                session_id: session.id,
                before_epoch: session.epoch,
            }]);
            return tokens(call, StatusCode::OK, &change.user, session);
        }
    }
    Err(Error::WrongPassword)
}

/// Checks the password of a signed-in user; returns their address and the hash it was checked
/// against. Wrong ones have a count of their own, which nobody without a token can raise.
async fn confirm(
    call: &Call<'_>,
    user: &SignedIn,
    password: &str,
) -> Result<(String, String), Error> {
    let database = &call.app.database;
    let deadline = call.password_deadline();
    let key = LockoutKey::signed_in(user.id);
    let _permit = call.app.login_slots.acquire(key.clone(), deadline).await?;
    let check = users::for_password_check(database, deadline, user.id)
        .await?
        .ok_or_else(no_such_user)?;
    check_lockout(check.retry_after_secs)?;
    if !call
        .app
        .passwords
        .verify(password, Some(&check.hash), deadline)
        .await?
        .right
    {
        check_lockout(users::record_failure(database, deadline, &key).await?)?;
        return Err(Error::WrongPassword);
    }
    Ok((check.email, check.hash))
}

fn no_such_user() -> Error {
    Error::Unauthenticated(Refused::AccessToken(TokenRejection::NoSuchUser))
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
fn new_password(members: &mut Members, pointer: &'static str) -> Option<String> {
    let password = normalize(&members.text(pointer)?);
    match check_length(&password, pointer) {
        Ok(()) => Some(password),
        Err(fault) => {
            members.add(fault);
            None
        }
    }
}

fn tokens(
    call: &Call<'_>,
    status: StatusCode,
    user: &User,
    session: SessionState,
) -> Result<Response, Error> {
    let tokens = &call.app.tokens;
    let body = Tokens {
        access_token: tokens.issue_access(user, session.id, session.epoch)?,
        token_type: "bearer",
        expires_in: call.app.config.lifetimes.access.as_secs(),
        refresh_token: tokens.issue_refresh(session.id, session.generation)?,
        refresh_expires_in: session.expires_in.round() as u64,
        user,
    };
    response::json(status, &body)
}
