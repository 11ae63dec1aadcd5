//! Pages of the task list.

use std::fmt::Write as _;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::db::tasks::Filter;
use crate::domain::Task;
use crate::error::Error;
use crate::http::context::RequestContext;

/// The default and maximum value of `limit`.
const MAX_LIMIT: i64 = 1000;
/// The longest search text, in code points. Matching takes time in proportion to its length.
const MAX_SEARCH_TEXT: usize = 100;
/// A page ends early once its JSON exceeds this size.
const MAX_PAGE_BYTES: usize = 1024 * 1024;
const ESTIMATED_TASK_BYTES: usize = 400;

/// The query parameters of a list of tasks.
pub(super) struct ListParams {
    pub(super) filter: Filter,
    pub(super) limit: i64,
    pub(super) after: Option<Uuid>,
    pub(super) total: bool,
}

impl ListParams {
    pub(super) fn parse(context: &RequestContext<'_>) -> Result<Self, Error> {
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
        let rule = "limit must be an integer from 1 to 1000";
        let limit = query.parameter("limit", rule, |text| {
            let limit = text.parse().ok().filter(|_| !text.starts_with('+'));
            limit.filter(|limit| (1..=MAX_LIMIT).contains(limit))
        });
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
            limit: limit.unwrap_or(MAX_LIMIT),
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

/// Parses the ID of the last task of the previous page, as written by `ListParams::next_link`.
fn parse_cursor(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    (id.simple().to_string() == text).then_some(id)
}

/// Writes up to `limit` tasks as a JSON array, or fewer if they are large. Also returns the ID of
/// the last task written if there are more in `found`.
pub(super) fn write_page(found: &[Task], limit: usize) -> Result<(Vec<u8>, Option<Uuid>), Error> {
    let estimate = found.len() * ESTIMATED_TASK_BYTES;
    let mut body = Vec::with_capacity(estimate.min(MAX_PAGE_BYTES / 16));
    let mut written = 0;
    body.push(b'[');
    for task in found.iter().take(limit) {
        if body.len() > MAX_PAGE_BYTES {
            break;
        }
        if written > 0 {
            body.push(b',');
        }
        serde_json::to_writer(&mut body, task).map_err(Error::serialize)?;
        written += 1;
    }
    body.push(b']');
    let has_more = written < found.len();
    let last = found[..written].last().filter(|_| has_more);
    Ok((body, last.map(|task| task.id)))
}
