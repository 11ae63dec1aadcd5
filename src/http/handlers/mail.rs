//! `/api/v1/auth/password/…` and `/api/v1/auth/email`: forgotten passwords and addresses, by mail.
//!
//! No response reveals whether an address has an account.

use std::sync::Arc;

use hyper::StatusCode;
use log::info;

use crate::config::EmailVerification;
use crate::db::mail::{self, Verified};
use crate::db::users::StoredAccount;
use crate::domain::Email;
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::handlers::credentials::{
    MAX_ATTEMPTS, new_password, read_attempt, verify_current_password,
};
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::mail::{Mail, Mailer};
use crate::telemetry::labels::{MailOutcome, RevocationReason, TokenRejection};

const SUPERSEDED: Error = Error::InvalidMailToken(TokenRejection::Superseded);

/// `POST /api/v1/auth/password/forgot`
pub(crate) async fn forgot_password(mailer: &Arc<Mailer>, body: Body<'_>) -> Result<Response> {
    let account = read_recipient(body).await?;
    mailer.send(account.map(Mail::PasswordReset));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// `POST /api/v1/auth/email/resend`
pub(crate) async fn resend(mailer: &Arc<Mailer>, body: Body<'_>) -> Result<Response> {
    let account = read_recipient(body).await?;
    let account = account.filter(|account| !account.is_verified);
    mailer.send(account.map(Mail::Verification));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// Reads an address from the body and counts a mail to it. Returns its account, if there is one and
/// the quota is not used up.
async fn read_recipient(body: Body<'_>) -> Result<Option<StoredAccount>> {
    let context = body.context;
    let mut fields = read_attempt(body).await?;
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
    let (app, lifetimes) = (context.app, context.app.config.lifetimes);
    let mut fields = read_attempt(body).await?;
    let token = fields.required_string("/token");
    let password = new_password(&mut fields, "/new_password");
    let (token, password) = fields.finish_with(token.zip(password))?;
    let claims = mailer.tokens.reset.verify(&token)?;
    let db = context.password_queries();
    let permit = app.account_changes.acquire(claims.sub, db.deadline());
    let _permit = permit.await?;
    let account = mail::get(db, claims.sub).await?.ok_or(SUPERSEDED)?;
    claims.check(&account)?;
    let client = context.hash_client();
    let hash = app.passwords.hash(password, &account.email, client).await?;
    let ended = mail::reset_password(db, &account, &hash, lifetimes).await;
    let ended = ended.map_err(Error::from_non_idempotent)?;
    app.record_revoked(RevocationReason::PasswordReset, &ended.ok_or(SUPERSEDED)?);
    info!("password reset user_id={}", account.id);
    Ok(response::no_content())
}

/// `PUT /api/v1/auth/email`
pub(crate) async fn change_email(
    context: &RequestContext<'_>,
    mailer: &Arc<Mailer>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response> {
    let app = context.app;
    let mut fields = read_attempt(body).await?;
    let email = fields.required_string("/email");
    let email = fields.parse("/email", email, Email::parse);
    let password = fields.required_string("/password");
    let (email, password) = fields.finish_with(email.zip(password))?;
    let db = context.password_queries();
    let _permit = app.account_changes.acquire(user.id, db.deadline()).await?;
    let account = verify_current_password(context, &user, &password).await?;
    app.count_address_change(user.id)?;
    let is_allowed = mail::count(db, &email).await?.is_some();
    mailer.send(Some(Mail::ChangeNotice(account.email.clone())));
    mailer.send(is_allowed.then(|| Mail::AddressChange {
        account,
        email: email.to_string(),
        session: user.session,
    }));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// `POST /api/v1/auth/email/verify`
pub(crate) async fn verify_email(
    context: &RequestContext<'_>,
    mailer: &Mailer,
    body: Body<'_>,
) -> Result<Response> {
    let mut fields = read_attempt(body).await?;
    let token = fields.required_string("/token");
    let token = fields.finish_with(token)?;
    let claims = mailer.tokens.verification.verify(&token)?;
    let db = context.queries();
    for _ in 0..MAX_ATTEMPTS {
        let account = mail::get(db, claims.sub).await?.ok_or(SUPERSEDED)?;
        // A repeated request succeeds.
        if account.is_verified && account.email == claims.email {
            return Ok(response::no_content());
        }
        claims.check(&account)?;
        match mail::verify_email(db, &account, &claims.email, claims.sid).await? {
            Verified::Done(ended) => {
                let reason = RevocationReason::EmailChanged;
                context.app.record_revoked(reason, &ended);
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
        false => Mail::AlreadyRegistered(account.email),
    }));
    Ok(response::empty(StatusCode::ACCEPTED))
}

/// Sends the mail that verifies the address of a new account. The account exists whether or not the
/// mail can be sent.
pub(super) async fn send_verification(context: &RequestContext<'_>, email: &Email) {
    let app = context.app;
    let is_on = app.config.email_verification == EmailVerification::Optional;
    let Some(mailer) = app.mail.as_ref().filter(|_| is_on) else {
        return;
    };
    match mail::count(context.password_queries(), email).await {
        Ok(account) => mailer.send(account.flatten().map(Mail::Verification)),
        Err(error) => mailer.give_up(MailOutcome::Uncounted, &error.to_string(), 0),
    }
}
