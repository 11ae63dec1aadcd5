//! Statements on addresses that are verified by mail: accounts, pending registrations and quotas.

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::lease::Params;
use super::retry::Repeat;
use super::statements::Sql;
use super::{Queries, Result};
use crate::domain::Email;

/// An account, or a registration that waits for its verification. The tokens in mails are bound to it.
pub(crate) struct MailAccount {
    pub(crate) id: Uuid,
    pub(crate) email: String,
    pub(crate) hash: String,
    pub(crate) is_verified: bool,
    pub(crate) is_pending: bool,
}

/// The result of verifying an address.
pub(crate) enum Verified {
    /// The address is verified, and these sessions have ended.
    Done(Vec<Uuid>),
    /// Another account has the address.
    Taken,
    /// The account was changed concurrently.
    Superseded,
}

/// Reads an account from a row. Returns `None` if the row stands for an unknown address.
fn mail_account(row: &Row) -> Option<MailAccount> {
    Some(MailAccount {
        id: row.get::<_, Option<Uuid>>("id")?,
        email: row.get("email"),
        hash: row.get("password_hash"),
        is_verified: row.get("email_verified"),
        is_pending: row.get("is_pending"),
    })
}

/// Counts a mail to an address, known or not. Returns `None` if the address has used up its quota, and
/// otherwise its account, if there is one.
pub(crate) async fn count(db: Queries<'_>, email: &Email) -> Result<Option<Option<MailAccount>>> {
    let params: Params = &[&email.as_str()];
    let rows = db.write(Sql::MailRequestsCount, params).await?;
    Ok(rows.first().map(mail_account))
}

/// Stores a registration until its address is verified, and replaces an earlier one.
pub(crate) async fn register(db: Queries<'_>, email: &Email, hash: &str) -> Result<()> {
    let params: Params = &[&Uuid::now_v7(), &email.as_str(), &hash];
    db.execute(Sql::PendingRegistrationsReplace, params).await?;
    Ok(())
}

/// Reads the account of a token. Returns `None` if it was deleted.
pub(crate) async fn get(db: Queries<'_>, id: Uuid) -> Result<Option<MailAccount>> {
    let rows = db.read(Sql::UsersForMailToken, &[&id]).await?;
    Ok(rows.first().and_then(mail_account))
}

/// Turns a pending registration into an account with this password hash.
pub(crate) async fn confirm(
    db: Queries<'_>,
    pending: &MailAccount,
    hash: &str,
) -> Result<Verified> {
    let params: Params = &[&pending.id, &pending.hash, &hash];
    let rows = db.write(Sql::PendingRegistrationsConfirm, params).await?;
    Ok(match rows.first().map(|row| row.get("is_created")) {
        Some(true) => Verified::Done(vec![]),
        Some(false) => Verified::Taken,
        None => Verified::Superseded,
    })
}

/// Sets the address of an account. If it is another one, ends every session except `keep` in the same
/// transaction, because their access tokens contain the earlier address.
pub(crate) async fn set_email(
    db: Queries<'_>,
    account: &MailAccount,
    email: &str,
    keep: Option<Uuid>,
) -> Result<Verified> {
    let deadline = db.deadline;
    db.run(Repeat::Never, |mut lease| async move {
        lease.begin(deadline).await?;
        let params: Params = &[&account.id, &account.email, &account.hash, &email];
        let changed = match lease.query(deadline, Sql::UsersSetEmail, params).await {
            Ok(rows) if rows.is_empty() => Verified::Superseded,
            Ok(_) if email == account.email => Verified::Done(vec![]),
            Ok(_) => {
                let params: Params = &[&account.id, &keep.unwrap_or_default()];
                let ended = lease.query(deadline, Sql::SessionsEndOthers, params);
                Verified::Done(ended.await?.iter().map(|row| row.get("id")).collect())
            }
            Err(error) if error.is(&SqlState::UNIQUE_VIOLATION) => Verified::Taken,
            Err(error) => return Err(error),
        };
        let commits = matches!(changed, Verified::Done(_));
        lease.end(deadline, commits).await?;
        Ok(changed)
    })
    .await
}
