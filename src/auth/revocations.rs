//! Revoked sessions whose access tokens may not have expired yet. Each instance caches the set and
//! refreshes it when requests need it: one small query about once a second, none when idle.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::auth::token::AccessClaims;
use crate::db::sessions::{self, Cursor, Revocation};
use crate::db::{AUTHENTICATION_TIMEOUT, Deadline, Queries};
use crate::domain::MAX_ACCESS_TTL;
use crate::error::Error;

/// A revocation takes effect on every instance within this time.
const MAX_AGE: Duration = Duration::from_secs(1);
/// The cache is refreshed in the background from this age on, so that no request waits for it as
/// long as the database responds within the rest.
const REFRESH_AFTER: Duration = Duration::from_millis(800);
/// An entry is kept until the last token it revokes has expired on every clock.
const KEEP: Duration = MAX_ACCESS_TTL.saturating_add(PRUNE_INTERVAL);
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);

/// The cached set.
#[derive(Default)]
pub(crate) struct Revocations {
    cache: RwLock<Cache>,
    /// Where the next refresh continues; whoever holds the lock refreshes for all.
    cursor: Mutex<Option<Cursor>>,
}

#[derive(Default)]
struct Cache {
    /// By session: the first epoch whose tokens are not revoked, and since when it is that one.
    /// Each refresh may bring an entry again.
    revoked: HashMap<Uuid, (i32, Instant)>,
    /// Everything that was committed before this instant is in the set.
    as_of: Option<Instant>,
    pruned_at: Option<Instant>,
}

impl Revocations {
    /// Whether an access token is revoked, as of one second before this call or later.
    pub(crate) async fn is_revoked(
        self: &Arc<Self>,
        db: Queries<'_>,
        claims: &AccessClaims,
    ) -> Result<bool, Error> {
        let now = Instant::now();
        if self.contains(claims) {
            return Ok(true);
        }
        if !self.is_older(now, MAX_AGE) {
            if self.is_older(now, REFRESH_AFTER) && self.cursor.try_lock().is_ok() {
                let (revocations, database) = (self.clone(), db.database().clone());
                // If it fails, the requests that follow wait for one of their own.
                tokio::spawn(async move {
                    let deadline = Deadline::after(AUTHENTICATION_TIMEOUT);
                    let db = database.with_deadline(deadline);
                    revocations.refresh(db, now, REFRESH_AFTER).await.ok();
                });
            }
            return Ok(false);
        }
        self.refresh(db, now, MAX_AGE).await?;
        Ok(self.contains(claims))
    }

    /// Adds what this instance itself has just revoked.
    pub(crate) fn insert(&self, revocations: impl IntoIterator<Item = Revocation>) {
        self.merge(revocations, None);
    }

    /// Reads what was revoked since the last refresh, unless another call has done so meanwhile.
    async fn refresh(&self, db: Queries<'_>, now: Instant, max_age: Duration) -> Result<(), Error> {
        let mut cursor = timeout_at(db.deadline().at(), self.cursor.lock())
            .await
            .map_err(|_| Error::DatabaseUnavailable("no revocations in time".into()))?;
        if self.is_older(now, max_age) {
            let as_of = Instant::now();
            let (revocations, next) = sessions::revoked_since(db, *cursor).await?;
            *cursor = next;
            self.merge(revocations, Some(as_of));
        }
        Ok(())
    }

    /// Whether the set was older than this at an instant.
    fn is_older(&self, now: Instant, max_age: Duration) -> bool {
        let cache = self.cache.read().unwrap_or_else(PoisonError::into_inner);
        let age = cache
            .as_of
            .map(|as_of| now.saturating_duration_since(as_of));
        age.is_none_or(|age| age >= max_age)
    }

    fn contains(&self, claims: &AccessClaims) -> bool {
        let cache = self.cache.read().unwrap_or_else(PoisonError::into_inner);
        let entry = cache.revoked.get(&claims.sid);
        entry.is_some_and(|(before_epoch, _)| claims.epoch < *before_epoch)
    }

    fn merge(&self, revocations: impl IntoIterator<Item = Revocation>, as_of: Option<Instant>) {
        let now = Instant::now();
        let mut cache = self.cache.write().unwrap_or_else(PoisonError::into_inner);
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
