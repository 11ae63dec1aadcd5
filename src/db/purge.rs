//! Rows that time has made useless go in small batches, in the wake of requests: a service that
//! nobody uses lets its database sleep.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use log::{debug, warn};
use tokio::time::{Instant, sleep};

use super::statements::Sql;
use super::{Database, DbError, Deadline, REQUEST_TIMEOUT};

const INTERVAL: Duration = Duration::from_secs(600);
/// As the statements under `sql/` have it.
const BATCH: u64 = 500;
/// Between batches: a sweep must not be felt.
const PAUSE: Duration = Duration::from_millis(50);

/// When the last sweep was, and whether one is under way.
#[derive(Default)]
pub(crate) struct Purger {
    last: Mutex<Option<Instant>>,
    sweeping: AtomicBool,
}

impl Purger {
    /// Whether a sweep is due; whoever is told so has to do it.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < INTERVAL)
            || self.sweeping.swap(true, Ordering::AcqRel)
        {
            return false;
        }
        *last = Some(Instant::now());
        true
    }

    /// Sweeps every table once through.
    pub(crate) async fn purge(&self, db: &Database) {
        if let Err(error) = purge_all(db).await {
            warn!("sweeping old rows failed, the next one is in ten minutes: {error:?}");
        }
        self.sweeping.store(false, Ordering::Release);
    }
}

async fn purge_all(db: &Database) -> Result<(), DbError> {
    let everything = [
        Sql::SessionsPurge,
        Sql::RevocationsPurge,
        Sql::LoginFailuresPurge,
        Sql::LoginNetworksPurge,
        Sql::IdempotencyKeysPurge,
    ];
    for sql in everything {
        loop {
            let gone = db
                .with_deadline(Deadline::after(REQUEST_TIMEOUT))
                .execute(sql, &[])
                .await?;
            if gone > 0 {
                debug!("swept {gone} rows: {sql:?}");
            }
            if gone < BATCH {
                break;
            }
            sleep(PAUSE).await;
        }
    }
    Ok(())
}
