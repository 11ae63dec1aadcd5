//! Sessions that ended while an access token of them may still be alive. Each instance keeps the
//! set in memory and brings it up to date when a request needs it: one small query a second at
//! most, none when nobody asks.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::db::{Database, Deadline, sessions};
use crate::error::Error;

/// An ended session is refused everywhere within this time.
const MAX_AGE: Duration = Duration::from_secs(1);

/// The set.
pub(crate) struct Revocations {
    known: RwLock<Known>,
    /// The database's time when it was last asked; its lock lets one request ask for all.
    asked: Mutex<Option<Timestamp>>,
    keep: Duration,
}

#[derive(Default)]
struct Known {
    /// When we heard of it: it is forgotten when the longest access token has run out.
    ended: HashMap<Uuid, Instant>,
    /// Every end before this instant is in the set.
    as_of: Option<Instant>,
    pruned: Option<Instant>,
}

impl Revocations {
    /// An empty set that has to ask before its first answer; `keep` is an access token's life.
    pub(crate) fn new(keep: Duration) -> Self {
        Self {
            known: RwLock::default(),
            asked: Mutex::new(None),
            keep,
        }
    }

    /// Whether a session has ended, as of a second ago at most.
    pub(crate) async fn has_ended(
        &self,
        db: &Database,
        deadline: Deadline,
        session: Uuid,
    ) -> Result<bool, Error> {
        if let Some(ended) = self.look_up(session) {
            return Ok(ended);
        }
        let waiting = timeout_at(deadline.at(), self.asked.lock()).await;
        let mut asked = waiting
            .map_err(|_| Error::DatabaseUnavailable("no word on ended sessions in time".into()))?;
        // Whoever held the lock before may have asked for us, too.
        if let Some(ended) = self.look_up(session) {
            return Ok(ended);
        }
        let asking = Instant::now();
        let (ended, now) = sessions::ended_since(db, deadline, *asked).await?;
        *asked = now;
        self.learn(&ended, Some(asking));
        Ok(ended.contains(&session) || self.look_up(session).unwrap_or(false))
    }

    /// Notes sessions that this instance itself has just ended.
    pub(crate) fn note(&self, ended: &[Uuid]) {
        self.learn(ended, None);
    }

    /// `None` where the set is too old to say.
    fn look_up(&self, session: Uuid) -> Option<bool> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.ended.contains_key(&session) {
            return Some(true);
        }
        known
            .as_of
            .filter(|as_of| as_of.elapsed() < MAX_AGE)
            .map(|_| false)
    }

    fn learn(&self, ended: &[Uuid], as_of: Option<Instant>) {
        let now = Instant::now();
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for session in ended {
            known.ended.entry(*session).or_insert(now);
        }
        known.as_of = as_of.or(known.as_of);
        // Once a minute is often enough to forget, and seldom enough not to be felt.
        if known
            .pruned
            .is_none_or(|pruned| pruned.elapsed() > Duration::from_secs(60))
        {
            let keep = self.keep + Duration::from_secs(60);
            known.ended.retain(|_, heard| heard.elapsed() < keep);
            known.pruned = Some(now);
        }
    }
}
