//! Deletes expired rows in small batches after requests, so that an idle service lets its database
//! suspend.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{debug, warn};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::statements::Sql;
use super::{Database, Deadline, REQUEST_TIMEOUT, Result};

const INTERVAL: Duration = Duration::from_secs(600);
/// The limit in the statements.
const BATCH: u64 = 500;
/// Between batches, so that a purge does not slow down requests.
const PAUSE: Duration = Duration::from_millis(50);

/// When the last purge started, and whether it is still running.
#[derive(Default)]
pub(crate) struct Purger {
    last: Mutex<Option<Instant>>,
    running: AtomicBool,
}

impl Purger {
    /// Whether a purge is due. If so, the caller has to call `purge`.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.last.lock();
        if last.is_some_and(|last| last.elapsed() < INTERVAL)
            || self.running.swap(true, Ordering::AcqRel)
        {
            return false;
        }
        *last = Some(Instant::now());
        true
    }

    pub(crate) async fn purge(&self, database: &Database) {
        if let Err(error) = purge_all(database).await {
            warn!("purging expired rows failed, the next attempt is in ten minutes: {error:?}");
        }
        self.running.store(false, Ordering::Release);
    }
}

async fn purge_all(database: &Database) -> Result<()> {
    for sql in [
        Sql::SessionsPurge,
        Sql::RevocationsPurge,
        Sql::LoginFailuresPurge,
        Sql::LoginNetworksPurge,
        Sql::IdempotencyKeysPurge,
        Sql::DeletedTasksPurge,
    ] {
        loop {
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
