//! Deletes expired rows in small batches after requests, so that an idle service lets its database
//! suspend.

use std::time::Duration;

use log::{debug, warn};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::statements::Sql;
use super::{Database, Deadline, REQUEST_TIMEOUT, Result};

const INTERVAL: Duration = Duration::from_secs(600);
/// The maximum number of rows that one statement deletes; repeated in the statements.
const BATCH: u64 = 500;
/// The pause between batches, so that a purge does not slow down requests.
const PAUSE: Duration = Duration::from_millis(50);

/// When the last batch was purged.
#[derive(Default)]
pub(crate) struct Purger(Mutex<Option<Instant>>);

impl Purger {
    /// Whether a purge is due. If so, the caller has to call `purge`.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.0.lock();
        let is_due = last.is_none_or(|last| last.elapsed() > INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }

    pub(crate) async fn purge(&self, database: &Database) {
        if let Err(error) = self.purge_all(database).await {
            warn!("cannot purge expired rows: {error:?}; the next attempt is in ten minutes");
        }
    }

    async fn purge_all(&self, database: &Database) -> Result<()> {
        for sql in [
            Sql::SessionsPurge,
            Sql::RevocationsPurge,
            Sql::LoginFailuresPurge,
            Sql::LoginNetworksPurge,
            Sql::IdempotencyKeysPurge,
            Sql::DeletedTasksPurge,
            Sql::MailRequestsPurge,
            Sql::PendingRegistrationsPurge,
        ] {
            loop {
                *self.0.lock() = Some(Instant::now());
                let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
                let deleted = db.execute(sql, &[]).await?;
                if deleted > 0 {
                    debug!("purged {deleted} rows: {sql:?}");
                }
                if deleted < BATCH {
                    break;
                }
                sleep(PAUSE).await;
            }
        }
        Ok(())
    }
}
