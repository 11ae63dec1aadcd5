//! `/api/v1/{user_id}/tasks`: the signed-in user's tasks.

use hyper::StatusCode;
use hyper::header::IF_MATCH;

use crate::db::lists;
use crate::db::new_tasks::{self, CreateOutcome};
use crate::db::task_changes::{self, Conditional, Versions};
use crate::db::tasks;
use crate::domain::{Completion, Description, NewTask, TaskChange, Title, parse_id};
use crate::error::{Error, FieldError};
use crate::http::body::Body;
use crate::http::conditional::{Preconditions, SeenTags, entity_tag};
use crate::http::context::RequestContext;
use crate::http::handlers::page::{ListParams, Page};
use crate::http::json_fields::JsonFields;
use crate::http::list_wait::ListWait;
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::TokenRejection;

/// `GET /api/v1/{user_id}/tasks`
pub(crate) async fn list(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    let params = ListParams::parse(context)?;
    let app = context.app;
    let mut wait = ListWait::new(context, &user);
    if let Some(seen) = SeenTags::parse(&context.head.headers)
        && let Some(revision) = lists::revision(context.queries(), user.id).await?
    {
        let tag = app.list_signer.entity_tag(user.id, revision)?;
        if seen.contains(&tag) && !wait.wait_for_change(revision).await? {
            return Ok(wait.apply(response::not_modified(tag)));
        }
    }
    let db = context.queries();
    // One task beyond the limit shows that there are more.
    let append = async |page: &mut Page, after, limit: i64| {
        let room = page.room();
        let found = tasks::list(db, user.id, &params.filter, after, limit + 1, room).await?;
        page.append(&found, limit)
    };
    // Reads a short page first: the query is batched, and returns most lists in full.
    let first = params.limit.min(tasks::MAX_BATCHED_LIMIT);
    let read = || async {
        let mut page = Page::default();
        append(&mut page, params.after, first).await?;
        Ok(page)
    };
    let (mut page, permit) = app
        .large_responses
        .read(user.id, context.network(), context.deadline(), read)
        .await?;
    if let Some(last) = page.next()
        && params.limit > first
        && page.room() > 0
    {
        append(&mut page, Some(last), params.limit - first).await?;
    }
    // Counted after the tasks are read, because the tag must not be newer than the count.
    let mut total = None;
    if params.total {
        total = Some(tasks::count(db, user.id, &params.filter).await?);
    }
    let next = page.next().map(|last| params.next_link(user.id, last));
    let tag = page
        .revision
        .map(|revision| app.list_signer.entity_tag(user.id, revision));
    let response = response::json_with_permit(page.into_json(), permit);
    let response = response::with_page_headers(response, tag.transpose()?, next, total);
    Ok(wait.apply(response))
}

/// `POST /api/v1/{user_id}/tasks`
pub(crate) async fn create(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    body: Body<'_>,
) -> Result<Response, Error> {
    let fields = body.json_object().await?;
    let key = context.idempotency_key()?;
    let new = parse_new_task(fields)?;
    context.app.count_write(user.id)?;
    let max_tasks = context.app.config.max_tasks_per_user;
    let created = new_tasks::create(context.queries(), user.id, new, key, max_tasks).await;
    let convert_error = match key {
        Some(_) => Error::from,
        None => Error::from_non_idempotent,
    };
    respond_to_create(created.map_err(convert_error)?)
}

fn respond_to_create(outcome: CreateOutcome) -> Result<Response, Error> {
    match outcome {
        CreateOutcome::Task(task) => {
            let path = format!("/api/v1/{}/tasks/{}", task.user_id, task.id);
            let response = response::task(StatusCode::CREATED, &task)?;
            Ok(response::with_location(response, path))
        }
        CreateOutcome::KeyReused => Err(Error::IdempotencyKeyReused),
        CreateOutcome::QuotaExceeded => Err(Error::QuotaExceeded),
        CreateOutcome::NoSuchUser => Err(Error::InvalidToken(TokenRejection::NoSuchUser)),
        CreateOutcome::IdTaken(version) => Err(Error::IdTaken(version)),
    }
}

/// `GET /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn get(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let task = tasks::get(context.queries(), user.id, id).await?;
    let task = task.ok_or(Error::TaskNotFound)?;
    match Preconditions::parse(&context.head.headers).is_modified(task.updated_at.0)? {
        true => response::task(StatusCode::OK, &task),
        false => Ok(response::not_modified(entity_tag(task.updated_at.0))),
    }
}

