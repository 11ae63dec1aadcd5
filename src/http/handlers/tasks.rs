//! `/api/v1/{user_id}/tasks`: somebody's own tasks.

use std::fmt::Write as _;

use hyper::StatusCode;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::db::tasks::{self, Conditional, CreateOutcome, Filter, Versions};
use crate::domain::{Completion, Description, NewTask, Task, TaskChange, Title, parse_id};
use crate::error::{AuthError, Error, FieldError};
use crate::http::conditional::Preconditions;
use crate::http::context::{Body, JsonFields, RequestContext};
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::TokenRejection;

/// The default and the most of `limit`.
const MAX_PAGE: i64 = 1000;
/// A page ends early where its JSON passes this.
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// What a task takes of a page, roughly.
const ESTIMATED_TASK_BYTES: usize = 400;
/// An answer of this size or more counts among the large ones until it is written.
const LARGE_RESPONSE: usize = 64 * 1024;

/// `GET /api/v1/{user_id}/tasks`
pub(crate) async fn list(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    let page = ListParams::of(context)?;
    // A page that is likely to be large waits for its place before it fills the memory.
    let place = match page.limit > tasks::MAX_BATCHED_LIMIT {
        true => Some(
            context
                .app
                .acquire_large_response(user.id, context.deadline())
                .await?,
        ),
        false => None,
    };
    let total = match page.total {
        true => Some(tasks::count(context.queries(), user.id, &page.filter).await?),
        false => None,
    };
    // One more than asked for tells whether there is more.
    let found = tasks::list(
        context.queries(),
        user.id,
        &page.filter,
        page.after,
        page.limit + 1,
    )
    .await?;
    let (body, last) = write_page(&found, page.limit as usize)?;
    let mut response = if body.len() <= LARGE_RESPONSE {
        response::bytes(StatusCode::OK, "application/json", body)
    } else {
        let place = match place {
            Some(place) => place,
            None => {
                context
                    .app
                    .acquire_large_response(user.id, context.deadline())
                    .await?
            }
        };
        response::bytes_with_permit("application/json", body, place)
    };
    if let Some(last) = last {
        response = response::with_next_link(response, &page.next(user.id, last));
    }
    Ok(match total {
        Some(total) => response::with_total_count(response, total),
        None => response,
    })
}

/// `POST /api/v1/{user_id}/tasks`
pub(crate) async fn create(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response, Error> {
    let fields = body.json_object().await?;
    let key = context.idempotency_key()?;
    let new = new_task(fields)?;
    let created = tasks::create(context.queries(), user.id, new, key).await;
    let failed = match key {
        Some(_) => Error::from,
        None => Error::of_unrepeatable,
    };
    match created.map_err(failed)? {
        CreateOutcome::Task(task) => {
            let path = format!("/api/v1/{}/tasks/{}", task.user_id, task.id);
            Ok(response::with_location(
                response::task(StatusCode::CREATED, &task)?,
                path,
            ))
        }
        CreateOutcome::KeyReused => Err(Error::IdempotencyKeyReused),
        CreateOutcome::NoSuchUser => Err(Error::Unauthenticated(AuthError::AccessToken(
            TokenRejection::NoSuchUser,
        ))),
    }
}

/// `GET /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn get(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let task = tasks::get(context.queries(), user.id, id)
        .await?
        .ok_or(Error::TaskNotFound)?;
    match Preconditions::parse(&context.head.headers).is_modified(task.updated_at.0)? {
        true => response::task(StatusCode::OK, &task),
        false => Ok(response::not_modified(&task)),
    }
}

/// `PUT` and `PATCH /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn update(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let change = task_change(body.json_object().await?)?;
    update_task(context, user, task, &change).await
}

/// `PATCH /api/v1/{user_id}/tasks/{id}/complete`
pub(crate) async fn complete(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let mut fields = body
        .optional_json_object()
        .await?
        .unwrap_or_else(JsonFields::empty);
    let completed = fields.optional_bool("/completed");
    fields.finish()?;
    let completed = completed.map_or(Completion::Toggle, Completion::Set);
    let change = TaskChange {
        completed: Some(completed),
        ..TaskChange::default()
    };
    update_task(context, user, task, &change).await
}

