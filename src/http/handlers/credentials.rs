//! Verification of e-mail addresses and passwords, with lockout.

use crate::auth::password::{NewPassword, check_length, normalize};
use crate::config::EmailVerification;
use crate::db::sessions::{self, NewSession};
use crate::db::users::{self, LockoutKey, StoredAccount};
use crate::domain::{Email, User};
use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::json_fields::JsonFields;
use crate::http::middleware::AuthenticatedUser;
use crate::telemetry::labels::{LoginFailure, RevocationReason, TokenRejection};

/// The maximum number of verifications. A password is verified again if its hash changes meanwhile,
/// for example because another login rehashes it. Each attempt checks for a lockout first.
pub(super) const MAX_ATTEMPTS: usize = 3;

/// Verifies the credentials of a login and stores its session.
pub(super) async fn log_in(
    context: &RequestContext<'_>,
    email: &Email,
    password: &str,
    session: &NewSession,
) -> Result<User> {
    let app = context.app;
    let db = context.password_queries();
    let key = LockoutKey::login(email, session.network.clone());
    let is_required = app.config.email_verification == EmailVerification::Required;
    let _permit = app.login_slots.acquire(key.clone(), db.deadline()).await?;
    for _ in 0..MAX_ATTEMPTS {
        let record = users::for_login(db, &key).await?;
        check_lockout(record.retry_after_secs)?;
        let hash = record.account.as_ref().map(|account| &*account.hash);
        let client = context.hash_client();
        let verification = app.passwords.verify(password, hash, client).await?;
        let reason = match hash {
            Some(_) => LoginFailure::WrongPassword,
            None => LoginFailure::UnknownAccount,
        };
        let Some(account) = record.account.filter(|_| verification.matches) else {
            // Where verification is required, takes as long whether or not a registration waits for it.
            let pending = record.pending_hash.as_deref();
            if is_required || pending.is_some() {
                let verification = app.passwords.verify(password, pending, client).await?;
                if verification.matches {
                    return Err(Error::EmailUnverified);
                }
            }
            check_lockout(users::record_failure(db, &key).await?)?;
            return Err(Error::InvalidCredentials(reason));
        };
        if record.is_disabled {
            return Err(Error::AccountDisabled);
        }
        if is_required && !account.is_verified {
            return Err(Error::EmailUnverified);
        }
        let (id, hash) = (account.id, &account.hash);
        let new_hash = verification.rehashed.as_ref().unwrap_or(hash);
        if let Some((user, ended)) = sessions::login(db, id, hash, new_hash, session).await? {
            app.record_revoked(RevocationReason::SessionLimit, &ended);
            return Ok(user);
        }
    }
    let reason = LoginFailure::PasswordChangedConcurrently;
    Err(Error::InvalidCredentials(reason))
}

/// Verifies the password of a signed-in user, while the caller prevents concurrent account changes.
/// Returns the account with the verified hash.
///
/// Failures have a separate counter, which only requests with an access token increment.
pub(super) async fn verify_current_password(
    context: &RequestContext<'_>,
    user: &AuthenticatedUser,
    password: &str,
) -> Result<StoredAccount> {
    let app = context.app;
    let db = context.password_queries();
    let key = LockoutKey::authenticate(user.id);
    let check = users::for_password_check(db, user.id).await?;
    let deleted = Error::InvalidToken(TokenRejection::NoSuchUser);
    let (account, retry_after_secs) = check.ok_or(deleted)?;
    check_lockout(retry_after_secs)?;
    let (hash, client) = (account.hash.as_str(), context.hash_client());
    let verification = app.passwords.verify(password, Some(hash), client).await?;
    if !verification.matches {
        check_lockout(users::record_failure(db, &key).await?)?;
        return Err(Error::WrongPassword);
    }
    Ok(account)
}

fn check_lockout(retry_after_secs: f64) -> Result<()> {
    if retry_after_secs > 0.0 {
        return Err(Error::TooManyAttempts {
            retry_after: retry_after_secs.ceil() as u64,
            reason: LoginFailure::Throttled,
        });
    }
    Ok(())
}

/// Counts an attempt to authenticate, and reads the body of its request.
pub(super) async fn read_attempt(body: Body<'_>) -> Result<JsonFields> {
    body.context.app.count_attempt(body.context.client)?;
    body.json_object().await
}

/// Takes a new password of valid length. Its strength is checked when it is hashed.
pub(super) fn new_password(fields: &mut JsonFields, pointer: &'static str) -> Option<NewPassword> {
    let text = normalize(&fields.required_string(pointer)?);
    match check_length(&text, pointer) {
        Ok(()) => Some(NewPassword { text, pointer }),
        Err(error) => {
            fields.push_error(error);
            None
        }
    }
}
