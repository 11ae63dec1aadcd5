//! `/api/v1/auth/password/…` and `/api/v1/auth/email`: forgotten passwords and addresses, by mail.
//!
//! No response reveals whether an address has an account.

use std::sync::Arc;

use hyper::StatusCode;
use log::info;
use uuid::Uuid;

use crate::config::EmailVerification;
use crate::db::mail::{self, MailAccount, Verified};
use crate::db::users;
use crate::domain::Email;
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::handlers::credentials::{MAX_ATTEMPTS, new_password, verify_current_password};
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::mail::{Mail, Mailer};
use crate::telemetry::labels::{RevocationReason, TokenRejection};

const SUPERSEDED: Error = Error::InvalidMailToken(TokenRejection::Superseded);

/// `POST /api/v1/auth/password/forgot`
pub(crate) async fn forgot_password(
    context: &RequestContext<'_>,
    mailer: &Arc<Mailer>,
    body: Body<'_>,
) -> Result<Response> {
    let account = read_recipient(context, body).await?;
    mailer.send(account.map(Mail::PasswordReset));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// `POST /api/v1/auth/email/resend`
pub(crate) async fn resend(
    context: &RequestContext<'_>,
    mailer: &Arc<Mailer>,
    body: Body<'_>,
) -> Result<Response> {
    let account = read_recipient(context, body).await?;
    let account = account.filter(|account| !account.is_verified);
    mailer.send(account.map(Mail::Verification));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// Reads an address from the body and counts a mail to it. Returns its account, if there is one and
/// the quota is not used up.
async fn read_recipient(
    context: &RequestContext<'_>,
    body: Body<'_>,
) -> Result<Option<MailAccount>> {
    context.app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let email = fields.required_string("/email");
    let email = fields.finish_with(email)?;
    match Email::parse(&email) {
        Ok(email) => Ok(mail::count(context.queries(), &email).await?.flatten()),
        // No account can have this address.
        Err(_) => Ok(None),
    }
}

/// `POST /api/v1/auth/password/reset`
pub(crate) async fn reset_password(
    context: &RequestContext<'_>,
    mailer: &Mailer,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let token = fields.required_string("/token");
    let password = new_password(&mut fields, "/new_password");
    let (token, password) = fields.finish_with(token.zip(password))?;
    let claims = mailer.tokens.verify_reset(&token)?;
    let db = context.password_queries();
    let _permit = app
        .account_changes
        .acquire(claims.sub, db.deadline())
        .await?;
    let account = mail::get(db, claims.sub).await?.ok_or(SUPERSEDED)?;
    claims.check(&account)?;
    let client = context.hash_client();
    let hash = app.passwords.hash(password, &account.email, client).await?;
    let ended = replace_password(context, &account, &hash).await?;
    app.record_revoked(RevocationReason::PasswordReset, &ended);
    info!("password reset user_id={}", account.id);
    Ok(response::no_content())
}

/// Stores the new password of an account or a pending registration. Returns the sessions that ended.
async fn replace_password(
    context: &RequestContext<'_>,
    account: &MailAccount,
    hash: &str,
) -> Result<Vec<Uuid>> {
    let db = context.password_queries();
    if account.is_pending {
        return match mail::confirm(db, account, hash).await? {
            Verified::Done(ended) => Ok(ended),
            Verified::Taken | Verified::Superseded => Err(SUPERSEDED),
        };
    }
    let lifetimes = context.app.config.lifetimes;
    let change = users::change_password(db, account.id, &account.hash, hash, None, true, lifetimes);
    Ok(change.await?.ok_or(SUPERSEDED)?.ended)
}

/// `PUT /api/v1/auth/email`
pub(crate) async fn change_email(
    context: &RequestContext<'_>,
    mailer: &Arc<Mailer>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let email = fields.required_string("/email");
    let email = fields.parse("/email", email, Email::parse);
    let password = fields.required_string("/password");
    let (email, password) = fields.finish_with(email.zip(password))?;
    let db = context.password_queries();
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    verify_current_password(context, &user, &password).await?;
    app.count_address_change(user.id)?;
    let account = mail::get(db, user.id).await?.ok_or(SUPERSEDED)?;
    let to = account.email.clone();
    let new = email.to_string();
    if mail::count(db, &email).await?.is_some() {
        let (email, session) = (new.clone(), user.session);
        mailer.send(Some(Mail::AddressChange {
            account,
            email,
            session,
        }));
    }
    mailer.send(Some(Mail::ChangeNotice { to, email: new }));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// `POST /api/v1/auth/email/verify`
pub(crate) async fn verify_email(
    context: &RequestContext<'_>,
    mailer: &Mailer,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    app.count_attempt(context.client)?;
    let mut fields = body.json_object().await?;
    let token = fields.required_string("/token");
    let token = fields.finish_with(token)?;
    let claims = mailer.tokens.verify_verification(&token)?;
    let db = context.queries();
    for _ in 0..MAX_ATTEMPTS {
        let account = mail::get(db, claims.sub).await?.ok_or(SUPERSEDED)?;
        // A repeated request succeeds.
        if account.is_verified && account.email == claims.email {
            return Ok(response::no_content());
        }
        claims.check(&account)?;
        let verified = match account.is_pending {
            true => mail::confirm(db, &account, &account.hash).await?,
            false => mail::set_email(db, &account, &claims.email, claims.sid).await?,
        };
        match verified {
            Verified::Done(ended) => {
                app.record_revoked(RevocationReason::EmailChanged, &ended);
                info!("address verified user_id={}", account.id);
                return Ok(response::no_content());
            }
            Verified::Taken => return Err(Error::EmailTaken),
            Verified::Superseded => {}
        }
    }
    Err(SUPERSEDED)
}

/// Stores a registration until its address is verified. The mail says whether there is an account.
pub(super) async fn register_pending(
    context: &RequestContext<'_>,
    mailer: &Arc<Mailer>,
    email: &Email,
    hash: &str,
) -> Result<Response> {
    let db = context.password_queries();
    mail::register(db, email, hash).await?;
    let registered = mail::count(db, email).await?.flatten();
    mailer.send(registered.map(|account| match account.is_pending {
        true => Mail::Verification(account),
        false => Mail::AlreadyRegistered { to: account.email },
    }));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// Sends the mail that verifies the address of a new account. The account exists whether or not the
/// mail can be sent.
pub(super) async fn send_verification(context: &RequestContext<'_>, email: &Email) {
    let app = context.app;
    let is_on = app.config.email_verification == EmailVerification::Optional;
    if let Some(mailer) = app.mail.as_ref().filter(|_| is_on)
        && let Ok(Some(Some(account))) = mail::count(context.password_queries(), email).await
    {
        mailer.send(Some(Mail::Verification(account)));
    }
}
