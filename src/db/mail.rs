//! Statements on addresses that are verified by mail: accounts, pending registrations and quotas.

use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::lease::Params;
use super::statements::Sql;
use super::users::{self, StoredAccount, stored_account};
use super::{Queries, Result};
use crate::domain::{Email, TokenLifetimes};

/// The result of verifying an address.
pub(crate) enum Verified {
    /// The address is verified, and these sessions have ended.
    Done(Vec<Uuid>),
    /// Another account has the address.
    Taken,
    /// The account was changed concurrently.
    Superseded,
}

/// Counts a mail to an address, known or not. Returns `None` if the address has used up its quota, and
/// otherwise its account, if there is one.
pub(crate) async fn count(db: Queries<'_>, email: &Email) -> Result<Option<Option<StoredAccount>>> {
    let params: Params = &[&email.as_str()];
    let rows = db.write(Sql::MailRequestsCount, params).await?;
    Ok(rows.first().map(stored_account))
}

/// Stores a registration until its address is verified, and replaces an earlier one.
pub(crate) async fn register(db: Queries<'_>, email: &Email, hash: &str) -> Result<()> {
    let params: Params = &[&Uuid::now_v7(), &email.as_str(), &hash];
    db.execute(Sql::PendingRegistrationsReplace, params).await?;
    Ok(())
}

/// Reads the account of a token. Returns `None` if it was deleted.
pub(crate) async fn get(db: Queries<'_>, id: Uuid) -> Result<Option<StoredAccount>> {
    let rows = db.read(Sql::UsersForMailToken, &[&id]).await?;
    Ok(rows.first().and_then(stored_account))
}

/// Turns a pending registration into an account with this password hash.
async fn confirm(db: Queries<'_>, pending: &StoredAccount, hash: &str) -> Result<Verified> {
    let params: Params = &[&pending.id, &pending.hash, &hash];
    let rows = db.write(Sql::PendingRegistrationsConfirm, params).await?;
    Ok(match rows.first().map(|row| row.get("is_created")) {
        Some(true) => Verified::Done(vec![]),
        Some(false) => Verified::Taken,
        None => Verified::Superseded,
    })
}

/// Replaces the password of an account or a pending registration, which verifies its address. Returns
/// the sessions that ended, or `None` if the account was changed concurrently.
pub(crate) async fn reset_password(
    db: Queries<'_>,
    account: &StoredAccount,
    hash: &str,
    lifetimes: TokenLifetimes,
) -> Result<Option<Vec<Uuid>>> {
    if account.is_pending {
        return Ok(match confirm(db, account, hash).await? {
            Verified::Done(ended) => Some(ended),
            Verified::Taken | Verified::Superseded => None,
        });
    }
    let (verified, email) = (Some(account.hash.as_str()), Some(account.email.as_str()));
    let change = users::change_password(db, account.id, verified, hash, None, email, lifetimes);
    Ok(change.await?.map(|change| change.ended))
}

/// Completes a pending registration, or sets the address of an account. If the address is another one,
/// ends every session except `keep`.
pub(crate) async fn verify_email(
    db: Queries<'_>,
    account: &StoredAccount,
    email: &str,
    keep: Option<Uuid>,
) -> Result<Verified> {
    if account.is_pending {
        return confirm(db, account, &account.hash).await;
    }
    let params: Params = &[&account.id, &account.email, &account.hash, &email, &keep];
    match db.write(Sql::UsersSetEmail, params).await {
        Ok(rows) => Ok(match rows.first() {
            Some(row) => Verified::Done(row.get("ended_ids")),
            None => Verified::Superseded,
        }),
        Err(error) if error.is(&SqlState::UNIQUE_VIOLATION) => Ok(Verified::Taken),
        Err(error) => Err(error),
    }
}
