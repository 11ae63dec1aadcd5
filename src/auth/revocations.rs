//! Revoked sessions whose access tokens may not have expired yet. Each instance caches the set and
//! refreshes it when requests need it: about one small query per second, none when idle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::db::sessions::{self, Cursor, Revocation};
use crate::db::{AUTHENTICATION_TIMEOUT, Deadline, Queries};
use crate::domain::MAX_ACCESS_TTL;
use crate::error::{Error, Result};

/// A revocation takes effect on every instance within this time.
const MAX_AGE: Duration = Duration::from_secs(1);
/// The age at which the cache is refreshed in the background, so that requests wait for it only if
/// the database takes longer than the remaining 200 ms.
const REFRESH_AFTER: Duration = Duration::from_millis(800);
/// Entries are kept until every token that they revoke has expired, even if clocks differ by the
/// prune interval.
const KEEP: Duration = MAX_ACCESS_TTL.saturating_add(PRUNE_INTERVAL);
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);

/// The cached set of revocations.
#[derive(Default)]
pub(crate) struct Revocations {
    cache: RwLock<Cache>,
    /// Where the next refresh continues. The task that holds the lock refreshes the cache for all.
    cursor: Mutex<Option<Cursor>>,
}

#[derive(Default)]
struct Cache {
    /// For each session, the first epoch whose tokens are not revoked, and when it was set. A
    /// refresh may return entries that are already known.
    revoked: HashMap<Uuid, (i32, Instant)>,
    /// The set contains everything that was committed before this instant.
    as_of: Option<Instant>,
    pruned_at: Option<Instant>,
}

impl Revocations {
    /// Whether tokens of this session and epoch are revoked, from a cache that is at most [`MAX_AGE`] old.
    pub(crate) async fn is_revoked(
        self: &Arc<Self>,
        db: Queries<'_>,
        session: Uuid,
        epoch: i32,
    ) -> Result<bool> {
        let now = Instant::now();
        if self.contains(session, epoch) {
            return Ok(true);
        }
        if !self.is_older(now, MAX_AGE) {
            if self.is_older(now, REFRESH_AFTER) && self.cursor.try_lock().is_ok() {
                let (revocations, database) = (self.clone(), db.database().clone());
                // If this fails, later requests refresh the cache themselves.
                tokio::spawn(async move {
                    let deadline = Deadline::after(AUTHENTICATION_TIMEOUT);
                    let db = database.with_deadline(deadline);
                    revocations.refresh(db, now, REFRESH_AFTER).await.ok();
                });
            }
            return Ok(false);
        }
        self.refresh(db, now, MAX_AGE).await?;
        Ok(self.contains(session, epoch))
    }

    /// Adds the revocations that this instance has just made.
    pub(crate) fn insert(&self, revocations: impl IntoIterator<Item = Revocation>) {
        self.merge(revocations, None);
    }

    /// Reads the revocations since the last refresh, unless another task has just done so.
    async fn refresh(&self, db: Queries<'_>, now: Instant, max_age: Duration) -> Result<()> {
        let mut cursor = timeout_at(db.deadline().at(), self.cursor.lock())
            .await
            .map_err(|_| Error::DatabaseUnavailable("timed out refreshing revocations".into()))?;
        if self.is_older(now, max_age) {
            let as_of = Instant::now();
            let (revocations, next) = sessions::revoked_since(db, *cursor).await?;
            *cursor = next;
            self.merge(revocations, Some(as_of));
        }
        Ok(())
    }

    /// Whether the cache was at least `max_age` old at `now`.
    fn is_older(&self, now: Instant, max_age: Duration) -> bool {
        let as_of = self.cache.read().as_of;
        as_of.is_none_or(|as_of| now.saturating_duration_since(as_of) >= max_age)
    }

    fn contains(&self, session: Uuid, epoch: i32) -> bool {
        let cache = self.cache.read();
        let entry = cache.revoked.get(&session);
        entry.is_some_and(|(before_epoch, _)| epoch < *before_epoch)
    }

    fn merge(&self, revocations: impl IntoIterator<Item = Revocation>, as_of: Option<Instant>) {
        let now = Instant::now();
        let mut cache = self.cache.write();
        for new in revocations {
            let entry = cache.revoked.entry(new.session_id).or_insert((0, now));
            if entry.0 < new.before_epoch {
                *entry = (new.before_epoch, now);
            }
        }
        cache.as_of = as_of.or(cache.as_of);
        if cache
            .pruned_at
            .is_none_or(|pruned_at| pruned_at.elapsed() > PRUNE_INTERVAL)
        {
            cache.revoked.retain(|_, (_, since)| since.elapsed() < KEEP);
            cache.pruned_at = Some(now);
        }
    }
}
