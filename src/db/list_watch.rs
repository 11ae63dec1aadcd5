//! Requests that wait until a list changes. A change made by this instance wakes them immediately.
//! While lists are watched, one query a second finds the changes made by other instances.

use std::collections::HashMap;
use std::time::Duration;

use log::debug;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::Row;
use uuid::Uuid;

use super::statements::Sql;
use super::{Database, DbError, Deadline, Queries, REQUEST_TIMEOUT, Result};

const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The watched lists: the highest known revision of each, which its watchers receive.
#[derive(Default)]
pub(super) struct WatchedLists(Mutex<Lists>);

#[derive(Default)]
struct Lists {
    revisions: HashMap<Uuid, watch::Sender<i64>>,
    is_polling: bool,
}

impl WatchedLists {
    /// Notifies the watchers of a list of its new revision.
    pub(super) fn record(&self, user_id: Uuid, revision: i64) {
        if let Some(sender) = self.0.lock().revisions.get(&user_id) {
            sender.send_if_modified(|known| {
                let is_newer = *known < revision;
                *known = revision.max(*known);
                is_newer
            });
        }
    }

    /// Removes the lists without watchers and returns the others. If none are left, polling stops
    /// until there is a watcher again.
    fn to_poll(&self) -> Vec<Uuid> {
        let mut lists = self.0.lock();
        lists
            .revisions
            .retain(|_, sender| sender.receiver_count() > 0);
        lists.is_polling = !lists.revisions.is_empty();
        lists.revisions.keys().copied().collect()
    }
}

impl Queries<'_> {
    /// Wakes the watchers of a list after a write whose row has the column `revision`, which is null
    /// if nothing was changed.
    pub(super) fn record_revision(self, user_id: Uuid, rows: &[Row]) {
        let revision = rows.first().and_then(|row| row.get("revision"));
        if let Some(revision) = revision {
            self.database.watched_lists.record(user_id, revision);
        }
    }
}

/// A watcher of one list, which stops watching when it is dropped.
pub(crate) struct ListWatcher<'a> {
    database: &'a Database,
    revision: watch::Receiver<i64>,
}

impl Database {
    /// Watches a list, unless it has `max` watchers already. The watcher sees changes made after
    /// this call.
    pub(crate) fn watch_list(&self, user_id: Uuid, max: usize) -> Option<ListWatcher<'_>> {
        let mut lists = self.watched_lists.0.lock();
        let sender = lists.revisions.entry(user_id).or_default();
        if sender.receiver_count() >= max {
            return None;
        }
        let revision = sender.subscribe();
        if !std::mem::replace(&mut lists.is_polling, true) {
            tokio::spawn(poll(self.clone()));
        }
        Some(ListWatcher {
            database: self,
            revision,
        })
    }
}

impl ListWatcher<'_> {
    /// Waits until the list has a later revision than `seen`; returns false if `until` passes
    /// first. Fails if the database goes down.
    pub(crate) async fn wait_for_change(&mut self, seen: i64, until: Instant) -> Result<bool> {
        let health = &self.database.connections.health;
        let changed = self.revision.wait_for(|revision| *revision > seen);
        match health.while_up(timeout_at(until, changed)).await {
            Some(changed) => Ok(changed.is_ok()),
            None => Err(DbError::Unavailable("the database went down".into())),
        }
    }
}

/// Reads the revisions of all watched lists once a second, until there are none.
async fn poll(database: Database) {
    loop {
        sleep(POLL_INTERVAL).await;
        let user_ids = database.watched_lists.to_poll();
        if user_ids.is_empty() {
            return;
        }
        let db = database.with_deadline(Deadline::after(REQUEST_TIMEOUT));
        match db.read(Sql::TaskListsRevisions, &[&user_ids]).await {
            Ok(rows) => {
                for row in rows {
                    let (user_id, revision) = (row.get("user_id"), row.get("revision"));
                    database.watched_lists.record(user_id, revision);
                }
            }
            // If the database is down, `Health` notifies the watchers.
            Err(error) => debug!("cannot read the revisions of watched lists: {error}"),
        }
    }
}
