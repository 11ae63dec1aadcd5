//! Pages of the task list.

use std::fmt::Write as _;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::db::tasks::{Filter, TaskPage};
use crate::error::{Error, Result};
use crate::http::context::RequestContext;
use crate::http::query::Query;

/// The default and maximum value of `limit`.
const MAX_LIMIT: i64 = 1000;
/// The longest search text, in code points. Matching takes time in proportion to its length.
const MAX_SEARCH_TEXT: usize = 100;
/// A page ends early once its JSON exceeds this size.
pub(super) const MAX_PAGE_BYTES: usize = 1024 * 1024;
const ESTIMATED_TASK_BYTES: usize = 400;

/// The query parameters of a list of tasks.
pub(super) struct ListParams {
    pub(super) filter: Filter,
    pub(super) limit: i64,
    pub(super) after: Option<Uuid>,
    pub(super) total: bool,
}

impl ListParams {
    pub(super) fn parse(context: &RequestContext<'_>) -> Result<Self> {
        let parse_bool = |text: &str| text.parse().ok();
        let mut query = context.query();
        let rule = "completed must be true or false";
        let completed = query.parameter("completed", rule, parse_bool);
        let rule = "q must have at most 100 characters of valid UTF-8, without NUL";
        let text = query.parameter("q", rule, |text| {
            (text.chars().count() <= MAX_SEARCH_TEXT).then(|| text.to_owned())
        });
        let rule = "sort must be -created_at or created_at";
        let oldest_first = query.parameter("sort", rule, |text| match text {
            "-created_at" => Some(false),
            "created_at" => Some(true),
            _ => None,
        });
        let limit = parse_limit(&mut query);
        let rule = "after must be taken from a Link header";
        let after = query.parameter("after", rule, parse_cursor);
        let rule = "total must be true or false";
        let total = query.parameter("total", rule, parse_bool);
        query.finish()?;
        Ok(Self {
            filter: Filter {
                completed,
                text: text.filter(|text| !text.is_empty()),
                oldest_first: oldest_first.unwrap_or(false),
            },
            limit,
            after,
            total: total.unwrap_or(false),
        })
    }

    /// The path and query of the page after the task `last`, with the same filters.
    pub(super) fn next_link(&self, user_id: Uuid, last: Uuid) -> String {
        let mut path = format!("/api/v1/{user_id}/tasks?limit={}", self.limit);
        // Writing to a string cannot fail.
        if let Some(completed) = self.filter.completed {
            write!(path, "&completed={completed}").ok();
        }
        if let Some(text) = &self.filter.text {
            write!(path, "&q={}", utf8_percent_encode(text, NON_ALPHANUMERIC)).ok();
        }
        if self.filter.oldest_first {
            path.push_str("&sort=created_at");
        }
        if self.total {
            path.push_str("&total=true");
        }
        write!(path, "&after={}", last.simple()).ok();
        path
    }
}

/// Parses the parameter `limit`, or returns its default.
pub(super) fn parse_limit(query: &mut Query<'_>) -> i64 {
    let rule = "limit must be an integer from 1 to 1000";
    let limit = query.parameter("limit", rule, |text| {
        let limit = text.parse().ok().filter(|_| !text.starts_with('+'));
        limit.filter(|limit| (1..=MAX_LIMIT).contains(limit))
    });
    limit.unwrap_or(MAX_LIMIT)
}

/// Parses the ID of the last task of the previous page, as written by `ListParams::next_link`.
fn parse_cursor(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    (id.simple().to_string() == text).then_some(id)
}

/// A page of tasks that is being assembled.
#[derive(Default)]
pub(super) struct Page {
    /// A JSON array without its closing bracket.
    json: Vec<u8>,
    last: Option<Uuid>,
    has_more: bool,
    /// The revision of the list before the first tasks were read.
    pub(super) revision: Option<i64>,
}

impl Page {
    /// Appends up to `limit` tasks, or fewer if they are large. `found` has an extra task if there
    /// are more.
    pub(super) fn append(&mut self, found: &TaskPage, limit: i64) -> Result<()> {
        self.revision = self.revision.or(found.revision);
        let estimate = found.len() * ESTIMATED_TASK_BYTES;
        self.json.reserve(estimate.min(MAX_PAGE_BYTES / 16));
        let mut written = 0;
        for task in found.tasks().take(limit as usize) {
            if self.room() == 0 {
                break;
            }
            self.json
                .push(if self.json.is_empty() { b'[' } else { b',' });
            task.write_json(&mut self.json).map_err(Error::serialize)?;
            self.last = Some(task.id);
            written += 1;
        }
        self.has_more = written < found.len();
        Ok(())
    }

    /// The number of bytes left on the page.
    pub(super) fn room(&self) -> usize {
        (MAX_PAGE_BYTES + 1).saturating_sub(self.json.len())
    }

    /// The ID of the last task, if there are more.
    pub(super) fn next(&self) -> Option<Uuid> {
        self.last.filter(|_| self.has_more)
    }

    pub(super) fn into_json(mut self) -> Vec<u8> {
        if self.json.is_empty() {
            self.json.push(b'[');
        }
        self.json.push(b']');
        self.json
    }
}

impl AsRef<[u8]> for Page {
    fn as_ref(&self) -> &[u8] {
        &self.json
    }
}
