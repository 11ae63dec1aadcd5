//! `/api/v1/{user_id}/changes`: changes of the signed-in user's list of tasks.

use uuid::Uuid;

use crate::auth::list_signer::ChangesCursor;
use crate::db::Queries;
use crate::db::lists::{self, Change, Changes, Position};
use crate::error::Error;
use crate::http::context::RequestContext;
use crate::http::handlers::page::{MAX_PAGE_BYTES, parse_limit};
use crate::http::large_responses::ResponseBody;
use crate::http::list_wait::ListWait;
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::TokenRejection;

/// The maximum number of changes that one statement reads. Limits the memory for a long page.
const MAX_READ: i64 = 100;

/// `GET /api/v1/{user_id}/changes`
pub(crate) async fn list(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    let app = context.app;
    let (since, limit) = parse_params(context, user.id)?;
    let mut wait = ListWait::new(context, &user);
    let (mut page, permit) = loop {
        let read = || async {
            let mut page = Page::new(since, limit);
            page.append(context.queries(), user.id).await?;
            Ok(page)
        };
        let (page, permit) = app
            .large_responses
            .read(user.id, context.network(), context.deadline(), read)
            .await?;
        if page.room < limit || !wait.wait_for_change(page.revision).await? {
            break (page, permit);
        }
    };
    while page.goes_on() {
        page.append(context.queries(), user.id).await?;
    }
    let cursor = app.list_signer.write_cursor(user.id, page.next)?;
    let response = response::json_with_permit(page.into_json(&cursor), permit);
    Ok(wait.apply(response))
}

fn parse_params(
    context: &RequestContext<'_>,
    user_id: Uuid,
) -> Result<(Option<ChangesCursor>, i64), Error> {
    let signer = &context.app.list_signer;
    let mut query = context.query();
    let rule = "since must be the cursor of an earlier response";
    let since = query.parameter("since", rule, |text| match text {
        "" => Some(None),
        text => signer.read_cursor(user_id, text).map(Some),
    });
    let limit = parse_limit(&mut query);
    query.finish()?;
    Ok((since.flatten().transpose()?, limit))
}

/// The position after all changes of a revision.
fn last_of(revision: i64) -> Position {
    (revision, Uuid::max())
}

/// A page of changes that is being assembled.
struct Page {
    /// The members of the JSON arrays.
    tasks: Vec<u8>,
    deleted: Vec<u8>,
    /// How many more changes may be appended.
    room: i64,
    has_more: bool,
    /// The revision of the list when it was first read. Later changes belong to the next page, so that
    /// none of them repeats a task of this page.
    revision: i64,
    /// Where the next page starts.
    next: ChangesCursor,
}

impl Page {
    fn new(since: Option<ChangesCursor>, limit: i64) -> Self {
        let start = ChangesCursor {
            position: (0, Uuid::nil()),
            // Leaves out all deletions until the list has been read.
            started_at: i64::MAX,
        };
        Self {
            tasks: Vec::new(),
            deleted: Vec::new(),
            room: limit,
            has_more: true,
            revision: i64::MAX,
            next: since.unwrap_or(start),
        }
    }

    /// Whether there are more changes that belong to the page.
    fn goes_on(&self) -> bool {
        let is_complete = self.next.position >= last_of(self.revision);
        self.has_more && !is_complete && self.room > 0 && self.size() <= MAX_PAGE_BYTES
    }

    fn size(&self) -> usize {
        self.tasks.len() + self.deleted.len()
    }

    /// Reads and appends changes.
    async fn append(&mut self, db: Queries<'_>, user_id: Uuid) -> Result<(), Error> {
        let ChangesCursor {
            position,
            started_at,
        } = self.next;
        // One change beyond the limit shows that there are more.
        let limit = MAX_READ.min(self.room);
        let deleted_after = position.max(last_of(started_at));
        let read = lists::changes(db, user_id, position, deleted_after, limit + 1).await?;
        let read = read.ok_or(Error::InvalidToken(TokenRejection::NoSuchUser))?;
        // The second condition holds after a restore that did not replace the secret.
        if deleted_after < last_of(read.purged_revision) || position.0 > read.revision {
            return Err(Error::CursorExpired);
        }
        self.revision = self.revision.min(read.revision);
        self.next.started_at = started_at.min(read.revision);
        self.write(&read, limit as usize)
    }

    fn write(&mut self, read: &Changes, limit: usize) -> Result<(), Error> {
        let mut written = 0;
        for (position, change) in read.changes.iter().take(limit) {
            if self.size() > MAX_PAGE_BYTES {
                break;
            }
            if position.0 > self.revision {
                self.next.position = last_of(self.revision);
                break;
            }
            match change {
                Change::Changed(task) => task.write_json(next_member(&mut self.tasks)),
                Change::Deleted(task) => {
                    serde_json::to_writer(next_member(&mut self.deleted), task)
                }
            }
            .map_err(Error::serialize)?;
            self.next.position = *position;
            written += 1;
        }
        self.room -= written as i64;
        self.has_more = written < read.changes.len();
        if !self.has_more {
            self.next.position = last_of(read.revision);
        }
        Ok(())
    }

    fn into_json(self, cursor: &str) -> Vec<u8> {
        let more: &[u8] = match self.has_more {
            true => b"true}",
            false => b"false}",
        };
        let parts = [
            b"{\"tasks\":[",
            &*self.tasks,
            b"],\"deleted\":[",
            &*self.deleted,
            b"],\"cursor\":\"",
            cursor.as_bytes(),
            b"\",\"more\":",
            more,
        ];
        parts.concat()
    }
}

impl ResponseBody for Page {
    fn is_large(&self) -> bool {
        self.tasks.is_large() || self.goes_on()
    }
}

/// Prepares the members of a JSON array for another one.
fn next_member(members: &mut Vec<u8>) -> &mut Vec<u8> {
    if !members.is_empty() {
        members.push(b',');
    }
    members
}
