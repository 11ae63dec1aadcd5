//! `Prefer: wait=N` (RFC 7240): a request that waits until a list changes. A waiting request holds
//! only its connection to the client.

use std::time::Duration;

use tokio::time::Instant;

use crate::db::{ListWatcher, lists};
use crate::error::Error;
use crate::http::context::RequestContext;
use crate::http::middleware::{AuthenticatedUser, check_session};
use crate::http::response::{Response, with_preference_applied};

/// The maximum number of waiting requests of one user. Further requests do not wait.
const MAX_WAITS_PER_USER: usize = 4;
/// How often a waiting request checks its session. The check sees every revocation that is at least
/// one second old.
const SESSION_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a request may wait, and whether it has waited.
pub(crate) struct ListWait<'a> {
    context: &'a RequestContext<'a>,
    user: &'a AuthenticatedUser,
    /// 0 if the client does not ask to wait, or the operator does not allow it.
    seconds: u64,
    until: Instant,
    applied: bool,
}

impl<'a> ListWait<'a> {
    pub(crate) fn new(context: &'a RequestContext<'a>, user: &'a AuthenticatedUser) -> Self {
        let max = context.app.config.wait_max.into();
        let seconds = context.wait_preference().unwrap_or(0).min(max);
        Self {
            context,
            user,
            seconds,
            until: Instant::now() + Duration::from_secs(seconds),
            applied: false,
        }
    }

    /// Waits until the list has a later revision than `seen`. Returns false if the time passes
    /// first, if the request cannot wait, or if the service is shutting down.
    pub(crate) async fn wait_for_change(&mut self, seen: i64) -> Result<bool, Error> {
        let app = self.context.app;
        let started = Instant::now();
        if started >= self.until {
            return Ok(false);
        }
        let Some(watcher) = app.database.watch_list(self.user.id, MAX_WAITS_PER_USER) else {
            return Ok(false);
        };
        self.applied = true;
        let _waiting = app.metrics.waiting_request();
        let changed = tokio::select! {
            changed = self.watch(watcher, seen) => changed,
            () = app.shutdown.cancelled() => Ok(false),
        };
        self.context.record_wait(started.elapsed());
        changed
    }

    async fn watch(&self, mut watcher: ListWatcher<'_>, seen: i64) -> Result<bool, Error> {
        // The list may have changed before it was watched.
        let revision = lists::revision(self.context.queries(), self.user.id).await?;
        if revision != Some(seen) {
            return Ok(true);
        }
        loop {
            let next_check = self.until.min(Instant::now() + SESSION_CHECK_INTERVAL);
            let changed = watcher.wait_for_change(seen, next_check).await?;
            check_session(self.context.app, self.user).await?;
            if changed || next_check == self.until {
                return Ok(changed);
            }
        }
    }

    /// Tells the client if its preference was applied.
    pub(crate) fn apply(&self, response: Response) -> Response {
        match self.applied {
            true => with_preference_applied(response, format!("wait={}", self.seconds)),
            false => response,
        }
    }
}