/// `DELETE /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn delete(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&context.head.headers).into_versions();
    let deleted = tasks::delete(context.queries(), user.id, id, &versions).await?;
    into_result(deleted).map(|()| response::no_content())
}

/// `DELETE /api/v1/{user_id}/tasks?completed=true`
pub(crate) async fn delete_completed(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    const RULE: &str = "completed must be true: this deletes all completed tasks";
    let mut errors = Vec::new();
    let completed = context
        .query()
        .parameter("completed", RULE, &mut errors, |text| {
            (text == "true").then_some(())
        });
    if completed.is_none() && errors.is_empty() {
        errors.push(FieldError::parameter("completed", "required", RULE));
    }
    if !errors.is_empty() {
        return Err(Error::Validation(errors));
    }
    let deleted = tasks::delete_completed(context.queries(), user.id).await?;
    response::json(StatusCode::OK, &serde_json::json!({ "deleted": deleted }))
}

async fn update_task(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    change: &TaskChange,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&context.head.headers).into_versions();
    let changed = tasks::update(context.queries(), user.id, id, change, &versions).await;
    // A second toggle undoes the first, unless If-Match keeps it from being executed.
    let failed = match change.completed {
        Some(Completion::Toggle) if !matches!(versions, Versions::Only(_)) => {
            Error::of_unrepeatable
        }
        _ => Error::from,
    };
    response::task(StatusCode::OK, &into_result(changed.map_err(failed)?)?)
}

fn into_result<T>(guarded: Conditional<T>) -> Result<T, Error> {
    match guarded {
        Conditional::Done(value) => Ok(value),
        Conditional::VersionMismatch => Err(Error::PreconditionFailed),
        Conditional::NotFound => Err(Error::TaskNotFound),
    }
}

fn new_task(mut fields: JsonFields) -> Result<NewTask, Error> {
    let title = fields.required_string("/title");
    let title = fields.parse("/title", title, Title::parse);
    let description = fields.nullable_string("/description").flatten();
    let description = fields.parse("/description", description, Description::parse);
    let completed = fields.optional_bool("/completed").unwrap_or(false);
    fields.finish_with(title.map(|title| NewTask {
        title,
        description,
        completed,
    }))
}

fn task_change(mut fields: JsonFields) -> Result<TaskChange, Error> {
    if !["/title", "/description", "/completed"]
        .into_iter()
        .any(|pointer| fields.contains(pointer))
    {
        fields.push_error(FieldError::at(
            "",
            "required",
            "one of title, description and completed is required",
        ));
    }
    let title = if fields.contains("/title") {
        fields.required_string("/title")
    } else {
        None
    };
    let title = fields.parse("/title", title, Title::parse);
    let description = match fields.nullable_string("/description") {
        Some(Some(text)) => fields
            .parse("/description", Some(text), Description::parse)
            .map(Some),
        other => other.map(|_| None),
    };
    let completed = fields.optional_bool("/completed").map(Completion::Set);
    fields.finish_with(Some(TaskChange {
        title,
        description,
        completed,
    }))
}

/// Which part of which list is asked for.
struct ListParams {
    filter: Filter,
    limit: i64,
    after: Option<Uuid>,
    total: bool,
}

impl ListParams {
    fn of(context: &RequestContext<'_>) -> Result<Self, Error> {
        let query = context.query();
        let mut errors = Vec::new();
        let completed = query.parameter(
            "completed",
            "completed must be true or false",
            &mut errors,
            boolean,
        );
        let text = query.parameter(
            "q",
            "q must be text in UTF-8 without NUL",
            &mut errors,
            |text| Some(text.to_owned()),
        );
        let oldest_first = query.parameter(
            "sort",
            "sort must be -created_at or created_at",
            &mut errors,
            |text| match text {
                "-created_at" => Some(false),
                "created_at" => Some(true),
                _ => None,
            },
        );
        let limit = query.parameter(
            "limit",
            "limit must be a whole number from 1 to 1000",
            &mut errors,
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
            &mut errors,
            cursor,
        );
        let total = query.parameter("total", "total must be true or false", &mut errors, boolean);
        if !errors.is_empty() {
            return Err(Error::Validation(errors));
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
    let mut body = Vec::with_capacity((found.len() * ESTIMATED_TASK_BYTES).min(LARGE_RESPONSE));
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
