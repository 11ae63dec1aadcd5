//! `/api/v1/{user_id}/tasks`: somebody's own tasks.

use std::fmt::Write as _;

use hyper::StatusCode;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::conditional::Preconditions;
use crate::db::tasks::{self, Created, Filter, Guarded, Versions};
use crate::error::{Error, Fault, Refused};
use crate::guard::SignedIn;
use crate::labels::TokenRejection;
use crate::model::{Completion, Description, NewTask, Task, TaskChange, Title, id};
use crate::request::{Body, Call, Members};
use crate::response::{self, Response};

/// The default and the most of `limit`.
const MAX_PAGE: i64 = 1000;
/// A page ends early where its JSON passes this.
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// What a task takes of a page, roughly.
const LIKELY_BYTES: usize = 400;
/// An answer of this size or more counts among the large ones until it is written.
const LARGE: usize = 64 * 1024;

/// `GET /api/v1/{user_id}/tasks`
pub(crate) async fn list(call: &Call<'_>, user: SignedIn) -> Result<Response, Error> {
    let page = Page::of(call)?;
    // A page that is likely to be large waits for its place before it fills the memory.
    let place = match page.limit > tasks::SHORT_PAGE {
        true => Some(call.app.place_for_large(user.id, call.deadline()).await?),
        false => None,
    };
    let database = &call.app.database;
    let total = match page.total {
        true => Some(tasks::count(database, call.deadline(), user.id, &page.filter).await?),
        false => None,
    };
    // One more than asked for tells whether there is more.
    let found = tasks::list(
        database,
        call.deadline(),
        user.id,
        &page.filter,
        page.after,
        page.limit + 1,
    )
    .await?;
    let (body, last) = write_page(&found, page.limit as usize)?;
    let mut response = if body.len() <= LARGE {
        response::bytes(StatusCode::OK, "application/json", body)
    } else {
        let place = match place {
            Some(place) => place,
            None => call.app.place_for_large(user.id, call.deadline()).await?,
        };
        response::large("application/json", body, place)
    };
    if let Some(last) = last {
        response = response::linked(response, &page.next(user.id, last));
    }
    Ok(match total {
        Some(total) => response::counted(response, total),
        None => response,
    })
}

/// `POST /api/v1/{user_id}/tasks`
pub(crate) async fn create(
    call: &Call<'_>,
    user: SignedIn,
    body: Body<'_>,
) -> Result<Response, Error> {
    let members = body.object().await?;
    let key = call.idempotency_key()?;
    let new = new_task(members)?;
    let created = tasks::create(&call.app.database, call.deadline(), user.id, new, key).await;
    let failed = match key {
        Some(_) => Error::from,
        None => Error::of_unrepeatable,
    };
    match created.map_err(failed)? {
        Created::Task(task) => {
            let path = format!("/api/v1/{}/tasks/{}", task.user_id, task.id);
            Ok(response::located(
                response::task(StatusCode::CREATED, &task)?,
                path,
            ))
        }
        Created::KeyReused => Err(Error::IdempotencyKeyReused),
        Created::NoSuchUser => Err(Error::Unauthenticated(Refused::AccessToken(
            TokenRejection::NoSuchUser,
        ))),
    }
}

/// `GET /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn get(call: &Call<'_>, user: SignedIn, task: &str) -> Result<Response, Error> {
    let id = id(task).ok_or(Error::TaskNotFound)?;
    let task = tasks::get(&call.app.database, call.deadline(), user.id, id)
        .await?
        .ok_or(Error::TaskNotFound)?;
    match Preconditions::parse(&call.head.headers).is_modified(task.updated_at.0)? {
        true => response::task(StatusCode::OK, &task),
        false => Ok(response::not_modified(&task)),
    }
}

/// `PUT` and `PATCH /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn update(
    call: &Call<'_>,
    user: SignedIn,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let change = task_change(body.object().await?)?;
    apply(call, user, task, &change).await
}

/// `PATCH /api/v1/{user_id}/tasks/{id}/complete`
pub(crate) async fn complete(
    call: &Call<'_>,
    user: SignedIn,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let mut members = body.object_if_any().await?.unwrap_or_else(Members::none);
    let completed = members.optional_bool("/completed");
    members.end()?;
    let completed = completed.map_or(Completion::Flip, Completion::Set);
    let change = TaskChange {
        completed: Some(completed),
        ..TaskChange::default()
    };
    apply(call, user, task, &change).await
}

/// `DELETE /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn delete(call: &Call<'_>, user: SignedIn, task: &str) -> Result<Response, Error> {
    let id = id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&call.head.headers).into_versions();
    let deleted =
        tasks::delete(&call.app.database, call.deadline(), user.id, id, &versions).await?;
    done(deleted).map(|()| response::no_content())
}

/// `DELETE /api/v1/{user_id}/tasks?completed=true`
pub(crate) async fn delete_completed(call: &Call<'_>, user: SignedIn) -> Result<Response, Error> {
    const RULE: &str = "completed must be true: this deletes all completed tasks";
    let mut faults = Vec::new();
    let completed = call
        .query()
        .parameter("completed", RULE, &mut faults, |text| {
            (text == "true").then_some(())
        });
    if completed.is_none() && faults.is_empty() {
        faults.push(Fault::parameter("completed", "required", RULE));
    }
    if !faults.is_empty() {
        return Err(Error::Validation(faults));
    }
    let deleted = tasks::delete_completed(&call.app.database, call.deadline(), user.id).await?;
    response::json(StatusCode::OK, &serde_json::json!({ "deleted": deleted }))
}