/// `PUT /api/v1/{user_id}/tasks/{id}`, which with `If-None-Match: *` creates a task
pub(crate) async fn put(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let preconditions = Preconditions::parse(&context.head.headers);
    if !preconditions.requires_absence() {
        return update(context, user, task, body).await;
    }
    let mut fields = body.json_object().await?;
    let id = NewTask::parse_id(task);
    if let Err(error) = &id {
        fields.push_error(FieldError::parameter("id", error.code, error.detail));
    }
    let new = parse_new_task(fields)?;
    // `If-Match` requires that the task exists.
    let id = id
        .ok()
        .filter(|_| !context.head.headers.contains_key(IF_MATCH));
    let id = id.ok_or(Error::PreconditionFailed)?;
    context.app.count_write(user.id)?;
    let max_tasks = context.app.config.max_tasks_per_user;
    let created = new_tasks::create_with_id(context.queries(), user.id, id, new, max_tasks);
    respond_to_create(created.await?)
}

/// `PATCH /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn update(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let change = parse_change(body.json_object().await?)?;
    update_task(context, user, task, change).await
}

/// `PATCH /api/v1/{user_id}/tasks/{id}/complete`
pub(crate) async fn complete(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    body: Body<'_>,
) -> Result<Response, Error> {
    let mut fields = body.optional_json_object().await?;
    let completed = fields.optional_bool("/completed");
    let change = TaskChange {
        completed: Some(completed.map_or(Completion::Toggle, Completion::Set)),
        ..TaskChange::default()
    };
    let change = fields.finish_with(Some(change))?;
    update_task(context, user, task, change).await
}

/// `DELETE /api/v1/{user_id}/tasks/{id}`
pub(crate) async fn delete(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&context.head.headers).into_versions();
    context.app.count_write(user.id)?;
    let deleted = task_changes::delete(context.queries(), user.id, id, versions).await?;
    into_result(deleted).map(|()| response::no_content())
}

/// `DELETE /api/v1/{user_id}/tasks?completed=true`
pub(crate) async fn delete_completed(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response, Error> {
    let rule = "completed must be true: this request deletes all completed tasks";
    let mut query = context.query();
    query.require("completed", rule);
    query.parameter("completed", rule, |text| (text == "true").then_some(()));
    query.finish()?;
    context.app.count_write(user.id)?;
    let deleted = task_changes::delete_completed(context.queries(), user.id).await?;
    response::json(StatusCode::OK, &serde_json::json!({ "deleted": deleted }))
}

async fn update_task(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    task: &str,
    change: TaskChange,
) -> Result<Response, Error> {
    let id = parse_id(task).ok_or(Error::TaskNotFound)?;
    let versions = Preconditions::parse(&context.head.headers).into_versions();
    context.app.count_write(user.id)?;
    // A repeated toggle undoes the first one, unless If-Match prevents that.
    let is_toggle = change.completed == Some(Completion::Toggle);
    let convert_error = match is_toggle && !matches!(versions, Versions::Only(_)) {
        true => Error::from_non_idempotent,
        false => Error::from,
    };
    let updated = task_changes::update(context.queries(), user.id, id, change, versions).await;
    let task = into_result(updated.map_err(convert_error)?)?;
    response::task(StatusCode::OK, &task)
}

fn into_result<T>(outcome: Conditional<T>) -> Result<T, Error> {
    match outcome {
        Conditional::Done(value) => Ok(value),
        Conditional::VersionMismatch => Err(Error::PreconditionFailed),
        Conditional::NotFound => Err(Error::TaskNotFound),
    }
}

fn parse_new_task(mut fields: JsonFields) -> Result<NewTask, Error> {
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

fn parse_change(mut fields: JsonFields) -> Result<TaskChange, Error> {
    let mut known = ["/title", "/description", "/completed"].into_iter();
    if !known.any(|pointer| fields.contains(pointer)) {
        let detail = "at least one of title, description and completed is required";
        fields.push_error(FieldError::at("", "required", detail));
    }
    let title = fields.optional_string("/title");
    let title = fields.parse("/title", title, Title::parse);
    let description = fields.nullable_string("/description");
    let description =
        description.map(|text| fields.parse("/description", text, Description::parse));
    let completed = fields.optional_bool("/completed").map(Completion::Set);
    fields.finish_with(Some(TaskChange {
        title,
        description,
        completed,
    }))
}