async fn apply(
    call: &Call<'_>,
    user: SignedIn,
    task: &str,
    change: &TaskChange,
) -> Result<Response, Error> {
    let id = id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&call.head.headers).into_versions();
    let changed = tasks::update(
        &call.app.database,
        call.deadline(),
        user.id,
        id,
        change,
        &versions,
    )
    .await;
    // A second toggle undoes the first, unless If-Match keeps it from being executed.
    let failed = match change.completed {
        Some(Completion::Flip) if !matches!(versions, Versions::Only(_)) => Error::of_unrepeatable,
        _ => Error::from,
    };
    response::task(StatusCode::OK, &done(changed.map_err(failed)?)?)
}

fn done<T>(guarded: Guarded<T>) -> Result<T, Error> {
    match guarded {
        Guarded::Done(value) => Ok(value),
        Guarded::MovedOn => Err(Error::PreconditionFailed),
        Guarded::Missing => Err(Error::TaskNotFound),
    }
}

fn new_task(mut members: Members) -> Result<NewTask, Error> {
    let title = members.text("/title");
    let title = members.parse("/title", title, Title::parse);
    let description = members.optional_text("/description").flatten();
    let description = members.parse("/description", description, Description::parse);
    let completed = members.optional_bool("/completed").unwrap_or(false);
    members.end_with(title.map(|title| NewTask {
        title,
        description,
        completed,
    }))
}

fn task_change(mut members: Members) -> Result<TaskChange, Error> {
    if !["/title", "/description", "/completed"]
        .into_iter()
        .any(|pointer| members.has(pointer))
    {
        members.add(Fault::at(
            "",
            "required",
            "one of title, description and completed is required",
        ));
    }
    let title = if members.has("/title") {
        members.text("/title")
    } else {
        None
    };
    let title = members.parse("/title", title, Title::parse);
    let description = match members.optional_text("/description") {
        Some(Some(text)) => members
            .parse("/description", Some(text), Description::parse)
            .map(Some),
        other => other.map(|_| None),
    };
    let completed = members.optional_bool("/completed").map(Completion::Set);
    members.end_with(Some(TaskChange {
        title,
        description,
        completed,
    }))
}

/// Which part of which list is asked for.
struct Page {
    filter: Filter,
    limit: i64,
    after: Option<Uuid>,
    total: bool,
}

impl Page {
    fn of(call: &Call<'_>) -> Result<Self, Error> {
        let query = call.query();
        let mut faults = Vec::new();
        let completed = query.parameter(
            "completed",
            "completed must be true or false",
            &mut faults,
            boolean,
        );
        let text = query.parameter(
            "q",
            "q must be text in UTF-8 without NUL",
            &mut faults,
            |text| Some(text.to_owned()),
        );
        let oldest_first = query.parameter(
            "sort",
            "sort must be -created_at or created_at",
            &mut faults,
            |text| match text {
                "-created_at" => Some(false),
                "created_at" => Some(true),
                _ => None,
            },
        );
        let limit = query.parameter(
            "limit",
            "limit must be a whole number from 1 to 1000",
            &mut faults,
            |text| {
                let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                text.parse()
                    .ok()
                    .filter(|limit| digits && (1..=MAX_PAGE).contains(limit))
            },
        );
        let after = query.parameter(
            "after",
            "after must come out of the header Link",
            &mut faults,
            cursor,
        );
        let total = query.parameter("total", "total must be true or false", &mut faults, boolean);
        if !faults.is_empty() {
            return Err(Error::Validation(faults));
        }
        Ok(Self {
            filter: Filter {
                completed,
                text: text.filter(|text| !text.is_empty()),
                oldest_first: oldest_first.unwrap_or(false),
            },
            limit: limit.unwrap_or(MAX_PAGE),
            after,
            total: total.unwrap_or(false),
        })
    }

    /// Where the list goes on after the task `last`, with the same filters.
    fn next(&self, user_id: Uuid, last: Uuid) -> String {
        let mut path = format!("/api/v1/{user_id}/tasks?limit={}", self.limit);
        // Writing to a string does not fail.
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

fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// The id that the page before ended with, as `Page::next` writes it.
fn cursor(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    (id.simple().to_string() == text).then_some(id)
}

/// Up to `limit` tasks as a JSON array, fewer where they grow too large, and the id to go on
/// after where that was not all.
fn write_page(found: &[Task], limit: usize) -> Result<(Vec<u8>, Option<Uuid>), Error> {
    let mut body = Vec::with_capacity((found.len() * LIKELY_BYTES).min(LARGE));
    body.push(b'[');
    let mut last = None;
    for task in found.iter().take(limit) {
        if body.len() > MAX_PAGE_BYTES {
            return Ok((closed(body), last));
        }
        if last.is_some() {
            body.push(b',');
        }
        serde_json::to_writer(&mut body, task)
            .map_err(|error| Error::Internal(format!("cannot write JSON: {error}")))?;
        last = Some(task.id);
    }
    Ok((closed(body), last.filter(|_| found.len() > limit)))
}

fn closed(mut body: Vec<u8>) -> Vec<u8> {
    body.push(b']');
    body
}
